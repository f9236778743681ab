"""Device functions of the kernels: addresses, row blocks, products, intervals, and dropout words.

Pointers are offset to an example and a head (`locate`); blocks are (rows, WIDTH), WIDTH the power
of two that holds the features; statistics and sums are float32, and exponentials are powers of two.
"""

# pyright: reportInvalidTypeForm=false

from .language import jit, tl

__all__ = [
    "add_product",
    "block",
    "blocks_of",
    "bounds",
    "clean",
    "encipher",
    "keep",
    "vector",
    "locate",
    "product",
    "reach",
    "span",
    "store",
    "store_vector",
    "word",
]


@jit
def locate(index, sizes, strides):
    """The offset of a flat index over leading axes; sizes and strides: tuples, innermost last."""
    place = tl.zeros((), tl.int64)
    for n in tl.static_range(len(sizes)):
        place += (index % sizes[len(sizes) - 1 - n]).to(tl.int64) * strides[len(sizes) - 1 - n]
        index = index // sizes[len(sizes) - 1 - n]
    return place


@jit
def block(
    pointer,
    begin,
    limit,
    row,
    column,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Rows begin, begin + 1, ... as (ROWS, WIDTH); zero beyond `limit` (if EDGE) and FEATURES."""
    rows = tl.arange(0, ROWS)
    features = tl.arange(0, WIDTH)
    places = (
        pointer
        + (tl.zeros((), tl.int64) + begin) * row
        + rows[:, None] * row
        + features[None, :] * column
    )
    if EDGE:
        if FEATURES == WIDTH:
            return tl.load(places, mask=(begin + rows < limit)[:, None], other=0.0)
        return tl.load(
            places, mask=(begin + rows < limit)[:, None] & (features < FEATURES)[None, :], other=0.0
        )
    if FEATURES == WIDTH:
        return tl.load(places)
    return tl.load(places, mask=(features < FEATURES)[None, :], other=0.0)


@jit
def vector(pointer, begin, limit, row, other, ROWS: tl.constexpr, EDGE: tl.constexpr = True):
    """As `block`, for a matrix of one column, as (ROWS,); `other` beyond the limit (if EDGE)."""
    rows = tl.arange(0, ROWS)
    places = pointer + (tl.zeros((), tl.int64) + begin) * row + rows * row
    if EDGE:
        return tl.load(places, mask=begin + rows < limit, other=other)
    return tl.load(places)


@jit
def store(
    pointer,
    begin,
    limit,
    row,
    column,
    x,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write a block (ROWS, WIDTH) where it is inside the matrix, in the matrix's dtype."""
    rows = tl.arange(0, ROWS)
    features = tl.arange(0, WIDTH)
    places = (
        pointer
        + (tl.zeros((), tl.int64) + begin) * row
        + rows[:, None] * row
        + features[None, :] * column
    )
    inside = (begin + rows < limit)[:, None] & (features < FEATURES)[None, :]
    tl.store(places, x.to(pointer.dtype.element_ty), mask=inside)


@jit
def store_vector(pointer, begin, limit, row, x, ROWS: tl.constexpr):
    """As `store`, for a matrix of one column, x (ROWS,)."""
    rows = tl.arange(0, ROWS)
    places = pointer + (tl.zeros((), tl.int64) + begin) * row + rows * row
    tl.store(places, x.to(pointer.dtype.element_ty), mask=begin + rows < limit)


@jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32.

    "wide" is for the interpreter, which lacks bfloat16 arithmetic; bfloat16 products are exact in
    float32.
    """
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a @ b, total float32."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def clean(x, seen):
    """x (KEYS, WIDTH) with zeros for rows that are not finite, and which queries see one.

    seen is (ROWS, KEYS); the flags are (ROWS,).
    """
    bad = tl.max(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1), 1)
    return tl.where((bad > 0)[:, None], 0.0, x).to(x.dtype), tl.max(
        tl.where(seen, bad[None, :], 0), 1
    ) > 0


@jit
def reach(start, stop, real, S):
    """The keys that a block of rows sees, with one interval per row.

    Some row sees keys in [low, high), all rows see those in [begin, end). start, stop: int32
    (rows,); real: which rows exist. Ranges are empty if there are no keys.
    """
    stop = tl.minimum(stop, S)
    some = real & (start < stop)
    high = tl.max(tl.where(some, stop, 0), 0)
    low = tl.minimum(tl.min(tl.where(some, start, S), 0), high)
    begin = tl.max(tl.where(real, tl.where(some, start, S), 0), 0)
    end = tl.min(tl.where(real, tl.where(some, stop, 0), S), 0)
    return low, high, begin, end


@jit
def blocks_of(low, high, begin, end, BLOCK: tl.constexpr):
    """The ranges of `reach` in whole blocks: all rows see the blocks in [begin, end) whole.

    Of the other blocks, `left` start from low, and the rest from end. Returns low, begin, end,
    left, and the number of the others.
    """
    low = low // BLOCK * BLOCK
    high = tl.cdiv(high, BLOCK) * BLOCK
    begin = tl.minimum(tl.maximum(tl.cdiv(begin, BLOCK) * BLOCK, low), high)
    end = tl.minimum(tl.maximum(end // BLOCK * BLOCK, begin), high)
    left = (begin - low) // BLOCK
    return low, begin, end, left, left + (high - end) // BLOCK


@jit
def encipher(a, b, counts):
    """Threefry-2x32 of the pairs (0, counts) under the words a and b, all uint32: see
    funcattn.randomness.
    """
    c = a ^ b ^ 0x1BD11BDA
    x = a + counts * 0
    y = b + counts
    x, y = four(x, y, 13, 15, 26, 6)
    x, y = four(x + b, y + c + 1, 17, 29, 16, 24)
    x, y = four(x + c, y + a + 2, 13, 15, 26, 6)
    x, y = four(x + a, y + b + 3, 17, 29, 16, 24)
    x, y = four(x + b, y + c + 4, 13, 15, 26, 6)
    return x + c, y + a + 5


@jit
def four(x, y, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Four rounds of the cipher."""
    x, y = turn(x, y, A)
    x, y = turn(x, y, B)
    x, y = turn(x, y, C)
    return turn(x, y, D)


@jit
def turn(x, y, BITS: tl.constexpr):
    """One round of the cipher: add, rotate, xor."""
    x = x + y
    return x, ((y << BITS) | (y >> (32 - BITS))) ^ x


@jit
def word(pointer):
    """The low 32 bits of an int64, as uint32."""
    return tl.load(pointer).to(tl.int32).to(tl.uint32, bitcast=True)


@jit
def keep(a, b, keys, threshold, kept):
    """The dropout factor: `kept` where the pair's word is at least the threshold, else 0.

    a, b: the words of the rows.
    """
    x, y = encipher(a, b, keys)
    return tl.where((x ^ y) >= threshold, kept, 0.0)


@jit
def span(table, interval, count, first, last, BLOCK: tl.constexpr):
    """The queries that see the keys [first, last) in an interval, in whole blocks, from `bounds`.

    Some query of [low, high) sees some of them; every query of [begin, end) sees all of them.
    """
    table += interval * count * 4
    low = tl.zeros((), tl.int32) + count
    high = tl.zeros((), tl.int32)
    begin = low
    for at in range(0, count, 128):
        n = at + tl.arange(0, 128)
        some, every = meets(table, n, count, first, last)
        low = tl.minimum(low, tl.min(tl.where(some, n, count), 0))
        high = tl.maximum(high, tl.max(tl.where(some, n + 1, 0), 0))
        begin = tl.minimum(begin, tl.min(tl.where(every, n, count), 0))
    end = high
    for at in range(0, count, 128):
        n = at + tl.arange(0, 128)
        some, every = meets(table, n, count, first, last)
        end = tl.minimum(end, tl.min(tl.where((n < begin) | every, high, n), 0))
    return tl.minimum(low, high) * BLOCK, high * BLOCK, begin * BLOCK, end * BLOCK


@jit
def meets(table, n, count, first, last):
    """Which blocks of queries see some of the keys [first, last), and which see all."""
    low = tl.load(table + n * 4, mask=n < count, other=0)
    high = tl.load(table + n * 4 + 1, mask=n < count, other=0)
    begin = tl.load(table + n * 4 + 2, mask=n < count, other=0)
    end = tl.load(table + n * 4 + 3, mask=n < count, other=0)
    some = (low < last) & (high > first) & (low < high)
    return some, some & (begin <= first) & (end >= last)


@jit
def bounds(start, stop, table, T, S, INTERVALS: tl.constexpr, ROWS: tl.constexpr):
    """`reach` for each block of queries and interval: int32 (heads, INTERVALS, blocks, 4)."""
    count = tl.cdiv(T, ROWS)
    head = tl.program_id(0) // count
    first = tl.program_id(0) % count * ROWS
    real = first + tl.arange(0, ROWS) < T
    for interval in range(INTERVALS):
        starts = vector(
            start + head.to(tl.int64) * T * INTERVALS + interval, first, T, INTERVALS, 0, ROWS
        )
        stops = vector(
            stop + head.to(tl.int64) * T * INTERVALS + interval, first, T, INTERVALS, 0, ROWS
        )
        low, high, begin, end = reach(starts, stops, real, S)
        to = table + ((head.to(tl.int64) * INTERVALS + interval) * count + first // ROWS) * 4
        tl.store(to, low)
        tl.store(to + 1, high)
        tl.store(to + 2, begin)
        tl.store(to + 3, end)
