"""`make`: an empty cache of any kind; values may be of another size than keys.

And what `empty` of several kinds needs.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ..core import errors
from .protocol import KVCache


def make(
    kind: Any,
    layers: int,
    heads: int,
    size: int,
    features: Sequence[int],
    dtype: torch.dtype | None = None,
) -> KVCache:
    """`kind.empty(...)`, with `value_size` only where values are of another size than keys.

    Args:
        kind: what has a function `empty(layers, heads, size, head_size, dtype)`; for values of
            another size with one argument more, `value_size`.
        layers, heads, size: of the cache, size in tokens.
        features: of a key and of a value. A model with latent attention has no values: they are a
            part of its keys.
        dtype: of the rows.

    Raises:
        TypeError: values are of another size, and the kind has no such argument.
    """
    head_size, value_size = features
    if head_size == value_size:
        return kind.empty(layers, heads, size, head_size, dtype)
    taken = inspect.signature(kind.empty).parameters.values()
    if not any(each.name == "value_size" or each.kind is each.VAR_KEYWORD for each in taken):
        wanted = f"a kind whose `empty` takes value_size, as values here have {value_size} features"
        got = getattr(kind, "__name__", f"a {type(kind).__name__}")
        remedy = "Give its `empty` that argument (docs/caches.md), or use fa.Cache."
        errors.fail("cache", "kind", wanted, got, remedy, TypeError)
    return kind.empty(layers, heads, size, head_size, dtype, value_size=value_size)


def features_of(head_size: int, value_size: int | None) -> tuple[int, int]:
    """The features of a key and of a value, from the arguments of `empty`."""
    return head_size, head_size if value_size is None else value_size
