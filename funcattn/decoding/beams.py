"""Search for likely texts: beam search, contrastive decoding, the best of several samples.

A beam is a fork of the cache. Leaves that all beams have in common, such as the keys and values of
the prompt, are stored once and not mapped by vmap; selecting beams indexes only the other leaves:

    score(text) = log P(text) / length ^ length_penalty

Running beams are kept by the greatest log P, finished ones by the greatest score.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from .. import caches, progress, randomness, sampling, tree
from ..caches import KVCache
from ..core import errors
from ..core.doors import door
from ..models import Model, Past
from ..records import ABSENT, record
from ..sampling import Sampler
from ..tree import Tree
from .generation import generate
from .loop import all_rows, begun, hidden_along, is_stop, prefill, until_stop
from .requests import Request, check_numbers


@record
class Texts(NamedTuple):
    """Texts from the best to the worst.

    tokens: int64 (n, steps), after the end filled with the stop id. scores: float (n,).
    lengths: int64 (n,), counting the stop id.
    """

    tokens: Tensor
    scores: Tensor
    lengths: Tensor


@door
def beam_search(
    model: Model,
    params: Tree,
    prompt: Tensor,
    cache: Past = ABSENT,
    *,
    steps: int,
    beams: int = 4,
    best: int = 1,
    stop: Sequence[int] = (),
    length_penalty: float = 1.0,
    early_stop: bool | Literal["never"] = False,
    sampler: Sampler | None = None,
) -> Texts:
    """Beam search: the most probable continuations that a beam of this width finds.

    Args:
        model, params, prompt, cache, steps, stop: as in `fa.generate`.
        beams: how many unfinished texts are kept.
        best: how many texts to return, at most `beams`.
        length_penalty: exponent of the length that divides log P; above 0 favours long texts, 0 is
            log P itself.
        early_stop: True ends once `beams` texts have finished; False once no running beam beats
            them at its present length; "never" once none could at any length up to steps. As
            transformers' `early_stopping`.
        sampler: maps logits to log-probabilities, such as penalties or a grammar; each beam has a
            state of it.

    Returns:
        Texts with n = best. Scores are of the tokens written, with the stop id. Where fewer texts
        than `best` were found (a grammar allows no more, or beams ended where it allows no token),
        the remaining rows are empty: tokens 0, length 0, score -inf.

    Raises:
        ValueError, TypeError: as generate; beams or best below 1, best above beams; logits or
            log-probabilities that are NaN.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> found = beam_search(model, model.init(fa.key(0)), torch.tensor([1, 2]), steps=3,
        ...     beams=4, best=2)
        >>> found.tokens.shape, bool(found.scores[0] >= found.scores[1])
        (torch.Size([2, 3]), True)

    Law: with as many beams as there are texts it is exhaustive search; vmap over prompts equals the
        loop (test_search.py).
    """
    _check_counts("beam_search", beams=beams, best=best, steps=steps)
    if best > beams:
        errors.fail("beam_search", "best", f"at most the {beams} beams", best, "Keep more beams.")
    if early_stop not in (True, False, "never"):
        errors.fail(
            "beam_search",
            "early_stop",
            'True, False or "never"',
            repr(early_stop),
            "As transformers' early_stopping.",
        )
    _check_penalty(length_penalty, steps)
    sampler = sampling.chain() if sampler is None else sampler
    request = Request("beam_search", model, params, prompt, cache, steps, sampler, stop).checked(
        beams=beams
    )
    prefix = _all_but_last(request)
    x, delta = model.hidden(params, prompt[-1:], prefix)
    logits = model.logits(params, x[-1])
    V, device = logits.shape[-1], logits.device
    states = begun(request, logits)
    past = caches.commit(caches.fork_many(prefix, delta, steps), delta)
    states, logits, past = tree.map(
        lambda leaf: leaf.expand(beams, *leaf.shape), (states, logits, past)
    )

    def read(token: Tensor, past: KVCache) -> tuple[Tensor, KVCache]:
        x, delta = model.hidden(params, token.reshape(1), past)
        return model.logits(params, x[-1]), caches.commit(past, delta)

    written = torch.zeros(beams, steps, dtype=torch.int64, device=device)
    # At first one beam is a text; it forks in the first step.
    total = torch.where(torch.arange(beams, device=device) == 0, 0.0, -torch.inf).to(logits.dtype)
    done = Texts(
        written,
        torch.full_like(total, -torch.inf),
        torch.zeros(beams, dtype=torch.int64, device=device),
    )
    ended = torch.zeros(beams, dtype=torch.bool, device=device)
    improvable = torch.ones((), dtype=torch.bool, device=device)
    many = min(max(2, 1 + len(stop)) * beams, beams * V)
    for step in progress.track(range(steps), "searching"):
        log_p = vmap(lambda logits, state: _allowed(sampler, logits, state))(logits, states)
        _check_numbers(step, logits, log_p, total)
        # A sampler may give NaN for a beam that is no text.
        log_p = torch.where(total.unsqueeze(-1) > -torch.inf, log_p, -torch.inf)
        values, places = (log_p + total.unsqueeze(-1)).reshape(-1).topk(many)
        parent, token = places // V, places % V
        texts = written.index_select(0, parent).index_fill(
            1, torch.tensor([step], device=device), 0
        )
        # filled: a stop id stays
        texts = torch.where(torch.arange(steps, device=device) >= step, token.unsqueeze(-1), texts)
        ends = is_stop(token, stop) | (step + 1 == steps)

        finishes = (
            ends & (torch.arange(many, device=device) < beams) & improvable & (values > -torch.inf)
        )
        scores = torch.where(finishes, values / (step + 1) ** length_penalty, -torch.inf)
        finished = Texts(
            torch.where(finishes.unsqueeze(-1), texts, 0),
            scores,
            torch.where(finishes, step + 1, 0),
        )
        joined = Texts(*(torch.cat([a, b]) for a, b in zip(done, finished, strict=True)))
        keep = joined.scores.topk(beams).indices
        done, ended = (
            Texts(*(x.index_select(0, keep) for x in joined)),
            torch.cat([ended, finishes]).index_select(0, keep),
        )
        if step + 1 == steps:
            break

        total, chosen = torch.where(ends, -torch.inf, values).topk(beams)
        written, token, parent = (x.index_select(0, chosen) for x in (texts, token, parent))
        reach = steps if early_stop == "never" and length_penalty > 0 else step + 1
        worst = torch.where(ended, done.scores.amin(), -torch.inf)
        improvable = (
            improvable
            & (total[0] / reach**length_penalty > worst).any()
            & ~(ended.all() & (early_stop is True))
        )
        if all_rows(~improvable):
            break
        states, past = (_chosen(each, parent) for each in (states, past))
        states = vmap(
            lambda logits, token, state: sampler.observe(token, sampler.update(logits, state)[1])
        )(logits.index_select(0, parent), token, states)
        rows, axes = _unmapped(past)
        logits, past = vmap(read, (0, axes))(token, rows)
    return Texts(*(x[:best] for x in done))


@door
def best_of(
    key: Tensor,
    model: Model,
    params: Tree,
    prompt: Tensor,
    cache: Past = ABSENT,
    *,
    n: int,
    steps: int,
    sampler: Sampler,
    stop: Sequence[int] = (),
    score: Callable[[Tensor], Tensor] | None = None,
) -> Texts:
    """Sample n continuations of one cache, which is stored once, and order them by a score.

    Args:
        key, model, params, prompt, cache, steps, sampler, stop: as in `fa.generate`; text i is
            drawn with `split(key, n)[i]`.
        n: how many texts.
        score: tokens int64 (steps,) -> (), such as a reward or a verifier; None is the model's mean
            log-probability of the tokens up to the stop id, as vLLM's `best_of`.

    Returns:
        Texts with all n, the best first; a score that is NaN comes last.

    Raises:
        ValueError, TypeError: as generate; n below 1, a score of another shape.

    Law: each text is what generate writes with its key (test_search.py).
    """
    _check_counts("best_of", n=n, steps=steps)
    prefix = _all_but_last(
        Request("best_of", model, params, prompt, cache, steps, sampler, stop).checked(key=key, n=n)
    )
    last = prompt[-1:]
    seen = sampling.primed(sampler, prompt[:-1])  # the sampler observes the last one in generate
    one = lambda key: generate(
        key, model, params, last, prefix, steps=steps, sampler=seen, stop=stop
    )[0]
    tokens = vmap(one)(randomness.split(key, n))
    lengths = until_stop(tokens, torch.full_like(tokens[:, 0], steps), stop)
    if score is None:

        def rate(tokens: Tensor, length: Tensor) -> Tensor:
            logits = model.logits(
                params, hidden_along(model, params, torch.cat([last, tokens[:-1]]), prefix)
            )
            log_p = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            return (
                torch.where(torch.arange(steps, device=tokens.device) < length, log_p, 0).sum()
                / length
            )

        scores = vmap(rate)(tokens, lengths)
    else:
        scores = vmap(lambda tokens: _rated(score, tokens))(tokens)
    # NaN would be the greatest
    order = (
        torch.where(scores.isnan(), -torch.inf, scores).sort(descending=True, stable=True).indices
    )
    return Texts(*(x.index_select(0, order) for x in (tokens, scores, lengths)))


@door
def contrastive(
    model: Model,
    params: Tree,
    cache: KVCache,
    logits: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    beta: float | Tensor = 0.5,
) -> Sampler:
    """Contrastive decoding: a sampler that weighs an expert's logits against a weaker model's.

        (1 + beta) * log P_expert - beta * log P_amateur    where P_expert >= alpha * max P_expert

    Args:
        model, params, cache: the amateur, and its cache of the same text, with room for the tokens
            to be written.
        logits: (V,), the amateur's after the last token of the prompt.
        alpha: the threshold, relative to the greatest probability of the expert.
        beta: the weight of the amateur.

    Returns:
        A sampler for `generate` and `beam_search`: `chain(min_p(alpha), guidance(1 + beta, ...))`.

    Source: Li et al., Contrastive decoding, arXiv:2210.15097; O'Brien and Lewis, arXiv:2309.09117
        (beta).
    """
    within = sampling.composition.between(
        beta, -sampling.composition.LARGE, sampling.composition.LARGE
    )
    sampling.composition.require(
        within, "contrastive", "beta", "a number of moderate size", beta, "0.5 is usual."
    )
    return sampling.chain(
        sampling.min_p(alpha), sampling.guidance(1 + beta, model, params, cache, logits)
    )


def _all_but_last(request: Request) -> Past:
    """The cache of the prompt without its last token, which each text reads itself."""
    prompt = request.prompt[:-1]
    return (
        prefill(request.model, request.params, prompt, request.cache, room=0).cache
        if len(prompt)
        else request.cache
    )


def _rated(score: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    rated = score(tokens)
    if not isinstance(rated, Tensor) or rated.dim():
        got = errors.shape(rated) if isinstance(rated, Tensor) else f"a {type(rated).__name__}"
        errors.fail(
            "best_of",
            "what score returns",
            "a tensor ()",
            got,
            "It is called under vmap, with one text.",
            TypeError,
        )
    return rated


def _allowed(sampler: Sampler, logits: Tensor, state: Tree) -> Tensor:
    """The sampler's log-probabilities (V,): -inf everywhere, not NaN, where it allows no token."""
    left, _ = sampler.update(logits if logits.dtype == torch.float64 else logits.float(), state)
    return sampling.composition.normalized(left)


def _chosen(value: Tree, parent: Tensor) -> Tree:
    """States or caches of the selected beams; a leaf expanded over the beams stays expanded."""
    return tree.map(
        lambda leaf: leaf if leaf.stride(0) == 0 else leaf.index_select(0, parent), value
    )


def _unmapped(value: Tree) -> tuple[Tree, Tree]:
    """The in_axes of a vmap over beams, and the value with its common leaves unmapped.

    A leaf that all beams have in common is stored and read once. It is recognized by its stride: a
    tensor that vmap did not map comes out of vmap expanded, with a stride of 0.
    """
    alike = lambda leaf: leaf.stride(0) == 0
    return tree.map(lambda x: x[0] if alike(x) else x, value), tree.map(
        lambda x: None if alike(x) else 0, value
    )


def _check_numbers(step: int, logits: Tensor, log_p: Tensor, total: Tensor) -> None:
    """Fail where log-probabilities are NaN in a beam whose score is finite so far."""
    running = total > -torch.inf
    check_numbers("beam_search", f"the logits of step {step}", logits, running)
    if errors.is_true(running.unsqueeze(-1) & log_p.isnan()):
        remedy = "Hide a token by -inf, and let no sampler make +inf or NaN."
        errors.fail(
            "beam_search",
            f"what the sampler leaves in step {step}",
            "numbers or -inf",
            "NaN or +inf",
            remedy,
        )


def _check_penalty(length_penalty: object, steps: int) -> None:
    """Fail where a length to the power of length_penalty overflows float32."""
    number = isinstance(length_penalty, int | float)
    if not number or not abs(length_penalty) * math.log(max(steps, 2)) < math.log(
        torch.finfo(torch.float32).max
    ):
        wanted, remedy = (
            f"a number for which {steps} ** length_penalty is one of float32",
            "1 is the mean, 0 the sum.",
        )
        errors.fail(
            "beam_search",
            "length_penalty",
            wanted,
            repr(length_penalty),
            remedy,
            ValueError if number else TypeError,
        )


def _check_counts(function: str, **counts: int) -> None:
    for name, count in counts.items():
        if not errors.is_count(count, 1):
            errors.fail(function, name, "an int, at least 1", repr(count), "Ask for one at least.")
