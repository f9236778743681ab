"""The types of a cache and of what a step adds to it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..layers import Steps, join_steps
from ..records import record


class KVCache(Protocol):
    """What every kind of cache has; its operations are the functions of `funcattn.caches`."""

    @property
    def length(self) -> Tensor:
        """Number of tokens in the cache, int64 ()."""
        ...


Past: TypeAlias = KVCache | tuple[()]  # `()` is no cache
AnyKind = TypeVar("AnyKind", bound=KVCache)


@record
class Delta(NamedTuple):
    """What one step adds: keys (K, T, D) and values (K, T, Dv) of T tokens for each layer with
    attention, and the steps of each recurrent layer (`layers.recurrence`).
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    steps: tuple[Steps, ...] = ()

    @property
    def tokens(self) -> int:
        """T, the number of new tokens."""
        return self.k[0].shape[-2]


def joined(deltas: Sequence[Delta]) -> Delta:
    """One delta of the tokens of several, each read behind those before it."""
    keys, values, steps = (list(zip(*side, strict=True)) for side in zip(*deltas, strict=True))
    cat = lambda parts: torch.cat(parts, -2)
    made = (join_steps(first, more) for first, *more in steps)
    return Delta(tuple(map(cat, keys)), tuple(map(cat, values)), tuple(made))
