"""What a drafter hears of the target."""

import pytest
import torch

import funcattn as fa
from funcattn.decoding.speculative.features import Features
from funcattn.taps import listening, tap


def test_values_of_several_calls_are_rows_and_those_of_several_taps_columns():
    features = Features("speculate", ("b", "a"))
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
    features = Features("speculate", ("a",))
    with listening(lambda name, x: 2 * x), features.listening():
        assert tap("a", torch.ones(1, 1)).item() == 2
    assert features.rows(1)[0].item() == 2


def test_without_taps_nothing_is_heard():
    features = Features("speculate", ())
    with features.listening():
        assert not fa.taps.heard()
    assert features.rows(5) == []
