"""The decoder: one Config, one tree of Params, six pure functions.

config     Config: what the mathematics needs to know and the weights do not say
weights    Layer, Params, shapes, initialize
parallel   what a device with a part of the weights says to the others
blocks     one layer as a pure function: attention over the past and the new tokens, then the feed-forward
model      decoder(config) -> Model
"""

from .blocks import Block, block
from .config import Config, Kind
from .model import begin, decoder, finish, head, locate, predict, predict_own, share
from .parallel import DATA, TENSOR
from .weights import Layer, Params, initialize, shapes

__all__ = [
    "DATA",
    "TENSOR",
    "Block",
    "Config",
    "Kind",
    "Layer",
    "Params",
    "begin",
    "block",
    "decoder",
    "finish",
    "head",
    "initialize",
    "locate",
    "predict",
    "predict_own",
    "shapes",
    "share",
]
