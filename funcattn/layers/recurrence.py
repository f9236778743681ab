"""The state of a recurrent layer as a value: what a layer proposes, and the state it leads to.

A recurrent layer reads T new tokens behind a state and proposes steps: a record of the state that
they began with and of what makes the states after each token. So nothing is undone:

    out, steps = layer(x, state)          reads the state, writes nothing
    state = state_after(steps, n)         the state after the first n of the T tokens

The records of steps of a kind of layer register `state_after` and `join_steps`. A field `before` is
the state before the first token, a field `inputs` (*lead, T, C) has a row for each token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..core import errors

State: TypeAlias = Any  # a record of tensors, of a type of its own for each kind of layer
Steps: TypeAlias = Any  # a record of tensors, of a type of its own for each kind of layer


@functools.singledispatch
def state_after(steps: Steps, n: int | Tensor) -> State:
    """The state after the first n new tokens.

    Args:
        steps: what a recurrent layer proposed for T tokens.
        n: an int or an integer tensor () in 0..T.

    Law: after n of T tokens it is the state of a text of n tokens, whatever follows them
        (test_recurrence.py).
    """
    _unknown("state_after", steps)


@functools.singledispatch
def join_steps(first: Steps, more: Sequence[Steps]) -> Steps:
    """The steps of tokens that were read in several calls, each behind those before it."""
    _unknown("join_steps", first)


def rows_from(rows: Tensor, n: int | Tensor, count: int) -> Tensor:
    """`count` rows of (*lead, R, C), beginning with row n: an int, or an integer tensor ()."""
    if isinstance(n, int):
        return rows[..., n : n + count, :]
    return rows.index_select(-2, n + torch.arange(count, device=rows.device))


def memory_after(
    n: int | Tensor, T: int, before: Tensor, after: Tensor, scan: Callable[[Tensor], Tensor]
) -> Tensor:
    """The memory of a scan after the first n of T tokens.

    Args:
        n: an int or an integer tensor ().
        T: number of tokens.
        before, after: the memory before the first token, and after the last.
        scan: mask (T,) of the tokens that count -> the memory after those; called where n is
            neither 0 nor T, or is not known.
    """
    known = errors.peek(n) if isinstance(n, Tensor) else torch.tensor(n)
    for count, memory in ((T, after), (0, before)):
        if known is not None and bool((known == count).all()):
            return memory
    if T == 1 and isinstance(n, Tensor):
        return torch.where(n > 0, after, before)
    return scan(torch.arange(T, device=before.device) < n)


def _unknown(function: str, steps: Steps) -> NoReturn:
    remedy = f"Register layers.{function} for the steps of a layer of your own."
    errors.fail(
        function,
        "steps",
        "what a recurrent layer proposed",
        f"a {type(steps).__name__}",
        remedy,
        TypeError,
    )
