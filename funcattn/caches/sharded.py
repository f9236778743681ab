"""`ShardedCache`: rows divided over the mesh axis "context", for very long texts.

    device 0    rows 0 3 4 7 ...    in any order: each token sees all, so order is irrelevant
    device 1    rows 1 2 5 6 ...

The rows of the chunk of a text that a device has read (ring attention) stay there:
`ShardedCache.from_local`. Rows that are committed later are the same on every device, and the row
of position p is stored on device p mod n. Attention to the cache is one merge over the axis
(`kernels.merge_over`), which the decoder does where "context" is bound.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..collectives import axis_index, axis_size, psum
from ..core import errors
from ..kernels import Part
from ..records import record
from .branch import fork
from .dense import Cache
from .protocol import (
    OVERFLOWED,
    Delta,
    capacity,
    commit,
    commit_donated,
    exactly,
    grow,
    keeps_all,
    overflowed,
    past,
    reset,
    reset_counts,
    sizes,
    with_length,
    write,
)

CONTEXT = "context"


@record
class ShardedCache(NamedTuple):
    """A cache over devices: `local` holds this device's rows, `length` counts all rows."""

    local: Cache
    length: Tensor  # int64 (), the same on every device

    @classmethod
    def empty(
        cls,
        layers: int,
        heads: int,
        size: int,
        head_size: int,
        dtype: torch.dtype | None = None,
        value_size: int | None = None,
    ) -> "ShardedCache":
        """Room for `size` tokens over all devices: ceil(size / n) rows on each of n."""
        room = -(-size // axis_size(CONTEXT))
        return cls(
            Cache.empty(layers, heads, room, head_size, dtype, value_size),
            torch.zeros((), dtype=torch.int64),
        )

    @classmethod
    def from_local(cls, delta: Delta, rows: int = 0) -> "ShardedCache":
        """The cache of a text of which each device has read one chunk by `extend` without a cache.

        Args:
            delta: this device's keys (K, T, D) and values (K, T, Dv) per layer, equal T.
            rows: room for this many more tokens, over all devices together.
        """
        T, n = delta.k[0].shape[-2], axis_size(CONTEXT)
        empty = fork((), delta, T + -(-rows // n))
        return cls(
            cast(Cache, commit(empty, delta)),
            torch.full((), n * T, dtype=torch.int64, device=delta.k[0].device),
        )


@capacity.register
def _(cache: ShardedCache) -> int:
    return capacity(cache.local) * axis_size(CONTEXT)


@sizes.register
def _(cache: ShardedCache) -> tuple[int, int, int]:
    return sizes(cache.local)


@overflowed.register
def _(cache: ShardedCache) -> Tensor:
    held = torch.where(overflowed(cache.local), OVERFLOWED, cache.local.length)
    # Also True where each device wrote all tokens, outside of the mesh.
    return psum(held, CONTEXT) != cache.length


@past.register
def _(cache: ShardedCache, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    if window is not None:
        remedy = "Give it a Ring: a window is short, and needs no other device."
        errors.fail(
            "past",
            "cache",
            "other than a ShardedCache in a layer with a window",
            "a ShardedCache",
            remedy,
            TypeError,
        )
    found = past(cache.local, layer, positions, None)
    none = lambda x: x[layer, ..., :0, :]
    # An empty segment tells the layer that there is a cache.
    return found or [Part(none(cache.local.k), none(cache.local.v))]


@grow.register
def _(cache: ShardedCache, rows: int) -> ShardedCache:
    return cache._replace(local=grow(cache.local, -(-rows // axis_size(CONTEXT))))


keeps_all.register(ShardedCache, exactly(ShardedCache))
reset.register(ShardedCache, reset_counts)


@with_length.register
def _(cache: ShardedCache, length: Tensor) -> ShardedCache:
    remedy = (
        "Keep the older value, which is as it was: a length does not say which device holds which "
        "token."
    )
    errors.fail(
        "with_length", "cache", "a past that one device holds", "a ShardedCache", remedy, TypeError
    )


@write.register
def _(cache: ShardedCache, delta: Delta, n: int | Tensor, donate: bool) -> ShardedCache:
    """New rows are the same on all devices; store those with position % n == device index."""
    devices, T = axis_size(CONTEXT), delta.k[0].shape[-2]
    if devices == 1 and errors.is_true(cache.local.length != cache.length):
        remedy = (
            "Write inside of the mesh: shard_map(f, mesh), or fa.sharding.inside(mesh), where f "
            "calls generate or commit."
        )
        errors.fail(
            "commit",
            "cache",
            "on one device, or written where 'context' is bound",
            "a part of a ShardedCache",
            remedy,
        )
    row = torch.arange(T, device=cache.length.device)
    mine = ((cache.length + row) % devices == axis_index(CONTEXT).to(row.device)) & (row < n)
    order = (~mine).long().argsort(stable=True)
    take = lambda rows: tuple(x.index_select(-2, order) for x in rows)
    kept = Delta(take(delta.k), take(delta.v))
    put = commit_donated if donate else commit
    return ShardedCache(put(cache.local, kept, mine.sum()), cache.length + n)
