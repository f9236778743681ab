"""The dtype of sums and statistics: float64 where an input is float64, else float32."""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of logits, log-sum-exps and sums over these inputs; None stands for no input.

    Example:
        >>> accumulation_dtype(torch.ones(1, dtype=torch.bfloat16), torch.ones(1))
        torch.float32
    """
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def accurate(x: Tensor, *others: Tensor | None) -> Tensor:
    """x in the dtype in which sums over it and the others are accumulated."""
    if x.dtype == torch.float64 or (x.dtype == torch.float32 and not others):
        return x
    return x.to(accumulation_dtype(x, *others))
