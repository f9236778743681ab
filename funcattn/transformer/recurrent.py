"""The recurrent layers of a decoder, by kind: what a layer has in the place of attention.

    short_convolution   out (c * conv(b * x))                          b, c, x = in y
    gated_delta         out (norm(scan(act(conv(in y)))) * silu(gate y))
    state_space         out (norm(scan(silu(conv(in y))) * silu(gate y)))   `state_spaces`

Each reads the state of its layer and proposes steps (`layers.recurrence`); nothing is written. A
kind is one line of `MIXERS`. Over a mesh they are computed on every device of "tensor".
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import caches, layers
from ..caches import KVCache
from ..core import errors
from ..kernels.dtypes import accurate
from ..layers import ConvolutionState, DeltaState, State, Steps, Weight
from ..masks import Mask
from ..models import Past
from ..records import is_absent
from ..taps import tap
from . import parallel, state_spaces
from .config import Config
from .weights import Layer


class Mixer(NamedTuple):
    """A kind of recurrent layer.

    run: (config, weights, y (*lead, T, E), state, name) -> what is added to the residual, and the
        steps. An absent state `()` is that before a text.
    empty: (config, dtype) -> the state before a text, for activations of a dtype.
    """

    run: Callable[[Config, Layer, Tensor, State, str], tuple[Tensor, Steps]]
    empty: Callable[[Config, torch.dtype], State]


def mix(
    config: Config, mixer: str, weights: Layer, y: Tensor, state: State, name: str
) -> tuple[Tensor, Steps]:
    """What a recurrent layer adds to the residual, and its steps for the new tokens."""
    y = tap(f"{name}.mixer.input", y)
    return MIXERS[mixer].run(config, weights, y, state, name)


def with_states(config: Config, rows: KVCache, dtype: torch.dtype | None) -> KVCache:
    """An empty cache of these rows and of the empty states of the recurrent layers, if any."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    kinds = [MIXERS[config.layer_spec(i).mixer] for i in config.recurrent_layers]
    return caches.with_states(rows, (kind.empty(config, dtype) for kind in kinds))


def states_of(config: Config, cache: Past) -> dict[int, State]:
    """Number of a recurrent layer -> its state in a cache, `()` without one."""
    numbers = config.recurrent_layers
    if not numbers or is_absent(cache):
        return dict.fromkeys(numbers, ())
    return dict(zip(numbers, caches.states(cache), strict=True))


def check(config: Config, cache: Past, mask: Mask | Tensor | None) -> None:
    """Raise where a cache has not the states of the config, or where layers recur and a mask or a
    mesh lets tokens be read in another order than theirs.
    """
    count = len(config.recurrent_layers)
    found = count if is_absent(cache) else len(caches.states(cache))
    if found != count:
        wanted = f"with the states of {count} recurrent layers"
        remedy = "Make it with the cache function of this model: model.cache(size)."
        errors.fail("decoder", "cache", wanted, f"one with {found}", remedy)
    if count and mask is not None:
        remedy = (
            "A state has read all tokens before it: read one text a row (vmap), padded at its end, "
            "and commit the tokens that count."
        )
        got = f"a {type(mask).__name__}"
        errors.fail("decoder", "mask", "None for a model with recurrent layers", got, remedy)
    if count and parallel.in_parts():
        remedy = "Shard it over 'data' and 'tensor'."
        got = f"{count} recurrent layers"
        errors.fail("decoder", "config", "one of attention alone over 'context'", got, remedy)


def _affine(weight: Weight, bias: Weight, x: Tensor) -> Tensor:
    y = layers.linear(weight, x)
    return y if is_absent(bias) else y + bias


def _short_convolution(
    config: Config, weights: Layer, y: Tensor, state: State, name: str
) -> tuple[Tensor, Steps]:
    """out (c * conv(b * x)).

    Source: Liquid AI, LFM2 technical report, arXiv:2511.23404, section 2.
    """
    before, after, x = _affine(weights.mixer_in, weights.mixer_in_bias, y).chunk(3, -1)
    mixed, steps = layers.convolve(before * x, weights.convolution, weights.convolution_bias, state)
    mixed = tap(f"{name}.mixer.mixed", after * mixed)
    return _affine(weights.mixer_out, weights.mixer_out_bias, mixed), steps


def _empty_convolution(config: Config, dtype: torch.dtype) -> ConvolutionState:
    return _zeros(config, config.width, dtype)


def _zeros(config: Config, features: int, dtype: torch.dtype) -> ConvolutionState:
    return ConvolutionState(torch.zeros(config.convolution_size - 1, features, dtype=dtype))


def _gated_delta(
    config: Config, weights: Layer, y: Tensor, state: State, name: str
) -> tuple[Tensor, Steps]:
    """out (norm(scan(act(conv(in y)))) * silu(gate y)), with the gated delta rule as the scan.

    The log decay is -exp(log_rate) softplus(rate y + rate_bias), of each head or each feature of
    its keys, beta is a sigmoid. Gate and rate may be of low rank, and the gate a sigmoid (KDA).

    Source: Yang et al., Gated delta networks, arXiv:2412.06464, section 3.4; Kimi team, Kimi
        linear, arXiv:2510.26692.
    """
    K, Dk, Dv = config.state_key_heads, config.state_key_size, config.state_value_size
    low = "_down" if config.mixer_rank else ""
    names = ("mixer_in", f"mixer_gate{low}", "mixer_beta", f"mixer_rate{low}")
    features, gate, beta, rate = layers.linears([getattr(weights, name) for name in names], y)
    if low:
        gate = layers.linear(weights.mixer_gate, gate)
        rate = layers.linear(weights.mixer_rate, rate)
    convolution = () if is_absent(state) else state.convolution
    features, convolved = layers.convolve(features, weights.convolution, (), convolution)
    features = layers.activate(features, config.activation)
    q, k, v = features.split([K * Dk, K * Dk, config.state_heads * Dv], -1)
    q, k, v = (
        torch.unflatten(x, -1, (-1, size)).transpose(-2, -3)  # (*lead, heads, T, size)
        for x, size in ((q, Dk), (k, Dk), (v, Dv))
    )
    beta = torch.sigmoid(beta) * (2 if config.negative_eigenvalues else 1)
    rate = F.softplus(accurate(rate, weights.rate_bias) + weights.rate_bias)
    rate = torch.unflatten(rate, -1, (config.state_heads, -1))  # (*lead, T, H, Dk or 1)
    log_decay = -accurate(weights.log_rate, rate).exp().unsqueeze(-1) * rate
    log_decay = log_decay.transpose(-2, -3)
    out, steps = layers.delta_net(convolved, q, k, v, log_decay, beta.mT, state)
    out = out.transpose(-2, -3)  # (*lead, T, H, Dv)
    epsilon = config.mixer_norm_epsilon
    epsilon = config.norm_epsilon if epsilon is None else epsilon
    out = layers.rms_norm(out, weights.mixer_norm, epsilon=epsilon)
    gate = torch.unflatten(gate, -1, (-1, Dv))
    turn = torch.sigmoid if config.mixer_gate_activation == "sigmoid" else F.silu
    mixed = (out * turn(accurate(gate, out))).to(out.dtype).flatten(-2)
    return layers.linear(weights.mixer_out, tap(f"{name}.mixer.mixed", mixed)), steps


def _empty_delta(config: Config, dtype: torch.dtype) -> DeltaState:
    Hk, Dk, Hv = config.state_key_heads, config.state_key_size, config.state_heads
    convolution = _zeros(config, 2 * Hk * Dk + Hv * config.state_value_size, dtype)
    memory = torch.zeros(Hv, Dk, config.state_value_size, dtype=dtype)
    return DeltaState(convolution, accurate(memory, memory))


MIXERS = {
    "short_convolution": Mixer(_short_convolution, _empty_convolution),
    "gated_delta": Mixer(_gated_delta, _empty_delta),
    **dict.fromkeys(
        ("state_space", "state_space_and_attention"),
        Mixer(state_spaces.state_space, state_spaces.empty),
    ),
}
