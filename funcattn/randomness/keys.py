"""Keys: from a seed, split, folded with data; and the random words that are drawn from them."""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from ..core import errors
from ..core.doors import door
from . import threefry
from .threefry import encipher

WORD = 0xFFFFFFFF  # the low 32 bits

Key: TypeAlias = Int64[Tensor, "2"]
Sizes: TypeAlias = Sequence[int]


@door
def key(seed: int | Int[Tensor, ""]) -> Key:
    """Make a key from a seed: its high and its low 32 bits, on torch's default device.

    Args:
        seed: an int of at most 64 bits, or a 0-d integer tensor (whose device the key then
            follows).

    Returns:
        int64 (2,), each word in [0, 2**32).

    Example:
        >>> key(42)
        tensor([ 0, 42])
        >>> torch.vmap(key)(torch.arange(3)).tolist()
        [[0, 0], [0, 1], [0, 2]]
    """
    check_integer("key", "seed", seed)
    if isinstance(seed, Tensor):
        return torch.stack([(seed.long() >> 32) & WORD, seed.long() & WORD])
    if not -(2**63) <= seed < 2**63:
        errors.fail(
            "key",
            "seed",
            "an int of at most 64 bits",
            seed,
            "Hash it first, or fold_in the rest of it.",
        )
    return torch.tensor([(seed >> 32) & WORD, seed & WORD], dtype=torch.int64)


@door
def split(key: Key, n: int | Sizes = 2) -> Int64[Tensor, "*n 2"]:
    """Make n new keys, or an array of them, from one that is not to be used again.

    Args:
        key: int64 (2,).
        n: how many, or the leading sizes of the array.

    Returns:
        int64 (*n, 2). They unpack: `first, second = split(key)`.

    Example:
        >>> split(key(0), 3).shape, split(key(0), (2, 3)).shape
        (torch.Size([3, 2]), torch.Size([2, 3, 2]))

    Law: split(key, n)[i] == fold_in(key, i)
        (test_randomness.py::test_split_is_fold_in_of_the_index).
    """
    if isinstance(n, str) or (isinstance(n, int) and n < 0):
        errors.fail(
            "split",
            "n",
            "a number of keys, 0 or more, or a tuple of them",
            repr(n),
            "Two keys are split(key).",
        )
    sizes = sizes_of("split", "n", (n,) if isinstance(n, int) else n)
    return _join(
        *(
            drawn("split", key, sizes, word)
            for word in (lambda high, low: high, lambda high, low: low)
        )
    )


@door
def fold_in(key: Key, data: int | Int[Tensor, ""]) -> Key:
    """Make a new key from a key and a number, such as a step, the index of a layer, or a rank.

    Args:
        key: int64 (2,).
        data: an int in [0, 2**32), or a 0-d integer tensor, of which the low 32 bits count.

    Example:
        >>> fold_in(key(0), 7)
        tensor([2716826189,  292468403])

    Law: distinct data give distinct keys
        (test_randomness.py::test_fold_in_of_distinct_data_gives_distinct_keys).
    """
    check_key("fold_in", key)
    check_integer("fold_in", "data", data)
    if not isinstance(data, Tensor):
        if not 0 <= data <= WORD:
            errors.fail(
                "fold_in",
                "data",
                "in [0, 2**32)",
                data,
                "Fold in its high and its low word one after the other.",
            )
        data = torch.full((), data, dtype=torch.int64, device=key.device)
    return _join(*encipher(key, data.to(device=key.device, dtype=torch.int32)))


@door
def bits(key: Key, shape: Sizes = ()) -> Int64[Tensor, "*shape"]:
    """Draw 32 random bits an element, as int64 in [0, 2**32).

    Example:
        >>> bits(key(0), (2,))
        tensor([4070199207, 4202968722])
    """
    return drawn(
        "bits", key, sizes_of("bits", "shape", shape), lambda high, low: (high ^ low).long() & WORD
    )


def drawn(
    function: str, key: Key, shape: tuple[int, ...], made: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """made(*words), elementwise, of two random int32 words for each element of the shape.

    The words are the counters 0, 1, 2, ... encrypted with the key.
    """
    check_key(function, key)
    if math.prod(shape) >= 2**31:
        errors.fail(
            function,
            "shape",
            "fewer than 2**31 elements",
            shape,
            "Split the key and draw in parts.",
        )
    return threefry.drawn(key, shape, made)


def _join(high: Tensor, low: Tensor) -> Int64[Tensor, "*n 2"]:
    return torch.stack([high, low], -1).long() & WORD


def sizes_of(function: str, argument: str, shape: Sizes) -> tuple[int, ...]:
    """The shape as a tuple of ints; raises where it is not a shape."""
    if not isinstance(shape, Sequence) or any(
        not isinstance(size, int | torch.SymInt) or size < 0 for size in shape
    ):
        errors.fail(
            function,
            argument,
            "a tuple of sizes",
            repr(shape),
            "One axis of n is (n,); a tree is mapped by fa.tree.map.",
        )
    return tuple(shape)


def check_key(function: str, key: Key) -> None:
    """Fail where a value is not one key, int64 (2,)."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        errors.fail(
            function,
            "key",
            "one key, int64 (2,)",
            kind_of(key),
            "Make one with key(seed), and use many by vmap.",
            TypeError,
        )
    if key.shape != (2,):
        errors.fail(
            function,
            "key",
            "one key, int64 (2,)",
            errors.shape(key),
            f"Use many by vmap: torch.vmap({function})(keys).",
        )


def check_integer(function: str, argument: str, number: object, ndim: int | None = 0) -> None:
    """Fail where a number is not an integer, or a tensor has other dimensions."""
    if isinstance(number, Tensor):
        fits = ndim in (None, number.ndim) and not (
            number.is_floating_point() or number.is_complex()
        )
    else:
        fits = isinstance(number, int)
    if not fits:
        wanted = "an int or an integer tensor" if ndim is None else "an int or a 0-d integer tensor"
        errors.fail(
            function,
            argument,
            wanted,
            kind_of(number),
            "Round it, and use many by vmap.",
            TypeError,
        )


def kind_of(value: object) -> str:
    """A description of a value for error messages: dtype and shape of a tensor."""
    return (
        f"{str(value.dtype).removeprefix('torch.')} {errors.shape(value)}"
        if isinstance(value, Tensor)
        else repr(value)
    )
