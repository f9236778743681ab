"""vmap of the operator of layers: the rows of a vmap are the texts of one call.

    vmap(step)(tokens, tails)       tokens (B, T), a prefix of all: B texts of T new tokens

Matrices are read once for all texts. A past that is not mapped has an axis of texts of size one,
and is read once for all of them; behind vmap of vmap, one of each outer row is read once for the
inner rows. Codes are not mapped (`pasts.codes_in_common`), and read once too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..core.autograd import VmapInfo


@native.once
def register() -> None:
    """Register the rule with torch, once; after `native.load`."""
    torch.library.register_vmap("funcattn::layers", _mapped)


def _mapped(
    info: VmapInfo,
    in_dims: tuple[Any, ...],
    plan: Tensor,
    norms: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Tensor],
    among: Tensor | None,
    *sizes: float,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule: the mapped axis goes before that of texts, and both are one axis of more texts."""
    _, _, of_x, of_cos, of_sin, of_keys, of_values, of_lengths, of_among, *_ = in_dims
    B = info.batch_size
    x = x.expand(B, *x.shape) if of_x is None else x.movedim(of_x, 0)
    b = x.shape[1]

    def texts(dims: Sequence[int | None], tensors: Sequence[Tensor], least: int) -> list[Tensor]:
        """The mapped axis before that of texts, in one: of B P, P at least, or 1 where alike."""
        if all(d is None for d in dims) and all(t.shape[0] == 1 for t in tensors):
            return list(tensors)
        fronted = [
            t.expand(B, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, dims, strict=True)
        ]
        P = max(least, *(t.shape[1] for t in fronted))
        return [t.expand(B, P, *t.shape[2:]).flatten(0, 1) for t in fronted]

    whole = lambda dims, tensors: [t.contiguous() for t in texts(dims, tensors, b)]
    cos, sin = whole((of_cos, of_sin), (cos, sin))
    among = None if among is None else whole((of_among,), (among,))[0]
    parts = [
        texts(dims, part, 1)
        for dims, part in zip(
            zip(of_keys, of_values, of_lengths, strict=True),
            zip(keys, values, lengths, strict=True),
            strict=True,
        )
    ]
    keys, values, lengths = ([part[i] for part in parts] for i in range(3))
    lengths = [length.contiguous() for length in lengths]
    with torch._C._AutoDispatchBelowAutograd():
        out = torch.ops.funcattn.layers(
            *(plan, norms, x.flatten(0, 1).contiguous(), cos, sin),
            *(keys, values, lengths, among, *sizes),
        )
    return tuple(y.unflatten(0, (B, b)) for y in out), (0, 0, 0)
