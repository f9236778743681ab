"""The loop that every verb of decoding runs: prefill, choose, stop, commit.

    start = prefill(model, params, prompt, cache, ...)          the prompt is read, in chunks
    for text in decode(request, start, drawing(request, key)):  a round: what was chosen is cut at a stop, then committed

A round reads the last token that was written, and in speculation drafts behind it. So the cache holds all of a text but its last
token, and no token is read before another is asked for. `drawing` chooses one token a round; `speculative.decoding` has the chooser
that verifies drafts. Beams choose among texts, and batching advances many texts by one round each: they are made of the same
`prefill`, `is_stop` and `commit_owned`.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import caches, randomness, sampling, transformer
from ..core import errors
from ..core.autograd import has_tangent, transforming
from ..models import Model
from .requests import Request, check_numbers


class Start(NamedTuple):
    """A prompt that was read: the logits (V,) after its last token, and the cache that holds it."""

    logits: Tensor
    cache: Any


class Text(NamedTuple):
    """A text after a round.

    Args:
        tokens: int64 (N + 1,), what the round chose, of which the first `kept` are new.
        kept: how many, an int or int64 ().
        last: int64 (), the last token of the text.
        cache: what was read: the prompt, and all tokens before `last`.
        left: int64 (), how many tokens may follow; None where every round writes one.
        done: bool (), whether the text has ended.
        state: what the chooser goes on with.
    """

    tokens: Tensor
    kept: Tensor | int
    last: Tensor
    cache: Any
    left: Tensor | None
    done: Tensor
    state: Any


class Choice(NamedTuple):
    """What a round chose.

    Args:
        tokens: int64 (N + 1,), of which the first `kept` are to be written: up to a stop id, none where the text has ended.
        kept: an int or int64 ().
        last: int64 (), the last token of the text that has them.
        delta: what reading adds to the cache, of the text's last token and the N first of these.
        settle: (kept, last) -> the chooser's state, of the text as it goes on.
    """

    tokens: Tensor
    kept: Tensor | int
    last: Tensor
    delta: Any
    settle: Callable[[Any, Tensor], Any]


class Chooser(NamedTuple):
    """How a round comes to its tokens.

    Args:
        first: logits (V,) -> (token (), state), the token behind the prompt.
        follow: (n, text) -> Choice, round n = 1, 2, ... behind it.
        length: N, how many tokens are drafted in a round.
    """

    first: Callable[[Tensor], tuple[Tensor, Any]]
    follow: Callable[[int, Text], Choice]
    length: int = 0


Listener = Callable[[list[int]], tuple[int, bool]]  # new tokens -> how many of them stay, and whether the text ends there


def prefill(
    model: Model,
    params: Any,
    prompt: Tensor,
    cache: Any,
    *,
    room: int | None,
    prompt_length: Tensor | None = None,
    chunk: int = 512,
) -> Start:
    """Read a prompt (T,) in chunks; the logits are of its last token alone.

    Args:
        room: tokens to write behind the prompt, in a tail behind the cache (`caches.fork`) that is the loop's own. None reads
            into the cache itself, which has room and stays as it was.
        prompt_length: int64 (), how many tokens count.
        chunk: tokens that are read at a time.
    """
    T = prompt.shape[0]
    first, last, after = transformer.first_chunk(model, cache, T, chunk), None, cache
    for begin in (0, *range(first, T, chunk)):
        piece = prompt[begin : begin + (chunk if begin else first)]
        where = transformer.places(model, cache, begin, begin + len(piece), prompt_length)
        x, delta = model.hidden(params, piece, after) if where is None else model.hidden(params, piece, after, positions=where)
        if room is not None and begin == 0:
            after = caches.fork(cache, delta, T + room if transforming() else caches.bucket(T + room))
        n: Tensor | int = len(piece)
        if prompt_length is None:
            last = x[-1]
        else:
            n = (prompt_length - begin).clamp(0, len(piece))
            here = x.index_select(0, (prompt_length - begin - 1).clamp(0, len(piece) - 1).reshape(1))[0]
            last = here if last is None else torch.where(prompt_length > begin, here, last)
        after = caches.commit(after, delta, n) if room is None else append(model, params, after, delta, n)
    assert last is not None  # a prompt has a token
    return Start(model.logits(params, last), after)


def decode(request: Request, start: Start, chooser: Chooser, listen: Listener | None = None) -> Iterator[Text]:
    """The rounds of a text behind a prompt that was read, until every row of a vmap has ended; none where `steps` is 0.

    Args:
        listen: is told the new tokens of each round, and may end the text among them; not under vmap.
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
    for n in range(1, request.steps):
        if may_end and all_rows(text.done):
            return
        tokens, kept, last, delta, settle = chooser.follow(n, text)
        left, done, heard = text.left, text.done, False
        if listen is not None:
            stays, heard = listen(tokens[: int(kept)].tolist())
            kept, last = (kept if isinstance(kept, int) else torch.full_like(kept, stays)), tokens[stays - 1]
        cache = append(request.model, request.params, text.cache, delta, kept)
        if left is not None:
            left = left - kept
            done = done | (left <= 0)
        if stop:
            done = done | is_stop(last, stop)
        text = Text(tokens, kept, last, cache, left, torch.ones_like(done) if heard else done, settle(kept, last))
        yield text


def drawing(request: Request, key: Tensor) -> Chooser:
    """One token a round: token i is drawn by the request's sampler with `split(key, steps)[i]`. After a stop id, that id again."""
    model, params, sampler, stop = request.model, request.params, request.sampler, request.stop
    keys = randomness.split(key, max(request.steps, 1))

    def draw(n: int, logits: Tensor, state: Any, goes_on: Tensor | None) -> tuple[Tensor, Any]:
        check_numbers(request.verb, f"the logits of step {n}", logits)
        return sampling.draw(keys[n], sampler, logits, state, wanted=goes_on)

    def follow(n: int, text: Text) -> Choice:
        x, delta = model.hidden(params, text.tokens, text.cache)
        goes_on = ~text.done if stop else None
        token, state = draw(n, model.logits(params, x[-1]), text.state, goes_on)
        kept: Tensor | int = 1
        if goes_on is not None:
            token = torch.where(text.done, text.last, token)
            kept = 1 if all_rows(goes_on) else goes_on.long()  # a row that has ended reads on with the others, and keeps nothing
        return Choice(token.unsqueeze(0), kept, token, delta, lambda kept, last: state)

    return Chooser(lambda logits: draw(0, logits, begun(request, logits), None), follow)


def begun(request: Request, logits: Tensor) -> Any:
    """The state of the request's sampler, which has seen the prompt."""
    sampler = request.sampler
    return sampling.observe_prompt(sampler, request.prompt, sampling.begin(sampler, logits), length=request.prompt_length)


def append(model: Model, params: Any, cache: Any, delta: Any, n: Tensor | int) -> Any:
    """The loop's own cache with the first n tokens of a delta; its rows are renewed where rotary angles follow the length."""
    return transformer.renewed(model, params, commit_owned(cache, delta, n))


def commit_owned(cache: Any, delta: Any, n: Tensor | int) -> Any:
    """Commit into a cache that the caller alone holds: in place, but where a transform could see it."""
    seen = transforming() or has_tangent(cache, delta) or torch.compiler.is_compiling()
    return caches.commit(cache, delta, n) if seen else caches.commit_donated(cache, delta, n)


def hidden_along(model: Model, params: Any, tokens: Tensor, cache: Any) -> Tensor:
    """The hidden states (*lead, T, E) that reading the tokens one after the other gives behind this cache.

    In one reading where each token sees all before it. A cache that forgets, such as a `Ring`, is read a token at a time: within
    one reading the new tokens would see each other however far apart.
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
    """How many of the first `count` (*lead) of tokens (*lead, N) there are up to the first stop id, it included."""
    if not stop:
        return count
    ends = is_stop(tokens, stop).long()
    before = ends.cumsum(-1) - ends
    counted = torch.arange(tokens.shape[-1], device=tokens.device) < count.unsqueeze(-1)
    return ((before == 0) & counted).sum(-1)


def all_rows(condition: Tensor) -> bool:
    """True where a condition holds in every row of a vmap; False where it cannot be looked at."""
    known = errors.peek(condition)
    return known is not None and bool(known.all())
