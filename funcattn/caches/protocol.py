"""What every kind of past can do: verbs that dispatch on the kind, and the rules of `commit` that hold for all.

A kind is a record with a `length`, int64 (). It registers with `capacity`, `sizes`, `past`, `write` and `grow`; and,
where the default is not what it does, with `overflowed`, `with_length`, `reset`, `keeps_all`, and with `fork` and
`rows_of` of `branch`.
A kind of a user's own does the same (docs/caches.md, "A kind of your own"), and `funcattn.testing.laws.cache` tries every verb.
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
from ..records import record

OVERFLOWED = 2**60  # a length that no capacity reaches, however a past grows; the sum of two still fits an int64
DONATED = 2**62  # the length of a past that was given away: whoever holds it, or a fork of it, holds nothing


@record
class Delta(NamedTuple):
    """What a step would add: for each layer the keys (K, T, D) and values (K, T, Dv) of the new tokens."""

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]


@functools.singledispatch
def capacity(cache: Any) -> int:
    """How many tokens the past has room for."""
    _unknown("capacity", cache)


@functools.singledispatch
def sizes(cache: Any) -> tuple[int, int, int]:
    """Layers, key/value heads and head size (L, K, D) of the model that the past belongs to."""
    _unknown("sizes", cache)


@functools.singledispatch
def overflowed(cache: Any) -> Tensor:
    """Bool (): True once a commit did not fit, inside a transform that could not raise.

    By default where the length is beyond the capacity, which is how `admit` marks it.
    """
    return cache.length > capacity(cache)


@door
@functools.singledispatch
def past(cache: Any, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    """What new tokens attend to in one layer: the remembered keys and values, in parts.

    Args:
        cache: any kind of past.
        layer: which layer, 0 to L - 1.
        positions: int64 (T,), the position of each new token, where the first token that the past remembers has position 0. They
            follow the past, `cache.length + arange(T)`, unless they are drafts of a tree.
        window: a layer of sliding window attention: the token at p sees the remembered position j only where j > p - window.

    Returns:
        Disjoint sets of keys. Where lengths and positions are concrete, they hold what some new token sees and no more, so a step
        costs no more than its window; a part that every new token sees whole has no mask.

    Law: a window reads what dense attention reads under `masks.window` (test_caches.py).
    """
    _unknown("past", cache)


@functools.singledispatch
def write(cache: Any, delta: Delta, n: Any, donate: bool) -> Any:
    """What `commit` does in one kind: the past with the first n tokens of a delta added, of the same kind and shapes.

    Args:
        n: an int or an integer tensor (), checked where it is concrete; under vmap and in a compile `admit` checks it.
        donate: whether tensors that `grow` copied, or an earlier write made, may be written in place.
    """
    _unknown("write", cache)


_write = write  # its name before it was public: kinds of others register with it


@door
@functools.singledispatch
def grow(cache: Any, rows: int) -> Any:
    """The same past with room for `rows` more tokens; the end that grows is a copy (of a `Branch`, its own tail alone)."""
    _unknown("grow", cache)


@functools.singledispatch
def keeps_all(cache: Any) -> bool:
    """Whether each token sees all before it, so that a text may be read at once where it should be read token by token.

    False unless a kind says otherwise; True of no past.
    """
    return type(cache) is tuple


def exactly(kind: type) -> Callable[[Any], bool]:
    """For `keeps_all` of a kind: true of the kind itself, and not of a record derived from it."""
    return lambda cache: type(cache) is kind


@functools.singledispatch
def reset(cache: Any, empty: Any, where: Tensor) -> Any:
    """The past, or where a condition () holds an empty one of the same shapes: how a slot of `serving` becomes free.

    By default every tensor is chosen. A kind in which nothing beyond its counts can be observed registers `reset_counts`.
    """
    return tree.map(lambda fresh, leaf: torch.where(where, fresh, leaf), empty, cache)


def reset_counts(cache: Any, empty: Any, where: Tensor) -> Any:
    """`reset` that leaves rows as they are."""
    return tree.map(lambda new, old: torch.where(where, new, old) if old.dtype == torch.int64 else old, empty, cache)


@door
@functools.singledispatch
def with_length(cache: Any, length: Tensor) -> Any:
    """The same tensors with another length of the part that grows: what lies beyond is unobservable.

    Raises:
        TypeError: a kind that no longer has the rows it once had, such as `Ring`: keep the older value instead.
    """
    if "length" not in getattr(cache, "_fields", ()):
        got, remedy = f"a {type(cache).__name__} without that field", "Register with_length for it."
        errors.fail("with_length", "cache", "a record with a field `length`", got, remedy, TypeError)
    return cache._replace(length=length)


@door
def commit(cache: Any, delta: Delta, n: int | Tensor | None = None, *, index: Tensor | None = None) -> Any:
    """The past with the first n tokens of a delta added.

    Args:
        cache: any kind of past. It stays as it was.
        delta: what `extend` returned for T tokens.
        n: how many of them count, an int or an integer tensor () in 0..T (one for each row under vmap); None is all.
        index: int64 (N,), a path through a tree of drafts: the tokens of the delta to add, in this order, before n counts.

    Returns:
        A past of the same kind and shapes, n tokens longer.

    Raises:
        ValueError: there is no room for n more, or n or index is outside the delta (where values are concrete; inside a transform
            nothing is written, and the logits of every later step are NaN).
        TypeError: kinds or dtypes that do not fit.

    Law: committing all equals committing any split of it; the argument is unchanged (test_caches.py).
    """
    if not isinstance(delta, Delta):
        errors.fail(
            "commit", "delta", "what extend returned", f"a {type(delta).__name__}", "Pass (cache, delta), in this order.", TypeError
        )
    T = delta.k[0].shape[-2]
    if index is not None:
        if index.dim() != 1 or not _is_integer(index):
            errors.fail("commit", "index", "int64 (N,)", f"{index.dtype} {errors.shape(index)}", "Give one path; vmap makes many.")
        if errors.is_true((index < 0) | (index >= T)):
            got = errors.peek(index)
            errors.fail("commit", "index", f"within the {T} tokens of the delta", got, "Index the tokens that were extended.")
        take = lambda rows: tuple(row.index_select(-2, index) for row in rows)
        delta, T = Delta(take(delta.k), take(delta.v)), index.shape[0]
    count = T if n is None else n
    if isinstance(count, Tensor) and (count.dim() or not _is_integer(count)):
        got, remedy = f"{count.dtype} {errors.shape(count)}", "Give one number; one for each row is torch.func.vmap."
        errors.fail("commit", "n", "an int or an integer tensor ()", got, remedy, ValueError if _is_integer(count) else TypeError)
    known = errors.integer(count)
    if known is not None and not 0 <= known <= T:
        errors.fail("commit", "n", f"between 0 and the {T} tokens of the delta", known, "Commit at most what was extended.")
    return _same_kind(cache, write(cache, delta, count, False))


def commit_donated(cache: Any, delta: Delta, n: int | Tensor) -> Any:
    """`commit` that may write into the tensors of a past nobody else holds: for a loop over its own intermediate pasts."""
    return _same_kind(cache, write(cache, delta, n, True))


def _same_kind(cache: Any, after: Any) -> Any:
    """What was written, which is of the kind that it was written to: a record derived from another writes as that one does."""
    if type(after) is not type(cache):
        wanted, got = f"a {type(cache).__name__} as the past", f"a {type(after).__name__}"
        errors.fail("commit", "what write returns", wanted, got, "Register the verbs of your own kind with caches.", TypeError)
    return after


def check_whole(function: str, cache: Any) -> None:
    """Fail where the past is known to have lost tokens: a commit inside a transform did not fit."""
    lost = errors.value(overflowed(cache))
    if lost is not None and bool(lost):
        if not 0 <= int(cache.length) < DONATED:
            got, remedy = "one that was donated to fa.compile(model).step", "Go on with the past that it returned, or use apply."
            errors.fail(function, "cache", "a past that its owner still has", got, remedy)
        got = "one that was written outside of its mesh, or overflowed inside a transform"
        remedy = "Begin it again with model.cache(size) for a larger size."
        errors.fail(function, "cache", "a past that every commit fitted into", got, remedy)


class Admitted(NamedTuple):
    """A commit that was checked: rows k and v (L, K, T, D), the lengths before and after it, and how many of the rows count.

    `known` says that all numbers are concrete: then `before` and `count` are ints, else tensors. What does not fit counts 0 rows,
    and leaves the length `OVERFLOWED`.
    """

    k: Tensor
    v: Tensor
    before: Any
    count: Any
    after: Tensor  # int64 ()
    known: bool


def admit(cache: Any, delta: Delta, n: Any, held: tuple[Tensor, Tensor]) -> Admitted:
    """Check a commit against a past that holds rows like `held`, (L, K, ..., D) and (L, K, ..., Dv)."""
    k, v = torch.stack(delta.k), torch.stack(delta.v)
    check_whole("commit", cache)
    _check_delta(held, k, v)
    S, T = capacity(cache), k.shape[-2]
    before, count = errors.integer(cache.length), errors.integer(n)
    if before is not None and count is not None:
        if before + count > S:
            got = f"{before} remembered and {count} more"
            remedy = f"Use funcattn.caches.grow(cache, {count})."
            errors.fail("commit", "cache", f"with room for {before + count} tokens (it has {S})", got, remedy)
        return Admitted(k, v, before, count, cache.length + n, True)
    after = cache.length + n
    fits = (after <= S) & (n >= 0) & (n <= T)
    return Admitted(k, v, cache.length, torch.where(fits, n, 0), torch.where(fits, after, OVERFLOWED), False)


def _check_delta(held: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
    for name, old, new in (("k", held[0], k), ("v", held[1], v)):
        if (old.shape[:2], old.shape[-1]) != (new.shape[:2], new.shape[-1]):
            L, K, D = old.shape[0], old.shape[1], old.shape[-1]
            wanted, remedy = f"(L, K, T, D) = ({L}, {K}, T, {D})", "Use the cache of the same model."
            errors.fail("commit", f"delta.{name}", wanted, errors.shape(new), remedy)
        if old.dtype != new.dtype:
            remedy = f"Make it with model.cache(size, dtype={new.dtype})."
            errors.fail("commit", f"delta.{name}", f"{old.dtype} as the cache is", new.dtype, remedy, TypeError)


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _unknown(verb: str, cache: Any) -> NoReturn:
    if type(cache) is tuple:
        errors.fail(verb, "cache", "a past", "(), which is no past", "Make one with model.cache(size).", TypeError)
    remedy = f"Make one with model.cache(size); of a kind of your own, register caches.{verb} for it (docs/caches.md)."
    errors.fail(verb, "cache", "a past such as Cache or Branch", f"a {type(cache).__name__}", remedy, TypeError)
