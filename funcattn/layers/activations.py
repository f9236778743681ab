"""The activations of a feed-forward, plain and gated."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import errors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name, elementwise; see ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        wanted = f"one of {', '.join(map(repr, ACTIVATIONS))}"
        errors.fail("activate", "activation", wanted, repr(activation), "Choose one of these.")
    return ACTIVATIONS[activation](x)


XIELU_SLOPE = 0.5  # at 0
XIELU_LIMIT = -1e-6  # the exponent of small numbers


def xielu(x: Tensor, weights: Tensor) -> Tensor:
    """a x^2 + x / 2 where x > 0, else b (exp(x) - 1 - x) + x / 2.

    a = softplus(weights[0]), b = 1 / 2 + softplus(weights[1]): the gradient grows with x, and
    weights are learned in each layer.

    Args:
        x: floating.
        weights: (2,).

    Source: Huang and Schlag, Deriving activation functions using integration, arXiv:2411.13010.
    """
    a, b = F.softplus(weights).unbind(0)
    b = b + XIELU_SLOPE
    grown = a * x * x
    decayed = b * (torch.expm1(x.clamp(max=XIELU_LIMIT)) - x)
    return torch.where(x > 0, grown, decayed) + XIELU_SLOPE * x


def sparse(x: Tensor, share: float) -> Tensor:
    """relu(x - mean - z std) over the last axis: zero in that share of it, were x normal.

    z is the quantile of the normal distribution at the share.

    Example:
        >>> x = torch.linspace(-1, 1, 100)
        >>> int((sparse(x, 0.9) > 0).sum())
        13

    Source: Gemma team, Gemma 3n (2025).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = torch.special.ndtri(torch.full((), share, dtype=wide, device=x.device)).to(x.dtype)
    return F.relu(x - x.mean(-1, keepdim=True) - z * x.std(-1, keepdim=True, correction=0))


def times(x: Tensor, factor: float) -> Tensor:
    """x times a factor of a config; x itself where it is 1."""
    return x if factor == 1.0 else x * factor


def gated(gate: Tensor, up: Tensor, activation: str = "silu", limit: float | None = None) -> Tensor:
    """activation(gate) * up: SwiGLU with "silu", GeGLU with "gelu" or "gelu_tanh", ReGLU with
    "relu".

    With a limit, activation(min(gate, limit)) * (clamp(up, -limit, limit) + 1), which is GPT-OSS's
    clamped SwiGLU.

    Source: Shazeer, GLU variants improve transformer, arXiv:2002.05202.
    """
    if activation not in ACTIVATIONS:
        errors.fail(
            "gated",
            "activation",
            f"one of {', '.join(map(repr, ACTIVATIONS))}",
            repr(activation),
            "Choose one of these.",
        )
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
    return ACTIVATIONS[activation](gate) * up
