"""Sampling as transforms of logits, composed as optax composes gradients.

    sampler = chain(temperature(0.8), top_k(40), top_p(0.95))      order is what you write

A `Sampler` is three pure functions over a state that is a pytree, so a penalty forks and rolls back with the cache:

    init(V) -> state            update(logits, state) -> (logits, state)            observe(token, state) -> state

What is filtered out has a logit of -inf. `law(sampler)` gives the log-probabilities, and is the same computation that `draw`
draws from: what is verified in speculation is what was sampled. Written for one row of logits (V,); many rows are `vmap`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, randomness
from .records import ABSENT


class Sampler(NamedTuple):
    """A transform of logits. Not a record: it holds functions; its state is a pytree of tensors, `()` where it has none.

    `deterministic` says that update leaves one token, so that drawing needs no noise.
    """

    init: Callable[[int], Any]
    update: Callable[[Tensor, Any], tuple[Tensor, Any]]
    observe: Callable[[Tensor, Any], Any]
    deterministic: bool = False


def stateless(transform: Callable[[Tensor], Tensor], *, deterministic: bool = False) -> Sampler:
    """A sampler from a function of logits (V,) -> (V,).

    Example:
        >>> never_zero = stateless(lambda logits: logits.index_fill(-1, torch.tensor(0), float("-inf")))
        >>> law(never_zero)(torch.zeros(3)).exp().tolist()
        [0.0, 0.5, 0.5]
    """
    return Sampler(lambda V: ABSENT, lambda logits, state: (transform(logits), state), lambda token, state: state, deterministic)


def chain(*samplers: Sampler) -> Sampler:
    """Apply samplers from left to right; the state is the tuple of theirs."""
    for i, sampler in enumerate(samplers):
        if not isinstance(sampler, Sampler):
            remedy = "Call a factory such as temperature(0.8) for each."
            _checks.fail("chain", f"argument {i}", "a Sampler", f"a {type(sampler).__name__}", remedy, TypeError)

    def update(logits: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        after = []
        for sampler, state in zip(samplers, states, strict=True):
            logits, state = sampler.update(logits, state)
            after.append(state)
        return logits, tuple(after)

    return Sampler(
        lambda V: tuple(sampler.init(V) for sampler in samplers),
        update,
        lambda token, states: tuple(s.observe(token, state) for s, state in zip(samplers, states, strict=True)),
        any(sampler.deterministic for sampler in samplers),
    )


def _argmax_only(logits: Tensor) -> Tensor:
    best = logits.argmax(-1, keepdim=True)  # of equals the lowest id, as torch promises
    return torch.full_like(logits, float("-inf")).scatter(-1, best, logits.gather(-1, best))


greedy = stateless(_argmax_only, deterministic=True)


def temperature(t: float | Tensor) -> Sampler:
    """Divide logits by t > 0: below 1 sharper, above 1 flatter. For the limit 0 use `greedy`."""
    _require(t > 0, "temperature", "t", "above 0", t, "For the most likely token use sampling.greedy.")
    return stateless(lambda logits: logits / t)


def top_k(k: int | Tensor) -> Sampler:
    """Keep the k greatest logits, exactly k: of equals the lower ids.

    Source: Fan, Lewis and Dauphin, Hierarchical neural story generation, arXiv:1805.04833.
    """
    if isinstance(k, float) or (isinstance(k, Tensor) and k.is_floating_point()):
        _checks.fail("top_k", "k", "an integer", k, "For a share of the probability use top_p.", TypeError)
    _require(k >= 1, "top_k", "k", "at least 1", k, "k = 1 keeps the most likely token.")
    return stateless(lambda logits: torch.where(_rank(logits) < k, logits, float("-inf")))


def top_p(p: float | Tensor) -> Sampler:
    """Keep the most likely tokens until their probabilities reach p: at least one, and of equals the lower ids; p = 1 keeps all.

    Source: Holtzman et al., The curious case of neural text degeneration, arXiv:1904.09751.
    """
    _require((p > 0) & (p <= 1), "top_p", "p", "in (0, 1]", p, "p = 1 keeps every token.")

    def transform(logits: Tensor) -> Tensor:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        reached = ordered.softmax(-1).cumsum(-1)
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)  # mass of the more likely ones
        kept = (before < p) | (p >= 1)  # rounding can bring the sum to 1 before the last token
        keep = torch.zeros_like(kept).scatter(-1, order, kept)
        return torch.where(keep, logits, float("-inf"))

    return stateless(transform)


def min_p(p: float | Tensor) -> Sampler:
    """Keep the tokens at least p times as likely as the most likely one.

    Source: Nguyen et al., Turning up the heat: min-p sampling, arXiv:2407.01082.
    """
    _require((p >= 0) & (p <= 1), "min_p", "p", "in [0, 1]", p, "p = 0 keeps every token, p = 1 the most likely ones.")
    ratio = lambda logits: (logits - logits.amax(-1, keepdim=True)).exp()
    return stateless(lambda logits: torch.where(ratio(logits) >= p, logits, float("-inf")))


def law(sampler: Sampler) -> Callable[..., Tensor]:
    """The log-probabilities that a sampler draws from, as a function (logits (V,), state=None) -> (V,) in float32 at least.

    Example:
        >>> law(chain(temperature(0.5), top_k(2)))(torch.tensor([0.0, 1.0, 2.0])).exp()
        tensor([0.0000, 0.1192, 0.8808])
    """

    def log_probabilities(logits: Tensor, state: Any = None) -> Tensor:
        logits = _accurate(logits)
        filtered, _ = sampler.update(logits, sampler.init(logits.shape[-1]) if state is None else state)
        return filtered.log_softmax(-1)

    return log_probabilities


def draw(key: Tensor, sampler: Sampler, logits: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One token () from logits (V,), and the state that has seen it.

    Raises:
        ValueError: the sampler left no token, or NaN (checked where values are concrete, in every row under vmap).
    """
    filtered, state = sampler.update(_accurate(logits), state)
    if _checks.is_true(~filtered.amax(-1).isfinite()):
        remedy = "Look for NaN in the logits, and let no filter hide every token."
        _checks.fail("draw", "what the sampler leaves", "one token at least, and no NaN", "nothing to draw from", remedy)
    token = filtered.argmax(-1) if sampler.deterministic else randomness.categorical(key, filtered)
    return token, sampler.observe(token, state)


def _require(holds: bool | Tensor, function: str, argument: str, wanted: str, got: Any, remedy: str) -> None:
    """Fail where a number, or any entry of a tensor that can be looked at, is out of range."""
    if _checks.is_true(~holds) if isinstance(holds, Tensor) else not holds:
        _checks.fail(function, argument, wanted, _checks.peek(got) if isinstance(got, Tensor) else got, remedy)


def _rank(logits: Tensor) -> Tensor:
    """The place of each logit in descending order, equals by id."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(order).scatter(-1, order, torch.arange(logits.shape[-1], device=logits.device).expand_as(order))


def _accurate(logits: Tensor) -> Tensor:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
