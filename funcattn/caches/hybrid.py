"""`Hybrid`: the cache of a model with recurrent layers: rows of attention, and states.

The rows are a cache of any kind, of the layers with attention. A state is a value: a commit makes a
new one from the steps that the layer proposed (`layers.state_after`), for any n, one for each row
under vmap. So a rejected draft needs no undo, and a fork shares the state until it commits.

A state cannot be shortened: `with_length` raises, except for the length that a cache has. Keep the
older cache, or commit fewer tokens.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import layers, tree
from ..core import errors
from ..kernels import Part
from ..layers import State
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
    states,
    with_length,
    write,
)


@record
class Hybrid(NamedTuple):
    """The rows of the layers with attention, a cache, and the states of the recurrent layers.

    Example:
        >>> import funcattn as fa
        >>> mixers = ("short_convolution", "attention")
        >>> model = fa.decoder(fa.Config(mixers=mixers, convolution_size=3))
        >>> cache = model.cache(8)
        >>> type(cache.rows).__name__, [state.inputs.shape for state in cache.states]
        ('Cache', [torch.Size([2, 64])])
    """

    rows: KVCache
    states: tuple[State, ...]
    __str__, _repr_html_ = display.line, display.bar

    @property
    def length(self) -> Tensor:
        """Number of tokens that were read, int64 ()."""
        return self.rows.length


def with_states(rows: KVCache, states: Iterable[State]) -> KVCache:
    """The rows alone, or with states as a `Hybrid`, where there are any."""
    held = tuple(states)
    return Hybrid(rows, held) if held else rows


@states.register
def _(cache: Hybrid) -> tuple[State, ...]:
    return cache.states


@capacity.register
def _(cache: Hybrid) -> int:
    return capacity(cache.rows)


@sizes.register
def _(cache: Hybrid) -> tuple[int, int, int]:
    return sizes(cache.rows)


@groups.register
def _(cache: Hybrid) -> tuple[KVCache, ...]:
    return groups(cache.rows)


@overflowed.register
def _(cache: Hybrid) -> Tensor:
    return overflowed(cache.rows)


@past.register
def _(cache: Hybrid, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    return past(cache.rows, layer, positions, window)


@write.register
def _(cache: Hybrid, delta: Delta, n: int | Tensor, donate: bool) -> Hybrid:
    if len(delta.steps) != len(cache.states):
        wanted = f"with the steps of {len(cache.states)} recurrent layers"
        remedy = "Use the cache of the same model."
        errors.fail("commit", "delta", wanted, len(delta.steps), remedy)
    T = delta.tokens
    count = n if (known := errors.integer(n)) is None else known
    count = count.clamp(0, T) if isinstance(count, Tensor) else count
    after = tuple(layers.state_after(steps, count) for steps in delta.steps)
    return Hybrid(write(cache.rows, Delta(delta.k, delta.v), n, donate), after)


@grow.register
def _(cache: Hybrid, rows: int) -> Hybrid:
    return cache._replace(rows=grow(cache.rows, rows))


@keeps_all.register
def _(cache: Hybrid) -> bool:
    return keeps_all(cache.rows)


@reset.register
def _(cache: Hybrid, empty: Hybrid, where: Tensor) -> Hybrid:
    select = lambda new, old: torch.where(where, new, old)
    return Hybrid(
        reset(cache.rows, empty.rows, where), tree.map(select, empty.states, cache.states)
    )


@with_length.register
def _(cache: Hybrid, length: Tensor) -> Hybrid:
    before, after = errors.integer(cache.length), errors.integer(length)
    if before is not None and before == after:
        return cache
    remedy = (
        "A recurrent state cannot be shortened. Keep the older cache, which is a value, or commit "
        "fewer tokens: commit(cache, delta, n)."
    )
    errors.fail(
        "with_length", "cache", "a past that keeps all its rows", "a Hybrid", remedy, TypeError
    )
