"""torch's flex_attention by the kernels of this library, which compose.

    s_ij = score_mod(scale q_i . k_j, b, h, i, j)       over the keys that block_mask lets i see

Both functions take scalars, over which they are mapped. A block mask becomes intervals of keys for
each query, as far as its values are known and no head differs: then a call without a score_mod is
`fa.attend`, and one with it computes no hidden blocks. Otherwise the mask is part of the score.
What the functions read from outside, such as slopes and tables, gets its derivatives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import errors
from ..kernels import attend, attention_with_score
from ..masks import Mask
from .block_masks import WHOLE, Scalars, intervals, listed, mapped, seen_in, sizes_of
from .captured import Captured

DOOR = "flex_attention"


def flex(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch.nn.attention.flex_attention.flex_attention(*args, **kwargs), closed."""
    return _flex(*args, **kwargs)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Scalars | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: object = None,
    *,
    return_aux: Any = None,
) -> Any:
    """kernel_options are of torch's kernels, and have no effect."""
    _check(query, key, value, block_mask, enable_gqa)
    if return_aux is not None and (return_lse or return_aux.max_scores):
        wanted = "AuxRequest(lse=True)"
        errors.fail(DOOR, "return_aux", wanted, return_aux, "Compute other statistics from lse.")
    if block_mask is not None and _hides_nothing(block_mask):
        block_mask = None
    B, H, T, S = *torch.broadcast_shapes(query.shape[:1], key.shape[:1]), *_sizes(query, key)
    mask = None if block_mask is None else intervals(block_mask, B, H, T, S)
    if score_mod is None and (mask is not None or block_mask is None):
        out, lse = attend(query, key, value, mask, scale=scale)
    else:
        hidden = None if mask is not None else block_mask
        out, lse = _scored(query, key, value, score_mod, hidden, mask, scale)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def _hides_nothing(block_mask: Any) -> bool:
    """True for the mask that torch itself puts where there is none."""
    name = getattr(block_mask.mask_mod, "__name__", "")
    return max(block_mask.BLOCK_SIZE) == WHOLE and name == "noop_mask"


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    return query.shape[1], query.shape[2], key.shape[2]


def _check(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, enable_gqa: bool) -> None:
    """Raise for what torch's flex_attention refuses, too."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested or x.dim() != 4:
            got = "a NestedTensor" if x.is_nested else errors.shape(x)
            remedy = "Use fa.interop.nested_attention." if x.is_nested else "Add axes of size one."
            errors.fail(DOOR, name, "(B, H, L, E)", got, remedy)
    H, T, S = _sizes(query, key)
    if not enable_gqa and key.shape[1] != H:
        remedy = "Pass enable_gqa=True for grouped heads."
        errors.fail(DOOR, "key", f"with {H} heads as query", errors.shape(key), remedy)
    if block_mask is None:
        return
    if getattr(block_mask.mask_mod, "__name__", "") == "_sliced_mask_mod_error":
        remedy = "Set its mask_mod, shifted by the offset of the slice."
        errors.fail(DOOR, "block_mask", "with a mask_mod", "a sliced one", remedy, RuntimeError)
    if not _hides_nothing(block_mask) and tuple(block_mask.seq_lengths) != (T, S):
        remedy = "Create it with these lengths."
        errors.fail(DOOR, "block_mask", f"for {(T, S)}", tuple(block_mask.seq_lengths), remedy)


def _scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Scalars | None,
    block_mask: Any,
    mask: Mask | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """out and lse of logits after score_mod; a block_mask hides keys beside those of the mask."""
    mask_mod = None if block_mask is None else block_mask.mask_mod
    captured = Captured((score_mod, mask_mod), DOOR)
    blocks = () if block_mask is None else listed(block_mask)
    size = () if block_mask is None else sizes_of(block_mask)

    count = len(captured.tensors)

    def score(s: Tensor, *rest: Tensor) -> Tensor:
        at, read, blocks = rest[:4], rest[4 : 4 + count], rest[4 + count :]
        with captured.placed(read) as (score_mod, mask_mod):
            out = s if score_mod is None else mapped(score_mod, at, s)
            if blocks:
                seen = seen_in(blocks, size, at, mapped(mask_mod, at))
                out = torch.where(seen, out, -torch.inf)
        return out.to(s.dtype)

    read = (*captured.tensors, *blocks)
    return attention_with_score(q, k, v, score, mask, scale=scale, parameters=read)
