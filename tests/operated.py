"""A small model whose decode steps the operator funcattn::layers runs, for the tests of that."""

import pytest

import funcattn as fa
from funcattn.quantization import tiles

MARKS = [
    pytest.mark.skipif(bool(tiles.missing()), reason=tiles.missing()),
    pytest.mark.cpu("the operator funcattn::layers is for the CPU"),
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


def weights(config=CONFIG, scheme=None, seed=0, norm=lambda w: w):
    """Matrices so large that attention chooses and gates close, quantized by a scheme; norms are
    ones, or what `norm` makes of these.
    """
    larger = lambda w: norm(w) if w.dim() == 1 else 6 * w
    params = fa.tree.map(larger, fa.decoder(config).init(fa.key(seed)))
    return params if scheme is None else fa.quantize(scheme)(params)
