"""Functions of the leaves of trees: map, list, stack, measure, compare, cast and move."""

import builtins
from collections.abc import Callable, Sequence

import optree
import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door
from .nodes import KINDS, IsLeaf, Transform, Tree, is_leaf_node, nodes
from .selection import Where, chooses_none, predicate


@door
def map(f: Callable[..., Tree], tree: Tree, *rest: Tree, is_leaf: IsLeaf = None) -> Tree:
    """Apply f to each leaf, and to the leaves at the same path of the rest; keep the structure.

    Raises:
        ValueError: the rest have another structure.

    Example:
        >>> map(lambda x, y: x + y, {"a": 1, "b": (2, ())}, {"a": 10, "b": (20, ())})
        {'a': 11, 'b': (22, ())}
    """
    return optree.tree_map(f, tree, *rest, is_leaf=is_leaf)


@door
def map_with_path(f: Callable[..., Tree], tree: Tree, *rest: Tree, is_leaf: IsLeaf = None) -> Tree:
    """Apply f(path, leaf, *rest) to each leaf.

    Example:
        >>> map_with_path(lambda path, x: f"{path}={x}", {"layers": [1, 2]})
        {'layers': ['layers.0=1', 'layers.1=2']}
    """
    flat, structure = optree.tree_flatten(tree, is_leaf=is_leaf)
    columns = [
        paths(tree, is_leaf=is_leaf),
        flat,
        *(structure.flatten_up_to(other) for other in rest),
    ]
    return optree.tree_unflatten(structure, [f(*row) for row in zip(*columns, strict=True)])


@door
def leaves(tree: Tree, *, is_leaf: IsLeaf = None) -> list[Tree]:
    """The leaves in order."""
    return optree.tree_leaves(tree, is_leaf=is_leaf)


@door
def paths(tree: Tree, *, is_leaf: IsLeaf = None) -> list[str]:
    """The path of each leaf, in the order of `leaves`; a bare leaf has the path "".

    Example:
        >>> paths({"layers": ({"q": 1}, {"q": 2}), "embed": 0})
        ['embed', 'layers.0.q', 'layers.1.q']
    """
    return [path for path, _ in items(tree, is_leaf=is_leaf)]


@door
def items(tree: Tree, *, is_leaf: IsLeaf = None) -> list[tuple[str, Tree]]:
    """Pairs (path, leaf), in the order of `leaves`."""
    return [(path, node) for path, node in nodes(tree, is_leaf) if is_leaf_node(node, is_leaf)]


@door
def stack(trees: Sequence[Tree]) -> Tree:
    """One tree of leaves (n, ...) from n trees of one structure: an ensemble for vmap, or layers
    for a scan.

    Law: unstack(stack(trees)) == trees (test_tree.py::test_unstack_undoes_stack).
    """
    if not len(trees):
        errors.fail(
            "stack",
            "trees",
            "at least one tree",
            "none",
            "Without one, the structure is not known.",
        )
    first, *others = trees
    return optree.tree_map(lambda *leaf: torch.stack(leaf), first, *others)


@door
def unstack(tree: Tree) -> tuple[Tree, ...]:
    """n trees from one whose leaves are all (n, ...).

    Raises:
        ValueError: the leaves differ in their first size, or there are none.
    """
    sizes = {leaf.shape[:1] if isinstance(leaf, Tensor) else (): path for path, leaf in items(tree)}
    if len(sizes) != 1 or () in sizes:
        got = (
            " and ".join(f"{tuple(size)} at {path!r}" for size, path in sizes.items())
            or "no leaves"
        )
        errors.fail("unstack", "tree", "of leaves (n, ...) with one n", got, "Stack trees first.")
    flat, structure = optree.tree_flatten(tree)
    return tuple(
        optree.tree_unflatten(structure, row)
        for row in zip(*(leaf.unbind() for leaf in flat), strict=True)
    )


@door
def nbytes(tree: Tree) -> int:
    """The bytes of all tensors in the tree; a tensor that occurs twice counts twice."""
    return sum(
        leaf.numel() * leaf.element_size() for leaf in leaves(tree) if isinstance(leaf, Tensor)
    )


@door
def count(tree: Tree) -> int:
    """The number of elements of all tensors in the tree.

    Example:
        >>> count({"a": torch.zeros(2, 3), "b": ()}), nbytes({"a": torch.zeros(2, 3), "b": ()})
        (6, 24)
    """
    return sum(leaf.numel() for leaf in leaves(tree) if isinstance(leaf, Tensor))


@door
def allclose(a: Tree, b: Tree, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """True where structure, shapes and dtypes are equal and values close (equal for integers)."""

    def close(x: Tree, y: Tree) -> bool:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return type(x) is type(y) and x == y
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        inexact = x.is_floating_point() or x.is_complex()
        return torch.allclose(x, y, rtol, atol) if inexact else torch.equal(x, y)

    flat, structure = optree.tree_flatten(a)
    others, other_structure = optree.tree_flatten(b)
    return structure == other_structure and all(builtins.map(close, flat, others))


@door
def cast(dtype: torch.dtype, where: Where | None = None) -> Transform:
    """A transform that casts the floating leaves of a tree; other leaves are not copied.

    Args:
        dtype: a floating one. 8-bit floats are not cast: they are codes that need their scale.
        where: which leaves, a regex of whole paths or a predicate of (path, leaf); None is all.

    Example:
        >>> cast(torch.bfloat16)({"w": torch.zeros(2), "n": torch.tensor(3)})
        {'w': tensor([0., 0.], dtype=torch.bfloat16), 'n': tensor(3)}
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        got = repr(dtype) if isinstance(dtype, torch.dtype | str) else f"a {type(dtype).__name__}"
        remedy = "Choose torch.float32 or torch.bfloat16, and call cast(dtype)(tree)."
        errors.fail("cast", "dtype", "a floating torch.dtype", got, remedy, TypeError)
    narrow = lambda x: x.to(dtype) if KINDS["floating"](x) and x.element_size() > 1 else x
    return door(_at("cast", where, narrow), name="cast(dtype)")


@door
def to(device: torch.device | str, where: Where | None = None) -> Transform:
    """A transform that copies every tensor of a tree to a device, unless it is there already.

    Args:
        device: a torch.device or its name, such as "cuda:0".
        where: which leaves, as in `cast`.

    Example:
        >>> to("meta")({"w": torch.zeros(2)})["w"].device
        device(type='meta')
    """
    try:
        place = device if isinstance(device, torch.dtype) else torch.device(device)
    except RuntimeError as error:
        got, remedy = (
            repr(device),
            f'Such as "cpu" or "cuda:0". torch says: {str(error).splitlines()[0]}',
        )
        errors.fail("to", "device", "one that torch knows", got, remedy)
    return door(
        _at("to", where, lambda x: x.to(place) if isinstance(x, Tensor) else x), name="to(device)"
    )


def _at(function: str, where: Where | None, f: Callable[[object], object]) -> Transform:
    """A transform that replaces each leaf chosen by f of it."""
    if where is None:
        return lambda tree: map(f, tree)
    choose = predicate(function, where)

    def transform(tree: Tree) -> Tree:
        chosen = [choose(path, leaf) for path, leaf in items(tree)]
        if not any(chosen):
            chooses_none(function, where)
        flat, structure = optree.tree_flatten(tree)
        return optree.tree_unflatten(
            structure, [f(x) if take else x for x, take in zip(flat, chosen, strict=True)]
        )

    return transform
