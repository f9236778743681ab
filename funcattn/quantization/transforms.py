"""quantize and dequantize: transforms of params."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from .. import progress, tree
from ..core import errors
from ..core.doors import door
from ..layers import Weight
from ..models import Model
from ..tree import Tree, Where
from ..tree.selection import chooses_none
from .formats import expand, is_quantized
from .schemes import Scheme, int8

MATRICES = r"(.*\.)?(q|k|v|o|gate|up|down|q_down|kv_down|mixer_in|mixer_gate|mixer_out)"
ENDS = r"embedding|head|layer_embedding"
# not chosen by default
LEFT = r"(.*\.)?(shared_(gate|up|down)|attention_gate|input_(gate|out)|laurel_(up|down)"
LEFT += r"|mixer_(gate|rate)_down)|layer_projection|embedding_(in|out)|streams_(in|out)"


def is_multiplied(path: str) -> bool:
    """True for the path of a weight that layers only multiply or embed: it may be a record.

    Example:
        >>> is_multiplied("layers.0.q"), is_multiplied("layers.0.router")
        (True, False)
    """
    return re.fullmatch(f"{MATRICES}|{ENDS}|{LEFT}", path) is not None


@door
def quantize(scheme: Scheme, where: Where | None = None) -> Callable[[Tree], Tree]:
    """A transform of params that replaces matrices by quantized records.

    A matrix is a leaf of two axes (of experts three: each matrix is encoded separately). Records
    are not changed, so quantizing twice is quantizing once. A tied head is the embedding: one
    record for both.

    Args:
        scheme: int8, int4, w8a8, nf4, fp8, ternary, or another `Scheme`.
        where: a regular expression that the whole path must match, or a predicate of (path,
            weight); all selected leaves use `scheme`. None selects q, k, v, o, gate, up and down,
            and mixer_in, mixer_gate and mixer_out, of every layer, and embedding, layer_embedding
            and head with `scheme.for_head`; norms, biases, routers and learned positions are not
            quantized.

    Raises:
        ValueError: a weight with NaN or Inf, or that the scheme cannot encode (the message names
            the path); or no leaf matches.
        TypeError: a selected leaf that is not a floating matrix; another scheme or where.

    Law: paths are kept, the argument is unchanged, quantizing twice is quantizing once
        (test_quantization.py).
    """
    if isinstance(scheme, (str, type)) or not hasattr(scheme, "encode"):  # str has an encode method
        remedy = "Pass fa.int8, fa.int4(group=64) or another scheme."
        errors.fail(
            "quantize", "scheme", "a scheme", f"a {type(scheme).__name__}", remedy, TypeError
        )
    choose = None if where is None else tree.predicate("quantize", where)

    def chosen(path: str, leaf: Tensor) -> Weight:
        if choose is not None:
            return scheme if choose(path, leaf) else None
        if re.fullmatch(MATRICES, path):
            return scheme
        return getattr(scheme, "for_head", int8) if re.fullmatch(ENDS, path) else None

    @door(name="quantize(scheme)")
    def transform(params: Tree) -> Tree:
        if isinstance(params, Model) or not tree.leaves(params):
            got = (
                "a Model"
                if isinstance(params, Model)
                else f"a {type(params).__name__} without leaves"
            )
            remedy = "Pass the params: fa.load returns (config, params, tokenizer)."
            errors.fail("quantize", "params", "a tree of weights", got, remedy, TypeError)
        met = []

        def encode(path: str, leaf: Weight) -> Weight:
            if is_quantized(leaf):
                met.append(path)
                return leaf
            by = chosen(path, leaf)
            if by is None:
                return leaf
            met.append(path)
            _check(path, leaf)
            try:
                matrices = [
                    by.encode(matrix)
                    for matrix in leaf.reshape(-1, *leaf.shape[-2:]).detach().contiguous()
                ]
            except ValueError as error:
                raise ValueError(f"quantize: {path}: {error}") from error
            return tree.stack(matrices) if leaf.dim() > 2 else matrices[0]

        with progress.waiting("quantizing"):
            out = tree.map_with_path(encode, params, is_leaf=is_quantized)
        if not met:
            chooses_none("quantize", where)
        return out

    return transform


def _check(path: str, leaf: Weight) -> None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() not in (2, 3):
        got = (
            f"{leaf.dtype} {tuple(leaf.shape)}"
            if isinstance(leaf, Tensor)
            else f"a {type(leaf).__name__}"
        )
        errors.fail("quantize", path, "a floating matrix", got, "Leave it out by where.", TypeError)
    # DTensor shifts integers wrongly without an error (torch 2.13).
    remedy = (
        "Quantize before fa.shard, or each part: fa.shard_map(fa.quantize(scheme), mesh, in_specs, "
        "out_specs)."
    )
    errors.whole("quantize", path, [leaf], remedy)
    if not leaf.numel():
        errors.fail(
            "quantize",
            path,
            "a matrix with numbers in it",
            f"one of shape {tuple(leaf.shape)}",
            "Leave it out by where.",
        )
    if errors.is_true(~leaf.isfinite()):
        errors.fail(
            "quantize",
            path,
            "finite",
            "NaN or Inf",
            "Mend the weights: a scale would spread it over its group.",
        )


@door
def dequantize(params: Tree, dtype: torch.dtype = torch.float32) -> Tree:
    """The tree with every quantized record replaced by its matrix.

    Args:
        params: a tree; other leaves are not copied.
        dtype: of the matrices.

    Example:
        >>> import funcattn as fa
        >>> small = fa.quantize(fa.int8, "w")({"w": torch.ones(4, 32)})
        >>> dequantize(small)["w"].shape
        torch.Size([4, 32])
    """
    errors.whole(
        "dequantize", "params", tree.leaves(params), "Gather them first: fa.gather(params)."
    )
    one = lambda leaf: expand(leaf).to(dtype) if is_quantized(leaf) else leaf
    return tree.map(one, params, is_leaf=is_quantized)
