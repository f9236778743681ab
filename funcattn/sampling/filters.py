"""Filters: samplers of the logits alone, which keep some tokens and mask the others; temperature.

Each keeps at least one token. Thresholds are numbers or tensors, so that `vmap` can map them.
"""

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door, printed
from .composition import Sampler, between, rank, require, require_integer, stateless


@door
@printed
def temperature(t: float | Tensor) -> Sampler:
    """Divide logits by t > 0: below 1 sharper, above 1 flatter. For the limit 0 use `greedy`.

    Where the quotient or its derivative overflows, the greatest logit is subtracted first, which
    changes no softmax, and logits too far below it are masked: the limit of the most likely tokens.

    Law: as t goes to 0 the distribution goes to that of the most likely tokens (test_filters.py).
    """
    _number("temperature", "t", t)
    require(
        t > 0, "temperature", "t", "above 0", t, "For the most likely token use sampling.greedy."
    )

    def transform(logits: Tensor) -> Tensor:
        limits = torch.finfo(logits.dtype)
        by = torch.as_tensor(t, dtype=logits.dtype, device=logits.device).clamp(min=limits.tiny)
        # Below reach neither x / t nor its derivative x / t^2 overflows.
        reach = by * limits.max * by.clamp(max=1)
        top = logits.detach().amax(-1, keepdim=True)
        largest = torch.where(logits.isinf(), 0, logits.detach()).abs().amax(-1, keepdim=True)
        below = logits - torch.where((largest > reach) & top.isfinite(), top, 0)
        far = (below < -reach) | (below == -torch.inf)
        return torch.where(far, -torch.inf, torch.where(far, 0, below) / by)

    return stateless(transform)


@door
@printed
def top_k(k: int | Tensor) -> Sampler:
    """Keep the k greatest logits, exactly k: of equal ones the lower ids.

    Source: Fan, Lewis and Dauphin, Hierarchical neural story generation, arXiv:1805.04833.
    """
    _number("top_k", "k", k)
    if isinstance(k, float) or (isinstance(k, Tensor) and k.is_floating_point()):
        errors.fail(
            "top_k", "k", "an integer", k, "For a share of the probability use top_p.", TypeError
        )
    require(k >= 1, "top_k", "k", "at least 1", k, "k = 1 keeps the most likely token.")
    return stateless(lambda logits: _keep(rank(logits) < k, logits))


@door
@printed
def top_p(p: float | Tensor) -> Sampler:
    """Nucleus sampling: keep the most likely tokens until their probabilities sum to p.

    At least one; of equal ones the lower ids; p = 1 keeps all.

    Source: Holtzman et al., The curious case of neural text degeneration, arXiv:1904.09751.
    """
    _number("top_p", "p", p)
    require((p > 0) & (p <= 1), "top_p", "p", "in (0, 1]", p, "p = 1 keeps every token.")

    def transform(logits: Tensor) -> Tensor:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        reached = ordered.softmax(-1).cumsum(-1)
        # An exclusive sum. Rounding can bring it to 1 early, and p to 0.
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
        kept = (before < p) | (p >= 1) | _only_first(before)
        return _keep(torch.zeros_like(kept).scatter(-1, order, kept), logits)

    return stateless(transform)


@door
@printed
def min_p(p: float | Tensor) -> Sampler:
    """Keep tokens of at least p times the greatest probability.

    Source: Nguyen et al., Turning up the heat: min-p sampling, arXiv:2407.01082.
    """
    _number("min_p", "p", p)
    require(
        between(p, 0, 1),
        "min_p",
        "p",
        "in [0, 1]",
        p,
        "p = 0 keeps every token, p = 1 the most likely ones.",
    )
    return stateless(
        lambda logits: _keep((logits - logits.amax(-1, keepdim=True)).exp() >= p, logits)
    )


@door
@printed
def typical_p(p: float | Tensor) -> Sampler:
    """Keep the tokens whose surprise -log P is nearest to the entropy until they sum to p.

    p = 1 keeps all. Tokens as near as the last one kept are kept too, as in transformers.

    Source: Meister et al., Locally typical sampling, arXiv:2202.00666.
    """
    require((p > 0) & (p <= 1), "typical_p", "p", "in (0, 1]", p, "p = 1 keeps every token.")

    def transform(logits: Tensor) -> Tensor:
        normal = logits.log_softmax(-1)
        distance = (-normal - _entropy(normal)).abs()
        ordered, order = distance.sort(dim=-1, stable=True)
        reached = normal.gather(-1, order).exp().cumsum(-1)
        last = (reached < p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        return _keep((distance <= ordered.gather(-1, last)) | (p >= 1), logits)

    return stateless(transform)


@door
@printed
def epsilon_cutoff(epsilon: float | Tensor) -> Sampler:
    """Keep tokens of probability at least epsilon, and always the most likely ones.

    Source: Hewitt, Manning and Liang, Truncation sampling as language model desmoothing,
        arXiv:2210.15191.
    """
    require(
        between(epsilon, 0, 1),
        "epsilon_cutoff",
        "epsilon",
        "in [0, 1]",
        epsilon,
        "Usual values are 3e-4 to 9e-4.",
    )
    return stateless(
        lambda logits: _keep((logits.softmax(-1) >= epsilon) | _greatest(logits), logits)
    )


@door
@printed
def eta_cutoff(epsilon: float | Tensor) -> Sampler:
    """Keep tokens of probability at least min(epsilon, sqrt(epsilon) * exp(-entropy)).

    The most likely ones are always kept.

    Source: Hewitt, Manning and Liang, Truncation sampling as language model desmoothing,
        arXiv:2210.15191.
    """
    require(
        between(epsilon, 0, 1),
        "eta_cutoff",
        "epsilon",
        "in [0, 1]",
        epsilon,
        "Usual values are 3e-4 to 2e-3.",
    )

    def transform(logits: Tensor) -> Tensor:
        normal = logits.log_softmax(-1)
        eta = (epsilon**0.5 * (-_entropy(normal)).exp()).clamp(max=epsilon)
        return _keep((normal.exp() >= eta) | _greatest(logits), logits)

    return stateless(transform)


@door
@printed
def top_n_sigma(n: float | Tensor) -> Sampler:
    """Keep the logits within n standard deviations of the greatest, whatever the temperature.

    The deviation is that of the unmasked logits, divided by their number, as in llama.cpp.

    Source: Tang et al., Top-n-sigma: not all logits are you need, arXiv:2411.07641.
    """
    require(n >= 0, "top_n_sigma", "n", "0 or more", n, "n = 1 is usual; n = 0 keeps the greatest.")

    def transform(logits: Tensor) -> Tensor:
        there = logits != -torch.inf
        number = there.sum(-1, keepdim=True)
        seen = torch.where(there, logits, 0)
        mean = seen.sum(-1, keepdim=True) / number
        sigma = (
            torch.where(there, logits - mean, 0).square().sum(-1, keepdim=True) / number
        ).sqrt()
        near = logits >= logits.amax(-1, keepdim=True) - n * sigma.detach()
        return _keep(near | _greatest(logits), logits)  # inf * 0 is NaN

    return stateless(transform)


@door
@printed
def top_h(share: float | Tensor, *, candidates: int = 100) -> Sampler:
    """Keep the most likely tokens while their entropy is at most a share of the whole entropy.

    At least one is kept.

    Args:
        share: in (0, 1]; transformers' `top_h`.
        candidates: only this many of the most likely tokens are considered, as in transformers.

    Source: Baghaei Potraghloo et al., Top-H decoding: adapting the creativity and coherence with
        bounded entropy in text generation, arXiv:2509.02510.
    """
    require(
        (share > 0) & (share <= 1), "top_h", "share", "in (0, 1]", share, "A usual value is 0.4."
    )
    require_integer("top_h", "candidates", candidates, 1, "The default is 100.")

    def transform(logits: Tensor) -> Tensor:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        first = ordered[..., :candidates]
        parts = torch.special.entr(first.softmax(-1))
        kept = (
            (parts.cumsum(-1) <= parts.sum(-1, keepdim=True) * share)
            | (share >= 1)
            | _only_first(first)
        )
        return _keep(
            torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :candidates], kept),
            logits,
        )

    return stateless(transform)


def _keep(kept: Tensor, logits: Tensor) -> Tensor:
    return torch.where(kept, logits, -torch.inf)


def _greatest(logits: Tensor) -> Tensor:
    return logits >= logits.amax(-1, keepdim=True)


def _only_first(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-1], device=x.device) == 0


def _entropy(normal: Tensor) -> Tensor:
    """The entropy (1,) of log-probabilities (V,); masked tokens add nothing."""
    return torch.special.entr(normal.exp()).sum(-1, keepdim=True)


def _number(function: str, argument: str, x: object) -> None:
    if not isinstance(x, int | float | Tensor):
        errors.fail(
            function,
            argument,
            "a number or a tensor",
            repr(x),
            "A tensor gives each row its own under vmap.",
            TypeError,
        )
