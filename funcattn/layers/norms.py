"""Normalization over the last axis."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean x^2 + epsilon) * (offset + weight) over the last axis.

    With an offset (Gemma stores weights around 0 and adds 1) the product is in float32 at least, as
    in the original implementation.

    Args:
        x: floating (*lead, D).
        weight: (D,).
        epsilon: added to the mean square.
        offset: added to the weight.

    Source: Zhang and Sennrich, Root mean square layer normalization, arXiv:1910.07467.
    """
    if not offset:
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    wide = x if x.element_size() > 2 else x.float()
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype) + offset, epsilon).to(x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | tuple[()] = (), *, epsilon: float
) -> Tensor:
    """(x - mean x) / sqrt(var x + epsilon) * weight + bias over the last axis.

    A weight with more axes, (H, D), scales x (..., H, D) separately for each head; the statistics
    are still over the last axis alone.

    Args:
        x: floating (*lead, D).
        weight: (D,), or (H, D).
        bias: of the shape of the weight, or () for none.
        epsilon: added to the variance.

    Source: Ba, Kiros and Hinton, Layer normalization, arXiv:1607.06450.
    """
    size = (x.shape[-1],)
    if weight.dim() == 1:
        return F.layer_norm(x, size, weight, bias if isinstance(bias, Tensor) else None, epsilon)
    y = F.layer_norm(x, size, None, None, epsilon) * weight
    return y + bias if isinstance(bias, Tensor) else y
