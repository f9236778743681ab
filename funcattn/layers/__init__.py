"""The layers of a decoder as functions of a weight and an activation.

    products    linear, linears, dense, embed: dispatch on the type of the weight; Blocks
    dense_products   products of float32 with many vectors, by the faster library
    factors     Factors: a weight of low rank, as its two matrices
    layouts     fields: how the tensors of a weight are divided among devices
    prepared    prepare: the memory layout of a weight that compiled decoding reads fastest
    norms       rms_norm, layer_norm
    rotary      RopeScaling, frequencies, rope, rotate
    activations the activations of a feed-forward
    recurrence  state_after, join_steps: the states of recurrent layers as values
    short_convolution   convolve, and its state
    alibi       a bias linear in the distance, as columns of queries and keys
    experts     route, linear_experts: mixture of experts with static shapes
    scans       Scanned: a linear attention that forgets, in chunks
    delta_states, space_states   delta_net, space_net: such a scan behind a state
    gated_linear, delta_rule, state_spaces   linear_attention, gated_delta (KDA too), Mamba-2's

Matrices are (out, in), as torch and Hugging Face store them. A quantized weight is a record that
registers its implementations.
"""

from .activations import ACTIVATIONS, activate, gated, sparse, times, xielu
from .alibi import COLUMNS as ALIBI_COLUMNS
from .alibi import key_columns, query_columns, slopes
from .delta_rule import gated_delta, gated_delta_states
from .delta_states import DeltaState, DeltaSteps, delta_net
from .experts import linear_experts, route
from .factors import Factors
from .gated_linear import linear_attention, linear_attention_states
from .layouts import fields
from .norms import layer_norm, rms_norm
from .prepared import MAX_UNROLLED_VECTORS, prepare
from .products import (
    BLOCK,
    Blocks,
    Weight,
    by_blocks,
    dense,
    embed,
    is_vector,
    linear,
    linears,
    rows_times,
    together,
)
from .recurrence import State, Steps, join_steps, rows_from, state_after
from .rotary import RopeScaling, Rotation, frequencies, rope, rotate
from .scans import Scanned
from .short_convolution import ConvolutionState, ConvolutionSteps, convolve
from .space_states import SpaceState, SpaceSteps, space_net
from .state_spaces import state_space

SEVERAL = MAX_UNROLLED_VECTORS  # Alias: the earlier name.

__all__ = [
    "ACTIVATIONS",
    "ALIBI_COLUMNS",
    "BLOCK",
    "Blocks",
    "ConvolutionState",
    "ConvolutionSteps",
    "DeltaState",
    "DeltaSteps",
    "Factors",
    "RopeScaling",
    "Rotation",
    "Scanned",
    "SpaceState",
    "SpaceSteps",
    "State",
    "Steps",
    "Weight",
    "MAX_UNROLLED_VECTORS",
    "SEVERAL",
    "activate",
    "by_blocks",
    "convolve",
    "delta_net",
    "dense",
    "embed",
    "fields",
    "frequencies",
    "gated",
    "gated_delta",
    "gated_delta_states",
    "is_vector",
    "join_steps",
    "key_columns",
    "layer_norm",
    "linear",
    "linear_attention",
    "linear_attention_states",
    "linear_experts",
    "linears",
    "prepare",
    "query_columns",
    "rms_norm",
    "rope",
    "rotate",
    "route",
    "rows_from",
    "rows_times",
    "slopes",
    "sparse",
    "space_net",
    "state_after",
    "state_space",
    "times",
    "together",
    "xielu",
]
