"""torch's integer kernels on the CPU, and the weight layouts that they read.

The kernels have no derivatives; autograd through one of them silently gives zeros. `fast.routed`
adds the exact derivatives of the plain form. `layers.prepare` gives these layouts to compiled
decoding, which takes no derivatives.

    int8    activations in bfloat16, sums in float32
    int4    the same, scale and zero in bfloat16 too; N a multiple of 16, groups of 32, 64, 128 or
            256 columns
    w8a8    activations in int8, sums in int32; one scale a row, and processors whose int8 products
            do not saturate sums of two
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..core.autograd import is_recorded
from ..core.tensor_cache import prepared_from
from ..layers import linear
from ..records import record
from . import packing
from .fast import MAX_FAST_ROWS

aten = torch.ops.aten


@record
class PackedInt8(NamedTuple):
    """codes int8 (N, K), scale bfloat16 (N,)."""

    codes: Tensor
    scale: Tensor


@record
class PackedInt4(NamedTuple):
    """codes uint8 (N, K / 2) in the order of torch's kernel; grid bfloat16 (G, N, 2).

    w = (code - 8) grid[0] + grid[1].
    """

    codes: Tensor
    grid: Tensor


@record
class PackedDynamic(NamedTuple):
    """codes int8 (N, K), scale (N, 1), for activations rounded to 8 bits with a scale per token."""

    codes: Tensor
    scale: Tensor


def pack_int8(codes: Tensor, scale: Tensor) -> PackedInt8 | None:
    """The layout of int8 with one scale a row, else None.

    Torch's kernel reads 16 columns at a time, beyond the matrix where they are no multiple of that.
    """
    if scale.shape[-1] != 1 or codes.device.type != "cpu" or codes.dim() != 2:
        return None
    if codes.shape[-1] % 16:
        return None
    return PackedInt8(
        codes,
        prepared_from([scale], lambda: scale.squeeze(-1).to(torch.bfloat16, copy=True), "int8"),
    )


def pack_int4(codes: Tensor, scale: Tensor, zero: Tensor) -> PackedInt4 | None:
    """The layout of int4 in sizes that the kernel supports, else None.

    Packed once for a weight, and cached as long as it lives.
    """

    def make() -> PackedInt4 | None:
        if codes.dim() != 2 or codes.device.type != "cpu":
            return None
        (N, half), G = codes.shape, scale.shape[-1]
        if N % 16 or 2 * half // G not in (32, 64, 128, 256):
            return None
        numbers = packing.unpack(codes, G, 4).to(torch.int32)
        wide = scale.double()
        grid = (
            torch.stack([wide.mT, (zero.double() + 8 * wide).mT], -1)
            .to(torch.bfloat16)
            .contiguous()
        )
        return PackedInt4(aten._convert_weight_to_int4pack_for_cpu(numbers, 1), grid)

    return prepared_from([codes, scale, zero], make, "int4")


def pack_dynamic(codes: Tensor, scale: Tensor, rows: int) -> PackedDynamic | None:
    """The layout of w8a8 with one scale a row; None if torch's int8 product is inexact or slow."""
    if rows > MAX_FAST_ROWS and not torch.backends.mkldnn.is_available():
        return None
    if (
        scale.shape[-1] != 1
        or codes.device.type != "cpu"
        or codes.dim() != 2
        or not bytes_are_exact()
    ):
        return None
    return PackedDynamic(codes, scale)


@functools.cache
def bytes_are_exact() -> bool:
    """True where sums of int8 products are exact: without VNNI, sums of two saturate at 16 bits."""
    with _disable_current_modes():  # fake tensors have no values
        most = torch.full((17, 64), 127, dtype=torch.int8, device="cpu")
        return all(
            bool((aten._int_mm(x * most[:rows], y * most.mT) == x * y * 64 * 127**2).all())
            for rows in (1, 2, 17)
            for x in (1, -1)
            for y in (1, -1)
        )


@linear.register
def _(weight: PackedInt8, x: Tensor) -> Tensor:
    # Other activations run scalar code there, slower than float32 weights.
    narrow = _rows(x).to(torch.bfloat16)
    return _like(aten._weight_int8pack_mm(narrow, weight.codes, weight.scale), x)


@linear.register
def _(weight: PackedInt4, x: Tensor) -> Tensor:
    narrow, group = _rows(x).to(torch.bfloat16), x.shape[-1] // weight.grid.shape[0]
    return _like(aten._weight_int4pack_mm_for_cpu(narrow, weight.codes, group, weight.grid), x)


@linear.register
def _(weight: PackedDynamic, x: Tensor) -> Tensor:
    if followed(x):
        return (
            straight_through(x, 1)
            @ (weight.codes * weight.scale.float()).mT.to(
                torch.promote_types(x.dtype, torch.float32)
            )
        ).to(x.dtype)
    codes, by = round_tokens(_rows(x))
    # A subnormal scale has few digits: quotients may overshoot.
    codes = codes.clamp_(-127, 127)
    product = aten._int_mm(codes.flatten(-2).to(torch.int8), weight.codes.mT)
    return _like((product * by.flatten(-2)).mul_(weight.scale.to(by.dtype).mT), x)


@functools.cache
def bfloat16_is_fast() -> bool:
    """True where the processor has bfloat16 matrix products, several times faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def times_codes(codes: Tensor, scale: Tensor, x: Tensor) -> Tensor | None:
    """(x codes^T) scale for int8 with one scale a row and many vectors x (n, K), else None.

    One pass over the matrix fewer than expanding it. Codes are exact in every dtype, but their
    products are larger than the result by 1 / scale, which may overflow float16.
    """
    if scale.shape[-1] != 1 or x.dtype == torch.float16:
        return None
    return (x @ codes.to(x.dtype).mT).mul_(scale.mT.to(x.dtype))


def round_tokens(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Codes -127 .. 127 of each token (*lead, groups, K / groups), and scales (*lead, groups, 1).

    In float32 at least: bfloat16 quotients cannot represent 127 codes.
    """
    wide = packing.groups(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1] // groups)
    by = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / torch.where(by == 0, 1, by)).round_(), by


def rounded(x: Tensor, groups: int = 1) -> Tensor:
    """x rounded to the codes of `round_tokens`, (*lead, K)."""
    codes, by = round_tokens(x, groups)
    return codes.mul_(by).flatten(-2)


def straight_through(x: Tensor, groups: int) -> Tensor:
    """`rounded`, whose derivative is the identity (the straight-through estimator)."""
    still = x.detach()
    near = rounded(still, groups)
    return x.to(near.dtype) + (near - still)


def followed(x: Tensor) -> bool:
    """True where autograd or torch.func may track x; False under torch.compile.

    `fa.compile` compiles outside of both.
    """
    return not torch.compiler.is_compiling() and is_recorded(x)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _like(out: Tensor, x: Tensor) -> Tensor:
    return out.to(x.dtype).reshape(*x.shape[:-1], -1)
