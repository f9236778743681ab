"""`QuantizedCache`: older rows quantized to 8 or 4 bits, recent rows in full precision.

    x ~ low + scale * code    code in 0 .. 2^bits - 1, low the minimum and scale the step of a group

A group is one channel of a block for keys, one token for values: some channels of keys are large
for every token, those of values are not. New rows go to a tail in full precision; when it holds a
whole block beside the `recent` rows, that block is quantized once, and never again: so the error
of a row does not grow with the text. |x - (low + scale * code)| <= scale / 2.

Derivatives go through the tail, `scale` and `low`, and the query. A code is an integer and has
none: rows that are differentiated cannot be quantized, and a commit that would do so raises
TypeError.

Source: Liu et al., KIVI: A tuning-free asymmetric 2bit quantization for KV cache, arXiv:2402.02750,
section 3.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import differentiated
from ..core.doors import made
from ..kernels import Part
from ..records import record
from . import display, rows
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
class QuantizedBlock(NamedTuple):
    """R quantized rows (L, K, R, D): codes uint8 (L, K, R, D), or (L, K, R, D / 2) for 4 bits.

    With 4 bits a byte holds the codes of features i (low bits) and i + D / 2 (high bits).
    """

    codes: Tensor
    scale: Tensor  # (L, K, 1, D) for keys, (L, K, R, 1) for values
    low: Tensor  # as scale, same shape


@record
class QuantizedCache(NamedTuple):
    """n quantized blocks of R rows, and a tail (L, K, C, D) of later rows in full precision.

    C = recent + R; at least the last C - R rows stay in full precision. Roll back by keeping the
    older cache; `with_length` raises, since quantized rows cannot be restored.
    """

    k: tuple[QuantizedBlock, ...]
    v: tuple[QuantizedBlock, ...]
    tail_k: Tensor
    tail_v: Tensor
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
        """Room for `size` tokens at least, 8 bits in blocks of 32; `quantized` sets others."""
        return quantized().empty(layers, heads, size, head_size, dtype, value_size)


@made
@dataclass(frozen=True)
# a value that is called like a function: model.cache(size, kind=quantized(bits=4))
class quantized:
    """A kind for `model.cache`: a `QuantizedCache` with `recent` rows left unquantized.

    Example:
        >>> import funcattn as fa
        >>> cache = fa.decoder(fa.Config()).cache(100, kind=quantized(bits=4))
        >>> cache.k[0].codes.shape, cache.tail_k.shape
        (torch.Size([2, 2, 32, 8]), torch.Size([2, 2, 64, 16]))
    """

    bits: int = 8
    block: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            errors.fail(
                "quantized", "bits", "8 or 4", self.bits, "Two codes of 4 bits share a byte."
            )
        for name, least in (("block", 1), ("recent", 0)):
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
        R, n = self.block, max(1, -(-(size - self.recent) // self.block))
        of = lambda dtype, *shape: torch.zeros((), dtype=dtype).expand(layers, heads, *shape)

        def side(name: str, D: int, *group: int) -> tuple[tuple[QuantizedBlock, ...], Tensor]:
            if self.bits == 4 and D % 2:
                errors.fail("quantized", name, "even for 4 bits", D, "Use bits=8.")
            codes = of(torch.uint8, R, D if self.bits == 8 else D // 2)
            block = QuantizedBlock(codes, *[of(dtype, *group)] * 2)
            return (block,) * n, torch.zeros(layers, heads, self.recent + R, D, dtype=dtype)

        values = head_size if value_size is None else value_size
        k, tail_k = side("head_size", head_size, 1, head_size)
        v, tail_v = side("value_size", values, R, min(values, 1))
        return QuantizedCache(k, v, tail_k, tail_v, torch.zeros((), dtype=torch.int64))


def encode(x: Tensor, dim: int, bits: int) -> QuantizedBlock:
    """Quantize rows (..., R, D) to 8 or 4 bits, with one scale for each group along dim.

    Args:
        x: floating (..., R, D); D is even for 4 bits.
        dim: the axis over which minimum and step are taken: -2 for keys, -1 for values.
        bits: 8 or 4.

    Law: decoding is within half a scale of x, and encoding what was decoded changes nothing but
        rounding (test_quantized_blocks.py).
    """
    if not x.shape[-1]:  # nothing to encode, and no group of which to take a minimum
        return QuantizedBlock(x.to(torch.uint8), x, x)
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = 2**bits - 1
    scale = (
        (high.float() - low.float() if x.dtype.itemsize < 4 else high - low).div(levels).to(x.dtype)
    )
    step = torch.where(scale == 0, 1, scale)
    codes = ((_wide(x) - _wide(low)) / _wide(step)).round().clamp(0, levels).to(torch.uint8)
    if bits == 4:
        half = x.shape[-1] // 2
        codes = codes[..., :half] | (codes[..., half:] << 4)
    return QuantizedBlock(codes, scale, low)


def decode(coded: QuantizedBlock, D: int) -> Tensor:
    """Dequantize to rows (..., R, D), in the dtype of the scale."""
    codes = coded.codes
    if codes.shape[-1] != D:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    return (codes.to(_wide(coded.scale).dtype) * coded.scale + coded.low).to(coded.scale.dtype)


@capacity.register
def _(cache: QuantizedCache) -> int:
    return len(cache.k) * _block(cache) + cache.tail_k.shape[-2] - 1


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
    coded = _coded_blocks(cache, length)
    held = rows.bounds(coded, n)[1]
    first = min(rows.first_seen(positions, window)[0] // R, held)
    parts = []
    for start, stop in rows.runs([block.codes for block in cache.k[first:held]]):
        begin, end = first + start, first + stop
        k, v = (
            _together(side[begin:end], layer, tail)
            for side, tail in ((cache.k, cache.tail_k), (cache.v, cache.tail_v))
        )
        parts += rows.read(k, v, positions - begin * R, window, stop=(coded - begin) * R)
    at = coded * R
    return parts + rows.read(
        cache.tail_k[layer], cache.tail_v[layer], positions - at, window, stop=length - at
    )


@grow.register
def _(cache: QuantizedCache, more: int) -> QuantizedCache:
    def room(blocks: tuple[QuantizedBlock, ...]) -> tuple[QuantizedBlock, ...]:
        unwritten = QuantizedBlock(*[x.new_zeros(()).expand(x.shape) for x in blocks[0]])
        return blocks + (unwritten,) * -(-more // _block(cache))

    return QuantizedCache(
        room(cache.k), room(cache.v), cache.tail_k.clone(), cache.tail_v.clone(), cache.length
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
    if not new.known:
        return _write_masked(cache, new)
    R = _block(cache)
    was, now = _coded_blocks(cache, new.before), _coded_blocks(cache, new.before + new.count)
    held, pairs = new.before - was * R, ((cache.tail_k, new.k), (cache.tail_v, new.v))
    if was == now:
        if donate and not any(x.requires_grad for pair in pairs for x in pair):
            for tail, more in pairs:
                tail[..., held : held + new.count, :] = more[..., : new.count, :]
            return cache._replace(length=new.after)
        k, v = (rows.written(tail, more, held, new.count) for tail, more in pairs)
        return cache._replace(tail_k=k, tail_v=v, length=new.after)
    _check_constant(cache, new)
    k, v = (torch.cat([tail[..., :held, :], more[..., : new.count, :]], -2) for tail, more in pairs)
    block = lambda x, i: x[..., (i - was) * R : (i - was + 1) * R, :]
    coded = range(was, now)
    rest = lambda x, tail: rows.written(
        torch.zeros_like(tail), x[..., (now - was) * R :, :], 0, x.shape[-2] - (now - was) * R
    )
    return QuantizedCache(
        cache.k[:was] + tuple(encode(block(k, i), -2, _bits(cache)) for i in coded) + cache.k[now:],
        cache.v[:was] + tuple(encode(block(v, i), -1, _bits(cache)) for i in coded) + cache.v[now:],
        rest(k, cache.tail_k),
        rest(v, cache.tail_v),
        new.after,
    )


def _write_masked(cache: QuantizedCache, new: Admitted) -> QuantizedCache:
    """`write` for values that are not concrete: each row under vmap fills its own blocks.

    Only blocks that some row of the batch fills are computed.
    """
    R, C, T, n = _block(cache), cache.tail_k.shape[-2], new.k.shape[-2], len(cache.k)
    was, now = _coded_blocks(cache, new.before), _coded_blocks(cache, new.before + new.count)
    held = (new.before - was * R).clamp(0, C)
    pairs = ((cache.tail_k, new.k), (cache.tail_v, new.v))
    some = errors.peek(now > was)
    if some is not None and not bool(some.any()):
        k, v = (rows.written(tail, more, held, new.count) for tail, more in pairs)
        return cache._replace(tail_k=k, tail_v=v, length=new.after)
    _check_constant(cache, new)

    def take(tail: Tensor, more: Tensor, begin: int | Tensor, count: int) -> Tensor:
        """`count` rows from `begin` of tail and new rows; any beyond the last are unobserved."""
        row = begin + torch.arange(count, device=more.device)
        source = torch.where(row < held, row, row - held + C).clamp(max=C + T - 1)
        return torch.cat([tail, more], -2).index_select(-2, source)

    sides = [list(cache.k), list(cache.v)]
    least, most = rows.bounds(was, n)[0], rows.bounds(now, n)[1]
    for j in range((R - 1 + T) // R):  # the most blocks that T tokens can fill
        for blocks, pair, dim in zip(sides, pairs, (-2, -1), strict=True):
            coded = encode(take(*pair, j * R, R), dim, _bits(cache))
            for i in range(least, most):
                hit = (was + j == i) & (i < now)
                blocks[i] = QuantizedBlock(
                    *[torch.where(hit, x, y) for x, y in zip(coded, blocks[i], strict=True)]
                )
    k, v = (take(*pair, (now - was) * R, C) for pair in pairs)
    return QuantizedCache(tuple(sides[0]), tuple(sides[1]), k, v, new.after)


def _check_constant(cache: QuantizedCache, new: Admitted) -> None:
    if any(differentiated(x) for x in (new.k, new.v, cache.tail_k, cache.tail_v)):
        remedy = (
            "Use a dense Cache while differentiating, or a larger `recent`: rows of the tail keep "
            "their derivatives."
        )
        wanted = "rows without a derivative where they are coded"
        errors.fail("commit", "delta", wanted, "rows with a derivative", remedy, TypeError)


def _coded_blocks(cache: QuantizedCache, length: Any) -> Any:
    """How many blocks are quantized at this length: an int, or a tensor where the length is one."""
    coded = (length - (cache.tail_k.shape[-2] - _block(cache))) // _block(cache)
    return max(coded, 0) if isinstance(coded, int) else coded.clamp(0, len(cache.k))


def _together(blocks: tuple[QuantizedBlock, ...], layer: int, like: Tensor) -> Tensor:
    """The dequantized rows (K, n R, D) of n neighbouring blocks in one layer."""
    stacked = QuantizedBlock(
        *[torch.stack([x[layer] for x in leaf], -3) for leaf in zip(*blocks, strict=True)]
    )
    return decode(stacked, like.shape[-1]).flatten(-3, -2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()


def _block(cache: QuantizedCache) -> int:
    return cache.k[0].codes.shape[-2]


def _bits(cache: QuantizedCache) -> int:
    return 8 if cache.k[0].codes.shape[-1] == cache.tail_k.shape[-1] else 4
