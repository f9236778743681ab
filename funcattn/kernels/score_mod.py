"""Attention with an elementwise function of the logits: O(T + S) memory, derivatives of any order.

    s_ij = score(scale * q_i . k_j, b, h, i, j, *parameters)      over the keys that query i sees
    m_i = sum_j exp(s_ij - c_i)        n_i = sum_j exp(s_ij - c_i) v_j
    out_i = n_i / m_i                  lse_i = c_i + log m_i

The result does not depend on c, so c = max_j s_ij is computed first and then treated as a constant.
What remains to differentiate is a *sum over blocks*: a function f of one block of queries and one
of keys, whose outputs are indexed by queries (summed over the blocks of keys), by keys (summed over
those of queries), or by neither, such as the parameters (summed over all). The vjp of such a sum is
the sum of the vjps of f, the jvp that of the jvps, the vmap that of the vmaps. So it is closed
under transforms for an arbitrary f: each block is rematerialized, and derivatives of every order
hold one block at a time.

The cost of an arbitrary f: two passes for the value, autograd in every block of a derivative, no
fused kernel. Low-rank biases and ALiBi are faster by another way: two more columns of q and k.

Source: score_mod of flex_attention, Dong et al., Flex Attention, arXiv:2412.05496.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import rematerialization
from ..core import errors
from ..core.autograd import is_jit_traced
from ..masks import Mask
from ..records import Attended
from . import arguments, reference, unseen
from .block_sums import NOTHING, Axes, BlockSum
from .dtypes import accurate
from .request import Request

DOOR = "attention_with_score"
REMEDY = "Give it what a derivative or a vmap follows in parameters=."


def attention_with_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[..., Tensor],
    mask: Mask | Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    parameters: tuple[Any, ...] = (),
) -> Attended:
    """Attention with an elementwise function of the logits: soft caps, relative biases and others.

        s_ij = score(scale q_i . k_j, b, h, i, j, *parameters)
        lse_i = log sum_j exp s_ij        out_i = sum_j exp(s_ij - lse_i) v_j

    Linear memory, exact under every nesting of grad, jvp and vmap, and slower than `attention`,
    whose derivatives are written by hand.

    Args:
        q: (*lead, H, T, D) queries, any floating dtype.
        k: (*lead, K, S, D) keys, with H % K == 0.
        v: (*lead, K, S, Dv) values.
        score: score(s, b, h, i, j, *parameters) -> logits of the shape of s. s (*lead, H, rows,
            columns) is a block of logits in float32 at least, and b, h, i, j are int64 tensors that
            broadcast against it: the indices of the example (in the lead of q and k, flattened;
            axes of vmap do not count), of the query head, of the query and of the key. -inf hides
            the key.
        mask: a `Mask` (*lead, T, n), or booleans that broadcast to (*lead, H, T, S), True where the
            query sees the key. Blocks that a Mask hides are not computed; those that score hides
            are.
        scale: factor of the logits, a number or a 0-d tensor; None is 1 / sqrt(D).
        parameters: trees of tensors that score reads, passed whole to every block; every tensor
            that is differentiated or mapped must be among them.

    Returns:
        Attended(out (*lead, H, T, Dv) in the dtype of v, lse (*lead, H, T) in float32 at least). A
        query that sees no key has out = 0 and lse = -inf, with zero derivatives.

    Raises:
        ValueError: sizes that do not fit; a score that is not elementwise (another shape, a sum
            over keys or queries, or different values in a second call), that reads a tracked tensor
            from its closure, or draws from torch's global generator.
        TypeError: dtypes, or kinds of mask, that do not fit.

    Under autocast q, k and v are rounded to its dtype, as in `attention`. In torch.compile it runs
    eagerly, after a graph break (an error with fullgraph=True); torch.export and torch.jit.trace
    record the dense formula.

    Example:
        >>> q = k = v = torch.ones(1, 2, 4)
        >>> capped = lambda s, b, h, i, j, cap: cap * torch.tanh(s / cap)
        >>> attention_with_score(q, k, v, capped, parameters=(torch.tensor(30.0),)).out.shape
        torch.Size([1, 2, 4])
        >>> attention_with_score(q, k, v, lambda s, b, h, i, j: s - s.mean(-1, keepdim=True))
        Traceback (most recent call last):
        ValueError: attention_with_score: score should be elementwise, got one whose value at a pair
            depends on the other pairs, or
        on the call. Let it read its own logit, the indices and parameters, and nothing else.

    Law: derivatives are those of the dense formula
        (test_score_mod.py::test_derivatives_agree_with_the_dense_formula).
    """
    return Attended(*stream(q, k, v, score, mask, scale=scale, parameters=parameters)[:2])


def stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[..., Tensor],
    mask: Mask | Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    parameters: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse of `attention_with_score`, and the rounding error of lse, a constant."""
    r = arguments.request(DOOR, q, k, v, mask, scale, None)
    if not isinstance(parameters, tuple):
        remedy = "Put a single one in a tuple of its own: parameters=(table,)."
        errors.fail(
            DOOR, "parameters", "a tuple", f"a {type(parameters).__name__}", remedy, TypeError
        )
    if torch.compiler.is_exporting() or is_jit_traced():  # plain operations, no loop
        return _attend(r, score, parameters, dense=True)
    return _eagerly(r, score, parameters)  # pyright: ignore[reportCallIssue]


# A score of the logits, the indices and the parameters.
OfTensors = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]


def _attend(
    r: Request, score: Callable[..., Tensor], parameters: tuple[Any, ...], dense: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    leaves, tree = pytree.tree_flatten(parameters)
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def of_tensors(s: Tensor, indices: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        filled = dict(zip(places, tensors, strict=True))
        return score(
            s,
            *indices,
            *pytree.tree_unflatten([filled.get(n, leaf) for n, leaf in enumerate(leaves)], tree),
        )

    tensors = [leaves[n] for n in places]
    if not dense:
        _probe(r, of_tensors, [t.detach() for t in tensors])
    return _stream(r, of_tensors, tensors, dense)


_eagerly = torch.compiler.disable(_attend)


def _stream(
    r: Request, score: OfTensors, parameters: Sequence[Tensor], dense: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, blind, *flags = unseen.take_out(accurate(r.q), accurate(r.k), accurate(r.v), r.mask)
    bad = [x for x in flags if x is not None]
    H, T, S = *q.shape[-3:-1], k.shape[-2]
    scale = r.scale if isinstance(r.scale, Tensor) else q.new_tensor(r.scale)
    i, j = torch.arange(T, device=q.device), torch.arange(S, device=q.device)
    mask, mask_axes = _mask_inputs(r.mask, T, S)

    def spoilt(bad: Tensor, like: Tensor, seen: Tensor | None) -> Tensor | float:
        factor = unseen.poison(bad, like, seen)
        return 1.0 if factor is None else factor

    def logits(
        i: Tensor, j: Tensor, q: Tensor, k: Tensor, scale: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        seen = _seen(rest[: len(mask)], j)
        s = reference.logits(q, k, scale, seen)
        if flags[0] is not None:
            s = s * spoilt(rest[len(mask)], s, seen)
        s = score(s, _indices(s, i, j), rest[len(mask) + len(bad) :]).to(s.dtype)
        return s, seen

    def highest(_: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        s, seen = logits(*x)
        s = s if seen is None else torch.where(seen, s, NOTHING)
        return (
            (s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), NOTHING)),
        )

    def normalizers(shift: Tensor, v: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        s, seen = logits(*x)
        p = (
            (s - shift).exp()
            if seen is None
            else torch.where(seen, (torch.where(seen, s, shift) - shift).exp(), 0)
        )
        normalizer = p.sum(-1, keepdim=True)
        if flags[1] is not None:
            seen = s != NOTHING if seen is None else seen & (s != NOTHING)
            p = p * spoilt(x[5 + len(mask) + len(bad) - 1], p, seen)
        return normalizer, reference.mix(p, v, seen)

    query, key = Axes(query=-2), Axes(key=-2)
    common = (
        Axes(query=-1),
        Axes(key=-1),
        query,
        key,
        Axes(),
        *mask_axes,
        *[key] * len(bad),
        *[Axes()] * len(parameters),
    )
    x = (i, j, q, k, scale, *mask, *bad, *parameters)
    ends = (6, 7) if isinstance(r.mask, Mask) else ()
    names = {"door": DOOR, "argument": "score", "remedy": REMEDY}
    if dense:  # one block, of all queries and keys
        shift = highest(*(t.detach() for t in (q, *x)))[0]
        shift = torch.where(shift == NOTHING, 0, shift)
        normalizer, weighted = normalizers(shift, v, *x)
        return _normalized(r, shift, normalizer, weighted, blind)
    # shift is a constant to derivatives of every order, since the result does not depend on it;
    # width has its shape, which gives the number of heads.
    width = q.new_zeros(()).expand(*torch.broadcast_shapes(q.shape[:-3], k.shape[:-3]), H, T, 1)
    search = BlockSum(highest, (query, *common), (query,), T, S, ends, maximum=True)
    shift = rematerialization.run(search, [t.detach() for t in (width, *x)], **names)[0]
    shift = torch.where(shift == NOTHING, 0, shift)
    total = BlockSum(
        normalizers, (query, key, *common), (query, query), T, S, tuple(n + 1 for n in ends)
    )
    m, n = rematerialization.run(total, (shift, v, *x), **names)
    return _normalized(r, shift, m, n, blind)


def _normalized(
    r: Request, shift: Tensor, m: Tensor, n: Tensor, blind: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the rounding error of lse, from the normalizer m and weighted sum n."""
    H, T = r.q.shape[-3:-1]
    empty = m == 0
    m = torch.where(empty, 1, m)
    whole = shift + m.log()
    lse, rest = torch.where(empty, NOTHING, whole), ((shift - whole) + m.log()).detach()
    out = unseen.without_blind((n / m).to(r.v.dtype), blind)
    return out, lse.squeeze(-1).expand(*r.lead, H, T), rest.squeeze(-1).expand(*r.lead, H, T)


def _mask_inputs(mask: Mask | Tensor | None, T: int, S: int) -> tuple[list[Tensor], list[Axes]]:
    if mask is None:
        return [], []
    if isinstance(mask, Mask):
        return list(mask), [Axes(query=-2), Axes(query=-2)]
    mask = mask.reshape(*[1] * (2 - mask.dim()), *mask.shape)
    return [mask], [
        Axes(-2 if mask.shape[-2] == T != 1 else 0, -1 if mask.shape[-1] == S != 1 else 0)
    ]


def _seen(mask: Sequence[Tensor], j: Tensor) -> Tensor | None:
    """The mask of a block as booleans that broadcast to its logits (*lead, H, rows, columns)."""
    if len(mask) < 2:
        return mask[0] if mask else None
    start, stop = (end.unsqueeze(-1) for end in mask)  # (*lead, rows, n, 1)
    return ((start <= j) & (j < stop)).any(-2).unsqueeze(-3)


def _indices(s: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b, h, i, j for a block of logits (*lead, H, rows, columns)."""
    *lead, H = s.shape[:-2]
    b = torch.arange(math.prod(lead), device=s.device).reshape(*lead, 1, 1, 1)
    return b, torch.arange(H, device=s.device).reshape(H, 1, 1), i.unsqueeze(-1), j


def _probe(r: Request, score: OfTensors, parameters: Sequence[Tensor]) -> None:
    """Raise for a score that is not elementwise: a pair alone gives what it gives among others."""
    H, T, S = *r.q.shape[-3:-1], r.k.shape[-2]
    if not T or not S:
        return
    some = lambda n: torch.tensor(sorted({0, n // 2, n - 1}), device=r.q.device)
    i, j = some(T), some(S)
    s = (
        torch.arange(len(i) * len(j), device=r.q.device)
        .to(accurate(r.q).dtype)
        .cos()
        .reshape(len(i), len(j))
    )
    s = s.expand(*torch.broadcast_shapes(r.q.shape[:-3], r.k.shape[:-3]), H, len(i), len(j))
    with torch.no_grad():
        whole = score(s.clone(), _indices(s, i, j), parameters)
        if not isinstance(whole, Tensor) or whole.shape != s.shape or not whole.is_floating_point():
            wanted = f"a function to floating logits of the shape of s, here {errors.shape(s)}"
            got = (
                f"{whole.dtype} {errors.shape(whole)}"
                if isinstance(whole, Tensor)
                else f"a {type(whole).__name__}"
            )
            errors.fail(DOOR, "score", wanted, got, "Keep the shape.")
        for n in (0, -1):
            pair = s[..., [n], :][..., [n]]
            alone, among = (
                score(pair.clone(), _indices(pair, i[[n]], j[[n]]), parameters),
                whole[..., [n], :][..., [n]],
            )
            # Vectorized functions may round the last elements of a row differently.
            near = (
                (alone == among)
                | ((alone - among).abs() <= 1e-6 + 1e-4 * among.abs())
                | (alone.isnan() & among.isnan())
            )
            if alone.shape != among.shape or errors.is_true(~near):
                remedy = "Let it read its own logit, the indices and parameters, and nothing else."
                errors.fail(
                    DOOR,
                    "score",
                    "elementwise",
                    "one whose value at a pair depends on the other pairs, or on the call",
                    remedy,
                )
