"""Joining attention over disjoint sets of keys, a monoid.

Flash, paged, forked and ring attention are folds of it.

lse = log(exp lse_a + exp lse_b)        out = w out_a + (1 - w) out_b,   w = exp(lse_a - lse)
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import is_recorded
from ..core.doors import door
from ..masks import Mask
from ..records import ABSENT, Attended, is_absent
from . import coded, dispatch, reference, score_mod, unseen
from .api import _run, attend
from .arguments import no_autocast, request
from .backends import aten, native, torch_blocks
from .backends.masking import is_finite
from .closed import entry, operators
from .dtypes import accurate
from .request import FEW, Kernel
from .unseen import Taken

NOTHING = float("-inf")


class KVSegment(NamedTuple):
    """A segment: keys k (*lead, K, S, D), values v (*lead, K, S, Dv), mask (`()`: none hidden)."""

    k: Tensor
    v: Tensor
    mask: Any = ABSENT  # a Mask, booleans, or ()


@door
def merge(a: Attended, b: Attended) -> Attended:
    """Join attention over two disjoint sets of keys.

    Each side is weighted by its fraction of the softmax normalizer, exp(lse_i - lse).

    Args:
        a, b: out (*lead, H, T, Dv) and lse (*lead, H, T), with the same queries and disjoint keys.

    Returns:
        Attention over the union of the keys.

    Raises:
        ValueError: the shapes of the two differ.

    A weight carries the rounding error of its lse, |lse| 2^-24 in float32: where both lse are in
    the thousands it has three correct digits, and at 1e9 none. `attend_segments` takes one softmax
    over such segments.

    Law: associative, commutative, with attention over no keys (out = 0, lse = -inf) as identity,
        and zero derivatives, not NaN, where both see nothing
        (test_kernels.py::test_merge_is_a_monoid).
    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
    """
    told = lambda x: f"out {errors.shape(x.out)} and lse {errors.shape(x.lse)}"
    try:
        lead = torch.broadcast_shapes(
            a.out.shape[:-3], b.out.shape[:-3], a.lse.shape[:-2], b.lse.shape[:-2]
        )
    except RuntimeError:
        lead = None
    if lead is None or a.out.shape[-3:] != b.out.shape[-3:] or a.lse.shape[-2:] != b.lse.shape[-2:]:
        errors.fail(
            "merge",
            "b",
            f"{told(a)} as in a",
            told(b),
            "Attend with the same queries and head size of values.",
        )
    return join(Partial(*a), Partial(*b)).attended


class Partial(NamedTuple):
    """Attention over a subset of the keys, to be joined with others: lse + rest is the log-sum-exp.

    rest is the rounding error of lse, which beside a large logit loses the log of the normalizer;
    it is constant to derivatives.
    """

    out: Tensor  # (*lead, H, T, Dv)
    lse: Tensor  # (*lead, H, T)
    rest: Tensor | float = 0.0  # of the shape of lse

    @property
    def attended(self) -> Attended:
        """The public record, without rest."""
        return Attended(self.out, self.lse)


def partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    kernel: str | Kernel | None = None,
) -> Partial:
    """`attend` as a Partial, which `join` merges exactly, whatever the magnitude of the logits."""
    r = request("attend", q, k, v, mask, scale, None, wants_lse=True)
    chosen = dispatch.choose(r, kernel)
    out, lse = _run(r, chosen)
    whole, rest = entry.statistics(r, lse)
    return Partial(out, lse + torch.where(lse == NOTHING, 0, whole - lse).detach(), rest)


def join(a: Partial, b: Partial) -> Partial:
    """Attention over two disjoint sets of keys; see `merge`."""
    no_a, no_b = a.lse == NOTHING, b.lse == NOTHING
    # finite, so that derivatives are finite
    x, y = torch.where(no_a, 0, a.lse), torch.where(no_b, 0, b.lse)
    # it cancels, so it has no derivative
    center = torch.where(no_a, y, torch.where(no_b, x, torch.maximum(x, y))).detach()
    x, y = (x - center) + a.rest, (y - center) + b.rest
    w = torch.where(no_a, 0, torch.where(no_b, 1, torch.sigmoid(x - y))).unsqueeze(-1)
    log = torch.where(no_a, y, torch.where(no_b, x, torch.logaddexp(x, y)))
    lse = center + log
    out = w * accurate(a.out) + (1 - w) * accurate(b.out)
    return Partial(
        out.to(a.out.dtype), torch.where(no_a & no_b, NOTHING, lse), ((center - lse) + log).detach()
    )


def attend_segments(
    q: Tensor,
    segments: Sequence[KVSegment],
    *,
    scale: float | Tensor,
    cap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str | Kernel | None = None,
) -> Tensor:
    """Attention (*lead, H, T, Dv) over disjoint segments, such as cache and new tokens.

    A fold of `attend` and `merge`, with log-sum-exps in twice the precision. For a few queries, as
    in a decode step, it is one softmax over all logits: linear memory where T is small, a dozen
    operations, every transform. A key that a query does not see changes nothing for it, even if it
    is NaN: under autograd and transforms hidden pairs are left out of the sums; elsewhere on the
    CPU, if the result of the one softmax is not finite, segments are attended to one by one
    instead; compiled code zeroes hidden keys before it multiplies. The exception is eager code on
    another device, outside autograd and transforms, for at most FEW queries: a hidden *value* that
    is NaN or infinite gives NaN there, since to look for it would wait for the device. The caches
    of this library zero such rows.

    Args:
        q: (*lead, H, T, D).
        segments: the segments: keys, values and masks.
        scale: factor of the logits.
        cap: a soft cap: logits s become cap * tanh(s / cap). Beyond a few queries it is computed by
            `attention_with_score`, in linear memory with exact derivatives.
        sinks: (H,), attention sinks: the logit of one more key per head, whose value is 0.
        kernel: None chooses; a name or a `Kernel` forces one, except with a cap, which no kernel
            computes.
    """
    forced = dispatch.giving_lse(kernel)
    if any(isinstance(segment, coded.CodedSegment) for segment in segments):
        if q.shape[-2] <= FEW and forced is None and cap is None and sinks is None:
            with no_autocast(q):
                found = coded.attend(q, segments, scale)
            if found is not None:
                return found
        segments = [KVSegment(*segment) for segment in segments]
    for segment in segments:
        check_remembered(segment.k, q.dtype)
    if q.shape[-2] <= FEW and forced is None:
        with no_autocast(q):
            if cap is None and not isinstance(scale, Tensor) and _is_plain_step(q, segments):
                return _one(q, segments, scale, sinks)
            out = _joint(q, segments, scale, cap, sinks)
        if not _is_spoilt(out, segments):
            return out
    if len(segments) == 1 and cap is None and sinks is None:
        (k, v, mask) = segments[0]
        return attend(q, k, v, None if is_absent(mask) else mask, scale=scale, kernel=forced).out
    attended = functools.reduce(
        join, [_attend_segment(q, segment, scale, cap, forced) for segment in segments]
    )
    return attended.out if sinks is None else _drain(attended, sinks)


def _is_spoilt(out: Tensor, segments: Sequence[KVSegment]) -> bool:
    """True where keys are hidden and the output is known to hold NaN or infinity.

    A zero weight times a hidden NaN may have caused it. False off the CPU, where reading the output
    would wait for the device.
    """
    if out.device.type != "cpu" or all(is_absent(segment.mask) for segment in segments):
        return False
    known = errors.peek(out)
    return known is not None and not is_finite([known])


def check_remembered(k: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError where the cached keys are not in the dtype of the queries."""
    if k.dtype != dtype:
        wanted, remedy = (
            f"{dtype} as the weights give",
            f"Make the past with model.cache(size, dtype={dtype}).",
        )
        errors.fail("attention", "the past", wanted, k.dtype, remedy, TypeError)


def _attend_segment(
    q: Tensor,
    segment: KVSegment,
    scale: float | Tensor,
    cap: float | None,
    kernel: str | Kernel | None,
) -> Partial:
    k, v, mask = segment.k, segment.v, None if is_absent(segment.mask) else segment.mask
    if cap is None:
        return partial(q, k, v, mask, scale=scale, kernel=kernel)
    return Partial(*score_mod.stream(q, k, v, lambda s, *_: soft_cap(s, cap), mask, scale=scale))


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): close to x where |x| is small, and bounded by the cap.

    Source: Gemma 2, arXiv:2408.00118, section 2.
    """
    return (x / cap).tanh() * cap


def _drain(attended: Partial, sinks: Tensor) -> Tensor:
    """Attention merged with one more key per head, of logit `sinks` and value 0."""
    kept = torch.sigmoid(
        (attended.lse - sinks.to(attended.lse.dtype).unsqueeze(-1)) + attended.rest
    )
    return attended.out * kept.unsqueeze(-1).to(attended.out.dtype)


def _is_plain_step(q: Tensor, segments: Sequence[KVSegment]) -> bool:
    """True for one query of one sequence, no mask, outside of autograd, transforms and tracers.

    A fused kernel then computes each segment.
    """
    if q.shape[-2] != 1 or q.dim() != 3:
        return False
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if not all(
        is_absent(segment.mask) and segment.k.dim() == 3 and segment.k.shape[-2]
        for segment in segments
    ):
        return False
    if is_recorded(q, *[x for segment in segments for x in (segment.k, segment.v)]):
        return False
    if not operators.plain([q, *[x for segment in segments for x in (segment.k, segment.v)]]):
        return False  # what traces or counts operations sees those of the joint softmax
    return not any(aten.why_not(q, segment.k, segment.v) for segment in segments)


def _one(q: Tensor, segments: Sequence[KVSegment], scale: float, sinks: Tensor | None) -> Tensor:
    """One query: query heads of a key head become rows of one fused call per segment."""
    rows = q.reshape(segments[0].k.shape[-3], -1, q.shape[-1])  # (K, H / K, D)
    fused = native.attend_rows if native.can_attend_rows(q) else aten.attend_rows
    out = lse = None
    for k, v, _ in segments:
        if k.shape[-2] == 1:  # one key: its logit is the log-sum-exp
            more, segment_lse = v, (accurate(rows) * accurate(k)).sum(-1, keepdim=True) * scale
        else:
            more, segment_lse = fused(rows, k, v, scale)
        if out is None or lse is None:
            out, lse = more, segment_lse
        else:
            share = torch.sigmoid(lse - segment_lse).to(out.dtype)
            out, lse = torch.lerp(more, out, share), torch.logaddexp(lse, segment_lse)
    assert out is not None
    assert lse is not None
    if len(segments) > 1 and torch_blocks.is_far(lse):
        return _joint(q, segments, scale, None, sinks)
    out = out.expand(*rows.shape[:-1], -1).reshape(q.shape[0], 1, -1)
    return out if sinks is None else _drain(Partial(out, lse.reshape(q.shape[0], 1)), sinks)


def _joint(
    q: Tensor,
    segments: Sequence[KVSegment],
    scale: float | Tensor,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    logits: list[Tensor] = []
    taken: list[tuple[Taken, Tensor | None]] = []
    can_be_empty = True
    for k, v, mask in segments:
        seen = None if is_absent(mask) else reference.visible(mask, k.shape[-2])
        x = (
            unseen.take_out(q, k, v, seen, all_keys=False)
            if torch.compiler.is_compiling()
            else Taken(q, k, v)
        )
        S = reference.logits(accurate(x.q), accurate(x.k), scale, seen)
        S = S if cap is None else soft_cap(S, cap)
        if seen is None:
            can_be_empty = can_be_empty and not k.shape[-2]
        else:
            S = torch.where(seen, S, NOTHING)
        logits.append(S)
        taken.append((x, seen))
    if sinks is not None:
        can_be_empty = False
        logits.append(sinks.to(logits[0].dtype).reshape(-1, 1, 1).expand(*logits[0].shape[:-1], 1))
    if any(S.shape[:-1] != logits[0].shape[:-1] for S in logits):
        lead = torch.broadcast_shapes(*[S.shape[:-1] for S in logits])
        logits = [S.expand(*lead, -1) for S in logits]
    S = torch.cat(logits, -1) if len(logits) > 1 else logits[0]
    if can_be_empty:
        empty = torch.eq(S, float("-inf")).all(-1, keepdim=True)
        P = torch.where(empty, 0, torch.where(empty, 0, S).softmax(-1))
    else:
        P = S.softmax(-1)
    sizes = [segment.k.shape[-2] for segment in segments]
    shares = P.to(q.dtype).split(sizes if sinks is None else [*sizes, 1], -1)
    outputs = []
    for share, (x, seen) in zip(shares, taken, strict=False):
        spoilt = unseen.poison(x.bad_v, share, seen)
        outputs.append(reference.mix(share if spoilt is None else share * spoilt, x.v, seen))
    return functools.reduce(torch.add, outputs)
