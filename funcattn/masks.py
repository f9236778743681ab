"""Masks as unions of intervals of keys, closed under `&`, `|` and `~`.

    query i sees key j   iff   start[i, r] <= j < stop[i, r]   for some r

Causal, window, prefix, padding and packed-document masks have one or two intervals per query, so a
mask costs O(T) memory, not O(T * S). It is a record of two integer tensors: it can differ per
sequence, be mapped by vmap, and be an input of compiled code without recompiling; and a kernel
finds the blocks of keys to skip from the ends of the intervals. The algebra is exact and canonical:
intervals are sorted, disjoint and not adjacent, empty ones come last, so two masks that show the
same keys hold the same intervals.

Source: Wang et al., FlashMask, arXiv:2410.01359 (column-wise intervals); here they are per query,
    and an algebra.
"""

import html
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .core import errors
from .core.doors import door
from .records import record

END = 2**31 - 1  # infinity: beyond every sequence length, and int64 sums with it do not overflow


@record
class Mask(NamedTuple):
    """For each query, a union of intervals of keys.

    start, stop: int64 (*lead, T, n); interval r of query i holds the keys start <= j < stop. There
    is no head axis: all heads of a sequence have the same mask (`vmap` over heads gives each its
    mask).

    Example:
        >>> (causal(4) & window(4, 2)).dense(4).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """

    start: Tensor
    stop: Tensor

    def dense(self, S: int) -> Tensor:
        """The mask as booleans (*lead, T, S), True where the query sees the key."""
        key = torch.arange(S, device=self.start.device)
        return ((self.start.unsqueeze(-1) <= key) & (key < self.stop.unsqueeze(-1))).any(-2)

    def __str__(self) -> str:
        drawn = picture(self)
        return repr(self) if drawn is None else f"{self!r}\n{drawn}"

    def _repr_html_(self) -> str:
        return _drawn(self)

    def __and__(self, other: "Mask") -> "Mask":
        return intersection(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return union(self, other)

    def __invert__(self) -> "Mask":
        return complement(self)

    def __rand__(self, other: object) -> NoReturn:
        _refuse("&", other)

    def __ror__(self, other: object) -> NoReturn:
        _refuse("|", other)


@door(name="masks.full")
def full(T: int, S: int | None = None) -> Mask:
    """Every query sees every key; where S is given, the first S keys."""
    zeros = torch.zeros_like(_positions(T, 0))
    return Mask(zeros, torch.full_like(zeros, END if S is None else S))


@door(name="masks.causal")
def causal(T: int, S: int | None = None, *, align: str = "upper", offset: int | Tensor = 0) -> Mask:
    """Query i sees the keys up to its own position, j <= i + offset.

    Args:
        T: number of queries.
        S: number of keys; required for `align="lower"`; where given, intervals end at S.
        align: "upper": query 0 is at key 0. "lower": the last query is at the last key, as when the
            T queries are the last T of S tokens.
        offset: int or int64 tensor (*lead,), added to the position of each query: the number of
            keys before the first query.

    Example:
        >>> causal(2, 3, align="lower").dense(3).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    if align not in ("upper", "lower"):
        errors.fail(
            "masks.causal",
            "align",
            '"upper" or "lower"',
            repr(align),
            "Say which corner the diagonal starts from.",
        )
    if align == "lower" and S is None:
        errors.fail("masks.causal", "S", 'given with align="lower"', S, "Pass the number of keys.")
    shift = (S - T if align == "lower" and S is not None else 0) + offset
    last = _positions(T, shift) + 1
    return Mask(*_canonical(torch.zeros_like(last), last if S is None else last.clamp(max=S)))


@door(name="masks.window")
def window(T: int, size: int, *, offset: int | Tensor = 0) -> Mask:
    """Query i sees the keys with |i + offset - j| < size.

    Intersected with `causal`: its own key and the size - 1 keys before it.

    Args:
        T: number of queries.
        size: number of keys, at least 1.
        offset: int or int64 tensor (*lead,), added to the position of each query.

    Example:
        >>> window(3, 2).dense(3).int().tolist()
        [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    if isinstance(size, int) and size < 1:
        errors.fail(
            "masks.window",
            "size",
            "at least 1",
            size,
            "A window of 1 sees the query's own key alone.",
        )
    middle = _positions(T, offset)
    return Mask(*_canonical(middle - size + 1, middle + size))


@door(name="masks.prefix")
def prefix(T: int, n: int | Tensor) -> Mask:
    """Every query sees the first n keys; n is an int or an int64 tensor (*lead,)."""
    start = torch.zeros_like(_positions(T, n))
    return Mask(
        *_canonical(start, start + (n.unsqueeze(-1).unsqueeze(-1) if isinstance(n, Tensor) else n))
    )


@door(name="masks.sinks")
def sinks(T: int, n: int | Tensor) -> Mask:
    """Every query sees the first n keys, attention sinks beside a window.

    `causal(T) & (window(T, 128) | sinks(T, 4))` combines both; n is an int or int64 (*lead,).

    Source: Xiao et al., Efficient streaming language models with attention sinks, arXiv:2309.17453.
    """
    return prefix(T, n)


@door(name="masks.padding")
def padding(T: int, lengths: Tensor) -> Mask:
    """Queries of a padded batch see the keys j < length; lengths is int64 (*lead,)."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point():
        errors.fail(
            "masks.padding",
            "lengths",
            "an integer tensor (*lead,)",
            lengths,
            "Pass the lengths, not a mask.",
            TypeError,
        )
    return prefix(T, lengths)


@door(name="masks.segments")
def segments(ids: Tensor) -> Mask:
    """Packed documents: a query sees the keys in its run of equal ids; ids (*lead, T).

    Example:
        >>> segments(torch.tensor([7, 7, 9])).dense(3).int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]

    Raises:
        ValueError: an id appears in two runs (checked where values are concrete): they would be two
            documents.
    """
    if not ids.dim():
        errors.fail("masks.segments", "ids", "(*lead, T)", (), "One id for each token.")
    T = ids.shape[-1]
    place = torch.arange(T, device=ids.device).expand(ids.shape)
    edge = torch.ones_like(ids[..., :1], dtype=torch.bool)
    change = ids[..., 1:] != ids[..., :-1]
    starts, ends = torch.cat([edge, change], -1), torch.cat([change, edge], -1)
    ordered = ids.sort(-1).values
    distinct = 1 + (ordered[..., 1:] != ordered[..., :-1]).sum(-1)
    if errors.is_true(starts.sum(-1) > distinct):
        errors.fail(
            "masks.segments",
            "ids",
            "one run for each document",
            "an id in two runs",
            "Give each document an id of its own.",
        )
    start = torch.where(starts, place, 0).cummax(-1).values
    stop = torch.where(ends, place + 1, T).flip(-1).cummin(-1).values.flip(-1)
    return Mask(start.unsqueeze(-1), stop.unsqueeze(-1))


@door(name="masks.intersection")
def intersection(a: Mask, b: Mask) -> Mask:
    """Keys that both masks show; `a & b`. At most n + m - 1 intervals per query.

    Law: dense(a & b) = dense(a) & dense(b) (test_masks.py::test_algebra_agrees_with_booleans).
    """
    _same_queries("&", a, b)
    n, m = a.start.shape[-1], b.start.shape[-1]
    start = torch.maximum(a.start.unsqueeze(-1), b.start.unsqueeze(-2)).flatten(
        -2
    )  # all n m pairs, of which at most n + m - 1 are non-empty
    stop = torch.minimum(a.stop.unsqueeze(-1), b.stop.unsqueeze(-2)).flatten(-2)
    start, stop = _canonical(start, stop)
    return Mask(start[..., : n + m - 1], stop[..., : n + m - 1])


@door(name="masks.union")
def union(a: Mask, b: Mask) -> Mask:
    """Keys that either mask shows; `a | b`. At most n + m intervals per query."""
    _same_queries("|", a, b)
    lead = torch.broadcast_shapes(a.start.shape[:-1], b.start.shape[:-1])
    join = lambda x, y: torch.cat([x.expand(*lead, -1), y.expand(*lead, -1)], -1)
    return Mask(*_canonical(join(a.start, b.start), join(a.stop, b.stop)))


@door(name="masks.complement")
def complement(m: Mask) -> Mask:
    """Keys that the mask hides; `~m`. Compiled code calls it by name: torch.compile refuses `~`."""
    start, stop = _canonical(m.start, m.stop)
    edge = start.new_zeros(*start.shape[:-1], 1)
    return Mask(*_canonical(torch.cat([edge, stop], -1), torch.cat([start, edge + END], -1)))


CELLS = 32  # rows and columns of a picture, at most


@door(name="masks.picture")
def picture(m: Mask, S: int | None = None) -> str | None:
    """The mask drawn in letters, queries from top to bottom, keys from left to right.

    A cell is `#` where all of its pairs are seen, `+` where some are, `.` where none is; there are
    at most 32 x 32 cells. Of a mask with leading axes, the first is drawn. None where values are
    not concrete, as under vmap or in compiled code.

    Args:
        m: a mask.
        S: number of keys; None takes the last finite end, and at least T.

    Example:
        >>> print(picture(causal(5) & window(5, 2)))
        #....
        ##...
        .##..
        ..##.
        ...##
    """
    cells = _cells(m, S)
    return (
        None
        if cells is None
        else "\n".join(
            "".join(".#"[int(x)] if x in (0, 1) else "+" for x in row) for row in cells[0]
        )
    )


def _cells(m: Mask, S: int | None) -> tuple[list[list[float]], int, int] | None:
    """The fraction of pairs seen in each cell of a picture, and the numbers of queries and keys."""
    start, stop = errors.value(m.start), errors.value(m.stop)
    if start is None or stop is None or not start.numel():
        return None
    start, stop = (x.reshape(-1, *x.shape[-2:])[0].cpu() for x in (start, stop))
    T = start.shape[0]
    if S is None:
        bounded = torch.cat([start[start < END], stop[stop < END]])
        S = max(T, int(bounded.max()) if bounded.numel() else 0)
    edges = [
        (n * torch.arange(min(n, CELLS) + 1, device=start.device)) // min(n, CELLS) for n in (T, S)
    ]
    low, high = edges[1][:-1], edges[1][1:]
    # (T, n, cells)
    overlap = torch.minimum(stop.unsqueeze(-1), high) - torch.maximum(start.unsqueeze(-1), low)
    seen = overlap.clamp(min=0).sum(1).double()
    sums = torch.cat([seen.new_zeros(1, len(low)), seen.cumsum(0)])[edges[0]]
    area = (edges[0][1:] - edges[0][:-1]).unsqueeze(-1) * (high - low)
    return ((sums[1:] - sums[:-1]) / area).tolist(), T, S


def _drawn(m: Mask) -> str:
    """The picture as SVG: the opacity of a cell is the fraction of its pairs that are seen."""
    cells = _cells(m, None)
    if cells is None:
        return f"<pre>{html.escape(repr(m))}</pre>"
    rows, T, S = cells
    size = max(3, 192 // max(len(rows), len(rows[0])))
    body = "".join(
        f'<rect x="{x * size}" y="{y * size}" width="{size}" height="{size}" fill="#3b6ea5" '
        f'fill-opacity="{share:.2f}"/>'
        for y, row in enumerate(rows)
        for x, share in enumerate(row)
        if share
    )
    W, H = size * len(rows[0]), size * len(rows)
    frame = f'<rect width="{W}" height="{H}" fill="none" stroke="#8888"/>'
    lead = f", the first of {tuple(m.start.shape[:-2])}" if m.start.dim() > 2 else ""
    n = m.start.shape[-1]
    said = f"Mask: {T} queries, {S} keys, {n} interval{'s' if n > 1 else ''} a query{lead}"
    label = f'role="img" aria-label="{said}"'
    return (
        f'<div><svg width="{W + 1}" height="{H + 1}" {label}>{body}{frame}</svg><br>'
        f"<small>{said}</small></div>"
    )


def _canonical(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the intervals, merge those that overlap or touch, move empty ones last.

    n stays, so shapes are static, for vmap and torch.compile.
    """
    start, stop = start.clamp(0, END), stop.clamp(0, END)
    empty = stop <= start
    start, stop = torch.where(empty, END, start), torch.where(empty, END, stop)
    if start.shape[-1] == 1:
        return start, stop
    start, order = start.sort(-1)
    reach = stop.gather(-1, order).cummax(-1).values  # the greatest stop among the intervals so far
    begins = torch.cat(
        [torch.ones_like(start[..., :1], dtype=torch.bool), start[..., 1:] > reach[..., :-1]], -1
    )
    # last of a group: the next interval begins another
    closes = torch.cat([begins[..., 1:], begins[..., :1]], -1)
    # Group k has the k-th smallest start and the k-th smallest stop, so sorting each pairs them
    # again.
    return torch.where(begins, start, END).sort(-1).values, torch.where(closes, reach, END).sort(
        -1
    ).values


def _positions(T: int, offset: int | Tensor) -> Tensor:
    """(*lead, T, 1): the position of each query; offset is (*lead,) or an int."""
    if isinstance(T, Tensor) and torch._C._is_tracing():
        T = int(T)  # a size, which is a tensor while torch.jit traces
    if isinstance(T, (str, float, Tensor)) or T < 0:
        got = f"a {type(T).__name__}" if isinstance(T, Tensor) else repr(T)
        errors.fail(
            "masks",
            "T",
            "a number of queries, 0 or more",
            got,
            "Such as fa.masks.causal(q.shape[-2]).",
        )
    if isinstance(offset, Tensor):
        return torch.arange(T, device=offset.device).unsqueeze(-1) + offset.unsqueeze(-1).unsqueeze(
            -1
        )
    return torch.arange(T).unsqueeze(-1) + offset


def _same_queries(sign: str, a: Mask, b: Mask) -> None:
    for side in (a, b):
        if not isinstance(side, Mask):
            _refuse(sign, side)
    if a.start.shape[-2] != b.start.shape[-2]:
        got = f"{a.start.shape[-2]} and {b.start.shape[-2]}"
        errors.fail(
            f"Mask {sign} Mask",
            "both",
            "masks of the same number of queries T",
            got,
            "Build them with the same T.",
        )


def _refuse(sign: str, other: object) -> NoReturn:
    got = f"a {type(other).__name__}"
    errors.fail(
        f"Mask {sign}",
        "the other side",
        "a Mask",
        got,
        "Turn the mask into booleans first with .dense(S).",
        TypeError,
    )
