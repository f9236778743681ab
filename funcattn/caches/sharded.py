"""`Spread`: a past whose rows lie on the devices of the axis "context", so that a text may be longer than one device remembers.

    device 0    rows 0 3 4 7 ...       each keeps rows of its own, in any order: all of the past is seen, so order does not matter
    device 1    rows 1 2 5 6 ...

What was read in parts (a ring) stays where it was read: `spread`. What is written then is the same on every device, and the row of
position p stays on device p mod n. Attention to it is one merge over the axis (`kernels.merge_over`), which the decoder does where
"context" is bound.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..collectives import axis_index, axis_size, psum
from ..kernels import Part
from ..records import record
from .branch import follow
from .dense import Cache
from .protocol import (
    OVERFLOWED,
    Delta,
    broken,
    capacity,
    commit,
    commit_own,
    grow,
    keeps_all,
    past,
    reset,
    reset_counts,
    sizes,
    with_length,
    write,
)

CONTEXT = "context"


@record
class Spread(NamedTuple):
    """A past over devices: `own` holds this device's rows, `length` counts those of all."""

    own: Cache
    length: Tensor  # int64 (), the same on every device

    @classmethod
    def empty(cls, layers: int, heads: int, size: int, head_size: int, dtype: torch.dtype | None = None) -> "Spread":
        """Room for `size` tokens in all, this device's share of it."""
        room = -(-size // axis_size(CONTEXT))
        return cls(Cache.empty(layers, heads, room, head_size, dtype), torch.zeros((), dtype=torch.int64))


def spread(delta: Delta, rows: int = 0) -> Spread:
    """The past of a text that was read in parts, each device with its own: what `extend` returned without a past.

    Args:
        delta: this device's keys and values, as many tokens on every device.
        rows: how many more, of all devices together, there should be room for.
    """
    T, n = delta.k[0].shape[-2], axis_size(CONTEXT)
    empty = follow((), delta, T + -(-rows // n))
    return Spread(commit(empty, delta), torch.full((), n * T, dtype=torch.int64, device=delta.k[0].device))


@capacity.register
def _(cache: Spread) -> int:
    return capacity(cache.own) * axis_size(CONTEXT)


@sizes.register
def _(cache: Spread) -> tuple[int, int, int]:
    return sizes(cache.own)


@broken.register
def _(cache: Spread) -> Tensor:
    held = torch.where(broken(cache.own), OVERFLOWED, cache.own.length)
    return psum(held, CONTEXT) != cache.length  # so too where each device wrote all tokens, outside of the mesh


@past.register
def _(cache: Spread, layer: int, places: Tensor, window: int | None = None) -> list[Part]:
    if window is not None:
        remedy = "Give it a Ring: a window is short, and needs no other device."
        _checks.fail("past", "cache", "other than a Spread in a layer with a window", "a Spread", remedy, TypeError)
    found = past(cache.own, layer, places, None)
    return found or [Part(cache.own.k[layer, ..., :0, :], cache.own.v[layer, ..., :0, :])]  # a part, so that it is known for a past


@grow.register
def _(cache: Spread, rows: int) -> Spread:
    return cache._replace(own=grow(cache.own, -(-rows // axis_size(CONTEXT))))


@keeps_all.register
def _(cache: Spread) -> bool:
    return type(cache) is Spread


reset.register(Spread, reset_counts)


@with_length.register
def _(cache: Spread, length: Tensor) -> Spread:
    remedy = "Keep the older value, which is as it was: a length does not say which device holds which token."
    _checks.fail("with_length", "cache", "a past that one device holds", "a Spread", remedy, TypeError)


@write.register
def _(cache: Spread, delta: Delta, n: Any, donate: bool) -> Spread:
    """Of new tokens that all devices hold alike, each keeps those of its positions."""
    devices, T = axis_size(CONTEXT), delta.k[0].shape[-2]
    if devices == 1 and _checks.is_true(cache.own.length != cache.length):
        remedy = "Write inside of the mesh: shard_map(f, mesh), or fa.sharding.inside(mesh), where f calls generate or commit."
        _checks.fail("commit", "cache", "on one device, or written where 'context' is bound", "a part of a Spread", remedy)
    row = torch.arange(T, device=cache.length.device)
    mine = ((cache.length + row) % devices == axis_index(CONTEXT).to(row.device)) & (row < n)
    order = (~mine).long().argsort(stable=True)
    take = lambda rows: tuple(x.index_select(-2, order) for x in rows)
    kept = Delta(take(delta.k), take(delta.v))
    put = commit_own if donate else commit
    return Spread(put(cache.own, kept, mine.sum()), cache.length + n)
