"""What a drafter hears of the target."""

import pytest
import torch

import funcattn as fa
from funcattn.decoding.speculative.features import Features
from funcattn.taps import listening, tap

MODEL = fa.decoder(fa.Config())


def test_values_of_several_calls_are_rows_and_those_of_several_taps_columns():
    features = Features("speculate", ("b", "a"), MODEL)
    with features.listening():
        for part in (torch.zeros(2, 1), torch.ones(1, 1)):
            tap("a", part)
            tap("other", part)
            tap("b", part + 5)
    assert features.rows(3)[0].tolist() == [[5, 0], [5, 0], [6, 1]]
    assert features.rows(3, 4)[0][3].tolist() == [0, 0]
    with pytest.raises(
        ValueError, match="speculate: the tap b should be heard for 2 tokens, got 3"
    ):
        features.rows(2)


def test_a_listener_outside_goes_on_and_comes_first():
    features = Features("speculate", ("a",), MODEL)
    with listening(lambda name, x: 2 * x), features.listening():
        assert tap("a", torch.ones(1, 1)).item() == 2
    assert features.rows(1)[0].item() == 2


def test_without_taps_nothing_is_heard():
    features = Features("speculate", (), MODEL)
    with features.listening():
        assert not fa.taps.heard()
    assert features.rows(5) == []


def test_what_hidden_returns_is_heard_without_a_listener():
    """So a compiled model stays compiled."""
    features, params = Features("speculate", ("output",), MODEL), MODEL.init(fa.key(0))
    told = {}
    with listening(lambda name, x: told.setdefault(name, x)):
        MODEL.hidden(params, torch.tensor([1, 2, 3]))
    with features.listening():
        assert not fa.taps.heard()
        features.model.hidden(params, torch.tensor([1, 2, 3]))
    features.model.hidden(params, torch.tensor([4]))  # outside: not heard
    assert torch.equal(features.rows(3)[0], told["output"])
    with pytest.raises(ValueError, match="the tap output should be heard for 2 tokens, got 3"):
        features.rows(2)
