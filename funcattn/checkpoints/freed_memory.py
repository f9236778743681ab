"""Freed memory goes back to the system while a model is loaded.

The C library serves blocks of up to 32 MB from one heap, and keeps what is freed below anything
that lives longer. Converting codes frees more than it keeps, and glibc before 2.38 often does not
find a freed block of the same size again (its bug 14581): without this, half of a 4-bit model is
resident once more at the end.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL = 2**25  # bytes read between two returns: 32 a GB, of some ms each


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """malloc_trim of glibc; None where the C library has no such function."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back() -> None:
    """Return the memory of freed blocks to the system, where the C library can."""
    if trim := _trim():
        trim(0)


@dataclass
class Reading:
    """Counts bytes that are read into buffers, and gives freed ones back at intervals."""

    since: int = 0

    def count(self, size: int, file: mmap.mmap | None = None) -> None:
        """Note `size` bytes more, of a mapped file or of none: what is resident of it is dropped.

        Law: loading needs little more than what it keeps
            (test_freed_memory.py::test_loading_stays_near_the_size_of_the_file).
        """
        if self.since >= INTERVAL:
            give_back()
            if file is not None and hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)
            self.since = 0
        self.since += size
