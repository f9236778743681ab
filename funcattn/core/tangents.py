"""Tangents computed with the values, where torch's rules would multiply by zeros.

The jvp of x W^T in torch is dx W^T + x dW^T. Where W has no tangent, dW is a tensor of zeros, and
torch multiplies by it (2.13 to 2.15): three products for a jvp instead of two, and eight instead of
six for the gradient of a jvp. Rules written out here take the tangents that exist:

    bilinear       f(x, y), linear in both operands
    affine         F.linear, with a bias
    split          the operands without their tangents, and these, for rules elsewhere
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from .autograd import dual, is_differentiable, primal, tangent


class Split(NamedTuple):
    """Operands without tangents of the innermost level, and these, None where there is none."""

    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor | None, ...]


def split(*tensors: Tensor) -> Split | None:
    """Tangents of the innermost level apart from their tensors; None where torch's rules apply.

    That is: no tensor has a tangent there, in torch.compile, and where autograd records in the same
    level as forward mode: a gradient wants the tangent of what was saved, which a primal lacks.
    """
    if torch.compiler.is_compiling():
        return None
    tangents = tuple(tangent(x) if is_differentiable(x) else None for x in tensors)
    if all(dx is None for dx in tangents):
        return None
    is_one_level = _functorch.peek_interpreter_stack() is None
    if is_one_level and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    primals = (x if dx is None else primal(x) for x, dx in zip(tensors, tangents, strict=True))
    return Split(tuple(primals), tangents)


def bilinear(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """f(x, y), linear in x and in y, as a matrix product or a product of numbers is.

    Law: f, in every nesting of transforms (test_tangents.py::test_products_are_closed).
    Law: as many products as operands have tangents, and one
        (test_tangents.py::test_no_product_is_with_zeros).
    """
    parts = split(x, y)
    if parts is None or None not in parts.tangents:
        return f(x, y)
    (x, y), (dx, dy) = parts
    return dual(f(x, y), f(x if dx is None else dx, y if dy is None else dy))


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear.

    Law: as that of `bilinear` (test_tangents.py::test_operands_without_a_tangent_are_constants).
    """
    parts = split(x, weight) if bias is None else split(x, weight, bias)
    if parts is None or None not in parts.tangents[:2]:
        return F.linear(x, weight, bias)
    x, weight, *rest = parts.primals
    dx, dweight, *drest = parts.tangents
    y = F.linear(x, weight, *rest)
    dbias = drest[0] if drest else None
    if dx is not None:
        return dual(y, F.linear(dx, weight, dbias))
    if dweight is not None:
        return dual(y, F.linear(x, dweight, dbias))
    assert dbias is not None
    return dual(y, dbias.to(y.dtype).expand_as(y))
