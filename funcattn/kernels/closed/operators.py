"""Dispatch of the primitives: blocks of torch operations, Triton kernels, or torch's fused kernels.

torch's fused kernels compute the value and the first gradient. In torch.compile, or wherever else
tensors are not plain, the primitives are opaque custom operations: one node each, never unrolled or
recomputed. They are private: under torch.func.jvp a custom operation called directly silently has
zero tangents; the autograd Functions of `functions` give it derivatives.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from ...core import errors
from ...core.autograd import is_recorded, untraced
from ..backends import aten, torch_blocks
from ..backends.layout import broadcast
from ..backends.masking import is_finite
from ..dtypes import accumulation_dtype
from . import algebra
from .algebra import ONES, Dense, K, L, Output, Pair, Q, Sweep, Term


class TensorSpec(NamedTuple):
    """Shape and dtype of an output."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def tensor_spec(x: Tensor) -> TensorSpec:
    """The shape and dtype of a tensor."""
    return TensorSpec(tuple(x.shape), x.dtype)


@dataclass(frozen=True)
class AttendSpec:
    """The non-tensor arguments of attend; its tensors are q, k, v, mask..., bias."""

    scale: float = 1.0
    masks: int = 0  # number of mask tensors: 2 for (start, stop), 1 for booleans
    biased: bool = False
    # torch's kernels may compute value and first gradient, if the mask is causal
    fused: bool = False
    backend: str = "torch"  # or "triton", where it can run


@dataclass(frozen=True)
class ContractSpec:
    """The non-tensor arguments of a contraction; with a plan, torch's fused backward runs it."""

    sweep: Sweep
    likes: tuple[TensorSpec, ...]
    backend: str = "torch"
    plan: AttendSpec | None = None


def attend(plan: AttendSpec, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out (*lead, T, Dv) and lse (*lead, T, 1) of tensors q, k, v, mask..., bias."""
    if plain(tensors):
        out, lse = _attend(plan, tensors)
        return _own(out), _own(lse)
    return _attend_op(list(tensors), plan.scale, plan.masks, plan.biased, plan.fused, plan.backend)


def pushes(plan: AttendSpec, tensors: Sequence[Tensor]) -> bool:
    """True where one kernel computes the value of attend and its tangent."""
    q, k, v, *mask = tensors
    return plan.backend == "triton" and not plan.biased and not _triton().obstacle_to_push(q, k, v, mask)


def push(plan: AttendSpec, moved: Sequence[bool], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """out, lse and their tangents, of q, k, v, mask..., and the tangents of moved q, k, v."""
    if plain(tensors):
        return tuple(_own(x) for x in _push(plan, moved, tensors))
    return tuple(_push_op(list(tensors), plan.scale, plan.masks, list(moved), plan.backend))


def spread(moved: Sequence[bool], tangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The tangents of q, k and v, None where there is none."""
    rest = iter(tangents)
    return [next(rest) if there else None for there in moved]


def base(plan: AttendSpec) -> tuple[int, Sweep]:
    """The index of v in the list q, k, lse, mask..., bias, v, and a contraction without outputs."""
    at = 3 + plan.masks + plan.biased
    return at, Sweep((), plan.scale, tuple(range(3, 3 + plan.masks)), 3 + plan.masks if plan.biased else ONES)


def tangent_sweep(
    plan: AttendSpec, tensors: Sequence[Tensor], lse: Tensor, tangents: Sequence[Tensor | None]
) -> tuple[Sweep, list[Tensor], dict[int, int]]:
    """The contraction for the jvp of attend, its tensors, and primal index -> tangent index.

    See `algebra.attend_tangent`.

    Args:
        plan: the non-tensor arguments of attend.
        tensors: q, k, v, mask..., bias.
        lse: (*lead, T, 1).
        tangents: of q, k, v and, if there is one, the bias; None for no tangent.
    """
    q, k, v, *extra = tensors
    at, empty = base(plan)
    flat, moved = [q, k, lse, *extra, v], dict[int, int]()
    for place, tangent in zip((Q, K, at, empty.bias), tangents, strict=False):
        if tangent is not None:
            moved[place] = len(flat)
            flat.append(tangent)
    return algebra.attend_tangent(empty, at, moved), flat, moved


def tangent_likes(out: Tensor, lse: Tensor, tangents: Sequence[Tensor | None]) -> tuple[TensorSpec, TensorSpec]:
    """Shapes and dtypes of the tangents of out and lse, with leading axes that only tangents have.

    Args:
        out, lse: the outputs of attend.
        tangents: of q, k, v and, if there is one, the bias; None for no tangent. That of v does not
            reach lse.
    """
    lead = lambda x, *those: broadcast(x.shape[:-2], *(y.shape[:-2] for y in those if y is not None))
    dout, dlse = lead(out, *tangents), lead(lse, *tangents[:2], *tangents[3:])
    return TensorSpec((*dout, *out.shape[-2:]), out.dtype), TensorSpec((*dlse, *lse.shape[-2:]), lse.dtype)


def statistics(scale: float, backend: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """lse as two numbers (see `torch_blocks.statistics`), of q, k, lse, mask...; no gradients."""
    if plain(tensors):
        return _statistics(scale, backend, tensors)
    return _statistics_op(list(tensors), scale, backend)


def sweep(job: ContractSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a contraction over tensors that start with q, k, lse."""
    if plain(tensors):
        return [_own(x) for x in _sweep(job, tensors)]
    ranks = [len(o.shape) for o in job.likes]
    sizes = [n for o in job.likes for n in o.shape]
    names = [str(o.dtype).removeprefix("torch.") for o in job.likes]
    return _sweep_op(list(tensors), json.dumps([job.sweep, names, job.backend, job.plan and vars(job.plan)]), ranks, sizes)


@untraced
def last_gradient(plan: AttendSpec, tensors: Sequence[Tensor], lse: Tensor, g: Tensor, out: Tensor) -> list[Tensor] | None:
    """Gradients of q, k and v by torch's kernel, where no further derivative can follow."""
    if not plan.fused or torch.is_grad_enabled() or is_recorded(*tensors, g) or not plain([*tensors, g]):
        return None
    q, k, v, *mask = tensors
    if mask and not aten.is_causal(mask, k.shape[-2]):
        return None
    if torch_blocks.is_far(lse):
        return None
    grads = aten.backward([q.shape, k.shape, v.shape], q, k, v, lse, g, out, scale=plan.scale, causal=bool(mask))
    return grads if not mask or is_finite(grads) else None


@untraced
def _attend(plan: AttendSpec, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, *extra = tensors
    mask = extra[: plan.masks]
    if plan.fused and not aten.is_empty(q, k, v) and (not mask or aten.is_causal(mask, k.shape[-2])):
        out, lse = aten.attend(q, k, v, scale=plan.scale, causal=bool(mask))
        if not mask or is_finite([out]):
            return out, lse
    if plan.backend == "triton" and not plan.biased and not _triton().obstacle_to_attend(q, k, v, mask):
        return _triton().attend(q, k, v, mask, plan.scale)
    return torch_blocks.attend(q, k, v, mask, extra[plan.masks] if plan.biased else None, plan.scale)


@untraced
def _push(plan: AttendSpec, moved: Sequence[bool], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    primals, tangents = tensors[: 3 + plan.masks], spread(moved, tensors[3 + plan.masks :])
    if plan.backend == "triton" and not _triton().obstacle_to_push(*primals[:3], primals[3:]):
        return _triton().push(*primals[:3], tangents, primals[3:], plan.scale)
    out, lse = _attend(plan, primals)
    spec, flat, _ = tangent_sweep(plan, primals, lse, tangents)
    likes = tangent_likes(out, lse, tangents)
    mixed, *more = _sweep(ContractSpec(spec, likes[: len(spec.outputs)], plan.backend), flat)
    dlse = more[0] if more else lse.new_zeros(likes[1].shape)
    return out, lse, mixed - (dlse * out).to(out.dtype), dlse


@untraced
def _statistics(scale: float, backend: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, lse, *mask = tensors
    if backend == "triton" and not _triton().obstacle_to_attend(q, k, k, mask):
        return _triton().statistics(q, k, lse, mask, scale)
    return torch_blocks.statistics(q, k, lse, mask, scale)


@untraced
def _sweep(job: ContractSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    shapes = [o.shape for o in job.likes]
    mask = [tensors[p] for p in job.sweep.mask]
    outputs: Sequence[Tensor] | None = None
    if job.plan is not None and not torch_blocks.is_far(tensors[L]) and (not mask or aten.is_causal(mask, tensors[K].shape[-2])):
        # Not far, since torch's kernel reads lse as one number; it gives hidden NaN the weight
        # zero.
        q, k, lse, *_, v, g, _, out = tensors
        outputs = aten.backward(shapes, q, k, v, lse, g, out, scale=job.plan.scale, causal=bool(mask))
        outputs = outputs if not mask or is_finite(outputs) else None
    elif job.backend == "triton" and not _triton().obstacle(job.sweep, tensors):
        outputs = _triton().sweep(job.sweep, shapes, [o.dtype for o in job.likes], tensors)
    if outputs is None:
        outputs = torch_blocks.sweep(job.sweep, shapes, tensors)
    return [x.to(o.dtype) for x, o in zip(outputs, job.likes, strict=True)]


def _triton() -> Any:
    """The Triton backend, imported on first use."""
    from ..backends import triton

    return triton


def _own(x: Tensor) -> Tensor:
    """x as a contiguous non-view: forward mode requires tangents laid out as their primals."""
    x = x.contiguous()
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride()) if x._is_view() else x


def plain(tensors: Sequence[Tensor]) -> bool:
    """True for concrete tensors: no transform, dispatch mode, subclass, compiler or meta device."""
    if any(_functorch.is_legacy_batchedtensor(x) for x in tensors):
        remedy = "Use torch.func.jacrev, jacfwd or vmap, which go through."
        errors.fail(
            "attention", "the transform", "one of torch.func", "torch.autograd.grad(is_grads_batched=True)", remedy, RuntimeError
        )
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    real = lambda x: type(x) in (Tensor, torch.nn.Parameter) and not _functorch.is_functorch_wrapped_tensor(x)
    # torch resolves negative and zero tensors before an operation; meta tensors have only shapes.
    return not any(not real(x) or x.is_neg() or x._is_zerotensor() or x.is_meta for x in tensors)


@torch.library.custom_op("funcattn::attend", mutates_args=())
def _attend_op(tensors: list[Tensor], scale: float, masks: int, biased: bool, fused: bool, backend: str) -> tuple[Tensor, Tensor]:
    out, lse = _attend(AttendSpec(scale, masks, biased, fused, backend), tensors)
    return out.contiguous(), lse.contiguous()  # the strides that the fake implementation returns


@_attend_op.register_fake
def _(tensors: list[Tensor], scale: float, masks: int, biased: bool, fused: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _attend_fake(tensors)


def _attend_fake(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    errors.on_one_device("funcattn::attend", tensors)
    q, k, v, *extra = tensors
    level = broadcast(q.shape[:-2], k.shape[:-2], *[x.shape[:-2] for x in extra])
    lead = broadcast(level, v.shape[:-2])
    wide = accumulation_dtype(*tensors)
    return v.new_empty(*lead, q.shape[-2], v.shape[-1]), q.new_empty(*level, q.shape[-2], 1, dtype=wide)


@torch.library.custom_op("funcattn::push", mutates_args=())
def _push_op(tensors: list[Tensor], scale: float, masks: int, moved: list[bool], backend: str) -> list[Tensor]:
    return [x.contiguous() for x in _push(AttendSpec(scale, masks, backend=backend), moved, tensors)]


@_push_op.register_fake
def _(tensors: list[Tensor], scale: float, masks: int, moved: list[bool], backend: str) -> list[Tensor]:
    errors.on_one_device("funcattn::push", tensors)
    out, lse = _attend_fake(tensors[: 3 + masks])
    tangents = tangent_likes(out, lse, spread(moved, tensors[3 + masks :]))
    return [out, lse, *(out.new_empty(x.shape, dtype=x.dtype) for x in tangents)]


@torch.library.custom_op("funcattn::statistics", mutates_args=())
def _statistics_op(tensors: list[Tensor], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    whole, rest = _statistics(scale, backend, tensors)
    return whole.contiguous(), rest.contiguous()


@_statistics_op.register_fake
def _(tensors: list[Tensor], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    errors.on_one_device("funcattn::statistics", tensors)
    lse = tensors[L]
    return lse.new_empty(lse.shape), lse.new_empty(lse.shape)


@torch.library.custom_op("funcattn::sweep", mutates_args=())
def _sweep_op(tensors: list[Tensor], job: str, ranks: list[int], sizes: list[int]) -> list[Tensor]:
    return [x.contiguous() for x in _sweep(_read(job, ranks, sizes), tensors)]


@_sweep_op.register_fake
def _(tensors: list[Tensor], job: str, ranks: list[int], sizes: list[int]) -> list[Tensor]:
    errors.on_one_device("funcattn::sweep", tensors)
    return [tensors[0].new_empty(o.shape, dtype=o.dtype) for o in _read(job, ranks, sizes).likes]


def _read(text: str, ranks: Sequence[int], sizes: Sequence[int]) -> ContractSpec:
    spec, dtypes, backend, plan = _decode(text)
    rest = iter(sizes)
    shapes = [tuple(next(rest) for _ in range(rank)) for rank in ranks]
    return ContractSpec(spec, tuple(TensorSpec(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)), backend, plan)


@functools.lru_cache(maxsize=4096)
def _decode(text: str) -> tuple[Sweep, list[torch.dtype], str, AttendSpec | None]:
    (outputs, scale, mask, bias, dropout, rate), names, backend, plan = json.loads(text)
    summand: Any = lambda s: Pair(*s) if len(s) == 3 else Dense(*s)
    term = lambda t: Term(tuple(tuple(map(summand, factor)) for factor in t[0]), *t[1:])
    spec = Sweep(tuple(Output(side, tuple(map(term, terms))) for side, terms in outputs), scale, tuple(mask), bias, dropout, rate)
    return spec, [getattr(torch, name) for name in names], backend, plan and AttendSpec(**plan)
