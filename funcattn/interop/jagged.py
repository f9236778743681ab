"""Attention over packed documents of different lengths, as jagged NestedTensors, without padding.

A jagged tensor (B, H, j, D) is its values (H, N, D), N tokens in all, and the offsets of documents.
A token sees the tokens of its document: one interval of keys. So it is `fa.attention` of the values
under a Mask, and since kernels skip blocks without visible pairs, the cost is that of attention
within each document, not N squared.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..kernels import attention
from ..masks import Mask


def nested_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    dropout: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """Attention within each document of a jagged batch.

    Args:
        q: (B, H, j, D) NestedTensor of layout torch.jagged, j the ragged axis; `x.transpose(1, 2)`
            of a (B, j, H, D) one.
        k: (B, K, i, D), with H % K == 0; i may have other lengths than j (cross-attention).
        v: (B, K, i, Dv).
        causal: a query sees the keys up to its position in the document.
        scale, dropout, key: as in `fa.attention`.

    Returns:
        (B, H, j, Dv), ragged as q, so that the two may be added. It is differentiable once by
        autograd; no transform of torch.func takes a NestedTensor, and autograd does not
        differentiate one twice. For those, use the values, which are plain tensors:
        `fa.attention(q.values(), k.values(), v.values(), document_mask(q, k))`.

    Raises:
        TypeError: an argument is not a jagged tensor. ValueError: sizes that do not fit.

    Example:
        >>> lengths = torch.tensor([0, 2, 5])
        >>> x = torch.nested.nested_tensor_from_jagged(torch.ones(5, 1, 4), lengths).transpose(1, 2)
        >>> nested_attention(x, x, x, causal=True).values().shape
        torch.Size([1, 5, 4])

    Law: equals attention of each document by itself
        (test_interop_jagged.py::test_jagged_attention_is_attention_of_each_document).
    """
    packed = [_unpack("nested_attention", name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    queries, keys, values = packed
    if not len(queries.offsets) == len(keys.offsets) == len(values.offsets):
        got = [len(x.offsets) - 1 for x in packed]
        errors.fail(
            "nested_attention", "q, k, v", "of as many documents each", got, "Pass the same batch."
        )
    if keys.offsets is not values.offsets and errors.is_true(keys.offsets != values.offsets):
        errors.fail(
            "nested_attention", "v", "as ragged as k", "other lengths", "Give every key a value."
        )
    mask = document_mask(q, k, causal=causal)
    out = attention(
        queries.values, keys.values, values.values, mask, scale=scale, dropout=dropout, key=key
    )
    return torch.nested.nested_tensor_from_jagged(
        out, queries.offsets, queries.lengths, jagged_dim=2
    )


def document_mask(q: Tensor, k: Tensor, *, causal: bool = False) -> Mask:
    """The mask (N, 1) by which packed queries see the keys of their document; q and k are jagged.

    Example:
        >>> x = torch.nested.nested_tensor_from_jagged(torch.ones(3, 1, 4), torch.tensor([0, 1,
        ...     3])).transpose(1, 2)
        >>> document_mask(x, x, causal=True).dense(3).int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    queries, keys = _unpack("document_mask", "q", q), _unpack("document_mask", "k", k)
    begin = queries.offsets.long()
    place = torch.arange(queries.values.shape[1], device=begin.device)
    document = (torch.searchsorted(begin, place, right=True) - 1).clamp(max=len(begin) - 2)
    place = place - begin[document]
    ends = keys.offsets[1:] if keys.lengths is None else keys.offsets[:-1] + keys.lengths
    start, stop = keys.offsets.long()[document], ends.long()[document]
    if causal:
        stop = torch.minimum(stop, start + place + 1)
    return Mask(start.unsqueeze(-1), stop.unsqueeze(-1))


class Packed(NamedTuple):
    """The tensors of a jagged tensor (B, H, j, D)."""

    values: Tensor  # (H, N, D)
    offsets: Tensor  # (B + 1,) starts of documents
    lengths: Tensor | None  # (B,) lengths, if there are gaps between documents


def _unpack(function: str, name: str, x: Any) -> Packed:
    if not (x.is_nested and x.layout == torch.jagged):
        got = (
            f"a nested tensor of layout {x.layout}"
            if x.is_nested
            else f"a dense tensor {errors.shape(x)}"
        )
        remedy = (
            "Build it with layout=torch.jagged; under torch.func, call attention of its values "
            "with interop.document_mask."
        )
        errors.fail(function, name, "a jagged NestedTensor", got, remedy, TypeError)
    if x.dim() != 4 or x._ragged_idx != 2:
        got, remedy = (
            f"{x.dim()} axes, ragged at {x._ragged_idx}",
            "Bring the heads before the tokens: transpose(1, 2).",
        )
        errors.fail(function, name, "(B, H, j, D) with j ragged", got, remedy)
    return Packed(x.values(), x.offsets(), x.lengths())
