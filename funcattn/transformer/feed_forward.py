"""The feed-forward of a layer: dense, or a mixture of experts, or both with norms of their own.

apart       norm(dense(norm(x))) + norm(experts(norm(x))), chosen by softmax(router s x / |x|)
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import layers, taps
from ..layers import Weight
from ..records import is_absent
from ..rematerialization import remat
from ..taps import tap
from . import parallel
from .affine import affine, affines, norm_of
from .config import Config, LayerSpec
from .weights import Layer


def feed_forward(
    config: Config, spec: LayerSpec, weights: Layer, y: Tensor, name: str, rows: int
) -> Tensor:
    """What the feed-forward of a layer makes of its input y (*lead, T, E); so many rows at a time,
    each block rematerialized, where rows is not 0.
    """
    y = tap(f"{name}.feed_forward.input", parallel.copy_to_region(y))
    if spec.experts:
        return parallel.reduce_from_region(_choose(config, weights, y, y, name))
    some = FeedForward(*(getattr(weights, field) for field in FeedForward._fields))
    if not rows or y.shape[-2] <= rows or taps.heard():
        return _dense(config, spec, name, some, y)
    dense = remat(functools.partial(_dense, config, spec, name))
    return torch.cat([dense(some, part) for part in y.split(rows, -2)], -2)


class FeedForward(NamedTuple):
    """The weights of a dense feed-forward."""

    gate: Weight
    up: Weight
    down: Weight
    gate_bias: Weight
    up_bias: Weight
    down_bias: Weight
    activation_weights: Weight


def apart(config: Config, weights: Layer, x: Tensor, name: str) -> Tensor:
    """What a dense feed-forward (the shared expert) and experts make of the residual x, each
    between norms of its own. The router reads x of mean square one, times a weight and E^-1/2.
    """
    one = layers.rms_norm(x, x.new_ones(x.shape[-1]), epsilon=config.norm_epsilon)
    read = parallel.copy_to_region(one) * weights.router_scale * config.width**-0.5
    y = parallel.copy_to_region(norm_of(config, x, weights.shared_norm, ()))
    dense = parallel.reduce_from_region(_shared(config, weights, y))
    y = norm_of(config, x, weights.feed_forward_norm, weights.feed_forward_norm_bias)
    y = tap(f"{name}.feed_forward.input", parallel.copy_to_region(y))
    chosen = parallel.reduce_from_region(_choose(config, weights, y, read, name))
    dense = norm_of(config, dense, weights.shared_after_norm, ())
    return dense + norm_of(config, chosen, weights.expert_after_norm, ())


def _dense(config: Config, spec: LayerSpec, name: str, weights: FeedForward, y: Tensor) -> Tensor:
    of_gate, outward = config.feed_forward_factors or (1.0, 1.0)
    if config.gated:
        gate, up = affines((weights.gate, weights.up), (weights.gate_bias, weights.up_bias), y)
        gate = layers.times(gate, of_gate)
        gate = layers.sparse(gate, spec.sparsity) if spec.sparsity else gate
        inner = layers.gated(gate, up, config.activation, config.activation_limit)
    elif isinstance(weights.activation_weights, Tensor):
        inner = layers.xielu(affine(weights.up, weights.up_bias, y), weights.activation_weights)
    else:
        inner = layers.activate(affine(weights.up, weights.up_bias, y), config.activation)
    inner = tap(f"{name}.feed_forward.inner", inner)
    return layers.times(affine(weights.down, weights.down_bias, inner, ends=True), outward)


def _choose(config: Config, weights: Layer, y: Tensor, read: Tensor, name: str) -> Tensor:
    """The mixture of experts of y, chosen by what the router reads: each selected pair (token,
    expert) is one row of a product. Over "tensor" it is a partial sum.
    """
    router = weights.router
    precise = config.choice_bias or config.latent_size > 0
    if precise and isinstance(router, Tensor) and y.element_size() < 4:
        router, read = router.float(), read.float()  # as in the published models
    scores = tap(f"{name}.feed_forward.router", affine(router, weights.router_bias, read))
    share, expert = layers.route(
        scores,
        config.experts_per_token,
        normalized=config.normalized_routing,
        scores=config.router_scores,
        choice_bias=weights.choice_bias,
        groups=(config.expert_groups, config.groups_per_token),
        group_best=config.group_best,
        scale=config.routing_scale,
        margin=config.router_margin,
    )
    if isinstance(weights.expert_scale, Tensor):
        share = share * weights.expert_scale[expert]
    chosen = expert.flatten()
    rows = y.unsqueeze(-2).expand(*expert.shape, -1)
    if config.routed_inputs:
        rows = rows * share.to(y.dtype).unsqueeze(-1)
        share = torch.ones_like(share)
    rows = rows.flatten(0, -2)

    def by_expert(weight: Weight, bias: Weight, x: Tensor) -> Tensor:
        out = layers.linear_experts(weight, x, chosen)
        return out if is_absent(bias) else out + bias[chosen]

    up = by_expert(weights.up, weights.up_bias, rows)
    if config.gated:
        gate = by_expert(weights.gate, weights.gate_bias, rows)
        inner = layers.gated(gate, up, config.activation, config.activation_limit)
    else:
        inner = layers.activate(up, config.activation)
    out = torch.unflatten(by_expert(weights.down, weights.down_bias, inner), 0, expert.shape)
    mixed = (out * share.to(out.dtype).unsqueeze(-1)).sum(-2)
    if config.shared_size and not config.experts_apart:
        mixed = mixed + _shared(config, weights, y)
    return mixed


def _shared(config: Config, weights: Layer, y: Tensor) -> Tensor:
    """The expert that every token takes, times a sigmoid of its own where it is gated."""
    if config.gated:
        gate, up = layers.linears((weights.shared_gate, weights.shared_up), y)
        inner = layers.gated(gate, up, config.activation, config.activation_limit)
    else:
        inner = layers.activate(layers.linear(weights.shared_up, y), config.activation)
    out = layers.linear(weights.shared_down, inner)
    if not config.shared_gated:
        return out
    return out * torch.sigmoid(layers.linear(weights.shared_router, y))
