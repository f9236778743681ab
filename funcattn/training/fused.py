"""AdamW by torch's fused kernel, on copies, so that no argument is modified.

The kernel writes into weights and moments. Given zeros for weights and no decay, it writes the
update itself there:

    0 - rate m' / (sqrt(v') + epsilon)

It supports no transform, so it is used outside torch.func, autograd and torch.compile only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.autograd import is_recorded


def is_quiet(*trees: object) -> bool:
    """True outside torch.func, autograd (for these tensors) and torch.compile."""
    return not (torch.is_grad_enabled() or is_recorded(*trees) or torch.compiler.is_compiling())


def serves(*columns: Sequence[object]) -> bool:
    """True for plain tensors of one float dtype, all on one CPU or CUDA device."""
    first = columns[0][0] if columns[0] else None
    if (
        not is_quiet(*columns)
        or type(first) is not Tensor
        or first.device.type not in ("cpu", "cuda")
    ):
        return False
    alike = lambda x: type(x) is Tensor and x.dtype == first.dtype and x.device == first.device
    return first.dtype in (torch.float32, torch.float64) and all(
        alike(x) for column in columns for x in column
    )


def adam(
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    count: Tensor,
    rate: Tensor,
    betas: tuple[float, float],
    epsilon: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Updates and new moments. count: int64 (), with this update; rate: float ()."""
    updates = [torch.zeros_like(g) for g in gradients]
    m, v = ([x.clone() for x in column] for column in (means, squares))
    # The kernel takes a count for each leaf and only reads it: the optimizer increments its own.
    counts = [count.to(gradients[0].device, torch.float32)] * len(gradients)
    torch.ops.aten._fused_adamw_(
        *(updates, list(gradients), m, v, [], counts),
        lr=float(rate)
        if gradients[0].device.type == "cpu"
        else rate.to(gradients[0].device, torch.float32),
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=epsilon,
        amsgrad=False,
        maximize=False,
    )
    return updates, m, v
