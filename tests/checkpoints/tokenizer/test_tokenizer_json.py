"""A tokenizer.json that would fill the memory or take for ever is refused before a library that
aborts reads it.
"""

import base64
import json
import os
import subprocess
import sys
import time

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizerFast, GPT2TokenizerFast

from funcattn.checkpoints import CheckpointError, Tokenizer
from funcattn.checkpoints.tokenizer import tokenizer_json
from funcattn.checkpoints.tokenizer.tokenizer import from_files
from funcattn.checkpoints.tokenizer.tokenizer_json import (
    LLAMA3,
    LONGEST,
    MOST_ADDED,
    MOST_IDS,
    check,
)

LETTERS = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
SOUND = json.loads(tokenizers.Tokenizer(models.BPE(vocab=LETTERS, merges=[])).to_str())
# one that maps nothing
CHARSMAP = base64.b64encode((1024).to_bytes(4, "little") + bytes(1024) + b"\0").decode()


def made(**changes):
    """The text of a tokenizer.json; `model__vocab` changes the field of the model."""
    values = json.loads(json.dumps(SOUND))
    for name, value in changes.items():
        place, _, inner = name.rpartition("__")
        (values[place] if place else values)[inner] = value
    return json.dumps(values)


def load(**changes):
    return from_files(made(**changes), {}, None, ())


def replace(content, pattern="a", kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(part, *inner):
    names = {"pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    return {"type": "Sequence", names.get(part, f"{part}s"): list(inner)}


def template(single, ids=(1,)):
    token = {"id": "<s>", "ids": list(ids), "tokens": ["b"] * len(ids)}
    pieces = [
        {"Sequence": {"id": p, "type_id": 0}}
        if p in "AB"
        else {"SpecialToken": {"id": p, "type_id": 0}}
        for p in single
    ]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces[:1],
        "special_tokens": {"<s>": token},
    }


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def added(number, content=None, **changes):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content or f"<{number}>", **flags, "special": True, **changes}


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}

BOMBS = {
    "an id beyond all others": {"model__vocab": {**LETTERS, "!": 2**31 - 1}},
    "an id just beyond": {"model__vocab": {**LETTERS, "!": MOST_IDS}},
    "an id below 0": {"model__vocab": {**LETTERS, "!": -1}},
    "an id that is none": {"model__vocab": {**LETTERS, "!": False}},
    "an added id beyond all others": {"added_tokens": [added(2**32 - 1)]},
    "normalizers that grow": {"normalizer": sequence("normalizer", *[replace("a" * 10)] * 9)},
    "one that grows": {"normalizer": sequence("normalizer", replace("a" * 4000), replace("a" * 4000))},
    "sequences in sequences that grow": {
        "normalizer": sequence("normalizer", *[sequence("normalizer", replace("aaaa"), replace("aaaa"))] * 5)
    },
    "patterns that match nothing": {"normalizer": sequence("normalizer", *[replace("aa", "", "String")] * 12)},
    "regexes that match nothing": {"normalizer": sequence("normalizer", *[replace("aa", "x*", "Regex")] * 12)},
    "prepended texts": {"normalizer": sequence("normalizer", *[{"type": "Prepend", "prepend": "a" * 99}] * 3)},
    "a text without end": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "a map that grows": {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"a" * 10**6).decode(),
        }
    },
    "a map that says it is larger": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "bytes of bytes": {"pre_tokenizer": sequence("pre_tokenizer", *[BYTE_LEVEL] * 30)},
    "bytes of bytes, before": {"normalizer": sequence("normalizer", *[{"type": "ByteLevel"}] * 30)},
    "components by the hundred": {"normalizer": sequence("normalizer", *[{"type": "NFC"}] * 100)},
    "a component of next year": {"normalizer": {"type": "Grow"}},
    "a component without a kind": {"pre_tokenizer": {"add_prefix_space": True}},
    "decoders that grow": {"decoder": sequence("decoder", *[replace("a" * 10)] * 9)},
    "a pattern in a decoder": {"decoder": replace("b", "(a+)+$", "Regex")},
    "a text put there twice": {"post_processor": template("AA")},
    "a text put there a million times": {"post_processor": template("A" * 10**5)},
    "a text that is left out": {"post_processor": template(["<s>"])},
    "tokens around a text without end": {"post_processor": template(["<s>"] * 10 + ["A"], ids=[1] * 1000)},
    "tokens around by sequences": {"post_processor": sequence("post_processor", *[template(["<s>", "A"], ids=[1] * 10)] * 30)},
    "ends that are no ids": {"post_processor": template(["<s>", "A"], ids=[2**31])},
    "added tokens by the million": {"added_tokens": [added(i) for i in range(MOST_ADDED + 1)]},
    "added tokens that grow": {
        "normalizer": sequence("normalizer", replace("a" * 60), replace("a" * 60)),
        "added_tokens": [added(i, "a" * 4000, normalized=True) for i in range(2)],
    },
    "a token without end": {"model__vocab": {**LETTERS, "a" * (LONGEST + 1): 26}},
    "an added token without end": {"added_tokens": [added(26, "a" * (LONGEST + 1))]},
    "a suffix without end": {"model__end_of_word_suffix": "a" * (LONGEST + 1)},
    "words of any length": {"model": {"type": "WordPiece", "vocab": LETTERS, "max_input_chars_per_word": 10**9}},
    "a vocabulary that is none": {"model__vocab": 3},
    "a model that is none": {"model": [1]},
    "a pipeline that is none": {"decoder": [3]},
    "a sequence of none": {"decoder": {"type": "Sequence"}},
    "a pattern that counts": {"pre_tokenizer": split("a{9999}b*")},
    "a pattern that counts counts": {"pre_tokenizer": split("((a{1,99}){1,99}){1,99}")},
    "a pattern without end": {"pre_tokenizer": split("a" * 10**5)},
    "a pattern that is none": {"normalizer": {"type": "Replace", "pattern": "a", "content": "b"}},
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_tokenizer_json_is_refused_that_has(case):
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        check(made(**BOMBS[case]))
    assert time.perf_counter() - begun < 5  # a bound on a bomb


@pytest.mark.parametrize(
    "text",
    ['{"model":' * 10**5, "[" * 10**5, '{"model": {"vocab": {}}, "model": {}}'],
    ids=lambda text: text[:9],
)
def test_a_tokenizer_json_is_refused_that_is_read_in_two_ways(text):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        check(text)


FATAL = ("an id beyond all others", "normalizers that grow", "bytes of bytes", "decoders that grow")


def test_a_bomb_does_not_end_the_process():
    script = f"""
import json, resource, sys
from funcattn.checkpoints.tokenizer.tokenizer import from_files
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 800_000_000,) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for text in {[made(**BOMBS[case]) for case in FATAL]}:
    try:
        tokenizer = from_files(text, {{}}, None, ())
        tokenizer.decode(tokenizer.encode("a" * 10)), tokenizer.files()
    except ValueError:
        print("refused")
"""
    environment = {**os.environ, "RUST_BACKTRACE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "refused\n" * 4), done.stderr[-500:]


# What is used.


def test_a_text_that_a_normalizer_would_make_far_larger_is_refused():
    tokenizer = load(normalizer=sequence("normalizer", *[replace("a" * 10)] * 3))
    assert len(tokenizer.encode("ab")) == 1001
    with pytest.raises(CheckpointError, match="at most four letters of one"):
        tokenizer.encode("a" * 10**6)
    assert len(tokenizer.encode("b" * 10**6)) == 10**6  # and one that it would not is read


SLOW = {
    "exponential": ("(a+)+$", "a" * 60 + "!"),
    "alternatives": ("(a|aa)+$", "a" * 90 + "!"),
    "quadratic at each place": (r"[ab]+[ab]+(?![ab\s])", "ab" * 30_000 + " "),
    "linear at each place": (r"[ab]+(?![ab\s])", "ab" * 200_000 + " "),
}


@pytest.mark.parametrize("case", SLOW)
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_pattern_that_takes_for_ever_is_refused(case, part, capfd):
    pattern, text = SLOW[case]
    tokenizer = load(
        **{part: split(pattern) if part == "pre_tokenizer" else replace("b", pattern, "Regex")}
    )
    begun = time.thread_time()
    with pytest.raises(CheckpointError):
        tokenizer.encode(text)
    assert time.thread_time() - begun < 30  # a bound on a bomb
    capfd.readouterr()  # Rust tells standard error about it


def test_what_a_decoder_panics_at_is_an_error_like_any_other(capfd):
    tokenizer = load(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 2**40})
    with pytest.raises(CheckpointError, match="decode"):
        tokenizer.decode([0, 0])
    capfd.readouterr()


def test_letters_by_their_numbers_are_no_counts():
    assert check(made(pre_tokenizer=split(r"[\x{3400}-\x{4000}]+|\p{N}{1,3}"))).has_patterns


def test_a_word_of_text_costs_no_look_at_it():
    assert load().bounds == check(made()) == load(pre_tokenizer=BYTE_LEVEL).bounds
    assert not load().bounds.has_patterns


# What there is, is read.


def llama2():
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\u2581a": 5}
    backend = tokenizers.Tokenizer(
        models.BPE(ids, [("\u2581", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    return backend


def llama3():
    backend = tokenizers.Tokenizer(models.BPE(LETTERS, [], ignore_merges=True))
    steps = [
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    one = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 26)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), one])
    backend.add_special_tokens(["<s>"])
    return backend


def t5():
    backend = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("a", -2.0), ("\u2581a", -3.0)], 0)
    )
    steps = [
        normalizers.Precompiled(base64.b64decode(CHARSMAP)),
        normalizers.NFKD(),
        normalizers.StripAccents(),
    ]
    steps += [
        normalizers.Lowercase(),
        normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        normalizers.Strip(False, True),
    ]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


def of_transformers(kind, tmp_path):
    if kind == "bert":
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##a\n")
        return BertTokenizerFast(str(tmp_path / "vocab.txt")).backend_tokenizer
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    return GPT2TokenizerFast(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    ).backend_tokenizer


@pytest.mark.parametrize("kind", ["llama2", "llama3", "t5", "bert", "gpt2"])
def test_a_pipeline_that_models_have_is_read(kind, tmp_path):
    backend = globals()[kind]() if kind in globals() else of_transformers(kind, tmp_path)
    ours = from_files(backend.to_str(), {}, None, ())
    assert ours.encode("a  a", special=False) == backend.encode("a  a").ids
    assert ours.decode(ours.encode("a a a")) == backend.decode(backend.encode("a a a").ids)


def test_long_texts_are_encoded_as_the_library_does_it():
    backend, text = llama3(), "hello the 12  \n\n x" * 3000
    assert not check(backend.to_str()).has_patterns  # one that is known
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(LLAMA3 + "|x"), "isolated")
    ours = from_files(backend.to_str(), {}, None, ())
    assert ours.bounds.has_patterns
    assert ours.encode(text) == backend.encode(text).ids


def test_the_packaged_tokenizer_is_read_again(smollm2):
    ours = from_files(smollm2.tokenizer.files()["tokenizer.json"], {}, None, ())
    assert ours.encode("Hello, 12 worlds") == smollm2.tokenizer.encode("Hello, 12 worlds")


def test_a_long_text_needs_no_normalizer(monkeypatch):
    monkeypatch.setattr(tokenizer_json, "MEASURED", 4)
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert Tokenizer(backend).encode("a" * 9) == [1]
