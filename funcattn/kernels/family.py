"""The two autograd Functions of attention, closed under grad, jvp and vmap at every order.

`Attend` normalises; `Pass` is a sweep of the algebra. The vjp and jvp of both are passes. What runs below, the blocks in torch
operations, kernels in Triton or torch's own fused ones, is decided by `primitives`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._autodiff import align, closed_jvp
from . import algebra, primitives
from .algebra import ONES, Dense, K, Output, Pair, Q, Sweep, Term
from .primitives import Job, Like, Plan, like

V = 2  # place of the values in the tensors of Attend, whose list is q, k, v, mask..., bias


class Attend(Function):
    """(plan, q, k, v, *mask, *bias) -> out (*lead, T, Dv), lse (*lead, T, 1)."""

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
        if g is not None and g_lse is None and (last := primitives.last_gradient(plan, tensors, lse, g, out)):
            grads[1:4] = last
            return tuple(grads)
        at, base = _base(plan)
        flat = [q, k, lse, *extra, v]
        x: list[Pair | Dense] = []
        if g is not None:
            x.append(Pair(len(flat), at))
            flat.append(g)
        level = g_lse
        if g is not None:
            level = -(g * out).sum(-1, keepdim=True).to(lse.dtype)
            if g_lse is not None:  # where values alone have an axis, the sum over it must count the log-sum-exp once
                level = level + g_lse * (g_lse.numel() / level.numel())
        x.append(Pair(len(flat), ONES))
        flat.append(level)
        terms = {Q: ("query", Term((tuple(x),), K, plan.scale)), K: ("key", Term((tuple(x),), Q, plan.scale))}
        if plan.biased:
            terms[base.bias] = ("pair", Term((tuple(x),)))
        if g is not None:
            terms[at] = ("key", Term((), at + 1))
        wanted = [p for p in terms if ctx.needs_input_grad[1 + (V if p == at else p)]]
        spec = base._replace(outputs=tuple(Output(terms[p][0], (terms[p][1],)) for p in wanted))
        fused = plan.fused and wanted == [Q, K, at] and g_lse is None
        if fused:  # torch's own backward gives these three from (g, out); the derivatives of it are those of the sweep
            flat.append(out)
        for p, grad in zip(
            wanted, run(spec, [like(flat[p]) for p in wanted], flat, plan.backend, plan if fused else None), strict=True
        ):
            grads[1 + (V if p == at else p)] = grad
        return tuple(grads)

    @closed_jvp
    def jvp(ctx: Any, saved: list[Tensor], _: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        *tensors, out, lse = saved
        plan, (q, k, v, *extra) = ctx.plan, tensors
        at, base = _base(plan)
        flat = [q, k, lse, *extra, v]
        moved: dict[int, int] = {}
        for place, tangent in (
            (Q, tangents[Q]),
            (K, tangents[K]),
            (at, tangents[V]),
            *([(base.bias, tangents[-1])] if plan.biased else []),
        ):
            if tangent is not None:
                moved[place] = len(flat)
                flat.append(tangent)
        dS = algebra.logit_tangent(base, moved)
        mixed = [Term((dS,), at)] if dS else []
        if at in moved:
            mixed.append(Term((), moved[at]))
        outputs = [Output("query", tuple(mixed))] + ([Output("query", (Term((dS,)),))] if dS else [])
        pushed = run(base._replace(outputs=tuple(outputs)), [like(out), like(lse)][: len(outputs)], flat, plan.backend)
        if not dS:
            return pushed[0], torch.zeros_like(lse)
        return pushed[0] - (pushed[1] * out).to(out.dtype), pushed[1]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, *tensors: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        out, lse = Attend.apply(plan, *align(in_dims[1:], tensors))
        return (_at_batch(out, info), _at_batch(lse, info)), (0, 0)


class Pass(Function):
    """(job, *tensors) -> the outputs of the sweep that the job names."""

    @staticmethod
    def forward(job: Job, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(primitives.sweep(job, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.job = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        flat = list(ctx.saved_tensors)
        grads: list[Any] = [None] * (1 + len(flat))
        needed = {p for p in range(len(flat)) if ctx.needs_input_grad[1 + p]}
        given: dict[int, int] = {}
        for number, g in enumerate(cotangents):
            if g is not None:
                given[number] = len(flat)
                flat.append(g)
        spec, wanted = algebra.vjp(ctx.job.sweep, given, needed, lambda place: flat[place].shape[:-2])
        for p, grad in zip(wanted, run(spec, [like(flat[p]) for p in wanted], flat, ctx.job.backend), strict=True):
            grads[1 + p] = grad
        return tuple(grads)

    @closed_jvp
    def jvp(ctx: Any, saved: list[Tensor], _: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        flat = list(saved)
        moved: dict[int, int] = {}
        for place, tangent in enumerate(tangents):
            if tangent is not None:
                moved[place] = len(flat)
                flat.append(tangent)
        return tuple(run(algebra.jvp(ctx.job.sweep, moved), ctx.job.likes, flat, ctx.job.backend))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], job: Job, *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        aligned = align(in_dims[1:], tensors)
        rank = aligned[0].dim() - 1
        mapped = [Like((info.batch_size, *[1] * (rank - len(o.shape)), *o.shape), o.dtype) for o in job.likes]
        outputs = Pass.apply(dataclasses.replace(job, likes=tuple(mapped)), *aligned)
        return tuple(x.reshape(info.batch_size, *o.shape) for x, o in zip(outputs, job.likes, strict=True)), (0,) * len(outputs)


def run(
    sweep: Sweep, likes: Sequence[Like], tensors: Sequence[Tensor], backend: str = "torch", plan: Plan | None = None
) -> list[Tensor]:
    """Run a sweep as a Function, over the tensors that it reads; an output without terms is zeros.

    A plan says that torch's fused backward may compute it; the last tensor is then the output of attention, which it wants.
    """
    live = [i for i, output in enumerate(sweep.outputs) if output.terms]
    done: dict[int, Tensor] = {}
    if live:
        pruned, used = _prune(sweep._replace(outputs=tuple(sweep.outputs[i] for i in live)))
        read = [tensors[p] for p in used] + ([tensors[-1]] if plan is not None else [])
        done = dict(zip(live, Pass.apply(Job(pruned, tuple(likes[i] for i in live), backend, plan), *read), strict=True))
    return [done[i] if i in done else tensors[Q].new_zeros(o.shape, dtype=o.dtype) for i, o in enumerate(likes)]


def _prune(spec: Sweep) -> tuple[Sweep, list[int]]:
    """The same sweep over the tensors it reads alone, renumbered, and their old places."""
    used = sorted(set().union(*algebra.places(spec), spec.mask, {spec.dropout} - {ONES}))
    new = {old: n for n, old in enumerate(used)} | {ONES: ONES}
    summand = lambda s: Dense(new[s.m], s.weight) if isinstance(s, Dense) else Pair(new[s.a], new[s.b], s.weight)
    factor: Any = lambda f: tuple(summand(s) for s in f)
    term = lambda t, side: Term(tuple(factor(f) for f in t.factors), ONES if side == "pair" else new[t.value], t.weight)
    outputs = tuple(Output(o.side, tuple(term(t, o.side) for t in o.terms)) for o in spec.outputs)
    return Sweep(outputs, spec.scale, tuple(new[p] for p in spec.mask), new[spec.bias], new[spec.dropout], spec.rate), used


def _base(plan: Plan) -> tuple[int, Sweep]:
    """For Attend's tensors laid out as q, k, lse, mask..., bias, v: the place of v, and a sweep without outputs."""
    at = 3 + plan.masks + plan.biased
    return at, Sweep((), plan.scale, tuple(range(3, 3 + plan.masks)), 3 + plan.masks if plan.biased else ONES)


def _at_batch(x: Tensor, info: Any) -> Tensor:
    return x if x.shape[0] == info.batch_size else x.expand(info.batch_size, *x.shape[1:])
