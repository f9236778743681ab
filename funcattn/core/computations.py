"""Functions of tensors to tuples of tensors, and their vjp, jvp and vmap as functions of the same
form.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .autograd import in_forward_mode, is_differentiable

X = TypeVar("X")
Flat = Callable[..., tuple[Tensor, ...]]  # a function of tensors to a tuple of tensors


class Computation(Protocol):
    """A function of tensors to a tuple of tensors, whose derivatives are Computations too.

    Inputs and outputs are referred to by index.
    """

    def __call__(self, *x: Tensor) -> tuple[Tensor, ...]: ...

    def vjp(self, inputs: int, needed: Sequence[int], given: Sequence[int]) -> "Computation":
        """(inputs, cotangents of the outputs `given`) -> gradients of the inputs `needed`."""
        ...

    def jvp(self, inputs: int, moved: Sequence[int]) -> "Computation":
        """(inputs, tangents of the inputs `moved`) -> tangents of the floating outputs."""
        ...

    def vmap(self, mapped: Sequence[bool], randomness: str) -> "Computation":
        """The computation mapped over axis 0 of the inputs that are `mapped` and of all outputs."""
        ...


class Whole(NamedTuple):
    """The computation that calls a flat function once."""

    f: Flat

    def __call__(self, *x: Tensor) -> tuple[Tensor, ...]:
        return self.f(*x)

    def vjp(self, inputs: int, needed: Sequence[int], given: Sequence[int]) -> "Whole":
        """See Computation."""
        return Whole(pullback(self.f, inputs, needed, given))

    def jvp(self, inputs: int, moved: Sequence[int]) -> "Whole":
        """See Computation."""
        return Whole(pushforward(self.f, inputs, moved))

    def vmap(self, mapped: Sequence[bool], randomness: str) -> "Whole":
        """See Computation."""
        return Whole(batched(self.f, mapped, randomness))


def pullback(f: Flat, inputs: int, needed: Sequence[int], given: Sequence[int]) -> Flat:
    """The vjp of f: (inputs, cotangents of the outputs `given`) -> gradients of `needed` inputs."""

    def pulled(*flat: Tensor) -> tuple[Tensor, ...]:
        x, cotangents = flat[:inputs], flat[inputs:]

        def outputs(*moving: Tensor) -> tuple[Tensor, ...]:
            out = f(*exchange(x, needed, moving))
            return tuple(out[n] for n in given)

        # With grad mode off, as in the forward of a Function, backward rules may use kernels
        # without forward-mode derivatives.
        recorded = torch.is_grad_enabled() or in_forward_mode(flat)
        return torch.func.vjp(outputs, *[x[n] for n in needed])[1](
            cotangents, create_graph=recorded
        )

    return pulled


def pushforward(f: Flat, inputs: int, moved: Sequence[int]) -> Flat:
    """The jvp of f: (inputs, tangents of inputs `moved`) -> tangents of the floating outputs."""

    def pushed(*flat: Tensor) -> tuple[Tensor, ...]:
        x, tangents = flat[:inputs], flat[inputs:]
        outputs = lambda *moving: tuple(
            out for out in f(*exchange(x, moved, moving)) if is_differentiable(out)
        )
        return torch.func.jvp(outputs, tuple(x[n] for n in moved), tangents)[1]

    return pushed


def batched(f: Flat, mapped: Sequence[bool], randomness: str) -> Flat:
    """f mapped over axis 0 of the inputs that are `mapped`."""
    return torch.func.vmap(
        f, in_dims=tuple(0 if m else None for m in mapped), randomness=randomness
    )


def exchange(whole: Sequence[X], places: Sequence[int], new: Sequence[X]) -> list[X]:
    """The list with other values at some places."""
    out = list(whole)
    for n, value in zip(places, new, strict=True):
        out[n] = value
    return out
