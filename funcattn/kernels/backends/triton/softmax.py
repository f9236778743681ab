"""The attention kernel: a streaming softmax, a program per block of queries and head.

It loops over the blocks of keys that some query of the block sees, interval by interval: first
those at the edges, which are masked per pair, then those that every query sees whole. Query heads
of one key head read it by a stride of zero.

With S = scale q . k and S' = scale (q' . k + q . k'), p the unnormalized weights and m their sum,

    out = (sum p v) / m        lse' = (sum p S') / m
    out' = (sum p S' v + p v') / m - lse' out

so each block of weights is computed once for the value and the tangent: six products of T x S,
where a pass for the value and a contraction for the tangent take seven, and half the exponentials.
An input without a tangent adds no work; without any tangent, the kernel computes only the value.

Logits minus the row max are one fused operation with one rounding: the exact s * scale, minus the
rounded row max. Beyond FAR that rounding error is itself large; there the scale is replaced by the
power of two above it, whose products are exact. This changes no weight: two such logits are equal,
or so far apart that the weight of the smaller is zero.

`statistics` does the same for a contraction: if the log-sum-exp of a row is too large to hold the
log of the normalizer, it recomputes both.

Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1, and its jvp, with sums rescaled
likewise.
"""

# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false

from .language import jit, tl
from .pieces import (
    add_product,
    block,
    blocks_of,
    clean,
    locate,
    product,
    reach,
    store,
    store_vector,
    vector,
)

# half a unit in the last place is 32 to 64 there: still a power of two that float32 holds
FAR = tl.constexpr(2.0**30)
LARGE = tl.constexpr(512.0)  # as torch_blocks.FAR


@jit
def attend(
    q, k, v, dq, dk, dv, start, stop, out, lse, dout, dlse, sizes,
    q_at, k_at, v_at, dq_at, dk_at, dv_at, mask_at, out_at, lse_at, dout_at, dlse_at,
    q_step, k_step, v_step, dq_step, dk_step, dv_step, T, S, scale, power, steepness,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr, INTERVALS: tl.constexpr,
    PRECISION: tl.constexpr, FACTORED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out and dout (T, Dv), lse and dlse (T,) of each head; dq, dk, dv are read if they exist.

    Arguments that end in _at are tuples of strides over leading axes of `sizes`, those in _step
    (row, column) strides; start and stop are int32 (T, INTERVALS), canonical intervals; scale > 0
    multiplies logits in powers of two, power is the power of two at or above it, steepness the
    scale of tangents.
    """
    HAS_TANGENT: tl.constexpr = HAS_DQ or HAS_DK or HAS_DV
    q_blocks = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // q_blocks
    # the last queries of a causal mask take longest
    first = (q_blocks - 1 - tl.program_id(0) % q_blocks) * ROWS
    k += locate(head, sizes, k_at)
    v += locate(head, sizes, v_at)
    start += locate(head, sizes, mask_at)
    stop += locate(head, sizes, mask_at)
    x = block(q + locate(head, sizes, q_at), first, T, q_step[0], q_step[1], D, WIDTH, ROWS, True)
    dx = x
    if HAS_DQ:
        dx = block(
            dq + locate(head, sizes, dq_at), first, T, dq_step[0], dq_step[1], D, WIDTH, ROWS, True
        )
    if HAS_DK:
        dk += locate(head, sizes, dk_at)
    if HAS_DV:
        dv += locate(head, sizes, dv_at)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    normalizer = tl.zeros((ROWS,), tl.float32)
    accumulator = tl.zeros((ROWS, WIDTH_V), tl.float32)
    dnormalizer = tl.zeros((ROWS,), tl.float32)
    daccumulator = tl.zeros((ROWS, WIDTH_V), tl.float32)
    real = first + tl.arange(0, ROWS) < T
    starts = tl.zeros((ROWS,), tl.int32)
    stops = tl.zeros((ROWS,), tl.int32) + S
    for interval in range(INTERVALS if INTERVALS else 1):
        if INTERVALS:
            starts = vector(start + interval, first, T, INTERVALS, 0, ROWS)
            stops = vector(stop + interval, first, T, INTERVALS, 0, ROWS)
        low, high, begin, end = reach(starts, stops, real, S)
        low, begin, end, left, others = blocks_of(low, high, begin, end, KEYS)
        for n in range(others):
            at = tl.where(n < left, low + n * KEYS, end + (n - left) * KEYS)
            row_max, normalizer, accumulator, dnormalizer, daccumulator = see(
                x, dx, k, v, dk, dv, starts, stops, at, S, k_step, v_step, dk_step, dv_step,
                scale, power, steepness,
                row_max, normalizer, accumulator, dnormalizer, daccumulator,
                D, Dv, WIDTH, WIDTH_V, HAS_DQ, HAS_DK, HAS_DV, PRECISION, FACTORED, KEYS, True,
            )  # fmt: skip
        for at in range(begin, end, KEYS):
            row_max, normalizer, accumulator, dnormalizer, daccumulator = see(
                x, dx, k, v, dk, dv, starts, stops, at, S, k_step, v_step, dk_step, dv_step,
                scale, power, steepness,
                row_max, normalizer, accumulator, dnormalizer, daccumulator,
                D, Dv, WIDTH, WIDTH_V, HAS_DQ, HAS_DK, HAS_DV, PRECISION, FACTORED, KEYS, False,
            )  # fmt: skip
    # a query without visible keys has sums of zero
    normalizer = tl.where(normalizer == 0, 1.0, normalizer)
    accumulator = accumulator / normalizer[:, None]
    store(out + locate(head, sizes, out_at), first, T, Dv, 1, accumulator, Dv, WIDTH_V, ROWS)
    row_max = tl.where(tl.abs(row_max) < FAR, row_max, row_max * (scale / power))
    store_vector(
        lse + locate(head, sizes, lse_at),
        first,
        T,
        1,
        (row_max + tl.log2(normalizer)) * 0.6931471805599453,
        ROWS,
    )
    if HAS_TANGENT:
        dnormalizer = dnormalizer / normalizer
        daccumulator = daccumulator / normalizer[:, None] - dnormalizer[:, None] * accumulator
        store(dout + locate(head, sizes, dout_at), first, T, Dv, 1, daccumulator, Dv, WIDTH_V, ROWS)
        store_vector(dlse + locate(head, sizes, dlse_at), first, T, 1, dnormalizer, ROWS)


@jit
def see(
    x, dx, k, v, dk, dv, starts, stops, at, S, k_step, v_step, dk_step, dv_step,
    scale, power, steepness,
    row_max, normalizer, accumulator, dnormalizer, daccumulator,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    PRECISION: tl.constexpr, FACTORED: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Process one block of keys: update the row max, the sums, and their tangents."""
    y = block(k, at, S, k_step[0], k_step[1], D, WIDTH, KEYS, EDGE)
    s = product(x, tl.trans(y), PRECISION)
    if EDGE:
        keys = (at + tl.arange(0, KEYS))[None, :]
        seen = (starts[:, None] <= keys) & (keys < tl.minimum(stops, S)[:, None])
        s = tl.where(seen, s, float("-inf"))
    high = tl.max(s, 1)
    # monotonic in s, since both factors are positive
    high = tl.where(tl.abs(high * scale) < FAR, high * scale, high * power)
    higher = tl.maximum(row_max, high)
    near = tl.abs(higher) < FAR
    base = tl.where(higher == float("-inf"), 0.0, higher) if EDGE else higher
    p = tl.exp2(s * tl.where(near, scale, power)[:, None] - base[:, None])
    rescale = tl.where((tl.abs(row_max) < FAR) == near, tl.exp2(row_max - base), 0.0)
    z = block(v, at, S, v_step[0], v_step[1], Dv, WIDTH_V, KEYS, EDGE)
    if EDGE:
        z, spoilt = clean(z, seen)
        accumulator = tl.where(spoilt[:, None], float("nan"), accumulator)
        daccumulator = tl.where(spoilt[:, None], float("nan"), daccumulator)
    accumulator = add_product(accumulator * rescale[:, None], p.to(z.dtype), z, PRECISION)
    if HAS_DQ or HAS_DK or HAS_DV:
        daccumulator = daccumulator * rescale[:, None]
    if HAS_DV:
        dz = block(dv, at, S, dv_step[0], dv_step[1], Dv, WIDTH_V, KEYS, EDGE)
        if EDGE:
            dz, spoilt = clean(dz, seen)
            daccumulator = tl.where(spoilt[:, None], float("nan"), daccumulator)
        daccumulator = add_product(daccumulator, p.to(dz.dtype), dz, PRECISION)
    if HAS_DQ or HAS_DK:
        if HAS_DK:
            dy = block(dk, at, S, dk_step[0], dk_step[1], D, WIDTH, KEYS, EDGE)
            ds = product(x, tl.trans(dy), PRECISION)
            if HAS_DQ:
                ds = add_product(ds, dx, tl.trans(y), PRECISION)
        else:
            ds = product(dx, tl.trans(y), PRECISION)
        w = p * ds * steepness
        if EDGE:
            w = tl.where(seen, w, 0.0)  # a tangent may be NaN at hidden pairs
        dnormalizer = dnormalizer * rescale + tl.sum(w, 1)
        if z.dtype == tl.float16:
            # w may exceed the range of float16
            daccumulator = add_product(daccumulator, w, z.to(tl.float32), FACTORED)
        else:
            daccumulator = add_product(daccumulator, w.to(z.dtype), z, PRECISION)
    return higher, normalizer * rescale + tl.sum(p, 1), accumulator, dnormalizer, daccumulator


@jit
def statistics(
    q, k, start, stop, lse, shift, shifted_lse, sizes, q_at, k_at, mask_at, lse_at, shift_at,
    q_step, k_step, T, S, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, INTERVALS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """shift and shifted_lse (T,) of each head: the weights are exp2((q . k - shift) scale) /
    exp(shifted_lse).

    They are zero and the log-sum-exp; in rows where that is large, the largest q . k and the log of
    the normalizer, from another pass.
    """
    q_blocks = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // q_blocks
    first = tl.program_id(0) % q_blocks * ROWS
    old = vector(lse + locate(head, sizes, lse_at), first, T, 1, 0.0, ROWS)
    far = (tl.abs(old) > LARGE) & (old != float("-inf"))
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    normalizer = tl.zeros((ROWS,), tl.float32)
    if tl.max(far.to(tl.int32), 0) > 0:
        k += locate(head, sizes, k_at)
        start += locate(head, sizes, mask_at)
        stop += locate(head, sizes, mask_at)
        x = block(
            q + locate(head, sizes, q_at), first, T, q_step[0], q_step[1], D, WIDTH, ROWS, True
        )
        real = first + tl.arange(0, ROWS) < T
        starts = tl.zeros((ROWS,), tl.int32)
        stops = tl.zeros((ROWS,), tl.int32) + S
        for interval in range(INTERVALS if INTERVALS else 1):
            if INTERVALS:
                starts = vector(start + interval, first, T, INTERVALS, 0, ROWS)
                stops = vector(stop + interval, first, T, INTERVALS, 0, ROWS)
            low, high, begin, end = reach(starts, stops, real, S)
            for at in range(low // KEYS * KEYS, high, KEYS):
                s = product(
                    x,
                    tl.trans(block(k, at, S, k_step[0], k_step[1], D, WIDTH, KEYS, True)),
                    PRECISION,
                )
                keys = (at + tl.arange(0, KEYS))[None, :]
                s = tl.where(
                    (starts[:, None] <= keys) & (keys < tl.minimum(stops, S)[:, None]),
                    s,
                    float("-inf"),
                )
                higher = tl.maximum(row_max, tl.max(s, 1))
                base = tl.where(higher == float("-inf"), 0.0, higher)
                normalizer = normalizer * tl.exp2((row_max - base) * scale) + tl.sum(
                    tl.exp2((s - base[:, None]) * scale), 1
                )
                row_max = higher
    row_max = tl.where(far, row_max, 0.0)
    new = tl.where(far, tl.log2(tl.where(far, normalizer, 1.0)) * 0.6931471805599453, old)
    store_vector(shift + locate(head, sizes, shift_at), first, T, 1, row_max, ROWS)
    store_vector(shifted_lse + locate(head, sizes, shift_at), first, T, 1, new, ROWS)
