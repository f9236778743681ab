"""Laws of caches: law(kind, size, key).

`kind.empty(layers, heads, size, head_size, dtype)` is a cache with room for `size` tokens.
Laws compare the result of attention to each layer, not how a cache is stored. A kind that rounds
keys and values does not return them exactly; leave that law out for it.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ... import caches, randomness, tree
from ...caches import Delta, KVCache
from ...kernels import attend_parts
from .. import dense
from ..agreement import agree, named

L, K, G, D = 2, 2, 2, 4  # layers, key heads, query heads for each of these, head size
ROUNDING = 1e-12  # float64 sums of D products and a few keys of order one: some hundred roundings
WHY = "rounding of float64"


def where_the_key_is(law: Callable[[Any, int, Tensor], None]) -> Callable[[Any, int, Tensor], None]:
    """A law whose caches, made on torch's default device, are on the device of its key."""

    @named
    @functools.wraps(law)
    def run(kind: Any, size: int, key: Tensor) -> None:
        with contextlib.nullcontext() if key.device == torch.get_default_device() else key.device:
            law(kind, size, key)

    return run


@where_the_key_is
def commit_leaves_its_argument_as_it_was(kind: Any, size: int, key: Tensor) -> None:
    """A commit does not modify its argument."""
    first, second = _delta(key, size), _delta(randomness.fold_in(key, 1), size)
    past = caches.commit(_empty(kind, 2 * size), first)
    bits = lambda past: tree.map(
        lambda x: torch.nan_to_num(x, nan=7.0) if x.is_floating_point() else x.clone(), past
    )
    before = bits(past)  # compared as bits, since rows beyond the length may be NaN
    caches.commit(past, second)
    for (path, now), then in zip(tree.items(bits(past)), tree.leaves(before), strict=True):
        agree(commit_leaves_its_argument_as_it_was, path, now, then, 0, "nothing is written")


@where_the_key_is
def remembers_what_was_committed(kind: Any, size: int, key: Tensor) -> None:
    """Attention to the cache is dense attention to the committed rows, for any order of commits."""
    delta, n = _delta(key, size), _number(key, size)
    past = caches.commit(_empty(kind, size), delta, n)
    rows = zip(delta.k, delta.v, strict=True)
    wanted = torch.stack(
        [dense.attend(_query(), k[..., :n, :], v[..., :n, :]).out for k, v in rows]
    )
    agree(
        remembers_what_was_committed,
        f"what is read after {n} of {size}",
        observe(past),
        wanted,
        ROUNDING,
        WHY,
    )
    agree(
        remembers_what_was_committed,
        "length",
        past.length - _empty(kind, size).length,
        torch.tensor(n),
        0,
        "tokens are counted",
    )


@where_the_key_is
def committing_all_equals_committing_any_split(kind: Any, size: int, key: Tensor) -> None:
    """Committing tokens at once equals committing them in several deltas."""
    delta, n = _delta(key, size), _number(key, size)
    whole = caches.commit(_empty(kind, size), delta)
    parts = caches.commit(
        caches.commit(_empty(kind, size), _rows(delta, 0, n)), _rows(delta, n, size)
    )
    what = f"what is read, committed as {n} and {size - n}"
    agree(
        committing_all_equals_committing_any_split,
        what,
        observe(parts),
        observe(whole),
        ROUNDING,
        WHY,
    )


@where_the_key_is
def rejected_rows_are_never_seen(kind: Any, size: int, key: Tensor) -> None:
    """Committing n rows of a delta is committing its first n, even where the others are NaN.

    Later commits agree too.
    """
    law, delta, n = rejected_rows_are_never_seen, _delta(key, size), _number(key, size)
    spoilt = Delta(
        *(tuple(torch.where(_row(size) < n, x, torch.nan) for x in side) for side in delta)
    )
    some, first = (
        caches.commit(_empty(kind, size), spoilt, n),
        caches.commit(_empty(kind, size), _rows(delta, 0, n)),
    )
    agree(law, f"what is read after {n} of {size}", observe(some), observe(first), ROUNDING, WHY)
    rest = _rows(delta, n, size)
    agree(
        law,
        "what is read later",
        observe(caches.commit(some, rest)),
        observe(caches.commit(first, rest)),
        ROUNDING,
        WHY,
    )


@where_the_key_is
def entries_beyond_length_are_unobservable(kind: Any, size: int, key: Tensor) -> None:
    """Rows beyond the length have no effect: NaN there changes no output and no gradient."""
    law, delta, n = entries_beyond_length_are_unobservable, _delta(key, size), _number(key, size)
    spoilt = Delta(
        *(tuple(torch.where(_row(size) < n, x, torch.nan) for x in side) for side in delta)
    )
    empty = _empty(kind, size)
    short, long = caches.commit(empty, _rows(delta, 0, n)), caches.commit(empty, spoilt)
    less = size - n
    own = long.tail.length if isinstance(long, caches.Branch) else long.length
    read = lambda length: observe(caches.with_length(long, length))
    agree(
        law,
        f"what is read at length {n} of {size}",
        read(own - less),
        observe(short),
        ROUNDING,
        WHY,
    )
    # Where lengths are mapped, rows are masked instead of cut off.
    rows = vmap(read)(torch.stack([own - less, own - size]))
    agree(
        law,
        f"what is read at length {n} of {size} under vmap",
        rows[0],
        observe(short),
        ROUNDING,
        WHY,
    )
    slope = vmap(
        lambda length: torch.func.grad(
            lambda q: observe(caches.with_length(long, length), q).sum()
        )(_query())
    )
    if not slope(torch.stack([own - less, own - size])).isfinite().all():
        raise AssertionError(
            f"{law.__name__}: NaN beyond length {n} of {size} reaches the gradient of the query."
        )


@where_the_key_is
def each_row_under_vmap_commits_its_own_number(kind: Any, size: int, key: Tensor) -> None:
    """vmap over n equals the loop over n."""
    delta = _delta(key, size)
    run = lambda n: observe(caches.commit(_empty(kind, size), delta, n))
    numbers = torch.arange(size + 1)
    got = vmap(run)(numbers)
    for n in numbers:
        what = f"what is read in the row that commits {int(n)} of {size}"
        agree(each_row_under_vmap_commits_its_own_number, what, got[n], run(n), ROUNDING, WHY)


@where_the_key_is
def any_program_reads_as_its_rows_and_changes_no_earlier_value(
    kind: Any, size: int, key: Tensor
) -> None:
    """Extend, commit, fork and rewind in any order: each value reads as its rows committed at once.

    And no value changes later. A fork is a second use of a value, rewinding a use of an older one;
    so the program picks any value made so far. It commits some tokens of a new delta to it, by an
    int or under vmap, or in place into tensors that it copied, as `generate` does, by an int or
    under vmap; or it shortens it by its length, where the kind can.
    """
    law, T = any_program_reads_as_its_rows_and_changes_no_earlier_value, 3
    values: list[tuple[Any, Delta, Any]] = []

    def remember(past: KVCache, rows: Delta) -> None:
        values.append((past, rows, tree.map(torch.clone, past)))

    remember(_empty(kind, size), _delta(key, 0))
    for step in range(6):
        here = randomness.fold_in(key, 3 + step)
        which, count, how = (int(x) for x in randomness.bits(here, (3,)))
        past, rows, _ = values[which % len(values)]
        delta, held = _delta(here, T), rows.k[0].shape[-2]
        n = min(count % (T + 1), size - held)
        if how % 5 == 0:
            after = caches.commit(past, delta, n)
        elif how % 5 == 1:
            one = vmap(lambda n, past=past, delta=delta: caches.commit(past, delta, n))(
                torch.tensor([n, 0])
            )
            after = tree.map(lambda x: x[0], one)
        elif how % 5 == 2:
            n, after = 0, _rewound(past, count % (held + 1))
            rows = rows if after is past else _rows(rows, 0, count % (held + 1))
        elif how % 5 == 3:  # a copy is continued in place, beside others that get other rows
            a, b = n // 2, n - n // 2
            if how % 2:  # by as many rows, of deltas that differ
                both = tree.map(lambda x: torch.stack([x, -x]), delta)
                one = vmap(lambda some, past=past, a=a, b=b: _continued(past, some, a, b))(both)
            else:
                one = vmap(lambda a, b, past=past, delta=delta: _continued(past, delta, a, b))(
                    torch.tensor([a, 0]), torch.tensor([b, 0])
                )
            after, delta = tree.map(lambda x: x[0], one), _twice(delta, a, b)
        else:  # a copy is continued in place, and every value on the way is returned
            middle = caches.commit_donated(caches.grow(past, 0), _rows(delta, 0, n // 2), n // 2)
            remember(middle, _joined(rows, _rows(delta, 0, n // 2)))
            after = caches.commit_donated(middle, _rows(delta, n // 2, n), n - n // 2)
        remember(after, _joined(rows, _rows(delta, 0, n)))
    for i, (past, rows, then) in enumerate(values):
        n = rows.k[0].shape[-2]
        wanted = observe(caches.commit(_empty(kind, size), rows))
        agree(
            law,
            f"what is read of value {i}, which has {n} of {size} rows",
            observe(past),
            wanted,
            ROUNDING,
            WHY,
        )
        agree(
            law,
            f"what is read of value {i} as it was made",
            observe(past),
            observe(then),
            0,
            "nothing that counts is written over",
        )


def observe(past: KVCache, q: Tensor | None = None) -> Tensor:
    """Attention of one query (H, 1, D) to every layer of a cache, (L, H, 1, D); zeros if empty."""
    q = _query() if q is None else q
    layers = [caches.past(past, layer, past.length.reshape(1)) for layer in range(L)]
    return torch.stack(
        [
            attend_parts(q, parts, scale=D**-0.5) if parts else torch.zeros_like(q)
            for parts in layers
        ]
    )


def _empty(kind: Any, size: int) -> Any:
    return kind.empty(L, K, size, D, torch.float64)


def _query() -> Tensor:
    return randomness.normal(randomness.key(0), (K * G, 1, D), torch.float64)


def _delta(key: Tensor, T: int) -> Delta:
    k, v = randomness.normal(key, (2, L, K, T, D), torch.float64)
    return Delta(tuple(k), tuple(v))


def _rows(delta: Delta, start: int, stop: int) -> Delta:
    return Delta(*(tuple(x[..., start:stop, :] for x in side) for side in delta))


def _continued(past: Any, delta: Delta, a: int | Tensor, b: int | Tensor) -> Any:
    """The first `a` rows of the delta, then its first `b` rows, in place into a copy."""
    return caches.commit_donated(caches.commit_donated(caches.grow(past, 0), delta, a), delta, b)


def _twice(delta: Delta, a: int, b: int) -> Delta:
    return _joined(_rows(delta, 0, a), _rows(delta, 0, b))


def _rewound(past: KVCache, length: int) -> Any:
    """The cache at a shorter length, or itself where its kind cannot be shortened."""
    own = past.tail.length if isinstance(past, caches.Branch) else past.length
    try:
        return caches.with_length(past, torch.full_like(own, length))
    except TypeError:
        return past


def _joined(a: Delta, b: Delta) -> Delta:
    both = lambda x, y: tuple(torch.cat(pair, -2) for pair in zip(x, y, strict=True))
    return Delta(both(a.k, b.k), both(a.v, b.v))


def _row(T: int) -> Tensor:
    return torch.arange(T).unsqueeze(-1)


def _number(key: Tensor, size: int) -> int:
    return int(randomness.randint(randomness.fold_in(key, 2), (), 0, size + 1))
