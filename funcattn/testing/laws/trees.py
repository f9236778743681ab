"""Laws of transforms of trees: law(transform, tree), for a transform of the tree alone.

`is_idempotent` is for transforms that are (cast, quantize, to); leave it out for others.
"""

from typing import Any

import torch
from torch import Tensor

from ... import tree
from ...tree import Transform, Tree
from ..agreement import agree, named


@named
def keeps_paths(transform: Transform, given: Tree) -> None:
    """Every path is kept, as a leaf or as a record with fields below it; and no path is added."""
    before, after = set(tree.paths(given)), tree.paths(transform(given))
    owner = {path: next((old for old in _prefixes(path) if old in before), None) for path in after}
    strange = sorted(path for path, old in owner.items() if old is None)
    lost = sorted(before - set(owner.values()))
    if strange or lost:
        raise AssertionError(
            f"keeps_paths: lost {lost[:3]} ({len(lost)} in all), and added "
            f"{strange[:3]} ({len(strange)} in all)."
        )


@named
def gives_a_tree_of_tensors(transform: Transform, given: Tree) -> None:
    """Every leaf is a tensor, and none is None: torch.func accepts the result."""
    kinds = lambda found: {
        path: type(leaf).__name__
        for path, leaf in tree.items(found)
        if not isinstance(leaf, Tensor)
    }
    found = transform(given)
    strange = {path: kind for path, kind in kinds(found).items() if kinds(given).get(path) != kind}
    if strange or _has_none(found):
        raise AssertionError(
            f"gives_a_tree_of_tensors: {'there is a None' if _has_none(found) else strange}. Hold "
            "() for what is absent."
        )


@named
def leaves_its_argument_as_it_was(transform: Transform, given: Tree) -> None:
    """The argument keeps its leaves, paths and values."""
    before = tree.items(given)
    values = [leaf.clone() if isinstance(leaf, Tensor) else leaf for _, leaf in before]
    transform(given)
    now = tree.items(given)
    if [path for path, _ in now] != [path for path, _ in before] or any(
        a is not b for (_, a), (_, b) in zip(now, before, strict=True)
    ):
        raise AssertionError(
            "leaves_its_argument_as_it_was: the tree that was given holds other leaves than before."
        )
    for (path, leaf), value in zip(now, values, strict=True):
        if isinstance(leaf, Tensor):
            agree(leaves_its_argument_as_it_was, path, leaf, value, 0, "nothing is written")


@named
def is_idempotent(transform: Transform, given: Tree) -> None:
    """Applying it twice is applying it once."""
    once = transform(given)
    twice = transform(once)
    if tree.paths(twice) != tree.paths(once):
        raise AssertionError(
            f"is_idempotent: once gives {tree.paths(once)[:3]}..., twice {tree.paths(twice)[:3]}..."
        )
    for (path, again), first in zip(tree.items(twice), tree.leaves(once), strict=True):
        if isinstance(first, Tensor) and (
            again.dtype != first.dtype or not torch.equal(again, first)
        ):
            raise AssertionError(
                f"is_idempotent: {path} is {first.dtype} once, and another {again.dtype} twice."
            )


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)] + [""]


def _has_none(found: Any) -> bool:
    try:
        tree.partition(found)
    except ValueError:
        return True
    return False
