"""Closed forms of torch's functions that torch does not differentiate in every nesting.

`silu_backward` of F.silu has no forward-mode formula, so jvp(jacrev(f)) fails under no_grad; others
fail at second or third order, or are silently wrong there (torch 2.13 to 2.15; for normalizations
see that module). Their formulas in terms of other functions have every derivative:

    silu(x) = x sigmoid(x)                          mish(x) = x tanh(softplus(x))
    hardsigmoid(x) = relu6(x + 3) / 6               glu(a, b) = a sigmoid(b)
    logit(x) = log(x) - log1p(-x)                   soft_margin(x, y) = -logsigmoid(x y)

F.linear and matrix products are here for their time: torch multiplies by a tangent of zeros where
an operand has none (see core.tangents).

Found by enumeration of torch.nn.functional, in every nesting to third order. No closed form is here
for embedding_bag, cdist, pdist, ctc_loss, grid_sample and the multi-margin losses (torch raises),
nor for third derivatives of norms and cosine similarities.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from ..core import tangents
from ..core.autograd import has_tangent, transforming
from ..kernels.dtypes import accurate
from . import normalizations


def closed_form(
    func: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Tensor] | None:
    """The closed form to call instead of a torch function, or None to call the function itself.

    torch's own kernel stays outside of torch.func, where no argument has a tangent: autograd
    differentiates it at every order in reverse mode, and saves less for it.
    """
    form = CLOSED.get(func)
    if form is None:
        return None
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not all(x.is_floating_point() for x in tensors):
        return None
    composes = torch.compiler.is_compiling() or transforming() or has_tangent(tensors)
    return form if composes else None


def _elementwise(form: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function of x, rounded once to the dtype of x, with the argument `inplace` of torch."""

    def activation(input: Tensor, inplace: bool = False) -> Tensor:
        if not inplace:
            return form(accurate(input)).to(input.dtype)
        # of a copy, since autograd saves the argument
        return input.copy_(form(accurate(input.clone())).to(input.dtype))

    return activation


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    if not input.dim() or input.shape[dim] % 2:
        return F.glu(input, dim)  # with torch's error
    a, b = accurate(input).chunk(2, dim)
    return (a * b.sigmoid()).to(input.dtype)


def _rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if training:  # draws
        return F.rrelu(input, lower, upper, training, inplace)
    return F.leaky_relu(input, (lower + upper) / 2, inplace)


def _logit(input: Tensor, eps: float | None = None, *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return torch.logit(input, eps, out=out)
    x = accurate(input) if eps is None else accurate(input).clamp(eps, 1 - eps)
    return (x.log() - (-x).log1p()).to(input.dtype)


# torch's stubs lack the argument `weight`
_weighted_mse: Callable[..., Tensor] = F.mse_loss
_weighted_huber: Callable[..., Tensor] = F.huber_loss


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if weight is not None or size_average is not None or reduce is not None:
        # in plain operations already; legacy arguments
        return _weighted_mse(input, target, size_average, reduce, reduction, weight=weight)
    return _reduced(lambda x, y: (x - y).square(), input, target, reduction)


def _huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    if delta <= 0 or (weight is not None and weight.shape != input.shape):
        return _weighted_huber(input, target, reduction, delta, weight=weight)  # torch's error

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = x - y
        pairs = torch.where(z.abs() < delta, 0.5 * z * z, delta * (z.abs() - 0.5 * delta))
        return pairs if weight is None else pairs * weight

    return _reduced(loss, input, target, reduction)


def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    return _reduced(lambda x, y: -F.logsigmoid(x * y), input, target, reduction)


def _reduced(
    loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor, reduction: str
) -> Tensor:
    """The losses of pairs that broadcast, reduced as torch does: "none", "sum" or "mean"."""
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size "
            f"({input.shape}).",
            stacklevel=6,
        )
    dtype = torch.result_type(input, target)
    x = loss(accurate(input), accurate(target))
    if reduction == "none":
        return x.to(dtype)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")  # as torch says it
    return (x.sum() if reduction == "sum" else x.mean()).to(dtype)


def _bilinear(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A matrix product, whose tangent is of the operands that have one."""

    def multiply(*operands: Tensor, **options: Any) -> Tensor:
        if options or len(operands) != 2:  # out, out_dtype; an operand by name; torch's error
            return product(*operands, **options)
        return tangents.bilinear(product, *operands)

    return multiply


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return tangents.affine(input, weight, bias)


CLOSED: dict[object, Callable[..., Tensor]] = {
    F.silu: _elementwise(lambda x: x * x.sigmoid()),
    F.mish: _elementwise(lambda x: x * F.softplus(x).tanh()),
    F.hardsigmoid: _elementwise(lambda x: F.relu6(x + 3) / 6),
    F.glu: _glu,
    F.rrelu: _rrelu,
    F.linear: _linear,
    **{f: _bilinear(f) for f in (torch.matmul, Tensor.matmul, Tensor.__matmul__)},
    **{f: _bilinear(f) for f in (torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)},
    F.layer_norm: normalizations.layer_norm,
    F.group_norm: normalizations.group_norm,
    F.batch_norm: normalizations.batch_norm,
    F.instance_norm: normalizations.instance_norm,
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
    F.soft_margin_loss: _soft_margin_loss,
    **dict.fromkeys((torch.logit, torch.special.logit, Tensor.logit), _logit),
}
