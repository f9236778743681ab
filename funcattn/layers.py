"""The layers of a decoder as functions of a weight and an activation.

`linear` and `embed` dispatch on the type of the weight: a quantized weight is a record whose module registers itself here, so
the decoder never knows what its weights are made of. Matrices are (out, in), as torch and Hugging Face store them.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks


@functools.singledispatch
def linear(weight: Any, x: Tensor) -> Tensor:
    """x (*lead, in) times a weight (out, in), giving (*lead, out). A record registers its own way: `@linear.register`."""
    wanted = "a tensor or a record that registered itself with layers.linear"
    _checks.fail(
        "linear", "weight", wanted, f"a {type(weight).__name__}", "Register it with @funcattn.layers.linear.register.", TypeError
    )


@linear.register
def _(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


@functools.singledispatch
def embed(weight: Any, ids: Tensor) -> Tensor:
    """Rows of a weight (V, E) at integer ids (*lead,), giving (*lead, E). A record registers its own way."""
    wanted = "a tensor or a record that registered itself with layers.embed"
    _checks.fail(
        "embed", "weight", wanted, f"a {type(weight).__name__}", "Register it with @funcattn.layers.embed.register.", TypeError
    )


@embed.register
def _(weight: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, weight)


def rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """x / sqrt(mean x^2 + epsilon) * weight over the last axis.

    Source: Zhang and Sennrich, Root mean square layer normalization, arXiv:1910.07467.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | tuple[()] = (), *, epsilon: float) -> Tensor:
    """(x - mean x) / sqrt(var x + epsilon) * weight + bias over the last axis.

    Source: Ba, Kiros and Hinton, Layer normalization, arXiv:1607.06450.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias if isinstance(bias, Tensor) else None, epsilon)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up: SwiGLU with "silu", GeGLU with "gelu" or "gelu_tanh", ReGLU with "relu".

    Source: Shazeer, GLU variants improve transformer, arXiv:2002.05202.
    """
    if activation not in ACTIVATIONS:
        _checks.fail("gated", "activation", f"one of {', '.join(map(repr, ACTIVATIONS))}", repr(activation), "Choose one of these.")
    return ACTIVATIONS[activation](gate) * up


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched beyond the trained context.

    kind: "linear" divides every frequency by factor (position interpolation, arXiv:2306.15595). "llama3" divides the slow ones,
    keeps the fast ones and blends between: wavelengths above context / low are slow, below context / high fast.
    """

    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            _checks.fail(
                "RopeScaling", "kind", '"linear" or "llama3"', repr(self.kind), "Another kind would change the mathematics."
            )


class Rotation(NamedTuple):
    """cos and signed sin of the angles, each (*lead, 1, T, D): x turns to x * cos + swap(x) * sin, alike in every head."""

    cos: Tensor
    sin: Tensor


def frequencies(D: int, *, base: float, scaling: RopeScaling | None = None, device: torch.device | None = None) -> Tensor:
    """Angle per position of each of the D / 2 planes, float32: base ** (-2 i / D), then scaled.

    Source: Su et al., RoFormer, arXiv:2104.09864, section 3.2.2.
    """
    turn = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    if scaling is None:
        return turn
    if scaling.kind == "linear":
        return turn / scaling.factor
    wavelength = 2 * math.pi / turn
    blend = (scaling.context / wavelength - scaling.low) / (scaling.high - scaling.low)
    blend = blend.clamp(0, 1)  # 0 slow, 1 fast
    return blend * turn + (1 - blend) * turn / scaling.factor


def rope(positions: Tensor, turn: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of each position: positions (*lead, T), turn (D / 2,); angles in float32, given in dtype."""
    angle = positions.unsqueeze(-1).unsqueeze(-3).to(turn.dtype) * turn  # (*lead, 1, T, D / 2)
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn x (*lead, H, T, D) by its positions; plane i holds the features i and i + D / 2 (half-split, as Hugging Face)."""
    return torch.addcmul(x * rotation.cos, x.roll(x.shape[-1] // 2, -1), rotation.sin).to(x.dtype)  # narrow stays so in autocast
