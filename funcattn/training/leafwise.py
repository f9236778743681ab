"""Elementwise arithmetic of updates, in eager and compiled code."""

from collections.abc import Callable

import optree
import torch
from torch import Tensor

from .. import tree
from ..core import errors
from ..tree import Tree


def scalar(x: Tensor) -> Tensor:
    """The same scalar, computed once by a compiled kernel instead of for every element.

    Inductor inlines the powers of a bias correction into each loop over weights: 5 ms of a step of
    800,000 weights. A reduction is computed once, unless it is so small that it is unrolled.
    """
    return x.expand(16).amax() if torch.compiler.is_compiling() else x


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a scalar tensor, in the dtype of x.

    A scalar that vmap maps has an axis, and would promote the product to its dtype.
    """
    return x * factor.to(x.dtype)


def zero_count(params: Tree) -> Tensor:
    """A count of updates, int64 (), on the device of params."""
    leaves = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)


def unzip(n: int, f: Callable[..., tuple[Tensor, ...]], *trees: Tree) -> list[Tree]:
    """n trees of one structure, from f at every leaf, which returns n tensors."""
    *columns, build = columns_of(*trees)
    results = [f(*row) for row in zip(*columns, strict=True)]
    return [build([row[i] for row in results]) for i in range(n)]


def columns_of(*trees: Tree) -> list[Tree]:
    """The leaves of each tree, and the function that rebuilds a tree from leaves."""
    columns, structures = zip(*map(optree.tree_flatten, trees), strict=True)
    if any(structure != structures[0] for structure in structures):
        errors.fail(
            "update",
            "gradients, state and params",
            "trees of one structure",
            "two",
            "Give the state of these params.",
        )
    return [*columns, lambda leaves: optree.tree_unflatten(structures[0], leaves)]


def check_share(function: str, argument: str, x: float) -> None:
    """Fail where x is not in [0, 1)."""
    if not isinstance(x, int | float) or not 0 <= x < 1:
        errors.fail(function, argument, "in [0, 1)", x, "It is the share of the past that is kept.")


def check_positive(function: str, argument: str, x: float) -> None:
    """Fail where x is not a finite number, 0 or more."""
    if not isinstance(x, int | float) or not 0 <= x < float("inf"):
        errors.fail(function, argument, "a number, 0 or more", x, "Choose such a one.")
