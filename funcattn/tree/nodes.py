"""Nodes of a tree, their children and their paths, in optree's order."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import optree
import torch
from optree.utils import total_order_sorted
from torch import Tensor

from ..records import Tree

IsLeaf: TypeAlias = Callable[[Tree], bool] | None
Transform: TypeAlias = Callable[[Tree], Tree]

INTEGERS = frozenset(
    {
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    }
)
KINDS: dict[str, Callable[[object], bool]] = {
    "floating": lambda leaf: isinstance(leaf, Tensor) and leaf.is_floating_point(),
    "integer": lambda leaf: isinstance(leaf, Tensor) and leaf.dtype in INTEGERS,
}


def is_leaf_node(node: Tree, is_leaf: IsLeaf = None) -> bool:
    """True where a node is a leaf for optree, or for the predicate."""
    return optree.tree_is_leaf(node, is_leaf=is_leaf)


def open_node(node: Tree) -> tuple[list[tuple[str, Tree]], Callable[[list[Tree]], Tree]]:
    """The named children of a node, and a function that rebuilds the node from other children."""
    # As optree does: Dynamo fails on its metadata where all values are constants.
    if type(node) is dict:
        keys = total_order_sorted(node)
        return [(str(key), node[key]) for key in keys], lambda values: {
            **node,
            **dict(zip(keys, values, strict=True)),
        }
    children, metadata, entries, unflatten = optree.tree_flatten_one_level(node)
    names = node._fields if optree.is_namedtuple(node) else entries
    parts = [(str(name), child) for name, child in zip(names, children, strict=True)]
    return parts, lambda values: unflatten(metadata, tuple(values))


def nodes(tree: Tree, is_leaf: IsLeaf, path: str = "") -> Iterator[tuple[str, Tree]]:
    """Every node with its path, parents before children, in optree's order."""
    yield path, tree
    if not is_leaf_node(tree, is_leaf):
        for part, child in open_node(tree)[0]:
            yield from nodes(child, is_leaf, join_path(path, part))


def join_path(path: str, part: str) -> str:
    """The path of a child of the node at a path."""
    return f"{path}.{part}" if path else part
