"""How fast a machine reads memory: the fastest of a few plain passes over as many bytes.

A matrix-vector product of a BLAS is no limit: on some processors it reads at six tenths of what a
sum does, and a decoder would seem to be faster than memory. The bytes lie in huge pages where there
are any, as those of compiled models do: with small ones a sum waits for addresses.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core import huge_pages

WIDTH = 8192


def reads(count: int) -> dict[str, Callable[[], Tensor]]:
    """Passes over one tensor of about `count` bytes, to be timed beside what is measured."""
    rows = huge_pages.zeros(torch.empty(0), max(1, count // (4 * WIDTH)), WIDTH).fill_(1.0)
    x = torch.ones(WIDTH)
    return {
        "reading: sum": lambda: rows.sum(),
        "reading: maximum": lambda: rows.amax(),
        "reading: matrix times vector": lambda: torch.mv(rows, x),
    }


def bandwidth(count: int, seconds: Mapping[str, float]) -> float:
    """Bytes per second of the fastest of `reads(count)`, from the seconds of each by name."""
    held = max(1, count // (4 * WIDTH)) * 4 * WIDTH
    return held / min(took for name, took in seconds.items() if name.startswith("reading: "))
