"""Per-layer embeddings: features of each token that every layer reads, beside the residual.

    i_l = (table(token)_l sqrt(P) + norm(W_l x / sqrt(E))) / sqrt(2)       P features for layer l
    x   = x + norm(out (act(gate x) * i_l))                               behind its feed-forward

x in the first line is the embedding, (*lead, T, E). A token beyond the table reads its first row.
The table is the largest weight of such a model and is only read: it may be in codes.

Source: Gemma team, Gemma 3n (2025).
"""

import torch
from torch import Tensor

from .. import layers
from . import parallel
from .config import Config
from .weights import Layer, Params


def of_tokens(config: Config, params: Params, tokens: Tensor, x: Tensor) -> Tensor | tuple[()]:
    """What each layer reads, (*lead, L, T, P); () where layers read none.

    Args:
        config, params: of the model.
        tokens: int64 (*lead, T).
        x: the residual before the first layer, (*lead, T, E), or streams, whose first it is.
    """
    P, L = config.layer_embedding_size, config.layers
    if not P:
        return ()
    x = x.select(-3, 0) if config.streams else x
    table = parallel.vector(
        "layer_embedding", params.layer_embedding, (config.layer_vocabulary, L * P)
    )
    weight = parallel.vector("layer_projection", params.layer_projection, (L * P, config.width))
    norm = parallel.vector("layer_projection_norm", params.layer_projection_norm, (P,))
    known = torch.where(tokens < config.layer_vocabulary, tokens, 0)
    apart = lambda y: torch.unflatten(y, -1, (L, P))
    scaled = lambda y, factor: y * torch.full((), factor, dtype=y.dtype, device=y.device)
    told = apart(scaled(layers.embed(table, known), P**0.5))
    made = apart(scaled(layers.linear(weight, x), config.width**-0.5))
    made = layers.rms_norm(made, norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    return scaled(made + told, 0.5**0.5).transpose(-2, -3)


def added(config: Config, weights: Layer, x: Tensor, inputs: Tensor) -> Tensor:
    """norm(out (act(gate x) * inputs)): (*lead, T, E) of x (*lead, T, E), inputs (*lead, T, P)."""
    gate = layers.activate(layers.linear(weights.input_gate, x), config.activation)
    out = layers.linear(weights.input_out, gate * inputs)
    options = {"epsilon": config.norm_epsilon, "offset": config.norm_offset}
    return layers.rms_norm(out, weights.input_norm, **options)
