"""When a call is a plain step, which has a faster way than the model itself."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack

from .. import collectives, taps, transformer
from ..caches import Branch, Cache
from ..core.autograd import is_recorded, transforming
from ..kernels import dispatch

MAX_STEP_TOKENS = 16  # of a step that is compiled; beyond, the cost are matrix products, by the library's routine


def is_undisturbed() -> bool:
    """True where nothing is to see what is computed, or to change how.

    Outside torch.func, torch.compile, taps, dispatch modes and autocast, where no kernel is forced,
    and no mesh is simulated or has a "data" axis.
    """
    if transforming() or torch.compiler.is_compiling() or taps.heard() or dispatch.current() is not None:
        return False
    if _len_torch_dispatch_stack():  # a mode that counts operations or has its own, and takes no compiled code
        return False
    if collectives.simulated() or collectives.axis_size(transformer.DATA) > 1:
        return False
    return not _is_any_autocast_enabled()


def is_plain(*trees: Any) -> bool:
    """True where, besides, no derivative of these can be taken."""
    return is_undisturbed() and not is_recorded(*trees)


def is_step(tokens: Any, cache: Any) -> bool:
    """True for a few tokens behind a dense past, with numbers to compute (not on "meta")."""
    return (
        isinstance(tokens, Tensor)
        and tokens.dim() == 1
        and 0 < len(tokens) <= MAX_STEP_TOKENS
        and not tokens.is_meta
        and is_dense(cache)
    )


def is_dense(cache: Any) -> bool:
    """True for a Cache, and for Branches of such."""
    return type(cache) is Cache or (type(cache) is Branch and is_dense(cache.prefix) and is_dense(cache.tail))
