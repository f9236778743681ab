"""float8 weights with scales by blocks, by rows, or one for all ("fp8", "fbgemm_fp8").

    weight (N, K) float8   weight_scale_inv (N / 128, K / 128), rounded up, or one number
    w[n, k] = weight[n, k] weight_scale_inv[n // 128, k // 128]

`weight_scale_inv` is multiplied, in spite of its name. Experts in one tensor have an axis in front.
Scales of the activations (`input_scale`, `activation_scale`) are not used.

Source: DeepSeek-AI, DeepSeek-V3, arXiv:2412.19437, section 3.3; FBGEMM's row-wise float8.
"""

import math
from collections.abc import Mapping

import torch

from ....layers import Weight
from ...families.tables import LARGEST, Json
from . import codes
from .stored import FLOATS, SETTINGS, Dense, Read, Stored, Tensors, wrong

EIGHT = ("F8_E4M3", "F8_E5M2")
SCALES = (*FLOATS, "F8_E8M0")
ENDS = ("_scale_inv", "_scale")


def find(settings: Mapping[str, Json], tensors: Tensors) -> list[Stored]:
    """The matrices of a file of fp8 or fbgemm_fp8."""
    block = settings.get("weight_block_size")
    if block is not None and not is_block(block):
        wrong(f"weight_block_size in {SETTINGS}", "two sizes", repr(block))
    matrices = [name for name, entry in tensors.found.items() if entry.type in EIGHT]
    scales = {name for name in matrices if name.endswith(ENDS)}
    return [one(name, tensors, block) for name in matrices if name not in scales]


def is_block(block: Json) -> bool:
    """True for the rows and columns of a block."""
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and 0 < size <= LARGEST for size in block)
    )


def one(name: str, tensors: Tensors, block: Json) -> Stored:
    """A float8 matrix and its scale: one number, one a row, or of blocks.

    Args:
        block: [rows, columns], or None where the scale is not of blocks.
    """
    shape = tensors.found[name].shape
    if len(shape) not in (2, 3) or not all(shape):
        tensors.refuse(name, "a matrix, or one for each expert", shape)
    *lead, N, K = shape
    scale = next((name + end for end in ENDS if name + end in tensors.found), name + ENDS[0])
    given = tensors.shape(scale, SCALES)
    rows, columns = block or (1, K)
    blocks = (*lead, -(-N // rows), -(-K // columns))
    is_one = given in ((), (1,), (1, 1)) and (block is None or math.prod(blocks) == 1)
    if not is_one and given not in (blocks, blocks[:-1] if block is None else blocks):
        tensors.refuse(scale, f"of shape {blocks}, for {shape}", given)
    module, _, leaf = name.rpartition(".")
    others = [f"{module}.{leaf}_input_scale", f"{module}.input_scale", f"{name}_activation_scale"]
    parts = (name, scale, *(other for other in others if other in tensors.found))

    def read(tensor: Read) -> Weight | Dense:
        by = tensor(scale)
        by = by.float() if by.dtype == torch.float8_e8m0fnu else by
        whole = by.reshape(1, 1).expand(*lead, N, 1) if is_one else by.reshape(blocks)
        of_rows = (1, K) if is_one else (rows, columns)
        return codes.scaled_by_blocks(tensor(name), whole, *of_rows)

    return Stored(name, shape, parts, read)
