"""The layers of a decoder as functions of a weight and an activation.

    products    linear, linears, dense, embed: dispatch on the type of the weight; Blocks
    layouts     fields: how the tensors of a weight are divided among devices
    prepared    prepare: the memory layout of a weight that compiled decoding reads fastest
    norms       rms_norm, layer_norm
    rotary      RopeScaling, frequencies, rope, rotate
    activations the activations of a feed-forward
    alibi       a bias linear in the distance, as columns of queries and keys
    experts     route, linear_experts: mixture of experts with static shapes

Matrices are (out, in), as torch and Hugging Face store them. A quantized weight is a record that
registers its implementations.
"""

from .activations import ACTIVATIONS, activate, gated, xielu
from .alibi import COLUMNS as ALIBI_COLUMNS
from .alibi import key_columns, query_columns, slopes
from .experts import linear_experts, route
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
from .rotary import RopeScaling, Rotation, frequencies, rope, rotate

SEVERAL = MAX_UNROLLED_VECTORS  # Alias: the earlier name.

__all__ = [
    "ACTIVATIONS",
    "ALIBI_COLUMNS",
    "BLOCK",
    "Blocks",
    "RopeScaling",
    "Rotation",
    "Weight",
    "MAX_UNROLLED_VECTORS",
    "SEVERAL",
    "activate",
    "by_blocks",
    "dense",
    "embed",
    "fields",
    "frequencies",
    "gated",
    "is_vector",
    "key_columns",
    "layer_norm",
    "linear",
    "linear_experts",
    "linears",
    "prepare",
    "query_columns",
    "rms_norm",
    "rope",
    "rotate",
    "route",
    "rows_times",
    "slopes",
    "together",
    "xielu",
]
