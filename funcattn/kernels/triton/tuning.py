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


def of_attend(q: Tensor, v: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the kernel of attend."""
    wide = max(width(q.shape[-1]), width(v.shape[-1])) * q.element_size() // 2  # in features of two bytes
    if INTERPRETED:
        return (SMALLEST,)
    if wide <= 64:
        return Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2), SMALLEST
    if wide <= 128:
        return Blocks(128, 64, 8, 3), Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 2), SMALLEST
    if wide <= 256:
        return Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), SMALLEST
    return Blocks(64, 32, 8, 1), Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1), SMALLEST


def of_sweep(program: Program) -> tuple[Blocks, ...]:
    """Candidates for the kernel of a sweep: the more it holds of a row, the fewer rows."""
    if INTERPRETED:
        return (SMALLEST,)
    size = {"float32": 2}
    held = sum(width(x.features) * size.get(x.dtype, 1) for x in program.operands if x.features > 1)
    summed = sum(width(n) for n in program.features if n > 1)
    if "float32" in {x.dtype for x in program.operands if x.features > 1}:
        held *= 2  # three products each, of halves that are held too
    if held <= 320 and summed <= 128:
        return Blocks(64, 64, 4, 2), Blocks(128, 64, 8, 2), Blocks(128, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), SMALLEST
    if held <= 640 and summed <= 256:
        return Blocks(64, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1), SMALLEST
    if held <= 1280:
        return Blocks(64, 32, 8, 1), Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1), SMALLEST
    return Blocks(32, 32, 8, 1), Blocks(32, 16, 4, 1), SMALLEST


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
