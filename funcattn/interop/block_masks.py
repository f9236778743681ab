"""torch's block masks: as functions of scalar indices, and as intervals of keys.

A BlockMask lists the blocks in which a function of (b, h, i, j) decides, and those that are visible
as a whole; keys of other blocks are hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from ..core import errors
from ..masks import Mask
from .captured import Captured

MAX_INTERVALS = 8  # for each query; more are slower than a mask in the score
WHOLE = 1 << 30  # the block size of torch's mask that hides nothing

Scalars = Callable[..., Tensor]  # of b, h, i, j, and for a score_mod of a logit before them


def mapped(f: Scalars, indices: Sequence[Tensor], s: Tensor | None = None) -> Tensor:
    """f(s, b, h, i, j) of scalars, for all of them: (B, H, rows, columns)."""
    for axis in (3, 2, 1, 0):
        of_index = [0 if axis == n else None for n in range(4)]
        f = vmap(f, in_dims=tuple(of_index if s is None else [0, *of_index]))
    flat = [x.reshape(-1) for x in indices]
    if not all(x.numel() for x in flat):  # an empty block, which vmap refuses
        size = [x.numel() for x in flat]
        return torch.ones(size, dtype=torch.bool, device=flat[0].device) if s is None else s
    with _Indexing():
        return f(*flat) if s is None else f(s, *flat)


class _Indexing(TorchFunctionMode):
    """table[h, i - j] of mapped scalars as one operation; torch would read their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(x, Tensor) for x in indices):
                return torch.ops.aten.index.Tensor(args[0], list(indices))
        return func(*args, **(kwargs or {}))


def sizes_of(block_mask: Any) -> tuple[int, int]:
    """Queries and keys of a block; at most those that there are."""
    rows, columns = (
        max(1, min(n, length))
        for n, length in zip(block_mask.BLOCK_SIZE, block_mask.seq_lengths, strict=True)
    )
    return rows, columns


def listed(block_mask: Any) -> tuple[Tensor, Tensor]:
    """Booleans (B or 1, H or 1, query blocks, key blocks): visible in part, and as a whole."""
    columns = -(-block_mask.seq_lengths[1] // sizes_of(block_mask)[1])

    def dense(count: Tensor, indices: Tensor) -> Tensor:
        listed = torch.arange(indices.shape[-1], device=count.device) < count.unsqueeze(-1)
        places = torch.where(listed, indices, columns).long()
        empty = torch.zeros(*count.shape, columns + 1, dtype=torch.bool, device=count.device)
        return empty.scatter(-1, places, True)[..., :columns]

    part = dense(block_mask.kv_num_blocks, block_mask.kv_indices)
    if block_mask.full_kv_num_blocks is None:
        return part, torch.zeros_like(part)
    return part, dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)


def seen_in(
    blocks: Sequence[Tensor], size: Sequence[int], at: Sequence[Tensor], chosen: Tensor
) -> Tensor:
    """Whether the query sees the key, where mask_mod has chosen; shaped as the indices at."""
    b, h, i, j = at
    part, full = (
        x[
            b if x.shape[0] > 1 else torch.zeros_like(b),
            h if x.shape[1] > 1 else torch.zeros_like(h),
            i // size[0],
            j // size[1],
        ]
        for x in blocks
    )
    return full | (part & chosen)


def intervals(block_mask: Any, B: int, H: int, T: int, S: int) -> Mask | None:
    """The block mask as intervals of keys; None where they are unknown, differ by head, or many."""
    captured = Captured(block_mask.mask_mod, "flex_attention")
    known = [errors.value(x) for x in captured.tensors]
    read = [x for x in known if x is not None]
    parts = (block_mask.kv_num_blocks, block_mask.kv_indices)
    if not T or not S or len(read) < len(known) or any(errors.value(x) is None for x in parts):
        return None
    part, full = listed(block_mask)
    if part.shape[1] > 1:
        return None
    (rows, columns), every = sizes_of(block_mask), []
    with torch.no_grad(), captured.placed(read) as mask_mod:
        for n in range(part.shape[2]):
            i = torch.arange(n * rows, min(n * rows + rows, T), device=part.device)
            blocks = [x[:, 0, n].repeat_interleave(columns, -1)[:, None, :S] for x in (part, full)]
            seen = _rows(mask_mod, B, H, i, *blocks)
            if seen is None:
                return None
            every.append(seen)
    runs = [_runs(seen) for seen in every]
    n = max(1, *(start.shape[-1] for start, _ in runs))
    if n > MAX_INTERVALS:
        return None
    lead = max(len(seen) for seen in every)
    pad = lambda x: F.pad(x, (0, n - x.shape[-1])).expand(lead, -1, -1)
    start, stop = (torch.cat([pad(x) for x in ends], 1) for ends in zip(*runs, strict=True))
    return Mask(start, stop) if lead > 1 else Mask(start[0], stop[0])


def _rows(
    mask_mod: Scalars, B: int, H: int, i: Tensor, part: Tensor, full: Tensor
) -> Tensor | None:
    """Booleans (B or 1, rows, S): the keys that queries i see; None if heads see different ones.

    part, full: (B or 1, 1, S), whether the block of the key is visible in part, and as a whole.
    """
    seen = full.expand(-1, len(i), -1)
    j = part.any(0)[0].nonzero()[:, 0]  # other keys need not be asked
    if not len(j):
        return seen
    b = torch.arange(B, device=i.device).reshape(B, 1, 1, 1)
    h = torch.arange(H, device=i.device).reshape(H, 1, 1)
    chosen = mapped(mask_mod, (b, h, i.unsqueeze(-1), j))
    if not _alike(chosen, 1):
        return None
    chosen = chosen[:, 0] & part[..., j]
    chosen = chosen[:1] if _alike(chosen, 0) else chosen
    seen = seen.expand(max(len(seen), len(chosen)), -1, -1).clone()
    seen[..., j] |= chosen
    return seen


def _alike(x: Tensor, axis: int) -> bool:
    """True where all entries along an axis are equal."""
    return x.stride(axis) == 0 or bool((x == x.narrow(axis, 0, 1)).all())


def _runs(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and stops (B, rows, n) of the runs of True along the last axis, padded with zeros."""
    edge = torch.zeros_like(seen[..., :1])
    change = torch.cat([edge, seen], -1) != torch.cat([seen, edge], -1)  # (B, rows, S + 1)
    number = change.cumsum(-1) - 1
    count = int(change.sum(-1).max())
    at = torch.arange(change.shape[-1], device=seen.device).expand(change.shape)
    out = torch.zeros(*seen.shape[:-1], count + 1, dtype=torch.int64, device=seen.device)
    out = out.scatter(-1, torch.where(change, number, count), at)[..., :count]
    return out[..., ::2], out[..., 1::2]
