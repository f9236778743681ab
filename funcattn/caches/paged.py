"""`Pages`: a cache in blocks of equal size; a commit copies only the blocks that it writes.

All other blocks are shared with the older cache: a fork is free, a step copies one block however
long the text, and forks that continue share their common blocks. A block that was never written is
one zero, expanded: reserved blocks take no memory until they are written.

Source: Kwon et al., Efficient memory management for large language model serving with
PagedAttention, arXiv:2309.06180.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import is_recorded
from ..core.doors import made
from ..kernels import Part
from ..records import record
from . import display, rows
from .branch import Branch, fork, rows_of
from .making import features_of
from .protocol import (
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
    write,
)


@record
class Pages(NamedTuple):
    """A cache in n blocks of R rows: blocks of k are (L, K, R, D), of v (L, K, R, Dv).

    The first `length` rows of the concatenated blocks are valid.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
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
    ) -> "Pages":
        """Room for `size` tokens, rounded up to blocks of 64; `pages` sets another block size."""
        return pages().empty(layers, heads, size, head_size, dtype, value_size)


@made
@dataclass(frozen=True)
class pages:  # a value that is called like a function: model.cache(size, kind=pages(block=16))
    """A kind for `model.cache`: `Pages` in blocks of `block` tokens.

    Forks share more of small blocks; large blocks are fewer to read.

    Example:
        >>> import funcattn as fa
        >>> cache = fa.decoder(fa.Config()).cache(100, kind=pages(block=16))
        >>> len(cache.k), cache.k[0].shape, capacity(cache)
        (7, torch.Size([2, 2, 16, 16]), 112)
    """

    block: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            errors.fail(
                "pages",
                "block",
                "a number of tokens, at least 1",
                self.block,
                "64 suits most models.",
            )

    def empty(
        self,
        layers: int,
        heads: int,
        size: int,
        head_size: int,
        dtype: torch.dtype | None = None,
        value_size: int | None = None,
    ) -> Pages:
        """Room for `size` tokens, rounded up to whole blocks, on torch's default device."""
        n = max(1, -(-size // self.block))
        zero = torch.zeros((), dtype=dtype)
        unwritten = lambda D: (zero.expand(layers, heads, self.block, D),) * n
        k, v = map(unwritten, features_of(head_size, value_size))
        return Pages(k, v, torch.zeros((), dtype=torch.int64))


@capacity.register
def _(cache: Pages) -> int:
    return len(cache.k) * _block(cache)


@sizes.register
def _(cache: Pages) -> tuple[int, int, int]:
    return cache.k[0].shape[0], cache.k[0].shape[1], cache.k[0].shape[3]


@past.register
def _(cache: Pages, layer: int, positions: Tensor, window: int | None = None) -> list[Part]:
    R = _block(cache)
    # Blocks with a valid row in some row of the batch, and the first that some new token sees.
    held = -(-rows.bounds(cache.length, capacity(cache))[1] // R)
    first = min(rows.first_seen(positions, window)[0] // R, held)
    parts = []
    for start, stop in rows.runs(cache.k[first:held]):
        begin, end = first + start, first + stop
        k, v = (_joined([x[layer] for x in side[begin:end]]) for side in (cache.k, cache.v))
        parts += rows.read(k, v, positions - begin * R, window, stop=cache.length - begin * R)
    return parts


@grow.register
def _(cache: Pages, more: int) -> Pages:
    R, length = _block(cache), errors.integer(cache.length)

    def grown(blocks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        n, unwritten = -(-more // R), blocks[0].new_zeros(()).expand(blocks[0].shape)
        if length is None:
            return blocks + (unwritten,) * n
        # Block `at` is written next, so it is copied; later blocks have no valid rows.
        at = length // R
        copied = tuple(x.clone() for x in blocks[at : at + 1])
        return blocks[:at] + copied + (unwritten,) * (len(blocks) - at - len(copied) + n)

    return Pages(grown(cache.k), grown(cache.v), cache.length)


@rows_of.register
def _(cache: Pages) -> Delta:
    whole = lambda blocks: tuple(torch.cat(blocks, -2).unbind(0))
    return Delta(whole(cache.k), whole(cache.v))


@fork.register
def _(cache: Pages, delta: Delta, size: int) -> Branch:
    """A tail of pages whose row 0 starts a block: the last block of the prefix is not copied."""
    L, K, _ = sizes(cache)
    room = lambda x: (
        (x.new_zeros(()).expand(L, K, _block(cache), x.shape[-1]),)
        * max(1, -(-size // _block(cache)))
    )
    own = Pages(
        room(delta.k[0]),
        room(delta.v[0]),
        torch.zeros((), dtype=torch.int64, device=delta.k[0].device),
    )
    return Branch(cache, own)


keeps_all.register(Pages, exactly(Pages))
reset.register(Pages, reset_counts)


@write.register
def _(cache: Pages, delta: Delta, n: int | Tensor, donate: bool) -> Pages:
    new = admit(cache, delta, n, (cache.k[0], cache.v[0]))
    R, T = _block(cache), new.k.shape[-2]
    k, v = list(cache.k), list(cache.v)
    for i in _touched(cache, new.count if new.known else T):
        for blocks, more in ((k, new.k), (v, new.v)):
            at = new.before - i * R
            own = donate and new.known and not is_recorded(more, blocks[i])
            # A stride above 0: an earlier write made this block (unwritten ones are expanded).
            if own and blocks[i].stride(-1):
                lo, hi = max(at, 0), min(at + new.count, R)
                blocks[i][..., lo:hi, :] = more[..., lo - at : hi - at, :]
            else:
                blocks[i] = rows.written(blocks[i], more, at, new.count)
    return Pages(tuple(k), tuple(v), new.after)


def _touched(cache: Pages, T: int) -> list[int]:
    """Indices of the blocks that T new tokens are written to; all if lengths are unknown."""
    R, n = _block(cache), len(cache.k)
    lengths = errors.peek(cache.length)
    if lengths is None:
        return list(range(n))
    return sorted(
        {
            i
            for at in set(lengths.flatten().tolist())
            for i in range(at // R, min(-(-(at + T) // R), n))
        }
    )


def _joined(blocks: list[Tensor]) -> Tensor:
    return torch.cat(blocks, -2) if len(blocks) > 1 else blocks[0]


def _block(cache: Pages) -> int:
    return cache.k[0].shape[-2]
