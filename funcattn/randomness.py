"""Explicit randomness: a key is a value, a draw is a pure function of it. Exported as `fa.random`.

A key is an int64 tensor (2,) that holds two 32-bit words. Every draw enciphers the numbers 0, 1, 2, ... with Threefry-2x32 under
its key, so a draw depends on the key and the shape and on nothing else: the same under vmap, under compile, on every device, in
any order. The words are those of `jax.random` (threefry2x32, partitionable), bit for bit, and so is everything made of them by
exact arithmetic: keys, bits, uniform, bernoulli, randint, permutation. normal, gumbel and exponential go through erfinv and
log, which differ between libraries in the last bits; categorical differs only where two categories tie within those bits.

Three rules of use:

- Spend a key once. Two draws from one key are the same words; `split` it first.
- A key that was split is spent too: `split(key, n)[i]` and `fold_in(key, i)` are the same key, and drawing from `key` itself
  gives the xor of their words.
- Many keys are `vmap`: a batch of keys where one is wanted is an error, not a guess.

Half precision: `uniform` is jax's (16 bits in float16, but 7 in bfloat16). The other draws are made in float32 and rounded once,
where jax would build them from those few bits: a bfloat16 gumbel of 128 values cannot sample a vocabulary.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11; the layout of words is jax.random's, version 0.10.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from . import _checks, threefry
from ._doors import door
from .threefry import encipher

WORD = 0xFFFFFFFF  # the low 32 bits
# dtype: random bits that jax draws for it, bits of its mantissa
FORMATS = {
    torch.float64: (64, 52),
    torch.float32: (32, 23),
    torch.float16: (16, 10),
    torch.bfloat16: (8, 7),
}

Key: TypeAlias = Int64[Tensor, "2"]
Sizes: TypeAlias = Sequence[int]


def _drawn(function: str, key: Key, shape: tuple[int, ...], made: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What is made, elementwise, of two random int32 words an element: the numbers 0, 1, 2, ... in this shape, enciphered."""
    _check_key(function, key)
    if math.prod(shape) >= 2**31:
        _checks.fail(function, "shape", "fewer than 2**31 elements", shape, "Split the key and draw in parts.")
    return threefry.drawn(key, shape, made)


def _join(high: Tensor, low: Tensor) -> Int64[Tensor, "*n 2"]:
    return torch.stack([high, low], -1).long() & WORD


@door
def key(seed: int | Int[Tensor, ""]) -> Key:
    """Make a key from a seed: its high and its low 32 bits, on torch's default device.

    Args:
        seed: an int of at most 64 bits, or a 0-d integer tensor (whose device the key then follows).

    Returns:
        int64 (2,), each word in [0, 2**32).

    Example:
        >>> key(42)
        tensor([ 0, 42])
        >>> torch.vmap(key)(torch.arange(3)).tolist()
        [[0, 0], [0, 1], [0, 2]]
    """
    _check_integer("key", "seed", seed)
    if isinstance(seed, Tensor):
        return torch.stack([(seed.long() >> 32) & WORD, seed.long() & WORD])
    if not -(2**63) <= seed < 2**63:
        _checks.fail("key", "seed", "an int of at most 64 bits", seed, "Hash it first, or fold_in the rest of it.")
    return torch.tensor([(seed >> 32) & WORD, seed & WORD], dtype=torch.int64)


@door
def split(key: Key, n: int | Sizes = 2) -> Int64[Tensor, "*n 2"]:
    """Make n fresh keys, or a whole array of them, from one that is spent by it.

    Args:
        key: int64 (2,).
        n: how many, or the leading sizes of the array.

    Returns:
        int64 (*n, 2). They unpack: `first, second = split(key)`.

    Example:
        >>> split(key(0), 3).shape, split(key(0), (2, 3)).shape
        (torch.Size([3, 2]), torch.Size([2, 3, 2]))

    Law: split(key, n)[i] == fold_in(key, i) (test_randomness.py::test_split_is_fold_in_of_the_index).
    """
    if isinstance(n, str) or (isinstance(n, int) and n < 0):
        _checks.fail("split", "n", "a number of keys, 0 or more, or a tuple of them", repr(n), "Two keys are split(key).")
    sizes = _sizes("split", "n", (n,) if isinstance(n, int) else n)
    return _join(*(_drawn("split", key, sizes, word) for word in (lambda high, low: high, lambda high, low: low)))


@door
def fold_in(key: Key, data: int | Int[Tensor, ""]) -> Key:
    """Make one fresh key from a key and a number: the step of a loop, the index of a layer, the rank of a process.

    Args:
        key: int64 (2,).
        data: an int in [0, 2**32), or a 0-d integer tensor, of which the low 32 bits count.

    Example:
        >>> fold_in(key(0), 7)
        tensor([2716826189,  292468403])

    Law: distinct data give distinct keys (test_randomness.py::test_fold_in_of_distinct_data_gives_distinct_keys).
    """
    _check_key("fold_in", key)
    _check_integer("fold_in", "data", data)
    if not isinstance(data, Tensor):
        if not 0 <= data <= WORD:
            _checks.fail("fold_in", "data", "in [0, 2**32)", data, "Fold in its high and its low word one after the other.")
        data = torch.full((), data, dtype=torch.int64, device=key.device)
    return _join(*encipher(key, data.to(device=key.device, dtype=torch.int32)))


@door
def bits(key: Key, shape: Sizes = ()) -> Int64[Tensor, "*shape"]:
    """Draw 32 random bits an element, as int64 in [0, 2**32).

    Example:
        >>> bits(key(0), (2,))
        tensor([4070199207, 4202968722])
    """
    return _drawn("bits", key, _sizes("bits", "shape", shape), lambda high, low: (high ^ low).long() & WORD)


@door
def uniform(
    key: Key,
    shape: Sizes = (),
    dtype: torch.dtype = torch.float32,
    minval: float | Float[Tensor, "..."] = 0.0,
    maxval: float | Float[Tensor, "..."] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Draw from [minval, maxval): random bits become the mantissa of a number in [1, 2), less 1.

    Args:
        dtype: float64 (jax's with x64), float32, float16 or bfloat16.
        minval, maxval: numbers, or tensors that broadcast to shape; differentiable. An empty range gives minval. Where their
            difference is no power of two, jax's compiler fuses the product with the sum, and the last bit may differ.

    Example:
        >>> uniform(key(0), (3,))
        tensor([0.9477, 0.9786, 0.3323])
    """
    return _uniform("uniform", key, shape, dtype, minval, maxval)


@door
def normal(key: Key, shape: Sizes = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Draw from the standard normal law: sqrt(2) * erfinv(u), u uniform in (-1, 1).

    Example:
        >>> normal(key(0), (3,))
        tensor([ 1.6226,  2.0253, -0.4336])
    """
    wide = _wide("normal", "dtype", dtype)
    lowest = -1 + 2.0 ** -(FORMATS[wide][1] + 1)  # the number next to -1, whose erfinv is finite
    return _uniform("normal", key, shape, wide, lowest, 1.0, lambda u: u.erfinv_().mul_(math.sqrt(2)).to(dtype))


@door
def gumbel(key: Key, shape: Sizes = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Draw from the standard Gumbel law: -log(-log u). The argmax of logits plus gumbel is a draw from their softmax.

    Events less likely than about 1e-7 (float32) are not resolved, as in jax's default mode.

    Example:
        >>> gumbel(key(0), (3,))
        tensor([ 2.9234,  3.8326, -0.0969])
    """
    wide = _wide("gumbel", "dtype", dtype)
    lowest = torch.finfo(wide).tiny
    return _uniform("gumbel", key, shape, wide, lowest, 1.0, lambda u: u.log_().neg_().log_().neg_().to(dtype))


@door
def exponential(key: Key, shape: Sizes = (), dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """Draw from the exponential law of rate 1: -log(1 - u).

    Example:
        >>> exponential(key(0), (3,))
        tensor([2.9501, 3.8434, 0.4039])
    """
    wide = _wide("exponential", "dtype", dtype)
    return _uniform("exponential", key, shape, wide, then=lambda u: u.neg_().log1p_().neg_().to(dtype))


@door
def bernoulli(key: Key, p: float | Float[Tensor, "..."] = 0.5, shape: Sizes | None = None) -> Bool[Tensor, "*shape"]:
    """Draw True with probability p, to a resolution of 2**-23 (float32).

    Args:
        p: a number or a floating tensor.
        shape: p broadcasts to it; None takes the shape of p.

    Example:
        >>> bernoulli(key(0), 0.3, (6,)).tolist()
        [False, False, False, False, False, True]
    """
    wide = _wide("bernoulli", "p", p.dtype if isinstance(p, Tensor) else torch.float32)
    threshold = _beside("bernoulli", key, wide, p)
    shape = threshold.shape if shape is None else _sizes("bernoulli", "shape", shape)
    _check_covered("bernoulli", "p", threshold.shape, shape)
    return _uniform("bernoulli", key, shape, wide) < threshold


@door
def categorical(key: Key, logits: Float[Tensor, "..."], axis: int = -1, shape: Sizes | None = None) -> Int64[Tensor, "*shape"]:
    """Draw indices from softmax(logits) along an axis, as the argmax of logits plus gumbel.

    Args:
        logits: unnormalized log-probabilities; -inf is never drawn while anything else is there.
        axis: the axis of categories.
        shape: ends in a shape that covers the other axes of logits; None takes just these. Leading sizes are more draws.

    Example:
        >>> logits = torch.arange(1, 9).float().log()
        >>> categorical(key(0), logits, shape=(6,))
        tensor([1, 2, 5, 2, 4, 3])

    Law: frequencies follow softmax(logits) (test_randomness.py::test_categorical_follows_the_softmax_of_its_logits).
    """
    _check_key("categorical", key)
    wide = _wide("categorical", "logits", logits.dtype)
    if not -logits.ndim <= axis < logits.ndim or logits.shape[axis] == 0:
        _checks.fail(
            "categorical", "logits", f"categories along axis {axis}", _checks.shape(logits), "Name the axis of categories."
        )
    back = axis % logits.ndim - logits.ndim  # the same axis from the end, where shape and logits agree
    others = (*logits.shape[:back], *logits.shape[logits.ndim + back + 1 :])
    shape = others if shape is None else _sizes("categorical", "shape", shape)
    _check_covered("categorical", "logits less its axis of categories", others, shape)
    place = len(shape) + 1 + back
    noise = gumbel(key, (*shape[:place], logits.shape[axis], *shape[place:]), wide)
    return (noise + logits.to(wide)).argmax(back)


@door
def randint(key: Key, shape: Sizes, minval: int | Int[Tensor, "..."], maxval: int | Int[Tensor, "..."]) -> Int64[Tensor, "*shape"]:
    """Draw integers from [minval, maxval): two words an element, folded modulo the span.

    The words are those jax draws for its int32. As there, a span that is no power of two is biased: up to 2**16 by at most
    span / 2**64 of a probability, since 64 bits are folded, and above by at most span / 2**32.

    Args:
        minval, maxval: ints or integer tensors that broadcast to shape, at most 2**32 apart. Where a tensor's range is
            empty, minval is given.

    Example:
        >>> randint(key(0), (6,), 0, 10)
        tensor([9, 0, 2, 3, 1, 7])
    """
    _check_key("randint", key)
    shape = _sizes("randint", "shape", shape)
    for name, bound in (("minval", minval), ("maxval", maxval)):
        _check_integer("randint", name, bound, ndim=None)
        _check_covered("randint", name, bound.shape if isinstance(bound, Tensor) else (), shape)
    span = maxval - minval
    if isinstance(span, Tensor):
        span = span.long().clamp(min=1)
    elif not 0 < span <= 2**32:
        _checks.fail("randint", "maxval - minval", "in [1, 2**32]", span, "The range is half open: maxval is never drawn.")
    first, second = split(key).unbind()
    fold = 2**16 % span
    fold = ((fold * fold) & WORD) % span  # 2**32 modulo the span, in jax's 32-bit arithmetic
    offset = ((bits(first, shape) % span) * fold + bits(second, shape) % span) & WORD
    return minval + offset % span


@door
def permutation(key: Key, x: int | Tensor) -> Tensor:
    """Shuffle range(x), or the rows of x (its axis 0), by stable sorts on random words.

    Returns:
        int64 (x,) for an int, else the shape and dtype of x; differentiable in x.

    Example:
        >>> permutation(key(0), 9)
        tensor([0, 1, 8, 5, 6, 4, 3, 2, 7])

    Law: every permutation is as likely (test_randomness.py::test_permutations_are_equally_likely).
    """
    _check_key("permutation", key)
    if isinstance(x, Tensor) and not x.ndim:
        _checks.fail("permutation", "x", "an int or a tensor with an axis to shuffle", "a 0-d tensor", "Give a size as an int.")
    if not isinstance(x, Tensor) and x < 0:
        _checks.fail("permutation", "x", "a number of things, 0 or more", x, "Give a size.")
    n = len(x) if isinstance(x, Tensor) else x
    order = torch.arange(n, device=key.device)
    # with k rounds, two of n elements get equal words throughout with probability n^2 / 2^(32k + 1): at most 1 / 2n
    for _ in range(math.ceil(3 * math.log(max(1, n)) / math.log(WORD))):
        key, spent = split(key).unbind()
        order = order[bits(spent, (n,)).argsort(stable=True)]
    return x.index_select(0, order) if isinstance(x, Tensor) else order


def _uniform(
    function: str,
    key: Key,
    shape: Sizes,
    dtype: torch.dtype,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
    then: Callable[[Tensor], Tensor] = lambda u: u,
) -> Tensor:
    """then(u), elementwise, of u uniform in [minval, maxval); it may write over u where these are numbers."""
    _wide(function, "dtype", dtype)
    shape = _sizes(function, "shape", shape)
    width, mantissa = FORMATS[dtype]

    def unit(high: Tensor, low: Tensor) -> Tensor:  # in [0, 1), exactly
        word = (high.long() << 32) | (low.long() & WORD) if width == 64 else high ^ low
        word >>= width - mantissa
        word &= (1 << mantissa) - 1
        return word.to(dtype).mul_(2.0**-mantissa)

    is_plain = not isinstance(minval, Tensor) and not isinstance(maxval, Tensor)
    if is_plain and (minval, maxval) == (0, 1):
        return _drawn(function, key, shape, lambda high, low: then(unit(high, low)))
    _check_key(function, key)
    lowest, highest = _beside(function, key, dtype, minval), _beside(function, key, dtype, maxval)
    span = (highest - lowest).clamp(min=0)
    _check_covered(function, "minval and maxval", span.shape, shape)
    if is_plain:
        return _drawn(function, key, shape, lambda high, low: then(unit(high, low).mul_(span).add_(lowest)))
    return then(_drawn(function, key, shape, unit) * span + lowest)


def _wide(function: str, argument: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to draw in: float32 for half precision."""
    if dtype not in FORMATS:
        _checks.fail(
            function, argument, "float64, float32, float16 or bfloat16", dtype, "Draw one of these and cast it.", TypeError
        )
    return dtype if dtype == torch.float64 else torch.float32


def _beside(function: str, key: Key, dtype: torch.dtype, number: float | Tensor) -> Tensor:
    """A number as a tensor where the key is, filled there rather than copied."""
    _check_key(function, key)
    return number.to(dtype) if isinstance(number, Tensor) else torch.full((), number, dtype=dtype, device=key.device)


def _sizes(function: str, argument: str, shape: Sizes) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or any(not isinstance(size, int | torch.SymInt) or size < 0 for size in shape):
        _checks.fail(function, argument, "a tuple of sizes", repr(shape), "One axis of n is (n,); a tree is mapped by fa.tree.map.")
    return tuple(shape)


def _check_key(function: str, key: Key) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        _checks.fail(
            function, "key", "one key, int64 (2,)", _kind(key), "Make one with key(seed), and use many by vmap.", TypeError
        )
    if key.shape != (2,):
        _checks.fail(function, "key", "one key, int64 (2,)", _checks.shape(key), f"Use many by vmap: torch.vmap({function})(keys).")


def _check_integer(function: str, argument: str, number: Any, ndim: int | None = 0) -> None:
    if isinstance(number, Tensor):
        fits = ndim in (None, number.ndim) and not (number.is_floating_point() or number.is_complex())
    else:
        fits = isinstance(number, int)
    if not fits:
        wanted = "an int or an integer tensor" if ndim is None else "an int or a 0-d integer tensor"
        _checks.fail(function, argument, wanted, _kind(number), "Round it, and use many by vmap.", TypeError)


def _check_covered(function: str, argument: str, smaller: Sizes, shape: Sizes) -> None:
    """Check that a shape broadcasts to the shape of the draw, and does not outgrow it."""
    fits = all(a in (1, b) for a, b in zip(reversed(smaller), reversed(shape), strict=False))
    if len(smaller) > len(shape) or not fits:
        _checks.fail(
            function, argument, f"of a shape that broadcasts to {tuple(shape)}", tuple(smaller), "Give the shape of the result."
        )


def _kind(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {_checks.shape(value)}" if isinstance(value, Tensor) else repr(value)
