"""Short causal convolutions, each feature by itself, whose state is the last inputs.

    y_t = bias + sum_j weight_j x_(t - W + 1 + j)        j = 0, ..., W - 1, for each feature

Source: Fu et al., Hungry hungry hippos, arXiv:2212.14052 (shift state space); Gu and Dao, Mamba,
arXiv:2312.00752, figure 3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..records import ABSENT, is_absent, record
from .products import Weight
from .recurrence import join_steps, rows_from, state_after


@record
class ConvolutionState(NamedTuple):
    """The last inputs of a convolution of width W: (*lead, W - 1, C); zeros before a text."""

    inputs: Tensor


@record
class ConvolutionSteps(NamedTuple):
    """The inputs (*lead, T, C) of new tokens, and the state before them."""

    inputs: Tensor
    before: ConvolutionState


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Weight = ABSENT,
    state: ConvolutionState | tuple[()] = ABSENT,
) -> tuple[Tensor, ConvolutionSteps]:
    """A causal convolution of each feature, as W products.

    Args:
        x: floating (*lead, T, C).
        weight: (C, W), its last column for the newest token.
        bias: (C,), or () for none.
        state: of the tokens before; () is none, zeros.

    Returns:
        y (*lead, T, C), and the steps for `state_after`.

    Example:
        >>> x, weight = torch.arange(4.0).unsqueeze(-1), torch.tensor([[1.0, 10.0]])
        >>> convolve(x, weight)[0].squeeze(-1)
        tensor([ 0., 10., 21., 32.])

    Law: read in parts it is the whole; a rejected token changes no state
        (test_short_convolution.py).
    """
    T, W = x.shape[-2], weight.shape[-1]
    if is_absent(state):
        state = ConvolutionState(x.new_zeros(*x.shape[:-2], W - 1, x.shape[-1]))
    rows = torch.cat([state.inputs.to(x.dtype), x], -2)
    columns = weight.unbind(-1)
    y = rows[..., :T, :] * columns[0]
    for j in range(1, W):
        y = y + rows[..., j : j + T, :] * columns[j]
    return y if is_absent(bias) else y + bias, ConvolutionSteps(x, state)


@state_after.register
def _(steps: ConvolutionSteps, n: int | Tensor) -> ConvolutionState:
    before = steps.before.inputs
    rows = torch.cat([before, steps.inputs.to(before.dtype)], -2)
    return ConvolutionState(rows_from(rows, n, before.shape[-2]))


@join_steps.register
def _(first: ConvolutionSteps, more: Sequence[ConvolutionSteps]) -> ConvolutionSteps:
    return first._replace(inputs=torch.cat([first.inputs, *(steps.inputs for steps in more)], -2))
