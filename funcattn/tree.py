"""Trees of tensors: map, name, select, stack, measure and show any nesting of records, dicts, lists and tuples.

A path is the chain of field names, keys and indices down to a leaf, joined by dots: `layers.0.q`. A predicate `is_leaf` stops at
a node and takes it whole, so a weight keeps its path when it becomes a record:

    paths(params)                          ("embed", "layers.0.q", ...)
    paths(quantized)                       ("embed.codes", "embed.scale", "layers.0.q.codes", ...)
    paths(quantized, is_leaf=is_weight)    ("embed", "layers.0.q", ...)

The empty tuple is what a record holds where it holds nothing, and what `partition` leaves where it took a leaf: it has no leaves,
neither here nor for torch.func. None has none here but is one for torch.func; functions here keep it where it is, and
`partition`, whose halves are meant for torch.func, refuses it.

Everything is flattened and rebuilt by optree (which orders a dict by its keys), calls nothing on the leaves but what it says, and
works on traced tensors under torch.func. All but `summary` and `allclose` compile with fullgraph=True, as long as what `map` puts
into the tree is tensors there: Dynamo (2.13) cannot rebuild a tree of constants alone.
"""

import builtins
import difflib
import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import optree
import torch
from optree.utils import total_order_sorted
from torch import Tensor

from . import _checks
from ._doors import door
from .records import ABSENT, is_absent

Tree: TypeAlias = Any
IsLeaf: TypeAlias = Callable[[Any], bool] | None
Transform: TypeAlias = Callable[[Tree], Tree]

INTEGERS = frozenset({torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64})
KINDS: dict[str, Callable[[Any], bool]] = {
    "floating": lambda leaf: isinstance(leaf, Tensor) and leaf.is_floating_point(),
    "integer": lambda leaf: isinstance(leaf, Tensor) and leaf.dtype in INTEGERS,
}


def _is_leaf(node: Tree, is_leaf: IsLeaf = None) -> bool:
    return optree.tree_is_leaf(node, is_leaf=is_leaf)


def _open(node: Tree) -> tuple[list[tuple[str, Tree]], Callable[[list[Tree]], Tree]]:
    """The named parts of a node, and a function that builds its like from others."""
    if type(node) is dict:  # what optree does, spelled out: Dynamo trips over its metadata where all values are constants
        keys = total_order_sorted(node)
        return [(str(key), node[key]) for key in keys], lambda values: {**node, **dict(zip(keys, values, strict=True))}
    children, metadata, entries, unflatten = optree.tree_flatten_one_level(node)
    names = node._fields if optree.is_namedtuple(node) else entries
    parts = [(str(name), child) for name, child in zip(names, children, strict=True)]
    return parts, lambda values: unflatten(metadata, tuple(values))


def _nodes(tree: Tree, is_leaf: IsLeaf, path: str = "") -> Iterator[tuple[str, Tree]]:
    """Every node with its path, a node before its parts, in optree's order."""
    yield path, tree
    if not _is_leaf(tree, is_leaf):
        for part, child in _open(tree)[0]:
            yield from _nodes(child, is_leaf, _join(path, part))


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


@door
def map(f: Callable[..., Any], tree: Tree, *rest: Tree, is_leaf: IsLeaf = None) -> Tree:
    """Apply f to each leaf (and to what stands at its place in the rest), keep the shape of the tree.

    Raises:
        ValueError: where the rest have another structure.

    Example:
        >>> map(lambda x, y: x + y, {"a": 1, "b": (2, ())}, {"a": 10, "b": (20, ())})
        {'a': 11, 'b': (22, ())}
    """
    return optree.tree_map(f, tree, *rest, is_leaf=is_leaf)


@door
def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree, is_leaf: IsLeaf = None) -> Tree:
    """Apply f(path, leaf, *rest) to each leaf.

    Example:
        >>> map_with_path(lambda path, x: f"{path}={x}", {"layers": [1, 2]})
        {'layers': ['layers.0=1', 'layers.1=2']}
    """
    flat, structure = optree.tree_flatten(tree, is_leaf=is_leaf)
    columns = [paths(tree, is_leaf=is_leaf), flat, *(structure.flatten_up_to(other) for other in rest)]
    return optree.tree_unflatten(structure, [f(*row) for row in zip(*columns, strict=True)])


@door
def leaves(tree: Tree, *, is_leaf: IsLeaf = None) -> list[Any]:
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
def items(tree: Tree, *, is_leaf: IsLeaf = None) -> list[tuple[str, Any]]:
    """Pairs (path, leaf), in the order of `leaves`."""
    return [(path, node) for path, node in _nodes(tree, is_leaf) if _is_leaf(node, is_leaf)]


@door
def stack(trees: Sequence[Tree]) -> Tree:
    """One tree of leaves (n, ...) from n trees of one structure: an ensemble for vmap, or layers for a scan.

    Law: unstack(stack(trees)) == trees (test_tree.py::test_unstack_undoes_stack).
    """
    if not len(trees):
        _checks.fail("stack", "trees", "at least one tree", "none", "Without one, the structure is not known.")
    first, *others = trees
    return optree.tree_map(lambda *leaf: torch.stack(leaf), first, *others)


@door
def unstack(tree: Tree) -> tuple[Tree, ...]:
    """n trees from one whose leaves are all (n, ...).

    Raises:
        ValueError: where the leaves do not share a first size, or there are none.
    """
    sizes = {leaf.shape[:1] if isinstance(leaf, Tensor) else (): path for path, leaf in items(tree)}
    if len(sizes) != 1 or () in sizes:
        got = " and ".join(f"{tuple(size)} at {path!r}" for size, path in sizes.items()) or "no leaves"
        _checks.fail("unstack", "tree", "of leaves (n, ...) with one n", got, "Stack trees first.")
    flat, structure = optree.tree_flatten(tree)
    return tuple(optree.tree_unflatten(structure, row) for row in zip(*(leaf.unbind() for leaf in flat), strict=True))


@door
def nbytes(tree: Tree) -> int:
    """The bytes of all tensors in the tree, each leaf counted as often as it stands there."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree) if isinstance(leaf, Tensor))


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
    """True where structure, shapes and dtypes are the same and values are close (equal, where they are not floating)."""

    def close(x: Any, y: Any) -> bool:
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
def update(tree: Tree, path: str, value: Any, *, regex: bool = False, is_leaf: IsLeaf = None) -> Tree:
    """The tree with something else at a path; every other leaf is shared with the old one.

    Args:
        path: the exact path of a leaf, of a whole subtree, or of an absent `()`. With regex=True, an expression which the
            whole path of a leaf should match, and every leaf that does is replaced.
        value: what to put there, or a function of what was there.

    Raises:
        ValueError: where nothing has this path; it names the nearest.

    Example:
        >>> update({"layers": ({"q": 1}, {"q": 2})}, "layers.0.q", 7)
        {'layers': ({'q': 7}, {'q': 2})}
        >>> update({"layers": ({"q": 1}, {"q": 2})}, r"layers\\..*\\.q", lambda q: -q, regex=True)
        {'layers': ({'q': -1}, {'q': -2})}

    Law: what is not named stays the same object (test_tree.py::test_update_shares_every_leaf_that_it_does_not_name).
    """
    found = []

    def edit(node: Tree, name: str) -> Tree:
        leaf = _is_leaf(node, is_leaf)
        if (leaf and re.fullmatch(path, name)) if regex else name == path:
            found.append(name)
            return value(node) if callable(value) else value
        if leaf:
            return node
        parts, rebuild = _open(node)
        return rebuild([edit(child, _join(name, part)) for part, child in parts])

    changed = edit(tree, "")
    if not found:
        near = difflib.get_close_matches(path, [name for name, _ in _nodes(tree, is_leaf)], n=3, cutoff=0.0)
        _checks.fail("update", "path", "a path in the tree", repr(path), f"Near it: {', '.join(near)}.")
    return changed


@door
def partition(tree: Tree, predicate: str | Callable[[str, Any], bool] = "floating", *, is_leaf: IsLeaf = None) -> tuple[Tree, Tree]:
    """Split a tree in two of its shape: the leaves chosen, and the others, with `()` wherever a leaf went to the other half.

    To differentiate with respect to a part: `grad(lambda chosen: loss(combine(chosen, others)))(chosen)`.

    Args:
        predicate: "floating", "integer", or a function of (path, leaf).

    Raises:
        ValueError: for a None in the tree, which torch.func would take for a leaf.

    Example:
        >>> partition({"w": torch.zeros(2), "n": 3})
        ({'w': tensor([0., 0.]), 'n': ()}, {'w': (), 'n': 3})

    Law: combine(*partition(tree)) == tree (test_tree.py::test_combine_undoes_partition).
    """
    if isinstance(predicate, str) and predicate not in KINDS:
        _checks.fail("partition", "predicate", f"a function or one of {list(KINDS)}", repr(predicate), "Take f(path, leaf).")
    choose = (lambda _, leaf: KINDS[predicate](leaf)) if isinstance(predicate, str) else predicate

    def halve(node: Tree, path: str) -> tuple[Tree, Tree]:
        if node is None:
            _checks.fail("partition", "tree", "without None", f"None at {path!r}", "Hold () for what is absent.")
        if _is_leaf(node, is_leaf):
            return (node, ABSENT) if choose(path, node) else (ABSENT, node)
        parts, rebuild = _open(node)
        halves = [halve(child, _join(path, part)) for part, child in parts]
        return rebuild([selected for selected, _ in halves]), rebuild([rest for _, rest in halves])

    return halve(tree, "")


@door
def combine(selected: Tree, rest: Tree) -> Tree:
    """Join two halves: where one holds `()`, take what the other holds.

    Raises:
        ValueError: where both hold something at one place.
    """

    def join(a: Tree, b: Tree, path: str) -> Tree:
        if is_absent(a) or is_absent(b):
            return b if is_absent(a) else a
        if _is_leaf(a) or _is_leaf(b) or type(a) is not type(b):
            _checks.fail("combine", "rest", f"() where selected is not, at {path!r}", type(b).__name__, "Give halves of one tree.")
        (parts, rebuild), (others, _) = _open(a), _open(b)
        if [part for part, _ in parts] != [part for part, _ in others]:
            _checks.fail("combine", "rest", f"of the same parts at {path!r}", type(b).__name__, "Give halves of one tree.")
        return rebuild([join(x, y, _join(path, part)) for (part, x), (_, y) in zip(parts, others, strict=True)])

    return join(selected, rest, "")


@door
def cast(dtype: torch.dtype) -> Transform:
    """A transform that casts the floating leaves of a tree. Leaves that do not change are shared.

    Args:
        dtype: a floating one. 8-bit floats stay: they are codes that mean nothing without their scale.

    Example:
        >>> cast(torch.bfloat16)({"w": torch.zeros(2), "n": torch.tensor(3)})
        {'w': tensor([0., 0.], dtype=torch.bfloat16), 'n': tensor(3)}
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        _checks.fail("cast", "dtype", "a floating torch.dtype", repr(dtype), "Choose torch.float32 or torch.bfloat16.", TypeError)
    narrow = lambda x: x.to(dtype) if KINDS["floating"](x) and x.element_size() > 1 else x
    return door(lambda tree: map(narrow, tree), name="cast(dtype)")


@door
def to(device: torch.device | str) -> Transform:
    """A transform that moves every tensor of a tree to a device. Leaves that are there already are shared.

    Args:
        device: a torch.device or its name, such as "cuda:0".

    Example:
        >>> to("meta")({"w": torch.zeros(2)})["w"].device
        device(type='meta')
    """
    try:
        place = device if isinstance(device, torch.dtype) else torch.device(device)
    except RuntimeError as error:
        got, remedy = repr(device), f'Such as "cpu" or "cuda:0". torch says: {str(error).splitlines()[0]}'
        _checks.fail("to", "device", "one that torch knows", got, remedy)
    return door(lambda tree: map(lambda x: x.to(place) if isinstance(x, Tensor) else x, tree), name="to(device)")


@dataclass(frozen=True)
class Row:
    """One line of a summary: a leaf or a node, standing for `times` neighbours that are alike."""

    name: str
    dtype: str
    shape: str
    nbytes: int  # of one of them
    parts: tuple["Row", ...] = ()
    times: int = 1


@dataclass(frozen=True)
class Summary:
    """What a tree holds, as text when printed and as a table in a notebook."""

    rows: tuple[Row, ...]
    leaves: int
    count: int
    nbytes: int

    def __repr__(self) -> str:
        table = [("path", "dtype", "shape", "bytes"), *_cells(self.rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, self._total()])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            shown = [html.escape(cell).replace("  ", "&emsp;") for cell in cells]
            return "<tr>" + "".join(f'<{tag} style="text-align: left">{cell}</{tag}>' for cell in shown) + "</tr>"

        body = "".join(line(cells, "td") for cells in _cells(self.rows))
        return f"<table>{line(('path', 'dtype', 'shape', 'bytes'), 'th')}{body}</table><p>{html.escape(self._total())}</p>"

    def _total(self) -> str:
        return f"total: {self.count:,} elements, {_bytes(self.nbytes)}, {self.leaves} leaves"


@door
def summary(tree: Tree, *, is_leaf: IsLeaf = None) -> Summary:
    """Describe a tree: paths, dtypes, shapes, bytes. Neighbours that are alike, as layers are, share one group of lines.

    Example:
        >>> summary({"embed": torch.zeros(8, 2), "layers": tuple({"k": torch.zeros(2), "q": torch.zeros(2, 2)} for _ in range(30))})
        path         dtype    shape  bytes
        embed        float32  [8,2]  64 B
        layers.0-29                  30 x 24 B
          k          float32  [2]    8 B
          q          float32  [2,2]  16 B
        total: 196 elements, 784 B, 61 leaves
    """
    whole = _row(tree, "", is_leaf)
    return Summary(whole.parts or (whole,), len(leaves(tree, is_leaf=is_leaf)), count(tree), nbytes(tree))


def _row(node: Tree, name: str, is_leaf: IsLeaf) -> Row:
    if isinstance(node, Tensor):
        return Row(name, str(node.dtype).removeprefix("torch."), str(list(node.shape)).replace(" ", ""), nbytes(node))
    if _is_leaf(node, is_leaf):
        return Row(name, type(node).__name__, "", nbytes(node))
    parts: list[Row] = []
    for row in (_row(child, part, is_leaf) for part, child in _open(node)[0]):
        if not row.dtype and not row.parts:
            continue  # nothing is there
        first = parts[-1].name.split("-")[0] if parts else ""
        if first.isdecimal() and row.name.isdecimal() and replace(parts[-1], name=row.name, times=1) == row:
            parts[-1] = replace(parts[-1], name=f"{first}-{row.name}", times=parts[-1].times + 1)
        else:
            parts.append(row)
    if len(parts) == 1 and parts[0].times > 1 and name and not name.isdecimal():
        return replace(parts[0], name=f"{name}.{parts[0].name}")
    return Row(name, "", "", nbytes(node), tuple(parts))


def _cells(rows: Sequence[Row], depth: int = 0) -> Iterator[tuple[str, str, str, str]]:
    for row in rows:
        size = f"{row.times} x {_bytes(row.nbytes)}" if row.times > 1 else _bytes(row.nbytes)
        yield "  " * depth + row.name, row.dtype, row.shape, size
        yield from _cells(row.parts, depth + 1)


def _bytes(n: int) -> str:
    power = min((max(n, 1).bit_length() - 1) // 10, 4)
    return f"{n / 1024**power:.1f} {'KMGT'[power - 1]}iB" if power else f"{n} B"
