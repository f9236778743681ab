"""Every kind of scaling against transformers' ROPE_INIT_FUNCTIONS, on both sides of the trained
context.
"""

import pytest
import torch
import transformers
from torch.func import vmap
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import funcattn as fa
from funcattn import layers
from funcattn.layers import RopeScaling

D, CONTEXT = 16, 64
SHORT = tuple(1.0 + i / 8 for i in range(D // 2))
LONG = tuple(2.0 + i for i in range(D // 2))
ORIGINAL = {"original_max_position_embeddings": CONTEXT}

# name -> what transformers calls the fields, and RopeScaling; attention is what cos and sin are
# multiplied by
KINDS = {
    "linear": ({"factor": 4.0}, RopeScaling("linear", 4.0)),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
        RopeScaling("llama3", 8.0, 1.0, 4.0, CONTEXT),
    ),
    "yarn": (
        {"factor": 4.0, **ORIGINAL},
        RopeScaling("yarn", 4.0, context=CONTEXT, attention=1.138629436),
    ),
    "yarn-turns": (
        {"factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.0, **ORIGINAL},
        RopeScaling("yarn", 4.0, context=CONTEXT, fast=8.0, slow=2.0),
    ),
    "yarn-whole": (
        {"factor": 4.0, "truncate": False, "attention_factor": 1.5, **ORIGINAL},
        RopeScaling("yarn", 4.0, context=CONTEXT, truncate=False, attention=1.5),
    ),
    "dynamic": ({"factor": 2.0}, RopeScaling("dynamic", 2.0, context=CONTEXT)),
    "longrope": (
        {
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
            "attention_factor": 1.25,
            **ORIGINAL,
        },
        RopeScaling("longrope", context=CONTEXT, short=SHORT, long=LONG, attention=1.25),
    ),
}


def peer(name, length, base=1e4):
    """Frequencies and amplitude that transformers computes for a sequence of a length."""
    kind = name.split("-")[0]
    config = transformers.LlamaConfig(
        hidden_size=4 * D,
        num_attention_heads=4,
        head_dim=D,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": kind, "rope_theta": base, **KINDS[name][0]},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 5 * CONTEXT])
@pytest.mark.parametrize("name", KINDS)
def test_every_scaling_has_the_frequencies_of_transformers(name, length, base):
    scaling = KINDS[name][1]
    wanted, amplitude = peer(name, length, base)
    # powers of the base are rounded to float32 in another order: a few units in the last place
    got = layers.frequencies(D, base=base, scaling=scaling, length=torch.tensor(length))
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=0)
    assert scaling.attention == pytest.approx(amplitude, rel=1e-6)


def test_angles_that_follow_the_length_change_at_the_context_and_others_do_not():
    for name, (_, scaling) in KINDS.items():
        at = lambda n, scaling=scaling: layers.frequencies(
            D, base=1e4, scaling=scaling, length=torch.tensor(n)
        )
        assert torch.equal(at(1), at(CONTEXT))
        assert torch.equal(at(CONTEXT), at(CONTEXT + 1)) != scaling.follows_length
        assert torch.equal(at(CONTEXT), layers.frequencies(D, base=1e4, scaling=scaling)), name


@pytest.mark.parametrize("name", KINDS)
def test_lengths_are_mapped_by_vmap_and_by_leading_axes(name):
    scaling, lengths = KINDS[name][1], torch.tensor([3, CONTEXT, 3 * CONTEXT])
    f = lambda n: layers.frequencies(D, base=1e4, scaling=scaling, length=n)
    each = torch.stack([f(n) for n in lengths])
    assert torch.equal(vmap(f)(lengths), each)
    assert torch.equal(f(lengths).expand_as(each), each)


def test_amplitude_multiplies_cos_and_sin():
    turn, places = layers.frequencies(D, base=1e4), torch.arange(5)
    one, two = (layers.rope(places, turn, torch.float64, amplitude=a) for a in (1.0, 1.5))
    torch.testing.assert_close(two.cos, one.cos * 1.5)
    torch.testing.assert_close(two.sin, one.sin * 1.5)


def test_features_beyond_the_rotation_stay_as_they_are():
    x = fa.random.normal(fa.key(0), (2, 3, D + 6), torch.float64)
    rotation = layers.rope(torch.arange(4, 7), layers.frequencies(D, base=1e4), torch.float64)
    y = layers.rotate(x, rotation)
    assert torch.equal(y[..., D:], x[..., D:])
    assert torch.equal(y[..., :D], layers.rotate(x[..., :D], rotation))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: RopeScaling("ntk"),
            "kind should be one of 'linear', 'dynamic', 'yarn', 'llama3', 'longrope', 'proportional', got 'ntk'",
        ),
        (
            lambda: RopeScaling("longrope"),
            "one factor a plane each, for longrope, got 0 and 0 numbers",
        ),
        (lambda: RopeScaling("longrope", short=SHORT, long=LONG[:3]), "got 8 and 3 numbers"),
        (
            lambda: layers.frequencies(8, base=1e4, scaling=KINDS["longrope"][1]),
            "4 numbers for D = 8, got 8. They belong to another head size",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
