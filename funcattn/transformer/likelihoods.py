"""The cross-entropy of the next token of a model, whose logits are never all in memory.

A decoder's head goes to `vocabulary` as a weight, with its scale, its cap and its mesh axis. A
model whose `logits` was replaced is called, for a block of rows at a time.
"""

from typing import NamedTuple

from torch import Tensor

from .. import vocabulary
from ..collectives import axis_size
from ..layers import Weight
from ..models import Model, config_of
from ..tree import Tree
from . import parallel
from .forward import lm_head
from .partition import TENSOR

BLOCK = 2**24  # logits of a replaced function in memory at a time: 64 MiB in float32


class Head(NamedTuple):
    """The weight of the logits, what it is applied to, its soft cap, and the axis it is sharded
    over.
    """

    weight: Weight
    hidden: Tensor
    cap: float | None
    axis: str | None


def token_losses(
    model: Model, params: Tree, hidden: Tensor, targets: Tensor, *, rows: int = 0
) -> Tensor:
    """-log p(target) of each row (N,), float32 at least.

    Args:
        model, params: of the hidden state and its logits.
        hidden: (N, E). targets: int64 (N,), ids of the whole vocabulary.
        rows: whose logits are in memory at a time; 0 to choose.
    """
    head = _head(model, params, hidden)
    if head is None:
        return by_logits(model, params, hidden, targets, rows)
    return vocabulary.cross_entropies(
        head.weight, head.hidden, targets, cap=head.cap, axis=head.axis, rows=rows
    )


def weighted_loss(
    model: Model, params: Tree, hidden: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """sum_i weights_i token_losses_i, a scalar; see `token_losses`."""
    head = _head(model, params, hidden)
    if head is None:
        return (weights * by_logits(model, params, hidden, targets, 0)).sum()
    return vocabulary.weighted_cross_entropy(
        head.weight, head.hidden, targets, weights, cap=head.cap, axis=head.axis
    )


def by_logits(model: Model, params: Tree, hidden: Tensor, targets: Tensor, rows: int) -> Tensor:
    """`token_losses` of `model.logits`, whatever it computes."""
    rows = rows or max(1, BLOCK // vocabulary_size(model, params, hidden))
    each = lambda params, x, t: vocabulary.of_logits(model.logits(params, x), t)
    return vocabulary.by_blocks(each, params, hidden, targets, rows)


def vocabulary_size(model: Model, params: Tree, hidden: Tensor) -> int:
    """V, of the config, or of logits of no rows where that function was replaced."""
    config = config_of(model, "logits")
    if config is not None:
        return config.vocabulary
    return model.logits(params, hidden[:0]).shape[-1]


def _head(model: Model, params: Tree, hidden: Tensor) -> Head | None:
    config = config_of(model, "logits")
    if config is None:
        return None
    weight, hidden = parallel.head_inputs(config, lm_head(params), hidden)
    if config.logit_scale != 1.0:
        hidden = hidden * config.logit_scale
    shape = getattr(weight, "shape", None)
    sharded = axis_size(TENSOR) > 1 and shape is not None and shape[0] != config.vocabulary
    return Head(weight, hidden, config.logit_cap, TENSOR if sharded else None)
