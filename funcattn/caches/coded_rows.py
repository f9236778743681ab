"""Reading neighbouring blocks of codes: as rows in full precision, or by an operator."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor

from ..core.autograd import has_tangent, transforming
from ..kernels import CodedSegment, Part
from . import rows
from .codes import QuantizedBlock, decode_keys, decode_values

MAX_QUERIES = 16  # of one call of the operator; more are bound by products, which floats have

_REQUIRES_GRAD = attrgetter("requires_grad")


def decoded(
    k: Sequence[QuantizedBlock], v: Sequence[QuantizedBlock], layer: int, R: int, D: int
) -> tuple[Tensor, Tensor]:
    """Keys and values (K, n R, D) that n blocks of R rows stand for in one layer."""
    of_layer = lambda blocks: QuantizedBlock(
        *[torch.stack([x[layer] for x in leaf], -3) for leaf in zip(*blocks, strict=True)]
    )
    keys, values = decode_keys(of_layer(k), R), decode_values(of_layer(v), D)
    return keys.flatten(-3, -2), values.flatten(-3, -2)


def tensors(k: Sequence[QuantizedBlock], v: Sequence[QuantizedBlock]) -> list[Tensor]:
    """Codes, scale and low of keys and of values of each block, as operators take them."""
    return list(chain.from_iterable(chain.from_iterable(zip(k, v, strict=True))))


def segment(
    k: Sequence[QuantizedBlock],
    v: Sequence[QuantizedBlock],
    layer: int,
    positions: Tensor,
    window: int | None,
    R: int,
    D: int,
    bits: int,
) -> Part | None:
    """Blocks of one layer, for tokens at these positions, counted from the first of their rows.

    None where the operator does not read them: many tokens, autograd, transforms, compilers.
    """
    if torch.compiler.is_compiling() or transforming() or len(positions) > MAX_QUERIES:
        return None
    codes = tensors(k, v)
    if (torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, codes))) or has_tangent(codes):
        return None
    if positions.is_meta:
        return None
    n = len(k) * R

    def decode() -> tuple[Tensor, Tensor, Any]:
        keys, values = decoded(k, v, layer, R, D)
        found = rows.read(keys, values, positions, window, stop=n)
        return found[0] if found else Part(keys[:, :0], values[:, :0])

    each = [0] * len(positions)
    each = each if window is None else (positions - (window - 1)).clamp(0, n).tolist()
    coded = CodedSegment(codes, layer, R, bits, [(begin, n) for begin in each], decode)
    return cast(Part, coded)  # which has its fields
