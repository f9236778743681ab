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

from .mapping import allclose, cast, count, items, leaves, map, map_with_path, nbytes, paths, stack, to, unstack
from .nodes import INTEGERS, KINDS, IsLeaf, Transform, Tree
from .selection import combine, partition, update
from .summaries import Row, Summary, summary

__all__ = [
    "INTEGERS",
    "KINDS",
    "IsLeaf",
    "Row",
    "Summary",
    "Transform",
    "Tree",
    "allclose",
    "cast",
    "combine",
    "count",
    "items",
    "leaves",
    "map",
    "map_with_path",
    "nbytes",
    "partition",
    "paths",
    "stack",
    "summary",
    "to",
    "unstack",
    "update",
]
