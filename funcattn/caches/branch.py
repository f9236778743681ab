"""`Branch`: a cache that continues another, so that many futures of one prefix store it once.

`fork` makes one; `flatten` writes its tail into a copy of the prefix.
"""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..core import errors, huge_pages
from ..core.doors import door
from ..kernels import Part
from ..layers import State
from ..records import record
from . import display
from .dense import Cache
from .grouped import Grouped, each, in_groups, split
from .hybrid import Hybrid, with_states
from .protocol import (
    Delta,
    KVCache,
    Past,
    capacity,
    check_whole,
    groups,
    grow,
    keeps_all,
    overflowed,
    past,
    reset,
    sizes,
    states,
    with_length,
    write,
)


@record
class Branch(NamedTuple):
    """A cache that continues another: `prefix` is only read, `tail` is what grows.

    Under vmap the prefix is not mapped, so 32 futures of one prefix store it once.
    """

    prefix: KVCache
    tail: KVCache
    __str__, _repr_html_ = display.line, display.bar

    @property
    def length(self) -> Tensor:
        """Tokens in prefix and tail together, int64 ()."""
        return self.prefix.length + self.tail.length


@door
@functools.singledispatch
def fork(cache: Past, delta: Delta, size: int) -> KVCache:
    """A cache with room for `size` more tokens that continues the given one without modifying it.

    `()` gives an empty dense cache shaped like the delta. A dense cache gets a dense tail
    behind it, and `Pages` a tail of pages, as a `Branch`; a `Branch` grows its tail. Every
    other kind continues in its own form, by `grow`.

    Args:
        cache: any kind of cache, or ().
        delta: keys (K, T, D) and values (K, T, Dv) per layer, for shapes, dtype and device.
        size: number of tokens.
    """
    return grow(cache, size) if type(cache) is not tuple else _tail(delta, size)


def fork_many(cache: Past, delta: Delta, size: int) -> KVCache:
    """`fork` for many futures: the tail of a `Branch` is stored once too, before a new tail."""
    if isinstance(cache, Hybrid):
        return cache._replace(rows=fork_many(cache.rows, delta._replace(steps=()), size))
    if isinstance(cache, Grouped):
        return each(cache, lambda group, some: fork_many(group, some, size), split(cache, delta))
    if not isinstance(cache, Branch):
        return fork(cache, delta, size)
    after = fork_many(cache.tail, delta, size)
    if isinstance(after, Branch) and after.prefix is cache.tail:
        return Branch(cache, after.tail)
    return Branch(cache.prefix, after)


def _tail(delta: Delta, size: int) -> KVCache:
    alike = lambda rows: [(x.shape[-3], x.shape[-1]) for x in rows]
    made: list[Cache] = []
    for _, some in itertools.groupby(zip(delta.k, delta.v, strict=True), alike):
        (k, v), *more = some
        rows = [
            huge_pages.zeros(x, 1 + len(more), x.shape[-3], size + 1, x.shape[-1]) for x in (k, v)
        ]
        made.append(Cache(rows[0], rows[1], torch.zeros((), dtype=torch.int64, device=k.device)))
    return with_states(in_groups(made), (steps.before for steps in delta.steps))


@door
def flatten(branch: KVCache) -> KVCache:
    """The prefix with the rows of the tail appended: a cache of the prefix's kind and capacity.

    Args:
        branch: a `Branch`, or a `Hybrid` or a `Grouped` of such.

    Raises:
        ValueError: the prefix has no room for the tail.
        TypeError: not a Branch, or a tail whose kind does not keep all rows unquantized.
    """
    if found := states(branch):
        return with_states(flatten(_rows_alone(branch)), found)
    if isinstance(branch, Grouped):
        return each(branch, flatten)
    if not isinstance(branch, Branch):
        errors.fail(
            "flatten",
            "branch",
            "a Branch",
            f"a {type(branch).__name__}",
            "Any other past is already one.",
            TypeError,
        )
    check_whole("flatten", branch)
    tail, last = branch.tail, branch.prefix
    while isinstance(last, Branch):
        last = last.tail
    held, more = errors.integer(last.length), errors.integer(tail.length)
    if held is not None and more is not None and held + more > capacity(last):
        wanted, got = f"with room for the {more} tokens of its tail", f"{capacity(last) - held}"
        remedy = (
            f"Grow it first: branch._replace(prefix=funcattn.caches.grow(branch.prefix, {more}))."
        )
        errors.fail("flatten", "branch.prefix", wanted, got, remedy)
    return write(branch.prefix, rows_of(tail), tail.length, False)


def _rows_alone(cache: KVCache) -> KVCache:
    """The cache without the states of recurrent layers."""
    if isinstance(cache, Branch):
        return Branch(_rows_alone(cache.prefix), _rows_alone(cache.tail))
    return cache.rows if isinstance(cache, Hybrid) else cache


@functools.singledispatch
def rows_of(cache: KVCache) -> Delta:
    """All rows that a cache has room for, the valid ones first; `flatten` appends them."""
    remedy = "Keep the Branch: it can be continued and grown as it is."
    wanted = "a past that holds its rows as they came"
    errors.fail("flatten", "branch.tail", wanted, f"a {type(cache).__name__}", remedy, TypeError)


@rows_of.register
def _(cache: Cache) -> Delta:
    rows = lambda x: tuple(x[..., : capacity(cache), :].unbind(0))
    return Delta(rows(cache.k), rows(cache.v))


@rows_of.register
def _(cache: Branch) -> Delta:
    return rows_of(flatten(cache))


@display.tokens.register
def _(cache: Branch) -> str:
    return f"{int(cache.prefix.length)} + {int(cache.tail.length)} of {capacity(cache)} tokens"


@fork.register
def _(cache: Cache, delta: Delta, size: int) -> Branch:
    return Branch(cache, _tail(delta, size))


@fork.register
def _(cache: Hybrid, delta: Delta, size: int) -> Hybrid:
    return cache._replace(rows=fork(cache.rows, delta._replace(steps=()), size))


@fork.register
def _(cache: Grouped, delta: Delta, size: int) -> Grouped:
    return each(cache, lambda group, some: fork(group, some, size), split(cache, delta))


@rows_of.register
def _(cache: Grouped) -> Delta:
    found = [rows_of(group) for group in cache.groups]
    keys, values = ([x[side] for x in found] for side in (0, 1))
    return Delta(tuple(itertools.chain(*keys)), tuple(itertools.chain(*values)))


@keeps_all.register
def _(cache: Branch) -> bool:
    return keeps_all(cache.prefix) and keeps_all(cache.tail)


@reset.register
def _(cache: Branch, empty: Branch, where: Tensor) -> Branch:
    return Branch(reset(cache.prefix, empty.prefix, where), reset(cache.tail, empty.tail, where))


@capacity.register
def _(cache: Branch) -> int:
    return capacity(cache.prefix) + capacity(cache.tail)


@sizes.register
def _(cache: Branch) -> tuple[int, int, int]:
    return sizes(cache.tail)


@groups.register
def _(cache: Branch) -> tuple[KVCache, ...]:
    found = groups(cache.tail)
    return found if len(found) > 1 else (cache,)


@overflowed.register
def _(cache: Branch) -> Tensor:
    return overflowed(cache.prefix) | overflowed(cache.tail)


@states.register
def _(cache: Branch) -> tuple[State, ...]:
    """Those of the tail, which continue the prefix's; an empty tail has not begun."""
    before, after = states(cache.prefix), states(cache.tail)
    if not before or not after:
        return after or before
    length = errors.integer(cache.tail.length)
    if length is not None:
        return after if length else before
    began = cache.tail.length > 0
    return tree.map(lambda old, new: torch.where(began, new, old), before, after)


@past.register
def _(cache: Branch, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    behind = positions - cache.prefix.length  # the tail counts its rows from 0
    return [*past(cache.prefix, layer, positions, window), *past(cache.tail, layer, behind, window)]


@grow.register
def _(cache: Branch, rows: int) -> Branch:
    return Branch(cache.prefix, grow(cache.tail, rows))


@with_length.register
def _(cache: Branch, length: Tensor) -> Branch:
    return Branch(cache.prefix, with_length(cache.tail, length))


@write.register
def _(cache: Branch, delta: Delta, n: int | Tensor, donate: bool) -> Branch:
    return Branch(cache.prefix, write(cache.tail, delta, n, donate))
