"""Normalization of the last axis, or of the last axes that a weight has."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean x^2 + epsilon) * (offset + weight) over the last axis.

    With an offset (Gemma keeps weights around 0 and adds 1) the product is in float32 at least, as its authors compute it.

    Source: Zhang and Sennrich, Root mean square layer normalization, arXiv:1910.07467.
    """
    if not offset:
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    wide = x if x.element_size() > 2 else x.float()
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype) + offset, epsilon).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | tuple[()] = (), *, epsilon: float) -> Tensor:
    """(x - mean x) / sqrt(var x + epsilon) * weight + bias over the last axis.

    A weight of more axes, (H, D), has rows for the axes before the last of x, which is normalized alone: one norm a head.

    Source: Ba, Kiros and Hinton, Layer normalization, arXiv:1607.06450.
    """
    size = (x.shape[-1],)
    if weight.dim() == 1:
        return F.layer_norm(x, size, weight, bias if isinstance(bias, Tensor) else None, epsilon)
    y = F.layer_norm(x, size, None, None, epsilon) * weight
    return y + bias if isinstance(bias, Tensor) else y
