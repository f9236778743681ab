"""A text with its accepted drafts marked."""

import pytest
import torch

import funcattn as fa
from funcattn import speculation
from funcattn.speculation import Piece, Stats


class Bytes:
    """A token is a byte of UTF-8."""

    stop = ()

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def stats(rounds, drafted, accepted):
    return Stats(*map(torch.tensor, (rounds, drafted, accepted)))


def test_accepted_drafts_are_marked_and_the_model_s_own_tokens_are_not():
    tokens = tuple(b"abcdefg")
    rounds = [
        Piece("a", tokens[:1], (), False, stats(0, 0, 0)),
        Piece("bcd", tokens[:4], (), False, stats(1, 3, 2)),  # two stayed, and one of the model's
        Piece("e", tokens[:5], (), False, stats(2, 6, 2)),  # none stayed
        Piece("fg", tokens[:7], (), True, stats(3, 9, 4)),  # the text ended within the draft
    ]
    found = speculation.transcript(rounds, Bytes())
    assert str(found).splitlines() == [
        "a‹bc›de‹fg›",
        "4 of 9 drafted tokens stayed (44%); 2.33 tokens a round in 3 rounds",
    ]
    assert found._repr_html_().count("<span") == 2


def test_a_character_of_several_tokens_stands_whole_in_one_span():
    tokens = tuple("aé<".encode())
    rounds = [
        Piece("a", tokens[:1], (), False, stats(0, 0, 0)),
        Piece("é<", tokens, (), True, stats(1, 1, 1)),
    ]
    found = speculation.transcript(rounds, Bytes())
    assert found.text == "aé<"
    assert "é&lt;" in found._repr_html_()


def test_the_text_is_that_of_the_tokens():
    model = fa.decoder(fa.Config())
    params, prompt = model.init(fa.key(0)), torch.tensor([1, 2, 3, 1, 2])
    drafter = fa.drafters.model(model, params, length=3)
    options = {"steps": 20, "tokenizer": Bytes()}
    found = speculation.transcript(
        speculation.stream(fa.key(1), model, params, drafter, prompt, **options), Bytes()
    )
    tokens = fa.generate(fa.key(1), model, params, prompt, steps=20)[0]
    assert found.text == Bytes().decode(tokens.tolist())
    assert any(span.drafted for span in found.spans)


def test_nothing_written_is_an_error():
    with pytest.raises(ValueError, match="got none"):
        speculation.transcript([], Bytes())


def test_the_spans_of_a_piece_are_its_text_and_what_was_held_back_keeps_its_mark():
    rounds = [
        Piece("a", tuple(b"ab"), (), False, stats(1, 3, 1)),  # b may begin a stop string, and waits
        Piece("bc", tuple(b"abcd"), (), False, stats(2, 6, 1)),
        # the stop string is there, and is not text
        Piece("", tuple(b"abcdx"), (), True, stats(3, 9, 2)),
    ]
    marks = speculation.Marks(Bytes())
    spans = [marks.spans(piece) for piece in rounds]
    assert ["".join(span.text for span in found) for found in spans] == ["a", "bc", ""]
    assert [[span.drafted for span in found] for found in spans] == [[True], [False, False], []]
    assert speculation.transcript(rounds, Bytes()).text == "abc"


def test_a_run_that_was_told_in_part_keeps_its_mark_for_the_rest():
    rounds = [
        # bc may begin a stop string; a and b were drafted
        Piece("a", tuple(b"abc"), (), False, stats(1, 3, 2)),
        Piece("bcd", tuple(b"abcd"), (), True, stats(2, 6, 2)),
    ]
    found = speculation.transcript(rounds, Bytes())
    assert [(span.text, span.drafted) for span in found.spans] == [
        ("a", True),
        ("b", True),
        ("c", False),
        ("d", False),
    ]
