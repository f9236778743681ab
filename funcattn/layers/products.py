"""Weights times activations, and rows of an embedding table.

`linear` and `embed` dispatch on the type of the weight. A quantized weight is a record that
registers its implementation here, so the decoder does not depend on the types of its weights.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import errors
from ..core.tangents import affine
from ..kernels.products import computed
from ..records import record
from .dense_products import multiply

# A matrix or vector of a decoder: a tensor, a DTensor, a record that registered with `linear`
# (quantized, with a low-rank update, in blocks), or `()` where a config lacks it.
Weight: TypeAlias = Any

BLOCK = 16  # rows of a block: the float32 numbers in a 512-bit vector


@functools.singledispatch
def linear(weight: Weight, x: Tensor) -> Tensor:
    """x (*lead, in) times a weight (out, in), giving (*lead, out).

    Record types register an implementation with `@linear.register`.
    """
    wanted = "a tensor or a record that registered itself with layers.linear"
    errors.fail(
        "linear",
        "weight",
        wanted,
        f"a {type(weight).__name__}",
        "Register it with @funcattn.layers.linear.register.",
        TypeError,
    )


@linear.register
def _(weight: Tensor, x: Tensor) -> Tensor:
    if (
        torch.compiler.is_compiling()
        and is_vector(x)
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    ):
        return rows_times(weight, x)
    y = multiply(weight, x)
    return affine(x, weight) if y is None else y


# Types with one call for several products, by type.
together: dict[type, Callable[[Sequence[Weight], Tensor], tuple[Tensor, ...]]] = {}


def linears(weights: Sequence[Weight], x: Tensor) -> tuple[Tensor, ...]:
    """Several weights times the same x: `linear` of each, or one call for types in `together`.

    Args:
        weights: each (out, in), out may differ.
        x: floating (*lead, in).

    Law: linears(weights, x) is linear(weight, x) of each (test_layers.py).
    """
    kinds = [type(weight) for weight in weights]
    if kinds[0] in together and all(kind is kinds[0] for kind in kinds):
        return together[kinds[0]](weights, x)
    return tuple(linear(weight, x) for weight in weights)


def is_vector(x: Tensor) -> bool:
    """True where all axes of x but the last have size 1."""
    return all(isinstance(n, int) and n == 1 for n in x.shape[:-1])


def rows_times(weight: Tensor, x: Tensor) -> Tensor:
    """A row-major matrix (N, K) times one vector, as products and sums, a loop in Inductor.

    Inductor's loop reads memory as fast as the machine can: all linears of SmolLM2 take 0.73 of the
    time of the library routine on column-major matrices, and 0.58 on row-major ones (one thread,
    AVX-512). Sums are in float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (weight.to(wide) * computed(x.reshape(-1).to(wide))).sum(-1)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@record
class Blocks(NamedTuple):
    """A matrix (N, K) stored for products with a few vectors at once: entries (N / 16, K, 16).

    Each block of 16 rows is stored column by column. `by_blocks` makes it; compiled code reads it
    once for all vectors.
    """

    entries: Tensor


def by_blocks(weight: Tensor) -> Blocks:
    """Store a matrix (N, K), N a multiple of 16, as `Blocks`."""
    return Blocks(weight.unflatten(0, (-1, BLOCK)).mT.contiguous())


@linear.register
def _(weight: Blocks, x: Tensor) -> Tensor:
    """One sum for each vector, which the compiler fuses into one loop over the matrix.

    The lanes of a vector register are rows of the matrix, so no sum is taken across lanes, and the
    sums of the vectors are independent. On SmolLM2, 4 vectors cost 1.2 to 1.35 of one, 5 cost 1.5;
    by the library routine 5 cost 3 (one thread, AVX-512).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    entries, vectors = (
        weight.entries.to(wide),
        computed(x.reshape(-1, x.shape[-1]).to(wide)).unbind(0),
    )
    y = torch.stack([(entries * vector.unsqueeze(-1)).sum(-2).flatten() for vector in vectors])
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@functools.singledispatch
def dense(weight: Weight, columns: int, like: Tensor) -> Tensor:
    """The matrix (out, columns) of a weight, in the dtype of `like`: to multiply by its transpose.

    A record that registers nothing is multiplied by the identity.

    Law: the matrix of `linear`, with its derivatives (test_layers.py).
    """
    return linear(weight, torch.eye(columns, dtype=like.dtype, device=like.device)).mT


@dense.register
def _(weight: Tensor, columns: int, like: Tensor) -> Tensor:
    return weight.to(like.dtype)


@functools.singledispatch
def embed(weight: Weight, ids: Tensor) -> Tensor:
    """Rows of a weight (V, E) at integer ids (*lead,), giving (*lead, E).

    Record types register an implementation with `@embed.register`.
    """
    wanted = "a tensor or a record that registered itself with layers.embed"
    errors.fail(
        "embed",
        "weight",
        wanted,
        f"a {type(weight).__name__}",
        "Register it with @funcattn.layers.embed.register.",
        TypeError,
    )


@embed.register
def _(weight: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, weight)
