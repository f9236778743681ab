"""What is compiled: a few layers as one function, over a past read as the rows of a bucket."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import caches, transformer
from ..caches import Branch, Cache
from ..kernels import Kernel, Part
from ..masks import Mask
from ..transformer import Config, Layer, LayerContext, LayerSpec


class Rows(NamedTuple):
    """A past of some layers as compiled code reads it: the rows of a bucket, how many count, and the position of the first."""

    k: Tensor  # (layers, K, S, D)
    v: Tensor
    length: Tensor  # int64 ()
    offset: Tensor  # int64 ()

    def of(self, layers: slice) -> "Rows":
        """That of some of the layers."""
        return Rows(self.k[layers], self.v[layers], self.length, self.offset)


def rows(flat: Sequence[Cache]) -> list[Rows]:
    """The parts of a past, as far as their buckets reach."""
    offset, found = torch.zeros_like(flat[0].length), []
    for part in flat:
        held = int(part.length)
        if held:
            S, whole = caches.bucket(held), caches.capacity(part)
            S = whole if whole <= 2 * S else S  # all of it where that is no more than the next bucket: one graph less
            found.append(Rows(part.k[..., :S, :], part.v[..., :S, :], part.length, offset))
        offset = offset + part.length
    return found


def dense_parts(cache: Any) -> list[Cache]:
    """Those that a dense past consists of, in order."""
    return [*dense_parts(cache.prefix), *dense_parts(cache.tail)] if isinstance(cache, Branch) else [cache]


def several(
    config: Config,
    specs: Sequence[LayerSpec],
    kernel: str | Kernel | None,
    weights: Sequence[Layer],
    x: Tensor,
    positions: Tensor,
    pasts: Sequence[Rows],
) -> tuple[Tensor, Tensor, Tensor]:
    """Some layers behind each other: the residual, and the keys and values of the new tokens (layers, K, T, D)."""

    def run(number: int, spec: LayerSpec, layer: Layer, x: Tensor, context: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        parts = [_part(past, number, spec, positions) for past in pasts]
        return transformer.block(config, spec, layer, x, context, parts, name="", kernel=kernel)

    x, delta = transformer.run_layers(config, specs, weights, x, positions, run)
    return x, torch.stack(delta.k), torch.stack(delta.v)


def _part(past: Rows, layer: int, spec: LayerSpec, positions: Tensor) -> Part:
    k, v = past.k[layer], past.v[layer]
    remembered = (torch.arange(k.shape[-2], device=k.device) < past.length).unsqueeze(-1)
    v = torch.where(remembered, v, 0)  # 0 * NaN would be NaN
    stop = past.length.reshape(1, 1).expand(len(positions), 1)
    start = torch.zeros_like(stop)
    if spec.window is not None:
        start = (positions - past.offset - spec.window + 1).clamp(min=0).unsqueeze(-1)
    return Part(k, v, Mask(start, stop))
