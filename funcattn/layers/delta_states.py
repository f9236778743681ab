"""The state of a gated delta net as a value: that of its convolution, and its memory.

The steps of T tokens hold what the scan has read, so the memory after the first n of them is one
more scan with a mask; or none, where n is 0 or T.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.dtypes import accurate
from ..records import ABSENT, record
from .delta_rule import gated_delta
from .recurrence import join_steps, memory_after, state_after
from .short_convolution import ConvolutionState, ConvolutionSteps


@record
class DeltaState(NamedTuple):
    """The state of the convolution, and the memory of each head (*lead, H, Dk, Dv).

    The memory is in float32 at least, zeros before a text.
    """

    convolution: ConvolutionState
    memory: Tensor


@record
class DeltaSteps(NamedTuple):
    """What T new tokens write: steps of the convolution, and what the scan has read.

    k (*lead, K, T, Dk), v (*lead, H, T, Dv), log_decay (*lead, H, T, 1 or Dk), beta (*lead, H, T).
    before, memory: (*lead, H, Dk, Dv), before the first token and after the last.
    """

    convolution: ConvolutionSteps
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    before: Tensor
    memory: Tensor


def delta_net(
    convolution: ConvolutionSteps,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: DeltaState | tuple[()] = ABSENT,
) -> tuple[Tensor, DeltaSteps]:
    """`gated_delta` behind a state, with q and k divided by their norms.

    Args:
        convolution: the steps of the convolution that made q, k and v.
        q, k, v, log_decay, beta: as for `gated_delta`.
        state: of the tokens before; () is none.

    Returns:
        out (*lead, H, T, Dv), and the steps for `state_after`.
    """
    if isinstance(state, DeltaState):
        before = state.memory
    else:
        before = accurate(v, k).new_zeros(*v.shape[:-2], k.shape[-1], v.shape[-1])
    out, memory = gated_delta(q, k, v, log_decay, beta, before, normalized=True)
    return out, DeltaSteps(convolution, k, v, log_decay, beta, before, memory)


@state_after.register
def _(steps: DeltaSteps, n: int | Tensor) -> DeltaState:
    return DeltaState(state_after(steps.convolution, n), _memory_after(steps, n))


def _memory_after(steps: DeltaSteps, n: int | Tensor) -> Tensor:
    def scan(mask: Tensor) -> Tensor:
        k = torch.where(mask.unsqueeze(-1), steps.k, 0)  # before it is divided by its norm
        given = k, k, steps.v, steps.log_decay, steps.beta, steps.before
        return gated_delta(*given, normalized=True, mask=mask).state

    return memory_after(n, steps.k.shape[-2], steps.before, steps.memory, scan)


@join_steps.register
def _(first: DeltaSteps, more: Sequence[DeltaSteps]) -> DeltaSteps:
    each = (first, *more)
    cat = lambda name, axis=-2: torch.cat([getattr(steps, name) for steps in each], axis)
    convolution = join_steps(first.convolution, [steps.convolution for steps in more])
    k, v, log_decay, beta = cat("k"), cat("v"), cat("log_decay"), cat("beta", -1)
    return DeltaSteps(convolution, k, v, log_decay, beta, first.before, each[-1].memory)
