"""Contractions of the closed algebra in C++: the program of the operator funcattn::native_contract.

A contraction becomes a list of integers and weights, once for each contraction:

    load    a query-side tensor times a weight, one block at a time
    pack    a key-side tensor of a low-rank factor; value: one that a weight is contracted with
    factor  a matrix (T, S): products of loads and packs, row and column terms, dense matrices;
            the first is the logits
    step    to (+)= weight * from * factor, from P to the products of factors and their sums
    sink    a matrix, the values that it is contracted with, and the output that it adds to

Each low-rank term of a factor and each sink is one product of matrices. Terms of an output with the
same values become one sink, so their sum is taken before the product; equal factors, products and
sums are computed once.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ..closed.algebra import (
    ONES,
    Contraction,
    DenseFactor,
    Factor,
    K,
    L,
    LowRankFactor,
    Q,
    Term,
    places,
)

SIDES = ("query", "key", "pair")  # numbered as in program.h
MAX_AXES = 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROOM = 5 * 2**15  # numbers of all matrices of a block: 640 KiB of 1 MiB of L2
ROWS, KEYS = 192, 128  # of a block, at most
PANEL = 32  # keys of a panel of packed rows
Product = tuple[int, ...]  # sorted indices of factors
Sum = tuple[tuple[Product, float], ...]  # weights times P times products of factors


class Step(NamedTuple):
    """to = weight * source * factor, or += where it adds; buffers by number, factor -1 for none."""

    adds: bool
    to: int
    source: int
    factor: int
    weight: float


def why_not_contract(contraction: Contraction, tensors: Sequence[Tensor]) -> str:
    """Why the operator does not compute a contraction, or ""."""
    query, key, pair = places(contraction)
    T, S = tensors[Q].shape[-2], tensors[K].shape[-2]
    reads = [tensors[p] for p in query | key | pair]
    if any(x.device.type != "cpu" for x in (*reads, *(tensors[p] for p in contraction.mask))):
        return "the operator is for the CPU"
    if any(x.dtype not in FLOATS for x in reads):
        return "the operator computes in float32"
    if any(not x.numel() for x in tensors):
        return "a size is zero"
    if max(x.dim() for x in tensors) - 2 > MAX_AXES:
        return f"there are more than {MAX_AXES} leading axes"
    if any(tensors[p].shape[-2] != T for p in query) or any(tensors[p].shape[-2] != S for p in key):
        return "a tensor has not as many rows as there are queries or keys"
    return native.load()


def contract(
    contraction: Contraction,
    shapes: Sequence[Sequence[int]],
    tensors: Sequence[Tensor],
    dtypes: Sequence[torch.dtype] = (),
) -> list[Tensor] | None:
    """All outputs of a contraction, float32, as `torch_blocks.contract`; see `why_not_contract`.

    Products of bfloat16 tensors are those of the processor, where it has them; the weights of an
    output whose dtype (`dtypes`) is bfloat16 are then rounded to it, as torch's kernel does.

    Returns None where a result or a logit is not finite: a hidden key may be NaN, which has to
    change nothing, and a logit may overflow that does not in another order of products.
    """
    read = _readable(contraction, tensors)
    axes = max([len(s) for s in shapes] + [x.dim() for x in read]) - 2
    bits = lambda shapes: tuple(_axes(s, axes) for s in shapes)
    numbers, weights, buffers = program(contraction, bits(x.shape for x in read), bits(shapes))
    outs = [read[L].new_zeros(tuple(s)) for s in shapes]
    rows, keys = block_sizes(buffers, read[Q].shape[-2], len(contraction.mask) == 2)
    rounds = sum(1 << n for n, dtype in enumerate(dtypes) if dtype == torch.bfloat16)
    run = torch.ops.funcattn.native_contract
    return outs if run(read, numbers, weights, outs, rows, keys, rounds) else None


def _readable(contraction: Contraction, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as the operator reads them, or lse in place of one that it does not read.

    Rows have contiguous features, lse is float32, and integers are int64.
    """
    query, key, pair = places(contraction)
    rows, integers = query | key, set(contraction.mask) if len(contraction.mask) == 2 else set()
    whole, read = pair | {*contraction.mask} - integers, []
    integers |= {contraction.dropout} - {ONES}
    for place, x in enumerate(tensors):
        if place in rows:
            x = x.float() if place == L else x
            x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        elif place in integers:
            x = x.long()
        elif place not in whole:
            x = tensors[L].float()
        read.append(x.detach())
    return read


def block_sizes(buffers: int, T: int, by_intervals: bool) -> tuple[int, int]:
    """Queries and keys of a block, so that `buffers` matrices of a block stay within ROOM.

    Keys are read once for each block of queries, so many queries are best; with intervals, as
    causal masks have, few of them, since a block reaches over what its last query sees.
    """
    if by_intervals:
        rows, keys = min(ROWS // 2, max(32, T // 256 * 16)), 2 * KEYS
    else:
        rows, keys = ROWS, KEYS
    while keys > PANEL and buffers * rows * keys > ROOM:
        keys //= 2
    return rows, keys


def _axes(shape: Sequence[int], axes: int) -> int:
    """The leading axes of size above 1, as bits; axis 0 is the first of `axes`."""
    first = axes + 2 - len(shape)
    return sum(1 << (first + n) for n, size in enumerate(shape[:-2]) if size != 1)


@functools.lru_cache(maxsize=1024)
def program(
    contraction: Contraction, has: tuple[int, ...], outputs: tuple[int, ...]
) -> tuple[list[int], list[float], int]:
    """The integers, the weights and the number of buffers of a contraction.

    Args:
        contraction: the contraction.
        has: the leading axes of each tensor, as bits.
        outputs: the leading axes of each output.
    """
    return _Compiler(contraction, has, outputs).compile()


class _Compiler:
    """Numbers of loads, packs, values, factors and sums, in the order of their first use."""

    def __init__(
        self, contraction: Contraction, has: tuple[int, ...], outputs: tuple[int, ...]
    ) -> None:
        self.contraction, self.has, self.leads = contraction, has, outputs
        self.loads: dict[tuple[int, float], int] = {}
        self.packs: dict[int, int] = {}
        self.values: dict[int, int] = {}
        self.factors: dict[Factor, int] = {}
        self.sums: dict[Sum, int] = {}
        self.everything = functools.reduce(int.__or__, (*has, *outputs), 0)

    def compile(self) -> tuple[list[int], list[float], int]:
        logits = [LowRankFactor(Q, K, self.contraction.scale)]
        logits += [DenseFactor(self.contraction.bias)] if self.contraction.bias != ONES else []
        self._number(self.factors, tuple(logits))
        outputs, sinks = [], []
        for number, output in enumerate(self.contraction.outputs):
            scale = next((t.weight for t in output.terms if t.weight), 1.0)
            outputs.append((SIDES.index(output.side), scale))
            for (value, gate), total in self._sums(number, scale).items():
                values = self._values(output.side, value, scale)
                sinks.append((self._number(self.sums, total), values, number, gate))
        steps, places, buffers = _schedule(list(self.sums), len(self.factors))
        out = _Numbers()
        out.add(buffers, L)
        rate = self.contraction.rate
        out.add(self.contraction.dropout, min(math.ceil(rate * 2**32), 2**32 - 1))
        out.weights.append(1 / (1 - rate))
        out.list([(p,) for p in self.contraction.mask])
        described = [self._factor(factor) for factor in self.factors]  # it numbers loads and packs
        out.list([(tensor,) for tensor, _ in self.loads], [weight for _, weight in self.loads])
        out.list([(tensor,) for tensor in self.packs])
        out.list([(tensor,) for tensor in self.values])
        out.add(len(described))
        for buffer, (dots, rows, columns, dense) in enumerate(described):
            out.add(buffer)
            out.list(dots)
            for terms in (rows, columns, dense):
                out.list([(tensor,) for tensor, _ in terms], [weight for _, weight in terms])
        out.list([tuple(map(int, step[:4])) for step in steps], [step.weight for step in steps])
        out.list([(side,) for side, _ in outputs], [weight for _, weight in outputs])
        sinks = [(places[total], values, number, gate) for total, values, number, gate in sinks]
        out.list(sorted(sinks, key=lambda sink: sink[0]))  # what reads one matrix is done at once
        return out.numbers, out.weights, buffers

    def _number(self, table: dict, key: object) -> int:
        return table.setdefault(key, len(table))

    def _values(self, side: str, value: int, scale: float) -> int:
        if value == ONES or side == "pair":
            return ONES
        if side == "query":
            return self._number(self.values, value)
        return self._number(self.loads, (value, scale))

    def _sums(self, number: int, scale: float) -> dict[tuple[int, int], Sum]:
        """From values and gate to the sum of products that they are contracted with."""
        output = self.contraction.outputs[number]
        found: dict[tuple[int, int], Counter[Product]] = {}
        for term in output.terms:
            product = tuple(sorted(self._number(self.factors, f) for f in term.factors))
            value = ONES if output.side == "pair" else term.value
            total = found.setdefault((value, self._gate(number, term)), Counter())
            total[product] += term.weight / scale  # pyright: ignore[reportArgumentType]
        return {key: tuple(sorted(total.items())) for key, total in found.items()}

    def _gate(self, number: int, term: Term) -> int:
        """Axes that neither the output nor a tensor of the term has: there it counts once."""
        contraction = self.contraction
        read = {
            Q,
            K,
            L,
            *contraction.mask,
            contraction.bias,
            contraction.dropout,
            term.value if contraction.outputs[number].side != "pair" else ONES,
        }
        for factor in term.factors:
            for summand in factor:
                read |= {summand.m} if isinstance(summand, DenseFactor) else {summand.a, summand.b}
        mine = functools.reduce(
            int.__or__, (self.has[p] for p in read - {ONES}), self.leads[number]
        )
        return self.everything & ~mine

    def _factor(self, factor: Factor) -> tuple[list, list, list, list]:
        dots, rows, columns, dense = [], [], [], []
        for summand in factor:
            if isinstance(summand, DenseFactor):
                dense.append(tuple(summand))
            elif summand.b == ONES:
                rows.append((summand.a, summand.weight))
            elif summand.a == ONES:
                columns.append((summand.b, summand.weight))
            else:
                load = self._number(self.loads, (summand.a, summand.weight))
                dots.append((load, self._number(self.packs, summand.b)))
        return dots, rows, columns, dense


class _Numbers:
    """The integers and weights of a program, as contract.cpp reads them."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.weights: list[float] = []

    def add(self, *numbers: int) -> None:
        self.numbers += numbers

    def list(self, items: Sequence[tuple[int, ...]], weights: Sequence[float] = ()) -> None:
        self.add(len(items), *(number for item in items for number in item))
        self.weights += weights


def _schedule(sums: list[Sum], factors: int) -> tuple[list[Step], list[int], int]:
    """Steps that compute sums of products, the buffer of each sum, and the number of buffers.

    Buffer f holds factor f at the beginning, and buffer 0 P. Products that are a sum of their own,
    or the beginning of a longer product, are computed once; the others are only added. A step
    writes to a buffer that is not read again, if there is one, and steps that need no new buffer go
    first.
    """
    nodes = _products(sums)
    # what, and terms (source, factor, weight)
    todo: list[tuple[Sum, list[tuple[Sum, int, float]]]] = []
    for product in sorted(nodes - {()}, key=len):
        todo.append((_alone(product), [(*_split(product, nodes), 1.0)]))
    for total in sums:
        if not _is_product(total):
            terms = [
                (_alone(p), ONES, w) if p in nodes else (*_split(p, nodes), w) for p, w in total
            ]
            todo.append((total, terms))
    at: dict[Sum | int, int] = {_alone(()): 0, **{f: f for f in range(1, factors)}}
    uses: Counter[Sum | int] = Counter(sums)  # the use by a sink never ends
    for _, terms in todo:
        uses.update(x for source, factor, _ in terms for x in (source, factor) if x != ONES)
    buffers, free, steps = factors, [b for x, b in at.items() if not uses[x]], list[Step]()
    while todo:
        ready = [
            n for n, (_, terms) in enumerate(todo) if all(source in at for source, _, _ in terms)
        ]
        ends = lambda term: any(uses[x] == 1 for x in term[:2])
        what, terms = todo.pop(max(ready, key=lambda n: any(map(ends, todo[n][1]))))
        to = -1
        for source, factor, weight in sorted(terms, key=ends, reverse=True):
            adds, read = to >= 0, [x for x in (source, factor) if x != ONES]
            uses.subtract(read)
            free += [at[x] for x in set(read) if not uses[x]]
            if not adds:
                to = free.pop() if free else buffers
                buffers = max(buffers, to + 1)
            steps.append(Step(adds, to, at[source], at.get(factor, ONES), weight))
        at[what] = to
    return steps, [at[total] for total in sums], buffers


def _alone(product: Product) -> Sum:
    return ((product, 1.0),)


def _is_product(total: Sum) -> bool:
    return len(total) == 1 and total[0][1] == 1


def _products(sums: list[Sum]) -> set[Product]:
    """The products to compute, with P: of single ones, and what others begin with."""
    nodes: set[Product] = {()}
    more = [total[0][0] for total in sums if _is_product(total)]
    nodes.update(more)
    for total in sums:
        more += [product for product, _ in total if product not in nodes]
    for product in more:
        while product:
            ((product, _),) = _split(product, nodes)[0]
            nodes.add(product)
    return nodes


def _split(product: Product, nodes: set[Product]) -> tuple[Sum, int]:
    """A shorter product, one that is computed anyway if there is one, and the factor left."""
    rests = [(product[:n] + product[n + 1 :], product[n]) for n in range(len(product))]
    rest, factor = next((one for one in rests if one[0] in nodes), rests[-1])
    return _alone(rest), factor
