"""Mixture of experts: each token is multiplied by the matrices of the experts that a router chose.

    y_n = W[expert_n] x_n          W (X, out, in), expert (N,)

The number of tokens per expert depends on the data. The product is therefore one operation with
static shapes outside, which sorts the tokens by expert and multiplies each group once: the matrix
of an expert without tokens is not read, so a decode step reads only the matrices that it uses. Its
derivatives are the same product with W transposed and the sum of outer products by expert, and
those of the latter are the former again: the two are closed under every transform. Under vmap the
tokens of all rows form one list, and matrices that are not mapped are not copied.

Source: Shazeer et al., Outrageously large neural networks, arXiv:1701.06538; Fedus et al., Switch
transformers, arXiv:2101.03961.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from ..core import errors
from ..core.autograd import Context, VmapInfo, closed_jvp, is_recorded
from .products import Weight, linear


def route(
    logits: Tensor,
    k: int,
    *,
    normalized: bool = True,
    scores: str = "softmax",
    choice_bias: Tensor | tuple[()] = (),
    groups: tuple[int, int] = (1, 1),
    group_best: int = 2,
    scale: float = 1.0,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The k experts of each token and their weights, from router logits (*lead, X).

    Args:
        logits: (*lead, X), floating; scores are in float32 at least.
        k: experts per token.
        normalized: True renormalizes the k weights to sum to one; False keeps their scores among
            all X.
        scores: "softmax" over all experts, "sigmoid" of each, or "sparsemixer": a softmax of the
            first over all, and of the next over those not yet chosen, both without experts further
            from the best than 2 margin, relative to the greater of them.
        choice_bias: (X,), added to the scores for the choice alone.
        groups: (n, m): experts are chosen within m of n groups, those with the greatest sums of
            their best scores.
        group_best: how many scores of a group are summed: 2, of DeepSeek-V2 1.
        scale: factor of the weights.
        margin: of "sparsemixer".

    Returns:
        weights (*lead, k), in the dtype of the scores, and experts (*lead, k), int64, the largest
        first.

    Source: Shazeer et al., arXiv:1701.06538, section 2.1; DeepSeek-AI, DeepSeek-V3,
        arXiv:2412.19437, section 2.1.2; Liu et al., GRIN, arXiv:2409.12136.
    """
    if not 0 < k <= logits.shape[-1]:
        errors.fail(
            "route",
            "k",
            f"between 1 and the {logits.shape[-1]} experts",
            k,
            "Choose fewer experts for each token.",
        )
    wide = logits if logits.element_size() > 2 else logits.float()
    if scores == "sparsemixer":
        share, expert = _mix(wide, k, margin)
        return share * scale, expert
    if scores != "softmax" or isinstance(choice_bias, Tensor) or groups[0] > 1:
        share, expert = _choose(wide, k, normalized, scores, choice_bias, (*groups, group_best))
        return share * scale, expert
    best, expert = wide.topk(k, -1)
    share = best.softmax(-1) if normalized else (best - wide.logsumexp(-1, keepdim=True)).exp()
    return share if scale == 1.0 else share * scale, expert


def _mix(logits: Tensor, k: int, margin: float) -> tuple[Tensor, Tensor]:
    """`route` by one softmax after the other."""
    shares, experts, left = [], [], logits
    for _ in range(k):
        best, expert = left.max(-1, keepdim=True)
        far = ((best - logits) / torch.maximum(logits.abs(), best)).detach() > 2 * margin
        share = left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, expert)
        left = left.masked_fill(
            torch.arange(logits.shape[-1], device=logits.device) == expert, -torch.inf
        )
        shares, experts = [*shares, share], [*experts, expert]
    return torch.cat(shares, -1), torch.cat(experts, -1)


def _choose(
    logits: Tensor,
    k: int,
    normalized: bool,
    scores: str,
    bias: Tensor | tuple[()],
    groups: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """`route` of scores that are chosen by others than their weights."""
    each = logits.sigmoid() if scores == "sigmoid" else logits.softmax(-1)
    choice = each + bias.to(each.dtype) if isinstance(bias, Tensor) else each
    count, kept, summed = groups
    if count > 1:
        grouped = torch.unflatten(choice, -1, (count, -1))
        best = grouped.topk(summed, -1).values.sum(-1).topk(kept, -1).indices  # (*lead, m)
        numbers = torch.arange(count, device=best.device)
        out = (best.unsqueeze(-1) != numbers).all(-2).unsqueeze(-1)  # (*lead, n, 1)
        choice = grouped.masked_fill(out, -torch.inf).flatten(-2)
    expert = choice.topk(k, -1).indices
    share = each.gather(-1, expert)
    if not normalized:
        return share, expert
    least = 1e-20 if scores == "sigmoid" else 1e-12  # as in the published models
    return share / share.sum(-1, keepdim=True).clamp(min=least), expert


@functools.singledispatch
def linear_experts(weight: Weight, x: Tensor, expert: Tensor) -> Tensor:
    """x (N, in) times the matrices weight[expert] of a weight (X, out, in), giving (N, out).

    Args:
        weight: (X, out, in), or a record with the axis X in front of each field. A record that is
            registered with `linear` is applied to all tokens once for each expert; a faster way is
            registered by `@linear_experts.register`.
        x: floating (N, in).
        expert: int64 (N,), in 0..X - 1.

    Law: equals weight[expert] @ x, with every derivative
        (test_experts.py::test_the_product_by_experts_is_the_dense_one).
    """
    all_of_them = torch.func.vmap(linear, (0, None))(weight, x)  # (X, N, out)
    return all_of_them[expert, torch.arange(len(expert), device=expert.device)]


@linear_experts.register
def _(weight: Tensor, x: Tensor, expert: Tensor) -> Tensor:
    # Dynamo would otherwise inline the autograd.Function, or refuse it for its jvp.
    call = torch._dynamo.nonstrict_trace(_product) if torch.compiler.is_compiling() else _product
    return call(x, weight, expert)


def _product(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    if is_recorded(weight, x):
        return Grouped.apply(x, weight, expert)
    return _grouped(x, weight, expert)


@torch.library.custom_op("funcattn::grouped", mutates_args=())
def _grouped(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """(N, in), (X, out, in), (N,) -> (N, out)."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for i, rows in _groups(expert, weight.shape[0]):
        out[rows] = x[rows] @ weight[i].mT
    return out


@_grouped.register_fake
def _(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    errors.on_one_device("funcattn::grouped", [x, weight, expert])
    return x.new_empty(x.shape[0], weight.shape[1])


@register_flop_formula(torch.ops.funcattn.grouped)
def _(x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    return 2 * x[0] * x[1] * weight[1]


@torch.library.custom_op("funcattn::outer_by_group", mutates_args=())
def _outer(y: Tensor, x: Tensor, expert: Tensor, X: int) -> Tensor:
    """sum over the rows n of expert i of y_n x_n^T: (N, out), (N, in), (N,) -> (X, out, in)."""
    out = x.new_zeros(X, y.shape[1], x.shape[1])
    for i, rows in _groups(expert, X):
        out[i] = y[rows].mT @ x[rows]
    return out


@_outer.register_fake
def _(y: Tensor, x: Tensor, expert: Tensor, X: int) -> Tensor:
    errors.on_one_device("funcattn::outer_by_group", [y, x, expert])
    return x.new_empty(X, y.shape[1], x.shape[1])


@register_flop_formula(torch.ops.funcattn.outer_by_group)
def _(y: Sequence[int], x: Sequence[int], *_: object, **__: object) -> int:
    return 2 * y[0] * y[1] * x[1]


def _groups(expert: Tensor, X: int) -> list[tuple[int, Tensor]]:
    """The expert and the row indices, ascending, of each expert that has tokens."""
    counts = torch.bincount(expert, minlength=X).tolist()
    rows = expert.argsort(stable=True).split(counts)
    return [(i, rows[i]) for i, count in enumerate(counts) if count]


class Grouped(Function):
    """The product by experts: x (N, in), weight (X, out, in), expert (N,)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        return _grouped(x, weight, expert)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, expert = ctx.saved_tensors
        dx = Grouped.apply(g, weight.mT, expert) if ctx.needs_input_grad[0] else None
        dw = Outer.apply(g, x, expert, weight.shape[0]) if ctx.needs_input_grad[1] else None
        return dx, dw, None

    @closed_jvp
    def jvp(
        ctx: Context, saved: list[Tensor], dx: Tensor | None, dw: Tensor | None, _: None
    ) -> Tensor:
        x, weight, expert = saved
        moved = [] if dx is None else [Grouped.apply(dx, weight, expert)]
        moved += [] if dw is None else [Grouped.apply(x, dw, expert)]
        return functools.reduce(torch.add, moved)

    @staticmethod
    def vmap(
        info: VmapInfo, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, expert: Tensor
    ) -> tuple[Tensor, int]:
        B = info.batch_size
        x, expert = _rows(x, in_dims[0], B), _rows(expert, in_dims[2], B)
        weight, expert = _matrices(weight, in_dims[1], expert)
        out = Grouped.apply(x.flatten(0, 1), weight, expert.flatten())
        return out.unflatten(0, x.shape[:2]), 0


class Outer(Function):
    """The sum of outer products by expert: y (N, out), x (N, in), expert (N,), X."""

    @staticmethod
    def forward(y: Tensor, x: Tensor, expert: Tensor, X: int) -> Tensor:
        return _outer(y, x, expert, X)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.experts = inputs[3]

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        y, x, expert = ctx.saved_tensors
        dy = Grouped.apply(x, g, expert) if ctx.needs_input_grad[0] else None
        dx = Grouped.apply(y, g.mT, expert) if ctx.needs_input_grad[1] else None
        return dy, dx, None, None

    @closed_jvp
    def jvp(
        ctx: Context, saved: list[Tensor], dy: Tensor | None, dx: Tensor | None, *_: None
    ) -> Tensor:
        y, x, expert = saved
        moved = [] if dy is None else [Outer.apply(dy, x, expert, ctx.experts)]
        moved += [] if dx is None else [Outer.apply(y, dx, expert, ctx.experts)]
        return functools.reduce(torch.add, moved)

    @staticmethod
    def vmap(
        info: VmapInfo,
        in_dims: tuple[int | None, ...],
        y: Tensor,
        x: Tensor,
        expert: Tensor,
        X: int,
    ) -> tuple[Tensor, int]:
        B = info.batch_size
        y, x, expert = (_rows(t, dim, B) for t, dim in zip((y, x, expert), in_dims, strict=False))
        expert = expert + X * torch.arange(B, device=expert.device).unsqueeze(1)
        return Outer.apply(y.flatten(0, 1), x.flatten(0, 1), expert.flatten(), X * B).unflatten(
            0, (B, X)
        ), 0


def _rows(x: Tensor, dim: int | None, B: int) -> Tensor:
    """(B, N, ...), with the mapped axis in front."""
    return x.expand(B, *x.shape) if dim is None else x.movedim(dim, 0)


def _matrices(weight: Tensor, dim: int | None, expert: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of all rows of the batch as one list, and the experts as indices into it.

    Matrices that are not mapped stay as they are.
    """
    if dim is None:
        return weight, expert
    weight = weight.movedim(dim, 0)
    B, X = weight.shape[:2]
    return weight.flatten(0, 1), expert + X * torch.arange(B, device=expert.device).unsqueeze(1)
