"""The angles of the operators are those of the model, from the table and beyond it."""

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn import transformer
from funcattn.compilation import rotations
from funcattn.compilation.rotations import MOST, Turns

PLAIN = fa.Config(head_size=32, rotary_size=16)
SCALED = fa.Config(head_size=32, rope_scaling=fa.layers.RopeScaling("yarn", 4.0, context=64))
LONG = fa.Config(head_size=32, rope_scaling=fa.layers.RopeScaling("dynamic", 4.0, context=64))
NONE = fa.Config(positions="none")


def wanted(config, positions):
    spec = config.layer_spec(0)
    context = transformer.layer_context(config, spec, positions, None, torch.float32, True)
    return tuple(part.squeeze(-3) for part in context.rotation)


@pytest.mark.parametrize("config", [PLAIN, SCALED, LONG], ids=["plain", "yarn", "dynamic"])
def test_they_are_those_of_the_model_bit_for_bit(config):
    turns = Turns(config)
    for positions in ([0], [3, 4, 5], [127, 128], [5000], [2, 2, 1], [MOST + 7], [-3, 5]):
        at = torch.tensor(positions)
        for found, right in zip(turns.of(at), wanted(config, at), strict=True):
            assert torch.equal(found, right)


def test_a_table_is_computed_once_for_a_bucket(monkeypatch):
    calls = []
    computed = rotations.computed
    monkeypatch.setattr(
        rotations, "computed", lambda *args: calls.append(len(args[1])) or computed(*args)
    )
    turns = Turns(PLAIN)
    for n in range(130):
        turns.of(torch.tensor([n]))
    assert calls == [128, 256]


def test_positions_may_be_mapped():
    turns = Turns(PLAIN)
    at = torch.tensor([[1, 2], [40, 41], [7, 8]])
    found = vmap(turns.of)(at)
    for row in range(3):
        for part, right in zip(found, wanted(PLAIN, at[row]), strict=True):
            assert torch.equal(part[row], right)


def test_models_without_rotation_have_angles_of_no_features():
    assert [part.shape for part in Turns(NONE).of(torch.tensor([1, 2]))] == [(2, 0), (2, 0)]


def test_a_shorter_table_of_another_thread_is_not_read():
    class Shared(Turns):
        """Whose table is replaced after each assignment."""

        def __setattr__(self, name, value):
            short = rotations.computed(PLAIN, torch.arange(2))
            super().__setattr__(name, short if name == "table" and value else value)

    at = torch.tensor([500])
    for found, right in zip(Shared(PLAIN).of(at), wanted(PLAIN, at), strict=True):
        assert torch.equal(found, right)
