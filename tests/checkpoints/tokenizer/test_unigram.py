"""SentencePiece's Unigram: the pieces of the greatest sum of scores, as transformers has them."""

import base64
import json
import math
import zlib
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pieces_bytes import model
from samples import CONFIG, params
from transformers.convert_slow_tokenizer import SpmConverter

import funcattn as fa
from funcattn.checkpoints.tokenizer.sentencepiece_model import as_tokenizer_json
from funcattn.checkpoints.tokenizer.tokenizer import from_files

BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
SPECIAL = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
WORDS = ["▁", "▁the", "the", "▁he", "hell", "hello", "lo", "日本", "привет", "ет", "fi", "é"]
LETTERS = sorted({letter for word in WORDS for letter in word} | set("12/<>0x4As"))
PIECES = [
    *SPECIAL,
    *((word, -2.0 - 0.7 * number, 1) for number, word in enumerate(WORDS) if len(word) > 1),
    *((letter, -6.0 - 0.3 * number, 1) for number, letter in enumerate(LETTERS)),
]
# What SentencePiece compiled of U+FB01 -> fi, U+00BD -> 1/2, U+FF21 -> A, e U+0301 -> U+00E9,
# tab and U+3000 -> space, U+0130 -> i U+0307.
CHARSMAP = zlib.decompress(
    base64.b64decode("""
    eNol0wmQj2UcB/Bn/7MapjGayLkjCjnKum9RjuQmOaNyLMs4k5t2UciRcpaj1pGjsMhZcm21mR035SaaMkVIuSKf
    l2fmM993nt/vmfeZeZ4nxIcQioSQI2eIRkpW/lhIzRZCLt/bZEymy0dlSnwspBQP4Uuzqfqzm0sbHcIj8jGLc/M4
    T5CHfOSlAPkpREG+yYyFBPkkhSn6cAvhaZ7CL0IxnqEEpShJGUrzHM+SSFnKU46KVKAylahKFapTjZrUoDa1qMPz
    vEBd6vEiDajPSzTkZRrRhMY0oyktaE4rWvIKrXmVNrSjLR1oTyc60pnXeJ0uvMkbdKMrPehOT5JIphd96E3fqGdi
    LPSX/RjIAN5iEG8zmKEMYTjDGMkIHFkYxTuMITU6eMYxlncZzwTeYxITmcz7TGUKHzCND5nODD5iFjOZw2w+Zi7z
    +IQFzOdTFpLGZyxmEUtZwjI+ZwXL+YKVrArRHQxhDatZSzrrWccGvmITG9nCZr5mK9uiO8h2vmUnO9jNLr4jgx/4
    nh/JjGoZcWFPVNsfF7LkPvZygP0c4iBHOMxPHOUYP3OC45ziJGc4zTnOcp5f+JUL/MZfCXHhovydP6Ke8XHhkvwz
    qnGZq1zhb67xD9e5wb/c4iZ3uM1d/uN/7j14e+UTK3gFSckhOWtC2L0i3AcrnJHC
""")
)
TEXTS = [
    "",
    " ",
    "the hello",
    "  the  hello ",
    "日本 привет☃☃ hello",
    "▁the▁",
    "hellothe 🙂",
    "thé\n12",
]


def made(pieces=PIECES, **options):
    """The tokenizer of a tokenizer.model of the kind Unigram."""
    text, roles = as_tokenizer_json(model(pieces, kind=1, **options), {})
    return from_files(text, roles, {}, [])


def theirs(pieces=PIECES, *, space=1, spaces=0, charsmap=b"", fallback=False):
    """That of transformers, of the same fields."""
    proto = SimpleNamespace(
        trainer_spec=SimpleNamespace(byte_fallback=fallback, unk_piece="<unk>", unk_id=0),
        normalizer_spec=SimpleNamespace(
            precompiled_charsmap=charsmap,
            remove_extra_whitespaces=bool(spaces),
            add_dummy_prefix=bool(space),
            escape_whitespaces=True,
        ),
        pieces=[SimpleNamespace(type=kind) for _, _, kind in pieces],
    )
    vocabulary = [(token, score) for token, score, _ in pieces]
    return SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)


FORMS = {
    "plain": {},
    "without a space in front": {"space": 0},
    "single spaces": {"spaces": 1},
    "characters replaced": {"charsmap": CHARSMAP, "spaces": 1},
}
SCRIPTS = st.text("the lohñ 12日本привет한국☃🙂\t\n\u3000ﬁ½Ａe\u0301İ", max_size=24)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_transformers(form, fallback):
    pieces = [*PIECES, *BYTES] if fallback else PIECES
    ids = [(35, 1)] if fallback else []
    ours = made(pieces, ids=ids, **FORMS[form])
    other = theirs(pieces, fallback=fallback, **FORMS[form])

    @given(SCRIPTS)
    def holds(text):
        assert ours.encode(text) == other.encode(text, add_special_tokens=False).ids
        if fallback and form == "plain":
            assert ours.decode(ours.encode(text)) == text

    holds()
    for text in TEXTS:
        if not ("spaces" in FORMS[form] and text.endswith("▁")):  # which SentencePiece cuts off
            assert ours.encode(text) == other.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer_json_has_the_same_ids(form):
    other = theirs([*PIECES, *BYTES], fallback=True, **FORMS[form])
    ours = from_files(other.to_str(), {}, {}, [])
    for text in TEXTS:
        assert ours.encode(text) == other.encode(text).ids
        assert ours.decode(ours.encode(text)) == other.decode(other.encode(text).ids)


def best(text, scores, unknown):
    """The greatest sum of scores of pieces of a text, where a letter without one costs `unknown`."""
    sums = [0.0] + [-math.inf] * len(text)
    for end in range(1, len(text) + 1):
        for begin in range(end):
            piece = text[begin:end]
            score = scores.get(piece, unknown if end - begin == 1 else -math.inf)
            sums[end] = max(sums[end], sums[begin] + score)
    return sums[-1]


@example("<s>")
@given(st.text("the lo<0x41>s日☃", max_size=20))
def test_the_pieces_have_the_greatest_sum_of_scores(text):
    # Nor are tokens of control or bytes made of characters that spell them.
    ours, scores = made(), {token: score for token, score, kind in PIECES if kind == 1}
    tokens = [PIECES[number] for number in ours.encode(text)]
    whole = "▁" + text.replace(" ", "▁") if text else ""
    assert all(kind in (1, 2) for _, _, kind in tokens)
    known = sum(score for _, score, kind in tokens if kind == 1)
    count = sum(letter not in scores for letter in whole)
    assert math.isclose(known + count * -99.0, best(whole, scores, -99.0), abs_tol=1e-9)


def test_bytes_are_not_spelled_by_a_text():
    ours = made([*PIECES, *BYTES], ids=[(35, 1)])
    assert ours.decode(ours.encode("<0x41> ☃")) == "<0x41> ☃"


def test_a_run_of_unknown_letters_is_one_token():
    assert made().encode("☃☃☃the").count(0) == 1


def test_a_trailing_sign_for_a_space_is_cut_off_with_spaces():
    assert made(spaces=1).encode("the▁ ") == made(spaces=1).encode("the")


def folder(tmp_path, data, **settings):
    fa.save(tmp_path / "m", CONFIG, params())
    (tmp_path / "m" / "tokenizer.model").write_bytes(data)
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "m"


def test_a_folder_has_it(tmp_path):
    found = fa.load(folder(tmp_path, model(PIECES, kind=1), add_bos_token=True)).tokenizer
    assert found.encode("the <s>") == [1, *made().encode("the <s>")]
    assert found.encode("<s>the", special=True)[0] == 1
    assert found.stop == (2,)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (model([*PIECES, ("<turn>", 0.0, 4)], kind=1), {}),
        (model([*PIECES, ("zz", -3.0, 1)], kind=1), {}),
        (model(PIECES, kind=1, ids=[(24, 1)]), {}),
        (model(PIECES, kind=1), {"tokenizer_class": "LlamaTokenizer"}),
        (model(PIECES, kind=3), {}),
    ],
    ids=["defined by a user", "a letter without a piece", "suffixes", "of another class", "words"],
)
def test_what_would_be_another_tokenizer_is_told_of(tmp_path, data, settings):
    with pytest.warns(UserWarning, match=r"got tokenizer\.model"):
        assert fa.load(folder(tmp_path, data, **settings)).tokenizer is None


@pytest.mark.parametrize("case", ["unknown", "twice", "infinite", "map"])
def test_a_damaged_file_is_refused(case):
    data = {
        "unknown": model(PIECES, kind=1, ids=[(40, -1)]),
        "twice": model([*PIECES, PIECES[-1]], kind=1),
        "infinite": model([*PIECES, ("q", -math.inf, 1)], kind=1),
        "map": model(PIECES, kind=1, charsmap=b"\xff\xff\xff\xff12"),
    }[case]
    read = lambda data: from_files(*as_tokenizer_json(data, {}), {}, [])
    with pytest.raises(fa.checkpoints.CheckpointError):
        read(data)
