"""quantize, dequantize, report: from tree to tree."""

import re
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, progress, tree
from ..records import Model
from ..tree import Tree
from .schemes import Scheme, int8
from .weights import Int4, Int8, Int8Dynamic, expand, is_nearest, is_quantized

Where = str | Callable[[str, Tensor], bool]
MATRICES = r"(.*\.)?(q|k|v|o|gate|up|down)"
ENDS = r"embedding|head"


def quantize(scheme: Scheme, where: Where | None = None) -> Callable[[Tree], Tree]:
    """A transform of params whose chosen matrices become quantized records.

    A matrix is a leaf of two axes (of experts three: each matrix is encoded by itself). Records that are there already stay, so
    quantizing twice is quantizing once. A tied head is the embedding, one record used twice.

    Args:
        scheme: int8, int4, w8a8, nf4, fp8, ternary, or one's own.
        where: a regex that the whole path must match, or a predicate of (path, weight); both take the scheme for what they choose.
            None chooses q, k, v, o, gate, up and down of every layer, and the embedding and the head in `scheme.for_head`; norms,
            biases, routers and learned positions stay.

    Raises:
        ValueError: a weight with NaN or Inf, or that the scheme cannot encode; both name the path. Nothing that matches.
        TypeError: a chosen leaf that is not a floating matrix; another scheme or where.

    Law: paths are kept, the argument is unchanged, quantizing twice is quantizing once (test_quantization.py).
    """
    if isinstance(scheme, (str, type)) or not hasattr(scheme, "encode"):  # a str has an encode of its own
        remedy = "Pass fa.int8, fa.int4(group=64) or another scheme."
        _checks.fail("quantize", "scheme", "a scheme", f"a {type(scheme).__name__}", remedy, TypeError)
    if where is not None and not isinstance(where, str) and not callable(where):
        remedy = "A path looks like layers.0.q."
        _checks.fail("quantize", "where", "a regex or a predicate of (path, weight)", repr(where), remedy, TypeError)

    def chosen(path: str, leaf: Tensor) -> Any:
        if where is None:
            if re.fullmatch(MATRICES, path):
                return scheme
            return getattr(scheme, "for_head", int8) if re.fullmatch(ENDS, path) else None
        return scheme if (re.fullmatch(where, path) if isinstance(where, str) else where(path, leaf)) else None

    def transform(params: Tree) -> Tree:
        if isinstance(params, Model) or not tree.leaves(params):
            got = "a Model" if isinstance(params, Model) else f"a {type(params).__name__} without leaves"
            remedy = "Pass the params: fa.load returns (config, params, tokenizer)."
            _checks.fail("quantize", "params", "a tree of weights", got, remedy, TypeError)
        met = []

        def encode(path: str, leaf: Any) -> Any:
            if is_quantized(leaf):
                met.append(path)
                return leaf
            by = chosen(path, leaf)
            if by is None:
                return leaf
            met.append(path)
            _check(path, leaf)
            try:
                matrices = [by.encode(matrix) for matrix in leaf.reshape(-1, *leaf.shape[-2:]).detach().contiguous()]
            except ValueError as error:
                raise ValueError(f"quantize: {path}: {error}") from error
            return tree.stack(matrices) if leaf.dim() > 2 else matrices[0]

        with progress.waiting("quantizing"):
            out = tree.map_with_path(encode, params, is_leaf=is_quantized)
        if not met:
            remedy = "Look at the paths: funcattn.tree.paths(params)."
            _checks.fail("quantize", "where", "a rule that chooses a leaf", f"{where!r}, which chooses none", remedy)
        return out

    return transform


def _check(path: str, leaf: Any) -> None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() not in (2, 3):
        got = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        _checks.fail("quantize", path, "a floating matrix", got, "Leave it out by where.", TypeError)
    # Operators of DTensor shift integers wrongly in silence (torch 2.13).
    remedy = "Quantize before fa.shard, or each part: fa.shard_map(fa.quantize(scheme), mesh, in_specs, out_specs)."
    _checks.whole("quantize", path, [leaf], remedy)
    if not leaf.numel():
        _checks.fail("quantize", path, "a matrix with numbers in it", f"one of shape {tuple(leaf.shape)}", "Leave it out by where.")
    if _checks.is_true(~leaf.isfinite()):
        _checks.fail("quantize", path, "finite", "NaN or Inf", "Mend the weights: a scale would spread it over its group.")


def dequantize(params: Tree, dtype: torch.dtype = torch.float32) -> Tree:
    """The tree with every quantized record as the matrix that it stands for, in a dtype."""
    _checks.whole("dequantize", "params", tree.leaves(params), "Gather them first: fa.gather(params).")
    one = lambda leaf: expand(leaf).to(dtype) if is_quantized(leaf) else leaf
    return tree.map(one, params, is_leaf=is_quantized)


class Row(NamedTuple):
    """One leaf of a report."""

    path: str
    kind: str
    bits: float  # a weight
    nbytes: int
    error: float  # |approximation - weight| / |weight|, Frobenius
    note: str = ""


class Report(tuple[Row, ...]):
    """Rows of `report`: a table when printed, HTML in a notebook."""

    def __str__(self) -> str:
        cells = [("path", "kind", "bits", "bytes", "relative error", "")]
        cells += [(r.path, r.kind, f"{r.bits:.2f}", str(r.nbytes), f"{r.error:.2%}" if r.error else "-", r.note) for r in self]
        bits = sum(r.nbytes for r in self) * 8 / max(1.0, sum(r.nbytes * 8 / r.bits for r in self))
        cells.append(("total", "", f"{bits:.2f}", str(sum(r.nbytes for r in self)), "", ""))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = [(r.path, r.kind, f"{r.bits:.2f}", f"{r.nbytes:,}", r.error, r.note) for r in self]
        worst = max((r.error for r in self), default=0.0) or 1.0
        row = lambda path, kind, bits, size, error, note: (
            f"<tr><td>{escape(path)}</td><td>{kind}</td><td>{bits}</td><td>{size}</td>"
            f'<td style="background:rgba(220,60,40,{error / worst * 0.6:.2f})">{f"{error:.2%}" if error else "-"}</td>'
            f"<td>{note}</td></tr>"
        )
        head = "".join(f"<th>{name}</th>" for name in ("path", "kind", "bits", "bytes", "relative error", ""))
        return f"<table><tr>{head}</tr>{''.join(row(*line) for line in lines)}</table>"


def report(params: Tree, quantized: Tree) -> Report:
    """What quantization did to each leaf: bits a weight, bytes, and the relative error of the matrix.

    Of experts in 4 or 8 bits it notes how many are rounded to nearest: all of them by `quantize`, by `fa.gptq` those that the text
    reached too seldom.

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
            _checks.fail("report", "quantized", f"a tree with a leaf {path}", "none", remedy)
        size, error, kind, note = tree.nbytes(node), 0.0, str(weight.dtype).removeprefix("torch."), ""
        if is_quantized(node):
            kind = type(node).__name__
            approximation = torch.func.vmap(expand)(node) if weight.dim() > 2 else expand(node)
            note = _note(node, weight) if weight.dim() == 3 and isinstance(node, (Int4, Int8, Int8Dynamic)) else ""
            error = float((approximation.double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-300))
        rows.append(Row(path, kind, size * 8 / max(1, weight.numel()), size, error, note))
    return Report(rows)


def _note(node: Any, weight: Tensor) -> str:
    pairs = zip(tree.unstack(node), weight, strict=True)
    count = sum(is_nearest(record, matrix) for record, matrix in pairs)
    return f"{count} of {len(weight)} experts to nearest" if count else ""
