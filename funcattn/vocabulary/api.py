"""`cross_entropy`, with its arguments validated."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door, what_is
from ..kernels.arguments import is_under_autocast
from ..kernels.dtypes import accumulation_dtype
from ..layers import Weight, linear
from ..tree import INTEGERS
from .likelihoods import classes, cross_entropies, weighted_cross_entropy

REDUCTIONS = ("mean", "sum", "none")
NAME = "cross_entropy"


@door
def cross_entropy(
    hidden: Tensor,
    head: Weight,
    targets: Tensor,
    *,
    cap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """The cross-entropy of a linear classifier, without its logits in memory.

        s = hidden head^T, or cap tanh(hidden head^T / cap)
        loss_i = log sum_v exp s_iv - s_{i, targets_i}

    It is attention without values: the queries are rows of hidden, the keys rows of head, and the
    loss is their log-sum-exp less the target's logit. A block of logits is in memory at a time, and
    every nesting of grad, jvp and vmap is exact: an hvp by all weights takes the inputs, tangents
    and results, and a block.

    Args:
        hidden: (*lead, E) floating, such as the first result of `model.hidden`.
        head: (V, E): a tensor of the dtype of hidden, or a record of `layers.linear` (quantized, or
            with a low-rank update).
        targets: integers (*lead,), ids of rows of head. To leave some out, give them any id and
            weigh the result of `reduction="none"`.
        cap: of the logits, above 0 (`logit_cap` of Gemma 2); None is none.
        reduction: the "mean" or "sum" over all targets, or "none".

    Returns:
        A scalar, or (*lead,) for "none": nats, float32 at least. The mean over no targets is NaN,
        as torch's.

    Raises:
        ValueError: sizes that do not fit; targets out of range, where values can be read.
        TypeError: dtypes or types that do not fit.

    Example:
        >>> import funcattn as fa
        >>> hidden, head = fa.random.normal(fa.key(0), (5, 8)), torch.zeros(100, 8)
        >>> round(float(cross_entropy(hidden, head, torch.arange(5))), 3)  # log 100
        4.605

    Law: equals F.cross_entropy of all logits, under every nesting of transforms
        (test_vocabulary.py::test_every_nesting_is_that_of_the_dense_loss).
    Source: Wijmans et al., Cut your losses in large-vocabulary language models, arXiv:2411.09009,
        and Hsu et al., Liger Kernel, arXiv:2410.10989, for the value and the first gradient.
    """
    _check(hidden, head, targets, cap, reduction)
    ids = targets.flatten().long()
    rows = hidden.reshape(len(ids), hidden.shape[-1])
    if reduction == "none":
        return cross_entropies(head, rows, ids, cap=cap).reshape(targets.shape)
    ones = torch.ones(len(ids), dtype=accumulation_dtype(hidden), device=hidden.device)
    total = weighted_cross_entropy(head, rows, ids, ones, cap=cap)
    return total / len(ids) if reduction == "mean" else total


def _check(
    hidden: Tensor, head: Weight, targets: Tensor, cap: float | None, reduction: str
) -> None:
    remedy = "It is the residual after the last norm: model.hidden(params, tokens)[0]."
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        errors.fail(NAME, "hidden", "a floating tensor", what_is(hidden), remedy, TypeError)
    if not hidden.dim():
        errors.fail(NAME, "hidden", "(*lead, E)", errors.shape(hidden), remedy)
    E = hidden.shape[-1]
    if not isinstance(head, Tensor) and linear.dispatch(type(head)) is linear.dispatch(object):
        wanted = "a tensor (V, E) or a record of layers.linear"
        errors.fail(NAME, "head", wanted, what_is(head), "Pass the weight itself.", TypeError)
    for name, x in (("hidden", hidden), ("head", head), ("targets", targets)):
        errors.whole(NAME, name, (x,), "Shard the model, and call fa.loss inside of fa.shard_map.")
    shape = getattr(head, "shape", None)
    if shape is not None and (len(shape) != 2 or shape[1] != E or not shape[0]):
        wanted = f"(V, E) with V at least 1 and E = {E} as in hidden"
        errors.fail(NAME, "head", wanted, tuple(shape), "Rows are classes, as nn.Linear has them.")
    if isinstance(head, Tensor) and head.dtype != hidden.dtype and not is_under_autocast(hidden):
        wanted = f"of the dtype of hidden, {hidden.dtype}"
        errors.fail(NAME, "head", wanted, head.dtype, "Cast one of them.", TypeError)
    if not isinstance(targets, Tensor) or targets.dtype not in INTEGERS:
        remedy = "Pass ids; the loss of a distribution is another one."
        errors.fail(NAME, "targets", "an integer tensor", what_is(targets), remedy, TypeError)
    if targets.shape != hidden.shape[:-1]:
        wanted = f"{tuple(hidden.shape[:-1])}, as hidden leads"
        errors.fail(NAME, "targets", wanted, errors.shape(targets), "Give each row one id.")
    if reduction not in REDUCTIONS:
        errors.fail(NAME, "reduction", f"one of {REDUCTIONS}", repr(reduction), "Choose one.")
    if cap is not None and not (isinstance(cap, int | float) and 0 < cap < math.inf):
        errors.fail(NAME, "cap", "a number above 0, or None", repr(cap), "Pass config.logit_cap.")
    V = classes(head, hidden)
    if errors.is_true((targets < 0) | (targets >= V)):
        remedy = 'To leave targets out, weigh the result of reduction="none".'
        errors.fail(NAME, "targets", f"ids in 0..{V - 1}", "another", remedy)
