"""The past as a value: a step proposes a delta, `commit` disposes of it.

    logits, delta = model.extend(params, tokens, cache)        reads the past, writes nothing
    cache = commit(cache, delta, n)                            a new past with the first n of it

So rejected speculation costs nothing, rewinding is keeping the older value, and forking is using it twice. `Cache` is dense;
`Branch` is an immutable prefix with a small tail of its own, which is how many futures hold one past once.

Three rules keep a past honest. Entries at or beyond `length` are unobservable, even NaN. Rows that are rejected, or beyond the
capacity, go to one scratch row behind the last: a clamped index would corrupt a row that counts. And a commit that does not fit
writes nothing: eagerly it raises; inside vmap or a compile, where values cannot be looked at, it leaves a length beyond every
capacity, `OVERFLOWED`, which stays, and which turns all later logits into NaN.
"""

import functools
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import _checks
from .kernels import Part
from .masks import Mask
from .records import record

OVERFLOWED = 2**60  # a length that no capacity reaches, however a past grows; the sum of two still fits an int64


@record
class Delta(NamedTuple):
    """What a step would add: for each layer the keys (K, T, D) and values (K, T, Dv) of the new tokens."""

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]


@record
class Cache(NamedTuple):
    """A dense past: k (L, K, S + 1, D), v (L, K, S + 1, Dv), of which the first `length` rows count; row S is scratch."""

    k: Tensor
    v: Tensor
    length: Tensor  # int64 ()

    @classmethod
    def empty(cls, layers: int, heads: int, size: int, head_size: int, dtype: torch.dtype | None = None) -> "Cache":
        """Room for `size` tokens, on torch's default device."""
        rows = torch.zeros(layers, heads, size + 1, head_size, dtype=dtype)
        return cls(rows, torch.zeros_like(rows), torch.zeros((), dtype=torch.int64))


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


@functools.singledispatch
def capacity(cache: Any) -> int:
    """How many tokens the past has room for."""
    _unknown("capacity", cache)


@functools.singledispatch
def sizes(cache: Any) -> tuple[int, int, int]:
    """Layers, key/value heads and head size (L, K, D) of the model that the past belongs to."""
    _unknown("sizes", cache)


@functools.singledispatch
def broken(cache: Any) -> Tensor:
    """Bool (): True once a commit did not fit, inside a transform that could not raise."""
    _unknown("broken", cache)


@functools.singledispatch
def past(cache: Any, layer: int, places: Tensor, window: int | None = None) -> list[Part]:
    """What new tokens attend to in one layer: the remembered keys and values, in parts.

    Args:
        cache: any kind of past.
        layer: which layer, 0 to L - 1.
        places: int64 (T,), the position of each new token, where the first token that the past remembers has position 0. They
            follow the past, `cache.length + arange(T)`, unless they are drafts of a tree.
        window: a layer of sliding window attention: the token at p sees the remembered position j only where j > p - window.

    Returns:
        Disjoint sets of keys. Where lengths and places are concrete, they hold what some new token sees and no more, so a step
        costs no more than its window; a part that every new token sees whole has no mask.

    Law: a window reads what dense attention reads under `masks.window` (test_caches.py).
    """
    _unknown("past", cache)


@functools.singledispatch
def _write(cache: Any, delta: Delta, n: Any, donate: bool) -> Any:
    _unknown("commit", cache)


@functools.singledispatch
def grow(cache: Any, rows: int) -> Any:
    """The same past with room for `rows` more tokens (a copy; of a `Branch`, only its own tail is copied)."""
    _unknown("grow", cache)


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
        _checks.fail(
            "commit", "delta", "what extend returned", f"a {type(delta).__name__}", "Pass (cache, delta), in this order.", TypeError
        )
    T = delta.k[0].shape[-2]
    if index is not None:
        if index.dim() != 1 or not _is_integer(index):
            _checks.fail(
                "commit", "index", "int64 (N,)", f"{index.dtype} {_checks.shape(index)}", "Give one path; vmap makes many."
            )
        if _checks.is_true((index < 0) | (index >= T)):
            got = _checks.peek(index)
            _checks.fail("commit", "index", f"within the {T} tokens of the delta", got, "Index the tokens that were extended.")
        take = lambda rows: tuple(row.index_select(-2, index) for row in rows)
        delta, T = Delta(take(delta.k), take(delta.v)), index.shape[0]
    count = T if n is None else n
    if isinstance(count, Tensor) and (count.dim() or not _is_integer(count)):
        got, remedy = f"{count.dtype} {_checks.shape(count)}", "Give one number; one for each row is torch.func.vmap."
        _checks.fail("commit", "n", "an int or an integer tensor ()", got, remedy, ValueError if _is_integer(count) else TypeError)
    known = _checks.integer(count)
    if known is not None and not 0 <= known <= T:
        _checks.fail("commit", "n", f"between 0 and the {T} tokens of the delta", known, "Commit at most what was extended.")
    return _write(cache, delta, count, False)


def commit_own(cache: Any, delta: Delta, n: int | Tensor) -> Any:
    """`commit` that may write into the tensors of a past nobody else holds: for a loop over its own intermediate pasts."""
    return _write(cache, delta, n, True)


def follow(cache: Any, delta: Delta, size: int) -> Any:
    """A past to write in: an empty tail of `size` tokens, shaped like the delta, behind the given past.

    With no past it is the tail alone; a `Branch` keeps its prefix, and its own tail is copied and grows.
    """
    if isinstance(cache, Branch):
        return grow(cache, size)
    k, v = delta.k[0], delta.v[0]
    room = lambda x: x.new_zeros(len(delta.k), x.shape[-3], size + 1, x.shape[-1])
    own = Cache(room(k), room(v), torch.zeros((), dtype=torch.int64, device=k.device))
    return own if type(cache) is tuple else Branch(cache, own)


def with_length(cache: Any, length: Tensor) -> Any:
    """The same tensors with another length of the part that grows: what lies beyond is unobservable."""
    return Branch(cache.prefix, with_length(cache.own, length)) if isinstance(cache, Branch) else cache._replace(length=length)


def join(branch: Branch) -> Any:
    """The prefix with the own tail written behind it: a past of the prefix's kind and capacity.

    Raises:
        ValueError: the prefix has no room for the tail. TypeError: not a Branch.
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
    rows = lambda x: tuple(x[..., : capacity(own), :].unbind(0))
    return _write(branch.prefix, Delta(rows(own.k), rows(own.v)), own.length, False)


def check_whole(function: str, cache: Any) -> None:
    """Fail where the past is known to have lost tokens: a commit inside a transform did not fit."""
    lost = _checks.value(broken(cache))
    if lost is not None and bool(lost):
        remedy = "Begin it again with model.cache(size) for a larger size."
        _checks.fail(function, "cache", "a past that every commit fitted into", "one that overflowed inside a transform", remedy)


@capacity.register
def _(cache: Cache) -> int:
    return cache.k.shape[-2] - 1


@capacity.register
def _(cache: Branch) -> int:
    return capacity(cache.prefix) + capacity(cache.own)


@sizes.register
def _(cache: Cache) -> tuple[int, int, int]:
    return cache.k.shape[0], cache.k.shape[1], cache.k.shape[3]


@sizes.register
def _(cache: Branch) -> tuple[int, int, int]:
    return sizes(cache.own)


@broken.register
def _(cache: Cache) -> Tensor:
    return cache.length > capacity(cache)


@broken.register
def _(cache: Branch) -> Tensor:
    return broken(cache.prefix) | broken(cache.own)


@past.register
def _(cache: Cache, layer: int, places: Tensor, window: int | None = None) -> list[Part]:
    k, v = cache.k[layer], cache.v[layer]
    first, each = _first_seen(places, window)
    known = _checks.integer(cache.length)
    if known is not None:  # read what is remembered, not what is reserved
        if first >= known:
            return []
        k, v = k[..., first:known, :], v[..., first:known, :]
        if each is None:
            return [Part(k, v)]
        stop = torch.full_like(each, known - first)
        return [Part(k, v, Mask((each - first).clamp(0, known - first).unsqueeze(-1), stop.unsqueeze(-1)))]
    longest = _checks.greatest(cache.length)
    S = capacity(cache) if longest is None else min(longest, capacity(cache))
    if first >= S:
        return []
    stop = cache.length.clamp(max=S)
    remembered = (torch.arange(first, S, device=k.device) < stop).unsqueeze(-1)
    clean = lambda rows: torch.where(remembered, rows[..., first:S, :], 0)  # 0 * NaN would be NaN, in the output and in gradients
    stop = (stop - first).clamp(min=0).expand(places.shape[-1])
    start = torch.zeros_like(stop) if each is None else torch.minimum((each - first).clamp(min=0), stop)
    return [Part(clean(k), clean(v), Mask(start.unsqueeze(-1), stop.unsqueeze(-1)))]


def _first_seen(places: Tensor, window: int | None) -> tuple[int, Tensor | None]:
    """The first position that any new token sees, 0 where that is not known; and of each token, or None where all see the same."""
    if window is None:
        return 0, None
    each = places - (window - 1)
    known = _checks.peek(each)
    if known is None or not known.numel():
        return 0, each
    first, last = (int(x) for x in known.aminmax()) if known.numel() > 1 else (int(known),) * 2
    return max(first, 0), None if last <= max(first, 0) else each


@past.register
def _(cache: Branch, layer: int, places: Tensor, window: int | None = None) -> list[Part]:
    behind = places - cache.prefix.length  # the own tail counts its rows from 0
    return [*past(cache.prefix, layer, places, window), *past(cache.own, layer, behind, window)]


@grow.register
def _(cache: Cache, rows: int) -> Cache:
    S = capacity(cache)
    more = lambda x: torch.cat([x[..., :S, :], x.new_zeros(*x.shape[:-2], rows + 1, x.shape[-1])], -2)
    return Cache(more(cache.k), more(cache.v), cache.length)


@grow.register
def _(cache: Branch, rows: int) -> Branch:
    return Branch(cache.prefix, grow(cache.own, rows))


@_write.register
def _(cache: Branch, delta: Delta, n: Any, donate: bool) -> Branch:
    return Branch(cache.prefix, _write(cache.own, delta, n, donate))


@_write.register
def _(cache: Cache, delta: Delta, n: Any, donate: bool) -> Cache:
    k, v = torch.stack(delta.k), torch.stack(delta.v)
    check_whole("commit", cache)
    _check_delta(cache, k, v)
    S, T = capacity(cache), k.shape[-2]
    before, count = _checks.integer(cache.length), _checks.integer(n)
    if before is not None and count is not None:
        if before + count > S:
            got = f"{before} remembered and {count} more"
            _checks.fail(
                "commit",
                "cache",
                f"with room for {before + count} tokens (it has {S})",
                got,
                f"Use funcattn.caches.grow(cache, {count}).",
            )
        if donate and not any(x.requires_grad for x in (k, v, cache.k, cache.v)):
            cache.k[..., before : before + count, :] = k[..., :count, :]
            cache.v[..., before : before + count, :] = v[..., :count, :]
            return Cache(cache.k, cache.v, cache.length + n)
    after = cache.length + n
    fits = (after <= S) & (n >= 0) & (n <= T)
    step = torch.arange(T, device=k.device)
    row = torch.where((step < n) & fits, cache.length + step, S)  # rejected rows share the scratch row
    put = lambda x, rows: torch.ops.aten.index_put(x, [None, None, row], rows)
    return Cache(put(cache.k, k), put(cache.v, v), torch.where(fits, after, OVERFLOWED))


def _check_delta(cache: Cache, k: Tensor, v: Tensor) -> None:
    for name, held, new in (("k", cache.k, k), ("v", cache.v, v)):
        if (held.shape[:2], held.shape[-1]) != (new.shape[:2], new.shape[-1]):
            L, K, D = held.shape[0], held.shape[1], held.shape[-1]
            _checks.fail(
                "commit",
                f"delta.{name}",
                f"(L, K, T, D) = ({L}, {K}, T, {D})",
                _checks.shape(new),
                "Use the cache of the same model.",
            )
        if held.dtype != new.dtype:
            _checks.fail(
                "commit",
                f"delta.{name}",
                f"{held.dtype} as the cache is",
                new.dtype,
                f"Make it with model.cache(size, dtype={new.dtype}).",
                TypeError,
            )


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _unknown(verb: str, cache: Any) -> NoReturn:
    if type(cache) is tuple:
        _checks.fail(verb, "cache", "a past", "(), which is no past", "Make one with model.cache(size).", TypeError)
    _checks.fail(
        verb, "cache", "a past such as Cache or Branch", f"a {type(cache).__name__}", "Make one with model.cache(size).", TypeError
    )
