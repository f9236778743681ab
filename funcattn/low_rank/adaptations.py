"""Low-rank adaptation: a trained update of low rank beside a frozen weight.

    W x   becomes   W x + scale b (a x)        a (r, in), b (out, r), r much smaller than either
    DoRA  is        gain (W x + scale b (a x))       gain (out,): magnitude / |row of W + scale b a|

An adapted weight is a record registered with `layers.linear` and `layers.embed`; the decoder is
unchanged. The base goes through `linear` too: it may be a tensor, a quantized record, or another
adaptation.

    params = lora(8)(key, params)
    trained, frozen = tree.partition(params, is_trained)
    grad(lambda trained: loss(tree.combine(trained, frozen)))(trained)

Source: Hu et al., LoRA: low-rank adaptation of large language models, arXiv:2106.09685; Liu et
    al., DoRA: weight-decomposed low-rank adaptation, arXiv:2402.09353.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import randomness, tree
from ..core import errors
from ..core.doors import door
from ..core.tangents import affine
from ..layers import Weight, dense, embed, linear
from ..records import ABSENT, is_absent, record
from ..tree import Tree, Where

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # of attention and feed-forward


@record
class Lora(NamedTuple):
    """A weight and what is added to it: base + scale b a, its rows times gain.

    base: (out, in), any weight; a: (r, in); b: (out, r); scale: (), alpha / r; gain: (out,), of
    DoRA, else (). The gain is DoRA's magnitude over the norms of the rows as they are when it is
    made, so a product costs what one without it does.
    """

    base: Weight
    a: Tensor
    b: Tensor
    scale: Tensor
    gain: Weight = ABSENT

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight, (out, in)."""
        return tuple(self.base.shape)


@linear.register
def _(weight: Lora, x: Tensor) -> Tensor:
    y, wide = linear(weight.base, x), _widest(x, weight)
    added = affine(affine(x.to(wide), weight.a.to(wide)), weight.b.to(wide)) * weight.scale.to(wide)
    if not is_absent(weight.gain):
        return ((y + added) * weight.gain.to(wide)).to(y.dtype)
    return (y + added).to(y.dtype)


@dense.register
def _(weight: Lora, columns: int, like: Tensor) -> Tensor:
    added = (weight.b @ weight.a) * weight.scale
    return dense(weight.base, columns, like) + added.to(like.dtype)


@embed.register
def _(weight: Lora, ids: Tensor) -> Tensor:
    rows = embed(weight.base, ids)
    wide = _widest(rows, weight)
    added = F.embedding(ids, weight.b.to(wide)) @ weight.a.to(wide) * weight.scale.to(wide)
    if not is_absent(weight.gain):
        return ((rows + added) * weight.gain.to(wide)[ids].unsqueeze(-1)).to(rows.dtype)
    return (rows + added).to(rows.dtype)


def _widest(x: Tensor, weight: Lora) -> torch.dtype:
    """The dtype that holds x, a and b: that of all three, where they agree."""
    return torch.promote_types(x.dtype, torch.promote_types(weight.a.dtype, weight.b.dtype))


def is_adapted(node: object) -> bool:
    """True for a Lora record: `is_leaf` for functions of `fa.tree` that should see the weight's own
    path.
    """
    return isinstance(node, Lora)


def is_trained(path: str, leaf: object) -> bool:
    """True for the leaves a, b and gain of adaptations: the predicate of `partition` for trained
    and frozen leaves.

    Example:
        >>> from funcattn import randomness
        >>> params = lora(2)(randomness.key(0), {"q": torch.zeros(4, 3), "norm": torch.ones(3)})
        >>> tree.paths(tree.partition(params, is_trained)[0])
        ['q.a', 'q.b']
    """
    return path.rpartition(".")[2] in ("a", "b", "gain")


@door
def lora(
    rank: int, where: Where | None = None, *, alpha: float | None = None
) -> Callable[[Tensor, Tree], Tree]:
    """A function (key, params) -> params with adaptations of the weights chosen.

    a is uniform within 1 / sqrt(in) of zero, b is zero: the function is unchanged until b is
    trained.

    Args:
        rank: r.
        where: a regex that the whole path must match, or a predicate of (path, weight), as in
            `quantize`. None chooses q, k, v, o, gate, up and down of every layer.
        alpha: scale is alpha / rank. None is alpha = 2 rank.

    Raises:
        ValueError: nothing is chosen, or something that is no matrix, or a rank above a matrix's
            sizes.

    Law: the function is unchanged
        (test_adaptations.py::test_an_adapted_model_is_the_same_function).
    """
    if not isinstance(rank, int) or rank < 1:
        errors.fail(
            "lora", "rank", "1 or more", rank, "It is the number of directions that are added."
        )
    if alpha is not None and not 0 < alpha < math.inf:
        errors.fail(
            "lora", "alpha", "above 0", alpha, "What is added is multiplied by alpha / rank."
        )
    default = lambda path, weight: path.rpartition(".")[2] in MATRICES
    choose = default if where is None else tree.predicate("lora", where)
    scale = 2.0 if alpha is None else alpha / rank

    @door(name="lora(rank)")
    def adapt(key: Tensor, params: Tree) -> Tree:
        chosen = [
            path for path, weight in tree.items(params, is_leaf=is_weight) if choose(path, weight)
        ]
        if not chosen:
            errors.fail(
                "lora",
                "where",
                "true of some weight",
                "none",
                f"Paths are such as {tree.paths(params)[:3]}.",
            )
        keys = dict(zip(chosen, randomness.split(key, len(chosen)), strict=True))

        def adapted(path: str, weight: Weight) -> Weight:
            return _begin(keys[path], path, weight, rank, scale) if path in keys else weight

        return tree.map_with_path(adapted, params, is_leaf=is_weight)

    return adapt


@door
def merge_lora(params: Tree) -> Tree:
    """The same function with plain weights: base + scale b a, its rows times the gain of DoRA.

    Args:
        params: a tree with leaves that `lora` adapted; the others are shared.

    Raises:
        TypeError: a base that is no tensor, such as a quantized one.

    Law: it computes what the adapted one does
        (test_adaptations.py::test_a_merged_model_is_the_same_function).
    """

    def merge(path: str, weight: Weight) -> Weight:
        if not is_adapted(weight):
            return weight
        base = merge(path, weight.base)
        if not isinstance(base, Tensor):
            remedy = "Dequantize the bases first, or keep the adaptation beside them."
            errors.fail(
                "merge_lora",
                f"the base at {path!r}",
                "a tensor",
                f"a {type(base).__name__}",
                remedy,
                TypeError,
            )
        return adapted_matrix(base, weight).to(base.dtype)

    return tree.map_with_path(merge, params, is_leaf=is_adapted)


def adapted_matrix(base: Tensor, weight: Lora) -> Tensor:
    """The matrix (out, in) of an adaptation of a base: rounded once, in the widest dtype."""
    wide = _widest(base, weight)
    matrix = base + weight.scale.to(wide) * weight.b.to(wide) @ weight.a.to(wide)
    return matrix if is_absent(weight.gain) else matrix * weight.gain.to(wide).unsqueeze(-1)


def row_norms(weight: Lora) -> Tensor:
    """The norms (out,) of the rows of base + scale b a, in float32 at least."""
    base = weight.base
    if not isinstance(base, Tensor):  # each column of the matrix is what a unit vector gives
        base = linear(base, torch.eye(weight.a.shape[1], device=weight.a.device)).mT
    wide = torch.promote_types(base.dtype, torch.float32)
    return torch.linalg.vector_norm(adapted_matrix(base.to(wide), weight._replace(gain=())), dim=-1)


@door
def without_lora(params: Tree) -> Tree:
    """The params as they were before they were adapted."""
    return tree.map(
        lambda weight: weight.base if is_adapted(weight) else weight, params, is_leaf=is_adapted
    )


def is_weight(node: object) -> bool:
    """A record that layers.linear knows: its own path is the weight's."""
    return optree.is_namedtuple(node) and linear.dispatch(type(node)) is not linear.dispatch(object)


def _begin(key: Tensor, path: str, weight: Weight, rank: int, scale: float) -> Lora:
    out, inner, dtype, device = _sizes(path, weight)
    if rank > min(out, inner):
        errors.fail(
            "lora",
            "rank",
            f"at most {min(out, inner)}, a size of {path!r}",
            rank,
            "A low rank is a small one.",
        )
    bound = inner**-0.5
    a = randomness.uniform(key, (rank, inner), minval=-bound, maxval=bound).to(
        device=device, dtype=dtype
    )
    b = torch.zeros(out, rank, dtype=dtype, device=device)
    return Lora(weight, a, b, torch.full((), scale, dtype=torch.float32, device=device))


def _sizes(path: str, weight: Weight) -> tuple[int, int, torch.dtype, torch.device]:
    """(out, in) of any weight and what it computes in, asked of the function that it is."""
    if isinstance(weight, Tensor):
        if weight.dim() != 2 or not weight.is_floating_point():
            got = f"{weight.dtype} {errors.shape(weight)} at {path!r}"
            errors.fail(
                "lora",
                "where",
                "true of floating matrices (out, in)",
                got,
                "Leave norms and biases out.",
            )
        return weight.shape[0], weight.shape[1], weight.dtype, weight.device
    if is_adapted(weight):
        return weight.b.shape[0], weight.a.shape[1], weight.a.dtype, weight.a.device
    if not is_absent(weight) and hasattr(weight, "shape"):
        out, inner = weight.shape
        leaf = next(x for x in tree.leaves(weight) if isinstance(x, Tensor))
        return out, inner, torch.float32, leaf.device
    remedy = "Give its type a property `shape` of (out, in)."
    errors.fail(
        "lora",
        "where",
        "true of weights of known sizes",
        f"a {type(weight).__name__} at {path!r}",
        remedy,
        TypeError,
    )
