"""Tensors in huge pages: what a processor reads once for each token, and finds with few lookups.

An address is translated by pages, of 4 KiB each unless a program asks for 2 MiB, and a processor
remembers a few thousand translations. A step of decoding reads a hundred megabytes: with small
pages it waits for a translation at every other kilobyte or so, and those of all other memory are
forgotten on the way.
"""

import contextlib
import math
import mmap
import sys
import threading

import torch
from torch import Tensor

from . import errors

PAGE = 2 << 20
SLAB = 4 * PAGE  # tensors that are smaller share one
LEAST = 1 << 15  # bytes of a tensor that is worth it
LINE = 64

IS_SERVED = sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")


class _Slab:
    """Fresh memory, filled from its first huge page on; it is freed with the last tensor in it."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages: then these are small
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.used = -torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr() % PAGE
        self.end = self.used + size


_open: _Slab | None = None
_lock = threading.Lock()


def placed(x: Tensor) -> Tensor:
    """x, contiguous, as a tensor of its own in huge pages; `x.contiguous()` where there are none.

    Law: the same values, and one of the tensors of a slab may be freed before the others
        (test_huge_pages.py).
    """
    size = x.numel() * x.element_size()
    if not IS_SERVED or size < LEAST or x.device.type != "cpu":
        return x.contiguous()
    slab, at = _taken(-(-size // LINE) * LINE)
    y = torch.frombuffer(slab.memory, dtype=x.dtype, count=x.numel(), offset=at).view(x.shape)
    return y.copy_(x)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """`like.new_zeros(shape)`, where it is large in huge pages, each zeroed at its first use."""
    size = math.prod(shape) * like.element_size()
    if not IS_SERVED or size < SLAB or like.device.type != "cpu" or not errors.is_plain(like):
        return like.new_zeros(shape)
    slab = _Slab(-(-size // PAGE) * PAGE)
    return torch.frombuffer(
        slab.memory, dtype=like.dtype, count=math.prod(shape), offset=slab.used
    ).view(shape)


def _taken(size: int) -> tuple[_Slab, int]:
    """A slab and the offset of `size` bytes in it, which are the caller's."""
    global _open
    with _lock:
        if _open is None or _open.used + size > _open.end:
            slab = _Slab(max(SLAB, -(-size // PAGE) * PAGE))
            if size < SLAB:
                _open = slab
        else:
            slab = _open
        at, slab.used = slab.used, slab.used + size
        return slab, at
