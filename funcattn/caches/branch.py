"""`Branch`, a past that continues another: how many futures hold one past once. `follow` begins one, `join` ends it."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._doors import door
from ..kernels import Part
from ..records import record
from .dense import Cache
from .protocol import (
    Delta,
    broken,
    capacity,
    check_whole,
    grow,
    keeps_all,
    past,
    reset,
    sizes,
    with_length,
    write,
)


@record
class Branch(NamedTuple):
    """A past that continues another: `prefix` is held once and never written, `own` is the tail that grows.

    Under vmap the prefix is not mapped, so 32 futures of one past store it once.
    """

    prefix: Any
    own: Any

    @property
    def length(self) -> Tensor:
        """Tokens remembered by both together, int64 ()."""
        return self.prefix.length + self.own.length


@door
@functools.singledispatch
def follow(cache: Any, delta: Delta, size: int) -> Any:
    """A past to write `size` tokens in, which continues the given one and leaves it as it is.

    With no past it is an empty dense one, shaped like the delta. A dense past gets such a tail behind it, and `Pages` a tail of
    pages; a `Branch` keeps its prefix, and its own tail grows. Every other kind continues in its own form, by `grow`.
    """
    return grow(cache, size) if type(cache) is not tuple else _tail(delta, size)


_follow = follow  # its name when it was not public


def fork(cache: Any, delta: Delta, size: int) -> Any:
    """`follow` for many futures: the tail of a `Branch` is held once too, since each writes in a tail of its own behind it."""
    if not isinstance(cache, Branch):
        return follow(cache, delta, size)
    after = fork(cache.own, delta, size)
    behind = isinstance(after, Branch) and after.prefix is cache.own
    return Branch(cache, after.own) if behind else Branch(cache.prefix, after)


def _tail(delta: Delta, size: int) -> Cache:
    k, v = delta.k[0], delta.v[0]
    room = lambda x: x.new_zeros(len(delta.k), x.shape[-3], size + 1, x.shape[-1])
    return Cache(room(k), room(v), torch.zeros((), dtype=torch.int64, device=k.device))


@door
def join(branch: Branch) -> Any:
    """The prefix with the own tail written behind it: a past of the prefix's kind and capacity.

    Raises:
        ValueError: the prefix has no room for the tail.
        TypeError: not a Branch, or a tail that does not hold its rows as they came.
    """
    if not isinstance(branch, Branch):
        _checks.fail("join", "branch", "a Branch", f"a {type(branch).__name__}", "Any other past is already one.", TypeError)
    check_whole("join", branch)
    own, last = branch.own, branch.prefix
    while isinstance(last, Branch):
        last = last.own
    held, more = _checks.integer(last.length), _checks.integer(own.length)
    if held is not None and more is not None and held + more > capacity(last):
        wanted, got = f"with room for the {more} tokens of its tail", f"{capacity(last) - held}"
        remedy = f"Grow it first: branch._replace(prefix=funcattn.caches.grow(branch.prefix, {more}))."
        _checks.fail("join", "branch.prefix", wanted, got, remedy)
    return write(branch.prefix, rows_of(own), own.length, False)


@functools.singledispatch
def rows_of(cache: Any) -> Delta:
    """All rows that a past has room for, those that count first: what `join` writes behind the prefix."""
    remedy = "Keep the Branch: it can be continued and grown as it is."
    _checks.fail("join", "branch.own", "a past that holds its rows as they came", f"a {type(cache).__name__}", remedy, TypeError)


@rows_of.register
def _(cache: Cache) -> Delta:
    rows = lambda x: tuple(x[..., : capacity(cache), :].unbind(0))
    return Delta(rows(cache.k), rows(cache.v))


@rows_of.register
def _(cache: Branch) -> Delta:
    return rows_of(join(cache))


@follow.register
def _(cache: Cache, delta: Delta, size: int) -> Branch:
    return Branch(cache, _tail(delta, size))


@keeps_all.register
def _(cache: Branch) -> bool:
    return keeps_all(cache.prefix) and keeps_all(cache.own)


@reset.register
def _(cache: Branch, empty: Branch, where: Tensor) -> Branch:
    return Branch(reset(cache.prefix, empty.prefix, where), reset(cache.own, empty.own, where))


@capacity.register
def _(cache: Branch) -> int:
    return capacity(cache.prefix) + capacity(cache.own)


@sizes.register
def _(cache: Branch) -> tuple[int, int, int]:
    return sizes(cache.own)


@broken.register
def _(cache: Branch) -> Tensor:
    return broken(cache.prefix) | broken(cache.own)


@past.register
def _(cache: Branch, layer: int, places: Tensor, window: int | None = None) -> list[Part]:
    behind = places - cache.prefix.length  # the own tail counts its rows from 0
    return [*past(cache.prefix, layer, places, window), *past(cache.own, layer, behind, window)]


@grow.register
def _(cache: Branch, rows: int) -> Branch:
    return Branch(cache.prefix, grow(cache.own, rows))


@with_length.register
def _(cache: Branch, length: Tensor) -> Branch:
    return Branch(cache.prefix, with_length(cache.own, length))


@write.register
def _(cache: Branch, delta: Delta, n: Any, donate: bool) -> Branch:
    return Branch(cache.prefix, write(cache.own, delta, n, donate))
