"""Key/value caches as values: `extend` returns the new rows as a delta, `commit` appends them.

    logits, delta = model.extend(params, tokens, cache)        reads the cache, writes nothing
    cache = commit(cache, delta, n)                            a new cache with the first n rows

So a rejected draft needs no undo, a rollback is keeping the older cache, and a fork is using one
cache twice.

Three rules hold for every kind. Rows at or beyond `length` never reach an output, even if they are
NaN. Rows that are rejected, or beyond the capacity, are not written below `length`. And a commit
that does not fit writes nothing: eagerly it raises; under vmap and torch.compile, where values are
not concrete, it sets a length beyond every capacity, `OVERFLOWED`, which stays, and which turns all
later logits into NaN.

    protocol           the verbs, and the rules of commit that every kind follows
    rows               reading and writing rows
    dense              Cache: one tensor of keys and one of values, preallocated
    paged              Pages: blocks, shared by forks
    quantized_blocks   QuantizedCache: 8 or 4 bits; codes their arithmetic
    sliding_window     Ring: a sliding window and attention sinks, constant memory
    branch             Branch: a tail behind a prefix; fork, flatten
    grouped            Grouped: one cache for each size of keys
    hybrid             Hybrid: rows of attention and the states of recurrent layers
    sharded            ShardedCache: rows divided among devices
    static             Memory: keys and values of another sequence, read only
    delta              what a step adds
    making             make: an empty cache of any kind
    display            a cache as one line of text, and as a bar in HTML
"""

from . import display, rows
from .branch import Branch, flatten, fork, fork_many, rows_of
from .codes import QuantizedBlock
from .delta import joined
from .dense import Cache
from .grouped import Grouped, in_groups
from .hybrid import Hybrid, with_states
from .making import make
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
    groups,
    grow,
    keeps_all,
    overflowed,
    past,
    reset,
    reset_counts,
    sizes,
    states,
    with_length,
    write,
)
from .protocol import KVCache as KVCache  # types, no verbs of a kind
from .protocol import Past as Past
from .quantized_blocks import QuantizedCache, quantized, rows_and_codes, why_not_coded
from .rows import bucket
from .sharded import CONTEXT, ShardedCache
from .sliding_window import Ring, ring
from .static import Memory

# Aliases: earlier names, kept for compatibility.
broken, join, follow, commit_own = overflowed, flatten, fork, commit_donated
_write = write
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
    "Grouped",
    "Hybrid",
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
    "groups",
    "in_groups",
    "joined",
    "keeps_all",
    "make",
    "pages",
    "past",
    "display",
    "quantized",
    "reset",
    "reset_counts",
    "ring",
    "rows",
    "rows_and_codes",
    "rows_of",
    "sizes",
    "states",
    "why_not_coded",
    "with_length",
    "with_states",
    "write",
]
