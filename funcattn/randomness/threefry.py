"""Threefry-2x32, and draws from its words; large ones in chunks that fit into the CPU's cache.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import native
from ..core import errors
from ..core.autograd import VmapInfo, is_jit_traced, mapped_rows

PARITY = 0x1BD11BDA  # the key schedule's constant
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # alternate every four rounds
PART = 2**16  # elements of a chunk for each thread: 256 KiB a tensor; a few fit into a core's cache


def encipher(key: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32, 20 rounds: encrypt the pairs (0, count) with the two words of the key.

    Returns two words; all are int32. The key is (2,), or (2, *lead) with axes that broadcast
    against counts.

    int32 overflow wraps as the cipher's unsigned words do, at a third of the cost of masked int64.
    In-place operations write into tensors made here only. A rotation by n is 2^n y plus the n high
    bits: one pass fewer than with a left shift.
    """
    a, b = key.to(torch.int32).unbind()
    schedule = (a, b, a ^ b ^ PARITY)
    y = b + counts
    x = a + y
    for block in range(5):
        for place, turn in enumerate(ROTATIONS[block % 2]):
            if block or place:
                x += y
            rotated = y >> (32 - turn)  # an arithmetic shift: mask the sign off
            rotated &= (1 << turn) - 1
            y = rotated.add_(y, alpha=1 << turn)
            y ^= x
        x += schedule[(block + 1) % 3]
        y += schedule[(block + 2) % 3] + (block + 1)
    return x, y


def encipher_in_memory(key: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`encipher` with one key, of words in memory, on one thread.

    A fifth fewer passes: numpy's words are unsigned and need no mask. No temporary tensors.
    """
    a, b = key.tolist()
    schedule = [np.uint32(word & 0xFFFFFFFF) for word in (a, b, a ^ b ^ PARITY)]
    tensors = [torch.empty_like(counts) for _ in range(3)]
    (x, y, spare), (X, Y, S) = tensors, [tensor.numpy().view(np.uint32) for tensor in tensors]
    np.add(counts.numpy().view(np.uint32), schedule[1], out=Y)
    np.add(Y, schedule[0], out=X)
    for block in range(5):
        for place, turn in enumerate(ROTATIONS[block % 2]):
            if block or place:
                np.add(X, Y, out=X)
            np.right_shift(Y, np.uint32(32 - turn), out=S)
            spare.add_(y, alpha=1 << turn)
            np.bitwise_xor(S, X, out=S)
            y, spare, Y, S = spare, y, S, Y
        np.add(X, schedule[(block + 1) % 3], out=X)
        np.add(Y, np.uint32((int(schedule[(block + 2) % 3]) + block + 1) & 0xFFFFFFFF), out=Y)
    return x, y


def words(
    key: Tensor, first: int, n: int, cipher: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The words (n,) of the counters first, first + 1, ..., int32.

    By the operator funcattn::words where that is loaded already, also under vmap; nothing is built
    for it.

    Law: both ways have the same bits
        (test_threefry.py::test_the_operator_has_the_bits_of_the_cipher).
    """
    known = errors.peek(key) is not None and not is_jit_traced()
    runs = known and (errors.is_plain(key) or mapped_rows() > 0)
    if runs and key.device.type == "cpu" and native.is_loaded():
        _register()
        x, y = torch.ops.funcattn.words(key.reshape(1, 2).contiguous(), first, n)
        return x[0], y[0]
    return cipher(key, torch.arange(first, first + n, dtype=torch.int32, device=key.device))


@native.once
def _register() -> None:
    torch.library.register_vmap("funcattn::words", _mapped)


def _mapped(
    info: VmapInfo, in_dims: tuple[int | None, ...], keys: Tensor, first: int, n: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """vmap of funcattn::words: more keys."""
    assert in_dims[0] is not None
    rows = keys.movedim(in_dims[0], 0)
    x, y = torch.ops.funcattn.words(rows.flatten(0, 1).contiguous(), first, n)
    return (x.unflatten(0, rows.shape[:2]), y.unflatten(0, rows.shape[:2])), (0, 0)


def drawn(key: Tensor, shape: tuple[int, ...], made: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """made(*words) of the two int32 words of each element: encrypted counters in this shape.

    The cipher makes a hundred passes over its words. On the CPU a draw larger than a chunk is
    computed chunk by chunk.

    Args:
        made: an elementwise function.

    Law: the parts have the bits of the whole
        (test_threefry.py::test_a_large_draw_is_that_of_its_parts).
    """
    n = math.prod(shape)
    if n <= PART or key.device.type != "cpu" or not errors.is_plain(key):
        return made(*(word.reshape(shape) for word in words(key, 0, n, encipher)))
    whole, part = None, PART * torch.get_num_threads()
    cipher = encipher_in_memory if part == PART else encipher
    for begin in range(0, n, part):
        some = made(*words(key, begin, min(part, n - begin), cipher))
        if whole is None:
            whole = some.new_empty(n)
        whole[begin : begin + part] = some
    assert whole is not None
    return whole.reshape(shape)
