"""Normalization over the last axis."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.autograd import dual, has_tangent, transforming
from ..core.tangents import bilinear, split
from ..kernels.dtypes import accurate


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

    Torch's fused kernel computes values and first gradients. Its further derivatives are silently
    wrong (pytorch/pytorch#196700): those, and all under transforms of torch.func, are of plain
    operations.

    Args:
        x: floating (*lead, D).
        weight: (D,), or (H, D).
        bias: of the shape of the weight, or () for none.
        epsilon: added to the variance.

    Law: the formula, in every nesting of transforms (test_norms.py::test_layer_norm_is_closed).

    Source: Ba, Kiros and Hinton, Layer normalization, arXiv:1607.06450.
    """
    offset, size = bias if isinstance(bias, Tensor) else None, (x.shape[-1],)
    fits = weight.shape[-1:] == size and (offset is None or offset.shape == weight.shape)
    composes = torch.compiler.is_compiling() or transforming() or has_tangent(x, weight, offset)
    given = [t for t in (x, weight, offset) if t is not None]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    mixed = len({t.dtype for t in given}) > 1 or torch.is_autocast_enabled(x.device.type)
    if fits and (composes or (recorded and mixed)):
        return _plain(x, weight, offset, epsilon)
    if fits and recorded:
        return cast(Tensor, _Fused.apply(x, weight, offset, epsilon))
    if weight.dim() == 1:
        return F.layer_norm(x, size, weight, offset, epsilon)  # with torch's errors
    return scaled(F.layer_norm(x, size, None, None, epsilon), weight, offset)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    return scaled(standardized(accurate(x), (-1,), epsilon), weight, bias).to(x.dtype)


class _Fused(torch.autograd.Function):
    """Torch's kernels for the value and the first gradient; a gradient that is recorded is plain.

    Law: the formula at three orders of torch.autograd.grad
        (test_norms.py::test_gradients_of_gradients_of_a_layer_norm).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.epsilon = epsilon
        y, ctx.mean, ctx.by = torch.ops.aten.native_layer_norm(
            x, (x.shape[-1],), *((weight, bias) if weight.dim() == 1 else (None, None)), epsilon
        )
        return y if weight.dim() == 1 else scaled(y, weight, bias)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (dy,), (x, weight, bias) = cotangents, ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled() and weight.dim() == 1:
            return *torch.ops.aten.native_layer_norm_backward(
                dy, x, (x.shape[-1],), ctx.mean, ctx.by, weight, bias, wanted
            ), None
        again = torch.is_grad_enabled()
        given: list[Any] = [x, weight, bias]
        if not again:
            given = [t if t is None else t.detach().requires_grad_() for t in given]
        with torch.enable_grad():
            y = _plain(given[0], given[1], given[2], ctx.epsilon)
        of: list[Tensor] = [t for t, needed in zip(given, wanted, strict=True) if needed]
        found = iter(torch.autograd.grad(y, of, dy, create_graph=again))
        return *(next(found) if needed else None for needed in wanted), None


def standardized(x: Tensor, axes: tuple[int, ...], epsilon: float) -> Tensor:
    """z / sqrt(mean z^2 + epsilon) with z = x - mean x, over these axes, in plain operations.

    The tangent of y = z r, where r is the reciprocal of the root, is r (dz - y mean(y dz)).

    Law: the formula, in every nesting of transforms (test_norms.py::test_layer_norm_is_closed).
    """
    parts = split(x)
    x = x if parts is None else parts.primals[0]
    z = x - x.mean(axes, keepdim=True)
    r = (z.square().mean(axes, keepdim=True) + epsilon).rsqrt()
    y = z * r
    dx = None if parts is None else parts.tangents[0]
    if dx is None:
        return y
    dz = dx - dx.mean(axes, keepdim=True)
    return dual(y, r * (dz - y * (y * dz).mean(axes, keepdim=True)))


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x * weight + bias, of those that are given."""
    x = x if weight is None else bilinear(torch.mul, x, weight)
    return x if bias is None else x + bias
