"""Selection in a tree, by path or by predicate: update, partition, combine."""

import difflib
import re
from collections.abc import Callable

from ..core import errors
from ..core.doors import door
from ..records import ABSENT, is_absent
from .nodes import KINDS, IsLeaf, Tree, is_leaf_node, join_path, nodes, open_node


@door
def update(tree: Tree, path: str, value: object, *, regex: bool = False, is_leaf: IsLeaf = None) -> Tree:
    """The tree with the value at a path replaced; other leaves are not copied.

    Args:
        path: the exact path of a leaf, of a subtree, or of an absent `()`. With regex=True, a
            regular expression: every leaf whose whole path it matches is replaced.
        value: the new value, or a function of the old one.

    Raises:
        ValueError: nothing has this path; the message names the nearest one.

    Example:
        >>> update({"layers": ({"q": 1}, {"q": 2})}, "layers.0.q", 7)
        {'layers': ({'q': 7}, {'q': 2})}
        >>> update({"layers": ({"q": 1}, {"q": 2})}, r"layers\\..*\\.q", lambda q: -q, regex=True)
        {'layers': ({'q': -1}, {'q': -2})}

    Law: what is not named stays the same object
        (test_tree.py::test_update_shares_every_leaf_that_it_does_not_name).
    """
    found = []

    def edit(node: Tree, name: str) -> Tree:
        leaf = is_leaf_node(node, is_leaf)
        if (leaf and re.fullmatch(path, name)) if regex else name == path:
            found.append(name)
            return value(node) if callable(value) else value
        if leaf:
            return node
        parts, rebuild = open_node(node)
        return rebuild([edit(child, join_path(name, part)) for part, child in parts])

    changed = edit(tree, "")
    if not found:
        near = difflib.get_close_matches(path, [name for name, _ in nodes(tree, is_leaf)], n=3, cutoff=0.0)
        errors.fail("update", "path", "a path in the tree", repr(path), f"Near it: {', '.join(near)}.")
    return changed


@door
def partition(
    tree: Tree, predicate: str | Callable[[str, Tree], bool] = "floating", *, is_leaf: IsLeaf = None
) -> tuple[Tree, Tree]:
    """Split a tree in two of the same structure, with `()` in place of leaves of the other half.

    For gradients of some leaves: `grad(lambda chosen: loss(combine(chosen, others)))(chosen)`.

    Args:
        predicate: of the first half: "floating", "integer", or a function of (path, leaf).

    Raises:
        ValueError: a None in the tree, which torch.func would treat as a leaf.

    Example:
        >>> import torch
        >>> partition({"w": torch.zeros(2), "n": 3})
        ({'w': tensor([0., 0.]), 'n': ()}, {'w': (), 'n': 3})

    Law: combine(*partition(tree)) == tree (test_tree.py::test_combine_undoes_partition).
    """
    if isinstance(predicate, str) and predicate not in KINDS:
        errors.fail("partition", "predicate", f"a function or one of {list(KINDS)}", repr(predicate), "Take f(path, leaf).")
    choose = (lambda _, leaf: KINDS[predicate](leaf)) if isinstance(predicate, str) else predicate

    def halve(node: Tree, path: str) -> tuple[Tree, Tree]:
        if node is None:
            errors.fail("partition", "tree", "without None", f"None at {path!r}", "Hold () for what is absent.")
        if is_leaf_node(node, is_leaf):
            return (node, ABSENT) if choose(path, node) else (ABSENT, node)
        parts, rebuild = open_node(node)
        halves = [halve(child, join_path(path, part)) for part, child in parts]
        return rebuild([selected for selected, _ in halves]), rebuild([rest for _, rest in halves])

    return halve(tree, "")


@door
def combine(selected: Tree, rest: Tree) -> Tree:
    """Join two halves: where one has `()`, take the value of the other.

    Raises:
        ValueError: both have a value at one path.
    """

    def join(a: Tree, b: Tree, path: str) -> Tree:
        if is_absent(a) or is_absent(b):
            return b if is_absent(a) else a
        if is_leaf_node(a) or is_leaf_node(b) or type(a) is not type(b):
            errors.fail("combine", "rest", f"() where selected is not, at {path!r}", type(b).__name__, "Give halves of one tree.")
        (parts, rebuild), (others, _) = open_node(a), open_node(b)
        if [part for part, _ in parts] != [part for part, _ in others]:
            errors.fail("combine", "rest", f"of the same parts at {path!r}", type(b).__name__, "Give halves of one tree.")
        return rebuild([join(x, y, join_path(path, part)) for (part, x), (_, y) in zip(parts, others, strict=True)])

    return join(selected, rest, "")
