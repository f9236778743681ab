"""`Ring`: the last tokens of a text and its first few, in constant memory and constant time a step.

    sinks | ... dropped ... | window: R rows | tail: up to C rows, growing

New rows are appended to a small tail. When it is full, the last R rows of window and tail together
become the new window, and an empty tail begins. So rows move only once in C tokens, they stay in
order, a commit copies the tail alone, and tensors of an older cache are never written. Positions
are absolute: row r of the tail is at `start + r`, row r of the window at `start - R + r`.

Source: Beltagy et al., Longformer, arXiv:2004.05150 (sliding window); Xiao et al., Efficient
streaming language models with attention sinks, arXiv:2309.17453 (sinks).
"""

from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import is_recorded
from ..core.doors import made
from ..kernels import Part
from ..masks import END
from ..records import record
from . import display, rows
from .making import features_of
from .protocol import (
    Admitted,
    Delta,
    admit,
    capacity,
    grow,
    past,
    reset,
    reset_counts,
    sizes,
    with_length,
    write,
)


@record
class Ring(NamedTuple):
    """A sliding-window cache: each token sees the R tokens before it and the first A.

    Roll back by keeping the older cache, which is never written; `with_length` raises, since rows
    before the window are gone.
    """

    sinks_k: Tensor  # (L, K, A, D)
    sinks_v: Tensor
    k: Tensor  # (L, K, R, D)
    v: Tensor
    tail_k: Tensor  # (L, K, C, D)
    tail_v: Tensor
    start: Tensor  # int64 (), the position of row 0 of the tail
    length: Tensor  # int64 (), how many tokens were committed
    __str__, _repr_html_ = display.line, display.bar

    @classmethod
    def empty(
        cls,
        layers: int,
        heads: int,
        size: int,
        head_size: int,
        dtype: torch.dtype | None = None,
        value_size: int | None = None,
    ) -> "Ring":
        """A window of `size` tokens beside the query's; `ring` sets window and sinks by name."""
        return ring(window=size + 1).empty(layers, heads, size, head_size, dtype, value_size)


@made
@dataclass(frozen=True)
class ring:  # a value that is called like a function: model.cache(size, kind=ring(window=128))
    """A kind for `model.cache`: a `Ring` of `window` tokens (the query's too) and `sinks`.

    Exact for a model whose layers all have a window no longer than this, else an approximation.
    The size that is passed to `model.cache` has no effect: a ring is never full.

    Example:
        >>> import funcattn as fa
        >>> cache = fa.decoder(fa.Config()).cache(0, kind=ring(window=128, sinks=4))
        >>> cache.k.shape[-2], cache.sinks_k.shape[-2]
        (127, 4)
    """

    window: int
    sinks: int = 0
    tail: int = 64  # C, rows between moves: more is fewer moves, costlier commits

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sinks", 0), ("tail", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                errors.fail(
                    "ring",
                    name,
                    f"a number of tokens, at least {least}",
                    getattr(self, name),
                    "Count in tokens.",
                )

    def empty(
        self,
        layers: int,
        heads: int,
        size: int,
        head_size: int,
        dtype: torch.dtype | None = None,
        value_size: int | None = None,
    ) -> Ring:
        """An empty ring on torch's default device; `size` has no effect."""
        features = features_of(head_size, value_size)
        zeros = lambda n, D: torch.zeros(layers, heads, n, D, dtype=dtype)
        rows = [zeros(n, D) for n in (self.sinks, self.window - 1, self.tail) for D in features]
        return Ring(*[*rows, *torch.zeros(2, dtype=torch.int64).unbind()])


@capacity.register
def _(cache: Ring) -> int:
    return END  # a ring is never full


@sizes.register
def _(cache: Ring) -> tuple[int, int, int]:
    return cache.k.shape[0], cache.k.shape[1], cache.k.shape[3]


@past.register
def _(cache: Ring, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    A, R = cache.sinks_k.shape[-2], cache.k.shape[-2]
    start, length = (
        x if known is None else known
        for x, known in ((x, errors.integer(x)) for x in (cache.start, cache.length))
    )
    nearest = R + 1 if window is None else min(window, R + 1)
    parts = (
        rows.read(cache.sinks_k[layer], cache.sinks_v[layer], positions, None, stop=length)
        if A
        else []
    )
    for k, v, first, end in (
        (cache.k, cache.v, start - R, R),
        (cache.tail_k, cache.tail_v, start, length - start),
    ):
        # The first A positions are read as sinks; below position 0 there are no rows.
        begin = A - first
        parts += rows.read(k[layer], v[layer], positions - first, nearest, start=begin, stop=end)
    return parts


@display.tokens.register
def _(cache: Ring) -> str:
    return f"{int(cache.length)} tokens"


@grow.register
def _(cache: Ring, more: int) -> Ring:
    return cache._replace(tail_k=cache.tail_k.clone(), tail_v=cache.tail_v.clone())


reset.register(Ring, reset_counts)


@with_length.register
def _(cache: Ring, length: Tensor) -> NoReturn:
    remedy = (
        "A ring forgets what leaves its window. Keep the older value, or commit fewer tokens: "
        "commit(cache, delta, n)."
    )
    errors.fail(
        "with_length", "cache", "a past that keeps all its rows", "a Ring", remedy, TypeError
    )


@write.register
def _(cache: Ring, delta: Delta, n: int | Tensor, donate: bool) -> Ring:
    new = admit(cache, delta, n, (cache.k, cache.v))
    A, R, C = (x.shape[-2] for x in (cache.sinks_k, cache.k, cache.tail_k))
    start = errors.integer(cache.start) if new.known else None
    if start is None:
        return _write_masked(cache, new, A, R, C)
    held = new.before - start  # valid rows of the tail
    sinks = [
        rows.written(x, y, new.before, new.count)
        for x, y in ((cache.sinks_k, new.k), (cache.sinks_v, new.v))
    ]
    kept, tails = [cache.k, cache.v], [cache.tail_k, cache.tail_v]
    if held + new.count > C:
        together = lambda x, tail, y: torch.cat(
            [x, tail[..., :held, :], y[..., : new.count, :]], -2
        )
        kept = [together(*three) for three in zip(kept, tails, (new.k, new.v), strict=True)]
        # a clone, since a view would keep the whole tensor alive
        kept = [x[..., x.shape[-2] - R :, :].clone() for x in kept]
        tails = [torch.zeros_like(x) for x in tails]
        return Ring(*[*sinks, *kept, *tails, new.after.clone(), new.after])
    if donate and not is_recorded(new.k, new.v, *tails):
        for tail, more in zip(tails, (new.k, new.v), strict=True):
            tail[..., held : held + new.count, :] = more[..., : new.count, :]
    else:
        tails = [
            rows.written(tail, more, held, new.count)
            for tail, more in zip(tails, (new.k, new.v), strict=True)
        ]
    return Ring(*[*sinks, *kept, *tails, cache.start, new.after])


def _write_masked(cache: Ring, new: Admitted, A: int, R: int, C: int) -> Ring:
    """`write` for values that are not concrete: each row under vmap moves when its tail is full."""
    T, device = new.k.shape[-2], new.k.device
    n = new.count
    held = (new.before - cache.start).clamp(0, C)
    full = held + n > C
    some_full = errors.peek(full)
    sinks = [
        rows.written(x, y, new.before, n)
        for x, y in ((cache.sinks_k, new.k), (cache.sinks_v, new.v))
    ]
    put = lambda tail, more: rows.written(tail, more, held, torch.where(full, 0, n))
    tails = [put(tail, more) for tail, more in ((cache.tail_k, new.k), (cache.tail_v, new.v))]
    kept, start = [cache.k, cache.v], cache.start
    if some_full is None or bool(some_full.any()):
        # indices of the last R of: window (R rows), tail (`held` valid), then n new rows
        last = held + n + torch.arange(R, device=device)
        source = torch.where(last < R + held, last, last - held + C).clamp(max=R + C + T - 1)
        gather = lambda x, tail, more: torch.cat([x, tail, more], -2).index_select(-2, source)
        old = [(cache.k, cache.tail_k, new.k), (cache.v, cache.tail_v, new.v)]
        kept = [torch.where(full, gather(*three), three[0]) for three in old]
        start = torch.where(full, new.before + n, cache.start)
    return Ring(*[*sinks, *kept, *tails, start, new.after])
