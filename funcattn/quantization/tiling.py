"""Matrices stored in tiles: `Tiles` of codes and scales, or of floats, made once for each matrix.

    tile_int8, tile_int4, tile_affine, tile_narrow    of quantized matrices
    tile_floats                                       of float32

None is returned where another product is used: without the operator, or for more rows than it is
faster for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.huge_pages import placed
from ..core.tensor_cache import prepared_from
from ..records import ABSENT
from . import packing, tiles
from .tiles import COLUMNS, FEWEST, NARROW, ROWS, Tiles, most_rows


def tile_int8(codes: Tensor, scale: Tensor, *, rows: int = 1) -> Tiles | None:
    """Tiles of int8 codes (N, K) and scales (N, G), one a row or for groups of whole blocks.

    None for other groups, without the operator, and for more rows than it is faster for.

    Law: the tiles stand for the same matrix, bit for bit
        (test_tiles.py::test_tiles_hold_the_matrix_bit_for_bit).
    """
    if not _is_served(codes, rows, 8):
        return None
    N, K = codes.shape
    by_row = scale.shape[-1] == 1

    def make() -> Tiles:
        bytes_ = _blocks(codes.view(torch.uint8) ^ 128, 8)
        if by_row:
            return Tiles(placed(bytes_), scale.float().clone())
        return Tiles(placed(torch.cat([bytes_, _numbers(_exact(scale), K)], -1)), _rows_of(N))

    if not by_row and (K % scale.shape[-1] or K // scale.shape[-1] % COLUMNS):
        return None
    return prepared_from([codes, scale], make, "tiles")


def tile_int4(codes: Tensor, scale: Tensor, zero: Tensor, *, rows: int = 1) -> Tiles | None:
    """Tiles of packed codes (N, K / 2) in groups of whole blocks (see `packing`); None as above."""
    if not _is_served(codes, rows, 4):
        return None
    (N, half), G = codes.shape, scale.shape[-1]
    if 2 * half // G % COLUMNS:
        return None

    def make() -> Tiles:
        numbers = packing.unpack(codes, G, 4)
        wide = _exact(scale), _exact(zero)
        centered = wide[0].dtype == torch.float16 and torch.equal(
            zero.double(), -8 * scale.double()
        )
        if wide[0].dtype != wide[1].dtype:
            wide = wide[0].float(), wide[1].float()
        after = [_numbers(part, 2 * half) for part in wide[: 1 if centered else 2]]
        return Tiles(placed(torch.cat([_blocks(numbers, 4), *after], -1)), _rows_of(N))

    return prepared_from([codes, scale, zero], make, "tiles")


def tile_narrow(codes: Tensor, scale: Tensor, *, rows: int = 1) -> Tiles | None:
    """Tiles of int8 codes (N, K) in groups of 16 columns; None as above."""
    if not _is_served(codes, rows, 8) or codes.shape[-1] != COLUMNS // 2 * scale.shape[-1]:
        return None

    def make() -> Tiles:
        bytes_ = _blocks(codes.view(torch.uint8) ^ 128, 8, COLUMNS // 2)
        after = _numbers(scale.float(), codes.shape[-1], COLUMNS // 2)
        room = NARROW - bytes_.shape[-1] - after.shape[-1]
        padded = F.pad(torch.cat([bytes_, after], -1), (0, room))
        return Tiles(placed(padded), _rows_of(len(codes)))

    return prepared_from([codes, scale], make, "narrow tiles")


def tile_affine(codes: Tensor, scale: Tensor, zero: Tensor, *, rows: int = 1) -> Tiles | None:
    """Tiles of uint8 codes (N, K) with zeros, in groups of whole blocks; None as above."""
    if not _is_served(codes, rows, 8):
        return None
    K, G = codes.shape[-1], scale.shape[-1]
    if K % G or K // G % COLUMNS:
        return None

    def make() -> Tiles:
        after = [_numbers(part.float(), K) for part in (scale, zero)]
        return Tiles(placed(torch.cat([_blocks(codes, 8), *after], -1)), _rows_of(len(codes)))

    return prepared_from([codes, scale, zero], make, "tiles")


def tile_floats(weight: Tensor, *, rows: int = 1) -> Tiles | None:
    """Tiles of a float32 matrix (N, K); None without the operator, and for more rows.

    Law: the tiles hold the matrix (test_tiles.py::test_tiles_of_floats_hold_the_matrix).
    """
    if weight.dtype != torch.float32 or not _is_served(weight, rows, 32):
        return None

    def make() -> Tiles:
        padded = F.pad(weight.detach(), (0, 0, 0, -len(weight) % ROWS))
        return Tiles(placed(padded.unflatten(0, (-1, ROWS)).mT), _rows_of(len(weight)))

    return prepared_from([weight], make, "tiles")


def _is_served(codes: Tensor, rows: int, bits: int) -> bool:
    if type(codes) not in (Tensor, torch.nn.Parameter):  # fake tensors have no values
        return False
    if codes.dim() != 2 or codes.device.type != "cpu" or not codes.numel() or tiles.missing():
        return False
    return rows <= FEWEST or rows <= most_rows(bits)


def _rows_of(N: int) -> Any:
    return torch.empty(N, 0, device="cpu") if N % ROWS else ABSENT


def _exact(scale: Tensor) -> Tensor:
    """Scales in float16 where that is exact, else in float32."""
    return scale if scale.dtype == torch.float16 else scale.float()


def _blocks(codes: Tensor, bits: int, columns: int = COLUMNS) -> Tensor:
    """Codes (N, K) uint8 in the order of the operator.

    A 32-bit lane is a row, with 4 columns (of 4-bit codes, 4 more in the high nibbles).
    """
    N, K = codes.shape
    padded = F.pad(codes, (0, -K % columns, 0, -N % ROWS))
    if bits == 8:
        return (
            padded.view(-(-N // ROWS), ROWS, -1, columns // 4, 4)
            .permute(0, 2, 3, 1, 4)
            .flatten(2)
            .contiguous()
        )
    parts = padded.view(-(-N // ROWS), ROWS, -1, 2, 4, 4)
    return (
        (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).permute(0, 2, 3, 1, 4).flatten(2).contiguous()
    )


def _numbers(scale: Tensor, K: int, columns: int = COLUMNS) -> Tensor:
    """Scales (N, G) as bytes for each block."""
    N, G = scale.shape
    each = F.pad(scale, (0, 0, 0, -N % ROWS)).view(-1, ROWS, G).mT
    return each.repeat_interleave(K // columns // G, 1).contiguous().view(torch.uint8)
