"""One layer of a decoder as a pure function of its weights.

    x = x + attention(norm(x))              over the cache and the new tokens, or a recurrent mixer
    x = x + feed_forward(norm(x))           dense, or a mixture of experts

Layers of one spec are one function of different weights: this function is what is compiled or
rematerialized.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels, layers, taps
from ..kernels import Kernel, Part
from ..layers import Rotation, State, Steps, Weight
from ..masks import Mask
from ..records import is_absent
from ..rematerialization import remat
from ..taps import tap
from . import head_groups, latent, parallel, recurrent
from .config import Config, LayerSpec
from .weights import Layer


class LayerContext(NamedTuple):
    """The arguments common to all layers of a spec: rotation and mask of the new tokens."""

    rotation: Rotation | tuple[()]
    mask: Mask | Tensor | None
    temperature: Tensor | tuple[()] = ()  # (*lead, 1, T, 1), a factor of queries
    columns: tuple[Tensor, Tensor] | tuple[()] = ()  # of queries and keys, see layers.alibi


class LayerDelta(NamedTuple):
    """What new tokens add to the cache of a layer: k, v (*lead, K, T, D), or recurrent steps."""

    k: Tensor | tuple[()]
    v: Tensor | tuple[()]
    steps: Steps = ()


def block(
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    x: Tensor,
    context: LayerContext,
    past: Sequence[Part],
    *,
    name: str,
    kernel: str | Kernel | None,
    rows: int = 0,
    state: State = (),
    attention_input: Tensor | None = None,
) -> tuple[Tensor, LayerDelta]:
    """One layer: the residual (*lead, T, E) after it, and what new tokens add to its cache.

    Args:
        config, spec: of the layer.
        weights: its weights.
        x: the residual (*lead, T, E) before it.
        context: rotation and mask.
        past: segments of the cached keys and values of this layer; none without a cache.
        name: of the layer, for taps: `layers.3`.
        kernel: of attention; None chooses.
        rows: positions whose feed-forward is computed at a time, each block rematerialized, as are
            the groups of heads; 0 is all.
        state: that of a recurrent layer after the cached tokens; `()` without a cache.
        attention_input: (*lead, T, any width), read in the place of the norm of x.
    """
    y, attended, new = x, None, LayerDelta((), ())
    if spec.mixer != "none":
        if attention_input is not None:
            y = attention_input
        elif not is_absent(weights.attention_norm):
            y = _norm(config, x, weights.attention_norm, weights.attention_norm_bias)
        x = y if config.norm_placement == "residual" else x
        attended, new = _mix(config, spec, weights, y, context, past, state, name, kernel, rows)
        if not is_absent(weights.attention_after_norm):
            attended = _norm(config, attended, weights.attention_after_norm, ())
        attended = tap(f"{name}.attention.output", attended)
        x = x if config.parallel else _add(config, x, attended)
    if not spec.feeds:
        return tap(f"{name}.output", x), new
    if not config.shared_norm:
        placed = not is_absent(weights.feed_forward_norm)
        y = (
            _norm(config, x, weights.feed_forward_norm, weights.feed_forward_norm_bias)
            if placed
            else x
        )
    x = y if config.norm_placement == "residual" else x
    fed = _feed_forward(config, spec, weights, y, name, rows)
    if not is_absent(weights.feed_forward_after_norm):
        fed = _norm(config, fed, weights.feed_forward_after_norm, ())
    fed = tap(f"{name}.feed_forward.output", fed)
    fed = fed if attended is None or not config.parallel else attended + fed
    return tap(f"{name}.output", _add(config, x, fed)), new


def _add(config: Config, x: Tensor, more: Tensor) -> Tensor:
    return x + more if config.residual_scale == 1.0 else x + more * config.residual_scale


def _norm(config: Config, x: Tensor, weight: Tensor, bias: Weight) -> Tensor:
    if config.norm == "rms":
        return layers.rms_norm(x, weight, epsilon=config.norm_epsilon, offset=config.norm_offset)
    weight = weight + config.norm_offset if config.norm_offset else weight
    return layers.layer_norm(x, weight, bias, epsilon=config.norm_epsilon)


def _affine(weight: Weight, bias: Weight, x: Tensor, *, ends: bool = False) -> Tensor:
    """weight x + bias; `ends` is True where the outputs of all devices are summed (psum)."""
    y = parallel.reduce_from_region(layers.linear(weight, x)) if ends else layers.linear(weight, x)
    return y if is_absent(bias) else y + bias


def _affines(weights: Sequence[Weight], biases: Sequence[Weight], x: Tensor) -> tuple[Tensor, ...]:
    each = zip(layers.linears(weights, x), biases, strict=True)
    return tuple(y if is_absent(bias) else y + bias for y, bias in each)


def _mix(
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    y: Tensor,
    context: LayerContext,
    past: Sequence[Part],
    state: State,
    name: str,
    kernel: str | Kernel | None,
    rows: int,
) -> tuple[Tensor, LayerDelta]:
    """What attention, a recurrent layer or both of the same y add to the residual, and to the
    cache.
    """
    recurred = recurrent.mix(config, spec.mixer, weights, y, state, name) if spec.recurs else None
    if recurred is not None and not spec.attends:
        return recurred[0], LayerDelta((), (), recurred[1])
    inward, _, outward = config.attention_factors or (1.0, 1.0, 1.0)
    y = layers.times(y, inward)
    if rows and rows < y.shape[-2] and head_groups.can_split(config, weights, past):
        apart = lambda config, weights, y, context: _attend(
            config, spec, weights, y, context, (), name, kernel
        )
        attended, k, v = head_groups.by_groups(apart, config, weights, y, context)
    else:
        attended, k, v = _attend(config, spec, weights, y, context, past, name, kernel)
    attended = layers.times(attended, outward)
    if recurred is None:
        return attended, LayerDelta(k, v)
    return recurred[0] + attended, LayerDelta(k, v, recurred[1])


def _attend(
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    y: Tensor,
    context: LayerContext,
    past: Sequence[Part],
    name: str,
    kernel: str | Kernel | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention adds to the residual, and k, v (*lead, K, T, D) of the new tokens."""
    y = tap(f"{name}.attention.input", parallel.copy_to_region(y))
    if config.latent_size:
        of_tokens = context.rotation, context.mask, context.temperature
        mixed, row = latent.attend(
            config, spec, weights, y, *of_tokens, past, name=name, kernel=kernel
        )
        mixed = tap(f"{name}.attention.mixed", mixed)
        return _affine(weights.o, weights.o_bias, mixed, ends=True), row, row[..., :0]
    (H, K), (D, Dv) = parallel.heads(config), config.head_sizes
    q, k, v = _affines(
        (weights.q, weights.k, weights.v), (weights.q_bias, weights.k_bias, weights.v_bias), y
    )
    k = layers.times(k, config.attention_factors[1]) if config.attention_factors else k
    q = _heads(config, q, weights.q_norm, weights.q_norm_bias, H, D)
    k = _heads(config, k, weights.k_norm, weights.k_norm_bias, K, D)
    # torch.unflatten: torch.compile cannot trace the method under a default device.
    v = torch.unflatten(v, -1, (K, Dv)).transpose(-2, -3)
    if config.qkv_limit is not None:
        q, k, v = (x.clamp(-config.qkv_limit, config.qkv_limit) for x in (q, k, v))
    if spec.rotary:
        assert isinstance(context.rotation, Rotation)
        q, k = layers.rotate(q, context.rotation), layers.rotate(k, context.rotation)
    if config.late_head_norm and (spec.rotary or config.head_norm != "unit"):
        q, k = (
            _head_norm(config, x.transpose(-2, -3), norm, ()).transpose(-2, -3)
            for x, norm in ((q, weights.q_norm), (k, weights.k_norm))
        )
    if isinstance(context.temperature, Tensor):
        q = q * context.temperature
    q, k, v = (
        tap(f"{name}.attention.q", q),
        tap(f"{name}.attention.k", k),
        tap(f"{name}.attention.v", v),
    )
    if context.columns:
        q, k = (
            torch.cat([x, more.expand(*x.shape[:-1], more.shape[-1])], -1)
            for x, more in zip((q, k), context.columns, strict=True)
        )
    if parallel.in_parts():
        out = parallel.attend(config, spec, q, k, v, context.mask, past, kernel)
    elif not past and config.attention_cap is None and not config.sinks:
        out = kernels.attention(q, k, v, context.mask, scale=config.scale, kernel=kernel)
    else:
        parts = [*past, Part(k, v, () if context.mask is None else context.mask)]
        sinks = weights.sinks if config.sinks else None
        out = kernels.attend_parts(
            q, parts, scale=config.scale, cap=config.attention_cap, sinks=sinks, kernel=kernel
        )
    mixed = _gate(config, weights, y, out.transpose(-2, -3)).flatten(-2)
    mixed = tap(f"{name}.attention.mixed", mixed)
    return _affine(weights.o, weights.o_bias, mixed, ends=True), k, v


def _gate(config: Config, weights: Layer, y: Tensor, mixed: Tensor) -> Tensor:
    """What attention mixed, (*lead, T, H, D), times the gate of its input y."""
    if config.attention_gate == "none":
        return mixed
    gate = torch.unflatten(layers.linear(weights.attention_gate, y), -1, (mixed.shape[-2], -1))
    if config.gate_activation == "sigmoid":
        return mixed * torch.sigmoid(gate)
    wide = gate if gate.element_size() > 2 else gate.float()
    return mixed * torch.nn.functional.softplus(wide).to(mixed.dtype)


def _heads(config: Config, x: Tensor, norm: Weight, bias: Weight, heads: int, D: int) -> Tensor:
    """(*lead, T, heads D) to (*lead, heads, T, D), with the head norm of the config."""
    if config.head_norm == "rms_width":
        x = _norm(config, x, norm, ())
    x = torch.unflatten(x, -1, (heads, D))
    x = x if config.late_head_norm else _head_norm(config, x, norm, bias)
    return x.transpose(-2, -3)


def _head_norm(config: Config, x: Tensor, norm: Weight, bias: Weight) -> Tensor:
    """The norm of each head of (*lead, T, H, D)."""
    if config.head_norm == "rms":
        return layers.rms_norm(x, norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    if config.head_norm in ("layer", "layer_bias"):
        return layers.layer_norm(x, norm, bias, epsilon=config.norm_epsilon)
    if config.head_norm == "unit":
        return layers.rms_norm(x, x.new_ones(x.shape[-1]), epsilon=config.norm_epsilon)
    return x


def _feed_forward(
    config: Config, spec: LayerSpec, weights: Layer, y: Tensor, name: str, rows: int
) -> Tensor:
    y = tap(f"{name}.feed_forward.input", parallel.copy_to_region(y))
    if spec.experts:
        return _choose(config, weights, y, name)
    some = FeedForward(*(getattr(weights, field) for field in FeedForward._fields))
    if not rows or y.shape[-2] <= rows or taps.heard():
        return _dense(config, name, some, y)
    dense = remat(functools.partial(_dense, config, name))
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


def _dense(config: Config, name: str, weights: FeedForward, y: Tensor) -> Tensor:
    of_gate, outward = config.feed_forward_factors or (1.0, 1.0)
    if config.gated:
        gate, up = _affines((weights.gate, weights.up), (weights.gate_bias, weights.up_bias), y)
        gate = layers.times(gate, of_gate)
        inner = layers.gated(gate, up, config.activation, config.activation_limit)
    elif isinstance(weights.activation_weights, Tensor):
        inner = layers.xielu(_affine(weights.up, weights.up_bias, y), weights.activation_weights)
    else:
        inner = layers.activate(_affine(weights.up, weights.up_bias, y), config.activation)
    inner = tap(f"{name}.feed_forward.inner", inner)
    return layers.times(_affine(weights.down, weights.down_bias, inner, ends=True), outward)


def _choose(config: Config, weights: Layer, y: Tensor, name: str) -> Tensor:
    """The mixture of experts: each selected pair (token, expert) is one row of a product."""
    router, read = weights.router, y
    precise = config.choice_bias or config.latent_size > 0
    if precise and isinstance(router, Tensor) and y.element_size() < 4:
        router, read = router.float(), y.float()  # as in the published models
    scores = tap(f"{name}.feed_forward.router", _affine(router, weights.router_bias, read))
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
    chosen = expert.flatten()
    rows = y.unsqueeze(-2).expand(*expert.shape, -1)
    if config.routed_inputs:
        rows = rows * share.to(y.dtype).unsqueeze(-1)
        share = torch.ones_like(share)
    rows = rows.flatten(0, -2)

    def affine(weight: Weight, bias: Weight, x: Tensor) -> Tensor:
        out = layers.linear_experts(weight, x, chosen)
        return out if is_absent(bias) else out + bias[chosen]

    up = affine(weights.up, weights.up_bias, rows)
    if config.gated:
        gate = affine(weights.gate, weights.gate_bias, rows)
        inner = layers.gated(gate, up, config.activation, config.activation_limit)
    else:
        inner = layers.activate(up, config.activation)
    out = torch.unflatten(affine(weights.down, weights.down_bias, inner), 0, expert.shape)
    mixed = (out * share.to(out.dtype).unsqueeze(-1)).sum(-2)
    if config.shared_size:
        mixed = mixed + _shared(config, weights, y)
    return parallel.reduce_from_region(mixed)


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
