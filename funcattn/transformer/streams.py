"""Alternating updates: A residuals beside each other, of which a layer reads and writes one.

    z_p = x_p + sum_q P(x_a)_pq x_q             every stream is predicted; a is the active one
    y   = layer(z_a)
    x_p = z_p + (1 + c(y)_p) (y - z_a)          and corrected by what the layer did to the active

P and c are matrices of a small vector a token, tanh(router norm(x) / E). Behind that each stream
but the first takes what `layer_inputs` makes of the active one. The streams begin as projections of
the embedding, with its magnitude, and end as the mean of projections of that of the first.

`laurel` is a low-rank residual beside attention: the mean, up to sqrt(2), of x + attention(y) and
of y + norm(up down y), where y is the input of attention.

Streams are (*lead, A, T, E). All of it is of one token at a time, outside of the regions that are
sharded over "tensor".

Source: Baykal et al., Alternating updates for efficient transformers, arXiv:2301.13310; Menghani
    et al., LAuReL, arXiv:2411.07501.
"""

import functools
import math

import torch
from torch import Tensor

from .. import layers
from ..core import errors
from ..layers import Weight
from . import layer_inputs, parallel
from .config import Config
from .weights import Layer, Params

LEAST = 1e-5  # of a mean square that is divided by


def check_one(function: str, config: Config) -> None:
    """Raise where the residual after a layer is several streams, for what reads one (T, E)."""
    if config.streams:
        remedy = "Read what the head reads, model.hidden, or a tap within the layers."
        errors.fail(function, "model", "one of a single residual", f"{config.streams}", remedy)


def begin(config: Config, params: Params, x: Tensor) -> Tensor:
    """The streams (*lead, A, T, E) of the embedding (*lead, T, E)."""
    if not config.streams:
        return x
    made = torch.func.vmap(layers.linear, (0, None), -3)(_table(config, params, "streams_in"), x)
    first = x.unsqueeze(-3)
    return torch.cat([first, _as_great(made, first)], -3)


def end(config: Config, params: Params, x: Tensor) -> Tensor:
    """The residual (*lead, T, E) that streams are the parts of."""
    if not config.streams:
        return x
    first, others = x.tensor_split([1], -3)
    weight = _table(config, params, "streams_out")
    made = torch.func.vmap(layers.linear, (0, -3), -3)(weight, others)
    return torch.cat([first, _as_great(made, first)], -3).mean(-3)


def _table(config: Config, params: Params, name: str) -> Weight:
    shape = (config.streams - 1, config.width, config.width)
    return parallel.vector(name, getattr(params, name), shape)


def _as_great(x: Tensor, like: Tensor) -> Tensor:
    """x with the root mean square of another, feature vector by feature vector."""
    wanted = like.square().mean(-1, keepdim=True).sqrt()
    return x * wanted / x.square().mean(-1, keepdim=True).clamp(min=LEAST).sqrt()


def predict(config: Config, weights: Layer, x: Tensor) -> Tensor:
    """The streams (*lead, A, T, E) before a layer, each from all."""
    A = config.streams
    chosen = _modalities(config, weights, x.select(-3, config.active_stream))
    shares = torch.unflatten(layers.linear(weights.stream_predict, chosen), -1, (A, A))
    return x + torch.matmul(shares, x.transpose(-2, -3)).transpose(-2, -3)


def correct(
    config: Config, weights: Layer, streams: Tensor, y: Tensor, inputs: Tensor | tuple[()]
) -> Tensor:
    """The streams after a layer that made y (*lead, T, E) of the active one."""
    chosen = _modalities(config, weights, y)
    factor = layers.linear(weights.stream_correct, chosen) + 1  # (*lead, T, A)
    moved = (y - streams.select(-3, config.active_stream)).unsqueeze(-3)
    after = streams + moved * factor.mT.unsqueeze(-1)
    if not isinstance(inputs, Tensor):
        return after
    read = after.select(-3, config.active_stream)
    read = read * weights.stream_scale if config.stream_scale else read
    more = layer_inputs.added(config, weights, read, inputs).unsqueeze(-3)
    first, others = after.tensor_split([1], -3)
    return torch.cat([first, others + more], -3)


def _modalities(config: Config, weights: Layer, x: Tensor) -> Tensor:
    """tanh(router norm(x) / E), (*lead, T, A)."""
    norm = functools.partial(
        layers.rms_norm, epsilon=config.norm_epsilon, offset=config.norm_offset
    )
    routed = layers.linear(weights.stream_router, norm(x, weights.stream_norm) / config.width)
    wide = routed if routed.element_size() > 2 else routed.float()
    return torch.tanh(wide).to(x.dtype)


def laurel(config: Config, weights: Layer, x: Tensor, y: Tensor) -> Tensor:
    """The residual x behind attention of y, with the low-rank one beside it."""
    low = layers.linear(weights.laurel_up, layers.linear(weights.laurel_down, y))
    options = {"epsilon": config.norm_epsilon, "offset": config.norm_offset}
    beside = y + layers.rms_norm(low, weights.laurel_norm, **options)
    return (x + beside) / math.sqrt(2)
