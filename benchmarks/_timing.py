"""How every benchmark here measures: the candidates take turns in one process, and what is told is
the ratio of medians.

A machine's clock drifts, and a neighbour wakes up. Candidates that take turns share such luck;
candidates measured one after the other do not. The CPU time beside the wall time tells a faster
program from one that merely uses more cores.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Median seconds of one call."""

    wall: float
    cpu: float


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, repeats: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """Time each candidate `repeats` times, in turns; print and return the medians.

    The first candidate is the measure: every ratio is its wall time over the other's, so above 1 is
    faster than it.

    Example:
        >>> timings = interleave({"a": lambda: sum(range(100)), "b": lambda: None}, repeats=3,
        ...     warmup=1)  # doctest: +ELLIPSIS
        candidate       wall        cpu   ratio
        a         ...
        b         ...
        3 rounds, medians, ... thread(s), ...
        >>> timings["a"].wall > 0
        True
    """
    seconds: dict[str, list[Timing]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, candidate in candidates.items():
            timing = _time(candidate)
            if turn >= warmup:
                seconds[name].append(timing)
    medians = {
        name: Timing(*map(median, zip(*timings, strict=True))) for name, timings in seconds.items()
    }
    report(medians, f"{repeats} rounds, medians")
    return medians


def report(timings: Mapping[str, Timing], remark: str) -> None:
    """Print a table of timings, and what it was measured with."""
    width = max(len("candidate"), *map(len, timings))
    measure = next(iter(timings.values())).wall
    print(f"{'candidate':<{width}} {'wall':>10} {'cpu':>10} {'ratio':>7}")
    for name, (wall, cpu) in timings.items():
        print(f"{name:<{width}} {wall * 1e3:>7.3f} ms {cpu * 1e3:>7.3f} ms {measure / wall:>7.2f}")
    print(f"{remark}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")


def _time(candidate: Callable[[], Any]) -> Timing:
    _finish()
    wall, cpu = time.perf_counter(), time.process_time()
    candidate()
    _finish()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a CUDA call returns before its work is done
