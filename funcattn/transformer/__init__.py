"""The decoder: one Config, one tree of Params, six pure functions.

config     Config: what the mathematics needs to know and the weights do not say
capabilities  what a fast path computes of a Config: an allow-list
weights    Layer, Params, shapes, initialize
partition  how each weight is divided over the devices of a mesh: the table
parallel   what a device with a part of the weights says to the others
lengths    reading behind a past where rotary angles follow the length of the text
layer      one layer as a pure function: attention over the past and the new tokens, then the feed-forward
forward    the forward pass: embedding, the loop over layers, the last norm, the head
model      decoder(config) -> Model
rereading  loops over such a past: what is read first, what is read again
"""

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
from .layer import LayerContext, block
from .lengths import cache_layers, continues, length_of, noted
from .model import decoder, positions_of
from .partition import DATA, TENSOR
from .rereading import along, first_chunk, follower, one_by_one, places, renewed
from .weights import Layer, Params, initialize, shapes

# Names of before.
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
    "LayerSpec",
    "Params",
    "TENSOR",
    "along",
    "begin",
    "block",
    "cache_layers",
    "continues",
    "decoder",
    "embed_tokens",
    "final_norm",
    "forward_pass",
    "finish",
    "first_chunk",
    "follower",
    "head",
    "initialize",
    "layer_context",
    "length_of",
    "lm_head",
    "local_logits",
    "locate",
    "noted",
    "one_by_one",
    "places",
    "positions_of",
    "predict",
    "renewed",
    "run_layers",
    "shapes",
    "share",
    "why_not",
]
