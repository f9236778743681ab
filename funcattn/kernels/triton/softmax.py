"""The kernel of `attend`: a streaming softmax, one program for a block of queries of one head.

It visits the blocks of keys that some query of the block sees, interval by interval: first those at the edges, where each pair is
looked at, then those that every query sees whole. Heads that share a key read the same one by a stride of zero.

Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1.
"""

# pyright: reportInvalidTypeForm=false

from .language import jit, tl
from .pieces import add_product, block, blocks_of, line, locate, product, reach, store, store_line


@jit
def attend(
    q,
    k,
    v,
    start,
    stop,
    out,
    lse,
    sizes,
    q_at,
    k_at,
    v_at,
    mask_at,
    out_at,
    lse_at,
    q_row,
    q_column,
    k_row,
    k_column,
    v_row,
    v_column,
    T,
    S,
    scale,
    D: tl.constexpr,
    Dv: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr,
    INTERVALS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """out (T, Dv) and lse (T,) of each head. The arguments that end in _at are tuples of strides over leading axes of `sizes`;
    scale > 0 is that of the logits in powers of two; start and stop are int32 (T, INTERVALS), of canonical intervals."""
    lines = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // lines
    first = (lines - 1 - tl.program_id(0) % lines) * ROWS  # under a causal mask the last queries take longest: they go first
    k += locate(head, sizes, k_at)
    v += locate(head, sizes, v_at)
    start += locate(head, sizes, mask_at)
    stop += locate(head, sizes, mask_at)
    x = block(q + locate(head, sizes, q_at), first, T, q_row, q_column, D, WIDTH, ROWS, True)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH_V), tl.float32)
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
            top, mass, total = see(
                x, k, v, starts, stops, at, S, k_row, k_column, v_row, v_column, scale, top, mass, total,
                D, Dv, WIDTH, WIDTH_V, PRECISION, KEYS, True,
            )  # fmt: skip
        for at in range(begin, end, KEYS):
            top, mass, total = see(
                x, k, v, starts, stops, at, S, k_row, k_column, v_row, v_column, scale, top, mass, total,
                D, Dv, WIDTH, WIDTH_V, PRECISION, KEYS, False,
            )  # fmt: skip
    total = total / tl.where(mass == 0, 1.0, mass)[:, None]
    top = tl.where(mass == 0, float("-inf"), (top + tl.log2(tl.where(mass == 0, 1.0, mass))) * 0.6931471805599453)
    store(out + locate(head, sizes, out_at), first, T, Dv, 1, total, Dv, WIDTH_V, ROWS)
    store_line(lse + locate(head, sizes, lse_at), first, T, 1, top, ROWS)


@jit
def see(
    x, k, v, starts, stops, at, S, k_row, k_column, v_row, v_column, scale, top, mass, total,
    D: tl.constexpr, Dv: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    PRECISION: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take one block of keys in: the greatest logit so far, the mass and the mixed values, rescaled to it."""
    y = block(k, at, S, k_row, k_column, D, WIDTH, KEYS, EDGE)
    s = product(x, tl.trans(y), PRECISION)
    if EDGE:
        keys = (at + tl.arange(0, KEYS))[None, :]
        s = tl.where((starts[:, None] <= keys) & (keys < tl.minimum(stops, S)[:, None]), s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * scale)  # once a row, as scale > 0; that of a pair is one operation with the difference
    base = tl.where(higher == float("-inf"), 0.0, higher) if EDGE else higher
    p = tl.exp2(s * scale - base[:, None])
    fade = tl.exp2(top - base)
    z = block(v, at, S, v_row, v_column, Dv, WIDTH_V, KEYS, EDGE)
    total = add_product(total * fade[:, None], p.to(z.dtype), z, PRECISION)
    return higher, mass * fade + tl.sum(p, 1), total
