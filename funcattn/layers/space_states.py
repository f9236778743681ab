"""The state of a layer of Mamba-2 as a value: that of its convolution, and its memory.

The steps of T tokens hold what the scan has read, so the memory after the first n of them is one
more scan with a mask; or none, where n is 0 or T.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.dtypes import accurate
from ..records import ABSENT, record
from .recurrence import join_steps, memory_after, state_after
from .short_convolution import ConvolutionState, ConvolutionSteps
from .state_spaces import state_space


@record
class SpaceState(NamedTuple):
    """The state of the convolution, and the memory of each head (*lead, H, N, P).

    The memory is in float32 at least, zeros before a text.
    """

    convolution: ConvolutionState
    memory: Tensor


@record
class SpaceSteps(NamedTuple):
    """What T new tokens write: steps of the convolution, and what the scan has read.

    x (*lead, H, T, P), dt (*lead, H, T), A (H,), B (*lead, K, T, N).
    before, memory: (*lead, H, N, P), before the first token and after the last.
    """

    convolution: ConvolutionSteps
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    before: Tensor
    memory: Tensor


def space_net(
    convolution: ConvolutionSteps,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: SpaceState | tuple[()] = ABSENT,
) -> tuple[Tensor, SpaceSteps]:
    """`state_space` behind a state.

    Args:
        convolution: the steps of the convolution that made x, B and C.
        x, dt, A, B, C, D: as for `state_space`.
        state: of the tokens before; () is none.

    Returns:
        out (*lead, H, T, P), and the steps for `state_after`.

    Law: read in parts it is the whole; a rejected token changes no state
        (test_recurrent.py::test_steps_equal_the_whole_whatever_was_rejected).
    """
    if isinstance(state, SpaceState):
        before = state.memory
    else:
        before = accurate(x, B).new_zeros(*x.shape[:-2], B.shape[-1], x.shape[-1])
    out, memory = state_space(x, dt, A, B, C, D, before)
    return out, SpaceSteps(convolution, x, dt, A, B, before, memory)


@state_after.register
def _(steps: SpaceSteps, n: int | Tensor) -> SpaceState:
    def scan(mask: Tensor) -> Tensor:
        given = steps.x, steps.dt, steps.A, steps.B, steps.B
        return state_space(*given, state=steps.before, mask=mask).state

    memory = memory_after(n, steps.x.shape[-2], steps.before, steps.memory, scan)
    return SpaceState(state_after(steps.convolution, n), memory)


@join_steps.register
def _(first: SpaceSteps, more: Sequence[SpaceSteps]) -> SpaceSteps:
    each = (first, *more)
    cat = lambda name, axis=-2: torch.cat([getattr(steps, name) for steps in each], axis)
    convolution = join_steps(first.convolution, [steps.convolution for steps in more])
    x, dt, B = cat("x"), cat("dt", -1), cat("B")
    return SpaceSteps(convolution, x, dt, first.A, B, first.before, each[-1].memory)
