"""Reading neighbouring blocks of codes: as rows in full precision, or by an operator."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, UntypedStorage

from ..core.autograd import has_tangent, transforming
from ..core.tensor_cache import prepared_from
from ..kernels import CodedSegment, Part
from ..kernels.coded import addresses
from . import rows
from .codes import QuantizedBlock, decode_keys, decode_values

MAX_QUERIES = 16  # of one call of the operator; more are bound by products, which floats have

_REQUIRES_GRAD = attrgetter("requires_grad")


def decoded(
    k: Sequence[QuantizedBlock], v: Sequence[QuantizedBlock], layer: int, R: int, D: int
) -> tuple[Tensor, Tensor]:
    """Keys and values (K, n R, D) that n blocks of R rows stand for in one layer."""
    of_layer = lambda blocks: QuantizedBlock(
        *[torch.stack([x[layer] for x in leaf], -3) for leaf in zip(*blocks, strict=True)]
    )
    keys, values = decode_keys(of_layer(k), R), decode_values(of_layer(v), D)
    return keys.flatten(-3, -2), values.flatten(-3, -2)


def tensors(k: Sequence[QuantizedBlock], v: Sequence[QuantizedBlock]) -> list[Tensor]:
    """Codes, scale and low of keys and of values of each block, as operators take them."""
    return list(chain.from_iterable(chain.from_iterable(zip(k, v, strict=True))))


def segment(
    k: tuple[QuantizedBlock, ...],
    v: tuple[QuantizedBlock, ...],
    some: range,
    layer: int,
    positions: Tensor,
    window: int | None,
    R: int,
    tail: Tensor,
    bits: int,
) -> Part | None:
    """Some blocks of one layer, of those of a cache with this tail of keys (L, K, C, D).

    positions: of tokens that see them, counted from the first row of all blocks. None where the
    operator does not read them: many tokens, autograd, transforms, compilers.
    """
    if torch.compiler.is_compiling() or transforming() or len(positions) > MAX_QUERIES:
        return None
    read_k, read_v = k[some.start : some.stop], v[some.start : some.stop]
    if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors(read_k, read_v))):
        return None
    if has_tangent(read_k, read_v) or positions.is_meta:
        return None
    D, first, n = tail.shape[-1], some.start * R, some.stop * R

    def decode() -> tuple[Tensor, Tensor, Any]:
        keys, values = decoded(read_k, read_v, layer, R, D)
        found = rows.read(keys, values, positions - first, window, stop=n - first)
        return found[0] if found else Part(keys[:, :0], values[:, :0])

    each = [first] * len(positions)
    each = each if window is None else (positions - (window - 1)).clamp(first, n).tolist()
    table = _table(k, v, some.stop, R, bits, tail, layer == 0)
    coded = CodedSegment(table, layer, [(begin, n) for begin in each], decode)
    return cast(Part, coded)  # which has its fields


def _table(
    k: tuple[QuantizedBlock, ...],
    v: tuple[QuantizedBlock, ...],
    count: int,
    R: int,
    bits: int,
    tail: Tensor,
    again: bool,
) -> Tensor:
    """The addresses of the first `count` blocks, which all layers of a step have in common.

    They are cached as long as the tail, which no two caches with other blocks have in common where
    `write` made them. Their storages are cached too, so that no address is dangling.

    again: look whether storages have other memory by now, as by `Tensor.share_memory_`.
    """

    def make() -> _Table:
        codes = tensors(k[:count], v[:count])
        table = addresses(codes, R, bits, tail.shape[-1])
        storages = [x.untyped_storage() for x in codes]
        return _Table(k, v, count, storages, list(map(UntypedStorage.data_ptr, storages)), table)

    held = prepared_from([tail], lambda: [make()], "addresses")
    known = held[0]
    if known.k is not k or known.v is not v or known.count != count:
        return make().addresses
    if again and list(map(UntypedStorage.data_ptr, known.storages)) != known.begins:
        known = held[0] = make()
    return known.addresses


class _Table(NamedTuple):
    """Addresses of `count` blocks, whose storages were at `begins`."""

    k: tuple[QuantizedBlock, ...]
    v: tuple[QuantizedBlock, ...]
    count: int
    storages: list[UntypedStorage]
    begins: list[int]
    addresses: Tensor
