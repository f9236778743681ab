"""The arguments of the operations of the closed family that are no tensors, and as text.

A custom operation of torch takes tensors, numbers and texts: a contraction goes through as JSON.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algebra import Contraction, DenseFactor, LowRankFactor, Output, Term


class TensorSpec(NamedTuple):
    """Shape and dtype of an output."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def tensor_spec(x: Tensor) -> TensorSpec:
    """The shape and dtype of a tensor."""
    return TensorSpec(tuple(x.shape), x.dtype)


@dataclass(frozen=True)
class AttendSpec:
    """The non-tensor arguments of attend; its tensors are q, k, v, mask..., bias."""

    scale: float = 1.0
    masks: int = 0  # number of mask tensors: 2 for (start, stop), 1 for booleans
    biased: bool = False
    kernel: str = "flash"  # a row of BACKENDS


@dataclass(frozen=True)
class ContractSpec:
    """The non-tensor arguments of a contraction.

    is_attend_vjp: it is the vjp of attend for a cotangent of out, with outputs for q, k and v, and
    its tensors end with v, that cotangent, -(cotangent * out).sum(-1), and out. A backend may then
    compute it by its `attend_vjp`.
    """

    contraction: Contraction
    likes: tuple[TensorSpec, ...]
    kernel: str = "flash"
    is_attend_vjp: bool = False


def read(text: str, ranks: Sequence[int], sizes: Sequence[int]) -> ContractSpec:
    """The ContractSpec of a text and the shapes of its outputs, ranks and sizes in one list
    each.
    """
    contraction, dtypes, kernel, is_attend_vjp = decode(text)
    rest = iter(sizes)
    shapes = [tuple(next(rest) for _ in range(rank)) for rank in ranks]
    likes = tuple(TensorSpec(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return ContractSpec(contraction, likes, kernel, is_attend_vjp)


@functools.lru_cache(maxsize=4096)
def decode(text: str) -> tuple[Contraction, list[torch.dtype], str, bool]:
    """The contraction, the dtypes of its outputs, the kernel, and whether it is a vjp of attend."""
    (outputs, scale, mask, bias, dropout, rate), names, kernel, is_attend_vjp = json.loads(text)
    summand: Any = lambda s: LowRankFactor(*s) if len(s) == 3 else DenseFactor(*s)
    term = lambda t: Term(tuple(tuple(map(summand, factor)) for factor in t[0]), *t[1:])
    contraction = Contraction(
        tuple(Output(side, tuple(map(term, terms))) for side, terms in outputs),
        scale,
        tuple(mask),
        bias,
        dropout,
        rate,
    )
    return contraction, [getattr(torch, name) for name in names], kernel, is_attend_vjp
