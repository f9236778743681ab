"""The primitives on a backend: the first of the kernel's row in `backends.table` that can run.

In torch.compile, or wherever else tensors are not plain, the primitives are opaque custom
operations: one node each, never unrolled or recomputed. They are private: under torch.func.jvp a
custom operation called directly silently has zero tangents; the autograd Functions of `functions`
give it derivatives.
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
from ..backends.layout import broadcast
from ..backends.table import BACKENDS
from ..dtypes import accumulation_dtype
from . import algebra
from .algebra import ONES, Dense, K, L, Output, Pair, Q, Sweep, Term

LAST = "torch_blocks ends every row of BACKENDS and runs every input"


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
    kernel: str = "flash"  # a row of BACKENDS


@dataclass(frozen=True)
class ContractSpec:
    """The non-tensor arguments of a contraction.

    is_attend_vjp: it is the vjp of attend for a cotangent of out, with outputs for q, k and v, and
    its tensors end with v, that cotangent, -(cotangent * out).sum(-1), and out. A backend may then
    compute it by its `attend_vjp`.
    """

    sweep: Sweep
    likes: tuple[TensorSpec, ...]
    kernel: str = "flash"
    is_attend_vjp: bool = False


def attend(plan: AttendSpec, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out (*lead, T, Dv) and lse (*lead, T, 1) of tensors q, k, v, mask..., bias."""
    if plain(tensors):
        out, lse = _attend(plan, tensors)
        return _own(out), _own(lse)
    return _attend_op(list(tensors), plan.scale, plan.masks, plan.biased, plan.kernel)


def pushes(plan: AttendSpec, tensors: Sequence[Tensor]) -> bool:
    """True where a backend computes the value of attend and its tangent in one pass."""
    return not plan.biased and any(
        backend.attend_jvp is not None and not backend.why_not_attend_jvp(*tensors[:3], tensors[3:])
        for backend in BACKENDS[plan.kernel]
    )


def has_attend_vjp(plan: AttendSpec, tensors: Sequence[Tensor]) -> bool:
    """True where a backend may compute the gradients of q, k and v faster than the contraction."""
    q, k, v, *extra = tensors
    mask, bias = _split(plan, extra)
    return any(
        backend.attend_vjp is not None and not backend.why_not_attend_vjp(q, k, v, mask, bias) for backend in BACKENDS[plan.kernel]
    )


def push(plan: AttendSpec, moved: Sequence[bool], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """out, lse and their tangents, of q, k, v, mask..., and the tangents of moved q, k, v."""
    if plain(tensors):
        return tuple(_own(x) for x in _push(plan, moved, tensors))
    return tuple(_push_op(list(tensors), plan.scale, plan.masks, list(moved), plan.kernel))


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


def statistics(scale: float, kernel: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """lse as two numbers (see `torch_blocks.statistics`), of q, k, lse, mask...; no gradients."""
    if plain(tensors):
        return _statistics(scale, kernel, tensors)
    return _statistics_op(list(tensors), scale, kernel)


def sweep(job: ContractSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a contraction over tensors that start with q, k, lse."""
    if plain(tensors):
        return [_own(x) for x in _sweep(job, tensors)]
    ranks = [len(o.shape) for o in job.likes]
    sizes = [n for o in job.likes for n in o.shape]
    names = [str(o.dtype).removeprefix("torch.") for o in job.likes]
    return _sweep_op(list(tensors), json.dumps([job.sweep, names, job.kernel, job.is_attend_vjp]), ranks, sizes)


@untraced
def last_gradient(plan: AttendSpec, tensors: Sequence[Tensor], lse: Tensor, g: Tensor, out: Tensor) -> list[Tensor] | None:
    """Gradients of q, k and v by an `attend_vjp`, where no further derivative can follow."""
    if plan.biased or not has_attend_vjp(plan, tensors):
        return None
    if torch.is_grad_enabled() or is_recorded(*tensors, g) or not plain([*tensors, g]):
        return None
    q, k, v, *mask = tensors
    return _attend_vjp(plan.kernel, q, k, v, mask, lse, g, out, plan.scale, [q.shape, k.shape, v.shape])


def _attend_vjp(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Sequence[Tensor],
    lse: Tensor,
    g: Tensor,
    out: Tensor,
    scale: float,
    shapes: Sequence[Sequence[int]],
) -> list[Tensor] | None:
    for backend in BACKENDS[kernel]:
        if backend.attend_vjp is not None and not backend.why_not_attend_vjp(q, k, v, mask, None):
            found = backend.attend_vjp(q, k, v, mask, lse, g, out, scale, shapes)
            if found is not None:
                return found
    return None


@untraced
def _attend(plan: AttendSpec, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, *extra = tensors
    mask, bias = _split(plan, extra)
    for backend in BACKENDS[plan.kernel]:
        if backend.attend is not None and not backend.why_not_attend(q, k, v, mask, bias):
            found = backend.attend(q, k, v, mask, bias, plan.scale)
            if found is not None:
                return found
    raise AssertionError(LAST)


def _split(plan: AttendSpec, extra: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
    """The mask tensors and the bias of the tensors of attend that follow q, k and v."""
    return extra[: plan.masks], extra[plan.masks] if plan.biased else None


@untraced
def _push(plan: AttendSpec, moved: Sequence[bool], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    primals, tangents = tensors[: 3 + plan.masks], spread(moved, tensors[3 + plan.masks :])
    q, k, v, *mask = primals
    for backend in BACKENDS[plan.kernel]:
        if backend.attend_jvp is not None and not backend.why_not_attend_jvp(q, k, v, mask):
            found = backend.attend_jvp(q, k, v, tangents, mask, plan.scale)
            if found is not None:
                return found
    out, lse = _attend(plan, primals)
    spec, flat, _ = tangent_sweep(plan, primals, lse, tangents)
    likes = tangent_likes(out, lse, tangents)
    mixed, *more = _sweep(ContractSpec(spec, likes[: len(spec.outputs)], plan.kernel), flat)
    dlse = more[0] if more else lse.new_zeros(likes[1].shape)
    return out, lse, mixed - (dlse * out).to(out.dtype), dlse


@untraced
def _statistics(scale: float, kernel: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, lse, *mask = tensors
    for backend in BACKENDS[kernel]:
        if backend.statistics is not None and not backend.why_not_attend(q, k, k, mask, None):
            return backend.statistics(q, k, lse, mask, scale)
    raise AssertionError(LAST)


@untraced
def _sweep(job: ContractSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    outputs = _contracted(job, tensors)
    return [x.to(o.dtype) for x, o in zip(outputs, job.likes, strict=True)]


def _contracted(job: ContractSpec, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    shapes, dtypes = [o.shape for o in job.likes], [o.dtype for o in job.likes]
    if job.is_attend_vjp:
        q, k, lse, *_, v, g, _, out = tensors
        mask = [tensors[p] for p in job.sweep.mask]
        found = _attend_vjp(job.kernel, q, k, v, mask, lse, g, out, job.sweep.scale, shapes)
        if found is not None:
            return found
    for backend in BACKENDS[job.kernel]:
        if backend.contract is not None and not backend.why_not_contract(job.sweep, tensors):
            outputs = backend.contract(job.sweep, shapes, tensors, dtypes)
            if outputs is not None:
                return outputs
    raise AssertionError(LAST)


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
def _attend_op(tensors: list[Tensor], scale: float, masks: int, biased: bool, kernel: str) -> tuple[Tensor, Tensor]:
    out, lse = _attend(AttendSpec(scale, masks, biased, kernel), tensors)
    return out.contiguous(), lse.contiguous()  # the strides that the fake implementation returns


@_attend_op.register_fake
def _(tensors: list[Tensor], scale: float, masks: int, biased: bool, kernel: str) -> tuple[Tensor, Tensor]:
    return _attend_fake(tensors)


def _attend_fake(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    errors.on_one_device("funcattn::attend", tensors)
    q, k, v, *extra = tensors
    level = broadcast(q.shape[:-2], k.shape[:-2], *[x.shape[:-2] for x in extra])
    lead = broadcast(level, v.shape[:-2])
    wide = accumulation_dtype(*tensors)
    return v.new_empty(*lead, q.shape[-2], v.shape[-1]), q.new_empty(*level, q.shape[-2], 1, dtype=wide)


@torch.library.custom_op("funcattn::push", mutates_args=())
def _push_op(tensors: list[Tensor], scale: float, masks: int, moved: list[bool], kernel: str) -> list[Tensor]:
    return [x.contiguous() for x in _push(AttendSpec(scale, masks, kernel=kernel), moved, tensors)]


@_push_op.register_fake
def _(tensors: list[Tensor], scale: float, masks: int, moved: list[bool], kernel: str) -> list[Tensor]:
    errors.on_one_device("funcattn::push", tensors)
    out, lse = _attend_fake(tensors[: 3 + masks])
    tangents = tangent_likes(out, lse, spread(moved, tensors[3 + masks :]))
    return [out, lse, *(out.new_empty(x.shape, dtype=x.dtype) for x in tangents)]


@torch.library.custom_op("funcattn::statistics", mutates_args=())
def _statistics_op(tensors: list[Tensor], scale: float, kernel: str) -> tuple[Tensor, Tensor]:
    whole, rest = _statistics(scale, kernel, tensors)
    return whole.contiguous(), rest.contiguous()


@_statistics_op.register_fake
def _(tensors: list[Tensor], scale: float, kernel: str) -> tuple[Tensor, Tensor]:
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
    spec, dtypes, kernel, is_attend_vjp = _decode(text)
    rest = iter(sizes)
    shapes = [tuple(next(rest) for _ in range(rank)) for rank in ranks]
    likes = tuple(TensorSpec(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return ContractSpec(spec, likes, kernel, is_attend_vjp)


@functools.lru_cache(maxsize=4096)
def _decode(text: str) -> tuple[Sweep, list[torch.dtype], str, bool]:
    (outputs, scale, mask, bias, dropout, rate), names, kernel, is_attend_vjp = json.loads(text)
    summand: Any = lambda s: Pair(*s) if len(s) == 3 else Dense(*s)
    term = lambda t: Term(tuple(tuple(map(summand, factor)) for factor in t[0]), *t[1:])
    spec = Sweep(tuple(Output(side, tuple(map(term, terms))) for side, terms in outputs), scale, tuple(mask), bias, dropout, rate)
    return spec, [getattr(torch, name) for name in names], kernel, is_attend_vjp
