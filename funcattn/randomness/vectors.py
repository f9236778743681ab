"""Random vectors in the form of a tree: for Lanczos, and for estimates of traces and diagonals."""

from collections.abc import Callable

import optree
import torch
from torch import Tensor

from ..core.doors import door
from ..records import Tree
from ..tree.vectors import vector_leaves
from .draws import bernoulli, normal
from .keys import Key, check_key, fold_in


@door
def normal_like(key: Key, tree: Tree) -> Tree:
    """Draw every element of a tree from the standard normal distribution.

    Leaf i, in the order of `fa.tree.leaves`, is normal(fold_in(key, i), shape, dtype): the same
    bits under every transform, on every device, and beside whatever else is drawn.

    Args:
        key: int64 (2,).
        tree: floating tensors, of which shapes, dtypes and devices count.

    Returns:
        A tree of the same structure, shapes, dtypes and devices.

    Raises:
        TypeError: a leaf that is not floating; or not one key.

    Example:
        >>> from funcattn import key
        >>> normal_like(key(0), {"w": torch.zeros(2), "b": torch.zeros(())})
        {'w': tensor([-2.4425, -2.0357]), 'b': tensor(1.0040)}

    Law: each leaf is the draw of its own key
        (test_randomness_vectors.py::test_each_leaf_is_a_draw_of_its_own_key).
    """
    return _drawn("normal_like", key, tree, lambda key, x: normal(key, x.shape, x.dtype))


@door
def rademacher_like(key: Key, tree: Tree) -> Tree:
    """Draw every element of a tree from -1 and 1, each with probability 1/2.

    Leaf i, in the order of `fa.tree.leaves`, is 2 * bernoulli(fold_in(key, i), 0.5, shape) - 1,
    which are the bits of jax.random.rademacher. Of all independent entries of mean 0 and variance
    1, these give v.Av the least variance: that of the off-diagonal part of A alone.

    Args:
        key: int64 (2,).
        tree: floating tensors, of which shapes, dtypes and devices count.

    Returns:
        A tree of the same structure, shapes, dtypes and devices.

    Raises:
        TypeError: a leaf that is not floating; or not one key.

    Example:
        >>> from funcattn import key
        >>> rademacher_like(key(0), {"w": torch.zeros(4)})
        {'w': tensor([-1.,  1.,  1.,  1.])}

    Law: each leaf is the draw of its own key
        (test_randomness_vectors.py::test_each_leaf_is_a_draw_of_its_own_key).
    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989.
    """
    signs = lambda key, x: torch.where(bernoulli(key, 0.5, x.shape), 1.0, -1.0).to(x.dtype)
    return _drawn("rademacher_like", key, tree, signs)


def _drawn(function: str, key: Key, tree: Tree, draw: Callable[[Key, Tensor], Tensor]) -> Tree:
    check_key(function, key)
    leaves = vector_leaves(function, "tree", tree)
    made = [draw(fold_in(key, n).to(x.device), x) for n, x in enumerate(leaves)]
    return optree.tree_unflatten(optree.tree_structure(tree), made)
