"""The layer of Mamba-2 in a decoder: a state space between a short convolution and a gate.

    out (norm(scan(silu(conv(in y))) * silu(gate y)))        dt = softplus(rate y + rate_bias)

Source: Dao and Gu, Transformers are SSMs, arXiv:2405.21060, section 7; with factors, Falcon-H1
team, Falcon-H1, arXiv:2507.22448, section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layers
from ..kernels.dtypes import accurate
from ..layers import ConvolutionState, SpaceState, SpaceSteps, Weight
from ..records import is_absent
from ..taps import tap
from .config import Config
from .weights import Layer


def state_space(
    config: Config, weights: Layer, y: Tensor, state: SpaceState | tuple[()], name: str
) -> tuple[Tensor, SpaceSteps]:
    """What the layer adds to the residual for y (*lead, T, E), and its steps."""
    K, N, P = config.state_key_heads, config.state_key_size, config.state_value_size
    sizes = [config.state_heads * P, K * N, K * N]  # of x, B and C
    of_input, of_gate, *of_features, of_rate, of_output = config.mixer_factors or (1.0,) * 7
    gate, features, rate = _affines(weights, layers.times(y, of_input))
    if config.mixer_factors:
        factors = [torch.full((n,), m) for n, m in zip(sizes, of_features, strict=True)]
        features = features * torch.cat(factors).to(features)
    convolution = state.convolution if isinstance(state, SpaceState) else ()
    features, convolved = layers.convolve(
        features, weights.convolution, weights.convolution_bias, convolution
    )
    x, B, C = layers.activate(features, "silu").split(sizes, -1)
    x, B, C = (
        torch.unflatten(z, -1, (-1, size)).transpose(-2, -3)  # (*lead, heads, T, size)
        for z, size in ((x, P), (B, N), (C, N))
    )
    dt = accurate(layers.times(rate, of_rate), weights.rate_bias) + weights.rate_bias
    dt = F.softplus(dt).clamp(*config.step_limit).mT  # (*lead, H, T)
    A = -accurate(weights.log_rate, dt).exp()
    out, steps = layers.space_net(convolved, x, dt, A, B, C, weights.mixer_skip, state)
    mixed = _gated(config, weights, out.transpose(-2, -3).flatten(-2), layers.times(gate, of_gate))
    out = layers.linear(weights.mixer_out, tap(f"{name}.mixer.mixed", mixed))
    out = out if is_absent(weights.mixer_out_bias) else out + weights.mixer_out_bias
    return layers.times(out, of_output), steps


def empty(config: Config, dtype: torch.dtype) -> SpaceState:
    """The state before a text, for activations of a dtype."""
    H, K = config.state_heads, config.state_key_heads
    N, P = config.state_key_size, config.state_value_size
    convolution = torch.zeros(config.convolution_size - 1, H * P + 2 * K * N, dtype=dtype)
    memory = torch.zeros(H, N, P, dtype=dtype)
    return SpaceState(ConvolutionState(convolution), accurate(memory, memory))


def _affines(weights: Layer, y: Tensor) -> list[Tensor]:
    """The gate, what is convolved, and the rate, of y."""
    read: tuple[Weight, ...] = (weights.mixer_gate, weights.mixer_in, weights.mixer_rate)
    biases = weights.mixer_gate_bias, weights.mixer_in_bias, weights.mixer_rate_bias
    each = zip(layers.linears(read, y), biases, strict=True)
    return [z if is_absent(bias) else z + bias for z, bias in each]


def _gated(config: Config, weights: Layer, out: Tensor, gate: Tensor) -> Tensor:
    """The output of the scan, times its gate, with an RMS norm of each group of heads."""
    y, gate = accurate(out, out), F.silu(accurate(gate, out))
    if config.mixer_norm == "none":
        return (y * gate).to(out.dtype)
    y = y * gate if config.mixer_norm == "gated" else y
    groups = torch.unflatten(y, -1, (config.state_key_heads, -1))
    epsilon = config.mixer_norm_epsilon
    epsilon = config.norm_epsilon if epsilon is None else epsilon
    y = F.rms_norm(groups, groups.shape[-1:], None, epsilon).flatten(-2)
    if config.mixer_norm == "gated":
        return y.to(out.dtype) * weights.mixer_norm
    return (y * weights.mixer_norm * gate).to(out.dtype)
