"""`Memory`: keys and values of another sequence, read only: cross-attention or a learned prefix."""

from typing import NamedTuple, NoReturn

from torch import Tensor

from ..core import errors
from ..kernels import Part
from ..records import record
from . import display, rows
from .branch import Branch, fork
from .protocol import Delta, capacity, grow, keeps_all, past, sizes, write


@record
class Memory(NamedTuple):
    """A read-only cache: k (L, K, S, D), v (L, K, S, Dv); the first `length` rows are valid.

    Every new token sees all of it, whatever the window of the layer. `Branch(memory, tail)`
    continues it with a text: a learned prefix, or a document that many texts have in common. The
    positions of that text begin at `length`.

    Example:
        >>> import torch
        >>> import funcattn as fa
        >>> memory = Memory(*torch.zeros(2, 2, 2, 5, 16), torch.tensor(5))
        >>> [part.k.shape for part in fa.caches.past(memory, 0, torch.arange(3))]
        [torch.Size([2, 5, 16])]
    """

    k: Tensor
    v: Tensor
    length: Tensor  # int64 ()
    __str__, _repr_html_ = display.line, display.bar


@capacity.register
def _(cache: Memory) -> int:
    return cache.k.shape[-2]


@sizes.register
def _(cache: Memory) -> tuple[int, int, int]:
    return cache.k.shape[0], cache.k.shape[1], cache.k.shape[3]


@past.register
def _(cache: Memory, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    return rows.read(cache.k[layer], cache.v[layer], positions, None, stop=cache.length)


@grow.register
def _(cache: Memory, more: int) -> NoReturn:
    _refuse("grow")


@display.tokens.register
def _(cache: Memory) -> str:
    return f"{int(cache.length)} tokens"


@fork.register
def _(cache: Memory, delta: Delta, size: int) -> Branch:
    return Branch(cache, fork((), delta, size))


@keeps_all.register
def _(cache: Memory) -> bool:
    return True


@write.register
def _(cache: Memory, delta: Delta, n: int | Tensor, donate: bool) -> NoReturn:
    _refuse("commit")


def _refuse(verb: str) -> NoReturn:
    remedy = "Write behind it: Branch(memory, model.cache(size))."
    errors.fail(
        verb,
        "cache",
        "a past that can be written",
        "a Memory, which is read only",
        remedy,
        TypeError,
    )
