"""Trees of tensors: map, name, select, stack, measure, print; and vectors, of floating leaves.

A path is the sequence of field names, keys and indices to a leaf, joined by dots: `layers.0.q`. A
predicate `is_leaf` treats a node as a leaf, so a weight keeps its path when it becomes a record:

    paths(params)                          ("embed", "layers.0.q", ...)
    paths(quantized)                       ("embed.codes", "embed.scale", "layers.0.q.codes", ...)
    paths(quantized, is_leaf=is_weight)    ("embed", "layers.0.q", ...)

The empty tuple is the value of an absent field of a record, and what `partition` puts in place of a
leaf of the other half: it has no leaves, here and for torch.func. None is no leaf here but is one
for torch.func; functions here keep it, and `partition`, whose halves are for torch.func, rejects
it.

Trees are flattened and rebuilt by optree (which orders a dict by its keys), and work on tracers of
torch.func. All but `summary` and `allclose` compile with fullgraph=True, as long as the results of
f in `map` are tensors: Dynamo (2.13) cannot rebuild a tree of constants.
"""

from .mapping import (
    allclose,
    cast,
    count,
    items,
    leaves,
    map,
    map_with_path,
    nbytes,
    paths,
    stack,
    to,
    unstack,
)
from .nodes import INTEGERS, KINDS, IsLeaf, Transform, Tree
from .selection import Where, combine, partition, predicate, update
from .summaries import Row, Summary, summary
from .vectors import axpy, dot, norm, ravel, scale

__all__ = [
    "INTEGERS",
    "KINDS",
    "IsLeaf",
    "Row",
    "Summary",
    "Transform",
    "Tree",
    "Where",
    "allclose",
    "axpy",
    "cast",
    "combine",
    "count",
    "dot",
    "items",
    "leaves",
    "map",
    "map_with_path",
    "nbytes",
    "norm",
    "partition",
    "paths",
    "predicate",
    "ravel",
    "scale",
    "stack",
    "summary",
    "to",
    "unstack",
    "update",
]
