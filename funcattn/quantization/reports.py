"""Reports of quantization: size and error of each leaf."""

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..core import errors
from ..core.doors import door
from ..tree import Tree
from .formats import Int4, Int8, Int8Dynamic, expand, is_nearest, is_quantized

LAYER = re.compile(r"layers\.(\d+)")


class Row(NamedTuple):
    """One leaf of a report."""

    path: str
    kind: str
    bits: float  # per weight
    nbytes: int
    error: float  # |approximation - weight| / |weight|, Frobenius
    note: str = ""


class Report(tuple[Row, ...]):
    """Rows of `report`, one per leaf: a short table when printed, HTML with all in a notebook."""

    def __str__(self) -> str:
        """A line for all leaves of one name and type: total bits and bytes, range of the errors."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in self:
            groups.setdefault((LAYER.sub("layers.*", row.path), row.kind, row.note), []).append(row)
        cells = [("path", "kind", "bits", "bytes", "relative error", "")]
        for (path, kind, note), rows in groups.items():
            errors = [row.error for row in rows]
            told = (
                f"{min(errors):.2%}" + (f" to {max(errors):.2%}" if len(errors) > 1 else "")
                if any(errors)
                else "-"
            )
            cells.append(
                (
                    _place(path, rows),
                    kind,
                    _bits(rows),
                    f"{sum(row.nbytes for row in rows):,}",
                    told,
                    note,
                )
            )
        cells.append(("total", "", _bits(self), f"{sum(row.nbytes for row in self):,}", "", ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = [(r.path, r.kind, f"{r.bits:.2f}", f"{r.nbytes:,}", r.error, r.note) for r in self]
        worst = max((r.error for r in self), default=0.0) or 1.0
        shade = lambda error: f"background:rgba(220,60,40,{error / worst * 0.6:.2f})"
        row = lambda path, kind, bits, size, error, note: (
            f"<tr><td>{escape(path)}</td><td>{kind}</td><td>{bits}</td><td>{size}</td>"
            f'<td style="{shade(error)}">{f"{error:.2%}" if error else "-"}</td>'
            f"<td>{note}</td></tr>"
        )
        head = "".join(
            f"<th>{name}</th>" for name in ("path", "kind", "bits", "bytes", "relative error", "")
        )
        return f"<table><tr>{head}</tr>{''.join(row(*line) for line in lines)}</table>"


def _place(path: str, rows: Sequence[Row]) -> str:
    """The common path of rows of several layers, with their numbers."""
    numbers = [int(found[1]) for row in rows if (found := LAYER.match(row.path))]
    if not numbers:
        return path
    is_run = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return path.replace(
        "*", f"{numbers[0]}-{numbers[-1]}" if is_run else ",".join(map(str, numbers))
    )


def _bits(rows: Sequence[Row]) -> str:
    """Mean bits per weight."""
    weights = sum(row.nbytes * 8 / row.bits for row in rows)
    return f"{sum(row.nbytes for row in rows) * 8 / max(1.0, weights):.2f}"


@door
def report(params: Tree, quantized: Tree) -> Report:
    """Bits per weight, bytes, and relative error of each quantized leaf.

    For experts in 4 or 8 bits it states how many are rounded to nearest: with `quantize` all of
    them, with `fa.gptq` those that too few tokens of the text were routed to.

    Args:
        params: the tree before.
        quantized: the tree after, of the same paths.
    """
    after = dict(tree.items(quantized, is_leaf=is_quantized))
    rows = []
    for path, weight in tree.items(params):
        node = after.get(path)
        if node is None:
            remedy = "Pass the tree before and the tree after."
            errors.fail("report", "quantized", f"a tree with a leaf {path}", "none", remedy)
        size, error, kind, note = (
            tree.nbytes(node),
            0.0,
            str(weight.dtype).removeprefix("torch."),
            "",
        )
        if is_quantized(node):
            kind = type(node).__name__
            approximation = torch.func.vmap(expand)(node) if weight.dim() > 2 else expand(node)
            note = (
                _note(node, weight)
                if weight.dim() == 3 and isinstance(node, (Int4, Int8, Int8Dynamic))
                else ""
            )
            error = float(
                (approximation.double() - weight.double()).norm()
                / weight.double().norm().clamp(min=1e-300)
            )
        rows.append(Row(path, kind, size * 8 / max(1, weight.numel()), size, error, note))
    return Report(rows)


def _note(node: object, weight: Tensor) -> str:
    pairs = zip(tree.unstack(node), weight, strict=True)
    count = sum(is_nearest(record, matrix) for record, matrix in pairs)
    return f"{count} of {len(weight)} experts to nearest" if count else ""
