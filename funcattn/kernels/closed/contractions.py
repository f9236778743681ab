"""Contractions as an autograd Function, closed under grad, jvp and vmap at every order.

The vjp and the jvp of a contraction (a `Contraction` of the algebra) are contractions. Where the
inputs have tangents, a contraction and its jvp are one contraction over primals and tangents.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...core.autograd import align, closed_jvp, dual, is_differentiable, primal, tangent
from ...core.levels import apply_at_level, is_gradient_inside_jvp
from . import algebra, operators
from .algebra import Contraction, Q
from .specs import ContractSpec, TensorSpec, tensor_spec


def contract(spec: ContractSpec, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The outputs of `spec.contraction`.

    In forward mode it attaches their tangents, computed in the same pass where the backend of the
    kernel gains by that.
    """
    if spec.is_attend_vjp or not operators.joins_tangents(spec.kernel):
        return ContractFunction.apply(spec, *tensors)
    if is_gradient_inside_jvp():
        return apply_at_level(ContractFunction, contract, spec, *tensors)
    tangents = [tangent(x) if is_differentiable(x) else None for x in tensors]
    given = [dx for dx in tangents if dx is not None]
    if not given:
        return ContractFunction.apply(spec, *tensors)
    primals = [primal(x) if is_differentiable(x) else x for x in tensors]
    if torch.is_grad_enabled() and any(x.requires_grad for x in primals):
        # Autograd records at this level: the gradients need a tangent too.
        return ContractFunction.apply(spec, *tensors)
    index, at = dict[int, int](), len(tensors)
    for place, dx in enumerate(tangents):
        if dx is not None:
            index[place] = at + len(index)
    outputs = algebra.jvp(spec.contraction, index).outputs
    reached = [i for i, output in enumerate(outputs) if output.terms]
    both = spec.contraction._replace(
        outputs=(*spec.contraction.outputs, *(outputs[i] for i in reached))
    )
    likes = (*spec.likes, *(spec.likes[i] for i in reached))
    found = ContractFunction.apply(ContractSpec(both, likes, spec.kernel), *primals, *given)
    values = list(found[: len(outputs)])
    for i, dx in zip(reached, found[len(outputs) :], strict=True):
        values[i] = dual(values[i], dx)
    return tuple(values)


class ContractFunction(Function):
    """(spec, *tensors) -> the outputs of `spec.contraction`."""

    @staticmethod
    def forward(spec: ContractSpec, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(operators.contract(spec, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        flat = ctx.saved_tensors
        needed = {p for p in range(len(flat)) if ctx.needs_input_grad[1 + p]}
        grads = contraction_vjp(ctx.spec.contraction, flat, cotangents, needed, ctx.spec.kernel)
        return (None, *(grads.get(p) for p in range(len(flat))))

    @closed_jvp
    def jvp(ctx: Any, saved: list[Tensor], _: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        flat = list(saved)
        tangent_index: dict[int, int] = {}
        for place, x in enumerate(tangents):
            if x is not None:
                tangent_index[place] = len(flat)
                flat.append(x)
        return tuple(
            run(
                algebra.jvp(ctx.spec.contraction, tangent_index),
                ctx.spec.likes,
                flat,
                ctx.spec.kernel,
            )
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], spec: ContractSpec, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        outputs, results = spec.contraction.outputs, dict[int, tuple[Tensor, int | None]]()
        mapped = {place for place, d in enumerate(in_dims[1:]) if d is not None}
        alone = lambda i: not spec.is_attend_vjp and mapped.isdisjoint(_part(spec, [i])[1])
        # What reads no mapped tensor is computed once: the value of many tangents, say.
        if once := [i for i in range(len(outputs)) if alone(i)]:
            part, used = _part(spec, once)
            found = contract(part, *(tensors[p] for p in used))
            results |= {i: (x, None) for i, x in zip(once, found, strict=True)}
            each = [i for i in range(len(outputs)) if i not in once]
            rest, used = _part(spec, each)
            aligned = align(tuple(in_dims[1 + p] for p in used), tuple(tensors[p] for p in used))
        else:
            each, rest, aligned = range(len(outputs)), spec, align(in_dims[1:], tensors)
        rank = aligned[0].dim() - 1
        batched = [
            TensorSpec((info.batch_size, *[1] * (rank - len(o.shape)), *o.shape), o.dtype)
            for o in rest.likes
        ]
        found = contract(dataclasses.replace(rest, likes=tuple(batched)), *aligned)
        for i, x, o in zip(each, found, rest.likes, strict=True):
            results[i] = x.reshape(info.batch_size, *o.shape), 0
        values, dims = zip(*(results[i] for i in range(len(outputs))), strict=True)
        return values, dims


def _part(spec: ContractSpec, numbers: Sequence[int]) -> tuple[ContractSpec, list[int]]:
    """Some outputs of a contraction over only the tensors that they read, and their indices."""
    outputs = tuple(spec.contraction.outputs[i] for i in numbers)
    pruned, used = algebra.prune(spec.contraction._replace(outputs=outputs))
    return ContractSpec(pruned, tuple(spec.likes[i] for i in numbers), spec.kernel), used


def run(
    contraction: Contraction,
    likes: Sequence[TensorSpec],
    tensors: Sequence[Tensor],
    kernel: str = "flash",
    is_attend_vjp: bool = False,
) -> list[Tensor]:
    """Run a contraction as an autograd Function over the tensors that it reads.

    An output without terms is zeros. If it is the vjp of attend (see `ContractSpec`), the last
    tensor is the output of attention, which an `attend_vjp` reads.
    """
    live = [i for i, output in enumerate(contraction.outputs) if output.terms]
    done: dict[int, Tensor] = {}
    if live:
        pruned, used = algebra.prune(
            contraction._replace(outputs=tuple(contraction.outputs[i] for i in live))
        )
        read = [tensors[p] for p in used] + ([tensors[-1]] if is_attend_vjp else [])
        spec = ContractSpec(pruned, tuple(likes[i] for i in live), kernel, is_attend_vjp)
        done = dict(zip(live, contract(spec, *read), strict=True))
    return [
        done[i] if i in done else tensors[Q].new_zeros(o.shape, dtype=o.dtype)
        for i, o in enumerate(likes)
    ]


def contraction_vjp(
    contraction: Contraction,
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    needed: set[int],
    kernel: str,
) -> dict[int, Tensor]:
    """The vjp of a contraction: gradients by index, of the needed tensors that cotangents reach."""
    flat, given = list(tensors), dict[int, int]()
    for number, g in enumerate(cotangents):
        if g is not None and number < len(contraction.outputs):
            given[number] = len(flat)
            flat.append(g)
    contraction, wanted = algebra.vjp(
        contraction, given, needed, lambda place: flat[place].shape[:-2]
    )
    return dict(
        zip(
            wanted,
            run(contraction, [tensor_spec(flat[p]) for p in wanted], flat, kernel),
            strict=True,
        )
    )


def at_batch(x: Tensor, info: Any) -> Tensor:
    """x with its first axis, of size 1 or that of the batch, at the size of the batch."""
    return x if x.shape[0] == info.batch_size else x.expand(info.batch_size, *x.shape[1:])
