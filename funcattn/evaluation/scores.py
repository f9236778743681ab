"""How probable a model finds a text: scores and perplexity.

score_t = log p(tokens[t] | past, tokens[0..t-1])          perplexity = exp(- mean score)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import collectives, progress, transformer, tree
from ..core import errors
from ..core.doors import door
from ..decoding import hidden_along
from ..models import Model, config_of
from ..records import ABSENT
from ..rematerialization import remat
from ..tree import Tree


@door
def score(model: Model, params: Tree, tokens: Tensor, cache: Any = ABSENT, *, chunk: int = 512) -> Tensor:
    """The log-probability of each token given all before it.

        score_t = log softmax(logits(past, tokens[0..t]))[tokens[t + 1]],   t = 0 .. T - 2

    The first token is read and not scored: a past holds keys and values, and not the logits that foretell what follows it. To score
    a text behind a past, keep the last token of the past out of it and give it as the first (as `generate` is given its prompt).

    Args:
        model, params: a decoder and its weights.
        tokens: integers (*lead, T), T >= 1; (T,) where there is a past.
        cache: a past that the tokens continue; it stays as it was. `()` is no past. One that forgets (a `Ring`) is read a token at
            a time, as `generate` reads it.
        chunk: positions whose logits (chunk, V) are held at a time; in a derivative they are computed again, not kept.

    Returns:
        (*lead, T - 1), float32 at least: natural logarithms, at most 0; entry t is of tokens[..., t + 1].

    Raises:
        ValueError: no tokens, ids outside of the vocabulary, a chunk below 1. TypeError: arguments of another kind.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> score(model, model.init(fa.key(0)), torch.arange(5)).shape
        torch.Size([4])

    Law: any chunk gives what one softmax over all logits gives, with its derivatives
    (test_evaluation.py::test_scores_are_those_of_all_logits_at_once).
    """
    _check_tokens("score", "tokens", tokens, 1)
    _check_chunk("score", chunk)
    collectives.agree("score", {"tokens": tokens, "chunk": chunk}, params)
    hidden = _hidden(model, params, tokens[..., :-1], tokens[..., -1:], cache)
    return _look(model, params, hidden, tokens[..., 1:], chunk, _log_probability)


@door
def score_continuation(
    model: Model, params: Tree, prompt: Tensor, continuation: Tensor, cache: Any = ABSENT, *, chunk: int = 512
) -> Tensor:
    """The log-probability of each token of a continuation, given the prompt and those before: (N,) for a continuation (N,).

    Logits are made for the continuation alone, however long the prompt is. Their sum is the log-probability of the whole.

    Args:
        model, params: a decoder and its weights.
        prompt: integers (*lead, T), T >= 1; what was read before, besides the cache.
        continuation: integers (*lead, N), N >= 0.
        cache, chunk: as in `score`.

    Raises:
        ValueError, TypeError: as `score`.

    Law: equals the end of the scores of both joined (test_evaluation.py::test_a_continuation_has_the_last_scores_of_the_whole).
    """
    inputs, targets = _join("score_continuation", prompt, continuation, chunk)
    collectives.agree("score_continuation", {"prompt": prompt, "continuation": continuation, "chunk": chunk}, params)
    hidden = _hidden(model, params, inputs, targets[..., -1:], cache)
    return _look(model, params, hidden[..., prompt.shape[-1] - 1 :, :], targets, chunk, _log_probability)


@door
def score_and_greedy(
    model: Model, params: Tree, prompt: Tensor, continuation: Tensor, cache: Any = ABSENT, *, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """`score_continuation`, and whether each token is the likeliest (booleans (*lead, N)): what greedy decoding would write.

    Args and errors: as `score_continuation`.
    """
    inputs, targets = _join("score_and_greedy", prompt, continuation, chunk)
    collectives.agree("score_and_greedy", {"prompt": prompt, "continuation": continuation, "chunk": chunk}, params)
    hidden = _hidden(model, params, inputs, targets[..., -1:], cache)[..., prompt.shape[-1] - 1 :, :]

    def both(logits: Tensor, targets: Tensor) -> Tensor:
        scores = _log_probability(logits, targets)
        return torch.stack([scores, (logits.argmax(-1) == targets).to(scores.dtype)], -1)

    scores, likeliest = _look(model, params, hidden, targets, chunk, both).unbind(-1)
    return scores, likeliest > 0


class Window(NamedTuple):
    """One reading of a long text: tokens begin..end are read, of which first..end are scored."""

    begin: int
    first: int
    end: int


@door
def windows(length: int, *, context: int | None = None, stride: int | None = None) -> list[Window]:
    """The readings that score each token but the first of a text once.

    Args:
        length: tokens of the text.
        context: tokens a window has at most; None is all of them.
        stride: tokens from one window to the next; None is half of the context. Tokens have at least context - stride before them
            (in the first window, all that there are).

    Example:
        >>> [tuple(window) for window in windows(10, context=6, stride=3)]
        [(0, 1, 6), (3, 6, 9), (6, 9, 10)]

    Source: Hugging Face, docs of transformers, Perplexity of fixed-length models.
    """
    context = max(length, 2) if context is None else context
    stride = max(context // 2, 1) if stride is None else stride
    if context < 2:
        errors.fail("windows", "context", "at least 2 tokens", context, "A token is scored by what is before it.")
    if not 1 <= stride < context:
        remedy = "A token at the begin of a window would have nothing before it."
        errors.fail("windows", "stride", f"from 1 to context - 1 = {context - 1}", stride, remedy)
    found, begin, first = [], 0, 1
    while first < length:
        end = min(begin + context, length)
        found.append(Window(begin, first, end))
        begin, first = begin + stride, end
    return found


@door
def perplexity(
    model: Model, params: Tree, tokens: Tensor, *, context: int | None = None, stride: int | None = None, chunk: int = 512
) -> Tensor:
    """exp(- mean score) of a text, read in windows where it is longer than a model can read: smaller is better.

    Each token but the first is scored once, with at least context - stride tokens before it: a stride of 1 is what the model can
    do at best, and costs a reading of the context for each token.

    Args:
        model, params: a decoder and its weights.
        tokens: integers (*lead, T), T >= 2; the mean is over all rows.
        context: tokens that are read at once; None is all of them.
        stride: tokens from one reading to the next; None is half of the context.
        chunk: as in `score`.

    Returns:
        A scalar, float32 at least.

    Raises:
        ValueError, TypeError: as `score`; a context below 2, or a stride that is not below it.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> 200 < float(perplexity(model, model.init(fa.key(0)), torch.arange(20), context=8)) < 300
        True

    Law: where the text fits, exp(-mean(score)); else the naive loop (test_evaluation.py::test_perplexity_is_the_naive_loop).
    """
    _check_tokens("perplexity", "tokens", tokens, 2)
    parts = [
        score_continuation(model, params, tokens[..., begin:first], tokens[..., first:end], chunk=chunk)
        for begin, first, end in progress.track(windows(tokens.shape[-1], context=context, stride=stride), "reading")
    ]
    return (-torch.cat(parts, -1).mean()).exp()


def _hidden(model: Model, params: Tree, inputs: Tensor, last: Tensor, cache: Any) -> Tensor:
    """The residual of inputs. Where rotary angles follow the length of a text, its last token, which is only scored, counts too."""
    if transformer.follower(model) is None:
        return hidden_along(model, params, inputs, cache)
    return hidden_along(model, params, torch.cat([inputs, last], -1), cache)[..., : inputs.shape[-1], :]


def _log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _look(model: Model, params: Tree, hidden: Tensor, targets: Tensor, chunk: int, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """f(logits (n, V), targets (n,)) -> (n, ...) over hidden (*lead, N, E) and targets (*lead, N), n = chunk rows at a time."""
    ends = params
    if config_of(model, "logits") is not None:  # then logits are made of what is outside of the layers
        ends = tree.partition(params, lambda path, _: not path.startswith("layers."))[0]
    V = model.logits(ends, hidden.flatten(0, -2)[:0]).shape[-1]
    if errors.is_true((targets < 0) | (targets >= V)):
        errors.fail("score", "tokens", f"ids in 0..{V - 1}", "another", "Encode with the tokenizer of this model.")
    of = lambda ends, hidden, targets: f(model.logits(ends, hidden), targets)
    rows, wanted = hidden.flatten(0, -2), targets.flatten().long()
    if len(wanted) <= chunk:
        return of(ends, rows, wanted).unflatten(0, targets.shape)
    again = remat(of)
    blocks = zip(rows.split(chunk), wanted.split(chunk), strict=True)
    return torch.cat([again(ends, *block) for block in blocks]).unflatten(0, targets.shape)


def _join(door: str, prompt: Tensor, continuation: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    _check_tokens(door, "prompt", prompt, 1)
    _check_tokens(door, "continuation", continuation, 0)
    _check_chunk(door, chunk)
    if prompt.shape[:-1] != continuation.shape[:-1]:
        got, remedy = errors.shape(continuation), "Give both the same leading axes, or map by vmap."
        errors.fail(door, "continuation", f"{(*prompt.shape[:-1], 'N')}, as the prompt leads", got, remedy)
    return torch.cat([prompt, continuation], -1)[..., :-1], continuation


def _check_tokens(door: str, name: str, tokens: Tensor, least: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in tree.INTEGERS:
        got = getattr(tokens, "dtype", f"a {type(tokens).__name__}")
        errors.fail(door, name, "an integer tensor", got, "Pass token ids: torch.tensor(tokenizer.encode(text)).", TypeError)
    if not tokens.dim() or tokens.shape[-1] < least:
        remedy = "Begin with one token, such as the tokenizer's first." if least == 1 else "Give more tokens."
        errors.fail(door, name, f"(*lead, T) with T at least {least}", errors.shape(tokens), remedy)


def _check_chunk(door: str, chunk: int) -> None:
    if not isinstance(chunk, int) or chunk < 1:
        errors.fail(door, "chunk", "at least 1", chunk, "Positions whose logits are held at a time.")
