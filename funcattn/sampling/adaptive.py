"""Samplers that use more than the logits: a mixture (xtc), running surprise, a second cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door, printed
from ..models import KVCache, Model
from ..records import record
from ..tree import Tree
from .composition import (
    LARGE,
    Sampler,
    between,
    chain,
    mixture,
    normalized,
    rank,
    require,
    stateless,
)


@door
@printed
def xtc(
    probability: float | Tensor = 0.5,
    threshold: float | Tensor = 0.1,
    *,
    then: Sampler | None = None,
) -> Sampler:
    """Exclude top choices: with a probability, mask all likely tokens except the least likely one.

    Likely tokens are those of probability `threshold` at least. There is no random choice in the
    sampler: its log-probabilities are those of the `mixture` of both outcomes. Samplers that should
    apply to each outcome, not to the mixture, go into `then`, such as llama.cpp's temperature,
    which it applies after its xtc.

    Args:
        probability: of excluding, at each token; llama.cpp `--xtc-probability` (0 there: off).
        threshold: llama.cpp `--xtc-threshold` (0.1); above 0.5 no token is ever excluded.
        then: samplers applied to each outcome.

    Example:
        >>> from funcattn.sampling import log_probs
        >>> log_probs(xtc(0.5, 0.25))(torch.tensor([0.5, 0.3, 0.2]).log()).exp()
        tensor([0.2500, 0.4500, 0.3000])

    Source: p-e-w, text-generation-webui pull request 6335, "Exclude top choices".

    Law: the exact mixture over the coin (test_adaptive.py::test_xtc_is_a_coin_integrated_exactly).
    """
    require(
        between(probability, 0, 1),
        "xtc",
        "probability",
        "in [0, 1]",
        probability,
        "0 changes nothing; 0.5 is usual.",
    )
    require(between(threshold, 0, 1), "xtc", "threshold", "in [0, 1]", threshold, "0.1 is usual.")

    def exclude(logits: Tensor) -> Tensor:
        above = logits.softmax(-1) >= threshold
        return torch.where(
            above & (rank(logits) < above.sum(-1, keepdim=True) - 1), -torch.inf, logits
        )

    rest = chain() if then is None else then
    return mixture(probability, rest, chain(stateless(exclude), rest))


@record
class Surprise(NamedTuple):
    """The state of mirostat.

    most: (), the greatest surprise in bits that is kept now. tokens: (V,), the surprise in bits of
    each token, of the logits after the last update.
    """

    most: Tensor
    tokens: Tensor


@door
@printed
def mirostat(tau: float = 5.0, eta: float = 0.1) -> Sampler:
    """Mirostat 2: keep tokens of at most `most` bits of surprise, adapted to tau bits a token.

    most starts at 2 * tau, and after a token of surprise s is most - eta * (s - tau). The most
    likely token is always kept.

    Args:
        tau: llama.cpp `--mirostat-ent` (5.0). eta: `--mirostat-lr` (0.1). Numbers, or tensors ().

    Put it last in a chain: surprise is computed from the logits it returns. update stores it in the
    state for `observe`, so update and observe must alternate, as in `draw`.

    Source: Basu et al., Mirostat, arXiv:2007.14966; the second version is llama.cpp's.
    """
    require(
        (tau > 0) & (tau <= LARGE),
        "mirostat",
        "tau",
        f"above 0 bits, up to {LARGE:g}",
        tau,
        "5 is usual.",
    )
    require(
        between(eta, 0, LARGE),
        "mirostat",
        "eta",
        f"0 or more, up to {LARGE:g}",
        eta,
        "0.1 is usual.",
    )

    def update(logits: Tensor, state: Surprise) -> tuple[Tensor, Surprise]:
        surprise = -logits.log_softmax(-1) / torch.log(torch.full_like(logits[:1], 2.0))
        kept = torch.where((surprise <= state.most) | (rank(logits) == 0), logits, -torch.inf)
        after = -kept.log_softmax(-1) / torch.log(torch.full_like(logits[:1], 2.0))
        return kept, Surprise(state.most, after.to(state.tokens.dtype))

    def observe(token: Tensor, state: Surprise) -> Surprise:
        found = state.tokens.gather(-1, token.reshape(1).long())[0]
        return Surprise(state.most - eta * (found - tau), state.tokens)

    init = lambda V: Surprise(torch.zeros(()) + 2 * tau, torch.zeros(V) + tau)
    return Sampler(init, update, observe)


@door
def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance of logits (V,): u + scale * (c - u) of their log-probabilities.

    At scale 1 it is c; above 1 it extrapolates. A token that the conditional logits mask stays
    masked; one that only the others mask has its conditional log-probability.

    Source: Sanchez et al., Stay on topic with classifier-free guidance, arXiv:2306.17806.
    """
    _require_scale("guide", scale)
    if conditional.shape != unconditional.shape:
        wanted, remedy = (
            f"{errors.shape(conditional)} as the conditional ones",
            "Both models need one vocabulary.",
        )
        errors.fail("guide", "unconditional", wanted, errors.shape(unconditional), remedy)
    c, u = normalized(conditional), normalized(unconditional)
    hidden = (c == -torch.inf) | (u == -torch.inf)
    return torch.where(
        hidden, c, u + scale * (torch.where(hidden, 0, c) - torch.where(hidden, 0, u))
    )


def _require_scale(function: str, scale: float | Tensor) -> None:
    require(
        between(scale, -LARGE, LARGE),
        function,
        "scale",
        f"a number, up to {LARGE:g}",
        scale,
        "1 changes nothing.",
    )


@record
class Other(NamedTuple):
    """The state of guidance: the second cache, and its logits (V,) for the next token."""

    cache: KVCache
    logits: Tensor


@door
@printed
def guidance(
    scale: float | Tensor, model: Model, params: Tree, cache: KVCache, logits: Tensor
) -> Sampler:
    """Classifier-free guidance by a second cache: without the condition, or of a negative prompt.

    Every new token is read into it. The second cache is in the sampler's state, so it forks and
    rolls back with it, and may be of another model.

    Args:
        scale: transformers' `guidance_scale`; 1 changes nothing.
        model, params, cache: of the second text; the cache needs room for the tokens to come.
        logits: (V,), after the last token of the second text.

    Example:
        >>> import funcattn as fa
        >>> from funcattn.sampling import greedy
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> logits, past = model.apply(params, torch.tensor([7]), model.cache(16))
        >>> sampler = chain(guidance(1.5, model, params, past, logits[-1]), greedy)
        >>> fa.generate(fa.key(0), model, params, torch.tensor([1, 2]), steps=3,
        ...     sampler=sampler)[0].shape
        torch.Size([3])

    Law: equal to running both texts in full (test_adaptive.py::test_guidance_reads_both_texts).
    """
    _require_scale("guidance", scale)
    if logits.dim() != 1:
        errors.fail(
            "guidance",
            "logits",
            "(V,), of the last token",
            errors.shape(logits),
            "Pass logits[-1].",
        )

    def update(conditional: Tensor, state: Other) -> tuple[Tensor, Other]:
        return guide(conditional, state.logits.to(conditional.dtype), scale), state

    def observe(token: Tensor, state: Other) -> Other:
        after, past = model.apply(params, token.reshape(1), state.cache)
        return Other(past, after[-1])

    def init(V: int) -> Other:
        if logits.shape[-1] != V:
            errors.fail(
                "guidance",
                "logits",
                f"(V,) with V = {V}",
                errors.shape(logits),
                "Both models need one vocabulary.",
            )
        return Other(cache, logits)

    return Sampler(init, update, observe)
