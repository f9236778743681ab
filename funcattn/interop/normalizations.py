"""Normalizations in plain operations, in place of torch's fused ones.

    z = x - mean(x)        y = z / sqrt(mean(z^2) + eps) * weight + bias

torch saves mean and deviation as constants, so that derivatives through its forward-mode formulas
lose terms, silently: layer_norm, instance_norm and batch_norm in training give wrong numbers in
jvp(jvp), in grad(jvp), and for weights that depend on x in jvp(jacrev) under no_grad (torch 2.13 to
2.15, pytorch/pytorch#196700, #196699, #175754); group_norm raises there.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.dtypes import accurate
from ..layers.norms import scaled, standardized


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.layer_norm."""
    size = tuple(normalized_shape)
    fits = all(x is None or x.shape == size for x in (weight, bias))
    if not size or not fits or input.shape[-len(size) :] != size:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # with torch's error
    x = standardized(accurate(input), tuple(range(-len(size), 0)), eps)
    return scaled(x, weight, bias).to(input.dtype)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """F.group_norm."""
    if input.dim() < 2 or not input.numel() or input.shape[1] % num_groups:
        return F.group_norm(input, num_groups, weight, bias, eps)  # with torch's error
    groups = accurate(input).reshape(input.shape[0], num_groups, -1)
    x = standardized(groups, (-1,), eps).reshape(input.shape)
    return scaled(x, *_per_channel(input, weight, bias)).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm; in eval torch's, which is affine."""
    if training and input.dim() >= 2 and input.numel() > input.shape[1]:
        _update(F.batch_norm, input, running_mean, running_var, momentum)
        x = standardized(accurate(input), (0, *range(2, input.dim())), eps)
        return scaled(x, *_per_channel(input, weight, bias)).to(input.dtype)
    return F.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )  # with torch's error in training


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.instance_norm; with given statistics torch's, which is affine."""
    if use_input_stats and input.dim() >= 3 and input[0, 0].numel() > 1:
        _update(F.instance_norm, input, running_mean, running_var, momentum)
        x = standardized(accurate(input), tuple(range(2, input.dim())), eps)
        return scaled(x, *_per_channel(input, weight, bias)).to(input.dtype)
    return F.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )  # with torch's error for one element


def _per_channel(input: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Vectors of one number for each channel, as they broadcast against the input (N, C, ...)."""
    return [x if x is None else x.reshape(-1, *[1] * (input.dim() - 2)) for x in parameters]


def _update(
    norm: object, input: Tensor, mean: Tensor | None, variance: Tensor | None, momentum: float
) -> None:
    """Let torch write the running statistics, which no derivative follows."""
    if mean is None and variance is None:
        return
    with torch.no_grad():
        x = input.detach()
        if norm is F.batch_norm:
            F.batch_norm(x, mean, variance, training=True, momentum=momentum)
        else:
            F.instance_norm(x, mean, variance, momentum=momentum)
