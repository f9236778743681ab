"""Whether a tree is one that was seen before, unmodified; cheap enough for every step of a loop.

What is computed from weights (another layout, compiled code) is valid as long as the weights are
the same tensors with the same values. A Python loop over the hundreds of tensors of a model takes
longer than a layer, so the comparison is done by built-ins in C.
"""

from collections.abc import Callable, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import NamedTuple
from weakref import ref

from torch import Tensor

from ..records import Tree

_version = attrgetter("_version")
_needs_gradient = attrgetter("requires_grad")


class _Level(NamedTuple):
    """The nodes and leaves of one depth of a tree, in order."""

    kinds: list[type]  # of the nodes
    is_leaf: list[bool]
    is_node: list[bool]
    sizes: list[int]  # of the nodes
    leaves: list[int]  # ids


class Fingerprint:
    """A tree of tensors in tuples and records, recognized later without keeping it alive.

    Args:
        tree: the tree. One that holds anything but tensors, tuples and records is never recognized.
        gone: called when one of its tensors is freed; then discard the Fingerprint, since another
            object may get the same id.

    Modifications that torch does not count in `_version` are missed: through `.data` or by
    assigning it, through numpy, or to an inference tensor. Replace such a tensor (`w.clone()`).

    Law: `leaves` gives those of an equal arrangement of the same unwritten tensors, and None of any
        other (test_fingerprints.py).
    """

    def __init__(self, tree: Tree, gone: Callable[[], object]) -> None:
        self.levels: list[_Level] | None = []
        found: list[Tensor] = []
        level: list[Tree] = [tree]
        while level:
            is_leaf = [isinstance(x, Tensor) for x in level]
            is_node = [isinstance(x, tuple) for x in level]
            leaves, nodes = list(compress(level, is_leaf)), list(compress(level, is_node))
            if len(leaves) + len(nodes) < len(level):
                self.levels = None
                return
            self.levels.append(
                _Level(
                    list(map(type, nodes)),
                    is_leaf,
                    is_node,
                    list(map(len, nodes)),
                    list(map(id, leaves)),
                )
            )
            found += leaves
            level = list(chain.from_iterable(nodes))
        self.has_version = [not leaf.is_inference() for leaf in found]
        self.versions = list(map(_version, compress(found, self.has_version)))
        self.alive = [ref(leaf, lambda _: gone()) for leaf in found]

    def leaves(self, tree: Tree) -> list[Tensor] | None:
        """The tensors of the tree if it is the same and unmodified, else None."""
        if self.levels is None:
            return None
        found: list[Tensor] = []
        level: list[Tree] = [tree]
        for known in self.levels:
            if len(level) != len(known.is_leaf):
                return None
            leaves, nodes = (
                list(compress(level, known.is_leaf)),
                list(compress(level, known.is_node)),
            )
            if list(map(id, leaves)) != known.leaves or list(map(type, nodes)) != known.kinds:
                return None
            if list(map(len, nodes)) != known.sizes:
                return None
            found += leaves
            level = list(chain.from_iterable(nodes))
        return (
            found
            if list(map(_version, compress(found, self.has_version))) == self.versions
            else None
        )


def is_differentiated(leaves: Sequence[Tensor]) -> bool:
    """True where one of them requires a gradient."""
    return any(map(_needs_gradient, leaves))
