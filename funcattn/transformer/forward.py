"""The forward pass of a decoder, written once.

    x = embed_tokens(tokens)
    x, new = run(x)                 for each layer
    logits = lm_head(final_norm(x))

`run` is an argument: the decoder runs a layer as it is or rematerialized, compiled decoding runs a
few layers as one function, calibration modifies each layer before it runs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import caches, kernels, layers, masks, taps
from ..caches import Delta, KVCache
from ..collectives import bound
from ..core import errors
from ..core.doors import what_is
from ..kernels import Part
from ..layers import Rotation, Weight
from ..masks import Mask
from ..records import ABSENT, is_absent
from . import lengths, parallel, streams
from .config import Config, LayerSpec
from .layer import LayerContext, LayerDelta
from .layer_spec import has_sizes, of_layer
from .weights import Layer, Params


class RunLayer(Protocol):
    """(number, spec, weights, x, context) -> the residual (*lead, T, E) after the layer, and what
    the new tokens add to the cache; context is the same for all layers of the spec.
    """

    def __call__(
        self, number: int, spec: LayerSpec, weights: Layer, x: Tensor, context: LayerContext, /
    ) -> tuple[Tensor, LayerDelta]: ...


def forward_pass(
    config: Config,
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    through: Callable[[Tensor], tuple[Tensor, Delta]],
    *,
    normed: bool = False,
) -> tuple[Tensor, Delta]:
    """The residual (*lead, T, E) after the last norm, and the delta of the new tokens.

    Args:
        config, params: of the model.
        tokens, positions: int64 (*lead, T).
        through: the residual -> the residual after all layers, and what these add to the cache.
        normed: True where `through` ends with the last norm.
    """
    x, delta = through(taps.tap("embedding", embed_tokens(config, params, tokens, positions)))
    return x if normed else final_norm(config, params, x), delta


def run_layers(
    config: Config,
    specs: Sequence[LayerSpec],
    weights: Iterable[Layer],
    x: Tensor,
    positions: Tensor,
    run: RunLayer,
    *,
    mask: Mask | Tensor | None = None,
    in_order: bool = True,
    length: Tensor | None = None,
    inputs: Tensor | tuple[()] = (),
) -> tuple[Tensor, Delta]:
    """The residual after some layers, each computed by `run`, and what they add to the cache.

    Args:
        config: of the model.
        specs, weights: of the layers, which are numbered from 0.
        x: the residual (*lead, T, E) before them.
        positions, mask, in_order, length: of the new tokens, as in `layer_context`.
        run: computes one layer.
        inputs: what each layer reads of the tokens, see `layer_inputs.of_tokens`.
    """
    contexts: dict[LayerSpec, LayerContext] = {}
    added: list[tuple[LayerSpec, LayerDelta]] = []
    for number, (spec, layer) in enumerate(zip(specs, weights, strict=True)):
        if spec not in contexts:
            contexts[spec] = layer_context(config, spec, positions, mask, x.dtype, in_order, length)
        context = contexts[spec]
        if isinstance(inputs, Tensor):
            context = context._replace(inputs=inputs.select(-3, number))
        if spec.keys_of is not None:
            context = context._replace(lent=added[spec.keys_of][1][:2])
        x, new = run(number, spec, layer, x, context)
        added.append((spec, new))
    if has_sizes(config):  # the order of `Config.cache_groups`
        added.sort(key=lambda each: each[0].window is None)
    keys = tuple(new.k for _, new in added if isinstance(new.k, Tensor))
    values = tuple(new.v for _, new in added if isinstance(new.v, Tensor))
    return x, Delta(keys, values, tuple(new.steps for spec, new in added if spec.recurs))


def embed_tokens(config: Config, params: Params, tokens: Tensor, positions: Tensor) -> Tensor:
    """The residual (*lead, T, E) before the first layer, or streams (*lead, A, T, E) of it.

    Raises:
        ValueError: params do not fit the config.
    """
    _check_params(params, config)
    x = parallel.embed(config, params.embedding, tokens)
    x = layers.linear(params.embedding_in, x) if config.embedding_size else x
    if config.embedding_scale != 1.0:
        # Rounded to the dtype of x first, as in the published models.
        x = x * torch.full((), config.embedding_scale, dtype=x.dtype, device=x.device)
    if config.positions == "learned":
        table = parallel.vector("positions", params.positions, (config.context, config.width))
        x = x + layers.embed(table, positions)
    x = _norm(config, params, "embedding_norm", x) if config.embedding_norm else x
    return streams.begin(config, params, x)


def final_norm(config: Config, params: Params, x: Tensor) -> Tensor:
    """The residual after the last layer, normalized: (*lead, T, E); what the head reads."""
    x = _norm(config, params, "norm", streams.end(config, params, x))
    if not config.head_transform:
        return x
    E = config.width
    y = layers.linear(parallel.vector("transform", params.transform, (E, E)), x)
    bias = parallel.vector("transform_bias", params.transform_bias, (E,))
    y = layers.activate(y if is_absent(bias) else y + bias, config.activation)
    return _norm(config, params, "transform_norm", y)


def _norm(config: Config, params: Params, name: str, x: Tensor) -> Tensor:
    """The norm of the leaves `name` and its bias."""
    norm = parallel.vector(name, getattr(params, name), (config.width,))
    if config.norm == "rms":
        return layers.rms_norm(x, norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    norm = norm + config.norm_offset if config.norm_offset else norm
    bias = parallel.vector(f"{name}_bias", getattr(params, f"{name}_bias"), (config.width,))
    return layers.layer_norm(x, norm, bias, epsilon=config.norm_epsilon)


def lm_head(params: Params) -> Weight:
    """The weight of the head (V, E); the embedding where they are tied, `Factors` of low rank."""
    if not hasattr(params, "head"):
        remedy = "Make them with model.init(key), or take those of fa.load."
        errors.fail(
            "decoder", "params", "the weights of a decoder", what_is(params), remedy, TypeError
        )
    head = params.embedding if is_absent(params.head) else params.head
    return head if is_absent(params.embedding_out) else layers.Factors(head, params.embedding_out)


def predict(config: Config, head: Weight, hidden: Tensor, bias: Weight = ABSENT) -> Tensor:
    """Logits (*lead, V) of hidden (*lead, E), by the weight of the head or the tied embedding."""
    return parallel.gather_vocab(config, local_logits(config, head, hidden, bias))


def local_logits(config: Config, head: Weight, hidden: Tensor, bias: Weight = ABSENT) -> Tensor:
    """The logits of this device's shard of the vocabulary: all V, unless "tensor" is bound.

    Raises:
        ValueError: the config has a bias of the head, and none was given.
    """
    out = parallel.head(config, head, hidden)
    if config.head_bias:
        if is_absent(bias):
            remedy = "Make them with model.init(key), or take those of fa.load."
            errors.fail(
                "decoder", "params", "those of the config, with a head_bias", "none", remedy
            )
        out = out + parallel.head_bias(config, bias)
    if config.logit_scale != 1.0:
        out = out * config.logit_scale
    return out if config.logit_cap is None else kernels.soft_cap(out, config.logit_cap)


def layer_context(
    config: Config,
    spec: LayerSpec,
    positions: Tensor,
    mask: Mask | Tensor | None,
    dtype: torch.dtype,
    in_order: bool,
    length: Tensor | None = None,
) -> LayerContext:
    """The rotation and the mask common to all layers of a spec.

    Args:
        config, spec: of the layers.
        positions: int64 (*lead, T), the position of each new token.
        mask: which new tokens each new token attends to; None is causal.
        dtype: of activations.
        in_order: True where positions are consecutive, as they are unless they were given.
        length: of the text, for rotary angles that follow it: int64 (*lead), or (*lead, T) for each
            token. None is one more than the greatest position.
    """
    config = of_layer(config, spec)
    T = positions.shape[-1]
    rotation: Rotation | tuple[()] = ()
    if spec.rotary:
        base = config.local_rope_base if spec.local else config.rope_base
        scaling = None if spec.local else config.rope_scaling
        assert base is not None
        if scaling is not None and scaling.follows_length:
            length = lengths.length_of(positions) if length is None else length
        size = (config.local_rotary_size if spec.local else None) or config.rotary_size
        size = size or config.head_size
        inv_freq = layers.frequencies(
            size, base=base, scaling=scaling, length=length, device=positions.device
        )
        amplitude = 1.0 if scaling is None else scaling.attention
        if inv_freq.dim() > positions.dim():  # frequencies for each token
            # (*lead, T, 1, 1, D)
            each = layers.rope(positions.unsqueeze(-1), inv_freq, dtype, amplitude=amplitude)
            rotation = Rotation(*(x.squeeze(-2).transpose(-2, -3) for x in each))
        else:
            rotation = layers.rope(positions, inv_freq, dtype, amplitude=amplitude)
    if mask is None and T > 1:
        # The offset is a tensor so that the mask is on the device of the positions.
        mask = masks.causal(T, offset=torch.zeros((), dtype=torch.int64, device=positions.device))
    short = in_order and spec.window is not None and spec.window >= T and not config.chunked
    if spec.window is not None and mask is not None and not short:
        if in_order and isinstance(mask, Mask) and config.chunked:
            first = (chunk_start(spec, positions) - positions[..., :1]).clamp(0, T)
            near = Mask(first.unsqueeze(-1), torch.full_like(first, T).unsqueeze(-1))
            mask = masks.intersection(mask, near)
        elif in_order and isinstance(mask, Mask):
            near: Mask | Tensor = masks.window(
                T, spec.window, offset=torch.zeros((), dtype=torch.int64, device=positions.device)
            )
            mask = masks.intersection(mask, near)
        else:  # given positions are in any order: the window is one of positions, not of rows
            first = (
                chunk_start(spec, positions) if config.chunked else positions - (spec.window - 1)
            )
            near_rows = positions.unsqueeze(-2) >= first.unsqueeze(-1)
            seen = mask.dense(T) if isinstance(mask, Mask) else mask
            mask = seen & (near_rows.unsqueeze(-3) if seen.dim() > 2 else near_rows)
    temperature: Tensor | tuple[()] = ()
    if config.attention_temperature is not None and not (config.late_temperature and spec.rotary):
        factor, size = config.attention_temperature
        warmth = 1 + factor * torch.log1p(((positions + config.late_temperature) // size).float())
        temperature = warmth.to(dtype)[..., None, :, None]
    columns: tuple[Tensor, Tensor] | tuple[()] = ()
    if config.positions == "alibi":
        slope = parallel.slopes(config, positions.device)
        query = layers.query_columns(positions, slope, config.scale, dtype)
        columns = query, layers.key_columns(positions, dtype)
    return LayerContext(rotation, mask, temperature, columns)


def seen(
    config: Config, spec: LayerSpec, cache: KVCache, number: int, positions: Tensor
) -> list[Part]:
    """The cached keys and values of a layer that new tokens at `positions` (T,) attend to."""
    if config.chunked and spec.window is not None:
        # The last position of its chunk has the chunk as its window.
        positions = chunk_start(spec, positions) + (spec.window - 1)
    return caches.past(cache, number, positions, spec.window)


def chunk_start(spec: LayerSpec, positions: Tensor) -> Tensor:
    """The position that the chunk of each position begins at."""
    assert spec.window is not None
    return positions // spec.window * spec.window


def _check_params(params: Params, config: Config) -> None:
    if not hasattr(params, "layers"):
        remedy = (
            "Make them with model.init(key), or take those of fa.load; arguments come in the order "
            "params, tokens, cache."
        )
        errors.fail(
            "decoder", "params", "the weights of a decoder", what_is(params), remedy, TypeError
        )
    count, norm = len(params.layers), params.norm
    # With a mesh bound, weights may be shards.
    if count == config.layers and (bound() or norm.shape[-1:] == (config.width,)):
        return
    got = f"{count} layers" if count != config.layers else f"a width of {errors.shape(norm)[-1]}"
    wanted = f"those of the config: {config.layers} layers of width {config.width}"
    errors.fail(
        "decoder",
        "params",
        wanted,
        got,
        "Config, params and tokenizer of one fa.load belong together.",
    )
