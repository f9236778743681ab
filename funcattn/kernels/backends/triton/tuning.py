"""Which sizes of blocks a kernel gets: a few candidates, timed once where that pays, and remembered for the process.

The first candidate is taken where a problem is small, under the interpreter, and while a CUDA graph is recorded. A candidate that
does not fit into a multiprocessor's shared memory is skipped.
"""

import os
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from . import block_sizes
from .addresses import width
from .block_sizes import SMALLEST, Blocks
from .language import INTERPRETED, OutOfResources
from .programs import Program

MOST = 576  # features of float32 that a program reads; with more, a thread spills thousands of bytes, and torch's blocks serve
PAYS = 2**22  # pairs of a query and a key beyond which candidates are timed
REPEATS = 5  # of a timed launch
_best: dict[Hashable, int] = {}
_fits: dict[Hashable, int] = {}


def of_attend(q: Tensor, v: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the kernel of attend, the smallest last."""
    return _candidates(block_sizes.of(block_sizes.ATTENDS, q.dtype == torch.float32, by_groups(q), _wider(q, v)))


def of_push(q: Tensor, v: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the kernel of attend and its tangent, the smallest last; none where two passes are better."""
    exact = q.dtype == torch.float32 and not INTERPRETED
    found = block_sizes.of(block_sizes.PUSHES, exact, by_groups(q), _wider(q, v))
    return _candidates(found) if found else ()


def of_sweep(program: Program, q: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the kernel of a sweep, the smallest last."""
    exact = any(x.dtype == "float32" for x in program.operands if x.features > 1)
    return _candidates(block_sizes.of(block_sizes.SWEEPS, exact, by_groups(q), load(program)))


def by_groups(x: Tensor) -> bool:
    """True where the card of a tensor multiplies by warp groups."""
    return x.is_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability(x.device) >= (9, 0)


def _wider(q: Tensor, v: Tensor) -> int:
    return max(width(q.shape[-1]), width(v.shape[-1]))


def load(program: Program) -> int:
    """Features of two bytes that a program reads and sums in one block; those of float32 are three products, and count fourfold."""
    read = [width(x.features) * (4 if x.dtype == "float32" else 1) for x in program.operands if x.features > 1]
    return sum(read) + sum(width(n) for n in program.features if n > 1)


def _candidates(blocks: tuple[Blocks, ...]) -> tuple[Blocks, ...]:
    return (SMALLEST,) if INTERPRETED else (*blocks, SMALLEST)


def run(launch: Callable[[Blocks], None], candidates: Sequence[Blocks], kind: Hashable, pairs: int, x: Tensor) -> None:
    """Launch with the best candidate for this kind of problem, found where that was not done yet and pays.

    Args:
        launch: starts the kernel; twice is as good as once.
        kind: what the best one depends on, beside the number of pairs of a query and a key.
        x: a tensor on the device it runs on.
    """
    key = (kind, pairs.bit_length(), x.device)
    if key not in _best and len(candidates) > 1 and pairs >= PAYS and _may_time(x):
        _best[key] = _fastest(launch, candidates)
    for n in range(_best.get(key, _fits.get((kind, x.device), 0)), len(candidates)):
        try:
            launch(candidates[n])
        except OutOfResources:
            if n == len(candidates) - 1:
                raise
            _fits[kind, x.device] = n + 1
        else:
            return


def _may_time(x: Tensor) -> bool:
    return x.is_cuda and os.environ.get("FUNCATTN_TUNE", "1") != "0" and not torch.cuda.is_current_stream_capturing()


def _fastest(launch: Callable[[Blocks], None], candidates: Sequence[Blocks]) -> int:
    times = []
    for blocks in candidates:
        try:
            launch(blocks)  # compiled
        except OutOfResources:
            times.append(float("inf"))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPEATS):
            launch(blocks)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times.index(min(times))
