"""Whether a tree is one that was seen before, unmodified; cheap enough for every step of a loop.

What is computed from weights (another layout, compiled code) is valid as long as the weights are
the same tensors with the same values. A Python loop over the hundreds of tensors of a model takes
longer than a layer, so the comparison is done by built-ins in C.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain, compress, groupby
from operator import attrgetter, itemgetter
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from ..records import Tree
from .context import ContextValue

_version = attrgetter("_version")
_needs_gradient = attrgetter("requires_grad")


class _Level(NamedTuple):
    """The nodes and leaves of one depth of a tree, in order, without `()` of nodes."""

    kinds: list[type]  # of the nodes
    is_leaf: list[bool]
    is_node: list[bool]
    sizes: list[int]  # of the nodes
    leaves: list[int]  # ids
    filled: list["_Filled | None"]  # of the nodes; empty where none of them has a `()`


class _Filled(NamedTuple):
    """Which children of a node are not `()`.

    A layer of a decoder has some seventy fields, most of which are `()`: slices of a tuple are
    compared faster than its children are counted.
    """

    blank: tuple[tuple[slice, tuple[()]], ...]
    select: Callable[[Sequence[Tree]], tuple[Tree, ...]]


def _filled(node: tuple[Tree, ...]) -> _Filled | None:
    is_blank = [type(x) is tuple and not x for x in node]
    if not any(is_blank):
        return None
    blank: list[tuple[slice, tuple[()]]] = []
    first = 0
    for empty, run in groupby(is_blank):
        last = first + len(list(run))
        if empty:
            blank.append((slice(first, last), node[first:last]))
        first = last
    some = [slice(i, i + 1) for i, empty in enumerate(is_blank) if not empty]
    if len(some) < 2:  # itemgetter gives one item by itself
        only = some[0] if some else slice(0, 0)
        return _Filled(tuple(blank), itemgetter(only))
    return _Filled(tuple(blank), itemgetter(*[cut.start for cut in some]))


class Fingerprint:
    """A tree of tensors in tuples and records, recognized later without keeping it alive.

    Args:
        tree: the tree. One that holds anything but tensors, tuples and records is never recognized.
        gone: called when one of its tensors is freed; then discard the Fingerprint, since another
            object may get the same id.

    Modifications that torch does not count in `_version` are missed: through `.data` or by
    assigning it, through numpy, or to an inference tensor. Replace such a tensor (`w.clone()`).
    `()` and a record without fields are alike.

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
            filled = list(map(_filled, nodes))
            known = _Level(
                list(map(type, nodes)),
                is_leaf,
                is_node,
                list(map(len, nodes)),
                list(map(id, leaves)),
                filled if any(filled) else [],
            )
            self.levels.append(known)
            found += leaves
            level = _below(known, nodes) or []
        self.has_version = [not leaf.is_inference() for leaf in found]
        self.versions = list(map(_version, compress(found, self.has_version)))
        self.alive = [ref(leaf, lambda _: gone()) for leaf in found]

    def leaves(self, tree: Tree) -> list[Tensor] | None:
        """The tensors of the tree if it is the same and unmodified, else None."""
        held = _held.get().get(id(tree))
        if held is None:
            return self._compared(tree)
        if (found := held.known.get(self)) is not None:
            return found if held.is_constant or self._is_unwritten(found) else None
        if (found := self._compared(tree)) is not None:
            held.known[self] = found
        return found

    def _is_unwritten(self, leaves: list[Tensor]) -> bool:
        return list(map(_version, compress(leaves, self.has_version))) == self.versions

    def _compared(self, tree: Tree) -> list[Tensor] | None:
        if self.levels is None:
            return None
        found: list[Tensor] = []
        level: list[Tree] | None = [tree]
        for known in self.levels:
            if level is None or len(level) != len(known.is_leaf):
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
            level = _below(known, nodes)
        return found if not level and self._is_unwritten(found) else None


class Held:
    """A tree that a loop has: its tuples are looked at once, and then versions of tensors alone.

    A loop keeps its tree alive, so its tuples hold the same tensors. These may be written, by a
    sampler for example. What is known is kept between the rounds of the loop.

    Args:
        tree: the weights.
        constant: True where no code of a user runs between the rounds: versions, whose reading
            takes a twentieth of a token of a small model, are then read once too.

    Law: a tree is known again within, and another is not, nor this one after it was written, before
        or within (test_fingerprints.py).
    """

    def __init__(self, tree: Tree, *, constant: bool = False) -> None:
        self.tree, self.is_constant = tree, constant
        self.known: WeakKeyDictionary[Fingerprint, list[Tensor]] = WeakKeyDictionary()

    def within(self) -> AbstractContextManager[None]:
        """For a round: inside the `with` the tree is recognized so."""
        return _held.holding({**_held.get(), id(self.tree): self})


# What loops have, by id, which is that of no other object while it is here.
_held: ContextValue[dict[int, Held]] = ContextValue("held_weights", {})


def _below(known: _Level, nodes: Sequence[tuple[Tree, ...]]) -> list[Tree] | None:
    """The children of the nodes of a level that are not `()`; None where others are `()`."""
    if not known.filled:
        return list(chain.from_iterable(nodes))
    found: list[Tree] = []
    for node, filled in zip(nodes, known.filled, strict=True):
        if filled is None:
            found.extend(node)
            continue
        for cut, blank in filled.blank:
            try:
                if node[cut] != blank:
                    return None
            except Exception:  # of an object that does not compare with a tuple
                return None
        found.extend(filled.select(node))
    return found


def is_differentiated(leaves: Sequence[Tensor]) -> bool:
    """True where one of them requires a gradient."""
    return any(map(_needs_gradient, leaves))
