"""The compiled function: some layers of a decode step, over cached rows of a bucket size."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import caches, transformer
from ..caches import Cache
from ..kernels import Kernel, Part
from ..masks import Mask
from ..transformer import Config, Layer, LayerContext, LayerDelta, LayerSpec


class Rows(NamedTuple):
    """Cached keys and values of some layers, padded to a bucket of lengths.

    length of the rows count; offset is the position of the first.
    """

    k: Tensor  # (layers, K, S, D)
    v: Tensor
    length: Tensor  # int64 ()
    offset: Tensor  # int64 ()

    def of(self, layers: slice) -> "Rows":
        """The rows of some of the layers."""
        return Rows(self.k[layers], self.v[layers], self.length, self.offset)


def rows(flat: Sequence[Cache]) -> list[Rows]:
    """The segments of a dense cache that are not empty, each cut at its bucket of lengths."""
    offset, found = torch.zeros_like(flat[0].length), []
    for part in flat:
        held = int(part.length)
        if held:
            S, whole = caches.bucket(held), caches.capacity(part)
            # All rows, where they are no more than the next bucket: one graph fewer.
            S = whole if whole <= 2 * S else S
            found.append(Rows(part.k[..., :S, :], part.v[..., :S, :], part.length, offset))
        offset = offset + part.length
    return found


def several(
    config: Config,
    specs: Sequence[LayerSpec],
    kernel: str | Kernel | None,
    weights: Sequence[Layer],
    x: Tensor,
    positions: Tensor,
    pasts: Sequence[Rows],
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some consecutive layers: the residual, and k, v (layers, K, T, D) of the new tokens.

    mask: bool (T, T), among the new tokens, those of a tree of drafts; None is causal.
    """

    def run(
        number: int, spec: LayerSpec, layer: Layer, x: Tensor, context: LayerContext
    ) -> tuple[Tensor, LayerDelta]:
        parts = [_part(past, number, spec, positions) for past in pasts]
        return transformer.block(config, spec, layer, x, context, parts, name="", kernel=kernel)

    x, delta = transformer.run_layers(
        config, specs, weights, x, positions, run, mask=mask, in_order=mask is None
    )
    return x, torch.stack(delta.k), torch.stack(delta.v)


def _part(past: Rows, layer: int, spec: LayerSpec, positions: Tensor) -> Part:
    k, v = past.k[layer], past.v[layer]
    remembered = (torch.arange(k.shape[-2], device=k.device) < past.length).unsqueeze(-1)
    # 0 * NaN would be NaN. Of latent attention the keys are the values too.
    k, v = (k, torch.where(remembered, v, 0)) if v.shape[-1] else (torch.where(remembered, k, 0), v)
    stop = past.length.reshape(1, 1).expand(len(positions), 1)
    start = torch.zeros_like(stop)
    if spec.window is not None:
        start = (positions - past.offset - spec.window + 1).clamp(min=0).unsqueeze(-1)
    return Part(k, v, Mask(start, stop))
