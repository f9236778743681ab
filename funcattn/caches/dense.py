"""`Cache`, the dense cache: one preallocated tensor of keys and one of values.

It is the plainest kind, and the reference for the others.
"""

import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.autograd import is_recorded
from ..kernels import Part
from ..records import record
from . import display, rows
from .making import features_of
from .protocol import (
    Delta,
    admit,
    capacity,
    exactly,
    grow,
    keeps_all,
    past,
    reset,
    reset_counts,
    sizes,
    write,
)


@record
class Cache(NamedTuple):
    """Keys k (L, K, S + 1, D) and values v (L, K, S + 1, Dv); the first `length` rows are valid.

    Row S is scratch: rejected rows are written there where shapes have to be static.
    """

    k: Tensor
    v: Tensor
    length: Tensor  # int64 ()
    __str__, _repr_html_ = display.line, display.bar

    @classmethod
    def empty(
        cls,
        layers: int,
        heads: int,
        size: int,
        head_size: int,
        dtype: torch.dtype | None = None,
        value_size: int | None = None,
    ) -> "Cache":
        """An empty cache with room for `size` tokens, on torch's default device."""
        features = features_of(head_size, value_size)
        k, v = (torch.zeros(layers, heads, size + 1, D, dtype=dtype) for D in features)
        return cls(k, v, torch.zeros((), dtype=torch.int64))


@capacity.register
def _(cache: Cache) -> int:
    return cache.k.shape[-2] - 1


@sizes.register
def _(cache: Cache) -> tuple[int, int, int]:
    return cache.k.shape[0], cache.k.shape[1], cache.k.shape[3]


@past.register
def _(cache: Cache, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    S = capacity(cache)
    k, v = cache.k[layer, ..., :S, :], cache.v[layer, ..., :S, :]
    return rows.read(k, v, positions, window, stop=cache.length)


@grow.register
def _(cache: Cache, rows: int) -> Cache:
    S = capacity(cache)
    more = lambda x: torch.cat(
        [x[..., :S, :], x.new_zeros(*x.shape[:-2], rows + 1, x.shape[-1])], -2
    )
    return Cache(more(cache.k), more(cache.v), cache.length)


keeps_all.register(Cache, exactly(Cache))
reset.register(Cache, reset_counts)


@write.register
def _(cache: Cache, delta: Delta, n: int | Tensor, donate: bool) -> Cache:
    delta = delta._replace(k=rows.joined(delta.k), v=rows.joined(delta.v))
    new = admit(cache, delta, n, (cache.k, cache.v))
    tensors = (new.k, new.v, cache.k, cache.v)
    if new.known and not is_recorded(*tensors):
        k, v = (
            (cache.k, cache.v) if donate else (_copied(x, new.before) for x in (cache.k, cache.v))
        )
        here = slice(new.before, new.before + new.count)
        k[..., here, :] = new.k[..., : new.count, :]
        v[..., here, :] = new.v[..., : new.count, :]
        return Cache(k, v, new.after)
    pairs = (cache.k, new.k), (cache.v, new.v)
    if donate and (found := rows.overwritten(pairs, new.before, new.count)) is not None:
        k, v = found
        return Cache(k, v, new.after)
    step = torch.arange(new.k.shape[-2], device=new.k.device)
    # Rejected rows go to the scratch row.
    row = torch.where(step < new.count, cache.length + step, capacity(cache))
    put = lambda x, rows: torch.ops.aten.index_put(x, [None, None, row], rows)
    return Cache(put(cache.k, new.k), put(cache.v, new.v), new.after)


def _copied(x: Tensor, length: int) -> Tensor:
    """A copy of the first `length` rows, with zeros behind them."""
    copy = _zeros(x)
    copy[..., :length, :] = x[..., :length, :]
    return copy


def _zeros(like: Tensor) -> Tensor:
    """Zeros in untouched pages, which take no memory; torch.zeros_like writes every page."""
    size = like.numel() * like.element_size()
    if like.device.type != "cpu" or not size:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).view(like.shape)
