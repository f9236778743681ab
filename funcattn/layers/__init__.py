"""The layers of a decoder as functions of a weight and an activation.

    products    linear, linears, embed: dispatch on the type of the weight; Blocks
    layouts     fields: how the tensors of a weight are divided among devices
    prepared    prepare: the memory layout of a weight that compiled decoding reads fastest
    norms       rms_norm, layer_norm
    rotary      RopeScaling, frequencies, rope, rotate
    activations the activations of a feed-forward
    recurrence  state_after, join_steps: the states of recurrent layers as values
    short_convolution   convolve, and its state
    experts     route, linear_experts: mixture of experts with static shapes

Matrices are (out, in), as torch and Hugging Face store them. A quantized weight is a record that
registers its implementations.
"""

from .activations import ACTIVATIONS, activate, gated
from .experts import linear_experts, route
from .layouts import fields
from .norms import layer_norm, rms_norm
from .prepared import MAX_UNROLLED_VECTORS, prepare
from .products import (
    BLOCK,
    Blocks,
    Weight,
    by_blocks,
    embed,
    is_vector,
    linear,
    linears,
    rows_times,
    together,
)
from .recurrence import State, Steps, join_steps, rows_from, state_after
from .rotary import RopeScaling, Rotation, frequencies, rope, rotate
from .short_convolution import ConvolutionState, ConvolutionSteps, convolve

SEVERAL = MAX_UNROLLED_VECTORS  # Alias: the earlier name.

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "Blocks",
    "ConvolutionState",
    "ConvolutionSteps",
    "RopeScaling",
    "Rotation",
    "State",
    "Steps",
    "Weight",
    "MAX_UNROLLED_VECTORS",
    "SEVERAL",
    "activate",
    "by_blocks",
    "convolve",
    "embed",
    "fields",
    "frequencies",
    "gated",
    "is_vector",
    "join_steps",
    "layer_norm",
    "linear",
    "linear_experts",
    "linears",
    "prepare",
    "rms_norm",
    "rope",
    "rotate",
    "route",
    "rows_from",
    "rows_times",
    "state_after",
    "together",
]
