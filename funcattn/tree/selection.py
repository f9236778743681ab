"""Selection in a tree, by path or by predicate: update, partition, combine.

`Where` says which leaves a transform of trees acts on, and `predicate` reads it: fa.quantize,
fa.lora, fa.gptq and its kin, the optimizers, the rules of fa.shard, and the functions of fa.tree.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from ..core import errors
from ..core.doors import door
from ..records import ABSENT, is_absent
from .nodes import KINDS, IsLeaf, Tree, is_leaf_node, join_path, nodes, open_node

Where: TypeAlias = str | Callable[[str, Any], bool]  # a regex of whole paths, or f(path, leaf)


def predicate(function: str, where: Where, argument: str = "where") -> Callable[[str, Any], bool]:
    """The leaves that a transform acts on, as a predicate of (path, leaf).

    Args:
        function, argument: for the errors: the public function, and its argument.
        where: a regular expression that the whole path must match, or the predicate itself.

    Raises:
        TypeError: it is neither a str nor callable.
        ValueError: a str that is not a regular expression.

    Example:
        >>> choose = predicate("f", r"layers\\.\\d+\\.(q|k)")
        >>> choose("layers.3.k", None), choose("layers.3.kind", None)
        (True, False)
    """
    remedy = "A path looks like layers.0.q."
    if not isinstance(where, str):
        if not callable(where):
            errors.fail(
                function,
                argument,
                "a regex or a predicate of (path, weight)",
                repr(where),
                remedy,
                TypeError,
            )
        return where
    try:
        pattern = re.compile(where)
    except re.error as error:
        errors.fail(function, argument, "a regex of paths", f"{where!r}, {error}", remedy)
    return lambda path, leaf: pattern.fullmatch(path) is not None


def chooses_none(function: str, where: Where | None, argument: str = "where") -> NoReturn:
    """Raise the error for a `where` that no leaf of a tree satisfies."""
    remedy = "Look at the paths: funcattn.tree.paths(params)."
    errors.fail(
        function, argument, "a rule that chooses a leaf", f"{where!r}, which chooses none", remedy
    )


@door
def update(
    tree: Tree, path: Where, value: object, *, regex: bool = False, is_leaf: IsLeaf = None
) -> Tree:
    """The tree with the value at a path replaced; other leaves are not copied.

    Args:
        path: the exact path of a leaf, of a subtree, or of an absent `()`; or a predicate of
            (path, leaf): every leaf of which it is true is replaced.
        regex: True where the path is a regular expression, of the whole path of a leaf.
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
    choose = predicate("update", path, "path") if regex or not isinstance(path, str) else None

    def edit(node: Tree, name: str) -> Tree:
        leaf = is_leaf_node(node, is_leaf)
        if name == path if choose is None else leaf and choose(name, node):
            found.append(name)
            return value(node) if callable(value) else value
        if leaf:
            return node
        parts, rebuild = open_node(node)
        return rebuild([edit(child, join_path(name, part)) for part, child in parts])

    changed = edit(tree, "")
    if not found:
        if not isinstance(path, str):
            chooses_none("update", path, "path")
        near = difflib.get_close_matches(
            path, [name for name, _ in nodes(tree, is_leaf)], n=3, cutoff=0.0
        )
        errors.fail(
            "update", "path", "a path in the tree", repr(path), f"Near it: {', '.join(near)}."
        )
    return changed


@door
def partition(
    tree: Tree, where: Where = "floating", *, is_leaf: IsLeaf = None, predicate: Where | None = None
) -> tuple[Tree, Tree]:
    """Split a tree in two of the same structure, with `()` in place of leaves of the other half.

    For gradients of some leaves: `grad(lambda chosen: loss(combine(chosen, others)))(chosen)`.

    Args:
        where: the leaves of the first half: "floating", "integer", a regular expression that the
            whole path must match, or a predicate of (path, leaf).
        predicate: the former name of `where`.

    Raises:
        ValueError: a None in the tree, which torch.func would treat as a leaf; or no leaf has a
            path that the expression matches.

    Example:
        >>> import torch
        >>> partition({"w": torch.zeros(2), "n": 3})
        ({'w': tensor([0., 0.]), 'n': ()}, {'w': (), 'n': 3})

    Law: combine(*partition(tree)) == tree (test_tree.py::test_combine_undoes_partition).
    """
    if predicate is not None and where != "floating":
        errors.fail(
            "partition",
            "predicate",
            "absent beside where",
            repr(predicate),
            "It is the former name of where.",
        )
    choose, is_regex = _chooser(where if predicate is None else predicate)
    met = []

    def halve(node: Tree, path: str) -> tuple[Tree, Tree]:
        if node is None:
            errors.fail(
                "partition",
                "tree",
                "without None",
                f"None at {path!r}",
                "Hold () for what is absent.",
            )
        if is_leaf_node(node, is_leaf):
            if not choose(path, node):
                return ABSENT, node
            met.append(path)
            return node, ABSENT
        parts, rebuild = open_node(node)
        halves = [halve(child, join_path(path, part)) for part, child in parts]
        return rebuild([selected for selected, _ in halves]), rebuild([rest for _, rest in halves])

    halves = halve(tree, "")
    if is_regex and not met:
        got = f"{where if predicate is None else predicate!r}, which chooses none"
        wanted = f"one of {list(KINDS)}, or a rule that chooses a leaf"
        errors.fail(
            "partition", "where", wanted, got, "Look at the paths: funcattn.tree.paths(tree)."
        )
    return halves


def _chooser(where: Where) -> tuple[Callable[[str, Any], bool], bool]:
    """The predicate of `partition`, and whether it was a regular expression."""
    if isinstance(where, str) and where in KINDS:
        kind = KINDS[where]
        return lambda _, leaf: kind(leaf), False
    return predicate("partition", where), isinstance(where, str)


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
            errors.fail(
                "combine",
                "rest",
                f"() where selected is not, at {path!r}",
                type(b).__name__,
                "Give halves of one tree.",
            )
        (parts, rebuild), (others, _) = open_node(a), open_node(b)
        if [part for part, _ in parts] != [part for part, _ in others]:
            errors.fail(
                "combine",
                "rest",
                f"of the same parts at {path!r}",
                type(b).__name__,
                "Give halves of one tree.",
            )
        return rebuild(
            [
                join(x, y, join_path(path, part))
                for (part, x), (_, y) in zip(parts, others, strict=True)
            ]
        )

    return join(selected, rest, "")
