"""The "torch" backend: attention and contractions over blocks, in torch operations, on any device.

One block of logits at a time is in cache; what is stored is O(T + S). Exponentials are powers of
two, since torch's exp2 is several times faster than its exp on CPU and does not slow down where
results underflow: q is scaled by log2(e). With a bias only the difference between a logit and the
row max is scaled, since finfo.min times log2(e) overflows. Tensors here are plain: no transform is
active inside, so writing in place is legal.

A log-sum-exp in one floating-point number is the row max plus the log of the normalizer, and if the
first is large the second is lost to rounding: the weights exp(S - lse) of n equal logits of -1e9
would sum to n. For rows with |lse| above FAR an additional pass recomputes both from the logits,
and the weights are exp(S - row_max) / normalizer. So softmax is invariant to shifts at every order.

A weight of zero times NaN is NaN. Where keys are hidden and a result is not finite, it is
recomputed with every hidden pair left out of every sum (`strict`): a key that a query does not see
changes neither its output nor a derivative, even if it is NaN or infinite.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import dropout
from ..closed.algebra import (
    ONES,
    Contraction,
    DenseFactor,
    Factor,
    K,
    L,
    LowRankFactor,
    Output,
    Q,
    places,
)
from ..dtypes import accumulation_dtype
from .layout import broadcast, fold, group_sizes, in_parts, multiply, multiply_rows, plan, unfold
from .masking import LOG2E, NOTHING, Blocks, Seen, block_of, capturing, is_finite, weigh

# logits of one block: 512 KiB of float32, so that a few of them fit in a core's cache
ELEMENTS = 2**17
KEYS = 256  # keys of one block, at most
ROWS = 512  # queries of one block, at least where heads or examples can be processed in slices
FAR = 512.0  # |lse| up to which one float32 holds the log of the normalizer to 3e-5


def is_far(lse: Tensor) -> bool:
    """True where a row that sees a key has an lse too large to hold the log of the normalizer."""
    if not lse.numel() or capturing(lse):
        return bool(lse.numel())
    return not torch.linalg.vector_norm(lse, math.inf).item() <= FAR and bool(_far(lse).any())


def _far(lse: Tensor) -> Tensor:
    return (lse.abs() > FAR) & (lse != NOTHING)


def statistics(
    q: Tensor, k: Tensor, lse: Tensor, mask: Sequence[Tensor] = (), scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp as the sum of two numbers of the shape of lse (*lead, T, 1), the second
    small.

    Where lse is precise enough they are lse and zero. In other rows an additional pass computes the
    row max m and the log of the normalizer l, and they are m + l and its rounding error.
    """
    if not is_far(lse):
        return lse.clone(), torch.zeros_like(lse)
    contraction = Contraction((), scale, tuple(range(3, 3 + len(mask))))
    m, log = (
        x / LOG2E
        for x in _Contractor(contraction, [], [q, k, lse, *mask], strict=False).statistics(
            lse.shape
        )
    )
    far = _far(lse)
    whole = torch.where(far, m + log, lse)
    return whole, torch.where(far, (m - whole) + log, 0)


def contract(
    contraction: Contraction, shapes: Sequence[Sequence[int]], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """All outputs of a contraction in one pass over the blocks of P; `shapes` are the outputs'.

    An output is summed over the leading axes that its terms have and its shape lacks, and repeated
    over those that only it has.
    """
    _, keyed, _ = places(contraction)

    def run(strict: bool) -> list[Tensor]:
        part = lambda shapes, tensors: _Contractor(contraction, shapes, tensors, strict).run()
        return in_parts(part, shapes, tensors, sorted(keyed), [Q, K, L], too_many)

    outputs = run(False)
    return (
        outputs
        if (not contraction.mask and contraction.bias == ONES) or is_finite(outputs)
        else run(True)
    )


sweep = contract  # alias: its earlier name


class _Contractor:
    """One contraction: folded inputs, output buffers, and the loop over blocks."""

    def __init__(
        self,
        contraction: Contraction,
        shapes: Sequence[Sequence[int]],
        tensors: Sequence[Tensor],
        strict: bool,
    ) -> None:
        query, key, pair = places(contraction)
        extra = [*contraction.mask, *([contraction.dropout] if contraction.dropout != ONES else [])]
        lead = lambda where: [tensors[p].shape[:-2] for p in where]
        self.contraction, self.shapes, self.tensors = contraction, shapes, tensors
        self.layout = layout = plan(
            lead([*query, *extra]), lead(key), lead(pair) + [tuple(s[:-2]) for s in shapes]
        )
        bias = tensors[contraction.bias] if contraction.bias != ONES else None
        self.wide = accumulation_dtype(tensors[Q], bias)
        self.seen = Seen([tensors[p] for p in contraction.mask], bias, layout, self.wide, strict)
        self.x = {p: fold(tensors[p], layout).to(self.wide) for p in query | key}
        self.scaled = self.x[Q] * (contraction.scale * self.seen.unit)
        lse = self.x[L]
        self.far = _far(lse) if is_far(lse) else None
        # a query without visible keys has no weights
        self.lse = torch.where(lse == NOTHING, float("inf"), lse) * self.seen.unit
        self.keys = (
            fold(tensors[contraction.dropout], layout) if contraction.dropout != ONES else None
        )
        self.targets = [group_sizes(tuple(s[:-2]), layout) for s in shapes]
        self.keep = [
            any(
                t[i] != 1
                for t, o in zip(self.targets, contraction.outputs, strict=True)
                if o.side == "key"
            )
            for i in range(len(layout.groups))
        ]
        self.T, self.S = tensors[Q].shape[-2], tensors[K].shape[-2]
        self.uses, self.joined = self._factors()
        self.out = [
            self.scaled.new_zeros(*t, *s[-2:]) for t, s in zip(self.targets, shapes, strict=True)
        ]

    def _factors(self) -> tuple[Counter[Factor], dict[Factor, tuple[Tensor, Tensor]]]:
        """Uses of each factor, and its low-rank features concatenated, [a_1, a_2] . [b_1, b_2]."""
        products = {term.factors for output in self.contraction.outputs for term in output.terms}
        uses = Counter(factor for product in products for factor in set(product))
        joined = {}
        for factor in uses:
            pairs = [s for s in factor if isinstance(s, LowRankFactor) and ONES not in (s.a, s.b)]
            left, right = (
                [self.x[s.a] if s.weight == 1 else self.x[s.a] * s.weight for s in pairs],
                [self.x[s.b] for s in pairs],
            )
            if pairs and all(len({x.shape[:-2] for x in side}) == 1 for side in (left, right)):
                join = lambda side: side[0] if len(side) == 1 else torch.cat(side, -1)
                joined[factor] = join(left), join(right)
        return uses, joined

    def run(self) -> list[Tensor]:
        groups = broadcast((1,) * len(self.layout.groups), *[x.shape[:-2] for x in self.x.values()])
        for q_block, k_blocks in walk(self.seen, self.T, self.S, groups):
            far = self.far is not None and (
                capturing(self.far) or bool(self.far[..., q_block, :].any())
            )
            shift = (
                self._statistics(q_block, k_blocks) if far else (self.lse[..., q_block, :], None)
            )
            for k_block, whole in k_blocks:
                self._block(q_block, k_block, whole, *shift)
        return [
            unfold(out, self.layout, shape)
            for out, shape in zip(self.out, self.shapes, strict=True)
        ]

    def statistics(self, shape: Sequence[int]) -> list[Tensor]:
        """The row max of every query and the log of the normalizer, as powers of two."""
        groups = broadcast((1,) * len(self.layout.groups), *[x.shape[:-2] for x in self.x.values()])
        rows = [
            self._statistics(q_block, k_blocks)
            for q_block, k_blocks in walk(self.seen, self.T, self.S, groups)
        ]
        return [
            unfold(torch.cat(parts, -2), self.layout, shape) for parts in zip(*rows, strict=True)
        ]

    def _logits(self, q_block: slice, k_block: slice, whole: bool) -> Tensor:
        s = multiply(self.scaled[..., q_block, :], self.x[K][..., k_block, :].mT, self.layout.batch)
        return self.seen.logits(s, q_block, k_block, whole)

    def _statistics(
        self, q_block: slice, k_blocks: Sequence[tuple[slice, bool]]
    ) -> tuple[Tensor, Tensor]:
        """The row max of each query, and the normalizer of exp(S - row_max) as a power of two."""
        row_max = torch.full_like(self.lse[..., q_block, :], NOTHING)
        normalizer = torch.zeros_like(row_max)
        for k_block, whole in k_blocks:
            p, rescale, row_max = self.seen.rescale(self._logits(q_block, k_block, whole), row_max)
            normalizer = normalizer * rescale + p.sum(-1, keepdim=True)
        none = normalizer == 0
        return torch.where(none, float("inf"), row_max), torch.where(none, 0, normalizer.log2())

    def _block(
        self, q_block: slice, k_block: slice, whole: bool, shift: Tensor, normalizer: Tensor | None
    ) -> None:
        s = self._logits(q_block, k_block, whole)
        visible = s != NOTHING if self.seen.strict else None
        P = self.seen.power(s, shift)
        P = (P if normalizer is None else P.sub_(normalizer)).exp2_()
        if self.keys is not None:
            P = P * dropout.keep(self.keys, q_block, k_block, self.contraction.rate).to(P.dtype)
        weights: dict[tuple[Factor, ...], Tensor] = {
            (): P if visible is None else torch.where(visible, P, 0)
        }
        factors: dict[Factor, Tensor] = {}
        for output, target, out in zip(
            self.contraction.outputs, self.targets, self.out, strict=True
        ):
            alike: dict[
                tuple[int, torch.Size], list[tuple[float, Tensor]]
            ] = {}  # not across leading shapes: a sum over an axis would count twice
            for term in output.terms:
                W = self._weight(term.factors, weights, factors, q_block, k_block, visible)
                alike.setdefault((term.value, W.shape), []).append((term.weight, W))
            for (value, _), weighted in alike.items():
                self._add(
                    output, out, target, self._sum(weighted), value, q_block, k_block, visible
                )

    def _weight(
        self,
        product: tuple[Factor, ...],
        weights: dict,
        factors: dict,
        q_block: slice,
        k_block: slice,
        visible: Tensor | None,
    ) -> Tensor:
        """P times a product of factors; common prefixes of products are computed once."""
        if product not in weights:
            head = self._weight(product[:-1], weights, factors, q_block, k_block, visible)
            last = product[-1]
            if self.uses[last] == 1 and len(product) == 1:  # its only use, so it is overwritten
                fresh = self._factor(last, q_block, k_block)
                W = fresh.mul_(head) if fresh.shape == head.shape else head * fresh
            else:
                if last not in factors:
                    factors[last] = self._factor(last, q_block, k_block)
                W = head * factors[last]
            weights[product] = W if visible is None else torch.where(visible, W, 0)
        return weights[product]

    def _factor(self, factor: Factor, q_block: slice, k_block: slice) -> Tensor:
        """A new block of a factor: low-rank summands in one product, then the constant ones."""
        total = None
        if factor in self.joined:
            a, b = self.joined[factor]
            total = multiply(a[..., q_block, :], b[..., k_block, :].mT, self.layout.batch)
        for summand in factor:
            if (
                factor in self.joined
                and isinstance(summand, LowRankFactor)
                and ONES not in (summand.a, summand.b)
            ):
                continue
            x = self._summand(summand, q_block, k_block)
            if total is None:
                total = x * summand.weight
            elif total.shape == broadcast(total.shape, x.shape):
                total.add_(x, alpha=summand.weight)
            else:
                total = torch.add(total, x, alpha=summand.weight)
        assert total is not None
        return total

    def _summand(
        self, summand: LowRankFactor | DenseFactor, q_block: slice, k_block: slice
    ) -> Tensor:
        if isinstance(summand, DenseFactor):
            return block_of(self.tensors[summand.m], self.layout, q_block, k_block).to(self.wide)
        a, b, _ = summand
        if a == ONES:
            return self.x[b][..., k_block, :].sum(-1).unsqueeze(-2)
        if b == ONES:
            return self.x[a][..., q_block, :].sum(-1, keepdim=True)
        return multiply(
            self.x[a][..., q_block, :], self.x[b][..., k_block, :].mT, self.layout.batch
        )

    def _sum(self, weighted: list[tuple[float, Tensor]]) -> Tensor:
        weight, total = weighted[0]
        total = total if weight == 1 else total * weight
        for weight, x in weighted[1:]:
            total = torch.add(total, x, alpha=weight)
        return total

    def _add(
        self,
        output: Output,
        out: Tensor,
        target: Sequence[int],
        W: Tensor,
        value: int,
        q_block: slice,
        k_block: slice,
        visible: Tensor | None,
    ) -> None:
        batch = self.layout.batch
        if output.side == "query":
            part = (
                W.sum(-1, keepdim=True)
                if value == ONES
                else weigh(W, self.x[value][..., k_block, :], batch, visible)
            )
            out[..., q_block, :] += _reduce(part, target)
        elif output.side == "key":
            part = (
                W.sum(-2).unsqueeze(-1)
                if value == ONES
                else self._weigh_rows(W, self.x[value][..., q_block, :], visible)
            )
            out[..., k_block, :] += _reduce(part, target)
        else:
            q_block = q_block if out.shape[-2] != 1 else slice(0, 1)
            k_block = k_block if out.shape[-1] != 1 else slice(0, 1)
            W = W if out.shape[-2] != 1 else W.sum(-2, keepdim=True)
            W = W if out.shape[-1] != 1 else W.sum(-1, keepdim=True)
            out[..., q_block, k_block] += _reduce(W, target)

    def _weigh_rows(self, W: Tensor, c: Tensor, visible: Tensor | None) -> Tensor:
        """W.mT @ c, without hidden rows as in `weigh`."""
        rows = lambda W, c: multiply_rows(W, c, self.keep, self.layout.batch)
        if visible is None:
            return rows(W, c)
        bad = ~c.isfinite()
        reached = rows(visible.to(W.dtype).expand(W.shape), bad.to(W.dtype)) > 0
        return torch.where(reached, rows(W, c), rows(W, c.masked_fill(bad, 0)))


def walk(
    seen: Seen, T: int, S: int, groups: Sequence[int]
) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """The blocks with visible pairs, as `masking.Blocks.walk` gives them."""
    rows, keys = block_sizes(T, S, math.prod(groups))
    # square blocks cover a diagonal with fewer hidden pairs
    rows = min(rows, keys) if seen.intervals else rows
    return Blocks(T, S, rows, keys, *seen.intervals).walk()


def block_sizes(T: int, S: int, groups: int) -> tuple[int, int]:
    """Queries and keys of one block, so that all groups together stay within ELEMENTS."""
    keys = max(1, min(S, KEYS))
    rows = max(16, ELEMENTS // (keys * max(groups, 1)))
    return min(max(T, 1), rows), keys


def _reduce(x: Tensor, target: Sequence[int]) -> Tensor:
    """Sum over the groups that the target lacks."""
    axes = [i for i, n in enumerate(target) if n == 1 and x.shape[i] != 1]
    return x.sum(axes, keepdim=True) if axes else x


def too_many(lead: int, T: int, S: int) -> float:
    """The ratio of the size of one block over all leading axes to ELEMENTS."""
    return lead * min(ROWS, T) * min(KEYS, S) / ELEMENTS
