"""The kernel of `attend`: a streaming softmax, one program for a block of queries of one head, with the tangents of its sums.

It visits the blocks of keys that some query of the block sees, interval by interval: first those at the edges, where each pair is
looked at, then those that every query sees whole. Heads that share a key read the same one by a stride of zero.

With S = scale q . k and S' = scale (q' . k + q . k'), p the weights before they are divided by their sum m,

    out = (sum p v) / m        lse' = (sum p S') / m        out' = (sum p S' v + p v') / m - lse' out

so each block of weights is made once for the value and the tangent: six products of T x S where a pass for the value and a sweep
for the tangent make seven, and half the exponentials. What is not moved has no tangent and is not read; where nothing is, the
kernel is that of the value alone.

Logits are s * scale less the greatest, in one operation of one rounding: the exact s * scale, less the rounded greatest. Beyond FAR
that difference is itself far from zero; the scale is replaced there by the power of two above it, whose products are exact. No
pair notices: two such logits are equal, or so far apart that the smaller weighs nothing.

`statistics` does the same for a sweep: where the log-sum-exp of a row cannot hold the log of the normalizer, it makes both anew.

Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1, and its jvp, whose sums are rescaled alike.
"""

# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false

from .language import jit, tl
from .pieces import add_product, block, blocks_of, clean, line, locate, product, reach, store, store_line

FAR = tl.constexpr(2.0**30)  # half a unit in the last place is 32 to 64 there: still a power of two that float32 holds
LARGE = tl.constexpr(512.0)  # as blocks.FAR


@jit
def attend(
    q, k, v, dq, dk, dv, start, stop, out, lse, dout, dlse, sizes,
    q_at, k_at, v_at, dq_at, dk_at, dv_at, mask_at, out_at, lse_at, dout_at, dlse_at,
    q_step, k_step, v_step, dq_step, dk_step, dv_step, T, S, scale, power, steepness,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    MOVES_Q: tl.constexpr, MOVES_K: tl.constexpr, MOVES_V: tl.constexpr, INTERVALS: tl.constexpr,
    PRECISION: tl.constexpr, FACTORED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out and dout (T, Dv), lse and dlse (T,) of each head; the tangents dq, dk, dv as far as they move.

    The arguments that end in _at are tuples of strides over leading axes of `sizes`, those in _step of (row, column) strides;
    start and stop are int32 (T, INTERVALS), of canonical intervals; scale > 0 is that of the logits in powers of two, power the
    power of two at or above it, steepness the scale of their tangents.
    """
    MOVES: tl.constexpr = MOVES_Q or MOVES_K or MOVES_V
    lines = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // lines
    first = (lines - 1 - tl.program_id(0) % lines) * ROWS  # the last queries of a causal mask take longest
    k += locate(head, sizes, k_at)
    v += locate(head, sizes, v_at)
    start += locate(head, sizes, mask_at)
    stop += locate(head, sizes, mask_at)
    x = block(q + locate(head, sizes, q_at), first, T, q_step[0], q_step[1], D, WIDTH, ROWS, True)
    dx = x
    if MOVES_Q:
        dx = block(dq + locate(head, sizes, dq_at), first, T, dq_step[0], dq_step[1], D, WIDTH, ROWS, True)
    if MOVES_K:
        dk += locate(head, sizes, dk_at)
    if MOVES_V:
        dv += locate(head, sizes, dv_at)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH_V), tl.float32)
    dmass = tl.zeros((ROWS,), tl.float32)
    dtotal = tl.zeros((ROWS, WIDTH_V), tl.float32)
    real = first + tl.arange(0, ROWS) < T
    starts = tl.zeros((ROWS,), tl.int32)
    stops = tl.zeros((ROWS,), tl.int32) + S
    for interval in range(INTERVALS if INTERVALS else 1):
        if INTERVALS:
            starts = line(start + interval, first, T, INTERVALS, 0, ROWS)
            stops = line(stop + interval, first, T, INTERVALS, 0, ROWS)
        low, high, begin, end = reach(starts, stops, real, S)
        low, begin, end, left, others = blocks_of(low, high, begin, end, KEYS)
        for n in range(others):
            at = tl.where(n < left, low + n * KEYS, end + (n - left) * KEYS)
            top, mass, total, dmass, dtotal = see(
                x, dx, k, v, dk, dv, starts, stops, at, S, k_step, v_step, dk_step, dv_step, scale, power, steepness,
                top, mass, total, dmass, dtotal,
                D, Dv, WIDTH, WIDTH_V, MOVES_Q, MOVES_K, MOVES_V, PRECISION, FACTORED, KEYS, True,
            )  # fmt: skip
        for at in range(begin, end, KEYS):
            top, mass, total, dmass, dtotal = see(
                x, dx, k, v, dk, dv, starts, stops, at, S, k_step, v_step, dk_step, dv_step, scale, power, steepness,
                top, mass, total, dmass, dtotal,
                D, Dv, WIDTH, WIDTH_V, MOVES_Q, MOVES_K, MOVES_V, PRECISION, FACTORED, KEYS, False,
            )  # fmt: skip
    mass = tl.where(mass == 0, 1.0, mass)  # of a query that saw nothing, whose sums are zero
    total = total / mass[:, None]
    store(out + locate(head, sizes, out_at), first, T, Dv, 1, total, Dv, WIDTH_V, ROWS)
    top = tl.where(tl.abs(top) < FAR, top, top * (scale / power))
    store_line(lse + locate(head, sizes, lse_at), first, T, 1, (top + tl.log2(mass)) * 0.6931471805599453, ROWS)
    if MOVES:
        dmass = dmass / mass
        dtotal = dtotal / mass[:, None] - dmass[:, None] * total
        store(dout + locate(head, sizes, dout_at), first, T, Dv, 1, dtotal, Dv, WIDTH_V, ROWS)
        store_line(dlse + locate(head, sizes, dlse_at), first, T, 1, dmass, ROWS)


@jit
def see(
    x, dx, k, v, dk, dv, starts, stops, at, S, k_step, v_step, dk_step, dv_step, scale, power, steepness,
    top, mass, total, dmass, dtotal,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    MOVES_Q: tl.constexpr, MOVES_K: tl.constexpr, MOVES_V: tl.constexpr,
    PRECISION: tl.constexpr, FACTORED: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take one block of keys in: the greatest logit so far, and rescaled to it the mass, the mixed values, and their tangents."""
    y = block(k, at, S, k_step[0], k_step[1], D, WIDTH, KEYS, EDGE)
    s = product(x, tl.trans(y), PRECISION)
    if EDGE:
        keys = (at + tl.arange(0, KEYS))[None, :]
        seen = (starts[:, None] <= keys) & (keys < tl.minimum(stops, S)[:, None])
        s = tl.where(seen, s, float("-inf"))
    high = tl.max(s, 1)
    high = tl.where(tl.abs(high * scale) < FAR, high * scale, high * power)  # grows with s, as both are above zero
    higher = tl.maximum(top, high)
    near = tl.abs(higher) < FAR
    base = tl.where(higher == float("-inf"), 0.0, higher) if EDGE else higher
    p = tl.exp2(s * tl.where(near, scale, power)[:, None] - base[:, None])
    fade = tl.where((tl.abs(top) < FAR) == near, tl.exp2(top - base), 0.0)
    z = block(v, at, S, v_step[0], v_step[1], Dv, WIDTH_V, KEYS, EDGE)
    if EDGE:
        z, spoilt = clean(z, seen)
        total = tl.where(spoilt[:, None], float("nan"), total)
        dtotal = tl.where(spoilt[:, None], float("nan"), dtotal)
    total = add_product(total * fade[:, None], p.to(z.dtype), z, PRECISION)
    if MOVES_Q or MOVES_K or MOVES_V:
        dtotal = dtotal * fade[:, None]
    if MOVES_V:
        dz = block(dv, at, S, dv_step[0], dv_step[1], Dv, WIDTH_V, KEYS, EDGE)
        if EDGE:
            dz, spoilt = clean(dz, seen)
            dtotal = tl.where(spoilt[:, None], float("nan"), dtotal)
        dtotal = add_product(dtotal, p.to(dz.dtype), dz, PRECISION)
    if MOVES_Q or MOVES_K:
        if MOVES_K:
            dy = block(dk, at, S, dk_step[0], dk_step[1], D, WIDTH, KEYS, EDGE)
            ds = product(x, tl.trans(dy), PRECISION)
            if MOVES_Q:
                ds = add_product(ds, dx, tl.trans(y), PRECISION)
        else:
            ds = product(dx, tl.trans(y), PRECISION)
        w = p * ds * steepness
        if EDGE:
            w = tl.where(seen, w, 0.0)  # a tangent may be NaN where nothing is seen
        dmass = dmass * fade + tl.sum(w, 1)
        if z.dtype == tl.float16:
            dtotal = add_product(dtotal, w, z.to(tl.float32), FACTORED)  # it may exceed float16
        else:
            dtotal = add_product(dtotal, w.to(z.dtype), z, PRECISION)
    return higher, mass * fade + tl.sum(p, 1), total, dmass, dtotal


@jit
def statistics(
    q, k, start, stop, lse, shift, level, sizes, q_at, k_at, mask_at, lse_at, shift_at, q_step, k_step, T, S, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, INTERVALS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """shift (T,) and level (T,) of each head, such that the weights are exp2((q . k - shift) scale) / exp(level).

    Zero and the log-sum-exp; in rows where that is large the greatest q . k and the log of the normalizer, from another pass.
    """
    lines = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // lines
    first = tl.program_id(0) % lines * ROWS
    old = line(lse + locate(head, sizes, lse_at), first, T, 1, 0.0, ROWS)
    far = (tl.abs(old) > LARGE) & (old != float("-inf"))
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    if tl.max(far.to(tl.int32), 0) > 0:
        k += locate(head, sizes, k_at)
        start += locate(head, sizes, mask_at)
        stop += locate(head, sizes, mask_at)
        x = block(q + locate(head, sizes, q_at), first, T, q_step[0], q_step[1], D, WIDTH, ROWS, True)
        real = first + tl.arange(0, ROWS) < T
        starts = tl.zeros((ROWS,), tl.int32)
        stops = tl.zeros((ROWS,), tl.int32) + S
        for interval in range(INTERVALS if INTERVALS else 1):
            if INTERVALS:
                starts = line(start + interval, first, T, INTERVALS, 0, ROWS)
                stops = line(stop + interval, first, T, INTERVALS, 0, ROWS)
            low, high, begin, end = reach(starts, stops, real, S)
            for at in range(low // KEYS * KEYS, high, KEYS):
                s = product(x, tl.trans(block(k, at, S, k_step[0], k_step[1], D, WIDTH, KEYS, True)), PRECISION)
                keys = (at + tl.arange(0, KEYS))[None, :]
                s = tl.where((starts[:, None] <= keys) & (keys < tl.minimum(stops, S)[:, None]), s, float("-inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                base = tl.where(higher == float("-inf"), 0.0, higher)
                mass = mass * tl.exp2((top - base) * scale) + tl.sum(tl.exp2((s - base[:, None]) * scale), 1)
                top = higher
    top = tl.where(far, top, 0.0)
    new = tl.where(far, tl.log2(tl.where(far, mass, 1.0)) * 0.6931471805599453, old)
    store_line(shift + locate(head, sizes, shift_at), first, T, 1, top, ROWS)
    store_line(level + locate(head, sizes, shift_at), first, T, 1, new, ROWS)
