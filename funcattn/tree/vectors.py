"""Trees as vectors: inner product, norm, linear combinations, and the one flat vector of a tree.

A tree of floating tensors is one vector, of which each leaf is a part: a gradient, a tangent, a
direction in the space of params. Integer leaves (a cache's length, the codes of quantized weights)
and None have no place in a vector, so every function here rejects them; `partition(tree)[0]` is the
floating half.

Sums are in float32 at least, and pairwise: an inner product of 10^8 elements in float32 has an
error near 1e-8 of its terms, where BLAS and torch.linalg.vector_norm have 1e-3.
"""

from collections.abc import Callable, Sequence

import optree
import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import transforming
from ..core.doors import door
from .nodes import Tree, is_leaf_node, nodes

CHUNK = 2**18  # elements, 1 MiB in float32
REMEDY = "Split off the other leaves first: fa.tree.partition(tree)[0]."


def vector_leaves(function: str, argument: str, tree: Tree) -> list[Tensor]:
    """The leaves of a tree that is a vector.

    Args:
        function, argument: for the error: the public function, and its argument.

    Raises:
        TypeError: a leaf that is no floating tensor of 16 bits or more, or a None.
    """
    return _flat(function, argument, tree)[0]


def vector_pairs(
    function: str, names: tuple[str, str], first: Tree, second: Tree
) -> list[tuple[Tensor, Tensor]]:
    """The leaves of two vectors of one space, in pairs.

    Raises:
        ValueError: they differ in structure, or in the shape of a leaf.
        TypeError: as `vector_leaves`.
    """
    a, b = names
    ours, here = _flat(function, a, first)
    theirs, there = _flat(function, b, second)
    if here != there:
        remedy = "Two vectors of one space have the same tree, such as params and their gradient."
        errors.fail(function, b, f"of the structure of {a}, {here}", there, remedy)
    for n, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if x.shape != y.shape:
            wanted = f"{errors.shape(x)}{_at(first, n)} as in {a}"
            remedy = "Nothing is broadcast in an operation of vectors."
            errors.fail(function, b, wanted, errors.shape(y), remedy)
    return list(zip(ours, theirs, strict=True))


def _flat(function: str, argument: str, tree: Tree) -> tuple[list[Tensor], optree.PyTreeSpec]:
    """The leaves and the structure; a None is a leaf, and so is rejected."""
    leaves, structure = optree.tree_flatten(tree, none_is_leaf=True)
    for n, leaf in enumerate(leaves):
        if not _is_part(leaf):
            got = str(leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
            wanted = "a tree of floating tensors"
            errors.fail(function, argument, wanted, got + _at(tree, n), REMEDY, TypeError)
    return leaves, structure  # pyright: ignore[reportReturnType]


def _at(tree: Tree, n: int) -> str:
    """Where leaf n is, for messages; nothing for a bare leaf."""
    named = [path for path, node in nodes(tree, None) if node is None or is_leaf_node(node)]
    return f" at {named[n]!r}" if named[n] else ""


def _is_part(leaf: object) -> bool:
    """Whether a leaf is part of a vector; 8-bit floats are codes that need their scale."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.element_size() > 1


@door
def dot(a: Tree, b: Tree) -> Tensor:
    """The inner product of two vectors: the sum over leaves and elements of a * b.

    Args:
        a, b: trees of floating tensors with the same structure and shapes.

    Returns:
        A scalar, in float32 at least; zero for an empty tree.

    Raises:
        TypeError: a leaf that is not floating.
        ValueError: the trees differ.

    Example:
        >>> dot({"w": torch.ones(3), "b": torch.tensor(2.0)},
        ...     {"w": torch.arange(3.0), "b": torch.tensor(5.0)})
        tensor(13.)

    Law: it is the product of the raveled vectors
        (test_vectors.py::test_operations_are_those_of_the_raveled_vectors).
    """
    products = lambda x, y: _wide(x) * _wide(y)
    return _total([_sum(products, x, y) for x, y in vector_pairs("dot", ("a", "b"), a, b)])


@door
def norm(a: Tree) -> Tensor:
    """The 2-norm of a vector: the root of the sum over leaves and elements of a^2.

    Elements are divided by the largest before they are squared, so that no square leaves the range
    of the dtype.

    Args:
        a: a tree of floating tensors.

    Returns:
        A scalar, in float32 at least; zero for an empty tree. The gradient at zero is zero.

    Raises:
        TypeError: a leaf that is not floating.

    Example:
        >>> norm({"w": torch.tensor([3.0, 0.0]), "b": torch.tensor(-4.0)})
        tensor(5.)

    Law: |alpha a| = |alpha| |a| down to the smallest numbers
        (test_vectors.py::test_a_norm_neither_overflows_nor_underflows).
    """
    leaves = vector_leaves("norm", "a", a)
    peak = lambda x: torch.linalg.vector_norm(x.detach(), torch.inf).double()
    peaks = [peak(x) for x in leaves if x.numel()]
    if not peaks:
        return _total([_wide(x).sum() for x in leaves])
    largest = torch.stack(peaks).amax()
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    scaled = lambda x: (_wide(x) / unit.to(_wide(x).dtype)).square()
    squares = _total([_sum(scaled, x) for x in leaves])
    is_zero = squares == 0
    root = torch.where(is_zero, 1.0, squares).sqrt()
    return torch.where(is_zero, 0.0, root * unit.to(squares.dtype))


@door
def axpy(alpha: float | Tensor, x: Tree, y: Tree) -> Tree:
    """alpha * x + y, leaf by leaf, computed in float32 at least; leaves have the dtypes of y.

    Args:
        alpha: a number, or a scalar tensor.
        x, y: trees of floating tensors with the same structure and shapes.

    Raises:
        TypeError: a leaf that is not floating.
        ValueError: the trees differ, or alpha is no scalar.

    Example:
        >>> axpy(2.0, {"w": torch.ones(2)}, {"w": torch.arange(2.0)})
        {'w': tensor([2., 3.])}

    Law: it is that of the raveled vectors
        (test_vectors.py::test_operations_are_those_of_the_raveled_vectors).
    """
    _check_scalar("axpy", alpha)
    made = [
        _plus(_wide(b), alpha, a).to(b.dtype) for a, b in vector_pairs("axpy", ("x", "y"), x, y)
    ]
    return optree.tree_unflatten(optree.tree_structure(y), made)


@door
def scale(alpha: float | Tensor, x: Tree) -> Tree:
    """alpha * x, leaf by leaf; leaves keep their dtypes.

    Args:
        alpha: a number, or a scalar tensor.
        x: a tree of floating tensors.

    Raises:
        TypeError: a leaf that is not floating.
        ValueError: alpha is no scalar.

    Example:
        >>> scale(0.5, {"w": torch.ones(2)})
        {'w': tensor([0.5000, 0.5000])}

    Law: it is that of the raveled vector
        (test_vectors.py::test_operations_are_those_of_the_raveled_vectors).
    """
    _check_scalar("scale", alpha)
    leaves, structure = _flat("scale", "x", x)
    return optree.tree_unflatten(structure, [(alpha * _wide(a)).to(a.dtype) for a in leaves])


@door
def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """One flat vector of all leaves, and the function that makes the tree of such a vector.

    Args:
        tree: a tree of floating tensors.

    Returns:
        (vector, unravel): vector (N,), in the dtype to which all leaves promote; unravel(vector) of
        a vector (N,) has the structure, shapes and dtypes of the tree.

    Raises:
        TypeError: a leaf that is not floating.
        ValueError: by unravel, of a vector of another shape.

    Example:
        >>> vector, unravel = ravel({"w": torch.ones(2, 2), "b": torch.zeros(1)})
        >>> vector, unravel(vector)["w"].shape
        (tensor([0., 1., 1., 1., 1.]), torch.Size([2, 2]))

    Law: unravel(ravel(tree)[0]) == tree
        (test_vectors.py::test_unravel_undoes_ravel).
    """
    leaves, structure = _flat("ravel", "tree", tree)
    shapes, dtypes = [x.shape for x in leaves], [x.dtype for x in leaves]
    sizes = [shape.numel() for shape in shapes]
    dtype = torch.float32 if not leaves else dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    flat = [x.reshape(-1).to(dtype) for x in leaves]
    vector = torch.cat(flat) if flat else torch.zeros(0)

    def unravel(vector: Tensor) -> Tree:
        """The tree of a flat vector."""
        if not isinstance(vector, Tensor) or vector.shape != (sum(sizes),):
            got = errors.shape(vector) if isinstance(vector, Tensor) else type(vector).__name__
            remedy = "It has the elements of all leaves, in their order."
            errors.fail("unravel", "vector", f"({sum(sizes)},)", got, remedy)
        parts = vector.split(sizes) if sizes else ()
        made = [
            part.reshape(shape).to(dtype)
            for part, shape, dtype in zip(parts, shapes, dtypes, strict=True)
        ]
        return optree.tree_unflatten(structure, made)

    return vector, unravel


def less_projection(vector: Tree, basis: Sequence[Tree]) -> Tree:
    """A vector less its part in an orthonormal basis, by two passes of classical Gram-Schmidt.

    The second pass removes what rounding left in the first; more change nothing (Parlett, The
    symmetric eigenvalue problem, section 6.9).
    """
    for _ in range(2 if basis else 0):
        parts = [dot(other, vector) for other in basis]
        leaves, structure = _flat("dot", "vector", vector)
        sums = [_wide(x) for x in leaves]
        for n, (part, other) in enumerate(zip(parts, basis, strict=True)):
            # What an earlier step made is written into: vectors are large, and new memory is slow.
            reuses = n > 0 and not transforming()
            pairs = zip(sums, vector_leaves("dot", "basis", other), strict=True)
            sums = [_plus(x, -part, y, reuses=reuses) for x, y in pairs]
        made = [x.to(leaf.dtype) for x, leaf in zip(sums, leaves, strict=True)]
        vector = optree.tree_unflatten(structure, made)
    return vector


def _plus(total: Tensor, alpha: float | Tensor, x: Tensor, *, reuses: bool = False) -> Tensor:
    """total + alpha x in one pass; in the memory of total where `reuses`."""
    x = x.to(total.dtype)
    if not isinstance(alpha, Tensor):
        return torch.add(total, x, alpha=alpha)
    factor = alpha.to(total.device, total.dtype)
    return total.addcmul_(x, factor) if reuses else torch.addcmul(total, x, factor)


def _sum(f: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
    """The sum of an elementwise function, a chunk at a time: its values stay in the cache."""
    if leaves[0].numel() <= CHUNK:
        return f(*leaves).sum()
    chunks = zip(*(x.reshape(-1).split(CHUNK) for x in leaves), strict=True)
    return torch.stack([f(*chunk).sum() for chunk in chunks]).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _total(parts: list[Tensor]) -> Tensor:
    """The sum of scalars, in the widest of their dtypes."""
    total = torch.zeros(()) if not parts else parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _check_scalar(function: str, alpha: float | Tensor) -> None:
    if isinstance(alpha, Tensor) and alpha.dim():
        remedy = "It multiplies all leaves alike."
        errors.fail(function, "alpha", "a scalar", errors.shape(alpha), remedy)
