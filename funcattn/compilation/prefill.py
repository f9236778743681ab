"""All layers of a prompt as one call of a C++ operator, for the models of `fused`.

Products take most of a prompt's time; what stands between them (norms, rotation, gates, sums,
copies of keys and values) is a fifth of it where each is a call that reads and writes all rows.
The operator does it where rows are near: a gate on the results of a panel of both matrices, the sum
with the residual on those of one. float32 matrices are read as they are, quantized ones in tiles.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .. import collectives, layers, transformer
from ..caches import Cache, Delta
from ..core.autograd import has_tangent
from ..core.fingerprints import Fingerprint, is_differentiated
from ..kernels import Kernel, dispatch
from ..layers import Weight, dense_products
from ..models import Past
from ..quantization.tiles import Tiles
from ..records import is_absent
from ..transformer import Config, Layer, Params
from ..tree import leaves as leaves_of
from . import fused
from .conditions import is_dense, is_plain
from .pasts import parts_of
from .rotations import computed

MIN_TOKENS = dense_products.MIN_ROWS


class Prefill:
    """Prompts of one decoder by the operator funcattn::prompt."""

    def __init__(self, config: Config, kernel: str | Kernel | None) -> None:
        self.config, self.kernel = config, kernel
        self.known: list[tuple[Fingerprint, fused.Weights | None]] = []  # of the last weights

    def hidden(self, params: Params, tokens: Tensor, cache: Past) -> tuple[Tensor, Delta] | None:
        """`Model.hidden` of MIN_TOKENS and more behind a dense cache or none; None elsewhere.

        None too where not all of the result is finite: a NaN of a later token would reach earlier
        ones.

        Law: that of the model, up to rounding (test_prefill.py).
        """
        weights = self._weights(params, tokens, cache)
        if weights is None:
            return None
        config, finite = self.config, True
        past = [] if is_absent(cache) else [part for part in parts_of(cache)[0] if int(part.length)]
        positions = transformer.positions_of(config, tokens, cache, None)

        def through(x: Tensor) -> tuple[Tensor, Delta]:
            nonlocal finite
            x, delta, finite = run(config, weights, x, positions, past)
            return x, delta

        found = transformer.forward_pass(config, params, tokens, positions, through, normed=True)
        return found if finite else None

    def _weights(self, params: Params, tokens: Tensor, cache: Past) -> fused.Weights | None:
        """The weights of a call that the operator computes, else None."""
        if not isinstance(tokens, Tensor) or tokens.dim() != 1 or len(tokens) < MIN_TOKENS:
            return None
        if tokens.is_meta or not (is_absent(cache) or is_dense(cache)) or not is_plain(cache):
            return None
        if self.config.follows_length or collectives.axis_size(transformer.TENSOR) > 1:
            return None
        if dispatch.forced(self.kernel) is not None:
            return None
        if not is_absent(cache) and not fused.serves(parts_of(cache)[0]):
            return None
        known = self.known  # no reference to self, so that the model can be freed
        held = next(iter(known), None)  # another thread may replace it
        moved = held is not None and held[1] is not None and held[1].is_moved
        found = None if held is None or moved else held[0].leaves(params)
        leaves = leaves_of(params) if found is None else found
        if (torch.is_grad_enabled() and is_differentiated(leaves)) or has_tangent(params):
            return None
        if held is None or found is None:
            print_ = Fingerprint(params, known.clear)
            held = print_, prepared(self.config, params, len(tokens))
            known[:] = [held]
        return held[1]


def prepared(config: Config, params: Params, T: int) -> fused.Weights | None:
    """The weights for T tokens, or None where the operator does not compute such layers."""
    make = lambda weight: weight if isinstance(weight, Tensor) else layers.prepare(weight, T)
    if any(not is_absent(layer.kv_down) for layer in params.layers):
        return None
    stack = [
        layer._replace(**{name: make(getattr(layer, name)) for name in fused.MATRICES})
        for layer in params.layers
    ]
    ready = params._replace(layers=tuple(stack))
    if fused.why_not(config, ready) or not all(map(_is_level, stack)):
        return None
    return fused.weights(ready)


def _is_level(layer: Layer) -> bool:
    """True where the operator multiplies these matrices about as fast as torch's library."""
    matrices: list[Weight] = [getattr(layer, name) for name in fused.MATRICES]
    return all(
        isinstance(weight, Tiles) or (1 in weight.stride() and dense_products.is_level())
        for weight in matrices
    )


def run(
    config: Config, weights: fused.Weights, x: Tensor, positions: Tensor, past: Sequence[Cache]
) -> tuple[Tensor, Delta, bool]:
    """The residual (T, E) after the last norm, keys and values, and whether all is finite."""
    cos, sin = computed(config, positions)
    seen = lambda rows, part: rows[: config.layers, :, : int(part.length)]
    keys, values = ([seen(getattr(part, name), part) for part in past] for name in ("k", "v"))
    sizes = config.heads, config.kv_heads, config.scale, config.norm_epsilon
    with torch._C._AutoDispatchBelowAutograd():  # no derivatives are taken here
        x, k, v, finite = torch.ops.funcattn.prompt.default(
            weights.plan, weights.norms, x.contiguous(), cos, sin, keys, values, *sizes
        )
    return x, Delta(cast(tuple, k.unbind(0)), cast(tuple, v.unbind(0))), finite
