"""Draws from a key: uniform, normal, ... numbers, booleans, integers, categories, permutations."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from ..core import errors
from ..core.doors import door
from .keys import WORD, Key, Sizes, bits, check_integer, check_key, drawn, sizes_of, split

# dtype: random bits that jax draws for it, bits of its mantissa
FORMATS = {
    torch.float64: (64, 52),
    torch.float32: (32, 23),
    torch.float16: (16, 10),
    torch.bfloat16: (8, 7),
}


@door
def uniform(
    key: Key,
    shape: Sizes = (),
    dtype: torch.dtype = torch.float32,
    minval: float | Float[Tensor, "..."] = 0.0,
    maxval: float | Float[Tensor, "..."] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Draw from [minval, maxval): random bits are the mantissa of a number in [1, 2), minus 1.

    Args:
        key: int64 (2,).
        dtype: float64 (jax's with x64), float32, float16 or bfloat16.
        minval, maxval: numbers, or tensors that broadcast to shape; differentiable. An empty range
            gives minval. Where their difference is no power of two, jax's compiler fuses product
            and sum, and the last bit may differ.

    Example:
        >>> from funcattn import key
        >>> uniform(key(0), (3,))
        tensor([0.9477, 0.9786, 0.3323])
    """
    return _uniform("uniform", key, shape, dtype, minval, maxval)


@door
def normal(
    key: Key, shape: Sizes = (), dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    """Draw from the standard normal distribution: sqrt(2) * erfinv(u), u uniform in (-1, 1).

    Example:
        >>> from funcattn import key
        >>> normal(key(0), (3,))
        tensor([ 1.6226,  2.0253, -0.4336])
    """
    wide = _wide("normal", "dtype", dtype)
    lowest = -1 + 2.0 ** -(FORMATS[wide][1] + 1)  # the number next to -1, whose erfinv is finite
    return _uniform(
        "normal", key, shape, wide, lowest, 1.0, lambda u: u.erfinv_().mul_(math.sqrt(2)).to(dtype)
    )


@door
def gumbel(
    key: Key, shape: Sizes = (), dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    """Draw from the standard Gumbel distribution: -log(-log u).

    The argmax of logits plus gumbel is a draw from their softmax. Events less likely than about
    1e-7 (float32) are not resolved, as in jax's default mode.

    Example:
        >>> from funcattn import key
        >>> gumbel(key(0), (3,))
        tensor([ 2.9234,  3.8326, -0.0969])
    """
    wide = _wide("gumbel", "dtype", dtype)
    lowest = torch.finfo(wide).tiny
    return _uniform(
        "gumbel", key, shape, wide, lowest, 1.0, lambda u: u.log_().neg_().log_().neg_().to(dtype)
    )


@door
def exponential(
    key: Key, shape: Sizes = (), dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    """Draw from the exponential distribution of rate 1: -log(1 - u).

    Example:
        >>> from funcattn import key
        >>> exponential(key(0), (3,))
        tensor([2.9501, 3.8434, 0.4039])
    """
    wide = _wide("exponential", "dtype", dtype)
    return _uniform(
        "exponential", key, shape, wide, then=lambda u: u.neg_().log1p_().neg_().to(dtype)
    )


@door
def bernoulli(
    key: Key, p: float | Float[Tensor, "..."] = 0.5, shape: Sizes | None = None
) -> Bool[Tensor, "*shape"]:
    """Draw True with probability p, to a resolution of 2**-23 (float32).

    Args:
        p: a number or a floating tensor.
        shape: p broadcasts to it; None is the shape of p.

    Example:
        >>> from funcattn import key
        >>> bernoulli(key(0), 0.3, (6,)).tolist()
        [False, False, False, False, False, True]
    """
    wide = _wide("bernoulli", "p", p.dtype if isinstance(p, Tensor) else torch.float32)
    threshold = _beside("bernoulli", key, wide, p)
    shape = threshold.shape if shape is None else sizes_of("bernoulli", "shape", shape)
    _check_covered("bernoulli", "p", threshold.shape, shape)
    return _uniform("bernoulli", key, shape, wide) < threshold


@door
def categorical(
    key: Key, logits: Float[Tensor, "..."], axis: int = -1, shape: Sizes | None = None
) -> Int64[Tensor, "*shape"]:
    """Draw indices from softmax(logits) along an axis, as the argmax of logits plus gumbel.

    Args:
        logits: unnormalized log-probabilities; -inf is drawn only where all are -inf.
        axis: the axis of categories.
        shape: of the result, whose last axes broadcast with the other axes of logits; None is just
            these. Leading axes are independent draws.

    Example:
        >>> from funcattn import key
        >>> logits = torch.arange(1, 9).float().log()
        >>> categorical(key(0), logits, shape=(6,))
        tensor([1, 2, 5, 2, 4, 3])

    Law: frequencies follow softmax(logits)
        (test_randomness.py::test_categorical_follows_the_softmax_of_its_logits).
    """
    check_key("categorical", key)
    wide = _wide("categorical", "logits", logits.dtype)
    if not -logits.ndim <= axis < logits.ndim or logits.shape[axis] == 0:
        errors.fail(
            "categorical",
            "logits",
            f"categories along axis {axis}",
            errors.shape(logits),
            "Name the axis of categories.",
        )
    back = axis % logits.ndim - logits.ndim  # counted from the end, where shape and logits align
    others = (*logits.shape[:back], *logits.shape[logits.ndim + back + 1 :])
    shape = others if shape is None else sizes_of("categorical", "shape", shape)
    _check_covered("categorical", "logits less its axis of categories", others, shape)
    place = len(shape) + 1 + back
    noise = gumbel(key, (*shape[:place], logits.shape[axis], *shape[place:]), wide)
    return (noise + logits.to(wide)).argmax(back)


@door
def randint(
    key: Key, shape: Sizes, minval: int | Int[Tensor, "..."], maxval: int | Int[Tensor, "..."]
) -> Int64[Tensor, "*shape"]:
    """Draw integers from [minval, maxval): two words for each, reduced modulo the span.

    The words are those jax draws for its int32. As in jax, a span that is no power of two is
    biased: up to 2**16 by at most span / 2**64 of a probability, since 64 bits are reduced, and
    above by at most span / 2**32.

    Args:
        minval, maxval: ints or integer tensors that broadcast to shape, at most 2**32 apart. Where
            a tensor's range is empty, the result is minval.

    Example:
        >>> from funcattn import key
        >>> randint(key(0), (6,), 0, 10)
        tensor([9, 0, 2, 3, 1, 7])
    """
    check_key("randint", key)
    shape = sizes_of("randint", "shape", shape)
    for name, bound in (("minval", minval), ("maxval", maxval)):
        check_integer("randint", name, bound, ndim=None)
        _check_covered("randint", name, bound.shape if isinstance(bound, Tensor) else (), shape)
    span = maxval - minval
    if isinstance(span, Tensor):
        span = span.long().clamp(min=1)
    elif not 0 < span <= 2**32:
        errors.fail(
            "randint",
            "maxval - minval",
            "in [1, 2**32]",
            span,
            "The range is half open: maxval is never drawn.",
        )
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
        >>> from funcattn import key
        >>> permutation(key(0), 9)
        tensor([0, 1, 8, 5, 6, 4, 3, 2, 7])

    Law: every permutation is as likely (test_randomness.py::test_permutations_are_equally_likely).
    """
    check_key("permutation", key)
    if isinstance(x, Tensor) and not x.ndim:
        errors.fail(
            "permutation",
            "x",
            "an int or a tensor with an axis to shuffle",
            "a 0-d tensor",
            "Give a size as an int.",
        )
    if not isinstance(x, Tensor) and x < 0:
        errors.fail("permutation", "x", "a number of things, 0 or more", x, "Give a size.")
    n = len(x) if isinstance(x, Tensor) else x
    order = torch.arange(n, device=key.device)
    # with k rounds, two of n elements get equal words throughout with probability n^2 / 2^(32k +
    # 1): at most 1 / 2n
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
    """then(u), elementwise, of u uniform in [minval, maxval).

    `then` may write into u where minval and maxval are numbers.
    """
    _wide(function, "dtype", dtype)
    shape = sizes_of(function, "shape", shape)
    width, mantissa = FORMATS[dtype]

    def unit(high: Tensor, low: Tensor) -> Tensor:  # in [0, 1), exactly
        word = (high.long() << 32) | (low.long() & WORD) if width == 64 else high ^ low
        word >>= width - mantissa
        word &= (1 << mantissa) - 1
        return word.to(dtype).mul_(2.0**-mantissa)

    is_plain = not isinstance(minval, Tensor) and not isinstance(maxval, Tensor)
    if is_plain and (minval, maxval) == (0, 1):
        return drawn(function, key, shape, lambda high, low: then(unit(high, low)))
    check_key(function, key)
    lowest, highest = _beside(function, key, dtype, minval), _beside(function, key, dtype, maxval)
    span = (highest - lowest).clamp(min=0)
    _check_covered(function, "minval and maxval", span.shape, shape)
    if is_plain:
        return drawn(
            function, key, shape, lambda high, low: then(unit(high, low).mul_(span).add_(lowest))
        )
    return then(drawn(function, key, shape, unit) * span + lowest)


def _wide(function: str, argument: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to draw in: float32 for half precision."""
    if dtype not in FORMATS:
        errors.fail(
            function,
            argument,
            "float64, float32, float16 or bfloat16",
            dtype,
            "Draw one of these and cast it.",
            TypeError,
        )
    return dtype if dtype == torch.float64 else torch.float32


def _beside(function: str, key: Key, dtype: torch.dtype, number: float | Tensor) -> Tensor:
    """A number as a tensor on the device of the key, created there rather than copied."""
    check_key(function, key)
    return (
        number.to(dtype)
        if isinstance(number, Tensor)
        else torch.full((), number, dtype=dtype, device=key.device)
    )


def _check_covered(function: str, argument: str, smaller: Sizes, shape: Sizes) -> None:
    """Check that a shape broadcasts to the shape of the draw without enlarging it."""
    fits = all(a in (1, b) for a, b in zip(reversed(smaller), reversed(shape), strict=False))
    if len(smaller) > len(shape) or not fits:
        errors.fail(
            function,
            argument,
            f"of a shape that broadcasts to {tuple(shape)}",
            tuple(smaller),
            "Give the shape of the result.",
        )
