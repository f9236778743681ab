"""Which pairs of queries and keys are visible, by blocks, and sums over visible pairs only.

Masks are never expanded as a whole. Also the update steps of a streaming softmax over such blocks,
in powers of two (see `torch_blocks`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype
from .layout import Layout, fold, multiply

LOG2E = math.log2(math.e)
NOTHING = float("-inf")


@dataclass(frozen=True)
class Blocks:
    """The blocks of T queries and S keys; start and stop are folded interval masks of T rows."""

    T: int
    S: int
    rows: int
    keys: int
    start: Tensor | None = None
    stop: Tensor | None = None

    def walk(self) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
        """Each block of queries with its visible blocks of keys; True: no hidden pairs."""
        k_blocks = [slice(j, min(j + self.keys, self.S)) for j in range(0, self.S, self.keys)]
        q_blocks = [slice(i, min(i + self.rows, self.T)) for i in range(0, self.T, self.rows)]
        if self.start is None or self.stop is None or not k_blocks or self.start.is_meta:
            yield from (
                (q_block, [(k_block, True) for k_block in k_blocks]) for q_block in q_blocks
            )
            return
        first = torch.tensor([c.start for c in k_blocks], device=self.start.device)
        last = torch.tensor([c.stop for c in k_blocks], device=self.start.device)
        for q_block in q_blocks:
            # (*groups, rows, n, 1)
            start, stop = self.start[..., q_block, :, None], self.stop[..., q_block, :, None]
            some = ((start < last) & (stop > first)).flatten(0, -2).any(0).tolist()
            every = ((start <= first) & (stop >= last)).any(-2).flatten(0, -2).all(0).tolist()
            yield q_block, [(k_block, every[n]) for n, k_block in enumerate(k_blocks) if some[n]]


class Seen:
    """Mask and bias, applied block by block; neither is expanded as a whole."""

    def __init__(
        self,
        mask: Sequence[Tensor],
        bias: Tensor | None,
        layout: Layout,
        dtype: torch.dtype,
        strict: bool,
    ) -> None:
        self.mask, self.bias, self.layout, self.dtype, self.strict = (
            mask,
            bias,
            layout,
            dtype,
            strict,
        )
        self.intervals = [fold(x, layout) for x in mask] if len(mask) == 2 else []
        self.anything = bool(mask) or bias is not None
        self.unit = LOG2E if bias is None else 1.0  # factor of the logits

    def logits(self, s: Tensor, q_block: slice, k_block: slice, whole: bool) -> Tensor:
        """Logits times the unit, plus the bias; -inf at hidden pairs."""
        if self.bias is not None:
            bias = self._block(self.bias, q_block, k_block).to(self.dtype)
            s = s + bias
            if self.strict:
                s = torch.where(bias == NOTHING, NOTHING, s)
        if self.intervals and not whole:
            key = torch.arange(k_block.start, k_block.stop, device=s.device)
            start, stop = (x[..., q_block, :, None] for x in self.intervals)
            seen = (
                key < stop.squeeze(-2)
                if stop.shape[-2] == 1 and not start.any()
                else ((start <= key) & (key < stop)).any(-2)
            )
            s = torch.where(seen, s, NOTHING)
        if len(self.mask) == 1:
            s = torch.where(self._block(self.mask[0], q_block, k_block), s, NOTHING)
        return s

    def power(self, s: Tensor, shift: Tensor) -> Tensor:
        """s - base as an exponent of two; s is overwritten if the shapes are equal."""
        s = s.sub_(shift) if s.shape[:-1] == shift.shape[:-1] else s - shift
        return s if self.bias is None else s.mul_(LOG2E)

    def rescale(self, s: Tensor, row_max: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of a streaming softmax: weights, rescaling of earlier sums, new row max."""
        higher = torch.maximum(row_max, s.amax(-1, keepdim=True))
        shift = torch.where(higher == NOTHING, 0, higher) if self.anything else higher
        p, rescale = self.power(s, shift).exp2_(), row_max - shift
        return p, torch.exp2(rescale if self.bias is None else rescale * LOG2E), higher

    def log(self, row_max: Tensor, normalizer: Tensor) -> Tensor:
        """The log-sum-exp from the row max and the normalizer; -inf where nothing is visible."""
        lse = (
            (row_max + normalizer.log2()) / LOG2E
            if self.bias is None
            else row_max + normalizer.log()
        )
        return torch.where(normalizer == 0, NOTHING, lse)

    def _block(self, x: Tensor, q_block: slice, k_block: slice) -> Tensor:
        return block_of(x, self.layout, q_block, k_block)


def weigh(W: Tensor, c: Tensor, batch: int, visible: Tensor | None = None) -> Tensor:
    """W @ c; with `visible` (shape of W), rows of c that a row of W does not see are left out.

    They would be weighted by 0, and 0 * NaN is NaN.
    """
    if visible is None:
        return multiply(W, c, batch)
    bad = ~c.isfinite()
    reached = multiply(visible.to(W.dtype).expand(W.shape), bad.to(W.dtype), batch) > 0
    return torch.where(reached, multiply(W, c, batch), multiply(W, c.masked_fill(bad, 0), batch))


def block_of(x: Tensor, layout: Layout, q_block: slice, k_block: slice) -> Tensor:
    """A block of a tensor of pairs (*lead, T or 1, S or 1)."""
    q_block = q_block if x.shape[-2] != 1 else slice(0, 1)
    k_block = k_block if x.shape[-1] != 1 else slice(0, 1)
    return fold(x[..., q_block, k_block], layout)


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """False where an entry is NaN or infinite, or the sum overflows (it costs a second pass)."""
    return all(
        capturing(x) or math.isfinite(x.sum(dtype=accumulation_dtype(x)).item()) for x in tensors
    )


def capturing(x: Tensor) -> bool:
    """True where values cannot be read: on the meta device, and during CUDA graph capture."""
    return x.is_meta or (
        x.is_cuda and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )
