"""A matrix product that never copies a shared operand for a mapped axis.

    product(x, w)[r, s] = sum_d x[r, d] w[d, s]

Under `vmap`, torch expands an operand that is not mapped to the size of the batch and multiplies batch by batch: reading one
past from 32 futures would copy the past 32 times. Here the mapped axis of x becomes more rows (and that of w more columns), so
what is shared stays shared. Bilinear, so its derivatives are products again, at every order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._autodiff import align, closed_jvp, sum_to, transforming

FEW = 8  # rows, at most, that compiled code multiplies by itself


class Product(Function):
    """x (*lead, R, D) @ w (*lead, D, S), closed under every transform."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        dx = sum_to(Product.apply(g, w.mT), x) if ctx.needs_input_grad[0] else None
        dw = sum_to(Product.apply(x.mT, g), w) if ctx.needs_input_grad[1] else None
        return dx, dw

    @closed_jvp
    def jvp(ctx: Any, saved: list[Tensor], dx: Tensor | None, dw: Tensor | None) -> Tensor:
        x, w = saved
        if dx is None:
            return Product.apply(x, dw)
        return Product.apply(dx, w) if dw is None else Product.apply(dx, w) + Product.apply(x, dw)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, w: Tensor) -> tuple[Tensor, int]:
        dx, dw = in_dims
        if dx is not None and dw is None:  # more rows
            x = x.movedim(dx, -3)  # (*lead, B, R, D)
            out = Product.apply(x.flatten(-3, -2), w)
            return out.unflatten(-2, x.shape[-3:-1]), out.dim() - 2
        if dx is None and dw is not None:  # more columns
            w = w.movedim(dw, -2)  # (*lead, D, B, S)
            out = Product.apply(x, w.flatten(-2, -1))
            return out.unflatten(-1, w.shape[-2:]), out.dim() - 1
        return Product.apply(*align(in_dims, (x, w))), 0


def product(x: Tensor, w: Tensor) -> Tensor:
    """x (*lead, R, D) times w (*lead, D, S), leading axes broadcast; the plain `@` where no transform is active.

    A few rows on the CPU are written out as products and sums where they are compiled: the loops are fused with what stands around
    them. With 3 rows and heads of 64, attention over 256 keys takes 17 us where two calls of the library take 31, besides what the
    call takes; with 15 rows there is no gain (one thread, AVX-512).
    """
    if torch.compiler.is_compiling():
        few = isinstance(x.shape[-2], int) and x.shape[-2] <= FEW and x.device.type == "cpu"
        return _sums(computed(x), w) if few else x @ w
    if transforming():
        return Product.apply(x, w)
    return x @ w


def _sums(x: Tensor, w: Tensor) -> Tensor:
    """In float32 at least; along that axis of w which lies together in memory, where there is one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, w, dtype = x.to(wide), w.to(wide), x.dtype
    if w.stride(-2) == 1:
        return (x.unsqueeze(-2) * w.mT.unsqueeze(-3)).sum(-1).to(dtype)
    return (x.unsqueeze(-1) * w.unsqueeze(-3)).sum(-2).to(dtype)


def computed(x: Tensor) -> Tensor:
    """x as memory that holds it, where a compiler would otherwise compute it anew in every loop that reads it.

    A norm, for example, for each row of a matrix; or the cosines of the positions, for each head and layer.
    """
    if not torch.compiler.is_compiling():
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    return x.as_strided(x.shape, x.stride())
