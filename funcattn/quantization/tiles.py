"""Matrices in tiles for the C++ operators (`funcattn.native`): float32, and of 8 and 4 bits.

    y = sum over blocks of 32 columns   scale * (codes @ digits) * unit + zero * total

The matrix is read sequentially once, for 1 to 16 vectors. A vector is split into three digits of 8
bits with a unit for each block, so codes times digits are integers and their sums exact; a number
has an error of at most 2^-23 of the largest of its block. (A block whose largest is beyond 2^-64 ..
2^64 is multiplied without digits.) So the product is as accurate as one of floats, whatever the
dtype and size of the vector. Where the bytes of a matrix are int8 instead of uint8, its vectors
have one digit: they are rounded as by `packed.rounded` in groups of 32, and multiplied exactly.

A tile is 16 rows, a block of it 16 rows and 32 columns: codes, scales, zero points. A tile of
floats is its 16 rows, column by column.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import native
from ..core.autograd import VmapInfo, has_tangent
from ..core.errors import on_one_device
from ..layers import linear, together
from ..records import ABSENT, is_absent, record
from .packed import followed, rounded, straight_through

ROWS, COLUMNS = 16, 32  # of a block
FEWEST = 1  # rows from which it is faster on every processor
MOST_FLOATS = 1024  # rows of floats that were measured: faster than MKL, level with oneDNN
AVX512 = 2  # the operator's number of this instruction set
FLOATS = 16  # the last axis of blocks of floats, (N / 16, K, 16) in float32
FORMS = {  # bytes of a block -> bits of a code, dtype of scales (None: per row), zeros, code of 0
    512: (8, None, False, 128),
    544: (8, torch.float16, False, 128),
    576: (8, torch.float32, False, 128),
    288: (4, torch.float16, False, 8),
    320: (4, torch.float16, True, 0),
    384: (4, torch.float32, True, 0),
    640: (8, torch.float32, True, 0),
    336: (8, torch.float32, False, 128),
}
NARROW = 336  # bytes of a block of 16 columns


@record
class Tiles(NamedTuple):
    """blocks uint8 (N / 16, K / 32, bytes), rounded up, or float32 (N / 16, K, 16); scale float32
    (N, 1) if there is one a row. Of groups of 16 columns blocks are (N / 16, K / 16, bytes). The
    same bytes as int8, of blocks of 32 columns, multiply vectors rounded to 8 bits.

    Otherwise scale is (), or (N, 0) where N is no multiple of 16: without a tensor compiled code
    has one guard fewer.
    """

    blocks: Tensor
    scale: Any = ABSENT

    @property
    def rows(self) -> int:
        """N."""
        return ROWS * self.blocks.shape[-3] if is_absent(self.scale) else self.scale.shape[-2]


@record
class DynamicTiles(NamedTuple):
    """Tiles, with G groups of columns, for activations rounded to 8 bits.

    Of scale (N, G) only the shape is read.
    """

    tiles: Tiles
    scale: Tensor


def by_one_digit(tiles: Tiles) -> Tiles:
    """The same matrix, of which 32 divides the columns, for vectors rounded to 8 bits."""
    return tiles._replace(blocks=tiles.blocks.view(torch.int8))


@native.once
def missing() -> str:
    """ "" where the operator runs, else why not. One thread registers it; others wait."""
    reason = native.load()
    if not reason:
        torch.library.register_fake("funcattn::products", _like)
        register_flop_formula(torch.ops.funcattn.products)(_operations)
        torch.library.register_vmap("funcattn::products", _mapped)
        _library.impl("products", _differentiated, "Autograd")
        _library.impl("layers", _refused, "Autograd")
    return reason


def most_rows(bits: int) -> int:
    """The number of rows up to which the operator is faster than expanding the matrix.

    With AVX-512 VNNI always, by 2 to 3 at 512 rows; AVX2 has no int8 product without overflow.
    """
    if bits == 32:
        return MOST_FLOATS
    return 2**31 if native.instructions() == AVX512 else {4: 8, 8: FEWEST}[bits]


def expand_tiles(blocks: Tensor, scale: Tensor | tuple[()], N: int, K: int) -> Tensor:
    """The matrix (N, K) in float32 of tiles."""
    if blocks.dtype == torch.float32:
        return blocks.mT.flatten(0, 1)[:N]
    blocks = blocks.view(torch.uint8)
    bits, dtype, has_zero, offset = FORMS[blocks.shape[-1]]
    narrow = blocks.shape[-1] == NARROW
    size = ROWS * COLUMNS * bits // (16 if narrow else 8)
    codes = blocks[..., :size].unflatten(-1, (-1, ROWS, 4))  # tiles, blocks, 8 or 4, rows, 4
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], 2)
    codes = codes.permute(0, 3, 1, 2, 4).float() - offset  # tiles, rows, blocks, 8, 4
    if dtype is None:
        return codes.flatten(2).flatten(0, 1)[:N, :K] * scale
    after = (
        blocks[..., size : size + 4 * ROWS if narrow else None]
        .contiguous()
        .view(dtype)
        .unflatten(-1, (-1, ROWS))
        .float()
        .permute(2, 0, 3, 1)[..., None, None]
    )
    matrix = codes * after[0] + (after[1] if has_zero else 0)
    return matrix.flatten(2).flatten(0, 1)[:N, :K]


@linear.register
def _(weight: Tiles, x: Tensor) -> Tensor:
    return products([weight], x)


def _several(weights: Sequence[Tiles], x: Tensor) -> tuple[Tensor, ...]:
    return products(weights, x).split([one.rows for one in weights], -1)


together[Tiles] = _several


@linear.register
def _(weight: DynamicTiles, x: Tensor) -> Tensor:
    return products([weight.tiles], _near(weight, x)).to(x.dtype)


def _near(weight: DynamicTiles, x: Tensor) -> Tensor:
    groups = weight.scale.shape[-1]
    return straight_through(x, groups) if followed(x) else rounded(x, groups)


def _several_dynamic(weights: Sequence[DynamicTiles], x: Tensor) -> tuple[Tensor, ...]:
    if len({weight.scale.shape[-1] for weight in weights}) > 1:
        return tuple(linear(weight, x) for weight in weights)
    several = _several([weight.tiles for weight in weights], _near(weights[0], x))
    return tuple(y.to(x.dtype) for y in several)


together[DynamicTiles] = _several_dynamic


def products(weights: Sequence[Tiles], x: Tensor) -> Tensor:
    """Products of several matrices with the same x (*lead, K), concatenated (*lead, N1 + N2 + ...).

    Where x is not finite in a block the whole row of the result is NaN.

    Law: as near to the product with the matrices as that of float32, at any scale that float32 has
        (test_tiles.py::test_a_product_is_as_near_as_that_of_floats,
        ::test_a_product_of_any_scale_is_as_near_as_that_of_floats).
    """
    flat = _flat(x)
    blocks, rows = [weight.blocks for weight in weights], [weight.rows for weight in weights]
    scales = [weight.scale for weight in weights if has_row_scale(weight.blocks)]
    y = torch.ops.funcattn.products(blocks, scales, rows, flat)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def value(weight: Tiles | DynamicTiles, x: Tensor) -> Tensor:
    """`linear` of x (n, K) outside of autograd and torch.func, without their dispatch."""
    if isinstance(weight, DynamicTiles):
        return value(weight.tiles, rounded(x, weight.scale.shape[-1])).to(x.dtype)
    with torch._C._AutoDispatchBelowAutograd():
        scales = [weight.scale] if has_row_scale(weight.blocks) else []
        return torch.ops.funcattn.products([weight.blocks], scales, [weight.rows], _flat(x)).to(
            x.dtype
        )


def _flat(x: Tensor) -> Tensor:
    """Vectors (n, K) in the dtype and layout that the operator reads."""
    if x.dim() == 2 and x.dtype == torch.float32 and x.is_contiguous():
        return x
    return x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()


# Registrations with torch.

_library = torch.library.Library("funcattn", "FRAGMENT")


def has_row_scale(blocks: Tensor) -> bool:
    """True for blocks without scales: the matrix has one scale a row, stored separately."""
    return blocks.shape[-1] != FLOATS and FORMS[blocks.shape[-1]][1] is None


def _plain(
    blocks: Sequence[Tensor], scales: Sequence[Tensor], rows: Sequence[int], x: Tensor
) -> Tensor:
    left = iter(scales)
    near = (
        straight_through(x, x.shape[-1] // COLUMNS)
        if any(b.dtype == torch.int8 for b in blocks)
        else x
    )
    return torch.cat(
        [
            F.linear(
                near if b.dtype == torch.int8 else x,
                expand_tiles(b, next(left) if has_row_scale(b) else (), n, x.shape[-1]),
            )
            for b, n in zip(blocks, rows, strict=True)
        ],
        -1,
    )


def _like(
    blocks: Sequence[Tensor], scales: Sequence[Tensor], rows: Sequence[int], x: Tensor
) -> Tensor:
    on_one_device("funcattn::products", [*blocks, *scales, x])
    return x.new_empty(x.shape[0], sum(rows))


def _operations(
    blocks: Any, scales: Any, rows: Sequence[int], x: Sequence[int], **_: object
) -> int:
    """Operations of the products (on integers), for torch.utils.flop_counter."""
    return 2 * x[0] * x[1] * sum(rows)


def _differentiated(
    blocks: Sequence[Tensor], scales: Sequence[Tensor], rows: Sequence[int], x: Tensor
) -> Tensor:
    """Under autograd or torch.func: products of floats, which have derivatives of every order."""
    if has_tangent(*scales, x) or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (*scales, x))
    ):
        return _plain(blocks, scales, rows, x)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.funcattn.products(blocks, scales, rows, x)


def _refused(*args: object) -> Any:
    """Raises: the operator of layers has no derivative; `fa.compile` calls it without autograd."""
    raise RuntimeError(
        "funcattn::layers: it has no derivative; call the functions of the model, "
        "which do not use it under grad."
    )


def _mapped(
    info: VmapInfo,
    in_dims: tuple[Any, ...],
    blocks: Sequence[Tensor],
    scales: Sequence[Tensor],
    rows: Sequence[int],
    x: Tensor,
) -> tuple[Tensor, int]:
    """vmap: mapped vectors are more rows of one product; mapped matrices are a loop."""
    of_blocks, of_scales, _, of_x = in_dims
    if of_x is not None and all(d is None for d in (*of_blocks, *of_scales)):
        x = x.movedim(of_x, 0)
        flat = x.flatten(0, 1).contiguous()
        return torch.ops.funcattn.products(blocks, scales, rows, flat).unflatten(0, x.shape[:2]), 0
    one = lambda t, d, n: (t if d is None else t.select(d, n)).contiguous()
    many = lambda tensors, dims, n: [one(t, d, n) for t, d in zip(tensors, dims, strict=True)]
    call = lambda n: torch.ops.funcattn.products(
        many(blocks, of_blocks, n), many(scales, of_scales, n), rows, one(x, of_x, n)
    )
    return torch.stack([call(n) for n in range(info.batch_size)]), 0
