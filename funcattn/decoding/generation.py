"""Text, one token after another: prefill in chunks, then draw, extend, commit.

`generate` is a pure function of one sequence; `vmap` over keys, prompts or pasts makes batches and futures. It never writes into
the past it was given: what it generates goes where nothing is shared (`caches.fork`), so 32 futures of one past store it once.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, caches, collectives, progress, randomness, sampling, transformer
from .._autodiff import has_tangent, transforming
from .._doors import door
from ..models import Model
from ..records import ABSENT, is_absent
from ..sampling import Sampler
from .detokenization import StreamedText


@door
def generate(
    key: Tensor,
    model: Model,
    params: Any,
    prompt: Tensor,
    cache: Any = ABSENT,
    *,
    steps: int,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] = (),
    prompt_length: Tensor | None = None,
    chunk: int = 512,
) -> tuple[Tensor, Any]:
    """Continue a prompt by `steps` tokens.

    Args:
        key: randomness; step i spends `split(key, steps)[i]`, so fewer steps give the beginning of more.
        model, params: a decoder and its weights.
        prompt: int64 (T,), T >= 1.
        cache: a past that the prompt continues; it stays as it was. `()` is no past.
        steps: number of tokens to return, 0 or more.
        sampler: how a token is drawn from logits; see `funcattn.sampling`. It is primed with the prompt (`sampling.prime`); for a
            cache whose text it should know too, `sampling.primed`.
        stop: ids that end the text. After one, the rest is filled with it; once every row of a vmap has ended, the loop ends.
        prompt_length: int64 (), 1 to T, where the prompt is padded at its end: the pads (any valid id) are never remembered.
        chunk: tokens of the prompt that are read at a time; bounds the memory of prefill.

    Returns:
        tokens: int64 (steps,).
        cache: a past that holds the prompt and all new tokens but the last (which the model has not read yet): a `Cache` where
            none was given, else what `caches.fork` makes of the given one: a `Branch` behind it, or a longer `Ring` or
            `QuantizedCache`. `caches.grow` makes room for more, `caches.flatten` makes a branch one past again.

    Raises:
        ValueError: an empty prompt, a prompt longer than the cache, a prompt_length outside the prompt, negative steps,
            NaN logits.
        TypeError: arguments of another kind, such as a stop that is a string.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> tokens, cache = generate(fa.key(1), model, params, torch.tensor([1, 2, 3]), steps=4)
        >>> tokens.shape, int(cache.length)
        (torch.Size([4]), 6)

    Law: vmap over keys, prompts or pasts equals the loop; the past is unchanged (test_generation.py).
    """
    _check_parts("generate", model, sampler)
    _check("generate", prompt, cache, steps, chunk, stop)
    _check_length(prompt, prompt_length)
    options = {"ends": tuple(stop), "chunk": chunk, "sampler": sampler}
    _agree("generate", params, key, prompt, cache, steps, prompt_length, **options)
    start = _prefill(model, params, prompt, cache, steps, prompt_length, chunk)
    tokens, after = [], start.cache
    draws = _draws(key, model, params, start, steps, sampler, prompt, prompt_length, stop)
    for drawn in progress.track(draws, "writing", steps):
        tokens.append(drawn.token)
        after = drawn.cache
        if stop and _all_done(drawn.done):
            break
    tokens = tokens + tokens[-1:] * (steps - len(tokens))
    return torch.stack(tokens) if tokens else prompt[:0], after


@dataclass(frozen=True)
class Streamed:
    """A piece of a stream: the text that became certain, all tokens so far, the past, and whether this is the last piece."""

    text: str
    tokens: tuple[int, ...]
    cache: Any
    ended: bool


def stream(
    key: Tensor,
    model: Model,
    params: Any,
    prompt: Tensor,
    cache: Any = ABSENT,
    *,
    steps: int,
    tokenizer: Any = None,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    chunk: int = 512,
) -> Iterator[Streamed]:
    """`generate`, yielding text as it is written; the same key gives the same tokens.

    Text is held back while it may still change: an unfinished character, a run of bytes, or what may become a stop string (see
    `funcattn.decoding.detokenization`). A stop id and a stop string are not part of the text.

    Args:
        key, model, params, prompt, cache, steps, sampler, chunk: as in `generate`.
        tokenizer: what decodes; without one, text is "".
        stop: ids that end the text; None takes the tokenizer's own.
        stop_strings: texts that end it; the piece that would hold one ends before it. One may be a special token, or hold it.

    Yields:
        A `Streamed` for each token; at least one, the last with `ended` True.

    Raises:
        ValueError, TypeError: as `generate`, at the first piece.

    Law: the tokens are those of `generate`, and the texts join to what `decode` gives for all of them, without a stop id
        (test_generation.py, test_detokenization.py).
    """
    _check_stops(tokenizer, stop_strings)
    ends = _ends_of("stream", tokenizer, stop)
    _check_parts("stream", model, sampler)
    _check("stream", prompt, cache, steps, chunk, ends)
    options = {"ends": ends, "stop_strings": tuple(stop_strings), "chunk": chunk, "sampler": sampler}
    _agree("stream", params, key, prompt, cache, steps, **options)
    start = _prefill(model, params, prompt, cache, steps, None, chunk)
    text = StreamedText(tokenizer, stop_strings)
    tokens: tuple[int, ...] = ()
    after = start.cache
    for drawn in _draws(key, model, params, start, steps, sampler, prompt):
        token, after = int(drawn.token), drawn.cache
        tokens = (*tokens, token)
        if token in ends or len(tokens) == steps:
            break
        piece, found = text.add(token)
        if found:
            yield Streamed(piece, tokens, after, True)
            return
        yield Streamed(piece, tokens, after, False)
    piece, found = text.add(tokens[-1]) if tokens and tokens[-1] not in ends else ("", False)
    yield Streamed(piece if found else piece + text.finish(), tokens, after, True)


class _Start(NamedTuple):
    logits: Tensor  # (V,), after the last token of the prompt
    cache: Any


class _Drawn(NamedTuple):
    token: Tensor
    cache: Any  # holds everything before this token
    done: Tensor  # bool (): this token ends the text, or it had ended before


def _prefill(model: Model, params: Any, prompt: Tensor, cache: Any, steps: int, prompt_length: Tensor | None, chunk: int) -> _Start:
    """Read the prompt in chunks into a tail of its own; logits of its last token alone."""
    T, first = prompt.shape[0], transformer.first_chunk(model, cache, prompt.shape[0], chunk)
    last, tail = None, cache
    for begin in (0, *range(first, T, chunk)):
        piece = prompt[begin : begin + (chunk if begin else first)]
        where = transformer.places(model, cache, begin, begin + len(piece), prompt_length)
        x, delta = model.hidden(params, piece, tail) if where is None else model.hidden(params, piece, tail, positions=where)
        if begin == 0:
            tail = caches.fork(cache, delta, T + steps if transforming() else caches.bucket(T + steps))
        n: Any = len(piece)
        if prompt_length is None:
            last = x[-1]
        else:
            n = (prompt_length - begin).clamp(0, len(piece))
            here = x.index_select(0, (prompt_length - begin - 1).clamp(0, len(piece) - 1).reshape(1))[0]
            last = here if last is None else torch.where(prompt_length > begin, here, last)
        tail = transformer.renewed(model, params, _commit(tail, delta, n))
    return _Start(model.logits(params, last), tail)


def _draws(
    key: Tensor,
    model: Model,
    params: Any,
    start: _Start,
    steps: int,
    sampler: Sampler,
    prompt: Tensor,
    prompt_length: Tensor | None = None,
    stop: Sequence[int] = (),
) -> Iterator[_Drawn]:
    """One token a step; the model reads a token only when another is asked for. After a stop id, that id again and again."""
    logits, cache = start.logits, start.cache
    last, done = None, torch.zeros((), dtype=torch.bool, device=logits.device)
    state = sampling.prime(sampler, prompt, sampling.begin(sampler, logits), length=prompt_length)
    keys = randomness.split(key, max(steps, 1))
    for i in range(steps):
        if _checks.is_true(logits.isnan()):
            remedy = "Look for NaN in params and in the past; a past that overflowed inside a transform gives NaN too."
            _checks.fail("generate", f"the logits of step {i}", "numbers", "NaN", remedy)
        token, state = sampling.draw(keys[i], sampler, logits, state, wanted=~done if stop else None)
        last = token = token if last is None else torch.where(done, last, token)
        for end in stop:
            done = done | (token == end)
        yield _Drawn(token, cache, done)
        if i + 1 < steps:
            x, delta = model.hidden(params, token.unsqueeze(0), cache)
            cache = _commit(cache, delta, (~done).long() if stop and not _none_done(done) else 1)
            cache = transformer.renewed(model, params, cache)
            logits = model.logits(params, x[-1])


def hidden_along(model: Model, params: Any, tokens: Tensor, cache: Any) -> Tensor:
    """The hidden states (*lead, T, E) that reading the tokens one after the other gives behind this past.

    In one reading where each token sees all before it. A past that forgets, such as a `Ring`, is read a token at a time: within one
    reading the new tokens would see each other however far apart.
    """
    if caches.keeps_all(cache) or tokens.dim() != 1 or len(tokens) < 2:
        return model.hidden(params, tokens, cache)[0]
    return transformer.one_by_one(model, params, tokens, cache)[0]


def _commit(tail: Any, delta: Any, n: Any) -> Any:
    """Commit into the tail, which is ours: in place where no transform could see it."""
    seen = transforming() or has_tangent(tail, delta) or torch.compiler.is_compiling()
    return caches.commit(tail, delta, n) if seen else caches.commit_donated(tail, delta, n)


def _none_done(done: Tensor) -> bool:
    """True where no row has ended. One that has reads on in step with the others, and remembers nothing of it."""
    known = _checks.peek(done)
    return known is not None and not bool(known.any())


def _all_done(done: Tensor) -> bool:
    known = _checks.peek(done)
    return known is not None and bool(known.all())


def _check_parts(door: str, model: Any, sampler: Any) -> None:
    _checks.is_decoder(door, model)
    if not isinstance(sampler, Sampler):
        remedy = "Such as fa.sampling.temperature(0.8) or fa.sampling.greedy; of a function of logits, fa.sampling.stateless(f)."
        _checks.fail(door, "sampler", "a Sampler", f"a {type(sampler).__name__}", remedy, TypeError)


def _agree(
    door: str, params: Any, key: Tensor, prompt: Tensor, cache: Any, steps: int, prompt_length: Tensor | None = None, **options: Any
) -> None:
    """Fail where processes of one mesh would write different texts; of a past its length is compared."""
    length = () if is_absent(cache) else cache.length
    values = {"key": key, "prompt": prompt, "cache": length, "steps": steps, "prompt_length": prompt_length, **options}
    collectives.agree(door, values, params)


def _ends_of(door: str, tokenizer: Any, stop: Any) -> tuple[int, ...]:
    """The ids that end a text: those given, or else the tokenizer's."""
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        got = f"a {type(tokenizer).__name__}"
        _checks.fail(door, "tokenizer", "one that decodes", got, "Pass the tokenizer that fa.load returned.", TypeError)
    if stop is None:
        return tuple(getattr(tokenizer, "stop", ()))
    return tuple(stop) if isinstance(stop, Collection) else stop  # _check complains


def _check(door: str, prompt: Tensor, cache: Any, steps: int, chunk: int, stop: Sequence[int]) -> None:
    if not isinstance(prompt, Tensor) or prompt.dim() != 1:
        got = _checks.shape(prompt) if isinstance(prompt, Tensor) else f"a {type(prompt).__name__}"
        _checks.fail(
            door,
            "prompt",
            "one sequence (T,) of token ids",
            got,
            "Pass torch.tensor(tokenizer.encode(text)); map over many with vmap.",
        )
    if not prompt.shape[0]:
        _checks.fail(
            door, "prompt", "(T,) with T at least 1", _checks.shape(prompt), "Begin with one token, such as the tokenizer's first."
        )
    if not _checks.is_count(steps, 0):
        _checks.fail(door, "steps", "an int, 0 or more", repr(steps), "Say how many tokens to write.")
    if not _checks.is_count(chunk, 1):
        _checks.fail(door, "chunk", "at least 1", chunk, "Tokens of the prompt read at a time.")
    _checks.stops(door, stop)
    if not is_absent(cache) and prompt.shape[0] > caches.capacity(cache):
        wanted = f"at most the {caches.capacity(cache)} tokens that the cache has room for"
        _checks.fail(door, "prompt", wanted, f"{prompt.shape[0]} tokens", "Make it with model.cache(size) for a larger size.")


def _check_stops(tokenizer: Any, stop_strings: Sequence[str]) -> None:
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        remedy = "Put a single one into a tuple; ids belong to stop."
        _checks.fail("stream", "stop_strings", "a sequence of texts, none of them empty", repr(stop_strings), remedy, TypeError)
    if stop_strings and tokenizer is None:
        _checks.fail("stream", "tokenizer", "given with stop_strings", None, "Pass the tokenizer that fa.load returned.", TypeError)


def _check_length(prompt: Tensor, prompt_length: Tensor | None) -> None:
    if prompt_length is None:
        return
    if not isinstance(prompt_length, Tensor) or prompt_length.is_floating_point() or prompt_length.dim():
        got = f"{prompt_length.dtype} {_checks.shape(prompt_length)}" if isinstance(prompt_length, Tensor) else repr(prompt_length)
        remedy = "Pass torch.tensor(n), and map over many prompts with vmap."
        _checks.fail("generate", "prompt_length", "an integer tensor ()", got, remedy, TypeError)
    if _checks.is_true((prompt_length < 1) | (prompt_length > prompt.shape[0])):
        wanted = f"between 1 and the {prompt.shape[0]} tokens of the prompt"
        _checks.fail("generate", "prompt_length", wanted, _checks.peek(prompt_length), "Count the tokens before the padding.")
