"""Shapes of the trees that `drafters.tree` makes."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from ...core import errors
from .drafters import check_probability

CHILDREN = ("top", "drawn", "mixed")


class Shape(NamedTuple):
    """How a tree is made: children of each node by depth, and what is kept.

    branching: children of a node at each depth. width: how many nodes of a depth get children; 0 is
    all. nodes: M, how many are kept; 0 is all. children: one of CHILDREN. confidence: the tree ends
    behind a depth where no path that could go on has this probability. least: of a path to a node
    that gets no children; nodes below it are left out.
    """

    branching: tuple[int, ...]
    width: int
    nodes: int
    children: str
    confidence: float = 0.0
    least: float = 0.0

    @property
    def size(self) -> int:
        """M, the number of tokens of a tree."""
        if self.nodes:
            return self.nodes
        total, each = 0, 1
        for b in self.branching:
            each = b * (min(each, self.width) if self.width else each)
            total += each
        return total


def shape_of(
    branching: Sequence[int] | None,
    nodes: int | None,
    depth: int,
    width: int | None,
    children: str,
    confidence: float,
    least: float,
) -> Shape:
    """The shape that these arguments of `drafters.tree` describe; an error where there is none."""
    fail = partial(errors.fail, "drafters.tree")
    check_probability("drafters.tree", "confidence", confidence)
    check_probability("drafters.tree", "least", least)
    if least and (width is None or branching is None):
        fail("least", "0 in a tree without branching and width", least, "Such as width=1.")
    if width is not None and not errors.is_count(width, 1):
        fail("width", "an int, at least 1", repr(width), "None is usual.")
    if (branching is None) == (nodes is None):
        got = "neither" if nodes is None else "both"
        fail("branching", "given, or nodes", got, "Such as branching=(3, 2, 1), or nodes=12.")
    if children not in CHILDREN:
        fail("children", f"one of {', '.join(CHILDREN)}", repr(children), "top is usual.")
    if branching is not None:
        if not len(branching) or not all(errors.is_count(b, 1) for b in branching):
            wanted = "numbers of children, at least 1 each"
            fail("branching", wanted, repr(branching), "Such as (3, 2, 1).")
        if children != "top" and (width is not None or confidence):
            remedy = "Leave out width and confidence, or children."
            fail("children", "top where tokens decide which get children", repr(children), remedy)
        return Shape(tuple(branching), width or 0, 0, children, confidence, least)
    if confidence:
        remedy = "Give branching; a tree that is grown keeps the most probable nodes as it is."
        fail("confidence", "0 in a tree that is grown", confidence, remedy)
    width = 4 if width is None else width
    for name, n in (("nodes", nodes), ("depth", depth)):
        if not errors.is_count(n, 1):
            fail(name, "an int, at least 1", repr(n), "nodes=12, depth=4, width=4 is usual.")
    if children != "top":
        remedy = "Give a shape, or leave children out: a drawn tree may not be pruned."
        fail("children", "top in a tree that is grown", repr(children), remedy)
    assert nodes is not None
    most = width + (depth - 1) * width * width
    if nodes > most:
        wanted = f"at most the {most} that grow with depth {depth} and width {width}"
        fail("nodes", wanted, nodes, "Let more grow, or keep fewer.")
    return Shape((width,) * depth, width, nodes, children)
