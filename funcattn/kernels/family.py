"""The two autograd Functions of attention, closed under grad, jvp and vmap at every order.

`Attend` normalises; `Pass` is a sweep of the algebra. The vjp and jvp of both are passes. What runs below, the blocks in torch
operations or torch's own fused kernels, is decided by `primitives`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .._autodiff import align, closed_jvp
from . import algebra, primitives
from .algebra import ONES, Dense, Factor, K, L, Output, Pair, Q, Sweep, Term

V = 2  # place of the values in the tensors of Attend, whose list is q, k, v, mask..., bias


class Plan(NamedTuple):
    """What Attend is asked beside its tensors: how many of them are the mask, whether a bias follows, and which kernel runs."""

    masks: int = 0
    biased: bool = False
    kernel: str = "flash"
    causal: bool = False  # known to be the plain causal mask, which torch's kernel need not be shown


class Attend(Function):
    """(plan, q, k, v, *mask, *bias) -> out (*lead, T, Dv), lse (*lead, T, 1); q carries the scale."""

    @staticmethod
    def forward(plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return primitives.attend(plan, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.plan = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        grads: list[Any] = [None] * (1 + len(tensors))
        if g is None and g_lse is None:
            return tuple(grads)
        plan, (q, k, v, *extra) = ctx.plan, tensors
        at, base = _base(plan)
        flat = [q, k, lse, *extra, v]
        x: list[Pair | Dense] = []
        if g is not None:
            x.append(Pair(len(flat), at))
            flat.append(g)
        level = g_lse if g is None else -(g * out).sum(-1, keepdim=True).to(lse.dtype) + (0 if g_lse is None else g_lse)
        x.append(Pair(len(flat), ONES))
        flat.append(level)
        terms = {Q: ("query", Term((tuple(x),), K)), K: ("key", Term((tuple(x),), Q))}
        if plan.biased:
            terms[base.bias] = ("pair", Term((tuple(x),)))
        if g is not None:
            terms[at] = ("key", Term((), at + 1))
        wanted = [p for p in terms if ctx.needs_input_grad[1 + (V if p == at else p)]]
        spec = base._replace(outputs=tuple(Output(terms[p][0], (terms[p][1],)) for p in wanted))
        # Torch's own backward computes the same from (g, out), where nothing flows into lse and all three are wanted.
        fused = primitives.fused_backward(plan, wanted == [Q, K, at] and g_lse is None, out)
        for p, grad in zip(wanted, run(spec, [flat[p].shape for p in wanted], flat, fused), strict=True):
            grads[1 + (V if p == at else p)] = grad
        return tuple(grads)

    @closed_jvp
    def jvp(ctx: Any, saved: list[Tensor], _: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        *tensors, out, lse = saved
        plan, (q, k, v, *extra) = ctx.plan, tensors
        at, base = _base(plan)
        flat = [q, k, lse, *extra, v]
        moved: dict[int, int] = {}
        for place, tangent in ((Q, tangents[Q]), (K, tangents[K]), (at, tangents[V]), *([(base.bias, tangents[-1])] if plan.biased else [])):
            if tangent is not None:
                moved[place] = len(flat)
                flat.append(tangent)
        dS = algebra.logit_tangent(base.bias, moved)
        mixed = [Term((dS,), at)] if dS else []
        if at in moved:
            mixed.append(Term((), moved[at]))
        outputs = [Output("query", tuple(mixed))] + ([Output("query", (Term((dS,)),))] if dS else [])
        pushed = run(base._replace(outputs=tuple(outputs)), [out.shape, lse.shape][: len(outputs)], flat)
        if not dS:
            return pushed[0], torch.zeros_like(lse)
        return pushed[0] - (pushed[1] * out).to(out.dtype), pushed[1].to(lse.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, *tensors: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        out, lse = Attend.apply(plan, *align(in_dims[1:], tensors))
        return (_at_batch(out, info), _at_batch(lse, info)), (0, 0)


class Pass(Function):
    """(spec, shapes, fused, *tensors) -> the outputs of a sweep, of these shapes."""

    @staticmethod
    def forward(spec: Sweep, shapes: Sequence[Sequence[int]], fused: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(primitives.sweep(spec, shapes, fused, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.shapes = inputs[0], inputs[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        flat = list(ctx.saved_tensors)
        grads: list[Any] = [None] * (3 + len(flat))
        needed = {p for p in range(len(flat)) if ctx.needs_input_grad[3 + p]}
        given: dict[int, int] = {}
        for number, g in enumerate(cotangents):
            if g is not None:
                given[number] = len(flat)
                flat.append(g)
        spec, wanted = algebra.vjp(ctx.spec, given, needed)
        for p, grad in zip(wanted, run(spec, [flat[p].shape for p in wanted], flat), strict=True):
            grads[3 + p] = grad
        return tuple(grads)

    @closed_jvp
    def jvp(ctx: Any, saved: list[Tensor], *tangents: Any) -> tuple[Tensor, ...]:
        flat = list(saved)
        moved: dict[int, int] = {}
        for place, tangent in enumerate(tangents[3:]):
            if tangent is not None:
                moved[place] = len(flat)
                flat.append(tangent)
        return tuple(run(algebra.jvp(ctx.spec, moved), ctx.shapes, flat))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], spec: Sweep, shapes: Sequence[Sequence[int]], fused: Any, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        aligned = align(in_dims[3:], tensors)
        rank = aligned[0].dim() - 1
        mapped = [(info.batch_size, *[1] * (rank - len(s)), *s) for s in shapes]
        outputs = Pass.apply(spec, mapped, None, *aligned)
        return tuple(o.reshape(info.batch_size, *s) for o, s in zip(outputs, shapes, strict=True)), (0,) * len(shapes)


def run(spec: Sweep, shapes: Sequence[Sequence[int]], tensors: Sequence[Tensor], fused: Any = None) -> list[Tensor]:
    """Run a sweep as a Function, without the tensors that it does not read; outputs without terms are zeros."""
    live = [i for i, output in enumerate(spec.outputs) if output.terms]
    done: dict[int, Tensor] = {}
    if live:
        pruned, used = _prune(spec._replace(outputs=tuple(spec.outputs[i] for i in live)))
        outputs = Pass.apply(pruned, [tuple(shapes[i]) for i in live], fused, *[tensors[p] for p in used])
        done = dict(zip(live, outputs, strict=True))
    return [done[i] if i in done else tensors[Q].new_zeros(tuple(shapes[i])) for i in range(len(shapes))]


def _prune(spec: Sweep) -> tuple[Sweep, list[int]]:
    """The same sweep over the tensors it reads alone, renumbered, and their old places."""
    used = sorted(set().union(*algebra.places(spec), spec.mask, {spec.dropout} - {ONES}))
    new = {old: n for n, old in enumerate(used)} | {ONES: ONES}
    summand = lambda s: Dense(new[s.m], s.sign) if isinstance(s, Dense) else Pair(new[s.a], new[s.b], s.sign)
    factor: Any = lambda f: tuple(summand(s) for s in f)
    term = lambda t, side: Term(tuple(factor(f) for f in t.factors), ONES if side == "pair" else new[t.value], t.sign)
    outputs = tuple(Output(o.side, tuple(term(t, o.side) for t in o.terms)) for o in spec.outputs)
    return Sweep(outputs, tuple(new[p] for p in spec.mask), new[spec.bias], new[spec.dropout], spec.rate), used


def _base(plan: Plan) -> tuple[int, Sweep]:
    """For Attend's tensors laid out as q, k, lse, mask..., bias, v: the place of v, and a sweep without outputs."""
    at = 3 + plan.masks + plan.biased
    return at, Sweep((), tuple(range(3, 3 + plan.masks)), 3 + plan.masks if plan.biased else ONES)


def _at_batch(x: Tensor, info: Any) -> Tensor:
    return x if x.shape[0] == info.batch_size else x.expand(info.batch_size, *x.shape[1:])
