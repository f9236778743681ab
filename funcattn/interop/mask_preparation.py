"""The preparation of attention masks in transformers, under vmap.

To leave out a mask, or parts of it, transformers reads values of attention_mask and position_ids,
unless it traces a graph. A value mapped by vmap cannot be read: it is treated as traced.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core import errors


def is_tracing(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """transformers.utils.is_tracing(tensor=None): whether the values of a tensor are unknown."""
    return _is_unknown(*args, **kwargs) or original(*args, **kwargs)


def fast_all(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | bool:
    """transformers.masking_utils.fast_all(tensor): False, keeping the mask, where unknown."""
    return False if _is_unknown(*args, **kwargs) else original(*args, **kwargs)


def _is_unknown(tensor: object = None) -> bool:
    return isinstance(tensor, Tensor) and errors.value(tensor) is None
