"""Weights times activations, and rows of a table.

`linear` and `embed` dispatch on the type of the weight: a quantized weight is a record whose module registers itself here, so
the decoder never knows what its weights are made of.
"""

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import _checks


@functools.singledispatch
def linear(weight: Any, x: Tensor) -> Tensor:
    """x (*lead, in) times a weight (out, in), giving (*lead, out). A record registers its own way: `@linear.register`."""
    wanted = "a tensor or a record that registered itself with layers.linear"
    _checks.fail(
        "linear", "weight", wanted, f"a {type(weight).__name__}", "Register it with @funcattn.layers.linear.register.", TypeError
    )


@linear.register
def _(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


@functools.singledispatch
def embed(weight: Any, ids: Tensor) -> Tensor:
    """Rows of a weight (V, E) at integer ids (*lead,), giving (*lead, E). A record registers its own way."""
    wanted = "a tensor or a record that registered itself with layers.embed"
    _checks.fail(
        "embed", "weight", wanted, f"a {type(weight).__name__}", "Register it with @funcattn.layers.embed.register.", TypeError
    )


@embed.register
def _(weight: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, weight)
