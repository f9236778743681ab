"""A linear attention that forgets, as a scan in chunks.

    S_t = a_t * S_{t-1} + k_t u_t^T        o_t = S_t^T q_t        S (Dk, Dv), a_t = exp(g_t)

The state S is all that a token knows of those before it. Within a chunk of C tokens it is written
out, with S_0 the state before the chunk and c_t = g_1 + ... + g_t:

    o_t = S_0^T (exp(c_t) * q_t) + sum_{j <= t} (sum_d q_td k_jd exp(c_td - c_jd)) u_j
    S_C = exp(c_C) * S_0 + sum_j (exp(c_C - c_j) * k_j) u_j^T

which are products of matrices; the loop is over chunks. u_j is v_j, or for the delta rule, which
writes what the state does not already predict,

    u_t = b_t (v_t - (a_t * S_{t-1})^T k_t)

the solution of a triangular system of C equations (the WY form).

No exponent is a difference of sums: c_t - c_j is summed over the tokens between j and t. So it is
never positive where g is not, it is accurate where the sums are great, and a gate of exactly zero,
g = -inf, gives neither NaN nor infinity.

Source: Yang et al., Gated linear attention transformers, arXiv:2312.06635; Dao and Gu, Transformers
are SSMs, arXiv:2405.21060, section 6; Yang et al., Parallelizing linear transformers with the delta
rule, arXiv:2406.06484, section 3.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import errors
from ..kernels.arguments import no_autocast
from ..kernels.dtypes import accumulation_dtype

CHUNK = 64  # tokens; the products within a chunk cost O(T * CHUNK)


class Scanned(NamedTuple):
    """What a scan reads and leaves."""

    out: Tensor  # (*lead, H, T, Dv), in the dtype of the values
    state: Tensor  # (*lead, H, Dk, Dv), after the last token, float32 at least


class Chunks(NamedTuple):
    """The inputs of a scan by key head K, the G = H / K heads it serves, and chunk N of C tokens.

    q is () where only states are asked, beta where nothing is solved.
    """

    q: Tensor | tuple[()]  # (*lead, K, 1, N, C, Dk)
    k: Tensor  # (*lead, K, 1, N, C, Dk)
    v: Tensor  # (*lead, K, G, N, C, Dv)
    g: Tensor  # (*lead, K, G, N, C, 1 or Dk)
    beta: Tensor | tuple[()]  # (*lead, K, G, N, C, 1)
    state: Tensor  # (*lead, K, G, Dk, Dv)


class Carried(NamedTuple):
    """The states before each chunk, the values u that its tokens write, and the last state."""

    before: Tensor  # (*lead, K, G, N, Dk, Dv)
    written: Tensor  # (*lead, K, G, N, C, Dv)
    state: Tensor  # (*lead, K, G, Dk, Dv)


def scan(x: Chunks, T: int) -> Scanned:
    """The outputs of the T tokens, in the dtype of the sums, and the state after them."""
    assert isinstance(x.q, Tensor)
    with no_autocast(x.v):
        if x.v.shape[-3:-1] == (1, 1):
            return _step(x, x.q, T)
        before, written, last = carry(x)
        rows = x.q * x.g.cumsum(-2).exp()
        out = rows @ before + decayed(x.q, x.k, x.g) @ written  # (*lead, K, G, N, C, Dv)
    return Scanned(out.flatten(-5, -4).flatten(-3, -2)[..., :T, :], last.flatten(-4, -3))


def _step(x: Chunks, q: Tensor, T: int) -> Scanned:
    """The recurrence itself, for one token or none: a third of the operations of a chunk."""
    q, k, v, g = (y.squeeze(-3) for y in (q, x.k, x.v, x.g))  # (*lead, K, G, 1, features)
    s = g.exp().mT * x.state
    u = x.beta.squeeze(-3) * (v - k @ s) if isinstance(x.beta, Tensor) else v
    s = s + k.mT * u
    return Scanned((q @ s).flatten(-4, -3)[..., :T, :], s.flatten(-4, -3))


def states(x: Chunks, T: int) -> Tensor:
    """The states after each of the T tokens, (*lead, H, T, Dk, Dv)."""
    with no_autocast(x.v):
        before, written, _ = carry(x)
        kept = segments(x.g).exp() * x.k.unsqueeze(-3)  # (*lead, K, G, N, C, C, Dk)
        after = x.g.cumsum(-2).exp().unsqueeze(-1) * before.unsqueeze(-3)
        after = after + kept.mT @ written.unsqueeze(-3)  # (*lead, K, G, N, C, Dk, Dv)
    return after.flatten(-6, -5).flatten(-4, -3)[..., :T, :, :]


def carry(x: Chunks) -> Carried:
    """The loop over chunks: from each takes one state to the next."""
    kept = x.g.sum(-2).exp().unsqueeze(-1)  # (*lead, K, G, N, 1 or Dk, 1)
    last = (x.k * _sums_after(x.g).exp()).mT  # keys, decayed to the end of their chunk
    each = lambda y: y.unbind(-3)  # whose derivative is one stack, not a sum of N arrays
    s, before, written = x.state, [], []
    if not isinstance(x.beta, Tensor):
        for keep, add in zip(each(kept), each(last @ x.v), strict=True):
            before.append(s)
            s = keep * s + add
        return Carried(torch.stack(before, -3), x.v, s)
    parts = (kept, last, *_solved(x, x.beta))
    for keep, write, wanted, seen in zip(*map(each, parts), strict=True):
        before.append(s)
        written.append(wanted - seen @ s)
        s = keep * s + write @ written[-1]
    return Carried(torch.stack(before, -3), torch.stack(written, -3), s)


def _solved(x: Chunks, beta: Tensor) -> tuple[Tensor, Tensor]:
    """W and Y such that the tokens of a chunk write U = W - Y S_0.

    (I + L) U = beta * (V - (exp(c) * K) S_0), where L_tj = beta_t sum_d k_td k_jd exp(c_td - c_jd)
    for j < t.
    """
    values, keys = beta * x.v, beta * (x.k * x.g.cumsum(-2).exp())
    if x.v.shape[-2] == 1:
        return values, keys
    system = beta * decayed(x.k, x.k, x.g)
    return _forward_substitution(system, values), _forward_substitution(system, keys)


def _forward_substitution(a: Tensor, b: Tensor) -> Tensor:
    """(I + strictly lower part of a)^-1 b."""
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*lead, -1, -1), b.expand(*lead, -1, -1)
    return torch.linalg.solve_triangular(a, b, upper=False, unitriangular=True)


def decayed(a: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """sum_d a_td k_jd exp(g_{j+1,d} + ... + g_td) for j <= t, and 0 for j > t: (..., C, C).

    With one decay for all features it is a product times the decays. Else a block below the
    diagonal is a product of rows decayed since its first row's block began, and of columns decayed
    until then; halving the chunk gives the blocks beside the diagonal.

    Args:
        a, k: (..., C, Dk), with C a power of two.
        g: (..., C, 1), or (..., C, Dk).
    """
    if g.shape[-1] == 1:
        return (a @ k.mT) * segments(g).squeeze(-1).exp()
    lead = torch.broadcast_shapes(a.shape, k.shape, g.shape)
    return _by_halves(a.expand(lead), k.expand(lead), g.expand(lead))


def _by_halves(a: Tensor, k: Tensor, g: Tensor) -> Tensor:
    C = g.shape[-2]
    if C == 1:
        return (a * k).sum(-1, keepdim=True)
    a, k, g = (torch.unflatten(y, -2, (2, C // 2)) for y in (a, k, g))
    half = lambda y, i: y.select(-3, i)
    within = _by_halves(a, k, g)  # (..., 2, C / 2, C / 2)
    rows = half(a, 1) * half(g, 1).cumsum(-2).exp()
    columns = half(k, 0) * _sums_after(half(g, 0)).exp()
    below = rows @ columns.mT
    upper = torch.cat((half(within, 0), torch.zeros_like(below)), -1)
    return torch.cat((upper, torch.cat((below, half(within, 1)), -1)), -2)


def segments(g: Tensor) -> Tensor:
    """g_{j+1} + ... + g_t for j <= t, -inf for j > t: (..., C, D) -> (..., C, C, D)."""
    ones = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device)
    later = torch.where(ones.tril(-1).unsqueeze(-1), g.unsqueeze(-2), 0.0).cumsum(-3)
    return later.masked_fill(ones.triu(1).unsqueeze(-1), -torch.inf)


def _sums_after(g: Tensor) -> Tensor:
    """g_{t+1} + ... + g_C of each t, over the axis -2."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def chunks(
    function: str,
    needed: Collection[str],
    q: Tensor | tuple[()],
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | tuple[()],
    state: Tensor | tuple[()],
    mask: Tensor | None,
    size: int,
) -> Chunks:
    """The inputs, checked, in the dtype of the sums, by chunks of at most `size` tokens; those
    named in `needed` are tensors, others may be ().

    Tokens where the mask is False, and those that fill the last chunk, write nothing and keep the
    state: their q, k, v, g and beta are 0, whatever they were.
    """
    lead = _check(function, needed, q, k, v, log_decay, beta, state, mask, size)
    H, T, Dv = v.shape[-3:]
    K, Dk = k.shape[-3], k.shape[-1]
    C = min(size, 1 << max(T - 1, 0).bit_length())
    given = [y for y in (q, k, v, log_decay, beta, state) if isinstance(y, Tensor)]
    dtype = accumulation_dtype(*given)

    def split(y: Tensor) -> Tensor:
        y = y.to(dtype)
        if mask is not None:
            y = torch.where(mask.unsqueeze(-1).unsqueeze(-3), y, 0.0)
        y = F.pad(y, (0, 0, 0, -T % C if T else 1))
        return torch.unflatten(torch.unflatten(y, -2, (-1, C)), -4, (K, -1))

    split_q = split(q) if isinstance(q, Tensor) else ()
    split_beta = split(beta.unsqueeze(-1)) if isinstance(beta, Tensor) else ()
    s = state if isinstance(state, Tensor) else v.new_zeros(H, Dk, Dv)
    s = torch.unflatten(s.to(dtype), -3, (K, -1)).expand(*lead, K, H // K, Dk, Dv)
    return Chunks(split_q, split(k), split(v), split(log_decay), split_beta, s)


def _check(
    function: str,
    needed: Collection[str],
    q: Tensor | tuple[()],
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | tuple[()],
    state: Tensor | tuple[()],
    mask: Tensor | None,
    size: int,
) -> torch.Size:
    """The leading axes; raises where a kind, a shape or the size of a chunk is none of a scan."""
    named = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "state": state}
    for name, x in named.items():
        if not isinstance(x, Tensor) and (name in needed or x != ()):
            got, wanted = (
                f"a {type(x).__name__}",
                "a tensor" + ("" if name in needed else ", or ()"),
            )
            errors.fail(function, name, wanted, got, "Pass a tensor.", TypeError)
        if isinstance(x, Tensor) and not x.is_floating_point():
            remedy = "Cast it to a floating dtype."
            errors.fail(function, name, "floating", x.dtype, remedy, TypeError)
    for name, x in (("v", v), ("k", k)):
        if x.dim() < 3:
            wanted = "(*lead, heads, T, features)"
            errors.fail(function, name, wanted, errors.shape(x), "Add the axis of heads.")
    H, T, Dv = v.shape[-3:]
    K, Dk = k.shape[-3], k.shape[-1]
    if not (H and K and Dk):
        got = f"k {errors.shape(k)} and v {errors.shape(v)}"
        errors.fail(function, "k and v", "of at least one head and feature", got, "Leave it out.")
    if H % K or k.shape[-2] != T:
        wanted = f"(*lead, K, T, Dk) with T = {T} as in v and K a divisor of its H = {H}"
        errors.fail(function, "k", wanted, errors.shape(k), "Each key head serves H / K of v's.")
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "q": ((K, T, Dk), f"(*lead, K, T, Dk) = (*lead, {K}, {T}, {Dk}) as k"),
        "beta": ((H, T), f"(*lead, H, T) = (*lead, {H}, {T})"),
        "state": ((H, Dk, Dv), f"(*lead, H, Dk, Dv) = (*lead, {H}, {Dk}, {Dv})"),
    }
    for name, (shape, wanted) in shapes.items():
        x = named[name]
        if isinstance(x, Tensor) and tuple(x.shape[-len(shape) :]) != shape:
            errors.fail(function, name, wanted, errors.shape(x), "Its last axes follow from k, v.")
    if tuple(log_decay.shape[-3:]) not in ((H, T, 1), (H, T, Dk)):
        wanted = f"(*lead, H, T, 1 or Dk) = (*lead, {H}, {T}, 1 or {Dk})"
        remedy = "One decay for all features of a key has a last axis of size 1: unsqueeze(-1)."
        errors.fail(function, "log_decay", wanted, errors.shape(log_decay), remedy)
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape[-1:] != (T,)
    ):
        got = f"{mask.dtype} {errors.shape(mask)}" if isinstance(mask, Tensor) else f"{mask!r}"
        remedy = "True where there is a token; the order of the tokens is the mask of attention."
        errors.fail(function, "mask", f"bool (*lead, T) with T = {T}", got, remedy)
    given = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    errors.on_one_device(function, [*given.values(), *([] if mask is None else [mask])])
    if not errors.is_count(size, 1) or size & (size - 1):
        errors.fail(function, "chunk", "a power of two", size, f"{CHUNK} is usual.")
    leads = [x.shape[: -2 if name == "beta" else -3] for name, x in given.items()]
    leads += [] if mask is None else [mask.shape[:-1]]
    try:
        return torch.broadcast_shapes(*leads)
    except RuntimeError:
        got = ", ".join(f"{name} {errors.shape(x)}" for name, x in given.items())
        errors.fail(function, "leading axes", "those that broadcast", got, "Batches are the same.")
