"""The primitives on a backend: the first of the kernel's row in `backends.table` that can run.

In torch.compile, or wherever else tensors are not plain, the primitives are opaque custom
operations: one node each, never unrolled or recomputed. They are private: under torch.func.jvp a
custom operation called directly silently has zero tangents; the autograd Functions of `functions`
give it derivatives.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from ...core import errors
from ...core.autograd import is_recorded, untraced
from ..backends.layout import broadcast
from ..backends.table import BACKENDS
from ..dtypes import accumulation_dtype
from . import algebra
from .algebra import ONES, Contraction, K, L, Q
from .specs import AttendSpec, ContractSpec, TensorSpec, read

LAST = "torch_blocks ends every row of BACKENDS and runs every input"


def attend(spec: AttendSpec, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out (*lead, T, Dv) and lse (*lead, T, 1) of tensors q, k, v, mask..., bias."""
    if plain(tensors):
        out, lse = attend_plain(spec, tensors)
        return _own(out), _own(lse)
    return _attend_op(list(tensors), spec.scale, spec.masks, spec.biased, spec.kernel)


def has_attend_jvp(spec: AttendSpec, tensors: Sequence[Tensor]) -> bool:
    """True where a backend computes the value of attend and its tangent in one pass."""
    q, k, v, *mask = tensors
    return not spec.biased and any(
        backend.attend_jvp is not None and not backend.why_not_attend_jvp(q, k, v, mask)
        for backend in BACKENDS[spec.kernel]
    )


def joins_tangents(kernel: str) -> bool:
    """True where a contraction and its jvp in one pass cost less than in two."""
    return any(backend.joins_tangents for backend in BACKENDS[kernel])


def has_attend_vjp(spec: AttendSpec, tensors: Sequence[Tensor]) -> bool:
    """True where a backend may compute the gradients of q, k and v faster than the contraction."""
    q, k, v, *extra = tensors
    mask, bias = _split(spec, extra)
    return any(
        backend.attend_vjp is not None and not backend.why_not_attend_vjp(q, k, v, mask, bias)
        for backend in BACKENDS[spec.kernel]
    )


def attend_jvp(
    spec: AttendSpec, has_tangent: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """out, lse and their tangents, of q, k, v, mask..., and the tangents of those of q, k, v that
    have one.
    """
    if plain(tensors):
        return tuple(_own(x) for x in _attend_jvp(spec, has_tangent, tensors))
    return tuple(
        _attend_jvp_op(list(tensors), spec.scale, spec.masks, list(has_tangent), spec.kernel)
    )


def spread(has_tangent: Sequence[bool], tangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The tangents of q, k and v, None where there is none."""
    rest = iter(tangents)
    return [next(rest) if there else None for there in has_tangent]


def empty_contraction(spec: AttendSpec) -> tuple[int, Contraction]:
    """The index of v in the list q, k, lse, mask..., bias, v, and a contraction without outputs."""
    at = 3 + spec.masks + spec.biased
    return at, Contraction(
        (), spec.scale, tuple(range(3, 3 + spec.masks)), 3 + spec.masks if spec.biased else ONES
    )


def tangent_contraction(
    spec: AttendSpec, tensors: Sequence[Tensor], lse: Tensor, tangents: Sequence[Tensor | None]
) -> tuple[Contraction, list[Tensor], dict[int, int]]:
    """The contraction for the jvp of attend, its tensors, and primal index -> tangent index.

    See `algebra.attend_tangent`.

    Args:
        spec: the non-tensor arguments of attend.
        tensors: q, k, v, mask..., bias.
        lse: (*lead, T, 1).
        tangents: of q, k, v and, if there is one, the bias; None for no tangent.
    """
    q, k, v, *extra = tensors
    at, empty = empty_contraction(spec)
    flat, tangent_index = [q, k, lse, *extra, v], dict[int, int]()
    for place, tangent in zip((Q, K, at, empty.bias), tangents, strict=False):
        if tangent is not None:
            tangent_index[place] = len(flat)
            flat.append(tangent)
    return algebra.attend_tangent(empty, at, tangent_index), flat, tangent_index


def tangent_likes(
    out: Tensor, lse: Tensor, tangents: Sequence[Tensor | None]
) -> tuple[TensorSpec, TensorSpec]:
    """Shapes and dtypes of the tangents of out and lse, with leading axes that only tangents have.

    Args:
        out, lse: the outputs of attend.
        tangents: of q, k, v and, if there is one, the bias; None for no tangent. That of v does not
            reach lse.
    """
    lead = lambda x, *those: broadcast(
        x.shape[:-2], *(y.shape[:-2] for y in those if y is not None)
    )
    dout, dlse = lead(out, *tangents), lead(lse, *tangents[:2], *tangents[3:])
    return TensorSpec((*dout, *out.shape[-2:]), out.dtype), TensorSpec(
        (*dlse, *lse.shape[-2:]), lse.dtype
    )


def statistics(scale: float, kernel: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """lse as two numbers (see `torch_blocks.statistics`), of q, k, lse, mask...; no gradients."""
    if plain(tensors):
        return _statistics(scale, kernel, tensors)
    return _statistics_op(list(tensors), scale, kernel)


def contract(spec: ContractSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a contraction over tensors that start with q, k, lse."""
    if plain(tensors):
        return [_own(x) for x in _contract(spec, tensors)]
    ranks = [len(o.shape) for o in spec.likes]
    sizes = [n for o in spec.likes for n in o.shape]
    names = [str(o.dtype).removeprefix("torch.") for o in spec.likes]
    return _contract_op(
        list(tensors),
        json.dumps([spec.contraction, names, spec.kernel, spec.is_attend_vjp]),
        ranks,
        sizes,
    )


@untraced
def last_gradient(
    spec: AttendSpec, tensors: Sequence[Tensor], lse: Tensor, g: Tensor, out: Tensor
) -> list[Tensor] | None:
    """Gradients of q, k and v by an `attend_vjp`, where no further derivative can follow."""
    if spec.biased or not has_attend_vjp(spec, tensors):
        return None
    if torch.is_grad_enabled() or is_recorded(*tensors, g) or not plain([*tensors, g]):
        return None
    q, k, v, *mask = tensors
    return _attend_vjp(
        spec.kernel, q, k, v, mask, lse, g, out, spec.scale, [q.shape, k.shape, v.shape]
    )


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
def attend_plain(spec: AttendSpec, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`attend` of plain tensors, whose results may be views."""
    q, k, v, *extra = tensors
    mask, bias = _split(spec, extra)
    for backend in BACKENDS[spec.kernel]:
        if backend.attend is not None and not backend.why_not_attend(q, k, v, mask, bias):
            found = backend.attend(q, k, v, mask, bias, spec.scale)
            if found is not None:
                return found
    raise AssertionError(LAST)


def _split(spec: AttendSpec, extra: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
    """The mask tensors and the bias of the tensors of attend that follow q, k and v."""
    return extra[: spec.masks], extra[spec.masks] if spec.biased else None


@untraced
def _attend_jvp(
    spec: AttendSpec, has_tangent: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    primals, tangents = tensors[: 3 + spec.masks], spread(has_tangent, tensors[3 + spec.masks :])
    q, k, v, *mask = primals
    for backend in BACKENDS[spec.kernel]:
        if backend.attend_jvp is not None and not backend.why_not_attend_jvp(q, k, v, mask):
            found = backend.attend_jvp(q, k, v, tangents, mask, spec.scale)
            if found is not None:
                return found
    out, lse = attend_plain(spec, primals)
    contraction, flat, _ = tangent_contraction(spec, primals, lse, tangents)
    likes = tangent_likes(out, lse, tangents)
    accumulator, *more = _contract(
        ContractSpec(contraction, likes[: len(contraction.outputs)], spec.kernel), flat
    )
    dlse = more[0] if more else lse.new_zeros(likes[1].shape)
    return out, lse, accumulator - (dlse * out).to(out.dtype), dlse


@untraced
def _statistics(scale: float, kernel: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, lse, *mask = tensors
    for backend in BACKENDS[kernel]:
        if backend.statistics is not None and not backend.why_not_attend(q, k, k, mask, None):
            return backend.statistics(q, k, lse, mask, scale)
    raise AssertionError(LAST)


@untraced
def _contract(spec: ContractSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    outputs = _contracted(spec, tensors)
    return [x.to(o.dtype) for x, o in zip(outputs, spec.likes, strict=True)]


def _contracted(spec: ContractSpec, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    shapes, dtypes = [o.shape for o in spec.likes], [o.dtype for o in spec.likes]
    if spec.is_attend_vjp:
        q, k, lse, *_, v, g, _, out = tensors
        mask = [tensors[p] for p in spec.contraction.mask]
        found = _attend_vjp(spec.kernel, q, k, v, mask, lse, g, out, spec.contraction.scale, shapes)
        if found is not None:
            return found
    for backend in BACKENDS[spec.kernel]:
        if backend.contract is not None and not backend.why_not_contract(spec.contraction, tensors):
            outputs = backend.contract(spec.contraction, shapes, tensors, dtypes)
            if outputs is not None:
                return outputs
    raise AssertionError(LAST)


def _own(x: Tensor) -> Tensor:
    """x as a contiguous non-view: forward mode requires tangents laid out as their primals."""
    x = x.contiguous()
    return (
        x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
        if x._is_view()
        else x
    )


def plain(tensors: Sequence[Tensor]) -> bool:
    """True for concrete tensors: no transform, dispatch mode, subclass, compiler or meta device."""
    if any(_functorch.is_legacy_batchedtensor(x) for x in tensors):
        remedy = "Use torch.func.jacrev, jacfwd or vmap, which go through."
        errors.fail(
            "attention",
            "the transform",
            "one of torch.func",
            "torch.autograd.grad(is_grads_batched=True)",
            remedy,
            RuntimeError,
        )
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    real = lambda x: (
        type(x) in (Tensor, torch.nn.Parameter) and not _functorch.is_functorch_wrapped_tensor(x)
    )
    # torch resolves negative and zero tensors before an operation; meta tensors have only shapes.
    return not any(not real(x) or x.is_neg() or x._is_zerotensor() or x.is_meta for x in tensors)


@torch.library.custom_op("funcattn::attend", mutates_args=())
def _attend_op(
    tensors: list[Tensor], scale: float, masks: int, biased: bool, kernel: str
) -> tuple[Tensor, Tensor]:
    out, lse = attend_plain(AttendSpec(scale, masks, biased, kernel), tensors)
    return out.contiguous(), lse.contiguous()  # the strides that the fake implementation returns


@_attend_op.register_fake
def _(
    tensors: list[Tensor], scale: float, masks: int, biased: bool, kernel: str
) -> tuple[Tensor, Tensor]:
    return _attend_fake(tensors)


def _attend_fake(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    errors.on_one_device("funcattn::attend", tensors)
    q, k, v, *extra = tensors
    lse_lead = broadcast(q.shape[:-2], k.shape[:-2], *[x.shape[:-2] for x in extra])
    lead = broadcast(lse_lead, v.shape[:-2])
    wide = accumulation_dtype(*tensors)
    return v.new_empty(*lead, q.shape[-2], v.shape[-1]), q.new_empty(
        *lse_lead, q.shape[-2], 1, dtype=wide
    )


@torch.library.custom_op("funcattn::attend_jvp", mutates_args=())
def _attend_jvp_op(
    tensors: list[Tensor], scale: float, masks: int, has_tangent: list[bool], kernel: str
) -> list[Tensor]:
    return [
        x.contiguous()
        for x in _attend_jvp(AttendSpec(scale, masks, kernel=kernel), has_tangent, tensors)
    ]


@_attend_jvp_op.register_fake
def _(
    tensors: list[Tensor], scale: float, masks: int, has_tangent: list[bool], kernel: str
) -> list[Tensor]:
    errors.on_one_device("funcattn::attend_jvp", tensors)
    out, lse = _attend_fake(tensors[: 3 + masks])
    tangents = tangent_likes(out, lse, spread(has_tangent, tensors[3 + masks :]))
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


@torch.library.custom_op("funcattn::contract", mutates_args=())
def _contract_op(
    tensors: list[Tensor], spec: str, ranks: list[int], sizes: list[int]
) -> list[Tensor]:
    return [x.contiguous() for x in _contract(read(spec, ranks, sizes), tensors)]


@_contract_op.register_fake
def _(tensors: list[Tensor], spec: str, ranks: list[int], sizes: list[int]) -> list[Tensor]:
    errors.on_one_device("funcattn::contract", tensors)
    return [tensors[0].new_empty(o.shape, dtype=o.dtype) for o in read(spec, ranks, sizes).likes]
