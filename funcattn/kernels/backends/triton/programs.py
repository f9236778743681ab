"""Generates a Triton kernel for a contraction.

What a contraction computes (see `closed/algebra.py`) is known before it runs: the outputs, the
products of factors in each, and the tensors. So the kernel has no runtime switches; it computes
exactly this contraction in one pass over the blocks of P: each block of logits and each factor is
computed once, each tensor read once. A program *owns* a block of rows of the side of the outputs,
and loops over the blocks of the *other* side; both sides use the same code with the roles
exchanged, so sums over queries need no atomics, and results are bitwise reproducible.
"""

import functools
import linecache
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...closed.algebra import ONES, Factor, K, L, LowRankFactor, Output, Q
from . import pieces
from .addresses import width
from .language import jit, tl


class Operand(NamedTuple):
    """A tensor that a program reads: the side that indexes its rows, its features, its dtype."""

    side: str
    features: int
    dtype: str


class Program(NamedTuple):
    """The specification of a kernel; weights of terms and pairs are numbered (0 for 1)."""

    side: str
    outputs: tuple[Output, ...]
    features: tuple[int, ...]  # of each output
    # q, k, the shifted lse, ..., the shift of a row: P = exp2((q . k - shift) scale) /
    # exp(shifted_lse)
    operands: tuple[Operand, ...]
    intervals: int = 0  # number of intervals of the mask; 0: no mask
    dropout: bool = False
    weights: int = 1


def arguments(program: Program) -> list[str]:
    """The names of the kernel's parameters before the constexpr ones, in order."""
    each = range(len(program.operands))
    results = range(len(program.outputs))
    return [
        *[f"x{n}" for n in each],
        *("start", "stop", "table", "seeds"),
        *[f"o{n}" for n in results],
        *("sizes", "sums"),
        *[f"{name}_at" for name in _placed(program)],
        *[f"{name}_sum" for name in _placed(program)],
        *[f"o{n}_at" for n in results],
        *[f"x{n}_{step}" for n in each for step in ("row", "column")],
        *("T", "S", "SUMS", "scale", "threshold", "kept"),
        *[f"w{n}" for n in range(1, program.weights)],
    ]


def _placed(program: Program) -> list[str]:
    return [*[f"x{n}" for n in range(len(program.operands))], "mask", "table", "seeds"]


def source(program: Program) -> str:
    """The source code of the kernel."""
    return "\n".join(_Writer(program).lines()) + "\n"


@functools.lru_cache(maxsize=1024)
def kernel(program: Program) -> Any:
    """The kernel, launched as kernel[grid](*arguments, OWN=, OTHER=, PRECISION=, FACTORED=)."""
    text = source(program)
    name = f"<contract {hash(program) & 0xFFFFFFFFFFFF:012x}>"
    # Triton reads the source from here.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope = {"tl": tl, "jit": jit, "__name__": __name__}
    scope |= {part: getattr(pieces, part) for part in pieces.__all__}
    exec(compile(text, name, "exec"), scope)
    return scope["contract"]


class _Writer:
    """Generates the source of one program, line by line."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.own, self.other = ("query", "key") if program.side == "query" else ("key", "query")
        self.limit = {"query": "T", "key": "S"}
        self.made: dict[Any, str] = {}  # names of the pair blocks computed so far in the body
        # whether hidden pairs are in the body: they are left out, since 0 * NaN is NaN
        self.hides = False

    def lines(self) -> Iterator[str]:
        """All lines of the source."""
        program, own = self.program, self.limit[self.own]
        yield "@jit"
        constants = ", ".join(
            f"{name}: tl.constexpr" for name in ("OWN", "OTHER", "PRECISION", "FACTORED")
        )
        yield f"def contract({', '.join(arguments(program))}, {constants}):"
        yield f"    count = tl.cdiv({own}, OWN)"
        yield "    head = tl.program_id(0) // count"
        order = (
            "count - 1 - tl.program_id(0) % count"
            if program.side == "query"
            else "tl.program_id(0) % count"
        )
        yield f"    first = ({order}) * OWN"
        yield "    own = first + tl.arange(0, OWN)"
        for n, features in enumerate(program.features):
            shape = "OWN," if features == 1 else f"OWN, {width(features)}"
            yield f"    a{n} = tl.zeros(({shape}), tl.float32)"
        yield "    for m in range(SUMS):"
        for name in _placed(program):
            if self._is_used(name):
                yield (
                    f"        {name}_to = locate(head, sizes, {name}_at) + locate(m, sums, "
                    f"{name}_sum)"
                )
        for n, operand in enumerate(program.operands):
            if operand.side == self.own:
                yield f"        {self._load(n, 'first', own, 'OWN', True)}"
        if self.own == "query":
            yield (
                "        shifted_lse = tl.where(b2 == float('-inf'), float('inf'), b2) * "
                "1.4426950408889634"
            )
            if program.dropout:
                yield (
                    "        seed_x, seed_y = encipher(word(seeds + seeds_to), word(seeds + "
                    "seeds_to + 1), own.to(tl.uint32))"
                )
        yield f"        for interval in range({max(1, program.intervals)}):"
        yield from (" " * 12 + line for line in self._ranges())
        yield "            low, begin, end, left, others = blocks_of(low, high, begin, end, OTHER)"
        yield "            for n in range(others):"
        yield "                at = tl.where(n < left, low + n * OTHER, end + (n - left) * OTHER)"
        yield from (" " * 16 + line for line in self._body(True))
        yield "            for at in range(begin, end, OTHER):"
        yield from (" " * 16 + line for line in self._body(False))
        for n, features in enumerate(program.features):
            if weight := self._common(n):
                yield f"    a{n} *= w{weight}"
            to = f"o{n} + locate(head, sizes, o{n}_at), first, {own}"
            wide = f"{to}, {features}, 1, a{n}, {features}, {width(features)}, OWN"
            yield f"    store_vector({to}, 1, a{n}, OWN)" if features == 1 else f"    store({wide})"

    def _is_used(self, name: str) -> bool:
        if name == "mask":
            return self.program.intervals > 0
        if name == "table":
            return self.program.intervals > 0 and self.own == "key"
        return self.program.dropout if name == "seeds" else True

    def _common(self, number: int) -> int:
        """The number of the weight common to all terms of an output, applied at the end; else 0."""
        weights = {int(term.weight) for term in self.program.outputs[number].terms}
        return weights.pop() if len(weights) == 1 else 0

    def _load(self, n: int, begin: str, limit: str, rows: str, edge: bool) -> str:
        operand, at = self.program.operands[n], f"x{n} + x{n}_to, {begin}, {limit}, x{n}_row"
        if operand.features == 1:
            beyond = "float('inf')" if n == L and self.own == "query" else "0.0"
            return f"b{n} = vector({at}, {beyond}, {rows}, {edge}).to(tl.float32)"
        return (
            f"b{n} = block({at}, x{n}_column, {operand.features}, {width(operand.features)}, "
            f"{rows}, {edge})"
        )

    def _ranges(self) -> Iterator[str]:
        """The rows of the other side that the program's block meets in this interval."""
        if self.own == "query":
            if self.program.intervals:
                for end in ("start", "stop"):
                    yield (
                        f"{end}s = vector({end} + mask_to + interval, first, T, "
                        f"{self.program.intervals}, 0, OWN)"
                    )
            else:
                yield "starts = tl.zeros((OWN,), tl.int32)"
                yield "stops = starts + S"
            yield "low, high, begin, end = reach(starts, stops, own < T, S)"
        elif self.program.intervals:
            yield "last = tl.minimum(first + OWN, S)"
            yield (
                "low, high, begin, end = span(table + table_to, interval, tl.cdiv(T, OTHER), "
                "first, last, OTHER)"
            )
            yield "end = tl.minimum(end, T // OTHER * OTHER)"
        else:
            yield "low, high, begin, end = tl.zeros((), tl.int32), T, tl.zeros((), tl.int32), T"

    def _body(self, edge: bool) -> Iterator[str]:
        """One block of pairs, (OWN, OTHER), and its contributions to the outputs."""
        program, limit = self.program, self.limit[self.other]
        self.made = {}
        yield "other = at + tl.arange(0, OTHER)"
        for n, operand in enumerate(program.operands):
            if operand.side == self.other:
                yield self._load(n, "at", limit, "OTHER", edge)
        if self.own == "key":  # for a query with only -inf logits: larger than any logit
            yield "shifted_lse = tl.maximum(b2, -1e30) * 1.4426950408889634"
        side = ("[:, None]", "[None, :]") if self.own == "query" else ("[None, :]", "[:, None]")
        of_query, of_key = side
        self.hides = edge and program.intervals > 0
        yield (
            f"P = ({self._pair(Q, K)} - b{len(program.operands) - 1}{of_query}) * scale - "
            f"shifted_lse{of_query}"
        )
        if edge and self.own == "query":
            yield "ends = tl.minimum(stops, S)"
            yield "seen = (starts[:, None] <= other[None, :]) & (other[None, :] < ends[:, None])"
            yield "P = tl.where(seen, P, float('-inf'))"
        elif edge and program.intervals:
            for end in ("start", "stop"):
                yield (
                    f"{end}s = vector({end} + mask_to + interval, at, T, {program.intervals}, 0, "
                    "OTHER)"
                )
            yield "seen = (starts[None, :] <= own[:, None]) & (own[:, None] < stops[None, :])"
            yield "P = tl.where(seen, P, float('-inf'))"
        elif edge:
            yield "P = tl.where((other < T)[None, :], P, float('-inf'))"
        yield "P = tl.exp2(P)"
        if program.dropout:
            rows, keys = ("own", "other") if self.own == "query" else ("other", "own")
            if self.own == "key":
                yield (
                    "seed_x, seed_y = encipher(word(seeds + seeds_to), word(seeds + seeds_to + "
                    f"1), {rows}.to(tl.uint32))"
                )
            yield (
                f"P = P * keep(seed_x{of_query}, seed_y{of_query}, {keys}{of_key}.to(tl.uint32), "
                "threshold, kept)"
            )
        self.made[()] = "P"
        for number, output in enumerate(program.outputs):
            yield from self._add(number, output)

    def _add(self, number: int, output: Output) -> Iterator[str]:
        """A block's contribution to an output: a product per value tensor, with summed weights."""
        alike: dict[int, list[tuple[int, tuple[Factor, ...]]]] = {}
        for factors, value, weight in output.terms:
            alike.setdefault(value, []).append(
                (0 if self._common(number) else int(weight), factors)
            )
        for value, terms in alike.items():
            weights = []
            for weight, factors in terms:
                yield from self._weight(factors)
                weights.append(
                    self.made[factors] if not weight else f"{self.made[factors]} * w{weight}"
                )
            W = " + ".join(weights)
            if self.hides and value != ONES:
                yield from self._clean(number, value)
            if value == ONES:
                yield f"a{number} += tl.sum({W}, 1)"
            elif self.program.operands[value].features == 1:
                yield f"a{number} += tl.sum(({W}) * {self._value(value)}[None, :], 1)"
            elif self.program.operands[value].dtype == "float16" and any(
                factors for _, factors in terms
            ):
                wide = f"{self._value(value)}.to(tl.float32)"
                # W may exceed the range of float16
                yield f"a{number} = add_product(a{number}, {W}, {wide}, FACTORED)"
            else:
                yield (
                    f"a{number} = add_product(a{number}, ({W}).to(b{value}.dtype), "
                    f"{self._value(value)}, PRECISION)"
                )

    def _clean(self, number: int, value: int) -> Iterator[str]:
        """Set non-finite values to zero, once per body, and visible sums over them to NaN."""
        wide = self.program.operands[value].features > 1
        if ("clean", value) not in self.made:
            column = f"b{value}" if wide else f"b{value}[:, None]"
            yield f"c{value}, spoilt{value} = clean({column}, seen)"
            yield f"b{value}c = c{value}" if wide else f"b{value}c = tl.sum(c{value}, 1)"
            self.made["clean", value] = f"b{value}c"
        row = "[:, None]" if self.program.features[number] > 1 else ""
        yield f"a{number} = tl.where(spoilt{value}{row}, float('nan'), a{number})"

    def _value(self, value: int) -> str:
        return self.made.get(("clean", value), f"b{value}") if self.hides else f"b{value}"

    def _weight(self, factors: tuple[Factor, ...]) -> Iterator[str]:
        """P times a product of factors; common prefixes are computed once."""
        if factors in self.made:
            return
        yield from self._weight(factors[:-1])
        yield from self._factor(factors[-1])
        name = f"P{len(self.made)}"
        product = f"{self.made[factors[:-1]]} * {self.made['factor', factors[-1]]}"
        yield f"{name} = {f'tl.where(seen, {product}, 0.0)' if self.hides else product}"
        self.made[factors] = name

    def _factor(self, factor: Factor) -> Iterator[str]:
        """A sum of products of features; those of one weight in one chain of matrix products."""
        if ("factor", factor) in self.made:
            return
        name = self.made["factor", factor] = f"f{len(self.made)}"
        by_weight: dict[int, list[LowRankFactor]] = {}
        for pair in factor:
            assert isinstance(pair, LowRankFactor)
            by_weight.setdefault(int(pair.weight), []).append(pair)
        fresh = True
        for weight, pairs in by_weight.items():
            wide = [pair for pair in pairs if self._is_wide(pair)]
            chain = f"{name}_{weight}"
            for n, pair in enumerate(wide):
                yield f"{chain} = {self._pair(pair.a, pair.b, chain if n else '')}"
            parts = [chain] if wide else []
            parts += [self._pair(pair.a, pair.b) for pair in pairs if not self._is_wide(pair)]
            total = " + ".join(parts) if not weight else f"({' + '.join(parts)}) * w{weight}"
            yield f"{name} = {total}" if fresh else f"{name} = {name} + {total}"
            fresh = False

    def _is_wide(self, pair: LowRankFactor) -> bool:
        return ONES not in (pair.a, pair.b) and self.program.operands[pair.a].features > 1

    def _pair(self, a: int, b: int, onto: str = "") -> str:
        """Products of features a . b as (OWN, OTHER), added to a block if one is named."""
        own, other = (a, b) if self.own == "query" else (b, a)
        if ONES in (own, other):
            n, place = (own, "[:, None]") if other == ONES else (other, "[None, :]")
            narrow = self.program.operands[n].features == 1
            return f"b{n}{place}" if narrow else f"tl.sum(b{n}.to(tl.float32), 1){place}"
        if self.program.operands[own].features == 1:
            return f"b{own}[:, None] * b{other}[None, :]"
        left, right = f"b{own}", f"b{other}"
        if self.program.operands[own].dtype != self.program.operands[other].dtype:
            left, right = f"{left}.to(tl.float32)", f"{right}.to(tl.float32)"
        if onto:
            return f"add_product({onto}, {left}, tl.trans({right}), PRECISION)"
        return f"product({left}, tl.trans({right}), PRECISION)"
