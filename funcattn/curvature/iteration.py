"""Iterations of a state that show progress and can be stopped; and the operators they apply."""

import warnings
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from ..core import errors
from ..progress import track
from ..records import Tree
from ..tree.vectors import vector_leaves, vector_pairs

Vector: TypeAlias = Tree | Tensor  # a tree of floating tensors, or one of them
Matvec: TypeAlias = Callable[[Tree], Tree]  # the product of a matrix with a vector

S = TypeVar("S")


def advance(
    step: Callable[[S], S], state: S, count: int, what: str, finished: Callable[[S], bool]
) -> S:
    """Apply a step up to `count` times, while the state is not finished.

    A KeyboardInterrupt after the first step ends the loop with the state of the last whole step,
    and warns.

    Args:
        step: a pure function of the state.
        what: the word of the progress bar.
    """
    taken = 0
    try:
        for _ in track(range(count), what):
            if finished(state):
                break
            state = step(state)
            taken += 1
    except KeyboardInterrupt:
        if not taken:
            raise
        warnings.warn(
            f"{what}: interrupted after {taken} of {count} steps; the result holds them. Pass it "
            "as state= to continue.",
            stacklevel=4,  # at the call of the public function, above its door
        )
    return state


def applied(function: str, matvec: Matvec, vector: Tree, argument: str = "matvec") -> Tree:
    """The product of an operator with a vector, checked to be a vector of the same space."""
    product = matvec(vector)
    vector_pairs(function, ("its vector", f"the result of {argument}"), vector, product)
    return product


def check_vector(function: str, argument: str, vector: Tree) -> None:
    """Fail where a tree is no vector, or is one without elements."""
    if not sum(x.numel() for x in vector_leaves(function, argument, vector)):
        remedy = "Give what is differentiated, such as params."
        errors.fail(function, argument, "a tree with elements", "none", remedy)


def check_count(function: str, argument: str, n: object, least: int) -> None:
    """Fail where a number of steps is no int, or below the least."""
    if not errors.is_count(n, least):
        errors.fail(function, argument, f"an int, {least} or more", repr(n), "It counts products.")


def check_finite(function: str, x: Tensor) -> None:
    """Fail where a scalar made of a product is infinite or NaN; pass where it is not concrete."""
    if concrete(x.isfinite()) == 0.0:
        remedy = "Look at the product with one vector."
        got = float(x.detach())
        errors.fail(function, "the result of matvec", "finite", got, remedy)


def concrete(x: Tensor) -> float | None:
    """The value of a scalar, or None where it is not concrete, as under vmap."""
    found = errors.value(x)
    return None if found is None else float(found)


def precision(vector: Tree) -> float:
    """The relative rounding of the coarsest dtype among the leaves of a vector."""
    return max(torch.finfo(x.dtype).eps for x in vector_leaves("precision", "vector", vector))
