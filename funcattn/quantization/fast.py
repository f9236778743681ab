"""Fast kernels with exact derivatives.

Several of torch's integer kernels have no derivatives, and silently give zeros under grad and jvp.
Here a product has a plain form, with exact derivatives of every order, and a fast one for values:

    value: fast(x)          vjp, jvp: those of plain          vmap over x: fast, with more rows

Outside of autograd and torch.func the fast form is called directly.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.autograd import is_jit_traced, is_recorded
from ..core.computations import Flat, Whole, batched, pullback, pushforward
from ..layers import Weight
from ..rematerialization import Remat

MAX_FAST_ROWS = 16  # rows up to which torch's kernels are faster than expanding the matrix once


class FastForward(NamedTuple):
    """A product of (*fields, x) with the value of `fast` and the derivatives of `plain`.

    A core.computations.Computation.
    """

    plain: Flat
    fast: Flat

    def __call__(self, *x: Tensor) -> tuple[Tensor, ...]:
        return self.fast(*x)

    def vjp(self, inputs: int, needed: Sequence[int], given: Sequence[int]) -> Whole:
        """See core.computations.Computation."""
        return Whole(pullback(self.plain, inputs, needed, given))

    def jvp(self, inputs: int, moved: Sequence[int]) -> Whole:
        """See core.computations.Computation."""
        return Whole(pushforward(self.plain, inputs, moved))

    def vmap(self, mapped: Sequence[bool], randomness: str) -> "FastForward":
        """See core.computations.Computation: where only x is mapped, the product has more rows."""
        if any(mapped[:-1]):
            return FastForward(*[batched(self.plain, mapped, randomness)] * 2)
        return FastForward(batched(self.plain, mapped, randomness), self.fast)


def routed(
    plain: Callable[..., Tensor], fast: Callable[..., Tensor | None], weight: Weight, x: Tensor
) -> Tensor:
    """plain(*weight, x), computed by fast(*weight, rows) where the kernel supports it.

    Args:
        plain: the exact product, of any x (*lead, K).
        fast: the product of floating x (rows, K); None where the kernel does not support it.
        weight: a record of tensors.
        x: (*lead, K).
    """
    if x.shape[-1:] != weight.shape[-1:]:  # tiles are padded: they would take some other widths
        return plain(*weight, x)  # which raises
    if torch.compiler.is_compiling() or is_jit_traced():
        return plain(*weight, x)
    if not is_recorded(*weight, x):
        return _value(plain, fast, weight, x)
    flat = lambda *inputs: (plain(*inputs),)
    return Remat.apply(
        FastForward(flat, lambda *inputs: (_value(plain, fast, inputs[:-1], inputs[-1]),)),
        None,
        *weight,
        x,
    )[0]


def _value(
    plain: Callable[..., Tensor],
    fast: Callable[..., Tensor | None],
    weight: Sequence[Tensor],
    x: Tensor,
) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = fast(*weight, rows) if len(rows) and x.is_floating_point() else None
    if out is None:
        return plain(*weight, x)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[-1])
