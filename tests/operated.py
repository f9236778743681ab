"""Models that the operators of all layers run, those that they do not, and how near a step is."""

import pytest
import torch

import funcattn as fa
from funcattn.quantization import tiles

MARKS = [
    pytest.mark.skipif(bool(tiles.missing()), reason=tiles.missing()),
    pytest.mark.cpu("the operators of all layers are for the CPU"),
]
CONFIG = fa.Config(
    vocabulary=48,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=16,
    feed_forward=96,
    context=600,
)


class Mixed:
    """As in files of Q4_K_M: some matrices in 8 bits with groups of 16 columns."""

    @staticmethod
    def encode(weight):
        return (fa.int8(group=16) if len(weight) < weight.shape[-1] else fa.int4).encode(weight)


MODELS = {
    "float32": ({}, None),
    "float32, odd sizes": ({"positions": "learned", "width": 40, "feed_forward": 37}, None),
    "int8": ({}, fa.int8),
    "int4": ({}, fa.int4),
    "int4, symmetric": ({"kv_heads": 4}, fa.int4(symmetric=True)),
    "int8, groups of 16": ({"feed_forward": 80}, fa.int8(group=16)),
    "4 bits, and 8 in groups of 16": ({"tied": False}, Mixed()),
    "int8 in groups, odd heads": ({"kv_heads": 1, "head_size": 80}, fa.int8(group=32)),
    "features that do not turn": ({"head_size": 64, "rotary_size": 32, "tied": False}, fa.int4),
    "no positions": ({"positions": "none", "layers": 1}, fa.int4),
    "odd sizes": ({"positions": "learned", "width": 40, "feed_forward": 37}, fa.int8),
    "scales": (
        {
            "rope_scaling": fa.layers.RopeScaling("linear", factor=2.0),
            "attention_scale": 0.7,
            "logit_scale": 2.0,
            "embedding_scale": 3.0,
        },
        fa.int4,
    ),
}
OTHERS = {
    "a window": {"window": 4},
    "a window in some layers": {"window": 4, "window_layers": (True, False)},
    "a cap": {"attention_cap": 5.0},
    "sinks": {"sinks": True},
    "norms of heads": {"head_norm": "rms"},
    "layer norms": {"norm": "layer"},
    "an offset": {"norm_offset": 1.0},
    "norms around": {"norm_placement": "around"},
    "GELU": {"activation": "gelu_tanh"},
    "a limit": {"activation_limit": 3.0},
    "no gate": {"gated": False},
    "side by side": {"parallel": True},
    "one norm": {"parallel": True, "shared_norm": True},
    "a residual scale": {"residual_scale": 0.5},
    "biases": {"qkv_bias": True},
    "biases behind": {"output_bias": True, "feed_forward_bias": True},
    "experts": {"experts": 4, "experts_per_token": 2, "expert_size": 16},
    "small heads": {"head_size": 8},
}


def ids(n, seed=0):
    return torch.randint(0, 48, (n,), generator=torch.Generator().manual_seed(seed))


def weights(config=CONFIG, scheme=None, seed=0, norm=lambda w: w):
    """Matrices so large that attention chooses and gates close, quantized by a scheme; norms are
    ones, or what `norm` makes of these.
    """
    larger = lambda w: norm(w) if w.dim() == 1 else 6 * w
    params = fa.tree.map(larger, fa.decoder(config).init(fa.key(seed)))
    return params if scheme is None else fa.quantize(scheme)(params)


def quantized(config, scheme, seed=0):
    """`weights` with norms of their own."""
    vary = lambda w: w + 0.3 * fa.random.normal(fa.key(w.numel()), tuple(w.shape))
    return weights(config, scheme, seed, vary)


def exact(config, params, tokens, past):
    """Logits, keys and values in float64."""
    wide = fa.cast(torch.float64)
    return fa.decoder(config).extend(wide(fa.dequantize(params)), tokens, wide(past))


def far(given, wanted):
    """The largest difference of logits, and of what is remembered."""
    values = lambda result: [result[0], *result[1].k, *result[1].v]
    return [
        (a.double() - b).abs().max() for a, b in zip(values(given), values(wanted), strict=True)
    ]


def check(config, params, tokens, past):
    """No further from the exact result than 8 times what the same steps in float32 are, and 2^-20
    of what numbers there are.
    """
    model = fa.decoder(config)
    fast = fa.compile(model, backend="eager")
    wanted = exact(config, params, tokens, past)
    ours = far(fast.extend(params, tokens, past), wanted)
    theirs = far(model.extend(fa.dequantize(params), tokens, past), wanted)
    largest = max(x.abs().max() for x in (wanted[0], *wanted[1].k, *wanted[1].v))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 8 * other + 2.0**-20 * largest
