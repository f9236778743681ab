"""A tree as a table: paths, dtypes, shapes and bytes."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..core.doors import door
from .mapping import count, leaves, nbytes
from .nodes import IsLeaf, Tree, is_leaf_node, open_node


@dataclass(frozen=True)
class Row:
    """One line of a summary: a leaf or node, and `times`, the number of equal neighbours."""

    name: str
    dtype: str
    shape: str
    nbytes: int  # of one of these
    parts: tuple["Row", ...] = ()
    times: int = 1


@dataclass(frozen=True)
class Summary:
    """A summary of a tree: prints as text, displays as a table in a notebook."""

    rows: tuple[Row, ...]
    leaves: int
    count: int
    nbytes: int

    def __repr__(self) -> str:
        table = [("path", "dtype", "shape", "bytes"), *_cells(self.rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([*lines, self._total()])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            shown = [html.escape(cell).replace("  ", "&emsp;") for cell in cells]
            return (
                "<tr>"
                + "".join(f'<{tag} style="text-align: left">{cell}</{tag}>' for cell in shown)
                + "</tr>"
            )

        body = "".join(line(cells, "td") for cells in _cells(self.rows))
        head = line(("path", "dtype", "shape", "bytes"), "th")
        return f"<table>{head}{body}</table><p>{html.escape(self._total())}</p>"

    def _total(self) -> str:
        return f"total: {self.count:,} elements, {_bytes(self.nbytes)}, {self.leaves} leaves"


@door
def summary(tree: Tree, *, is_leaf: IsLeaf = None) -> Summary:
    """Paths, dtypes, shapes and bytes of a tree; equal neighbours, such as layers, are merged.

    Example:
        >>> import torch
        >>> summary({"embed": torch.zeros(8, 2), "layers": tuple({"k": torch.zeros(2),
        ...     "q": torch.zeros(2, 2)} for _ in range(30))})
        path         dtype    shape  bytes
        embed        float32  [8,2]  64 B
        layers.0-29                  30 x 24 B
          k          float32  [2]    8 B
          q          float32  [2,2]  16 B
        total: 196 elements, 784 B, 61 leaves
    """
    whole = _row(tree, "", is_leaf)
    return Summary(
        whole.parts or (whole,), len(leaves(tree, is_leaf=is_leaf)), count(tree), nbytes(tree)
    )


def _row(node: Tree, name: str, is_leaf: IsLeaf) -> Row:
    if isinstance(node, Tensor):
        return Row(
            name,
            str(node.dtype).removeprefix("torch."),
            str(list(node.shape)).replace(" ", ""),
            nbytes(node),
        )
    if is_leaf_node(node, is_leaf):
        return Row(name, type(node).__name__, "", nbytes(node))
    parts: list[Row] = []
    for row in (_row(child, part, is_leaf) for part, child in open_node(node)[0]):
        if not row.dtype and not row.parts:
            continue  # no leaves
        first = parts[-1].name.split("-")[0] if parts else ""
        if (
            first.isdecimal()
            and row.name.isdecimal()
            and replace(parts[-1], name=row.name, times=1) == row
        ):
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
