"""What the benchmarks on a GPU share: they refuse where there is none, and time by the device's own
clock.
"""

from collections.abc import Callable
from typing import Any

import torch


def require(name: str) -> str:
    """The device's name; where there is none, one clear line and an end."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{name}: torch sees no CUDA device; this asks a question about one")
    return torch.cuda.get_device_name()


def milliseconds(call: Callable[[], Any], *, least: float = 50.0) -> float:
    """Median over five runs of the time of one call, each run of as many calls as take `least`
    milliseconds.
    """
    call()
    torch.cuda.synchronize()
    number = 1
    while (spent := _run(call, number)) < least and number < 2**16:
        number = max(number + 1, min(8 * number, int(number * least / max(spent, 1e-3)) + 1))
    return sorted(_run(call, number) / number for _ in range(5))[2]


def _run(call: Callable[[], Any], number: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(number):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that one call holds beyond what was held before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_ceiling() -> float:
    """TFLOP/s of a square bfloat16 product, 8192 wide: what the tensor cores give here."""
    a, b = (torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def read_ceiling() -> float:
    """GB/s that a product of a 4 GB bfloat16 matrix and a vector reads."""
    a = torch.ones(2**16, 2**15, dtype=torch.bfloat16, device="cuda")
    x = torch.ones(2**15, dtype=torch.bfloat16, device="cuda")
    return a.nbytes / milliseconds(lambda: torch.mv(a, x)) / 1e6
