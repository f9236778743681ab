"""Sums over blocks of queries and keys of a function that the caller writes, in linear memory."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.computations import Flat, batched, pullback, pushforward
from . import arguments
from .backends.masking import Blocks


class Axes(NamedTuple):
    """The axes of a tensor that index queries and keys, negative: vmap adds axes in front."""

    query: int = 0  # 0: no such axis
    key: int = 0


NOTHING = float("-inf")
# logits of one block: with 1 MiB of float32, the overhead of calling torch is small
ELEMENTS = 2**18
SIDE = 512  # queries or keys of one block, at most


@dataclass(frozen=True)
class BlockSum:
    """A function summed over blocks of queries and keys (a `core.computations.Computation`).

    The first input is indexed by queries and has the leading axes of the logits, for their number.
    `mask` are the indices of the interval ends (start, stop) among the inputs, or (): blocks that
    no query sees are skipped.
    """

    f: Flat  # from blocks of the inputs to blocks of the outputs
    reads: tuple[Axes, ...]
    writes: tuple[Axes, ...]
    T: int
    S: int
    mask: tuple[int, ...] = ()
    maximum: bool = False  # maximum over blocks in place of the sum; not differentiable
    rows: int = 0  # queries of one block, of all examples together; 0: by the number of logits

    def __call__(self, *x: Tensor) -> tuple[Tensor, ...]:
        part_of = lambda q_block, k_block: self.f(
            *[cut(t, axes, q_block, k_block) for t, axes in zip(x, self.reads, strict=True)]
        )
        nowhere = slice(0, 0)  # an empty block, to infer shapes
        with arguments.no_autocast(x[0]):  # sums in float32 at least, in backward passes too
            out = [
                self._whole(part, axes)
                for part, axes in zip(part_of(nowhere, nowhere), self.writes, strict=True)
            ]
            for q_block, k_block in self._blocks(x):
                for total, part, axes in zip(
                    out, part_of(q_block, k_block), self.writes, strict=True
                ):
                    into = cut(total, axes, q_block, k_block)
                    into.copy_(torch.maximum(into, part)) if self.maximum else into.add_(part)
        return tuple(out)

    def vjp(self, inputs: int, needed: Sequence[int], given: Sequence[int]) -> "BlockSum":
        """See core.computations.Computation: cotangents of inputs have the axes of the inputs."""
        reads = (*self.reads, *[self.writes[n] for n in given])
        return replace(
            self,
            f=pullback(self.f, inputs, needed, given),
            reads=reads,
            writes=tuple(self.reads[n] for n in needed),
        )

    def jvp(self, inputs: int, moved: Sequence[int]) -> "BlockSum":
        """See core.computations.Computation: tangents have the axes of their inputs."""
        return replace(
            self,
            f=pushforward(self.f, inputs, moved),
            reads=(*self.reads, *[self.reads[n] for n in moved]),
        )

    def vmap(self, mapped: Sequence[bool], randomness: str) -> "BlockSum":
        """See core.computations.Computation."""
        return replace(self, f=batched(self.f, mapped, randomness))

    def _blocks(self, x: Sequence[Tensor]) -> Iterator[tuple[slice, slice]]:
        if self.rows:
            reads = zip(x, self.reads, strict=True)
            groups = max(math.prod(t.shape[: axes.query]) for t, axes in reads if axes.query)
            rows = max(1, self.rows // max(1, groups))
        else:
            groups = max(1, x[0].numel() // max(1, self.T))
            rows = min(SIDE, max(16, ELEMENTS // (groups * min(self.S + 1, SIDE))))
        for q_block, k_blocks in Blocks(
            self.T, self.S, rows, SIDE, *[x[n] for n in self.mask]
        ).walk():
            yield from ((q_block, k_block) for k_block, _ in k_blocks)

    def _whole(self, part: Tensor, axes: Axes) -> Tensor:
        shape = list(part.shape)
        for axis, size in ((axes.query, self.T), (axes.key, self.S)):
            if axis:
                shape[axis] = size
        return part.new_full(shape, NOTHING) if self.maximum else part.new_zeros(shape)


def cut(x: Tensor, axes: Axes, q_block: slice, k_block: slice) -> Tensor:
    """The block of a tensor at these queries and keys, a view."""
    for axis, part in ((axes.query, q_block), (axes.key, k_block)):
        if axis:
            x = x.narrow(axis, part.start, part.stop - part.start)
    return x
