"""Log-probabilities that a model assigns to a text, and its perplexity.

score_t = log p(tokens[t] | past, tokens[0..t-1])          perplexity = exp(- mean score)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import collectives, progress, transformer, tree, vocabulary
from ..core import errors
from ..core.doors import door
from ..decoding import hidden_along
from ..models import Model, Past
from ..records import ABSENT
from ..tree import Tree


@door
def score(
    model: Model, params: Tree, tokens: Tensor, cache: Past = ABSENT, *, chunk: int = 512
) -> Tensor:
    """The log-probability of each token given all before it.

        score_t = log softmax(logits(cache, tokens[0..t]))[tokens[t + 1]],   t = 0 .. T - 2

    The first token is read and not scored: a cache has keys and values, but not the logits of the
    token after it. To score a text behind a cache, leave the last token out of the cache and pass
    it as the first token here (as `generate` takes its prompt).

    Args:
        model, params: a decoder and its weights.
        tokens: integers (*lead, T), T >= 1; (T,) where there is a cache.
        cache: a cache that the tokens continue, not modified; `()` is none. Behind one that drops
            tokens (a `Ring`) tokens are read one at a time, as in `generate`.
        chunk: positions whose logits (chunk, V) are in memory at a time; for derivatives they are
            recomputed.

    Returns:
        (*lead, T - 1), float32 at least: natural logarithms, at most 0; entry t is of tokens[..., t
        + 1].

    Raises:
        ValueError: no tokens, ids outside of the vocabulary, a chunk below 1. TypeError: arguments
            of another kind.

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
    return _scores(model, params, hidden, tokens[..., 1:], chunk)


@door
def score_continuation(
    model: Model,
    params: Tree,
    prompt: Tensor,
    continuation: Tensor,
    cache: Past = ABSENT,
    *,
    chunk: int = 512,
) -> Tensor:
    """The log-probability (*lead, N) of each token of a continuation, given all before it.

    Logits are computed for the continuation only. The sum is the log-probability of all of it.

    Args:
        model, params: a decoder and its weights.
        prompt: integers (*lead, T), T >= 1; it continues the cache.
        continuation: integers (*lead, N), N >= 0.
        cache, chunk: as in `score`.

    Raises:
        ValueError, TypeError: as `score`.

    Law: equals the end of the scores of both joined
        (test_evaluation.py::test_a_continuation_has_the_last_scores_of_the_whole).
    """
    inputs, targets = _join("score_continuation", prompt, continuation, chunk)
    collectives.agree(
        "score_continuation",
        {"prompt": prompt, "continuation": continuation, "chunk": chunk},
        params,
    )
    hidden = _hidden(model, params, inputs, targets[..., -1:], cache)
    return _scores(model, params, hidden[..., prompt.shape[-1] - 1 :, :], targets, chunk)


@door
def score_and_greedy(
    model: Model,
    params: Tree,
    prompt: Tensor,
    continuation: Tensor,
    cache: Past = ABSENT,
    *,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """`score_continuation`, and bool (*lead, N): True where a token is the argmax.

    These are the tokens of greedy decoding.

    Args and errors: as `score_continuation`.
    """
    inputs, targets = _join("score_and_greedy", prompt, continuation, chunk)
    collectives.agree(
        "score_and_greedy", {"prompt": prompt, "continuation": continuation, "chunk": chunk}, params
    )
    hidden = _hidden(model, params, inputs, targets[..., -1:], cache)[
        ..., prompt.shape[-1] - 1 :, :
    ]

    scores = _scores(model, params, hidden, targets, chunk)
    argmax = lambda ends, hidden, targets: model.logits(ends, hidden).argmax(-1)
    with torch.no_grad():
        likeliest = vocabulary.by_blocks(
            argmax, params, hidden.detach().flatten(0, -2), targets.flatten(), chunk
        )
    return scores, likeliest.reshape(targets.shape) == targets


class Window(NamedTuple):
    """A forward pass over part of a long text: it reads begin..end and scores first..end."""

    begin: int
    first: int
    end: int


@door
def windows(length: int, *, context: int | None = None, stride: int | None = None) -> list[Window]:
    """The windows that score each token of a text but the first once.

    Args:
        length: tokens of the text.
        context: the most tokens of a window; None is all of them.
        stride: tokens from one window to the next; None is half of the context. Each token has at
            least context - stride tokens before it (in the first window, all there are).

    Example:
        >>> [tuple(window) for window in windows(10, context=6, stride=3)]
        [(0, 1, 6), (3, 6, 9), (6, 9, 10)]

    Source: Hugging Face, docs of transformers, Perplexity of fixed-length models.
    """
    context = max(length, 2) if context is None else context
    stride = max(context // 2, 1) if stride is None else stride
    if context < 2:
        errors.fail(
            "windows",
            "context",
            "at least 2 tokens",
            context,
            "A token is scored by what is before it.",
        )
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
    model: Model,
    params: Tree,
    tokens: Tensor,
    *,
    context: int | None = None,
    stride: int | None = None,
    chunk: int = 512,
) -> Tensor:
    """exp(- mean score) of a text, in windows where it is longer than the context.

    Each token but the first is scored once, with at least context - stride tokens before it. A
    stride of 1 is the most exact, and reads a context for each token.

    Args:
        model, params: a decoder and its weights.
        tokens: integers (*lead, T), T >= 2; the mean is over all rows.
        context: tokens of a window; None is all of them.
        stride: tokens from one window to the next; None is half of the context.
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

    Law: where the text fits, exp(-mean(score)); else the naive loop
        (test_evaluation.py::test_perplexity_is_the_naive_loop).
    """
    _check_tokens("perplexity", "tokens", tokens, 2)
    parts = [
        score_continuation(
            model, params, tokens[..., begin:first], tokens[..., first:end], chunk=chunk
        )
        for begin, first, end in progress.track(
            windows(tokens.shape[-1], context=context, stride=stride), "reading"
        )
    ]
    return (-torch.cat(parts, -1).mean()).exp()


def _hidden(model: Model, params: Tree, inputs: Tensor, last: Tensor, cache: Past) -> Tensor:
    """The residual of inputs (*lead, T, E), in a text that ends with the token `last`.

    `last`, which is only scored, counts where rotary angles follow the length of the text.
    """
    if transformer.follower(model) is None:
        return hidden_along(model, params, inputs, cache)
    return hidden_along(model, params, torch.cat([inputs, last], -1), cache)[
        ..., : inputs.shape[-1], :
    ]


def _scores(model: Model, params: Tree, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log p of targets (*lead, N) from hidden (*lead, N, E), n = chunk rows at a time."""
    rows = hidden.flatten(0, -2)
    V = transformer.vocabulary_size(model, params, rows)
    if errors.is_true((targets < 0) | (targets >= V)):
        errors.fail(
            "score",
            "tokens",
            f"ids in 0..{V - 1}",
            "another",
            "Encode with the tokenizer of this model.",
        )
    wanted = targets.flatten().long()
    return -transformer.token_losses(model, params, rows, wanted, rows=chunk).reshape(targets.shape)


def _join(door: str, prompt: Tensor, continuation: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Inputs (all tokens but the last) and targets of a prompt and its continuation, validated."""
    _check_tokens(door, "prompt", prompt, 1)
    _check_tokens(door, "continuation", continuation, 0)
    _check_chunk(door, chunk)
    if prompt.shape[:-1] != continuation.shape[:-1]:
        got, remedy = errors.shape(continuation), "Give both the same leading axes, or map by vmap."
        errors.fail(
            door, "continuation", f"{(*prompt.shape[:-1], 'N')}, as the prompt leads", got, remedy
        )
    return torch.cat([prompt, continuation], -1)[..., :-1], continuation


def _check_tokens(door: str, name: str, tokens: Tensor, least: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in tree.INTEGERS:
        got = getattr(tokens, "dtype", f"a {type(tokens).__name__}")
        errors.fail(
            door,
            name,
            "an integer tensor",
            got,
            "Pass token ids: torch.tensor(tokenizer.encode(text)).",
            TypeError,
        )
    if not tokens.dim() or tokens.shape[-1] < least:
        remedy = (
            "Begin with one token, such as the tokenizer's first."
            if least == 1
            else "Give more tokens."
        )
        errors.fail(door, name, f"(*lead, T) with T at least {least}", errors.shape(tokens), remedy)


def _check_chunk(door: str, chunk: int) -> None:
    if not isinstance(chunk, int) or chunk < 1:
        errors.fail(
            door, "chunk", "at least 1", chunk, "Positions whose logits are held at a time."
        )
