"""When a call is a plain step, which has a faster way than the model itself."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack

from .. import collectives, taps, transformer
from .._autodiff import is_recorded, transforming
from ..caches import Branch, Cache
from ..kernels import choice

FEW = 16  # new tokens, at most, of a step that is compiled; beyond, matrix products are the cost, and they are the library's


def is_undisturbed() -> bool:
    """Nobody maps, traces or listens, and no kernel or other precision was asked for."""
    if transforming() or torch.compiler.is_compiling() or taps.heard() or choice.current() is not None:
        return False
    if _len_torch_dispatch_stack():  # a mode that counts operations or has its own, and takes no compiled code
        return False
    if collectives.simulated() or collectives.axis_size(transformer.DATA) > 1:
        return False
    return not _is_any_autocast_enabled()


def is_plain(*trees: Any) -> bool:
    """Nor does anybody differentiate these."""
    return is_undisturbed() and not is_recorded(*trees)


def is_step(tokens: Any, cache: Any) -> bool:
    """A few tokens behind a dense past, which are somewhere."""
    return isinstance(tokens, Tensor) and tokens.dim() == 1 and 0 < len(tokens) <= FEW and not tokens.is_meta and is_dense(cache)


def is_dense(cache: Any) -> bool:
    """True for a Cache, and for Branches of such."""
    return type(cache) is Cache or (type(cache) is Branch and is_dense(cache.prefix) and is_dense(cache.tail))
