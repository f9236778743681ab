"""`QuantizedCache`: older rows in codes of 8 or 4 bits, first and recent rows in full precision.

    first `sinks` rows | blocks of R coded rows | tail: `recent` rows and what fills a block

New rows go to a tail in full precision; when it holds a whole block beside the `recent` rows, that
block is coded once (`codes`), and never again: so the error of a row does not grow with the text.
The first tokens stay as they came: models attend to them wherever they have nothing to look for
(attention sinks), and their keys are so unlike all others that they would spoil the groups.

Derivatives go through the tail, `scale` and `low`, and the query. A code is an integer and has
none: rows that are differentiated cannot be quantized, and a commit that would do so raises
TypeError.

Source: Liu et al., KIVI: A tuning-free asymmetric 2bit quantization for KV cache, arXiv:2402.02750,
section 3; Hooper et al., KVQuant, arXiv:2401.18079, section 3.5, for the first tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import differentiated, is_recorded
from ..core.doors import made
from ..kernels import Part, coded
from ..records import record
from . import coded_rows, display, rows
from .codes import QuantizedBlock, bits_of, encode_keys, encode_values
from .dense import Cache
from .making import features_of
from .protocol import (
    Admitted,
    Delta,
    admit,
    capacity,
    exactly,
    grow,
    keeps_all,
    past,
    reset,
    reset_counts,
    sizes,
    with_length,
    write,
)


@record
class QuantizedCache(NamedTuple):
    """n coded blocks of R rows, between the first rows and a tail (L, K, C, D) in full precision.

    C = recent + R; at least the last C - R rows stay in full precision. Roll back by keeping the
    older cache; `with_length` raises, since quantized rows cannot be restored.
    """

    k: tuple[QuantizedBlock, ...]
    v: tuple[QuantizedBlock, ...]
    tail_k: Tensor
    tail_v: Tensor
    first_k: Tensor  # (L, K, sinks, D), the first rows of the text
    first_v: Tensor
    length: Tensor  # int64 ()
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
    ) -> "QuantizedCache":
        """Room for `size` tokens at least, 8 bits in blocks of 128; `quantized` sets others."""
        return quantized().empty(layers, heads, size, head_size, dtype, value_size)


@made
@dataclass(frozen=True)
# a value that is called like a function: model.cache(size, kind=quantized(bits=4))
class quantized:
    """A kind for `model.cache`: a `QuantizedCache`, whose first and last rows are not coded.

    Args:
        bits: of a code, 8 or 4.
        block: rows that are coded at once, R; a multiple of 32 is coded best and read fastest.
        recent: how many of the last rows, at least, are in full precision.
        sinks: how many of the first rows are.

    Example:
        >>> import funcattn as fa
        >>> cache = fa.decoder(fa.Config()).cache(200, kind=quantized(bits=4))
        >>> cache.k[0].codes.shape, cache.tail_k.shape, cache.first_k.shape
        (torch.Size([2, 2, 16, 64]), torch.Size([2, 2, 256, 16]), torch.Size([2, 2, 4, 16]))
    """

    bits: int = 8
    block: int = 128
    recent: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            errors.fail(
                "quantized", "bits", "8 or 4", self.bits, "Two codes of 4 bits share a byte."
            )
        for name, least in (("block", 1), ("recent", 0), ("sinks", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                errors.fail(
                    "quantized",
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
    ) -> QuantizedCache:
        """Room for `size` tokens at least, in whole blocks, on torch's default device."""
        R, n = self.block, max(1, -(-(size - self.recent - self.sinks) // self.block))
        unwritten = lambda x: x.new_zeros(()).expand(layers, heads, *x.shape)

        def side(D: int, code: Callable[[Tensor, int], QuantizedBlock]) -> tuple[Any, ...]:
            block = QuantizedBlock(*map(unwritten, code(torch.zeros(R, D, dtype=dtype), self.bits)))
            rows = lambda n: torch.zeros(layers, heads, n, D, dtype=dtype)
            return (block,) * n, rows(self.recent + R), rows(self.sinks)

        of_keys, of_values = features_of(head_size, value_size)
        k, tail_k, first_k = side(of_keys, encode_keys)
        v, tail_v, first_v = side(of_values, encode_values)
        length = torch.zeros((), dtype=torch.int64)
        return QuantizedCache(k, v, tail_k, tail_v, first_k, first_v, length)


@capacity.register
def _(cache: QuantizedCache) -> int:
    return _sinks(cache) + len(cache.k) * _block(cache) + cache.tail_k.shape[-2] - 1


@sizes.register
def _(cache: QuantizedCache) -> tuple[int, int, int]:
    return cache.tail_k.shape[0], cache.tail_k.shape[1], cache.tail_k.shape[3]


@past.register
def _(
    cache: QuantizedCache, layer: int, positions: Tensor, window: int | None = None
) -> list[Part]:
    R, n = _block(cache), len(cache.k)
    known = errors.integer(cache.length)
    length = cache.length if known is None else known
    parts = rows.read(cache.first_k[layer], cache.first_v[layer], positions, window, stop=length)
    positions, length = positions - _sinks(cache), length - _sinks(cache)
    full = _coded_blocks(cache, cache.length if known is None else known)
    held = rows.bounds(full, n)[1]
    first = min(rows.first_seen(positions, window)[0] // R, held)
    D, bits = cache.tail_v.shape[-1], _bits(cache)[0]
    if known is not None and held > first and not why_not_coded(cache):
        some, tail = range(first, held), cache.tail_k
        codes = coded_rows.segment(cache.k, cache.v, some, layer, positions, window, R, tail, bits)
        if codes is not None:
            parts.append(codes)
            first = held
    for start, stop in rows.runs([block.codes for block in cache.k[first:held]]):
        begin, end = first + start, first + stop
        k, v = coded_rows.decoded(cache.k[begin:end], cache.v[begin:end], layer, R, D)
        parts += rows.read(k, v, positions - begin * R, window, stop=(full - begin) * R)
    at = full * R
    return parts + rows.read(
        cache.tail_k[layer], cache.tail_v[layer], positions - at, window, stop=length - at
    )


@grow.register
def _(cache: QuantizedCache, more: int) -> QuantizedCache:
    def room(blocks: tuple[QuantizedBlock, ...]) -> tuple[QuantizedBlock, ...]:
        unwritten = QuantizedBlock(*[x.new_zeros(()).expand(x.shape) for x in blocks[0]])
        return blocks + (unwritten,) * -(-more // _block(cache))

    return cache._replace(
        k=room(cache.k), v=room(cache.v), tail_k=cache.tail_k.clone(), tail_v=cache.tail_v.clone()
    )


keeps_all.register(QuantizedCache, exactly(QuantizedCache))
reset.register(QuantizedCache, reset_counts)


@with_length.register
def _(cache: QuantizedCache, length: Tensor) -> NoReturn:
    remedy = (
        "What is coded stays coded. Keep the older value, or commit fewer tokens: commit(cache, "
        "delta, n)."
    )
    errors.fail(
        "with_length",
        "cache",
        "a past that keeps its rows as they came",
        "a QuantizedCache",
        remedy,
        TypeError,
    )


@write.register
def _(cache: QuantizedCache, delta: Delta, n: int | Tensor, donate: bool) -> QuantizedCache:
    new = admit(cache, delta, n, (cache.tail_k, cache.tail_v))
    if errors.integer(new.before) is None or new.before < _sinks(cache):
        first_k, first_v = (
            rows.written(first, more, new.before, new.count)
            for first, more in ((cache.first_k, new.k), (cache.first_v, new.v))
        )
        cache = cache._replace(first_k=first_k, first_v=first_v)
    if not new.known:
        return _write_masked(cache, new, donate)
    R = _block(cache)
    was, now = _coded_blocks(cache, new.before), _coded_blocks(cache, new.before + new.count)
    begin = max(new.before - _sinks(cache), 0)  # in the rows behind the first ones
    count = max(new.before + new.count - _sinks(cache), 0) - begin
    skipped, held = new.count - count, begin - was * R
    pairs = tuple(
        (tail, more[..., skipped : new.count, :])
        for tail, more in ((cache.tail_k, new.k), (cache.tail_v, new.v))
    )
    if was == now:
        if donate and not is_recorded(*pairs):
            for tail, more in pairs:
                tail[..., held : held + count, :] = more
            return cache._replace(length=new.after)
        k, v = (rows.written(tail, more, held, count) for tail, more in pairs)
        return cache._replace(tail_k=k, tail_v=v, length=new.after)
    _check_constant(cache, new)
    k, v = (torch.cat([tail[..., :held, :], more], -2) for tail, more in pairs)
    block = lambda x, i: x[..., (i - was) * R : (i - was + 1) * R, :]
    coded, (of_keys, of_values) = range(was, now), _bits(cache)
    rest = lambda x, tail: rows.written(
        torch.zeros_like(tail), x[..., (now - was) * R :, :], 0, x.shape[-2] - (now - was) * R
    )
    blocks = lambda side, made: side[:was] + tuple(made) + side[now:]
    return cache._replace(
        k=blocks(cache.k, (encode_keys(block(k, i), of_keys) for i in coded)),
        v=blocks(cache.v, (encode_values(block(v, i), of_values) for i in coded)),
        tail_k=rest(k, cache.tail_k),
        tail_v=rest(v, cache.tail_v),
        length=new.after,
    )


def _write_masked(cache: QuantizedCache, new: Admitted, donate: bool) -> QuantizedCache:
    """`write` for values that are not concrete: each row under vmap fills its own blocks.

    Only blocks that some row of the batch fills are computed.
    """
    R, C, T, n = _block(cache), cache.tail_k.shape[-2], new.k.shape[-2], len(cache.k)
    was, now = _coded_blocks(cache, new.before), _coded_blocks(cache, new.before + new.count)
    at = new.before - _sinks(cache) - was * R  # negative while the first rows are written
    held = at.clamp(0, C)
    pairs = ((cache.tail_k, new.k), (cache.tail_v, new.v))
    some = errors.peek(now > was)
    if some is not None and not bool(some.any()):
        found = rows.overwritten(pairs, at, new.count) if donate else None
        k, v = found or (rows.written(tail, more, at, new.count) for tail, more in pairs)
        return cache._replace(tail_k=k, tail_v=v, length=new.after)
    _check_constant(cache, new)

    def take(tail: Tensor, more: Tensor, begin: int | Tensor, count: int) -> Tensor:
        """`count` rows from `begin` of tail and new rows; any beyond the last are unobserved."""
        row = begin + torch.arange(count, device=more.device)
        source = torch.where(row < held, row, row - at + C).clamp(max=C + T - 1)
        return torch.cat([tail, more], -2).index_select(-2, source)

    sides = [list(cache.k), list(cache.v)]
    least, most = rows.bounds(was, n)[0], rows.bounds(now, n)[1]
    for j in range((R - 1 + T) // R):  # the most blocks that T tokens can fill
        for blocks, pair, code, bits in zip(
            sides, pairs, (encode_keys, encode_values), _bits(cache), strict=True
        ):
            coded = code(take(*pair, j * R, R), bits)
            for i in range(least, most):
                hit = (was + j == i) & (i < now)
                blocks[i] = QuantizedBlock(
                    *[torch.where(hit, x, y) for x, y in zip(coded, blocks[i], strict=True)]
                )
    k, v = (take(*pair, (now - was) * R, C) for pair in pairs)
    return cache._replace(
        k=tuple(sides[0]), v=tuple(sides[1]), tail_k=k, tail_v=v, length=new.after
    )


def _check_constant(cache: QuantizedCache, new: Admitted) -> None:
    if any(differentiated(x) for x in (new.k, new.v, cache.tail_k, cache.tail_v)):
        remedy = (
            "Use a dense Cache while differentiating, or a larger `recent`: rows of the tail keep "
            "their derivatives."
        )
        wanted = "rows without a derivative where they are coded"
        errors.fail("commit", "delta", wanted, "rows with a derivative", remedy, TypeError)


def _coded_blocks(cache: QuantizedCache, length: Any) -> Any:
    """How many blocks are coded at this length: an int, or a tensor where the length is one."""
    R = _block(cache)
    coded = (length - _sinks(cache) - (cache.tail_k.shape[-2] - R)) // R
    return max(coded, 0) if isinstance(coded, int) else coded.clamp(0, len(cache.k))


def why_not_coded(cache: QuantizedCache) -> str:
    """Why operators do not read the codes of this cache, or ""."""
    k, v = cache.tail_k, cache.tail_v
    return coded.why_not(k.shape[-1], v.shape[-1], _block(cache), k.dtype, k.device)


def rows_and_codes(cache: QuantizedCache) -> tuple[list[Cache], list[Tensor], int, int]:
    """The rows in full precision, first and last, as dense caches; the codes between them, as
    operators take them, rows of a block, and bits. The length is concrete.
    """
    length, R = int(cache.length), _block(cache)
    full = _coded_blocks(cache, length)
    first, last = cache.length.clamp(max=_sinks(cache)), cache.length - _sinks(cache) - full * R
    dense = [
        Cache(cache.first_k, cache.first_v, first),
        Cache(cache.tail_k, cache.tail_v, last.clamp(min=0)),
    ]
    return dense, coded_rows.tensors(cache.k[:full], cache.v[:full]), R, _bits(cache)[0]


def _block(cache: QuantizedCache) -> int:
    return cache.v[0].codes.shape[-2]


def _sinks(cache: QuantizedCache) -> int:
    return cache.first_k.shape[-2]


def _bits(cache: QuantizedCache) -> tuple[int, int]:
    """Of keys and of values."""
    k, v = cache.k[0].codes, cache.v[0].codes
    return bits_of(k, _block(cache)), bits_of(v, cache.tail_v.shape[-1])
