"""The "torch" backend: `attend` and `sweep` over blocks of queries and keys, in torch operations on any device and dtype.

A block of logits lives in cache and is gone when the next one comes; what is kept is O(T + S). Powers are of two, not of e, since
torch's exp2 is several times faster than its exp on CPU and does not slow down where results underflow: q is scaled by log2(e).
Tensors here are plain: no transform is active inside, so writing in place is legal.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dropout
from .algebra import ONES, Dense, Factor, K, L, Output, Pair, Q, Sweep, places
from .layout import Layout, fold, group_sizes, in_parts, multiply, multiply_rows, plan, unfold

LOG2E = math.log2(math.e)
NOTHING = float("-inf")
ELEMENTS = 2**17  # of one block of logits: half a megabyte of float32, so that a few of them stay in a core's cache
KEYS = 256  # of one block, at most
ROWS = 512  # of one block, at least where heads or examples can be taken a few at a time instead


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of queries and keys lie, and which a mask lets one see: masks of T rows, folded, with S keys."""

    T: int
    S: int
    rows: int
    keys: int
    start: Tensor | None = None
    stop: Tensor | None = None

    def walk(self) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
        """For each block of queries the blocks of keys that some query of it sees, and whether all see all of it."""
        columns = [slice(j, min(j + self.keys, self.S)) for j in range(0, self.S, self.keys)]
        lines = [slice(i, min(i + self.rows, self.T)) for i in range(0, self.T, self.rows)]
        if self.start is None or self.stop is None or not columns or self.start.is_meta:
            yield from ((line, [(column, True) for column in columns]) for line in lines)
            return
        first = torch.tensor([c.start for c in columns], device=self.start.device)
        last = torch.tensor([c.stop for c in columns], device=self.start.device)
        for line in lines:
            start, stop = self.start[..., line, :, None], self.stop[..., line, :, None]  # (*groups, rows, n, 1)
            some = ((start < last) & (stop > first)).flatten(0, -2).any(0).tolist()
            every = ((start <= first) & (stop >= last)).any(-2).flatten(0, -2).all(0).tolist()
            yield line, [(column, every[n]) for n, column in enumerate(columns) if some[n]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor] = (), bias: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Streaming softmax: out (*lead, T, Dv) in the dtype of v, and lse (*lead, T, 1).

    Source: Milakov and Gimelshein, arXiv:1805.02867; Dao et al., FlashAttention, arXiv:2205.14135.
    """
    T, extra = q.shape[-2], [*mask, *([] if bias is None else [bias])]
    level = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], *[x.shape[:-2] for x in extra])
    lead = torch.broadcast_shapes(level, v.shape[:-2])

    def part(_: Sequence[Sequence[int]], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, *extra = tensors
        return _attend(q, k, v, extra[: len(mask)], extra[len(mask)] if bias is not None else None, scale)

    out, lse = in_parts(part, [(*lead, T, v.shape[-1]), (*level, T, 1)], [q, k, v, *extra], [K, 2], [Q, K], _too_many)
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    T, S = q.shape[-2], k.shape[-2]
    lead = torch.broadcast_shapes(
        q.shape[:-2], k.shape[:-2], v.shape[:-2], *[x.shape[:-2] for x in (*mask, *([] if bias is None else [bias]))]
    )
    others = [x.shape[:-2] for x in mask] + ([] if bias is None else [bias.shape[:-2]]) + [lead]
    layout = plan([q.shape[:-2]], [k.shape[:-2], v.shape[:-2]], others)
    wide = _accurate(q.dtype)
    queries = fold(q, layout).to(wide) * (scale * LOG2E)
    keys, values = fold(k, layout).to(wide), fold(v, layout).to(wide)
    groups = torch.broadcast_shapes(
        *[(1,) * len(layout.groups), queries.shape[:-2], keys.shape[:-2], *[group_sizes(s, layout) for s in others[:-1]]]
    )
    out = values.new_zeros(*layout.sizes, T, v.shape[-1])
    lse = values.new_full((*groups, T, 1), NOTHING)
    seen = _Seen(mask, bias, layout, wide)
    for line, columns in seen.blocks(T, S, groups).walk():
        top = lse[..., line, :]  # in powers of two until the end of the line
        mass = torch.zeros_like(top)
        mixed = torch.zeros_like(out[..., line, :])
        for column, whole in columns:
            s = seen.logits(multiply(queries[..., line, :], keys[..., column, :].mT, layout.batch), line, column, whole)
            higher = torch.maximum(top, s.amax(-1, keepdim=True))
            base = torch.where(higher == NOTHING, 0, higher) if seen.anything else higher
            p = s.sub_(base).exp2_() if s.shape[:-1] == base.shape[:-1] else torch.exp2(s - base)
            fade = torch.exp2(top - base)
            mass = mass.mul_(fade).add_(p.sum(-1, keepdim=True))
            mixed.mul_(fade).add_(multiply(p, values[..., column, :], layout.batch))
            top = higher
        out[..., line, :] = mixed / torch.where(mass == 0, 1, mass)
        lse[..., line, :] = torch.where(mass == 0, NOTHING, (top + mass.log2()) / LOG2E)
    shape = (
        *torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], *[x.shape[:-2] for x in (*mask, *([] if bias is None else [bias]))]),
        T,
        1,
    )
    return unfold(out, layout, (*lead, T, v.shape[-1])).to(v.dtype), unfold(lse, layout, shape)


def sweep(spec: Sweep, shapes: Sequence[Sequence[int]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """All outputs of a sweep (see algebra) in one pass over the blocks of P; `shapes` are those of the outputs.

    An output is summed over the leading axes that its terms have and its shape lacks, and repeated over those it alone has.
    """
    _, keyed, _ = places(spec)
    return in_parts(
        lambda shapes, tensors: _Sweeper(spec, shapes, tensors).run(), shapes, tensors, sorted(keyed), [Q, K, L], _too_many
    )


class _Seen:
    """Mask and bias, laid out block by block: neither is ever expanded as a whole."""

    def __init__(self, mask: Sequence[Tensor], bias: Tensor | None, layout: Layout, dtype: torch.dtype) -> None:
        self.mask, self.bias, self.layout, self.dtype = mask, bias, layout, dtype
        self.intervals = [fold(x, layout) for x in mask] if len(mask) == 2 else []
        self.anything = bool(mask) or bias is not None

    def blocks(self, T: int, S: int, groups: Sequence[int]) -> Blocks:
        rows, keys = block_sizes(T, S, math.prod(groups))
        rows = min(rows, keys) if self.intervals else rows  # square blocks hug a diagonal closer
        return Blocks(T, S, rows, keys, *self.intervals)

    def logits(self, s: Tensor, line: slice, column: slice, whole: bool) -> Tensor:
        """Logits in powers of two with the bias added, -inf where hidden."""
        if self.bias is not None:
            s = s + self._block(self.bias, line, column).to(self.dtype) * LOG2E
        if self.intervals and not whole:
            key = torch.arange(column.start, column.stop, device=s.device)
            start, stop = (x[..., line, :, None] for x in self.intervals)
            seen = key < stop.squeeze(-2) if stop.shape[-2] == 1 and not start.any() else ((start <= key) & (key < stop)).any(-2)
            s = torch.where(seen, s, NOTHING)
        if len(self.mask) == 1:
            s = torch.where(self._block(self.mask[0], line, column), s, NOTHING)
        return s

    def _block(self, x: Tensor, line: slice, column: slice) -> Tensor:
        return block_of(x, self.layout, line, column)


def block_of(x: Tensor, layout: Layout, line: slice, column: slice) -> Tensor:
    """A block of a tensor of pairs (*lead, T or 1, S or 1)."""
    line = line if x.shape[-2] != 1 else slice(0, 1)
    column = column if x.shape[-1] != 1 else slice(0, 1)
    return fold(x[..., line, column], layout)


class _Sweeper:
    """One sweep: inputs laid out, buffers of the outputs, and the loop."""

    def __init__(self, spec: Sweep, shapes: Sequence[Sequence[int]], tensors: Sequence[Tensor]) -> None:
        query, key, pair = places(spec)
        extra = [*spec.mask, *([spec.dropout] if spec.dropout != ONES else [])]
        lead = lambda where: [tensors[p].shape[:-2] for p in where]
        self.spec, self.shapes, self.tensors = spec, shapes, tensors
        self.layout = layout = plan(lead([*query, *extra]), lead(key), lead(pair) + [tuple(s[:-2]) for s in shapes])
        self.wide = _accurate(tensors[Q].dtype)
        self.x = {p: fold(tensors[p], layout).to(self.wide) for p in query | key}
        self.scaled = self.x[Q] * (spec.scale * LOG2E)
        level = self.x[L]
        self.level = torch.where(level == NOTHING, float("inf"), level) * LOG2E  # a query that saw no key has no weights
        self.seen = _Seen([tensors[p] for p in spec.mask], tensors[spec.bias] if spec.bias != ONES else None, layout, self.wide)
        self.keys = fold(tensors[spec.dropout], layout) if spec.dropout != ONES else None
        self.targets = [group_sizes(tuple(s[:-2]), layout) for s in shapes]
        self.keep = [
            any(t[i] != 1 for t, o in zip(self.targets, spec.outputs, strict=True) if o.side == "key")
            for i in range(len(layout.groups))
        ]
        self.T, self.S = tensors[Q].shape[-2], tensors[K].shape[-2]
        self.uses, self.joined = self._factors()
        self.out = [self.scaled.new_zeros(*t, *s[-2:]) for t, s in zip(self.targets, shapes, strict=True)]

    def _factors(self) -> tuple[Counter[Factor], dict[Factor, tuple[Tensor, Tensor]]]:
        """How many products hold a factor, and the features of its pairs side by side, [a_1, a_2] . [b_1, b_2]."""
        products = {term.factors for output in self.spec.outputs for term in output.terms}
        uses = Counter(factor for product in products for factor in set(product))
        joined = {}
        for factor in uses:
            pairs = [s for s in factor if isinstance(s, Pair) and ONES not in (s.a, s.b)]
            left, right = [self.x[s.a] if s.weight == 1 else self.x[s.a] * s.weight for s in pairs], [self.x[s.b] for s in pairs]
            if pairs and all(len({x.shape[:-2] for x in side}) == 1 for side in (left, right)):
                join = lambda side: side[0] if len(side) == 1 else torch.cat(side, -1)
                joined[factor] = join(left), join(right)
        return uses, joined

    def run(self) -> list[Tensor]:
        groups = torch.broadcast_shapes((1,) * len(self.layout.groups), *[x.shape[:-2] for x in self.x.values()])
        for line, columns in self.seen.blocks(self.T, self.S, groups).walk():
            for column, whole in columns:
                self._block(line, column, whole)
        return [unfold(out, self.layout, shape) for out, shape in zip(self.out, self.shapes, strict=True)]

    def _block(self, line: slice, column: slice, whole: bool) -> None:
        s = multiply(self.scaled[..., line, :], self.x[K][..., column, :].mT, self.layout.batch)
        s = self.seen.logits(s, line, column, whole)
        level = self.level[..., line, :]
        P = s.sub_(level).exp2_() if s.shape[:-1] == level.shape[:-1] else torch.exp2(s - level)
        if self.keys is not None:
            P = P * dropout.keep(self.keys, line, column, self.spec.rate).to(P.dtype)
        weights: dict[tuple[Factor, ...], Tensor] = {(): P}
        factors: dict[Factor, Tensor] = {}
        for output, target, out in zip(self.spec.outputs, self.targets, self.out, strict=True):
            alike: dict[
                tuple[int, torch.Size], list[tuple[float, Tensor]]
            ] = {}  # not across leads: a sum over one would count twice
            for term in output.terms:
                W = self._weight(term.factors, weights, factors, line, column)
                alike.setdefault((term.value, W.shape), []).append((term.weight, W))
            for (value, _), weighted in alike.items():
                self._add(output, out, target, self._sum(weighted), value, line, column)

    def _weight(self, product: tuple[Factor, ...], weights: dict, factors: dict, line: slice, column: slice) -> Tensor:
        """P times a product of factors; products that begin alike are computed once."""
        if product not in weights:
            head = self._weight(product[:-1], weights, factors, line, column)
            last = product[-1]
            if self.uses[last] == 1 and len(product) == 1:  # no one else reads this factor: it becomes the weight
                fresh = self._factor(last, line, column)
                weights[product] = fresh.mul_(head) if fresh.shape == head.shape else head * fresh
                return weights[product]
            if last not in factors:
                factors[last] = self._factor(last, line, column)
            weights[product] = head * factors[last]
        return weights[product]

    def _factor(self, factor: Factor, line: slice, column: slice) -> Tensor:
        """A fresh block of a factor: its pairs in one product, then what is constant along queries or keys."""
        total = None
        if factor in self.joined:
            a, b = self.joined[factor]
            total = multiply(a[..., line, :], b[..., column, :].mT, self.layout.batch)
        for summand in factor:
            if factor in self.joined and isinstance(summand, Pair) and ONES not in (summand.a, summand.b):
                continue
            x = self._summand(summand, line, column)
            if total is None:
                total = x * summand.weight
            elif total.shape == torch.broadcast_shapes(total.shape, x.shape):
                total.add_(x, alpha=summand.weight)
            else:
                total = torch.add(total, x, alpha=summand.weight)
        assert total is not None
        return total

    def _summand(self, summand: Pair | Dense, line: slice, column: slice) -> Tensor:
        if isinstance(summand, Dense):
            return block_of(self.tensors[summand.m], self.layout, line, column).to(self.wide)
        a, b, _ = summand
        if a == ONES:
            return self.x[b][..., column, :].sum(-1).unsqueeze(-2)
        if b == ONES:
            return self.x[a][..., line, :].sum(-1, keepdim=True)
        return multiply(self.x[a][..., line, :], self.x[b][..., column, :].mT, self.layout.batch)

    def _sum(self, weighted: list[tuple[float, Tensor]]) -> Tensor:
        weight, total = weighted[0]
        total = total if weight == 1 else total * weight
        for weight, x in weighted[1:]:
            total = torch.add(total, x, alpha=weight)
        return total

    def _add(self, output: Output, out: Tensor, target: Sequence[int], W: Tensor, value: int, line: slice, column: slice) -> None:
        batch = self.layout.batch
        if output.side == "query":
            part = W.sum(-1, keepdim=True) if value == ONES else multiply(W, self.x[value][..., column, :], batch)
            out[..., line, :] += _reduce(part, target)
        elif output.side == "key":
            part = W.sum(-2).unsqueeze(-1) if value == ONES else multiply_rows(W, self.x[value][..., line, :], self.keep, batch)
            out[..., column, :] += _reduce(part, target)
        else:
            line = line if out.shape[-2] != 1 else slice(0, 1)
            column = column if out.shape[-1] != 1 else slice(0, 1)
            W = W if out.shape[-2] != 1 else W.sum(-2, keepdim=True)
            W = W if out.shape[-1] != 1 else W.sum(-1, keepdim=True)
            out[..., line, column] += _reduce(W, target)


def block_sizes(T: int, S: int, groups: int) -> tuple[int, int]:
    """Rows of queries and of keys in one block, so that all groups together stay within ELEMENTS."""
    keys = max(1, min(S, KEYS))
    rows = max(16, ELEMENTS // (keys * max(groups, 1)))
    return min(max(T, 1), rows), keys


def _reduce(x: Tensor, target: Sequence[int]) -> Tensor:
    """Sum the groups that the target lacks."""
    axes = [i for i, n in enumerate(target) if n == 1 and x.shape[i] != 1]
    return x.sum(axes, keepdim=True) if axes else x


def _too_many(lead: int, T: int, S: int) -> float:
    """How many times too large one block of all leading axes would be."""
    return lead * min(ROWS, T) * min(KEYS, S) / ELEMENTS


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
