"""The global norm of a gradient: over all leaves, and on a mesh over all shards of each.

|g| = sqrt(sum over leaves, and over the devices that shard a leaf, of |shard|^2)
"""

import torch
from torch import Tensor

from .. import collectives, tree
from ..core import errors
from ..sharding.mesh import broadcast
from ..tree import Tree


def norm(gradients: Tree, *, specs: Tree = None) -> Tensor:
    """The 2-norm of all leaves as one vector, () in float32 at least; zero for an empty tree.

    Args:
        specs: on a mesh, how leaves are sharded: a tree of `sharding.P`, or a prefix of it; P()
            where all are replicated. The norm is that of the unsharded leaves.

    Raises:
        ValueError: axes of a mesh are bound, and there are no specs.

    Law: equals the norm of the whole tree
        (test_sharding.py::test_a_norm_is_that_of_the_whole_leaves).
    """
    lengths = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
        for g in tree.leaves(gradients)
    ]
    lengths = collectives.global_norms(lengths, cut_axes("norm", gradients, specs))
    return torch.linalg.vector_norm(torch.stack(lengths)) if lengths else torch.zeros(())


def cut_axes(function: str, tree_: Tree, specs: Tree) -> list[tuple[str, ...]]:
    """For each leaf the axes of a mesh that it is sharded over; none where no axis is bound."""
    if not collectives.bound():
        return [()] * len(tree.leaves(tree_))
    if specs is None:
        remedy = (
            "Give those of params: fa.sharding.specs(params, mesh, rules), or P() where all are "
            "whole."
        )
        errors.fail(function, "specs", "given where axes of a mesh are bound", None, remedy)
    return [spec.axes() for spec in broadcast(specs, tree_, function)]
