"""Loops over a cache whose text may have to be read again (see `lengths`).

`Model.hidden` is correct behind any cache; these functions reduce how often it reads a text again,
and compute rows of texts of several lengths in one step. They change nothing for a model whose
rotary angles do not depend on the length.
"""

from typing import cast

import torch
from torch import Tensor

from .. import caches
from ..caches import Branch, Cache, Delta, KVCache, Pages, Ring
from ..core import errors
from ..models import Model, Past
from ..records import is_absent
from ..tree import Tree
from . import lengths
from .config import Config


def follower(model: Model) -> Config | None:
    """The Config of a model whose angles follow the length; None for others or without a Config."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Config) and config.follows_length else None


def first_chunk(model: Model, cache: Past, T: int, chunk: int) -> int:
    """How many tokens of a prompt of T to read first, so that none of them is read twice.

    The first chunk extends beyond the context where the prompt does.
    """
    config = follower(model)
    if config is None or config.rope_scaling is None:
        return chunk
    known = errors.peek(cache.length) if not is_absent(cache) else None
    before = 0 if known is None else int(known.min())
    within = config.rope_scaling.context + 1 - before
    return (
        chunk if within > T else T if config.rope_scaling.kind == "dynamic" else max(chunk, within)
    )


def places(
    model: Model, cache: Past, begin: int, end: int, prompt_length: Tensor | None
) -> Tensor | None:
    """Positions begin to end of a padded prompt; padding has the position of the last token.

    So padding makes no text longer. None where positions need not be given.
    """
    if prompt_length is None or follower(model) is None:
        return None
    here = torch.arange(begin, end, device=prompt_length.device)
    return torch.minimum(here, prompt_length - 1) + (0 if is_absent(cache) else cache.length)


def one_by_one(model: Model, params: Tree, tokens: Tensor, cache: Past) -> tuple[Tensor, Delta]:
    """`model.hidden` (T, E) of tokens (T,) read one at a time, and their delta.

    For caches that drop or quantize tokens: in one pass the new tokens would attend to each other
    unquantized and at any distance.
    """
    past, rows, deltas = cast(KVCache, cache), [], []  # `fork_many` makes one of ()
    for token in tokens.unbind():
        x, delta = model.hidden(params, token.reshape(1), past)
        past = caches.commit(
            caches.fork_many(past, delta, len(tokens)) if past is cache else past, delta
        )
        rows.append(x[0])
        deltas.append(delta)
    return torch.stack(rows), caches.joined(deltas)


def along(model: Model, params: Tree, tokens: Tensor, cache: KVCache) -> tuple[Tensor, Delta]:
    """`model.extend` where row t is that of the text ending with token t, whatever follows."""
    # Within the window of a Ring no token is dropped.
    all_near = isinstance(cache, Ring) and len(tokens) <= cache.k.shape[-2] + 1
    if len(tokens) > 1 and not all_near and not caches.keeps_all(cache):
        x, delta = one_by_one(model, params, tokens, cache)
        return model.logits(params, x), delta
    config = follower(model)
    if config is None or config.rope_scaling is None:
        return model.extend(params, tokens, cache)
    ends = [errors.peek(cache.length + n) for n in (1, len(tokens))]
    known = [end > config.rope_scaling.context for end in ends if end is not None]
    one_length = len(known) == 2 and bool((known[0] == known[1]).all())
    if one_length and (config.rope_scaling.kind == "longrope" or not bool(known[1].any())):
        return model.extend(params, tokens, cache)
    each = [model.extend(params, tokens[:n], cache) for n in range(1, len(tokens) + 1)]
    return torch.stack([logits[-1] for logits, _ in each]), each[-1][1]


def hidden_of_tree(
    model: Model, params: Tree, tokens: Tensor, cache: KVCache, *, above: Tensor
) -> tuple[Tensor, Delta]:
    """`model.hidden` of a tree of drafts: each node sees the cache, itself and the nodes above it.

    Its position is its depth behind the cache.

    Args:
        tokens: int64 (M + 1,), node 0 is the last token of the text.
        above: bool (M + 1, M + 1), [n, a] True where a is n or above it.
    """
    if len(tokens) == 1:  # the plain step, which compiled models take in one call
        return model.hidden(params, tokens, cache)
    positions = cache.length + above.long().sum(-1) - 1
    return model.hidden(params, tokens, cache, mask=above, positions=positions)


def along_tree(
    model: Model, params: Tree, tokens: Tensor, cache: KVCache, *, above: Tensor, depth: int
) -> tuple[Tensor, Delta]:
    """`along` for a tree: row n has the logits of the text that ends with the token of node n.

    Raises:
        TypeError: a cache that drops or encodes tokens within a draft of this depth, or has
            recurrent states.
    """
    if caches.states(cache):
        remedy = "Draft a chain: by fa.drafters.model, or prompt_lookup."
        got, wanted = "a tree", "one of chains behind recurrent states, which read in one order"
        errors.fail("speculate", "drafter", wanted, got, remedy, TypeError)
    all_near = isinstance(cache, Ring) and depth <= cache.k.shape[-2]
    if not all_near and not caches.keeps_all(cache):
        got = (
            f"a {type(cache).__name__}, in which a token of a draft may not see another as it came"
        )
        remedy = "Draft a chain, which is read token by token there; or use a longer window."
        errors.fail(
            "speculate", "cache", f"one that keeps {depth + 1} tokens", got, remedy, TypeError
        )
    x, delta = hidden_of_tree(model, params, tokens, cache, above=above)
    config = follower(model)
    if config is None or config.rope_scaling is None:
        return model.logits(params, x), delta
    nodes = torch.arange(len(tokens), device=tokens.device)
    rows = []
    for n in range(len(tokens)):  # each text by itself, since its length sets its angles
        on, count = above[n], above[n].long().sum()
        order = torch.where(on, nodes, len(tokens)).sort().values[: depth + 1]
        path = tokens.index_select(0, order.clamp(max=len(tokens) - 1))
        here = cache.length + torch.minimum(nodes[: depth + 1], count - 1)
        each, _ = model.hidden(params, path, cache, positions=here)
        rows.append(each.index_select(0, (count - 1).reshape(1))[0])
    return model.logits(params, torch.stack(rows)), delta


def rows_of_path(delta: Delta, rows: Tensor) -> Delta:
    """The rows int64 (N,) of a delta, in this order: those of a path through a tree."""
    take = lambda sides: tuple(side.index_select(-2, rows) for side in sides)
    return Delta(take(delta.k), take(delta.v))


def renewed(model: Model, params: Tree, cache: KVCache) -> KVCache:
    """The cache, its rows recomputed if they have the angles of another length than its own.

    For `Cache`, `Pages` and branches of these; any other is returned unchanged, and its text is
    read again at each step.
    """
    config = follower(model)
    if (
        config is None
        or config.rope_scaling is None
        or config.rope_scaling.kind == "dynamic"
        or not _is_rewritable(cache)
    ):
        return cache
    text = lengths.remembered(config, cache)
    stale = text.beyond != (cache.length > config.rope_scaling.context)
    if not errors.is_true(stale if is_absent(text.counts) else stale & text.counts):
        return cache
    ids, n = lengths.in_front(text)
    here = torch.arange(len(ids), device=ids.device)
    delta = model.hidden(
        params, ids, (), positions=torch.minimum(here, torch.as_tensor(n - 1, device=ids.device))
    )[1]
    return _rewritten(cache, delta, 0)


def _is_rewritable(cache: KVCache) -> bool:
    return isinstance(cache, (Cache, Pages)) or (
        isinstance(cache, Branch) and _is_rewritable(cache.prefix) and _is_rewritable(cache.tail)
    )


def _rewritten(cache: KVCache, delta: Delta, begin: int | Tensor) -> KVCache:
    """The cache with its rows replaced by those of the delta, from row `begin` on."""
    if isinstance(cache, Branch):
        own = _rewritten(cache.tail, delta, begin + cache.prefix.length)
        return Branch(_rewritten(cache.prefix, delta, begin), own)
    R = delta.k[0].shape[-2]
    row = (begin + torch.arange(min(R, caches.capacity(cache)), device=cache.length.device)).clamp(
        max=R - 1
    )
    take = lambda rows: tuple(x.index_select(-2, row) for x in rows)
    empty = caches.with_length(cache, torch.zeros_like(cache.length))
    return caches.commit(empty, Delta(take(delta.k), take(delta.v)), cache.length)
