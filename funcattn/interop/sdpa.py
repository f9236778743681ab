"""Attention in the signatures of torch: F.scaled_dot_product_attention and nn.MultiheadAttention's.

F.multi_head_attention_forward, in nn.MultiheadAttention and nn.Transformer*, is itself overridable:
a TorchFunctionMode sees that call, and is disabled inside it. So the mode runs a copy of that
function whose globals hold `fa.attention`.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks
from ..core import errors
from ..kernels import attention
from ..masks import Mask
from .jagged import nested_attention


def attend(
    draw: Callable[[float], Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | Mask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`fa.attention` in the signature of F.scaled_dot_product_attention, after what draws a key."""
    drawn = draw(dropout_p)
    if query.is_nested or key.is_nested or value.is_nested:
        if attn_mask is not None:
            remedy = "Documents see themselves alone; is_causal is there."
            errors.fail(
                "scaled_dot_product_attention",
                "attn_mask",
                "None for nested tensors",
                "a mask",
                remedy,
            )
        return nested_attention(
            query, key, value, causal=is_causal, scale=scale, dropout=dropout_p, key=drawn
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            errors.fail(
                "scaled_dot_product_attention",
                name,
                "(*lead, L, E)",
                errors.shape(x),
                f"Try {name}.unsqueeze(0).",
            )
    mask, bias = _visible(attn_mask, is_causal, query, key)
    heads = [x.shape[-3:-2] for x in (query, key, value)]
    if all(heads) and (enable_gqa or heads[0] == heads[1] == heads[2]):
        if heads[1] != heads[2]:  # torch allows groups of different sizes for key and value
            key, value = (
                x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value)
            )
        return attention(
            query, key, value, mask, scale=scale, bias=bias, dropout=dropout_p, key=drawn
        )
    # Any leading axis may be missing or of size one, heads too: with one more axis all
    # broadcast.
    query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
    mask, bias = (
        x.unsqueeze(-3) if isinstance(x, Tensor) and x.dim() > 2 else x for x in (mask, bias)
    )
    return attention(
        query, key, value, mask, scale=scale, bias=bias, dropout=dropout_p, key=drawn
    ).squeeze(-3)


def multi_head(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """F.multi_head_attention_forward with another attention function."""
    return rebound(
        F.multi_head_attention_forward,
        scaled_dot_product_attention=attend,
        _check_key_padding_mask=_check_key_padding_mask,
        softmax=_softmax,  # of the weights, if they are requested
        # a default device is a mode too, and would get torch's function
        has_torch_function=never,
    )


def _visible(
    attn_mask: Tensor | Mask | None, is_causal: bool, query: Tensor, key: Tensor
) -> tuple[Any, Tensor | None]:
    """attn_mask and is_causal of torch as a mask and a bias."""
    diagonal = "upper" if is_causal else ""
    if isinstance(attn_mask, Tensor) and type(attn_mask) not in (Tensor, torch.nn.Parameter):
        # imported here since it takes a second: it imports torch.compile
        from torch.nn.attention.bias import CausalBias, CausalVariant

        if isinstance(attn_mask, CausalBias):
            if is_causal:
                errors.fail(
                    "scaled_dot_product_attention",
                    "is_causal",
                    "False with a CausalBias",
                    True,
                    "The bias says it already.",
                )
            diagonal = "lower" if attn_mask.variant == CausalVariant.LOWER_RIGHT else "upper"
            wanted, T, S = (
                (attn_mask.seq_len_q, attn_mask.seq_len_kv),
                query.shape[-2],
                key.shape[-2],
            )
            if diagonal == "lower" and wanted != (T, S):
                errors.fail(
                    "scaled_dot_product_attention",
                    "attn_mask",
                    f"causal_lower_right({T}, {S})",
                    wanted,
                    "Build it anew.",
                )
            attn_mask = None
    mask, bias = attn_mask, None
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        mask, bias = None, attn_mask
    if diagonal:
        here = torch.zeros((), dtype=torch.int64, device=query.device)
        causal = masks.causal(query.shape[-2], key.shape[-2], align=diagonal, offset=here)
        # torch's CPU path takes both; a pair is hidden if either hides it
        if isinstance(mask, Tensor):
            mask = mask & causal.dense(key.shape[-2])
        else:
            mask = causal if mask is None else mask & causal
    return mask, bias


def rebound(function: Callable[..., Any], **others: object) -> Callable[..., Any]:
    """A copy of a torch function with some globals replaced.

    Its globals have no `__name__`, by which Dynamo would look names up in torch's module.
    """
    known = {
        name: value for name, value in function.__globals__.items() if name != "__name__"
    } | others
    copy = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def never(*_: object) -> bool:
    """In place of has_torch_function, since the mode has intercepted the call already."""
    return False


def _check_key_padding_mask(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """Torch's check, in a form that Dynamo can trace."""
    if key_padding_mask.shape != (bsz, src_len):
        raise AssertionError(
            f"key_padding_mask should be {(bsz, src_len)}, got {tuple(key_padding_mask.shape)}"
        )


def _softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax with zeros and zero derivatives for a row of -inf, where torch's gives NaN."""
    empty = torch.eq(x, float("-inf")).all(dim, keepdim=True)
    return torch.where(empty, 0, torch.where(empty, 0, x).softmax(dim))
