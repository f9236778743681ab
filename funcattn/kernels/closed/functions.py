"""The autograd Functions of attention, closed under grad, jvp and vmap at every order.

`AttendFunction` normalizes, and `AttendJvpFunction` computes it and its jvp in one pass. The vjp
and jvp of both are contractions (`contractions`). `operators` runs them on a backend.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...core.autograd import (
    add,
    align,
    closed_jvp,
    dual,
    is_recorded,
    primal,
    tangent,
)
from ...core.levels import apply_at_level, is_gradient_inside_jvp
from . import algebra, operators
from .algebra import ONES, K, L, LowRankFactor, Output, Q, Term
from .contractions import at_batch, run
from .specs import AttendSpec, tensor_spec

V = 2  # index of the values in the tensors of attend, which are q, k, v, mask..., bias


def attend(spec: AttendSpec, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """out (*lead, T, Dv), lse (*lead, T, 1) of q, k, v, *mask, *bias.

    In forward mode it attaches both tangents, computed in the same pass where one kernel can do so.
    Where no derivative can follow it is no autograd Function, whose call costs some 20 us.
    """
    if not is_recorded(*tensors) and operators.plain(tensors):
        return operators.attend_plain(spec, tensors)
    if is_gradient_inside_jvp() and operators.has_attend_jvp(spec, tensors):
        out, lse = apply_at_level(AttendFunction, attend, spec, *tensors)
        return out, lse
    tangents = [tangent(x) for x in tensors[:3]]
    has_tangent = tuple(x is not None for x in tangents)
    if not any(has_tangent) or not operators.has_attend_jvp(spec, tensors):
        return AttendFunction.apply(spec, *tensors)
    primals = [primal(x) for x in tensors[:3]]
    if torch.is_grad_enabled() and any(x.requires_grad for x in primals):
        # Autograd records at this level: the gradients need a tangent too.
        return AttendFunction.apply(spec, *tensors)
    given = (x for x in tangents if x is not None)
    out, lse, dout, dlse = AttendJvpFunction.apply(
        spec, has_tangent, *primals, *tensors[3:], *given
    )
    return dual(out, dout), dual(lse, dlse)


class AttendFunction(Function):
    """(spec, q, k, v, *mask, *bias) -> out (*lead, T, Dv), lse (*lead, T, 1)."""

    @staticmethod
    def forward(spec: AttendSpec, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return operators.attend(spec, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.spec = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        return (None, *_vjp(ctx.spec, tensors, out, lse, g, g_lse, ctx.needs_input_grad[1:]))

    @closed_jvp
    def jvp(
        ctx: Any, saved: list[Tensor], _: Any, *tangents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        *tensors, out, lse = saved
        return _jvp(
            ctx.spec,
            tensors,
            out,
            lse,
            [*tangents[:3], *(tangents[-1:] if ctx.spec.biased else ())],
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], spec: AttendSpec, *tensors: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        # evaluated at the level outside of vmap, which may be one of forward mode
        out, lse = attend(spec, *align(in_dims[1:], tensors))
        return (at_batch(out, info), at_batch(lse, info)), (0, 0)


class AttendJvpFunction(Function):
    """(spec, has_tangent, q, k, v, *mask, *tangents that there are) -> out, lse and their tangents.

    The value and the jvp of attend in one pass over P, with the derivatives of the two passes that
    it replaces.
    """

    @staticmethod
    def forward(
        spec: AttendSpec, has_tangent: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return operators.attend_jvp(spec, has_tangent, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.has_tangent = inputs[:2]
        ctx.set_materialize_grads(False)
        out, lse, _, dlse = output
        ctx.save_for_backward(*inputs[2:], *output)
        ctx.save_for_forward(*inputs[2:], out, lse, dlse)

    @staticmethod
    def backward(
        ctx: Any,
        g: Tensor | None,
        g_lse: Tensor | None,
        g_dout: Tensor | None,
        g_dlse: Tensor | None,
    ) -> tuple[Any, ...]:
        *tensors, out, lse, dout, dlse = ctx.saved_tensors
        spec, start = ctx.spec, 3 + ctx.spec.masks
        primals, tangents = tensors[:start], tensors[start:]
        if g_dout is None and (g_dlse is None or not any(ctx.has_tangent[:2])):
            grads = _vjp(spec, primals, out, lse, g, g_lse, ctx.needs_input_grad[2 : 2 + start])
            return (None, None, *grads, *[None] * len(tangents))
        _, flat, tangent_index = operators.tangent_contraction(
            spec, primals, lse, operators.spread(ctx.has_tangent, tangents)
        )
        at, empty = operators.empty_contraction(spec)
        # indices of the tensors in the flat list
        places = [Q, K, at, *empty.mask, *tangent_index.values()]
        needed = {p for p, wanted in zip(places, ctx.needs_input_grad[2:], strict=True) if wanted}
        if any(ctx.has_tangent[:2]):
            tangent_index[L] = len(flat)
            flat.append(dlse)
        dot = lambda x, y: _minus_dot(x, y, lse.dtype)
        of_out, of_dout = (None if x is None else dot(x, out) for x in (g, g_dout))
        if g_dout is not None:
            of_out = add(of_out, dot(g_dout, dout))
        # if only the values have an axis, the sum over it must count the log-sum-exp once
        zeros = out.new_zeros((*out.shape[:-1], 1), dtype=lse.dtype)
        cotangents = []
        for sums, given in ((of_out, g_lse), (of_dout, g_dlse)):
            whole = zeros if sums is None else sums
            if given is not None:
                whole = whole + given * (given.numel() / max(whole.numel(), 1))
            cotangents.append(len(flat))
            flat.append(whole)
        for x in (g, g_dout):
            cotangents.append(None if x is None else len(flat))
            flat.extend(() if x is None else (x,))
        sums, dsums, g_at, h_at = cotangents
        contraction, wanted = algebra.attend_jvp_vjp(
            empty,
            at,
            tangent_index,
            algebra.AttendCotangents(g_at, h_at, sums, dsums),
            needed,
        )
        likes = [tensor_spec(flat[p]) for p in wanted]
        grads = dict(zip(wanted, run(contraction, likes, flat, spec.kernel), strict=True))
        return (None, None, *(grads.get(p) for p in places))

    @closed_jvp
    def jvp(
        ctx: Any, saved: list[Tensor], _: Any, __: Any, *input_tangents: Tensor | None
    ) -> tuple[Tensor, ...]:
        *tensors, out, lse, dlse = saved
        spec, start = ctx.spec, 3 + ctx.spec.masks
        primals, tangents = tensors[:start], tensors[start:]
        t_out, t_lse = _jvp(spec, primals, out, lse, input_tangents[:3])
        contraction, flat, tangent_index = operators.tangent_contraction(
            spec, primals, lse, operators.spread(ctx.has_tangent, tangents)
        )
        again: dict[int, int] = {}
        places = (Q, K, start, L, *tangent_index.values())
        for place, x in zip(
            places, (*input_tangents[:3], t_lse, *input_tangents[start:]), strict=True
        ):
            if x is not None:
                again[place] = len(flat)
                flat.append(x)
        likes = [tensor_spec(out), tensor_spec(dlse)][: len(contraction.outputs)]
        accumulator, *rest = run(algebra.jvp(contraction, again), likes, flat, spec.kernel)
        t_dlse = rest[0] if rest else torch.zeros_like(dlse)
        return t_out, t_lse, accumulator - (t_dlse * out + dlse * t_out).to(out.dtype), t_dlse

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        spec: AttendSpec,
        has_tangent: tuple[bool, ...],
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        aligned, start = align(in_dims[2:], tensors), 3 + spec.masks
        if any(d is not None for d in in_dims[2 : 2 + start]):
            outputs = AttendJvpFunction.apply(spec, has_tangent, *aligned)
            return tuple(at_batch(x, info) for x in outputs), (0, 0, 0, 0)
        # their mapped axis has size 1: several tangents of one value, which is computed once
        primals = aligned[:start]
        out, lse = AttendFunction.apply(spec, *primals)
        dout, dlse = _jvp(spec, primals, out, lse, operators.spread(has_tangent, aligned[start:]))
        return (out[0], lse[0], at_batch(dout, info), at_batch(dlse, info)), (None, None, 0, 0)


def _vjp(
    spec: AttendSpec,
    tensors: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    g: Tensor | None,
    g_lse: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The vjp of attend: gradients of q, k, v, *mask, *bias where needed, else None."""
    grads: list[Tensor | None] = [None] * len(tensors)
    if g is None and g_lse is None:
        return grads
    q, k, v, *extra = tensors
    if (
        g is not None
        and g_lse is None
        and (last := operators.last_gradient(spec, tensors, lse, g, out))
    ):
        grads[:3] = last
        return grads
    at, empty = operators.empty_contraction(spec)
    flat = [q, k, lse, *extra, v]
    x: list[algebra.Summand] = []
    if g is not None:
        x.append(LowRankFactor(len(flat), at))
        flat.append(g)
    delta = g_lse
    if g is not None:
        delta = _minus_dot(g, out, lse.dtype)
        # if only the values have an axis, the sum over it must count the log-sum-exp once
        if g_lse is not None:
            delta = delta + g_lse * (g_lse.numel() / max(delta.numel(), 1))
    assert delta is not None
    x.append(LowRankFactor(len(flat), ONES))
    flat.append(delta)
    terms = {
        Q: ("query", Term((tuple(x),), K, spec.scale)),
        K: ("key", Term((tuple(x),), Q, spec.scale)),
    }
    if spec.biased:
        terms[empty.bias] = ("pair", Term((tuple(x),)))
    if g is not None:
        terms[at] = ("key", Term((), at + 1))
    wanted = [p for p in terms if needed[V if p == at else p]]
    contraction = empty._replace(outputs=tuple(Output(terms[p][0], (terms[p][1],)) for p in wanted))
    is_attend_vjp = (
        wanted == [Q, K, at] and g_lse is None and operators.has_attend_vjp(spec, tensors)
    )
    # a backend may compute these three from (g, out); derivatives are the contraction's
    if is_attend_vjp:
        flat.append(out)
    found = run(
        contraction, [tensor_spec(flat[p]) for p in wanted], flat, spec.kernel, is_attend_vjp
    )
    for p, grad in zip(wanted, found, strict=True):
        grads[V if p == at else p] = grad
    return grads


def _jvp(
    spec: AttendSpec,
    tensors: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """The jvp of attend for tangents of q, k, v and the bias, which may have more leading axes."""
    contraction, flat, _ = operators.tangent_contraction(spec, tensors, lse, tangents)
    likes = operators.tangent_likes(out, lse, tangents)
    accumulator, *rest = run(contraction, likes[: len(contraction.outputs)], flat, spec.kernel)
    if not rest:
        return accumulator, torch.zeros_like(lse)
    return accumulator - (rest[0] * out).to(out.dtype), rest[0]


def _minus_dot(x: Tensor, y: Tensor, wide: torch.dtype) -> Tensor:
    """-x . y of rows, in the dtype of statistics: rounded to bfloat16 before, the error of it would
    be one of the gradients of q and k where logits are large.
    """
    return -(x.to(wide) * y).sum(-1, keepdim=True)
