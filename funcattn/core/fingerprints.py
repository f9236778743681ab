"""Is this tree the one that was seen before, unwritten? Asked at every step of a loop, and answered at the speed of C.

What was made of weights (another form, compiled code) is of use as long as the weights are the same tensors with the same numbers.
Asking that of a model's hundreds of tensors one by one, in Python, takes longer than a layer does.
"""

from collections.abc import Callable, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor

_version = attrgetter("_version")
_needs_gradient = attrgetter("requires_grad")


class _Level(NamedTuple):
    """The nodes and leaves of one depth, in order."""

    kinds: list[type]
    is_leaf: list[bool]
    is_node: list[bool]
    sizes: list[int]  # of the nodes
    leaves: list[int]  # as numbered by id


class Fingerprint:
    """A tree of tensors in tuples and records, remembered without being kept.

    Args:
        tree: what to remember. One that holds anything but tensors, tuples and records is never recognized.
        gone: called when one of its tensors goes: then do not ask again, for another object may have its number.

    What torch does not count as a write is not seen: one through `.data` or by assigning it, through numpy, or into an inference
    tensor. Give such a tensor a new object (`w.clone()`).

    Law: `leaves` gives those of an equal arrangement of the same unwritten tensors, and None of any other (test_fingerprints.py).
    """

    def __init__(self, tree: Any, gone: Callable[[], object]) -> None:
        self.levels: list[_Level] | None = []
        found: list[Tensor] = []
        level: list[Any] = [tree]
        while level:
            is_leaf = [isinstance(x, Tensor) for x in level]
            is_node = [isinstance(x, tuple) for x in level]
            leaves, nodes = list(compress(level, is_leaf)), list(compress(level, is_node))
            if len(leaves) + len(nodes) < len(level):
                self.levels = None
                return
            self.levels.append(_Level(list(map(type, level)), is_leaf, is_node, list(map(len, nodes)), list(map(id, leaves))))
            found += leaves
            level = list(chain.from_iterable(nodes))
        self.has_version = [not leaf.is_inference() for leaf in found]
        self.versions = list(map(_version, compress(found, self.has_version)))
        self.alive = [ref(leaf, lambda _: gone()) for leaf in found]

    def leaves(self, tree: Any) -> list[Tensor] | None:
        """The tensors of the tree, if it is the one remembered, unwritten since; else None."""
        if self.levels is None:
            return None
        found: list[Tensor] = []
        level: list[Any] = [tree]
        for known in self.levels:
            if list(map(type, level)) != known.kinds:
                return None
            leaves, nodes = list(compress(level, known.is_leaf)), list(compress(level, known.is_node))
            if list(map(id, leaves)) != known.leaves or list(map(len, nodes)) != known.sizes:
                return None
            found += leaves
            level = list(chain.from_iterable(nodes))
        return found if list(map(_version, compress(found, self.has_version))) == self.versions else None


def is_differentiated(leaves: Sequence[Tensor]) -> bool:
    """True where one of them asks for a gradient."""
    return any(map(_needs_gradient, leaves))
