"""One layer of a decoder as a pure function of its weights.

    x = x + attention(norm(x))              over the cache and the new tokens, or a recurrent mixer
    x = x + feed_forward(norm(x))           dense, or a mixture of experts

Layers of one spec are one function of different weights: this function is what is compiled or
rematerialized.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels, layers
from ..kernels import Kernel, Part
from ..layers import Rotation, State, Steps, Weight
from ..masks import Mask
from ..records import is_absent
from ..taps import tap
from . import head_groups, latent, layer_inputs, parallel, recurrent, streams
from .affine import affine, affines, norm_of
from .config import Config, LayerSpec
from .feed_forward import apart, feed_forward
from .layer_spec import of_layer
from .weights import Layer


class LayerContext(NamedTuple):
    """The arguments common to all layers of a spec: rotation and mask of the new tokens."""

    rotation: Rotation | tuple[()]
    mask: Mask | Tensor | None
    temperature: Tensor | tuple[()] = ()  # (*lead, 1, T, 1), a factor of queries
    columns: tuple[Tensor, Tensor] | tuple[()] = ()  # of queries and keys, see layers.alibi
    # Of one layer alone: what it reads of each token, and new keys and values of another layer.
    inputs: Tensor | tuple[()] = ()  # (*lead, T, P)
    lent: tuple[Tensor, Tensor] | tuple[()] = ()


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
    config, before = of_layer(config, spec), ()
    if config.streams:
        before = streams.predict(config, weights, x)
        x = before.select(-3, config.active_stream)
    parts = (context, past, name, kernel, rows, state, attention_input)
    x, new = _parts(config, spec, weights, x, *parts)
    if isinstance(before, Tensor):
        x = streams.correct(config, weights, before, x, context.inputs)
    elif isinstance(context.inputs, Tensor):
        x = x + layer_inputs.added(config, weights, x, context.inputs)
    x = x * weights.layer_scale if isinstance(weights.layer_scale, Tensor) else x
    return tap(f"{name}.output", x), new


def _parts(
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    x: Tensor,
    context: LayerContext,
    past: Sequence[Part],
    name: str,
    kernel: str | Kernel | None,
    rows: int,
    state: State,
    attention_input: Tensor | None,
) -> tuple[Tensor, LayerDelta]:
    """The residual behind attention and feed-forward."""
    y, attended, new = x, None, LayerDelta((), ())
    if spec.mixer != "none":
        if attention_input is not None:
            y = attention_input
        elif not is_absent(weights.attention_norm):
            y = norm_of(config, x, weights.attention_norm, weights.attention_norm_bias)
        x = y if config.norm_placement == "residual" else x
        attended, new = _mix(config, spec, weights, y, context, past, state, name, kernel, rows)
        if not is_absent(weights.attention_after_norm):
            attended = norm_of(config, attended, weights.attention_after_norm, ())
        attended = tap(f"{name}.attention.output", attended)
        x = x if config.parallel else _add(config, x, attended)
        x = streams.laurel(config, weights, x, y) if config.laurel_size else x
    if not spec.feeds:
        return x, new
    if not config.shared_norm:
        placed = not is_absent(weights.feed_forward_norm)
        y = (
            norm_of(config, x, weights.feed_forward_norm, weights.feed_forward_norm_bias)
            if placed
            else x
        )
    x = y if config.norm_placement == "residual" else x
    if spec.experts and config.experts_apart:
        fed = apart(config, weights, x, name)
    else:
        fed = feed_forward(config, spec, weights, y, name, rows)
    if not is_absent(weights.feed_forward_after_norm):
        fed = norm_of(config, fed, weights.feed_forward_after_norm, ())
    fed = tap(f"{name}.feed_forward.output", fed)
    fed = fed if attended is None or not config.parallel else attended + fed
    return _add(config, x, fed), new


def _add(config: Config, x: Tensor, more: Tensor) -> Tensor:
    return x + more if config.residual_scale == 1.0 else x + more * config.residual_scale


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
        return attended, LayerDelta(k, v) if spec.caches else LayerDelta((), ())
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
        return affine(weights.o, weights.o_bias, mixed, ends=True), row, row[..., :0]
    (H, K), (D, Dv) = parallel.heads(config), config.head_sizes
    if context.lent:
        q, k, v = *affines((weights.q,), (weights.q_bias,), y), *context.lent
    else:
        own = ("q", "k") if is_absent(weights.v) else ("q", "k", "v")
        made = affines(
            [getattr(weights, x) for x in own], [getattr(weights, f"{x}_bias") for x in own], y
        )
        q, k, v = *made[:2], made[-1]
        k = layers.times(k, config.attention_factors[1]) if config.attention_factors else k
        k = _heads(config, k, weights.k_norm, weights.k_norm_bias, K, D)
        # torch.unflatten: torch.compile cannot trace the method under a default device.
        v = torch.unflatten(v, -1, (K, Dv)).transpose(-2, -3)
        v = _unit(config, v) if config.value_norm else v
    q = _heads(config, q, weights.q_norm, weights.q_norm_bias, H, D)
    if config.qkv_limit is not None:
        q, k, v = (x.clamp(-config.qkv_limit, config.qkv_limit) for x in (q, k, v))
    if spec.rotary:
        assert isinstance(context.rotation, Rotation)
        q = layers.rotate(q, context.rotation)
        k = k if context.lent else layers.rotate(k, context.rotation)
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
    return affine(weights.o, weights.o_bias, mixed, ends=True), k, v


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
        x = norm_of(config, x, norm, ())
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
        return _unit(config, x)
    return x


def _unit(config: Config, x: Tensor) -> Tensor:
    return layers.rms_norm(x, x.new_ones(x.shape[-1]), epsilon=config.norm_epsilon)
