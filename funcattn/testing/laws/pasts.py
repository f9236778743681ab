"""Laws of pasts: law(kind, size, key), where kind.empty(layers, heads, size, head_size, dtype) has room for `size` tokens.

A past is what attention sees of it: laws compare what a query gets from every layer, not how it is stored. A kind that rounds what
it keeps does not remember exactly what was committed; leave that law out for it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ... import caches, randomness, tree
from ...caches import Delta
from ...kernels import attend_parts
from .. import dense
from ..agreement import agree

L, K, G, D = 2, 2, 2, 4  # layers, key heads, queries that share one, head size
ROUNDING = 1e-12  # float64 sums of D products and a few keys of order one: a few hundred roundings of 1.1e-16 at most
WHY = "rounding of float64"


def commit_leaves_its_argument_as_it_was(kind: Any, size: int, key: Tensor) -> None:
    """The old past is a value: after a commit it holds the same numbers."""
    first, second = _delta(key, size), _delta(randomness.fold_in(key, 1), size)
    past = caches.commit(_empty(kind, 2 * size), first)
    before = tree.map(torch.clone, past)
    caches.commit(past, second)
    for (path, now), then in zip(tree.items(past), tree.leaves(before), strict=True):
        agree(commit_leaves_its_argument_as_it_was, path, now, then, 0, "nothing is written")


def remembers_what_was_committed(kind: Any, size: int, key: Tensor) -> None:
    """Reading the past is dense attention over the rows that were committed, in any order of commits."""
    delta, n = _delta(key, size), _number(key, size)
    past = caches.commit(_empty(kind, size), delta, n)
    rows = zip(delta.k, delta.v, strict=True)
    wanted = torch.stack([dense.attend(_query(), k[..., :n, :], v[..., :n, :]).out for k, v in rows])
    agree(remembers_what_was_committed, f"what is read after {n} of {size}", observe(past), wanted, ROUNDING, WHY)
    agree(remembers_what_was_committed, "length", past.length - _empty(kind, size).length, torch.tensor(n), 0, "tokens are counted")


def committing_all_equals_committing_any_split(kind: Any, size: int, key: Tensor) -> None:
    """Tokens may come at once or one part after the other."""
    delta, n = _delta(key, size), _number(key, size)
    whole = caches.commit(_empty(kind, size), delta)
    parts = caches.commit(caches.commit(_empty(kind, size), _rows(delta, 0, n)), _rows(delta, n, size))
    what = f"what is read, committed as {n} and {size - n}"
    agree(committing_all_equals_committing_any_split, what, observe(parts), observe(whole), ROUNDING, WHY)


def rejected_rows_are_never_seen(kind: Any, size: int, key: Tensor) -> None:
    """Committing n of a delta is committing its first n rows, even where the others are NaN, and so is all that follows."""
    law, delta, n = rejected_rows_are_never_seen, _delta(key, size), _number(key, size)
    spoilt = Delta(*(tuple(torch.where(_row(size) < n, x, torch.nan) for x in side) for side in delta))
    some, first = caches.commit(_empty(kind, size), spoilt, n), caches.commit(_empty(kind, size), _rows(delta, 0, n))
    agree(law, f"what is read after {n} of {size}", observe(some), observe(first), ROUNDING, WHY)
    rest = _rows(delta, n, size)
    agree(law, "what is read later", observe(caches.commit(some, rest)), observe(caches.commit(first, rest)), ROUNDING, WHY)


def entries_beyond_length_are_unobservable(kind: Any, size: int, key: Tensor) -> None:
    """A past rewound by its length reads as if what lay beyond had never come: NaN there shows nowhere, nor in a gradient."""
    law, delta, n = entries_beyond_length_are_unobservable, _delta(key, size), _number(key, size)
    spoilt = Delta(*(tuple(torch.where(_row(size) < n, x, torch.nan) for x in side) for side in delta))
    empty = _empty(kind, size)
    short, long = caches.commit(empty, _rows(delta, 0, n)), caches.commit(empty, spoilt)
    less = size - n
    own = long.own.length if isinstance(long, caches.Branch) else long.length
    read = lambda length: observe(caches.with_length(long, length))
    agree(law, f"what is read at length {n} of {size}", read(own - less), observe(short), ROUNDING, WHY)
    rows = vmap(read)(torch.stack([own - less, own - size]))  # where lengths are mapped, rows are hidden and not left out
    agree(law, f"what is read at length {n} of {size} under vmap", rows[0], observe(short), ROUNDING, WHY)
    slope = vmap(lambda length: torch.func.grad(lambda q: observe(caches.with_length(long, length), q).sum())(_query()))
    if not slope(torch.stack([own - less, own - size])).isfinite().all():
        raise AssertionError(f"{law.__name__}: NaN beyond length {n} of {size} reaches the gradient of the query.")


def each_row_under_vmap_commits_its_own_number(kind: Any, size: int, key: Tensor) -> None:
    """vmap over n is the loop over n."""
    delta = _delta(key, size)
    run = lambda n: observe(caches.commit(_empty(kind, size), delta, n))
    numbers = torch.arange(size + 1)
    got = vmap(run)(numbers)
    for n in numbers:
        what = f"what is read in the row that commits {int(n)} of {size}"
        agree(each_row_under_vmap_commits_its_own_number, what, got[n], run(n), ROUNDING, WHY)


def observe(past: Any, q: Tensor | None = None) -> Tensor:
    """What one query (H, 1, D) gets from every layer of a past, (L, H, 1, D); zeros where nothing is remembered."""
    q = _query() if q is None else q
    layers = [caches.past(past, layer, past.length.reshape(1)) for layer in range(L)]
    return torch.stack([attend_parts(q, parts, scale=D**-0.5) if parts else torch.zeros_like(q) for parts in layers])


def _empty(kind: Any, size: int) -> Any:
    return kind.empty(L, K, size, D, torch.float64)


def _query() -> Tensor:
    return randomness.normal(randomness.key(0), (K * G, 1, D), torch.float64)


def _delta(key: Tensor, T: int) -> Delta:
    k, v = randomness.normal(key, (2, L, K, T, D), torch.float64)
    return Delta(tuple(k), tuple(v))


def _rows(delta: Delta, start: int, stop: int) -> Delta:
    return Delta(*(tuple(x[..., start:stop, :] for x in side) for side in delta))


def _row(T: int) -> Tensor:
    return torch.arange(T).unsqueeze(-1)


def _number(key: Tensor, size: int) -> int:
    return int(randomness.randint(randomness.fold_in(key, 2), (), 0, size + 1))
