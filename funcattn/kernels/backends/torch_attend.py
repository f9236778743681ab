"""The value of attention over blocks of torch operations: a streaming softmax (see
`torch_blocks`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..closed.algebra import K, Q
from ..dtypes import accumulation_dtype
from .layout import broadcast, fold, group_sizes, in_parts, multiply, plan, unfold
from .masking import NOTHING, Seen, is_finite, weigh
from .torch_blocks import too_many, walk


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Streaming softmax: out (*lead, T, Dv) in the dtype of v, and lse (*lead, T, 1).

    Source: Milakov and Gimelshein, arXiv:1805.02867; Dao et al., FlashAttention, arXiv:2205.14135.
    """
    T, extra = q.shape[-2], [*mask, *([] if bias is None else [bias])]
    lse_lead = broadcast(q.shape[:-2], k.shape[:-2], *[x.shape[:-2] for x in extra])
    lead = broadcast(lse_lead, v.shape[:-2])

    def run(strict: bool) -> list[Tensor]:
        def part(_: Sequence[Sequence[int]], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            q, k, v, *extra = tensors
            return _attend(
                q,
                k,
                v,
                extra[: len(mask)],
                extra[len(mask)] if bias is not None else None,
                scale,
                strict,
            )

        return in_parts(
            part,
            [(*lead, T, v.shape[-1]), (*lse_lead, T, 1)],
            [q, k, v, *extra],
            [K, 2],
            [Q, K],
            too_many,
        )

    out, lse = run(False)
    return (out, lse) if not extra or is_finite([out]) else tuple(run(True))  # pyright: ignore[reportReturnType]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Sequence[Tensor],
    bias: Tensor | None,
    scale: float,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    T, S = q.shape[-2], k.shape[-2]
    lead = broadcast(
        q.shape[:-2],
        k.shape[:-2],
        v.shape[:-2],
        *[x.shape[:-2] for x in (*mask, *([] if bias is None else [bias]))],
    )
    others = [x.shape[:-2] for x in mask] + ([] if bias is None else [bias.shape[:-2]]) + [lead]
    layout = plan([q.shape[:-2]], [k.shape[:-2], v.shape[:-2]], others)
    wide = accumulation_dtype(q, bias)
    seen = Seen(mask, bias, layout, wide, strict)
    queries = fold(q, layout).to(wide) * (scale * seen.unit)
    keys, values = fold(k, layout).to(wide), fold(v, layout).to(wide)
    groups = broadcast(
        *[
            (1,) * len(layout.groups),
            queries.shape[:-2],
            keys.shape[:-2],
            *[group_sizes(s, layout) for s in others[:-1]],
        ]
    )
    out = values.new_zeros(*layout.sizes, T, v.shape[-1])
    lse = values.new_full((*groups, T, 1), NOTHING)
    for q_block, k_blocks in walk(seen, T, S, groups):
        row_max = lse[..., q_block, :]  # in units of the logits until the end of the row block
        normalizer = torch.zeros_like(row_max)
        accumulator = torch.zeros_like(out[..., q_block, :])
        for k_block, whole in k_blocks:
            s = seen.logits(
                multiply(queries[..., q_block, :], keys[..., k_block, :].mT, layout.batch),
                q_block,
                k_block,
                whole,
            )
            visible = s != NOTHING if strict else None
            p, rescale, row_max = seen.rescale(s, row_max)
            normalizer = normalizer.mul_(rescale).add_(p.sum(-1, keepdim=True))
            accumulator.mul_(rescale).add_(weigh(p, values[..., k_block, :], layout.batch, visible))
        out[..., q_block, :] = accumulator / torch.where(normalizer == 0, 1, normalizer)
        lse[..., q_block, :] = seen.log(row_max, normalizer)
    shape = (
        *broadcast(
            q.shape[:-2],
            k.shape[:-2],
            *[x.shape[:-2] for x in (*mask, *([] if bias is None else [bias]))],
        ),
        T,
        1,
    )
    return unfold(out, layout, (*lead, T, v.shape[-1])).to(v.dtype), unfold(lse, layout, shape)
