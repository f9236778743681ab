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
