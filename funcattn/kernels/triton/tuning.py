"""Sizes of blocks: a few candidates for each kernel, timed once where that pays, and remembered for the process.

The first candidate is taken where a problem is small, under the interpreter, and while a CUDA graph is recorded. A candidate that
does not fit into a multiprocessor's shared memory is skipped.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .addresses import width
from .language import INTERPRETED, OutOfResources
from .programs import Program

MOST = 576  # features of float32 that a program reads; with more, a thread spills thousands of bytes, and torch's blocks serve
PAYS = 2**22  # pairs of a query and a key beyond which candidates are timed
REPEATS = 5  # of a timed launch
_best: dict[Hashable, int] = {}
_fits: dict[Hashable, int] = {}


class Blocks(NamedTuple):
    """Rows that a program owns, rows of the other side it takes at a time, warps that work on it, and loads in flight."""

    own: int
    other: int
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, Any]:
        """What Triton's launcher takes."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


SMALLEST = Blocks(16, 16)

# (own, other, warps, stages), best guess first, by features of two bytes that a program works on at once. Compiled for an H100, the
# first of each spills nothing or little from registers and fits its shared memory; which is fastest is for a timing to say.
ATTEND = {
    64: (Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2)),
    128: (Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3), Blocks(128, 128, 8, 2), Blocks(64, 32, 4, 2)),
    256: (Blocks(64, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    512: (Blocks(32, 16, 8, 1),),
}
PUSH = {  # wider heads leave a thread too few registers: kilobytes are spilled
    64: (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    128: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 3), Blocks(64, 32, 4, 2)),
}
PUSH_FLOAT32 = {
    64: (Blocks(32, 16, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 32, 4, 2)),
}
ATTEND_FLOAT32 = {
    64: (Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2)),
    128: (Blocks(32, 32, 8, 1), Blocks(64, 32, 8, 1), Blocks(32, 16, 4, 1)),
    256: (Blocks(32, 16, 8, 1),),
}
SWEEP = {
    320: (Blocks(64, 64, 4, 2), Blocks(128, 64, 8, 2), Blocks(128, 32, 4, 2), Blocks(64, 32, 4, 2)),
    384: (Blocks(64, 32, 4, 2), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(32, 32, 4, 1)),
    448: (Blocks(64, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    512: (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    640: (Blocks(64, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    768: (Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 4, 1)),
    1024: (Blocks(32, 64, 8, 2), Blocks(64, 32, 8, 1), Blocks(32, 32, 4, 1)),
    2**31: (Blocks(32, 32, 8, 1), Blocks(32, 16, 4, 1)),
}


def of_attend(q: Tensor, v: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the kernel of attend, the smallest last."""
    wide = max(width(q.shape[-1]), width(v.shape[-1]))
    table = ATTEND_FLOAT32 if q.dtype == torch.float32 else ATTEND
    return _candidates(table, wide)


def of_push(q: Tensor, v: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the kernel of attend and its tangent, the smallest last; none where two passes are better."""
    wide, table = max(width(q.shape[-1]), width(v.shape[-1])), PUSH_FLOAT32 if q.dtype == torch.float32 else PUSH
    return _candidates(table, wide) if wide <= max(table) else ()


def of_sweep(program: Program) -> tuple[Blocks, ...]:
    """Candidates for the kernel of a sweep, the smallest last."""
    return _candidates(SWEEP, load(program))


def load(program: Program) -> int:
    """Features of two bytes that a program reads and sums in one block; those of float32 are three products, and count fourfold."""
    read = [width(x.features) * (4 if x.dtype == "float32" else 1) for x in program.operands if x.features > 1]
    return sum(read) + sum(width(n) for n in program.features if n > 1)


def _candidates(table: dict[int, tuple[Blocks, ...]], size: int) -> tuple[Blocks, ...]:
    if INTERPRETED:
        return (SMALLEST,)
    return (*next((blocks for most, blocks in table.items() if size <= most), ()), SMALLEST)


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
    for n in range(_best.get(key, _fits.get(kind, 0)), len(candidates)):
        try:
            launch(candidates[n])
        except OutOfResources:
            if n == len(candidates) - 1:
                raise
            _fits[kind] = n + 1
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
