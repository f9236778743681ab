"""The decoder: one Config, one tree of Params, six pure functions.

config     Config: what the mathematics needs to know and the weights do not say
weights    Layer, Params, shapes, initialize
partition  how each weight is divided over the devices of a mesh: the table
parallel   what a device with a part of the weights says to the others
lengths    reading behind a past where rotary angles follow the length of the text
blocks     one layer as a pure function: attention over the past and the new tokens, then the feed-forward
model      decoder(config) -> Model
rereading  loops over such a past: what is read first, what is read again
"""

from .blocks import Block, block
from .config import Config, Kind
from .lengths import cache_layers, continues, length_of, noted
from .model import begin, decoder, finish, head, local_logits, locate, predict, share
from .partition import DATA, TENSOR
from .rereading import along, first_chunk, follower, one_by_one, places, renewed
from .weights import Layer, Params, initialize, shapes

__all__ = [
    "DATA",
    "TENSOR",
    "Block",
    "Config",
    "Kind",
    "Layer",
    "Params",
    "along",
    "begin",
    "block",
    "cache_layers",
    "continues",
    "decoder",
    "finish",
    "first_chunk",
    "follower",
    "head",
    "initialize",
    "length_of",
    "locate",
    "noted",
    "one_by_one",
    "places",
    "predict",
    "local_logits",
    "renewed",
    "shapes",
    "share",
]
