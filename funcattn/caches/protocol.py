"""The verbs of a key/value cache, dispatched on its kind, and the rules of `commit` for every kind.

A kind is a record with a field or property `length`, int64 (). It registers `capacity`, `sizes`,
`past`, `write` and `grow`; and, where the default does not fit, `overflowed`, `with_length`,
`reset`, `keeps_all`, and `fork` and `rows_of` of `branch`. Kinds defined outside of this library
register in the same way (docs/caches.md, "A kind of your own"); `funcattn.testing.laws.cache`
checks every verb.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import tree
from ..core import errors
from ..core.doors import door
from ..kernels import Part
from ..layers import State
from .delta import AnyKind, Delta, KVCache, Past

OVERFLOWED = 2**60  # beyond every capacity, however much the cache grows; two of them fit an int64
DONATED = 2**62  # length of a cache whose tensors were donated: its rows are invalid, in forks too


@functools.singledispatch
def capacity(cache: KVCache) -> int:
    """The number of tokens that the cache has room for."""
    _unknown("capacity", cache)


@functools.singledispatch
def sizes(cache: KVCache) -> tuple[int, int, int]:
    """Layers, key/value heads and head size (L, K, D) of the model that the cache belongs to."""
    _unknown("sizes", cache)


@functools.singledispatch
def groups(cache: KVCache) -> tuple[KVCache, ...]:
    """The caches that it consists of, each of layers whose keys have one size; mostly itself."""
    return (cache,)


@functools.singledispatch
def overflowed(cache: KVCache) -> Tensor:
    """Bool (): True after a commit that did not fit, in a transform where it could not raise.

    The default is length > capacity, since `admit` marks such a cache with the length `OVERFLOWED`.
    """
    if not isinstance(getattr(cache, "length", None), Tensor):
        _unknown("overflowed", cache)
    return cache.length > capacity(cache)


@door
@functools.singledispatch
def past(cache: KVCache, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    """The cached keys and values that new tokens attend to in one layer, in segments.

    Args:
        cache: any kind of cache.
        layer: index of the layer, 0 to L - 1.
        positions: int64 (T,), position of each new token; the first cached token has position 0.
            They are `cache.length + arange(T)`, except for the drafts of a tree.
        window: size of the layer's sliding window: the token at position p sees the cached
            position j only where j > p - window.

    Returns:
        Disjoint sets of keys, a `funcattn.kernels.KVSegment` for each, in the dtype of the
        queries. Where lengths and positions are concrete, they hold only keys that some new token
        sees, so a step costs no more than its window; a segment that every new token sees in full
        has no mask.

    Law: a window reads what dense attention reads under `masks.window` (test_caches.py).
    """
    _unknown("past", cache)


@functools.singledispatch
def states(cache: Past) -> tuple[State, ...]:
    """The states of the recurrent layers after the cached tokens; () where the kind has none."""
    return ()


@functools.singledispatch
def write(cache: AnyKind, delta: Delta, n: int | Tensor, donate: bool) -> AnyKind:
    """The implementation of `commit` for one kind: append the first n rows of a delta.

    Args:
        cache: a cache of the registered kind.
        delta: the new rows, keys (K, T, D) and values (K, T, Dv) for each layer.
        n: an int or an integer tensor (), checked where it is concrete; under vmap and
            torch.compile `admit` checks it.
        donate: whether tensors that were copied by `grow` or made by an earlier write may be
            written in place: where `is_recorded` of them is False, and under vmap by
            `rows.overwritten`.

    Returns:
        A cache of the same kind and shapes.
    """
    _unknown("write", cache)


_write = write  # Alias: kinds defined elsewhere registered with it before `write` was public.


@door
@functools.singledispatch
def grow(cache: AnyKind, rows: int) -> AnyKind:
    """The same cache with room for `rows` more tokens.

    The end that grows is a copy; of a `Branch` only the tail is copied.
    """
    _unknown("grow", cache)


@functools.singledispatch
def keeps_all(cache: Past) -> bool:
    """Whether each token attends to all tokens before it.

    If so, reading a text in one call equals reading it token by token. False by default;
    True for `()`, no cache.
    """
    return type(cache) is tuple


def exactly(kind: type) -> Callable[[KVCache], bool]:
    """A predicate to register with `keeps_all`: True for the type, False for its subtypes."""
    return lambda cache: type(cache) is kind


@functools.singledispatch
def reset(cache: AnyKind, empty: AnyKind, where: Tensor) -> AnyKind:
    """The cache, or an empty one of the same shapes where the condition `where` () holds.

    `serving` frees a slot by it. The default selects every tensor by torch.where. A kind whose rows
    beyond its lengths are never observed registers `reset_counts`.
    """
    return tree.map(lambda fresh, leaf: torch.where(where, fresh, leaf), empty, cache)


def reset_counts(cache: AnyKind, empty: AnyKind, where: Tensor) -> AnyKind:
    """`reset` that selects only the int64 tensors (lengths and positions) and leaves the rows."""
    return tree.map(
        lambda new, old: torch.where(where, new, old) if old.dtype == torch.int64 else old,
        empty,
        cache,
    )


@door
@functools.singledispatch
def with_length(cache: AnyKind, length: Tensor) -> AnyKind:
    """The same tensors with another length; rows at or beyond it are not observed.

    In a kind with several segments it is the length of the one that grows.

    Args:
        cache: a cache whose rows below the new length are still stored.
        length: int64 ().

    Raises:
        TypeError: a kind that overwrites or encodes older rows, such as `Ring`: keep the older
            cache instead.
    """
    if "length" not in getattr(cache, "_fields", ()):
        got, remedy = f"a {type(cache).__name__} without that field", "Register with_length for it."
        errors.fail(
            "with_length", "cache", "a record with a field `length`", got, remedy, TypeError
        )
    return cache._replace(length=length)  # pyright: ignore[reportAttributeAccessIssue]


@door
def commit(
    cache: AnyKind, delta: Delta, n: int | Tensor | None = None, *, index: Tensor | None = None
) -> AnyKind:
    """Append the first n rows of a delta to a cache.

    Args:
        cache: any kind of cache; it is not modified.
        delta: what `extend` returned for T tokens: keys (K, T, D) and values (K, T, Dv) per layer.
        n: how many rows to append, an int or an integer tensor () in 0..T (one for each row under
            vmap); None is all.
        index: int64 (N,), a path through a tree of drafts: the rows of the delta to append, in this
            order; n then counts in these.

    Returns:
        A cache of the same kind and shapes, n tokens longer.

    Raises:
        ValueError: there is no room for n more, or n or index is outside the delta (where values
            are concrete; inside a transform nothing is written, and the logits of later steps are
            NaN).
        TypeError: kinds or dtypes that do not fit.

    Law: committing all equals committing any split of it; the argument is unchanged
        (test_caches.py).
    """
    if not isinstance(delta, Delta):
        errors.fail(
            "commit",
            "delta",
            "what extend returned",
            f"a {type(delta).__name__}",
            "Pass (cache, delta), in this order.",
            TypeError,
        )
    T = delta.tokens
    if index is not None:
        if delta.steps:
            remedy = "States follow one text: draft a chain, and commit its first n tokens."
            errors.fail("commit", "index", "None for recurrent layers", "a path", remedy)
        if index.dim() != 1 or not _is_integer(index):
            errors.fail(
                "commit",
                "index",
                "int64 (N,)",
                f"{index.dtype} {errors.shape(index)}",
                "Give one path; vmap makes many.",
            )
        if errors.is_true((index < 0) | (index >= T)):
            got = errors.peek(index)
            errors.fail(
                "commit",
                "index",
                f"within the {T} tokens of the delta",
                got,
                "Index the tokens that were extended.",
            )
        take = lambda rows: tuple(row.index_select(-2, index) for row in rows)
        delta, T = Delta(take(delta.k), take(delta.v)), index.shape[0]
    count = T if n is None else n
    if isinstance(count, Tensor) and (count.dim() or not _is_integer(count)):
        got, remedy = (
            f"{count.dtype} {errors.shape(count)}",
            "Give one number; one for each row is torch.func.vmap.",
        )
        errors.fail(
            "commit",
            "n",
            "an int or an integer tensor ()",
            got,
            remedy,
            ValueError if _is_integer(count) else TypeError,
        )
    known = errors.integer(count)
    if known is not None and not 0 <= known <= T:
        errors.fail(
            "commit",
            "n",
            f"between 0 and the {T} tokens of the delta",
            known,
            "Commit at most what was extended.",
        )
    return _same_kind(cache, write(cache, delta, count, False))


def commit_donated(cache: AnyKind, delta: Delta, n: int | Tensor) -> AnyKind:
    """`commit` that may write in place: for loops that discard intermediate caches."""
    return _same_kind(cache, write(cache, delta, n, True))


def _same_kind(cache: AnyKind, after: object) -> AnyKind:
    """The result of `write`, checked to be of the same type as the cache.

    A derived record dispatches to its parent's `write`, which returns the parent's type.
    """
    if type(after) is not type(cache):
        wanted, got = f"a {type(cache).__name__} as the past", f"a {type(after).__name__}"
        errors.fail(
            "commit",
            "what write returns",
            wanted,
            got,
            "Register the verbs of your own kind with caches.",
            TypeError,
        )
    return after


def check_whole(function: str, cache: KVCache) -> None:
    """Raise where the cache is known to have overflowed in a transform, or to have been donated."""
    lost = errors.value(overflowed(cache))
    if lost is not None and bool(lost):
        if not 0 <= int(cache.length) < DONATED:
            got, remedy = (
                "one that was donated to fa.compile(model).step",
                "Go on with the past that it returned, or use apply.",
            )
            errors.fail(function, "cache", "a past that its owner still has", got, remedy)
        got = "one that was written outside of its mesh, or overflowed inside a transform"
        remedy = "Begin it again with model.cache(size) for a larger size."
        errors.fail(function, "cache", "a past that every commit fitted into", got, remedy)


class Admitted(NamedTuple):
    """A checked commit: rows k and v (L, K, T, D), lengths before and after, count of rows.

    `known` is True where all numbers are concrete; `before` and `count` are ints then, else
    tensors. A commit that does not fit has a count of 0 and a length of `OVERFLOWED` after it.
    """

    k: Tensor
    v: Tensor
    before: Any  # int, or Tensor
    count: Any
    after: Tensor  # int64 ()
    known: bool


def admit(cache: KVCache, delta: Delta, n: int | Tensor, held: tuple[Tensor, Tensor]) -> Admitted:
    """Check a delta against a cache with rows like `held`, (L, K, ..., D) and (L, K, ..., Dv).

    The new rows must have the dtype of `held`. A kind that stores rows in another dtype gives
    tensors of the dtype that it was made with, and casts the rows that come back.
    """
    k, v = (x if isinstance(x, Tensor) else torch.stack(x) for x in (delta.k, delta.v))
    check_whole("commit", cache)
    _check_delta(held, k, v)
    if delta.steps:
        got = f"a {type(cache).__name__}, which has no states"
        remedy = "Make it with the cache function of this model, the tail of a Branch too."
        errors.fail("commit", "cache", "a Hybrid for recurrent layers", got, remedy, TypeError)
    S, T = capacity(cache), k.shape[-2]
    before, count = errors.integer(cache.length), errors.integer(n)
    if before is not None and count is not None:
        if before + count > S:
            got = f"{before} remembered and {count} more"
            remedy = f"Use funcattn.caches.grow(cache, {count})."
            errors.fail(
                "commit",
                "cache",
                f"with room for {before + count} tokens (it has {S})",
                got,
                remedy,
            )
        return Admitted(k, v, before, count, cache.length + n, True)
    after = cache.length + n
    fits = (after <= S) & (n >= 0) & (n <= T)
    return Admitted(
        k, v, cache.length, torch.where(fits, n, 0), torch.where(fits, after, OVERFLOWED), False
    )


def _check_delta(held: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
    for name, old, new in (("k", held[0], k), ("v", held[1], v)):
        if (old.shape[:2], old.shape[-1]) != (new.shape[:2], new.shape[-1]):
            L, K, D = old.shape[0], old.shape[1], old.shape[-1]
            wanted, remedy = (
                f"(L, K, T, D) = ({L}, {K}, T, {D})",
                "Use the cache of the same model.",
            )
            errors.fail("commit", f"delta.{name}", wanted, errors.shape(new), remedy)
        if old.dtype != new.dtype:
            remedy = f"Make it with model.cache(size, dtype={new.dtype})."
            errors.fail(
                "commit",
                f"delta.{name}",
                f"{old.dtype} as the cache is",
                new.dtype,
                remedy,
                TypeError,
            )


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _unknown(verb: str, cache: KVCache) -> NoReturn:
    if type(cache) is tuple:
        errors.fail(
            verb,
            "cache",
            "a past",
            "(), which is no past",
            "Make one with model.cache(size).",
            TypeError,
        )
    remedy = (
        f"Make one with model.cache(size); of a kind of your own, register caches.{verb} for it "
        "(docs/caches.md)."
    )
    errors.fail(
        verb,
        "cache",
        "a past such as Cache or Branch",
        f"a {type(cache).__name__}",
        remedy,
        TypeError,
    )
