"""Learning-rate schedules: functions of the number of updates made so far.

A schedule maps an int64 tensor () to a float64 tensor (). It is pure, so it compiles once for all
steps, and depends on the step alone. `Rate` is a number, a tensor, or such a function.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door

Schedule: TypeAlias = Callable[[Tensor], Tensor]
Rate: TypeAlias = float | Tensor | Schedule


@door
def constant(peak: float) -> Schedule:
    """The same rate at every step.

    Example:
        >>> constant(0.1)(torch.tensor(5))
        tensor(0.1000, dtype=torch.float64)
    """
    _rate("constant", "peak", peak)
    return lambda step: torch.full_like(step, peak, dtype=torch.float64)


@door
def cosine(peak: float, steps: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """A linear warm-up to the peak, half a cosine down to the floor at `steps`, then the floor.

        rate(i) = peak (i + 1) / (warmup + 1)                        for i < warmup, then
        rate(i) = floor + (peak - floor) (1 + cos(pi x)) / 2
        x = (i - warmup) / (steps - warmup)

    Example:
        >>> [round(float(cosine(1.0, 10, warmup=2)(torch.tensor(i))), 3) for i in (0, 1, 2, 6, 10,
        ...     20)]
        [0.333, 0.667, 1.0, 0.5, 0.0, 0.0]

    Source: Loshchilov and Hutter, SGDR: stochastic gradient descent with restarts,
        arXiv:1608.03983; the warm-up is nanoGPT's.
    """
    _lengths("cosine", steps, warmup)
    _rate("cosine", "peak", peak)
    _rate("cosine", "floor", floor)

    def rate(step: Tensor) -> Tensor:
        i = step.double()
        share = ((i - warmup) / max(1, steps - warmup)).clamp(0, 1)
        return torch.where(
            i < warmup,
            peak * (i + 1) / (warmup + 1),
            floor + (peak - floor) * (1 + (math.pi * share).cos()) / 2,
        )

    return rate


@door
def wsd(peak: float, steps: int, *, warmup: int = 0, decay: int, floor: float = 0.0) -> Schedule:
    """Warmup-stable-decay: a linear warm-up, the peak, and a line to the floor in `decay` steps.

    Example:
        >>> [round(float(wsd(1.0, 10, warmup=1, decay=4)(torch.tensor(i))), 3) for i in (0, 1, 6, 8,
        ...     10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]

    Source: Hu et al., MiniCPM, arXiv:2404.06395, section 4.
    """
    _lengths("wsd", steps, warmup)
    if not isinstance(decay, int) or not 1 <= decay <= steps - warmup:
        wanted = f"in 1..{steps - warmup}, the steps behind the warm-up"
        errors.fail("wsd", "decay", wanted, decay, "Warm-up and decay are parts of steps.")
    _rate("wsd", "peak", peak)
    _rate("wsd", "floor", floor)

    def rate(step: Tensor) -> Tensor:
        i = step.double()
        left = ((steps - i) / decay).clamp(0, 1)
        return torch.where(i < warmup, peak * (i + 1) / (warmup + 1), floor + (peak - floor) * left)

    return rate


def at(rate: Rate, step: Tensor) -> Tensor:
    """The rate at a step (int64 ()), as a tensor (); float64 unless it is a tensor already."""
    if isinstance(rate, Tensor):
        return rate
    return rate(step) if callable(rate) else torch.full_like(step, rate, dtype=torch.float64)


def check_rate(function: str, rate: Rate) -> None:
    """Fail where a learning rate is not a number, tensor or function."""
    if isinstance(rate, Tensor):
        if rate.dim() or not rate.is_floating_point():
            got = f"{rate.dtype} {errors.shape(rate)}"
            errors.fail(
                function,
                "learning_rate",
                "a floating tensor ()",
                got,
                "Map over several with vmap.",
            )
    elif not callable(rate) or hasattr(
        rate, "update"
    ):  # an Optimizer can be called, to say that it should not be
        _rate(function, "learning_rate", rate)


def _rate(function: str, argument: str, rate: object) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        errors.fail(
            function, argument, "a number, 0 or more", rate, "Signs are the optimizer's matter."
        )


def _lengths(function: str, steps: int, warmup: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        errors.fail(function, "steps", "1 or more", steps, "It is the number of updates.")
    if not isinstance(warmup, int) or not 0 <= warmup <= steps:
        errors.fail(
            function, "warmup", f"in 0..{steps} = steps", warmup, "The warm-up is a part of steps."
        )
