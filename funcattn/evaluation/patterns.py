"""Attention patterns: how much each token attends to each other one, in every head of a layer.

    P = attention(q, k, identity)          the weights are what attention makes of the identity

q and k are those of a traced run, and the kernel, mask, window, soft cap and sinks those of the
model, so the pattern is that of the model whatever its family.
"""

import torch
from torch import Tensor

from .. import kernels, transformer
from ..core import errors
from ..core.doors import door, what_is
from ..models import Model
from ..tree import Tree
from .activations import trace


@door
def attention_pattern(model: Model, params: Tree, tokens: Tensor, layer: int) -> Tensor:
    """The attention weights of a layer.

    Args:
        model, params: a decoder and its weights, also patched.
        tokens: integers (*lead, T).
        layer: its number; negative ones count from the last.

    Returns:
        (*lead, H, T, T): query, key. Rows sum to one; with attention sinks to less.
        `attention_maps(pattern, labels)` shows it.

    Raises:
        ValueError: no such layer, a model without a Config or taps. TypeError: arguments of another
            kind.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> attention_pattern(model, model.init(fa.key(0)), torch.arange(5), -1).shape
        torch.Size([4, 5, 5])

    Law: its product with the values is what the layer mixes
        (test_patterns.py::test_a_pattern_mixes_the_values_as_the_layer_does).
    """
    config = model.config
    if config is None:
        remedy = "Its mask is that of the Config: make the model with fa.decoder(config)."
        errors.fail("attention_pattern", "model", "from fa.decoder", what_is(model), remedy)
    if not errors.is_int(layer) or not -config.layers <= layer < config.layers:
        wanted = f"one of {config.layers} layers, from 0"
        errors.fail(
            "attention_pattern", "layer", wanted, layer, "Negative ones count from the last."
        )
    if not config.layer_spec(layer % config.layers).attends:
        got = f"{layer}, of {config.mixers[layer]!r}"
        errors.fail("attention_pattern", "layer", "one with attention", got, "Take another.")
    name = f"layers.{layer % config.layers}.attention"
    _, seen = trace(model, params, tokens, [f"{name}.q", f"{name}.k"])
    q, k = seen[f"{name}.q"], seen[f"{name}.k"]
    T = k.shape[-2]
    spec = config.layer_spec(layer % config.layers)
    positions = torch.arange(T, device=k.device)
    mask = transformer.layer_context(config, spec, positions, None, k.dtype, True).mask
    identity = torch.eye(T, dtype=k.dtype, device=k.device).expand(*k.shape[:-1], T)
    segment = kernels.KVSegment(k, identity, () if mask is None else mask)
    one = transformer.of_layer(config, spec)
    sinks = params.layers[layer].sinks if one.sinks else None
    return kernels.attend_segments(
        q,
        [segment],
        scale=one.scale,
        cap=config.attention_cap,
        sinks=sinks,
    )
