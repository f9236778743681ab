"""The decoder: one Config, one tree of Params, six pure functions.

mixers        the kinds of layers, attention and recurrent ones
layer_spec    what differs between layers; layer_sizes says what a Config must say of it
config        Config: the hyperparameters that weights do not determine
arguments     tokens, cache, positions and mask of a call, validated
capabilities  which values of Config a fast path computes: an allow-list
weights       Layer, Params, shapes, initialize
partition     how each weight is sharded over a mesh: the table
parallel      collectives of a decoder whose weights or tokens are sharded
lengths       reading behind a cache where rotary angles follow the length of the text
recurrent     the recurrent layers by kind, and their states in a cache
streams       residuals beside each other; layer_inputs: per-layer embeddings
layer         one layer as a pure function: attention to cache and new tokens, feed-forward
forward       the forward pass: embedding, the loop over layers, the last norm, the head
likelihoods   the cross-entropy of next tokens, without all logits
model         decoder(config) -> Model
rereading     when the text of such a cache is read again, and in which order
"""

from .arguments import positions_of
from .capabilities import ANY, why_not
from .config import Config, Kind, LayerSpec
from .forward import (
    embed_tokens,
    final_norm,
    forward_pass,
    layer_context,
    lm_head,
    local_logits,
    predict,
    run_layers,
)
from .layer import LayerContext, LayerDelta, block
from .layer_spec import of_layer
from .lengths import cache_layers, cache_sizes, continues, length_of, noted
from .likelihoods import token_losses, vocabulary_size, weighted_loss
from .model import decoder
from .partition import DATA, TENSOR
from .rereading import (
    along,
    along_tree,
    first_chunk,
    follower,
    hidden_of_tree,
    one_by_one,
    places,
    renewed,
    rows_of_path,
)
from .streams import check_one
from .weights import Layer, Params, initialize, shapes

# Deprecated names.
Block, share, begin, finish = LayerContext, layer_context, embed_tokens, final_norm
locate, head, predict_own = positions_of, lm_head, local_logits

__all__ = [
    "ANY",
    "Block",
    "Config",
    "DATA",
    "Kind",
    "Layer",
    "LayerContext",
    "LayerDelta",
    "LayerSpec",
    "Params",
    "TENSOR",
    "along",
    "along_tree",
    "begin",
    "block",
    "cache_layers",
    "cache_sizes",
    "check_one",
    "continues",
    "decoder",
    "embed_tokens",
    "final_norm",
    "forward_pass",
    "finish",
    "first_chunk",
    "follower",
    "head",
    "hidden_of_tree",
    "initialize",
    "layer_context",
    "length_of",
    "lm_head",
    "local_logits",
    "locate",
    "noted",
    "of_layer",
    "one_by_one",
    "places",
    "positions_of",
    "predict",
    "renewed",
    "rows_of_path",
    "run_layers",
    "shapes",
    "token_losses",
    "vocabulary_size",
    "weighted_loss",
    "share",
    "why_not",
]
