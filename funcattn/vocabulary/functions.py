"""The autograd Functions of a log-likelihood over a vocabulary, closed under every transform.

F(x, w, a, b), a sum over rows with two weights a row (see `passes`), is one scalar function, and
all that is needed are its derivatives:

    GradientFunction    F and its gradient, which contains the log-sum-exp and the target's logit
    HessianFunction     its Hessian times a direction

The gradient of a linear function of F's gradient is a Hessian times a direction, and so is its jvp,
since a Hessian is symmetric: two passes serve both modes up to the second order. Derivatives of the
Hessian are those of F in plain operations, over blocks of rows (`kernels.block_sums`): every order.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..core.autograd import Context, VmapInfo, add, closed_jvp
from ..kernels.block_sums import Axes, BlockSum
from ..rematerialization import Remat
from . import operators, passes
from .passes import Spec

Optional = Tensor | None
X, W, A, B = range(4)  # the arguments of F
ROWS, WHOLE = Axes(query=-2), Axes()
ROW = Axes(query=-1)
HELD = 8  # logits of a block of `passes.potential` that autograd holds, times as many as a pass


class GradientFunction(Function):
    """(spec, targets, x, w, a, b) -> F, its gradient by a and b, the row max, and by x and w where
    wanted; the row max has no derivative.
    """

    @staticmethod
    def forward(spec: Spec, targets: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(operators.run(spec, (), [targets, *inputs]))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec = inputs[0]
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)
        kept = (*inputs[1:], output[1], output[2], *output[4:])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Context, g: Optional, g_a: Optional, g_b: Optional, _: Optional, *rest: Any):
        targets, x, w, a, b, lse, target, *grads = ctx.saved_tensors
        spec: Spec = ctx.spec
        needed = ctx.needs_input_grad[2:]
        of_x, of_w = _spread(spec, grads)
        g_x, g_w = _spread(spec, rest)
        found: list[Optional] = [None] * 4
        if g is not None:
            # of F itself: what the pass computed with the value
            found[A], found[B] = g * lse, g * target
            missing = (needed[X] and of_x is None) or (needed[W] and of_w is None)
            if missing:  # one more gradient, with weights that include its cotangent
                g_a, g_b = add(g_a, g * a), add(g_b, g * b)
            else:
                found[X], found[W] = (None if d is None else g * d for d in (of_x, of_w))
        wanted = spec._replace(hidden=needed[X], head=needed[W])
        direction = (g_x, g_w, g_a, g_b)
        more: Sequence[Optional] = [None] * 4
        if g_x is not None or g_w is not None:
            more = _hessian(wanted, targets, (x, w, a, b), direction)
        elif (g_a is not None or g_b is not None) and (needed[X] or needed[W]):
            weights = (torch.zeros_like(a) if v is None else v for v in (g_a, g_b))
            _, _, _, _, *by = GradientFunction.apply(wanted, targets, x, w, *weights)
            more = [*_spread(wanted, by), None, None]
        return (
            None,
            None,
            *(add(p, q) if n else None for p, q, n in zip(found, more, needed, strict=True)),
        )

    @closed_jvp
    def jvp(ctx: Context, saved: list[Tensor], _: Any, __: Any, *tangents: Optional):
        targets, x, w, a, b, lse, target, *_ = saved
        if tangents[X] is None and tangents[W] is None and not (ctx.spec.hidden or ctx.spec.head):
            t_a = t_b = torch.zeros_like(lse)
            by: Sequence[Tensor] = ()
        else:
            h_x, h_w, t_a, t_b = _hessian(ctx.spec, targets, (x, w, a, b), tangents)
            by = [h for h in (h_x, h_w) if h is not None]
            assert t_a is not None
            assert t_b is not None
        total = a * t_a + b * t_b
        for tangent, value in ((tangents[A], lse), (tangents[B], target)):
            total = total if tangent is None else total + tangent * value
        return total.sum(), t_a, t_b, None, *by

    @staticmethod
    def vmap(info: VmapInfo, in_dims: tuple[Any, ...], spec: Spec, *tensors: Tensor):
        dims = in_dims[1:]
        if dims[1 + W] is None and not spec.head:
            _, lse, target, shift, *dx = _folded(
                lambda *x: GradientFunction.apply(spec, *x), info, dims, tensors, {1 + W}
            )
            a, b = (
                v if d is None else v.movedim(d, 0)
                for v, d in zip(tensors[3:], dims[3:], strict=True)
            )
            out = ((a * lse + b * target).sum(-1), lse, target, shift, *dx)
        else:
            out = _each(lambda *x: GradientFunction.apply(spec, *x), info, dims, tensors)
        return out, (0,) * len(out)


class HessianFunction(Function):
    """(spec, given, targets, x, w, a, b, *direction) -> the Hessian of F times a direction.

    `given` says which of x, w, a, b the direction has. Outputs are by a, by b, and by x and w where
    wanted.
    """

    @staticmethod
    def forward(spec: Spec, given: operators.Given, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(operators.run(spec, given, tensors))

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.given = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Context, *cotangents: Optional):
        tensors = ctx.saved_tensors
        needed = [n for n in range(1, len(tensors)) if ctx.needs_input_grad[2 + n]]
        present = [n for n, g in enumerate(cotangents) if g is not None]
        grads: list[Optional] = [None] * (2 + len(tensors))
        if needed and present:
            computation, flat, at = _specification(ctx.spec, ctx.given, tensors)
            pulled = Remat.apply(
                computation.vjp(len(flat), [at[n] for n in needed], present),
                None,
                *flat,
                *[cotangents[n] for n in present],
            )
            for n, grad in zip(needed, pulled, strict=True):
                grads[2 + n] = grad
        return tuple(grads)

    @closed_jvp
    def jvp(ctx: Context, saved: list[Tensor], _: Any, __: Any, *tangents: Optional):
        moved = [n for n, t in enumerate(tangents) if t is not None]
        computation, flat, at = _specification(ctx.spec, ctx.given, saved)
        pushed = computation.jvp(len(flat), [at[n] for n in moved])
        return Remat.apply(pushed, None, *flat, *[tangents[n] for n in moved])

    @staticmethod
    def vmap(
        info: VmapInfo,
        in_dims: tuple[Any, ...],
        spec: Spec,
        given: operators.Given,
        *tensors: Tensor,
    ):
        run = lambda *x: HessianFunction.apply(spec, given, *x)
        wide = {1 + W} | ({5 + given[X]} if given[W] else set())  # indices of tensors (V, E)
        dims = in_dims[2:]
        if not spec.head and all(dims[n] is None for n in wide):
            out = _folded(run, info, dims, tensors, wide)
        else:
            out = _each(run, info, dims, tensors)
        return out, (0,) * len(out)


def _hessian(
    spec: Spec, targets: Tensor, inputs: Sequence[Tensor], direction: Sequence[Optional]
) -> list[Optional]:
    """The Hessian times a direction, by x, w, a, b; None for x and w where not wanted."""
    given = tuple(u is not None for u in direction)
    by_a, by_b, *rest = HessianFunction.apply(
        spec, given, targets, *inputs, *[u for u in direction if u is not None]
    )
    return [*_spread(spec, rest), by_a, by_b]


def _spread(spec: Spec, present: Sequence[Any]) -> list[Any]:
    """By x and by w, from those that are wanted."""
    rest = iter(present)
    return [next(rest) if wanted else None for wanted in (spec.hidden, spec.head)]


def _specification(
    spec: Spec, given: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[BlockSum, list[Tensor], dict[int, int]]:
    """HessianFunction as a sum over blocks of derivatives of `passes.potential`.

    Args:
        spec, given: see HessianFunction.
        tensors: its tensors.

    Returns:
        The sum; its inputs, which are x, w, a, b, targets, a one for the cotangent of F and the
        direction; and where each of the tensors is among them.
    """
    targets, x, w, a, b, *direction = tensors
    flat = [x, w, a, b, targets, torch.ones((), dtype=a.dtype, device=a.device), *direction]
    at = {0: 4, 1: 0, 2: 1, 3: 2, 4: 3} | {5 + n: 6 + n for n in range(len(direction))}
    value = BlockSum(
        lambda *x: passes.potential(spec, *x),
        (ROWS, WHOLE, ROW, ROW, ROW),
        (WHOLE,),
        len(x),
        1,
        rows=spec.rows or max(1, spec.count(len(w)) // HELD),
    )
    wanted = [A, B, *([X] if spec.hidden else []), *([W] if spec.head else [])]
    return value.vjp(5, wanted, [0]).jvp(6, [n for n in range(4) if given[n]]), flat, at


def _folded(
    run: Callable[..., Sequence[Tensor]],
    info: VmapInfo,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor],
    whole: Collection[int],
) -> tuple[Tensor, ...]:
    """Outputs (B, N, ...) of a function of rows, whose mapped axis becomes more rows.

    `whole` are the indices of tensors without rows, which are not mapped. Outputs without rows
    are those of all examples together.
    """
    B = info.batch_size
    rows = [
        x if n in whole else (x.expand(B, *x.shape) if d is None else x.movedim(d, 0)).flatten(0, 1)
        for n, (x, d) in enumerate(zip(tensors, in_dims, strict=True))
    ]
    return tuple(x.unflatten(0, (B, -1)) if x.dim() else x for x in run(*rows))


def _each(
    run: Callable[..., Sequence[Tensor]],
    info: VmapInfo,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Outputs (B, ...) of a function of each example; some are B times (V, E) in any case."""
    each = [
        run(*(x if d is None else x.select(d, n) for x, d in zip(tensors, in_dims, strict=True)))
        for n in range(info.batch_size)
    ]
    return tuple(torch.stack(x) for x in zip(*each, strict=True))
