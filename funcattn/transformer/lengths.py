"""Reading behind a cache where rotary angles depend on the length of the text.

Such scalings (`Config.follows_length`) change the angles of all positions once a text is longer
than `context`, those of the first positions too. All keys, values and activations change, and the
cache has those of a shorter text. The whole text is then read again, so that for every scaling

    extend(params, x[n:], cache of x[:n]) == extend(params, x, ())[n:]

The cache of such a model has more layers than the model. Their rows store the id of each token and
whether it was read beyond the context, as digits of three bits: exact in every floating dtype, and
in codes of 4 bits, whose step is at most 7 / 15. As they are rows like keys and values, every kind
of cache commits, forks, shards and maps them unchanged.

Within the context no text is read again. Beyond it "longrope" continues with rows that were read
beyond it; the base of "dynamic" changes with every token, so the text is read again at every step.

See docs/decisions/a-text-has-one-length.md. Law:
test_lengths.py::test_a_text_read_in_any_way_has_the_logits_of_the_whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import caches
from ..caches import Delta, KVCache
from ..core import errors
from ..masks import Mask
from ..models import Past
from ..records import ABSENT, is_absent
from . import parallel
from .config import Config
from .layer_spec import has_sizes, of_layer

BASE = 8  # of the digits of a token id

Run = Callable[
    [Tensor, Past, Tensor, Mask | Tensor | None, bool, Tensor | None], tuple[Tensor, Delta]
]
# (tokens, cache, places, mask, in_order, length) -> (x, delta): the forward pass with the rotary
# angles of a text of that length; places are the positions of the tokens.


class CacheKind(Protocol):
    """What makes empty caches: a type of cache, or a value such as `caches.pages()`."""

    def empty(
        self,
        layers: int,
        heads: int,
        size: int,
        head_size: int,
        dtype: torch.dtype | None = None,
        /,
    ) -> KVCache:
        """A cache with room for `size` tokens."""
        ...


class Text(NamedTuple):
    """The token ids stored in a cache.

    ids: int64 (R,). beyond: bool (R,), True for rows read beyond the context. counts: bool (R,),
    True for rows that are visible; `()` is all.
    """

    ids: Tensor
    beyond: Tensor
    counts: Tensor | tuple[()]


def cache_layers(config: Config) -> int:
    """Layers of a cache: those with attention, and those that store the text where it is needed."""
    if not config.follows_length:
        return len(config.attention_layers)
    return config.layers + -(-(1 + _digits(config)) // sum(config.cached[1:]))


def cache_sizes(
    config: Config, cached: Callable[[Config], tuple[int, int, int]] | None = None
) -> list[tuple[int, int, int, int]]:
    """Layers, heads, features of keys and of values of each cache, one for each size of keys.

    Args:
        config: of the model.
        cached: the sizes of a layer of a config on this device, as `parallel.cached`; None is those
            of the whole model.
    """
    held = cached or (lambda config: config.cached)
    if not has_sizes(config):
        heads, D, Dv = held(config)
        return [(cache_layers(config), heads, D, Dv)]
    found: list[tuple[int, int, int, int]] = []
    for group in config.cache_groups:
        heads, D, Dv = held(of_layer(config, config.layer_spec(group[0])))
        found.append((len(group), heads, D, Dv))
    return found


def empty(
    config: Config,
    kind: Any,
    size: int,
    dtype: torch.dtype | None,
    cached: Callable[[Config], tuple[int, int, int]],
) -> KVCache:
    """An empty cache of a kind with room for `size` tokens, of the sizes of `cache_sizes`."""
    made = [
        caches.make(kind, layers, heads, size, features, dtype)
        for layers, heads, *features in cache_sizes(config, cached)
    ]
    return caches.in_groups(made)


def length_of(places: Tensor) -> Tensor:
    """The length (*lead) of a text with tokens at positions (*lead, T), over all devices."""
    if not places.shape[-1]:
        return places.new_zeros(places.shape[:-1])
    return parallel.longest(places.amax(-1) + 1)


def lengths_of(places: Tensor, mask: Mask | Tensor | None, in_order: bool) -> Tensor:
    """The length (*lead) of each text, or (*lead, T), for each token, of its packed document.

    Documents are packed where positions and a Mask (of intervals) are given; a document ends where
    the next position is not one greater.
    """
    T = places.shape[-1]
    if in_order or not isinstance(mask, Mask) or T < 2:
        return length_of(places)
    row = torch.arange(T, device=places.device)
    ends = F.pad(places[..., 1:] != places[..., :-1] + 1, (0, 1), value=True)
    last = torch.where(ends, row, T).flip(-1).cummin(-1).values.flip(-1)  # last row of its document
    return places.gather(-1, last) + 1


def hidden(
    config: Config,
    run: Run,
    tokens: Tensor,
    cache: Past,
    places: Tensor,
    mask: Mask | Tensor | None,
    in_order: bool,
) -> tuple[Tensor, Delta]:
    """The residual (*lead, T, E) and delta of new tokens, equal to one pass over the whole text."""
    if not config.follows_length:
        return run(tokens, cache, places, mask, in_order, None)
    if is_absent(cache):
        length = lengths_of(places, mask, in_order)
        x, delta = run(tokens, cache, places, mask, in_order, length)
        return x, noted(config, delta, tokens, length)
    length = torch.maximum(length_of(places), cache.length)
    text = remembered(config, cache)
    if _goes_on(config, text, length):
        x, delta = run(tokens, cache, places, mask, in_order, length)
    else:
        x, delta = _again(run, tokens, cache, text, places, mask, in_order, length)
    return x, noted(config, delta, tokens, length)


def continues(config: Config, cache: KVCache, T: int) -> bool:
    """True where the cached rows have the angles of the text with T new tokens."""
    return not config.follows_length or _goes_on(
        config, remembered(config, cache), cache.length + T
    )


def noted(config: Config, delta: Delta, tokens: Tensor, length: Tensor) -> Delta:
    """The delta with layers that store its token ids, where angles follow the length."""
    if not config.follows_length:
        return delta
    k, (_, *features) = delta.k[0], config.cached
    powers = BASE ** torch.arange(_digits(config), device=tokens.device)
    beyond = (length > _context(config)).long()
    beyond = (beyond if beyond.dim() == tokens.dim() else beyond.unsqueeze(-1)).expand(tokens.shape)
    # (*lead, T, 1 + digits)
    row = torch.cat([beyond.unsqueeze(-1), tokens.unsqueeze(-1) // powers % BASE], -1)
    more = cache_layers(config) - config.layers
    row = F.pad(row, (0, sum(features) * more - row.shape[-1])).to(k.dtype).unsqueeze(-3)
    # keys (*lead, K, T, D) and values (*lead, K, T, Dv) in turn
    sides = row.expand(*k.shape[:-1], -1).split(features * more, -1)
    return Delta((*delta.k, *sides[::2]), (*delta.v, *sides[1::2]))


def remembered(config: Config, cache: KVCache) -> Text:
    """The text in a cache, as far as the next token sees it."""
    here = cache.length.reshape(1)
    layers = [caches.past(cache, i, here) for i in range(config.layers, cache_layers(config))]
    if not layers[0]:
        none = torch.zeros(0, dtype=torch.int64, device=here.device)
        return Text(none, none.bool(), ABSENT)
    # All heads have the same rows: take the first.
    sides = [
        torch.cat([part[side][0] for part in parts], -2) for parts in layers for side in (0, 1)
    ]
    digits = torch.cat(sides, -1)[..., : 1 + _digits(config)].round().long()
    ids = (digits[..., 1:] * BASE ** torch.arange(_digits(config), device=digits.device)).sum(-1)
    if all(is_absent(part.mask) for part in layers[0]):
        return Text(ids, digits[..., 0] > 0, ABSENT)
    return Text(
        ids, digits[..., 0] > 0, torch.cat([_seen(part.mask, part.k) for part in layers[0]])
    )


def in_front(text: Text) -> tuple[Tensor, int | Tensor]:
    """The ids (R,) with visible ones first, in order, and the number of these."""
    if is_absent(text.counts):
        return text.ids, text.ids.shape[-1]
    return text.ids.gather(-1, (~text.counts).long().argsort(dim=-1, stable=True)), text.counts.sum(
        -1
    )


def _seen(mask: Mask | Tensor | tuple[()], k: Tensor) -> Tensor:
    """Bool (S,): True for the visible rows of a segment."""
    if is_absent(mask):
        return torch.ones(k.shape[-2], dtype=torch.bool, device=k.device)
    return (mask.dense(k.shape[-2]) if isinstance(mask, Mask) else mask)[..., 0, :]


def _goes_on(config: Config, text: Text, length: Tensor) -> bool:
    """True where the text was read with the angles of this length; False for unreadable values."""
    beyond = length > _context(config)
    assert config.rope_scaling is not None
    other = (
        text.beyond != beyond if config.rope_scaling.kind == "longrope" else text.beyond | beyond
    )
    if not is_absent(text.counts):
        other = other & text.counts
    known = errors.peek(parallel.longest(other.any(-1).long()))
    return known is not None and not bool(known.any())


def _again(
    run: Run,
    tokens: Tensor,
    cache: KVCache,
    text: Text,
    places: Tensor,
    mask: Mask | Tensor | None,
    in_order: bool,
    length: Tensor,
) -> tuple[Tensor, Delta]:
    """Read the cached text again with the new tokens; returns the residual and delta of these."""
    (ids, n), R, T = in_front(text), text.ids.shape[-1], tokens.shape[-1]
    lost = cache.length != n
    if parallel.in_parts() or errors.is_true(lost):
        wanted = "a past that holds all of its text where rotary angles change with its length"
        remedy = (
            "Give it a past that forgets nothing and lies on one device, or read the text at once."
        )
        errors.fail("decoder", "cache", wanted, f"a {type(cache).__name__}", remedy)
    row = torch.arange(R + T, device=tokens.device)
    if mask is None and is_absent(text.counts):
        seen: Mask | Tensor | None = None
    elif mask is None:
        new = row >= R
        first = torch.where(new, n, row + 1)
        start, stop = torch.where(new, R, first), torch.where(new, row + 1, first)
        seen = Mask(
            torch.stack([torch.zeros_like(start), start], -1), torch.stack([first, stop], -1)
        )
    else:
        among = mask.dense(T) if isinstance(mask, Mask) else mask
        among = F.pad(among.expand(*among.shape[:-2], T, T), (R, 0, R, 0))
        seen = among | (row < torch.where(row < R, row + 1, n).unsqueeze(-1))
    whole = torch.cat([row[:R], places])
    x, delta = run(torch.cat([ids, tokens]), ABSENT, whole, seen, in_order and seen is None, length)
    cut = lambda rows: tuple(y[..., R:, :] for y in rows)
    return torch.where(lost, float("nan"), x[..., R:, :]), Delta(cut(delta.k), cut(delta.v))


def _context(config: Config) -> int:
    assert config.rope_scaling is not None
    return config.rope_scaling.context


def _digits(config: Config) -> int:
    return -(-max(config.vocabulary - 1, 1).bit_length() // 3)
