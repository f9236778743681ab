"""When a call is a plain decode step, for which there is a faster path than the model itself."""

import torch
from torch import Tensor
from torch._C import (
    _functorch,  # pyright: ignore[reportAttributeAccessIssue]
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)

from .. import caches, collectives, taps, transformer, tree
from ..caches import Branch, Cache, QuantizedCache
from ..core.autograd import differentiated, is_recorded, mapped_rows, transforming
from ..kernels import dispatch
from ..models import Past

MAX_STEP_TOKENS = 16  # in a compiled step; longer ones are bound by the library's matrix products
MAX_OPERATOR_TOKENS = 64  # of a text in a step of the operator of layers, such as a tree of drafts


def is_undisturbed(*, mapped: bool = False) -> bool:
    """True outside torch.func, torch.compile, taps, dispatch modes and autocast.

    And where no kernel is forced, and no mesh is simulated or has a "data" axis.

    Args:
        mapped: True for within vmap, and no other transform of torch.func, instead of outside.
    """
    if (
        (not mapped_rows() if mapped else transforming())
        or torch.compiler.is_compiling()
        or taps.heard()
        or dispatch.current() is not None
    ):
        return False
    if _len_torch_dispatch_stack():  # a dispatch mode would not see operations of compiled code
        return False
    if collectives.simulated() or collectives.axis_size(transformer.DATA) > 1:
        return False
    return not _is_any_autocast_enabled()


def is_plain(*trees: object) -> bool:
    """`is_undisturbed`, and autograd records none of these tensors."""
    return is_undisturbed() and not is_recorded(*trees)


def is_plainly_mapped(*trees: object) -> bool:
    """`is_undisturbed` but for vmap, and none of these tensors is differentiated."""
    return is_undisturbed(mapped=True) and not any(
        isinstance(leaf, Tensor) and differentiated(leaf) for leaf in tree.leaves(trees)
    )


def is_mapped(x: Tensor) -> bool:
    """True for a tensor of a level of torch.func, such as one with a value for each row."""
    return _functorch.is_functorch_wrapped_tensor(x)


def is_step(tokens: Tensor, cache: Past) -> bool:
    """True for 1 to MAX_OPERATOR_TOKENS tokens (T,), not on "meta".

    And a dense cache, or one in codes that operators read.
    """
    return (
        isinstance(tokens, Tensor)
        and tokens.dim() == 1
        and 0 < len(tokens) <= MAX_OPERATOR_TOKENS
        and not tokens.is_meta
        and (is_dense(cache) or is_coded(cache))
    )


def is_dense(cache: Past) -> bool:
    """True for a Cache, and for a Branch of dense caches."""
    return type(cache) is Cache or (
        type(cache) is Branch and is_dense(cache.prefix) and is_dense(cache.tail)
    )


def is_coded(cache: Past) -> bool:
    """True for a QuantizedCache that operators read, and for a Branch of one and dense caches."""
    if type(cache) is Branch:
        return is_coded(cache.prefix) and is_dense(cache.tail)
    return type(cache) is QuantizedCache and not caches.why_not_coded(cache)
