"""The block sizes of a kernel: candidates, timed once if the problem is large, cached per process.

The first candidate is used for small problems, in the interpreter, and during CUDA graph capture. A
candidate that does not fit into shared memory is skipped.
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

# float32 features read per program; beyond, a thread spills kilobytes, and torch_blocks runs
MOST = 576
PAYS = 2**22  # pairs of query and key from which candidates are timed
REPEATS = 5  # of a timed launch
_best: dict[Hashable, int] = {}
_fits: dict[Hashable, int] = {}


def of_attend(q: Tensor, v: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the attention kernel, the smallest last."""
    return _candidates(
        block_sizes.of(block_sizes.ATTENDS, q.dtype == torch.float32, by_groups(q), _wider(q, v))
    )


def of_attend_jvp(q: Tensor, v: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the kernel of value and tangent, smallest last; () if two passes win."""
    exact = q.dtype == torch.float32 and not INTERPRETED
    found = block_sizes.of(block_sizes.ATTEND_JVPS, exact, by_groups(q), _wider(q, v))
    return _candidates(found) if found else ()


def of_contract(program: Program, q: Tensor) -> tuple[Blocks, ...]:
    """Candidates for the kernel of a contraction, the smallest last."""
    exact = any(x.dtype == "float32" for x in program.operands if x.features > 1)
    return _candidates(block_sizes.of(block_sizes.CONTRACTS, exact, by_groups(q), load(program)))


def by_groups(x: Tensor) -> bool:
    """True where the GPU of a tensor multiplies by warp groups."""
    return (
        x.is_cuda
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def _wider(q: Tensor, v: Tensor) -> int:
    return max(width(q.shape[-1]), width(v.shape[-1]))


def load(program: Program) -> int:
    """16-bit features that a program reads and sums per block; float32 counts four (3 products)."""
    read = [
        width(x.features) * (4 if x.dtype == "float32" else 1)
        for x in program.operands
        if x.features > 1
    ]
    return sum(read) + sum(width(n) for n in program.features if n > 1)


def _candidates(blocks: tuple[Blocks, ...]) -> tuple[Blocks, ...]:
    return (SMALLEST,) if INTERPRETED else (*blocks, SMALLEST)


def run(
    launch: Callable[[Blocks], None],
    candidates: Sequence[Blocks],
    kind: Hashable,
    pairs: int,
    x: Tensor,
) -> None:
    """Launch with the best candidate for this kind of problem, timing the candidates if worthwhile.

    Args:
        launch: launches the kernel; repeated launches give the same result.
        candidates: block sizes, the smallest last.
        kind: what the best candidate depends on, besides the number of pairs.
        pairs: number of pairs of query and key.
        x: a tensor on the device.
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
    return (
        x.is_cuda
        and os.environ.get("FUNCATTN_TUNE", "1") != "0"
        and not torch.cuda.is_current_stream_capturing()
    )


def _fastest(launch: Callable[[Blocks], None], candidates: Sequence[Blocks]) -> int:
    times = []
    for blocks in candidates:
        try:
            launch(blocks)  # compiles the kernel
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
