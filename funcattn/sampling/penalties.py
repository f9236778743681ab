"""Penalties on tokens that occurred: the state counts each, int (V,), or is the last `window`.

repetition   z / r where z > 0, z * r where z < 0, once a token occurred
presence     z - a, once a token was generated              frequency   z - a * (times generated)
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door, printed
from ..tree import Tree
from .composition import LARGE, Sampler, between, bounded, require, require_integer, stateless
from .repeats import empty_ring, observe_prompt_ring, push


@door
@printed
def repetition_penalty(
    penalty: float | Tensor, *, prompt: bool = True, window: int | None = None
) -> Sampler:
    """Divide logits of tokens that occurred by the penalty where positive, else multiply by it.

    Above 1 discourages repetition. It depends on the sign of a logit, so adding a constant to all
    logits changes the result (put it first in a chain).

    Args:
        penalty: above 0; 1 changes nothing. transformers and vLLM `repetition_penalty`, llama.cpp
            `--repeat-penalty`.
        prompt: whether the prompt counts, as it does in all three.
        window: how many of the last tokens count (llama.cpp `--repeat-last-n`, 64 there); None is
            all.

    Source: Keskar et al., CTRL, arXiv:1909.05858, section 4.1.
    """
    require(
        penalty > 0,
        "repetition_penalty",
        "penalty",
        "above 0",
        penalty,
        "1 changes nothing; 1.1 is usual.",
    )
    moderate = between(penalty, 1 / LARGE, LARGE)
    require(
        moderate,
        "repetition_penalty",
        "penalty",
        f"from {1 / LARGE:g} to {LARGE:g}",
        penalty,
        "1.1 is usual.",
    )
    penalize = lambda logits: torch.where(logits > 0, logits / penalty, logits * penalty)
    return _counting(
        "repetition_penalty",
        lambda x, counts: torch.where(counts > 0, penalize(x), x),
        prompt,
        window,
    )


@door
@printed
def presence_penalty(
    penalty: float | Tensor, *, prompt: bool = False, window: int | None = None
) -> Sampler:
    """Subtract the penalty from the logit of every token that was generated, however often.

    vLLM and OpenAI `presence_penalty` (in [-2, 2], negative encourages), of generated tokens only;
    llama.cpp `--presence-penalty` counts the last 64 tokens with the prompt: `prompt=True,
    window=64`.
    """
    _require_finite("presence_penalty", penalty)
    return _counting(
        "presence_penalty", lambda x, counts: x - penalty * (counts > 0), prompt, window
    )


@door
@printed
def frequency_penalty(
    penalty: float | Tensor, *, prompt: bool = False, window: int | None = None
) -> Sampler:
    """Subtract the penalty from a logit once for each time that the token was generated.

    Names and edge cases as `presence_penalty`.
    """
    _require_finite("frequency_penalty", penalty)
    return _counting("frequency_penalty", lambda x, counts: x - penalty * counts, prompt, window)


@door
@printed
def logit_bias(bias: Mapping[int, float] | Tensor) -> Sampler:
    """Add a number to each logit: a mapping from ids to numbers, or a tensor (V,).

    -inf masks a token; masked tokens stay masked.

    vLLM and OpenAI `logit_bias`, llama.cpp `--logit-bias`, transformers `sequence_bias` of single
    tokens.
    """
    if isinstance(bias, Mapping):
        if not all(isinstance(token, int) and token >= 0 for token in bias):
            errors.fail(
                "logit_bias",
                "bias",
                "keyed by ids, 0 or more",
                list(bias),
                "Encode text with the tokenizer.",
                TypeError,
            )
        ids, added = (
            torch.tensor(list(bias), dtype=torch.int64),
            torch.tensor(list(bias.values()), dtype=torch.float64),
        )
    else:
        ids, added = None, bias
    wanted, remedy = f"numbers or -inf, up to {LARGE:g}", "To force a token, allow no other."
    require(
        (added == -torch.inf) | (abs(added) <= LARGE), "logit_bias", "bias", wanted, added, remedy
    )

    def transform(logits: Tensor) -> Tensor:
        require_ids(
            "logit_bias", ids if ids is not None else added, logits.shape[-1], whole=ids is None
        )
        if ids is None:
            return bounded(logits + added)
        whole = torch.zeros_like(logits).index_add(-1, ids.to(logits.device), added.to(logits))
        return bounded(logits + whole)

    return stateless(transform)


def require_ids(function: str, ids: Tensor, V: int, *, whole: bool) -> None:
    """Fail where a tensor over the vocabulary is not (V,), or an id is not below V."""
    if whole and ids.shape[-1:] != (V,):
        errors.fail(
            function,
            "the tensor",
            f"(V,) with V = {V} as the logits",
            errors.shape(ids),
            "Give one entry a token.",
        )
    if not whole and errors.is_true((ids >= V) | (ids < 0)):
        errors.fail(
            function,
            "ids",
            f"below the vocabulary's {V}",
            errors.peek(ids),
            "Use the tokenizer of this model.",
        )


def _require_finite(function: str, penalty: float | Tensor) -> None:
    wanted = f"a finite number, up to {LARGE:g}"
    require(
        between(penalty, -LARGE, LARGE), function, "penalty", wanted, penalty, "0 changes nothing."
    )


def _counting(
    function: str, penalize: Callable[[Tensor, Tree], Tensor], prompt: bool, window: int | None
) -> Sampler:
    """A sampler whose update takes the counts (V,) of tokens that occurred."""
    if window is not None:
        require_integer(function, "window", window, 1, "None counts everything.")
        init: Callable[[int], Tree] = lambda V: empty_ring(window)
        count = lambda ring, V: tally(ring.tokens.clamp(min=0), ring.tokens >= 0, V)
        observe: Callable[[Tensor, Tree], Tree] = push
        observe_prompt: Callable[[Tensor, Tensor, Tree], Tree] = observe_prompt_ring
    else:
        init = lambda V: torch.zeros(V, dtype=torch.int64)
        count = lambda counts, V: counts
        observe = lambda token, counts: (
            counts + (torch.arange(counts.shape[-1], device=counts.device) == token)
        )
        observe_prompt = lambda tokens, length, counts: (
            counts
            + tally(
                tokens, torch.arange(len(tokens), device=tokens.device) < length, counts.shape[-1]
            )
        )
    update = lambda logits, state: (
        bounded(penalize(logits, count(state, logits.shape[-1]))),
        state,
    )
    return (
        Sampler(init, update, observe, False, observe_prompt)
        if prompt
        else Sampler(init, update, observe)
    )


def tally(tokens: Tensor, counted: Tensor, V: int) -> Tensor:
    """Counts (V,) of tokens (T,), of those where `counted` is True."""
    return torch.zeros(V, dtype=torch.int64, device=tokens.device).scatter_add(
        -1, tokens, counted.long()
    )
