"""`Grouped`: the cache of a model whose layers have keys of several sizes: one cache for each size.

The layers of the first cache come first, then those of the second, and so on; a delta has its
tensors in the same order. All have one length, capacity and kind.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..kernels import Part
from ..records import record
from . import display
from .protocol import (
    Delta,
    KVCache,
    capacity,
    groups,
    grow,
    keeps_all,
    overflowed,
    past,
    reset,
    sizes,
    with_length,
    write,
)


@record
class Grouped(NamedTuple):
    """Caches of one length, each of the layers whose keys have one size.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config(window=8, window_layers=(True, False), local_head_size=8))
        >>> [cache.k.shape for cache in model.cache(4).groups]
        [torch.Size([1, 2, 5, 8]), torch.Size([1, 2, 5, 16])]
    """

    groups: tuple[KVCache, ...]
    __str__, _repr_html_ = display.line, display.bar

    @property
    def length(self) -> Tensor:
        """Number of tokens in each of the caches, int64 ()."""
        return self.groups[0].length


def in_groups(groups: Sequence[KVCache]) -> KVCache:
    """The only cache, or several as a `Grouped`."""
    return groups[0] if len(groups) == 1 else Grouped(tuple(groups))


def each(cache: Grouped, f: Callable[..., KVCache], *more: tuple[object, ...]) -> Grouped:
    """f of each group, and of the item of it in each of more."""
    return Grouped(tuple(map(f, cache.groups, *more)))


def split(cache: Grouped, delta: Delta) -> tuple[Delta, ...]:
    """The rows of each group."""
    counts = [sizes(group)[0] for group in cache.groups]
    if sum(counts) != len(delta.k):
        wanted = f"with the rows of {sum(counts)} layers"
        remedy = "Use the cache of the same model."
        errors.fail("commit", "delta", wanted, len(delta.k), remedy)
    found, first = [], 0
    for count in counts:
        some = slice(first, first + count)
        found.append(Delta(delta.k[some], delta.v[some], delta.steps))
        first += count
    return tuple(found)


@groups.register
def _(cache: Grouped) -> tuple[KVCache, ...]:
    return cache.groups


@capacity.register
def _(cache: Grouped) -> int:
    return capacity(cache.groups[0])


@sizes.register
def _(cache: Grouped) -> tuple[int, int, int]:
    """All layers; heads and their size are those of the first group."""
    found = [sizes(group) for group in cache.groups]
    return sum(layers for layers, *_ in found), *found[0][1:]


@overflowed.register
def _(cache: Grouped) -> Tensor:
    return torch.stack([overflowed(group) for group in cache.groups]).any(0)


@past.register
def _(cache: Grouped, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    for group in cache.groups[:-1]:
        if layer < (count := sizes(group)[0]):
            return past(group, layer, positions, window)
        layer -= count
    return past(cache.groups[-1], layer, positions, window)


@write.register
def _(cache: Grouped, delta: Delta, n: int | Tensor, donate: bool) -> Grouped:
    return each(cache, lambda group, some: write(group, some, n, donate), split(cache, delta))


@grow.register
def _(cache: Grouped, rows: int) -> Grouped:
    return each(cache, lambda group: grow(group, rows))


@keeps_all.register
def _(cache: Grouped) -> bool:
    return all(map(keeps_all, cache.groups))


@reset.register
def _(cache: Grouped, empty: Grouped, where: Tensor) -> Grouped:
    return each(cache, lambda group, new: reset(group, new, where), empty.groups)


@with_length.register
def _(cache: Grouped, length: Tensor) -> Grouped:
    return each(cache, lambda group: with_length(group, length))


@display.tokens.register
def _(cache: Grouped) -> str:
    return display.tokens(cache.groups[0])
