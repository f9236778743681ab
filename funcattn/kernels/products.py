"""A matrix product that under vmap does not copy an operand that is not mapped.

    product(x, w)[r, s] = sum_d x[r, d] w[d, s]

Under `vmap`, torch expands an unmapped operand to the size of the batch and calls a batched
product: 32 futures that read one cache would copy it 32 times. Here the mapped axis of x becomes
more rows (and that of w more columns), so the unmapped operand is read in place. The product is
bilinear, so its derivatives are products again, at every order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..core import errors
from ..core.autograd import add, align, closed_jvp, is_recorded, sum_to, transforming
from .backends.masking import is_finite, weigh

# elements of an operand, up to which a copy for each row of vmap is cheaper than a Function
COPIED = 64 * 64
FEW = 8  # rows, at most, whose product compiled code writes out as sums


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
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], x: Tensor, w: Tensor
    ) -> tuple[Tensor, int]:
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


class MaskedSum(Function):
    """A matrix product that leaves hidden pairs out.

        out[r, d] = sum over s with seen[r, s] of x[r, s] w[s, d]

    The arguments are x (*lead, R, S), w (*lead, S, D) and booleans seen (*lead, R, S); out is
    (*lead, R, D). A hidden term is left out, not multiplied by zero, since 0 * NaN is NaN: a row of
    w that holds NaN, in the value, a tangent or a cotangent, reaches only the rows r that see it.
    Derivatives are a MaskedSum with respect to w and a `MaskedDot` with respect to x.
    """

    @staticmethod
    def forward(x: Tensor, w: Tensor, seen: Tensor) -> Tensor:
        # on other devices, reading values would synchronize
        out = x @ w if x.device.type == "cpu" else None
        known = None if out is None else errors.peek(out)
        if out is not None and known is not None and is_finite([known]):
            return out
        return weigh(torch.where(seen, x, 0), w, x.dim() - 2, seen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, seen = ctx.saved_tensors
        dx = sum_to(MaskedDot.apply(g, w, seen), x) if ctx.needs_input_grad[0] else None
        dw = sum_to(MaskedSum.apply(x.mT, g, seen.mT), w) if ctx.needs_input_grad[1] else None
        return dx, dw, None

    @closed_jvp
    def jvp(
        ctx: Any, saved: list[Tensor], dx: Tensor | None, dw: Tensor | None, _: None
    ) -> Tensor | None:
        x, w, seen = saved
        one = None if dx is None else MaskedSum.apply(dx, w, seen)
        return add(one, None if dw is None else MaskedSum.apply(x, dw, seen))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor, seen: Tensor
    ) -> tuple[Tensor, int]:
        # more columns, as in Product
        if in_dims[0] is None and in_dims[2] is None and in_dims[1] is not None:
            w = w.movedim(in_dims[1], -2)
            out = MaskedSum.apply(x, w.flatten(-2, -1), seen)
            return out.unflatten(-1, w.shape[-2:]), out.dim() - 1
        if in_dims[1] is None:
            rows = _rows(info, in_dims, (x, w, seen))
            out = MaskedSum.apply(rows[0], w, rows[2])
            return out.unflatten(-2, (info.batch_size, -1)), out.dim() - 2
        return MaskedSum.apply(*align(in_dims, (x, w, seen))), 0


class MaskedDot(Function):
    """Dot products of visible pairs: out[r, s] = x[r] . w[s] where seen[r, s], else 0.

    The arguments are x (*lead, R, D), w (*lead, S, D) and booleans seen (*lead, R, S); out is
    (*lead, R, S). It is the derivative of `MaskedSum` with respect to x.
    """

    @staticmethod
    def forward(x: Tensor, w: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, x @ w.mT, 0)

    setup_context = MaskedSum.setup_context

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, seen = ctx.saved_tensors
        g = torch.where(seen, g, 0)
        dx = sum_to(MaskedSum.apply(g, w, seen), x) if ctx.needs_input_grad[0] else None
        dw = sum_to(MaskedSum.apply(g.mT, x, seen.mT), w) if ctx.needs_input_grad[1] else None
        return dx, dw, None

    @closed_jvp
    def jvp(
        ctx: Any, saved: list[Tensor], dx: Tensor | None, dw: Tensor | None, _: None
    ) -> Tensor | None:
        x, w, seen = saved
        one = None if dx is None else MaskedDot.apply(dx, w, seen)
        return add(one, None if dw is None else MaskedDot.apply(x, dw, seen))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor, seen: Tensor
    ) -> tuple[Tensor, int]:
        if in_dims[1] is None:
            rows = _rows(info, in_dims, (x, w, seen))
            out = MaskedDot.apply(rows[0], w, rows[2])
            return out.unflatten(-2, (info.batch_size, -1)), out.dim() - 2
        return MaskedDot.apply(*align(in_dims, (x, w, seen))), 0


def _rows(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Each tensor (*lead, R, X) with the mapped axis folded into rows, (*lead, B R, X).

    For batching rules where w is not mapped.
    """
    fold = lambda x, d: (
        x.unsqueeze(-3).expand(*x.shape[:-2], info.batch_size, *x.shape[-2:])
        if d is None
        else x.movedim(d, -3)
    )
    return [fold(x, d).flatten(-3, -2) for x, d in zip(tensors, in_dims, strict=True)]


def hides(seen: Tensor | None, *tensors: Tensor) -> bool:
    """True where derivatives must leave hidden pairs out: eager autograd or a transform."""
    if seen is None or torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    return is_recorded(*tensors)


def product(x: Tensor, w: Tensor) -> Tensor:
    """x (*lead, R, D) times w (*lead, D, S); plain `@` outside of transforms and for small w.

    In torch.compile, few rows on the CPU are written out as products and sums: their loops fuse
    with the surrounding ones. With 3 rows and heads of 64, attention over 256 keys takes 17 us
    where two calls of the library take 31, besides the overhead of the call; with 15 rows there is
    no gain (one thread, AVX-512).
    """
    if torch.compiler.is_compiling():
        few = isinstance(x.shape[-2], int) and x.shape[-2] <= FEW and x.device.type == "cpu"
        return _sums(computed(x), w) if few else x @ w
    if transforming() and w.shape[-2] * w.shape[-1] > COPIED:
        return Product.apply(x, w)
    return x @ w


def _sums(x: Tensor, w: Tensor) -> Tensor:
    """x @ w as sums in float32 at least, along the contiguous axis of w if there is one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, w, dtype = x.to(wide), w.to(wide), x.dtype
    if w.stride(-2) == 1:
        return (x.unsqueeze(-2) * w.mT.unsqueeze(-3)).sum(-1).to(dtype)
    return (x.unsqueeze(-1) * w.unsqueeze(-3)).sum(-2).to(dtype)


def computed(x: Tensor) -> Tensor:
    """x materialized in memory, where the compiler would recompute it in every loop that reads it.

    Examples: a norm, recomputed for each row of a matrix; cosines of positions, for each head and
    layer.
    """
    if not torch.compiler.is_compiling():
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    return x.as_strided(x.shape, x.stride())
