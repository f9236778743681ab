"""A past as the operator of layers takes it: dense rows in order, and codes before them."""

from typing import NamedTuple, cast

from torch import Tensor

from .. import caches
from ..caches import Branch, Cache, KVCache, QuantizedCache
from .conditions import is_mapped


class Codes(NamedTuple):
    """Codes of a past for the operator: tensors of all blocks, rows of a block, bits of a code."""

    tensors: list[Tensor]
    rows: int
    bits: int


NO_CODES = Codes([], 0, 0)


def parts_of(cache: KVCache) -> tuple[list[Cache], Codes]:
    """The `Cache`s that a dense or coded cache consists of, in order, and its codes."""
    if isinstance(cache, Branch):
        before, codes = parts_of(cache.prefix)
        return before + parts_of(cache.tail)[0], codes
    if isinstance(cache, QuantizedCache):
        dense, tensors, rows, bits = caches.rows_and_codes(cache)
        return dense, Codes(tensors, rows, bits)
    return [cast(Cache, cache)], NO_CODES


def codes_in_common(cache: KVCache) -> bool:
    """True where the codes of a past in codes, and their number, are not mapped.

    The operator then reads them once for all texts of a vmap.
    """
    if isinstance(cache, Branch):
        return codes_in_common(cache.prefix)
    if not isinstance(cache, QuantizedCache) or is_mapped(cache.length):
        return False
    return not any(map(is_mapped, parts_of(cache)[1].tensors))
