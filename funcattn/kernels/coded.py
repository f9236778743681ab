"""Attention over keys and values in codes, read by an operator that never writes them as floats.

    out = a v H^T + a' v',    [a, a'] = softmax(scale [q H k^T, q k'^T])    k, v: rotated, in codes

A `CodedSegment` is among the segments of `attend_segments` what a `KVSegment` is: its keys and
values are decoded where something else than the operator reads them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..core.autograd import is_recorded
from ..masks import Mask
from ..records import is_absent
from .backends.masking import is_finite
from .closed import operators

LANES = 32  # rows of a block, and features, that the operator reads at once
MOST_FEATURES = 512  # of a head, as in native/matrices.h


@dataclass(frozen=True, eq=False)
class CodedSegment:
    """Coded rows of one layer, for tokens of which each sees some of them.

    Args:
        table: int64, where the blocks of all layers are in memory, as `addresses` gives it.
        layer: which of them.
        seen: the rows that each token sees, (from, to), counted in the blocks.
        decode: gives keys (K, S, D), values and mask, as a `KVSegment` has them; it holds the
            blocks, so that the addresses are valid as long as this segment.
    """

    table: Tensor
    layer: int
    seen: Sequence[tuple[int, int]]
    decode: Callable[[], tuple[Tensor, Tensor, Any]]

    @functools.cached_property
    def _decoded(self) -> tuple[Tensor, Tensor, Any]:
        return self.decode()

    @property
    def k(self) -> Tensor:
        """Keys (K, S, D), decoded."""
        return self._decoded[0]

    @property
    def v(self) -> Tensor:
        """Values (K, S, Dv), decoded."""
        return self._decoded[1]

    @property
    def mask(self) -> Any:
        """A Mask of the decoded rows, or ()."""
        return self._decoded[2]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._decoded)


def why_not(D: int, Dv: int, rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the operator does not read blocks of such rows, or ""."""
    if dtype != torch.float32 or device.type != "cpu":
        return f"it reads scales of float32 on the CPU, and these are {dtype} on {device.type}"
    if Dv != D or D % LANES or rows % LANES or not 0 < D <= MOST_FEATURES:
        return (
            f"it knows blocks of a multiple of {LANES} rows, and of {LANES} to {MOST_FEATURES} "
            f"features; these have {rows} rows, {D} features of keys and {Dv} of values"
        )
    return native.load()


def addresses(codes: Sequence[Tensor], rows: int, bits: int, size: int) -> Tensor:
    """Where the numbers of these tensors are in memory, int64 (1 + blocks, 6), and their sizes.

    Valid as long as all of them live.

    Args:
        codes: of each block the codes, scale and low of keys and those of values, with all layers.
        rows: of a block.
        bits: of a code.
        size: features of a head.
    """
    return torch.ops.funcattn.coded_table(codes, rows, bits, size)


def attend(q: Tensor, segments: Sequence[Any], scale: float | Tensor) -> Tensor | None:
    """Attention (H, T, D) of a few queries over one coded segment and others, in one call.

    None where the operator does not run: in transforms, for masks that are not one interval a
    query, and where a result is not finite, since a hidden NaN has to change nothing.
    """
    coded = [segment for segment in segments if isinstance(segment, CodedSegment)]
    others = [segment for segment in segments if not isinstance(segment, CodedSegment)]
    plain = [q, *[x for segment in others for x in (segment.k, segment.v)]]
    if len(coded) != 1 or isinstance(scale, Tensor) or q.dim() != 3 or q.dtype != torch.float32:
        return None
    if is_recorded(*plain) or not operators.plain(plain) or torch._C._is_tracing():
        return None
    if any(x.dim() != 3 or x.dtype != q.dtype or x.stride(-1) != 1 for x in plain[1:]):
        return None
    seen = [coded[0].seen, *[_intervals(s.mask, q.shape[-2], s.k.shape[-2]) for s in others]]
    some = [each for each in seen if each is not None]
    if len(some) < len(seen):
        return None
    out = torch.ops.funcattn.coded_attend(
        q.contiguous(),
        coded[0].table,
        coded[0].layer,
        plain[1:],
        [bound for token in zip(*some, strict=True) for part in token for bound in part],
        scale,
    )
    # Of floats the operator reads what a query sees, of codes whole blocks.
    hides = any(begin for begin, _ in coded[0].seen)
    return out if not hides or is_finite([out]) else None


def _intervals(mask: Any, T: int, S: int) -> Sequence[tuple[int, int]] | None:
    """The rows of S that each of T queries sees; None where they are not one interval."""
    if is_absent(mask):
        return ((0, S),) * T
    if not isinstance(mask, Mask) or mask.start.shape != (T, 1):
        return None
    bounds = zip(mask.start.flatten().tolist(), mask.stop.flatten().tolist(), strict=True)
    inside = [(min(max(begin, 0), S), min(max(end, 0), S)) for begin, end in bounds]
    return [(begin, max(begin, end)) for begin, end in inside]
