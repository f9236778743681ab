"""The decoding loop of every function here: prefill, then rounds of choose, stop, commit.

    start = prefill(model, params, prompt, cache, ...)          read the prompt, in chunks
    for text in decode(request, start, drawing(request, key)):  choose, cut, commit

A round reads the last token of the text, and in speculative decoding the draft after it. So the
cache has all tokens of a text but its last, and no token is read before the next one is requested.
`drawing` chooses one token a round; `speculative.decoding` has the chooser that verifies drafts.
Beam search and continuous batching have loops of their own around the same `prefill`, `is_stop` and
`commit_owned`.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import caches, randomness, sampling, transformer
from ..caches import Delta, KVCache
from ..core import errors
from ..core.autograd import has_tangent, mapped_rows, transforming
from ..core.fingerprints import Held
from ..models import Model, Past
from ..tree import Tree
from .requests import Request, check_numbers


class Start(NamedTuple):
    """The result of prefill: logits (V,) after the last token of the prompt, and its cache."""

    logits: Tensor
    cache: KVCache


class Text(NamedTuple):
    """The decoding state after a round.

    Args:
        tokens: int64 (N + 1,), the tokens of this round, of which the first `kept` are new.
        kept: their number, an int or int64 ().
        last: int64 (), the last token of the text.
        cache: the cache of the prompt and all tokens before `last`.
        left: int64 (), how many tokens may follow; None where every round writes one.
        done: bool (), True where the text has ended.
        state: the chooser's state.
    """

    tokens: Tensor
    kept: Tensor | int
    last: Tensor
    cache: KVCache
    left: Tensor | None
    done: Tensor
    state: Tree


class Choice(NamedTuple):
    """The tokens chosen in a round.

    Args:
        tokens: int64 (N + 1,), of which the first `kept` are written: up to a stop id; none where
            the text has ended.
        kept: an int or int64 ().
        last: int64 (), the last token of the text with them.
        delta: keys and values of the text's last token and of the first N of these.
        settle: (kept, last) -> the chooser's state after the tokens that are kept in the end.
    """

    tokens: Tensor
    kept: Tensor | int
    last: Tensor
    delta: Delta
    settle: Callable[[Any, Tensor], Tree]  # of kept as the loop has it, an int or a tensor


class Chooser(NamedTuple):
    """How the tokens of a round are chosen.

    Args:
        first: logits (V,) -> (token (), state), the first token after the prompt.
        follow: (n, text) -> Choice, of round n = 1, 2, ... after it.
        length: N, how many tokens are drafted in a round.
    """

    first: Callable[[Tensor], tuple[Tensor, Tree]]
    follow: Callable[[int, Text], Choice]
    length: int = 0


# new tokens -> (how many of them are kept, whether the text ends with the last of these)
Listener = Callable[[list[int]], tuple[int, bool]]


def prefill(
    model: Model,
    params: Tree,
    prompt: Tensor,
    cache: Past,
    *,
    room: int | None,
    prompt_length: Tensor | None = None,
    chunk: int = 512,
) -> Start:
    """Prefill: read a prompt int64 (T,) in chunks; logits are computed of its last token alone.

    Args:
        room: tokens to write after the prompt, in a new tail behind the cache (`caches.fork`).
            None appends to the cache itself, which must have room and is not modified.
        prompt_length: int64 (), how many tokens of a padded prompt count.
        chunk: tokens that are read at a time.
    """
    T = prompt.shape[0]
    # The first chunk makes a cache where there is none.
    first, last, after = transformer.first_chunk(model, cache, T, chunk), None, cast(KVCache, cache)
    for begin in (0, *range(first, T, chunk)):
        piece = prompt[begin : begin + (chunk if begin else first)]
        where = transformer.places(model, cache, begin, begin + len(piece), prompt_length)
        x, delta = (
            model.hidden(params, piece, after)
            if where is None
            else model.hidden(params, piece, after, positions=where)
        )
        if room is not None and begin == 0:
            after = caches.fork(
                cache, delta, T + room if transforming() else caches.bucket(T + room)
            )
        n: Tensor | int = len(piece)
        if prompt_length is None:
            last = x[-1]
        else:
            n = (prompt_length - begin).clamp(0, len(piece))
            here = x.index_select(
                0, (prompt_length - begin - 1).clamp(0, len(piece) - 1).reshape(1)
            )[0]
            last = here if last is None else torch.where(prompt_length > begin, here, last)
        after = (
            caches.commit(after, delta, n)
            if room is None
            else append(model, params, after, delta, n)
        )
    assert last is not None  # a prompt has at least one token
    return Start(model.logits(params, last), after)


def decode(
    request: Request,
    start: Start,
    chooser: Chooser,
    listen: Listener | None = None,
    *,
    alone: bool = False,
) -> Iterator[Text]:
    """Yield the text after each round, until every row of a vmap has ended; none at `steps` 0.

    Args:
        listen: called with the new tokens of each round before they are committed; it may end the
            text at any of them. Not under vmap.
        alone: True where no code of a user runs between or in the rounds.
    """
    if not request.steps:
        return
    stop, may_end = request.stop, bool(request.stop or chooser.length or listen)
    last, state = chooser.first(start.logits)
    left = torch.full_like(last, request.steps - 1) if chooser.length else None
    done = is_stop(last, stop) if left is None else is_stop(last, stop) | (left <= 0)
    if listen is not None and listen([int(last)])[1]:
        done = torch.ones_like(done)
    text = Text(last.unsqueeze(0), 1, last, start.cache, left, done, state)
    yield text
    weights = Held(request.params, constant=alone)
    for n in range(1, request.steps):
        if may_end and all_rows(text.done):
            return
        with weights.within():
            tokens, kept, last, delta, settle = chooser.follow(n, text)
        left, done, heard = text.left, text.done, False
        if listen is not None:
            stays, heard = listen(tokens[: int(kept)].tolist())
            kept, last = (
                (kept if isinstance(kept, int) else torch.full_like(kept, stays)),
                tokens[stays - 1],
            )
        cache = append(request.model, request.params, text.cache, delta, kept)
        if left is not None:
            left = left - kept
            done = done | (left <= 0)
        if stop:
            done = done | is_stop(last, stop)
        text = Text(
            tokens,
            kept,
            last,
            cache,
            left,
            torch.ones_like(done) if heard else done,
            settle(kept, last),
        )
        yield text


def drawing(request: Request, key: Tensor) -> Chooser:
    """A chooser of one token a round: token i is sampled with `split(key, steps)[i]`.

    After a stop id every token is that id.
    """
    model, params, sampler, stop = request.model, request.params, request.sampler, request.stop
    keys = randomness.split(key, max(request.steps, 1))

    def draw(n: int, logits: Tensor, state: Tree, goes_on: Tensor | None) -> tuple[Tensor, Tree]:
        check_numbers(request.verb, f"the logits of step {n}", logits)
        return sampling.draw(keys[n], sampler, logits, state, wanted=goes_on)

    def follow(n: int, text: Text) -> Choice:
        x, delta = model.hidden(params, text.tokens, text.cache)
        goes_on = ~text.done if stop else None
        token, state = draw(n, model.logits(params, x[-1]), text.state, goes_on)
        kept: Tensor | int = 1
        if goes_on is not None:
            token = torch.where(text.done, text.last, token)
            # A row that has ended is computed with the others, and commits nothing.
            kept = 1 if all_rows(goes_on) else goes_on.long()
        return Choice(token.unsqueeze(0), kept, token, delta, lambda kept, last: state)

    return Chooser(lambda logits: draw(0, logits, begun(request, logits), None), follow)


def begun(request: Request, logits: Tensor) -> Tree:
    """The state of the request's sampler after it has observed the prompt."""
    sampler = request.sampler
    return sampling.observe_prompt(
        sampler, request.prompt, sampling.begin(sampler, logits), length=request.prompt_length
    )


def append(model: Model, params: Tree, cache: KVCache, delta: Delta, n: Tensor | int) -> KVCache:
    """Commit the first n tokens of a delta to the loop's cache, in place where that is possible.

    Where rotary angles follow the length of the text, its rows are then recomputed
    (`transformer.renewed`).
    """
    return transformer.renewed(model, params, commit_owned(cache, delta, n))


def commit_owned(cache: KVCache, delta: Delta, n: Tensor | int) -> KVCache:
    """Commit to a cache that has no other user: in place outside transforms and under vmap alone,
    else out of place.
    """
    other = transforming() and not mapped_rows()
    seen = other or has_tangent(cache, delta) or torch.compiler.is_compiling()
    return caches.commit(cache, delta, n) if seen else caches.commit_donated(cache, delta, n)


def hidden_along(model: Model, params: Tree, tokens: Tensor, cache: Past) -> Tensor:
    """The hidden states (*lead, T, E) of tokens read one after the other behind this cache.

    They are computed in one forward pass where each token attends to all before it. Behind a cache
    that drops tokens, such as a `Ring`, tokens are read one at a time: in one pass the new tokens
    would attend to each other at any distance.
    """
    if caches.keeps_all(cache) or tokens.dim() != 1 or len(tokens) < 2:
        return model.hidden(params, tokens, cache)[0]
    return transformer.one_by_one(model, params, tokens, cache)[0]


def is_stop(tokens: Tensor, stop: Collection[int]) -> Tensor:
    """True where a token is one of the stop ids (torch.isin has no batching rule)."""
    found = None
    for id in stop:
        here = tokens == id
        found = here if found is None else found | here
    return torch.zeros_like(tokens, dtype=torch.bool) if found is None else found


def until_stop(tokens: Tensor, count: Tensor, stop: Collection[int]) -> Tensor:
    """How many of the first `count` (*lead) tokens precede or are the first stop id.

    tokens: int64 (*lead, N). Returns int64 (*lead).
    """
    if not stop:
        return count
    ends = is_stop(tokens, stop).long()
    before = ends.cumsum(-1) - ends
    counted = torch.arange(tokens.shape[-1], device=tokens.device) < count.unsqueeze(-1)
    return ((before == 0) & counted).sum(-1)


def all_rows(condition: Tensor) -> bool:
    """True where a condition holds in every row of a vmap; False where values cannot be read."""
    known = errors.peek(condition)
    return known is not None and bool(known.all())
