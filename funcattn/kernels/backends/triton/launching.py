"""From tensors to kernel launches: allocation, strides, and the grid.

Attention is one launch, and so is `attend_jvp`, its value and tangent together. A contraction takes
one launch per side of its outputs: each program writes a block of rows of queries, or of keys,
which makes sums over queries deterministic.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import masks
from ....masks import Mask
from ...closed.algebra import ONES, Contraction, K, L, LowRankFactor, Output, Q, Term, places
from ..layout import has
from . import pieces, programs, softmax, tuning
from .addresses import axes, width
from .language import INTERPRETED
from .programs import Operand, Program

LOG2E = math.log2(math.e)
LEAST = 2.0**-100  # minimum scale: a scale of zero times a row max of -inf would be NaN


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Streaming softmax: out (*lead, T, Dv) in the dtype of v, lse (*lead, T, 1) in float32.

    lse has no leading axes that only v has.
    """
    out, lse, _, _ = attend_jvp(q, k, v, (None, None, None), mask, scale)
    return out, lse


def attend_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: Sequence[Tensor | None],
    mask: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out and lse, and their tangents from those of q, k and v (None: no tangent), in one launch.

    Without tangents the last two outputs are not written.
    """
    dq, dk, dv = (x if x is None else x.detach() for x in tangents)
    if scale < 0:
        q, dq, scale = -q, dq if dq is None else -dq, -scale
    (T, D), (S, Dv) = q.shape[-2:], v.shape[-2:]
    shape = lambda *those: torch.broadcast_shapes(*[x.shape[:-2] for x in those if x is not None])
    lse_lead, dlse_lead = shape(q, k, *mask), shape(q, k, *mask, dq, dk)
    lead, dlead = shape(q, k, *mask, v), shape(q, k, *mask, v, dq, dk, dv)
    has_tangent = [x is not None for x in (dq, dk, dv)]
    out, lse = v.new_empty(*lead, T, Dv), q.new_empty(*lse_lead, T, 1, dtype=torch.float32)
    dout, dlse = out, lse
    if any(has_tangent):
        dout, dlse = v.new_empty(*dlead, T, Dv), q.new_empty(*dlse_lead, T, 1, dtype=torch.float32)
    start, stop = intervals(mask) or (None, None)
    over = axes([q, k, v, dq, dk, dv, start, out, lse, dout, dlse], dlead, range(-len(dlead), 0))
    q, k, v = (x.detach() for x in (q, k, v))
    read = [
        q,
        k,
        v,
        *(old if x is None else x for x, old in zip((dq, dk, dv), (q, k, v), strict=True)),
    ]

    steep = max(scale * LOG2E, LEAST)

    def launch(blocks: tuning.Blocks) -> None:
        softmax.attend[(-(-T // blocks.own) * over.programs,)](
            *(
                *read,
                q if start is None else start,
                q if stop is None else stop,
                out,
                lse,
                dout,
                dlse,
            ),
            *(over.sizes, *over.strides, *(x.stride()[-2:] for x in read)),
            *(T, S, steep, 2.0 ** math.ceil(math.log2(steep)), scale),
            D=D,
            Dv=Dv,
            WIDTH=width(D),
            WIDTH_V=width(Dv),
            **dict(zip(("HAS_DQ", "HAS_DK", "HAS_DV"), has_tangent, strict=True)),
            INTERVALS=0 if start is None else start.shape[-1],
            PRECISION=precision(),
            FACTORED="wide" if INTERPRETED else "tf32",
            ROWS=blocks.own,
            KEYS=blocks.other,
            **blocks.options(),
        )

    if dlse.numel():
        candidates = tuning.of_attend_jvp(q, v) if any(has_tangent) else tuning.of_attend(q, v)
        with on(q):
            tuning.run(
                launch,
                candidates,
                ("attend", q.dtype, D, Dv, start is None, *has_tangent),
                T * S,
                q,
            )
    return out, lse, dout, dlse


def contract(
    contraction: Contraction,
    shapes: Sequence[Sequence[int]],
    tensors: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """All outputs of a contraction, in their shapes and dtypes.

    One launch computes all outputs with the same side and the same leading axes.
    """
    mask = intervals([tensors[p] for p in contraction.mask])
    shift, shifted_lse = _statistics(tensors[Q], tensors[K], tensors[L], mask, contraction.scale)
    tensors = [*tensors[:L], shifted_lse, *tensors[L + 1 :], shift]
    passes = _passes(contraction, shapes, tensors)
    parts = Counter(number for outputs in passes.values() for number in outputs)
    found: list[list[Tensor]] = [[] for _ in shapes]
    for (side, own, summed), terms in passes.items():
        into = [
            tensors[Q].new_empty(
                tuple(shapes[n]), dtype=dtypes[n] if parts[n] == 1 else torch.float32
            )
            for n in terms
        ]
        outputs = [Output(side, of_output) for of_output in terms.values()]
        _launch(contraction._replace(outputs=tuple(outputs)), into, own, summed, tensors, mask)
        for n, x in zip(terms, into, strict=True):
            found[n].append(x)
    return [
        functools.reduce(torch.add, some).to(dtype)
        for some, dtype in zip(found, dtypes, strict=True)
    ]


def statistics(
    q: Tensor, k: Tensor, lse: Tensor, mask: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """lse as the sum of two numbers, as in `torch_blocks.statistics`; lse has all leading axes."""
    shift, shifted_lse = _statistics(q, k, lse, intervals(mask), scale)
    greatest = shift * scale
    whole = greatest + shifted_lse
    return whole, torch.where(whole.isfinite(), (greatest - whole) + shifted_lse, 0)


def _statistics(
    q: Tensor, k: Tensor, lse: Tensor, mask: tuple[Tensor, Tensor] | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The shift and the shifted log-sum-exp of each query, in the shape of lse: see
    `softmax.statistics`.
    """
    q, sign = (-q.detach(), -1) if scale < 0 else (q.detach(), 1)
    k, lse = k.detach(), lse.detach().contiguous()
    shift, shifted_lse = torch.empty_like(lse), torch.empty_like(lse)
    start, stop = mask or (None, None)
    (T, D), S = q.shape[-2:], k.shape[-2]
    lead = lse.shape[:-2]
    over = axes([q, k, start, lse, shift], lead, range(-len(lead), 0))
    blocks = tuning.SMALLEST
    if lse.numel():
        with on(q):
            softmax.statistics[(-(-T // blocks.own) * over.programs,)](
                *(
                    q,
                    k,
                    q if start is None else start,
                    q if stop is None else stop,
                    lse,
                    shift,
                    shifted_lse,
                ),
                *(over.sizes, *over.strides, q.stride()[-2:], k.stride()[-2:]),
                *(T, S, max(abs(scale) * LOG2E, LEAST)),
                D=D,
                WIDTH=width(D),
                INTERVALS=0 if start is None else start.shape[-1],
                PRECISION=precision(),
                ROWS=blocks.own,
                KEYS=blocks.other,
                **blocks.options(),
            )
    return (shift.neg_() if sign < 0 else shift), shifted_lse


class _Pass(NamedTuple):
    """Outputs of one launch: their side, their leading axes, and the axes that are summed over."""

    side: str
    own: tuple[int, ...]
    summed: tuple[int, ...]


def _passes(
    contraction: Contraction, shapes: Sequence[Sequence[int]], tensors: Sequence[Tensor]
) -> dict[_Pass, dict[int, tuple[Term, ...]]]:
    """The launches, and for each the terms of its outputs by output number.

    A term is summed over the axes that it has and its output lacks; terms of one output that differ
    in these axes go to separate launches.
    """
    always = [
        Q,
        K,
        L,
        len(tensors) - 1,
        *contraction.mask,
        *([contraction.dropout] if contraction.dropout != ONES else []),
    ]
    passes: dict[_Pass, dict[int, tuple[Term, ...]]] = {}
    for number, (side, terms) in enumerate(contraction.outputs):
        shape = shapes[number]
        for term in terms:
            read = {
                *always,
                term.value,
                *(p for factor in term.factors for pair in factor for p in pair[:2]),
            } - {ONES}
            rank = max(len(shape), *(tensors[int(p)].dim() for p in read)) - 2
            own = tuple(axis for axis in range(-rank, 0) if has(shape, axis))
            summed = (
                axis
                for axis in range(-rank, 0)
                if any(has(tensors[int(p)].shape, axis) for p in read)
            )
            outputs = passes.setdefault(
                _Pass(side, own, tuple(axis for axis in summed if axis not in own)), {}
            )
            outputs[number] = (*outputs.get(number, ()), term)
    return passes


def _launch(
    contraction: Contraction,
    into: Sequence[Tensor],
    own: Sequence[int],
    summed: Sequence[int],
    tensors: Sequence[Tensor],
    mask: tuple[Tensor, Tensor] | None,
) -> None:
    """Write the outputs of one pass over P."""
    program, used, weights = describe(
        contraction, tensors, into, 0 if mask is None else mask[0].shape[-1]
    )
    x = [tensors[p].detach() for p in used]
    q, (T, S) = x[Q], (x[Q].shape[-2], x[K].shape[-2])
    start, stop = mask or (None, None)
    rate = contraction.rate
    seeds = tensors[contraction.dropout].contiguous() if program.dropout else None
    lead = torch.broadcast_shapes(
        *[y.shape[:-2] for y in (*x, *into, start, seeds) if y is not None]
    )
    over, under = axes([*x, start, seeds, *into], lead, own), axes([*x, start, seeds], lead, summed)
    at, into_at = over.strides[: len(x) + 2], over.strides[len(x) + 2 :]

    def launch(blocks: tuning.Blocks) -> None:
        table, table_row = q, 0
        if start is not None and stop is not None and program.side == "key":
            table, table_row = _bounds(start, stop, S, blocks.other), -(-T // blocks.other) * 4
        # x..., mask, table, seeds
        laid = lambda of: (
            *of[:-1],
            tuple(step // max(T, 1) * table_row for step in of[-2]),
            of[-1],
        )
        programs.kernel(program)[
            (-(-(T if program.side == "query" else S) // blocks.own) * over.programs,)
        ](
            *(
                *x,
                q if start is None else start,
                q if stop is None else stop,
                table,
                q if seeds is None else seeds,
                *into,
            ),
            *(over.sizes, under.sizes, *laid(at), *laid(under.strides), *into_at),
            *(step for y in x for step in y.stride()[-2:]),
            *(
                T,
                S,
                under.programs,
                contraction.scale * LOG2E,
                math.ceil(rate * 2**32),
                1 / (1 - rate),
                *weights,
            ),
            OWN=blocks.own,
            OTHER=blocks.other,
            PRECISION=precision(),
            FACTORED="wide" if INTERPRETED else "tf32",
            **blocks.options(),
        )

    if into[0].numel():
        with on(q):
            tuning.run(launch, tuning.of_contract(program, q), program, T * S, q)


def describe(
    contraction: Contraction, tensors: Sequence[Tensor], into: Sequence[Tensor], n: int = 0
) -> tuple[Program, list[int], list[float]]:
    """The program of a one-sided contraction, indices of its tensors, and its weights."""
    query, key, _ = places(contraction)
    used = [*sorted(query | key), len(tensors) - 1]  # the last is the shift
    new = {old: number for number, old in enumerate(used)} | {ONES: ONES}
    weights: dict[float, int] = {1.0: 0}
    number_of = lambda weight: weights.setdefault(float(weight), len(weights))
    pair: Any = lambda p: LowRankFactor(new[p.a], new[p.b], number_of(p.weight))
    factor: Any = lambda f: tuple(pair(p) for p in f)
    term = lambda t: Term(tuple(factor(f) for f in t.factors), new[t.value], number_of(t.weight))
    outputs = tuple(
        Output(side, tuple(term(t) for t in terms)) for side, terms in contraction.outputs
    )
    name = lambda x: str(x.dtype).removeprefix("torch.")
    side = lambda p: "key" if p in key and p not in query else "query"
    operands = tuple(Operand(side(p), tensors[p].shape[-1], name(tensors[p])) for p in used)
    features = tuple(x.shape[-1] for x in into)
    program = Program(
        contraction.outputs[0].side,
        outputs,
        features,
        operands,
        n,
        contraction.dropout != ONES,
        len(weights),
    )
    return program, used, list(weights)[1:]


def _bounds(start: Tensor, stop: Tensor, S: int, rows: int) -> Tensor:
    """Keys seen by each block of queries and interval, for `pieces.span`: (*lead, n, blocks, 4)."""
    *lead, T, n = start.shape
    table = start.new_empty(*lead, n, -(-T // rows), 4)
    pieces.bounds[(-(-T // rows) * math.prod(lead),)](
        start, stop, table, T, S, n, rows, enable_fp_fusion=True
    )
    return table


def intervals(mask: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The interval ends as int32, contiguous, sorted and disjoint; None without a mask."""
    if not mask:
        return None
    start, stop = mask
    if not start.shape[-1]:  # zero intervals are replaced by one empty interval
        start, stop = start.new_zeros(*start.shape[:-1], 1), stop.new_zeros(*stop.shape[:-1], 1)
    if start.shape[-1] != 1:
        everything = Mask(
            torch.zeros_like(start[..., :1]), torch.full_like(stop[..., :1], masks.END)
        )
        start, stop = masks.intersection(Mask(start, stop), everything)
    lead = torch.broadcast_shapes(start.shape, stop.shape)
    narrow = lambda x: x.clamp(0, masks.END).to(torch.int32).expand(lead).contiguous()
    return narrow(start), narrow(stop)


def precision() -> str:
    """Triton's input_precision for float32 products: "tf32x3" for torch's "highest"."""
    if INTERPRETED:
        return "wide"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of the tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
