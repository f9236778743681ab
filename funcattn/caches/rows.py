"""Reading the rows of keys and values that new tokens see, and writing new ones, for every kind.

Where lengths are concrete, rows are sliced. Where they are not (lengths that differ under vmap,
torch.compile), rows are masked when read and gathered when written: row r takes new row r - at,
so no two new rows are written to the same index. Tensors without another user are written in place
under vmap too (`overwritten`).
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from ..core import errors
from ..core.autograd import differentiated, has_tangent, mapped_rows
from ..kernels import Part
from ..masks import Mask

SHORTEST = 128  # rows of the smallest bucket


def bucket(rows: int) -> int:
    """The smallest power of two, 128 or more, that is at least `rows`.

    Code compiled for a bucket serves all lengths in it. Caches that a generation loop allocates
    have a bucket's number of rows.

    Example:
        >>> [bucket(n) for n in (0, 100, 128, 129)]
        [128, 128, 128, 256]
    """
    return max(SHORTEST, 1 << max(rows - 1, 0).bit_length())


def read(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    window: int | None,
    *,
    start: int | Tensor = 0,
    stop: int | Tensor = 2**62,
) -> list[Part]:
    """The rows start <= r < stop of k (K, S, D), v (K, S, Dv) that tokens at `positions` (T,) see.

    Positions, start and stop count rows of k: row 0 is position 0. Where some values are not
    concrete, hidden rows are zeroed and masked.
    """
    S = k.shape[-2]
    first, each = first_seen(positions, window)
    (least_start, start_of_all), (stop_of_all, last_stop) = bounds(start, S), bounds(stop, S)
    begin, end = max(least_start, first), last_stop
    if begin >= end:
        return []
    k, v = k[..., begin:end, :], v[..., begin:end, :]
    n = end - begin
    if start_of_all <= begin and stop_of_all >= end:  # only the window hides rows
        if each is None:
            return [Part(k, v)]
        seen = torch.minimum((each - begin).clamp(min=0), torch.full_like(each, n))
        return [Part(k, v, Mask(seen.unsqueeze(-1), torch.full_like(seen, n).unsqueeze(-1)))]
    inside = lambda x: torch.as_tensor(x - begin, device=k.device).clamp(0, n)
    lower, upper, row = inside(start), inside(stop), torch.arange(n, device=k.device)
    remembered = ((lower <= row) & (row < upper)).unsqueeze(-1)
    clean = lambda rows: torch.where(remembered, rows, 0)  # 0 * NaN is NaN, in output and gradients
    T = positions.shape[-1]
    lower = lower.expand(T) if each is None else torch.maximum(lower, (each - begin).clamp(0, n))
    upper = upper.expand(T)
    return [
        Part(
            clean(k), clean(v), Mask(torch.minimum(lower, upper).unsqueeze(-1), upper.unsqueeze(-1))
        )
    ]


def written(x: Tensor, new: Tensor, at: int | Tensor, n: int | Tensor) -> Tensor:
    """x (..., S, D) with rows at, at + 1, ... replaced by the first n rows of new (..., T, D).

    Rows that fall outside 0..S - 1 are dropped.
    """
    S, T = x.shape[-2], new.shape[-2]
    if isinstance(at, int) and isinstance(n, int):
        lo, hi = min(max(at, 0), S), min(max(at + n, 0), S)
        if hi <= lo:
            return x
        return torch.cat([x[..., :lo, :], new[..., lo - at : hi - at, :], x[..., hi:, :]], -2)
    if not T or not S:
        return x
    source = torch.arange(S, device=x.device) - at
    hit = ((source >= 0) & (source < n)).unsqueeze(-1)
    return torch.where(hit, new.index_select(-2, source.clamp(0, T - 1)), x)


def overwritten(
    pairs: Sequence[tuple[Tensor, Tensor]], at: int | Tensor, n: int | Tensor
) -> list[Tensor] | None:
    """`written` for pairs (x, new), into x itself; None where that is not possible.

    It is possible under vmap alone, without derivatives, where each x has memory for each row of
    the vmaps. T rows are written, at .. at + T modulo S, which are all different: of these, rows
    that are not replaced get what they have.

    Law: as `written`, and no row is changed that `written` does not replace
        (test_rows.py::test_rows_are_overwritten_as_written).
    """
    tensors = [x for x in (at, n, *[new for _, new in pairs]) if isinstance(x, Tensor)]
    if not mapped_rows() or any(map(differentiated, (*tensors, *[x for x, _ in pairs]))):
        return None
    levels = {level for x in tensors for level in _mapped(x)}
    if not all(
        0 < new.shape[-2] <= x.shape[-2] and levels <= {*_mapped(x)} and _has_own_memory(x)
        for x, new in pairs
    ):
        return None
    return [_put(x, new, at, n) for x, new in pairs]


def _put(x: Tensor, new: Tensor, at: int | Tensor, n: int | Tensor) -> Tensor:
    step = torch.arange(new.shape[-2], device=x.device)
    row = at + step
    hit = (step < n) & (row >= 0) & (row < x.shape[-2])
    rows, row = x.movedim(-2, 0), row.remainder(x.shape[-2])
    hit = hit.reshape(-1, *[1] * (x.dim() - 1))
    some = torch.where(hit, new.movedim(-2, 0), rows.index_select(0, row))
    torch.ops.aten.index_put_(rows, [row], some)
    return x


def _has_own_memory(x: Tensor) -> bool:
    """False for an expanded tensor, whose entries have memory in common."""
    whole = errors.peek(x)
    return whole is not None and all(
        step or size < 2 for step, size in zip(whole.stride(), whole.shape, strict=True)
    )


def bounds(x: int | Tensor, most: int) -> tuple[int, int]:
    """The least and greatest x of all rows under vmap, clamped to 0..most; 0, most if unknown."""
    if isinstance(x, Tensor):
        known = errors.peek(x)
        if known is None or not known.numel():
            return 0, most
        least, greatest = (
            (int(y) for y in known.aminmax()) if known.numel() > 1 else (int(known),) * 2
        )
    else:
        least = greatest = x
    return min(max(least, 0), most), min(max(greatest, 0), most)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """torch.stack(parts), to be read alone: where they are all parts of one tensor, in order, that.

    Law: equal to torch.stack (test_rows.py::test_parts_of_one_tensor_are_joined_without_a_copy).
    """
    base = parts[0]._base if parts and errors.is_plain(parts[0]) else None
    differs = any(part.requires_grad for part in parts) or has_tangent(*parts)
    if base is None or base.requires_grad or differs:
        return torch.stack(list(parts))
    size, begin = parts[0].numel(), base.storage_offset()
    whole = base.is_contiguous() and base.numel() == len(parts) * size
    in_order = whole and all(
        part._base is base
        and part.storage_offset() == begin + i * size
        and part.is_contiguous()
        and part.shape == parts[0].shape
        and part.dtype == base.dtype
        for i, part in enumerate(parts)
    )
    return base.view(len(parts), *parts[0].shape) if in_order else torch.stack(list(parts))


def runs(blocks: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(start, stop) of runs of neighbouring blocks that are mapped by the same vmap levels.

    A block that is not mapped is then not copied for each row of a batch.
    """
    kinds = [_mapped(block) for block in blocks]
    cuts = [0, *[i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]], len(kinds)]
    return list(itertools.pairwise(cuts)) if kinds else []


def _mapped(x: Tensor) -> tuple[int, ...]:
    """The vmap levels that x is batched at."""
    levels = []
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            levels.append(_functorch.maybe_get_level(x))
        x = _functorch.get_unwrapped(x)
    return tuple(levels)


def first_seen(positions: Tensor, window: int | None) -> tuple[int, Tensor | None]:
    """The first row that any new token sees (0 if unknown), and that of each token (T,).

    The second is None where every token sees all rows from the first on.
    """
    if window is None:
        return 0, None
    each = positions - (window - 1)
    known = errors.peek(each)
    if known is None or not known.numel():
        return 0, each
    first, last = (int(x) for x in known.aminmax()) if known.numel() > 1 else (int(known),) * 2
    return max(first, 0), None if last <= max(first, 0) else each
