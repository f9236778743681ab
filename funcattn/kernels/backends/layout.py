"""The layout for every kernel: axes with the same broadcasting pattern are merged into groups.

The tensors of a contraction broadcast over leading axes: heads, groups of query heads per key head,
examples, and each axis that vmap adds. Axes with the same pattern (which tensors have them) merge
into one group. Groups that some key-side tensor has come first and are a batch of matrix products;
groups that all key-side tensors lack come after and become more rows of the same product. So
grouped queries, and many futures of one cache, read k and v once, and no key-side tensor is
repeated.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """lead: the broadcast leading shape; groups: the leading axes of each group, batch first."""

    lead: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    batch: int  # number of batch groups

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of each group."""
        return tuple(math.prod(self.lead[axis] for axis in group) for group in self.groups)


def in_rows(x: Tensor) -> Tensor:
    """x (*lead, A, B), copied if its rows are not contiguous or overlap, for torch's fused kernels.

    The CPU kernel writes contiguous features into a tensor laid out in the order of the strides of
    q, which is a different one if a row, head or example begins within the row before
    (test_canaries.py:: test_torchs_fused_attention_reads_overlapping_rows_wrongly); its backward
    does so for k and v too, and its bfloat16 products do not take such rows at all. So sliding
    windows and repeated rows are copied; heads and examples repeated by strides of zero are not.
    The row stride matters even for a single row, where `contiguous` would not change it.
    """
    *lead, row, feature = x.stride()
    width = x.shape[-1]
    if feature == 1 and row >= width and min(lead, default=row) >= width:  # as most tensors are
        return x
    if (
        feature == 1
        and row >= width
        and all(s >= width or not s or n == 1 for s, n in zip(lead, x.shape, strict=False))
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """torch.broadcast_shapes, called only if shapes differ (rare): it takes 20 us."""
    first = shapes[0]
    for shape in shapes:
        if shape != first:
            return tuple(torch.broadcast_shapes(*shapes))
    return tuple(first)


def plan(
    query: Sequence[tuple[int, ...]],
    key: Sequence[tuple[int, ...]],
    other: Sequence[tuple[int, ...]],
) -> Layout:
    """The layout for leading shapes on the query side, the key side, and others (pairs, outputs).

    Example:
        >>> plan([(2, 3, 4)], [(2, 3, 1)], [])
        Layout(lead=(2, 3, 4), groups=((0, 1), (2,)), batch=1)
    """
    return _plan(tuple(query), tuple(key), tuple(other))


@functools.lru_cache(maxsize=4096)
def _plan(
    query: tuple[tuple[int, ...], ...],
    key: tuple[tuple[int, ...], ...],
    other: tuple[tuple[int, ...], ...],
) -> Layout:
    shapes = [*query, *key, *other]
    rank = max(len(s) for s in shapes)
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    lead = broadcast(*padded)
    keyed = padded[len(query) : len(query) + len(key)]
    merged: dict[tuple[bool, ...], list[int]] = {}
    for axis in range(rank):
        if lead[axis] != 1:
            merged.setdefault(tuple(s[axis] == 1 for s in padded), []).append(axis)
    has_key = lambda group: any(s[group[0]] != 1 for s in keyed)
    groups = sorted(
        (tuple(group) for group in merged.values()), key=lambda group: (not has_key(group), group)
    )
    return Layout(tuple(lead), tuple(groups), sum(map(has_key, groups)))


def fold(x: Tensor, layout: Layout) -> Tensor:
    """(*lead', A, B) to (*groups, A, B), size 1 for groups that x lacks; a view if possible."""
    *lead, A, B = x.shape
    padded, order, _, sizes = _folding(layout, tuple(lead))
    x = x if len(padded) == len(lead) else x.reshape(*padded, A, B)
    return x.permute(order).reshape(*sizes, A, B)


def unfold(x: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """The inverse of `fold`; `shape` is the full shape, leading axes and last two."""
    padded, order, inverse, _ = _folding(layout, tuple(shape[:-2]))
    return (
        x.reshape(*[padded[axis] for axis in order[:-2]], *x.shape[-2:])
        .permute(inverse)
        .reshape(tuple(shape))
    )


Axes = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _folding(layout: Layout, lead: Axes) -> tuple[Axes, Axes, Axes, Axes]:
    """The permutation that folds leading axes of these sizes.

    Returns the sizes at full rank, the order of the axes, its inverse, and the sizes of the groups.
    """
    rank = len(layout.lead)
    padded = (1,) * (rank - len(lead)) + lead
    kept = [axis for group in layout.groups for axis in group]
    order = [*(axis for axis in range(rank) if axis not in kept), *kept, rank, rank + 1]
    inverse = tuple(order.index(axis) for axis in range(rank + 2))
    return padded, tuple(order), inverse, group_sizes(lead, layout)


def group_sizes(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Sizes of the groups, 1 where the leading shape lacks them."""
    padded = (1,) * (len(layout.lead) - len(shape)) + tuple(shape)
    return tuple(math.prod(padded[axis] for axis in group) for group in layout.groups)


def multiply(x: Tensor, w: Tensor, batch: int) -> Tensor:
    """x (*groups, R, X) @ w (*groups, X, C); row groups, which w lacks, become rows."""
    if x.dim() == batch + 2:
        return x @ w
    rows = x.shape[batch:-2]
    if all(n == 1 for n in w.shape[:batch]) and x.dim() > 2:
        return (x.flatten(0, -2) @ w.reshape(w.shape[-2:])).reshape(*x.shape[:-1], w.shape[-1])
    flat = x.flatten(batch, -2)
    out = flat @ w.reshape(*w.shape[:batch], *w.shape[-2:])
    return out.reshape(*out.shape[:-2], *rows, x.shape[-2], w.shape[-1])


def multiply_rows(x: Tensor, c: Tensor, keep: Sequence[bool], batch: int) -> Tensor:
    """x (*groups, R, X).mT @ c (*groups, R, C), summed over row groups not kept."""
    if x.dim() == batch + 2:
        return x.mT @ c
    groups = broadcast(x.shape[:-2], c.shape[:-2])
    x, c = x.expand(*groups, *x.shape[-2:]), c.expand(*groups, *c.shape[-2:])
    kept = [i for i in range(len(groups)) if i < batch or keep[i]]
    summed = [i for i in range(len(groups)) if i not in kept]
    order = [*kept, *summed, len(groups), len(groups) + 1]
    flat = lambda t: t.permute(order).flatten(len(kept), -2)
    out = flat(x).mT @ flat(c)
    return out.reshape(
        *[groups[i] if i in kept else 1 for i in range(len(groups))], *out.shape[-2:]
    )


Run = Callable[[Sequence[Sequence[int]], Sequence[Tensor]], Sequence[Tensor]]


def in_parts(
    run: Run,
    shapes: Sequence[Sequence[int]],
    tensors: Sequence[Tensor],
    keyed: Sequence[int],
    weighing: Sequence[int],
    too_many: Callable[[int, int, int], float],
) -> list[Tensor]:
    """Run on slices of a leading axis, so that blocks fit in cache and products have enough rows.

    The axis is the longest one that the key side (indices `keyed`) and P (indices `weighing`) have,
    so that every term has it: an output that lacks the axis is the sum over the slices.
    """
    lead = broadcast(*[x.shape[:-2] for x in tensors], *[tuple(s[:-2]) for s in shapes])
    some = lambda where, axis: any(has(tensors[p].shape, axis) for p in where)
    axes = [axis for axis in range(-len(lead), 0) if some(keyed, axis) and some(weighing, axis)]
    times = too_many(math.prod(lead), tensors[0].shape[-2], tensors[1].shape[-2])
    if not axes or times <= 1:
        return list(run(shapes, tensors))
    axis = max(axes, key=lambda a: lead[a])
    step = max(1, int(lead[axis] / times))
    whole: list[Tensor] = []
    for begin in range(0, lead[axis], step):
        n = min(step, lead[axis] - begin)
        sizes = [
            (*s[: axis - 2], n, *s[len(s) + axis - 1 :]) if has(s, axis) else s for s in shapes
        ]
        parts = in_parts(
            run, sizes, [_cut(x, axis, begin, n) for x in tensors], keyed, weighing, too_many
        )
        if not whole:
            whole = [x.new_zeros(tuple(s)) for x, s in zip(parts, shapes, strict=True)]
        for total, x in zip(whole, parts, strict=True):
            _cut(total, axis, begin, n).add_(x)  # an output without the axis is summed over it
    return whole


def _cut(x: Tensor, axis: int, begin: int, n: int) -> Tensor:
    return x.narrow(axis - 2, begin, n) if has(x.shape, axis) else x


def has(shape: Sequence[int], axis: int) -> bool:
    """True where a shape has size above 1 at a leading axis; -1 is the axis before the last two."""
    return len(shape) - 2 >= -axis and shape[axis - 2] != 1
