"""The past as a value: a step proposes a delta, `commit` disposes of it.

    logits, delta = model.extend(params, tokens, cache)        reads the past, writes nothing
    cache = commit(cache, delta, n)                            a new past with the first n of it

So rejected speculation costs nothing, rewinding is keeping the older value, and forking is using it twice.

Three rules keep a past honest. Entries at or beyond `length` are unobservable, even NaN. Rows that are rejected, or beyond the
capacity, are written nowhere that counts. And a commit that does not fit writes nothing: eagerly it raises; inside vmap or a
compile, where values cannot be looked at, it leaves a length beyond every capacity, `OVERFLOWED`, which stays, and which turns all
later logits into NaN.

    protocol           the verbs, and what holds for all kinds
    rows               reading and writing rows
    dense              Cache: one tensor, room reserved
    paged              Pages: blocks, shared by forks
    quantized_blocks   QuantizedCache: 8 or 4 bits
    sliding_window     Ring: a window and sinks, constant memory
    branch             Branch: a tail behind a prefix; fork, flatten
    sharded            ShardedCache: rows on many devices
    static             Memory: another sequence, never written
    display            a cache in a line, and as a bar
"""

from . import display, rows
from .branch import Branch, flatten, fork, fork_many, rows_of
from .dense import Cache
from .paged import Pages, pages
from .protocol import (
    DONATED,
    OVERFLOWED,
    Admitted,
    Delta,
    admit,
    capacity,
    check_whole,
    commit,
    commit_donated,
    grow,
    keeps_all,
    overflowed,
    past,
    reset,
    reset_counts,
    sizes,
    with_length,
    write,
)
from .quantized_blocks import QuantizedBlock, QuantizedCache, quantized
from .rows import bucket
from .sharded import CONTEXT, ShardedCache
from .sliding_window import Ring, ring
from .static import Memory

# Earlier names, which go on working.
broken, join, follow, commit_own = overflowed, flatten, fork, commit_donated
Coded, Spread = QuantizedBlock, ShardedCache

__all__ = [
    "CONTEXT",
    "DONATED",
    "OVERFLOWED",
    "Admitted",
    "Branch",
    "Cache",
    "QuantizedBlock",
    "Delta",
    "Memory",
    "Pages",
    "QuantizedCache",
    "Ring",
    "ShardedCache",
    "admit",
    "overflowed",
    "bucket",
    "capacity",
    "check_whole",
    "commit",
    "commit_donated",
    "flatten",
    "fork",
    "fork_many",
    "grow",
    "keeps_all",
    "pages",
    "past",
    "display",
    "quantized",
    "reset",
    "reset_counts",
    "ring",
    "rows",
    "rows_of",
    "sizes",
    "with_length",
    "write",
]
