"""Samplers against repeated passages. Their state is the last `window` tokens.

The shape is static, so they vmap and compile; older tokens are dropped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door, printed
from ..records import record
from .composition import LARGE, Sampler, between, bounded, require, require_integer


@record
class Ring(NamedTuple):
    """The last tokens, int64 (W,): the newest at the end, -1 where there is none."""

    tokens: Tensor


def empty_ring(window: int) -> Ring:
    """A window without tokens."""
    return Ring(torch.full((window,), -1, dtype=torch.int64))


def push(token: Tensor, ring: Ring) -> Ring:
    """The window with a token appended; the oldest is dropped."""
    return Ring(torch.cat([ring.tokens[1:], token.reshape(1)]))


def observe_prompt_ring(tokens: Tensor, length: Tensor, ring: Ring) -> Ring:
    """The window with the first `length` of tokens (T,) appended."""
    W = ring.tokens.shape[-1]
    places = torch.arange(W, device=tokens.device) + length
    return Ring(torch.cat([ring.tokens, tokens]).index_select(0, places))


@door
@printed
def no_repeat_ngram(n: int, *, window: int = 1024) -> Sampler:
    """Mask every token that would complete an n-gram that occurred, with the prompt.

    transformers' `no_repeat_ngram_size`.

    Args:
        n: at least 1; 1 masks every token that occurred.
        window: how many of the last tokens are searched.

    Law: equal to transformers' while all fits into the window (test_repeats.py).
    """
    require_integer("no_repeat_ngram", "n", n, 1, "3 forbids repeated triples.")
    require_integer(
        "no_repeat_ngram", "window", window, n, "Look back at least one n-gram.", called="n = "
    )

    def update(logits: Tensor, ring: Ring) -> tuple[Tensor, Ring]:
        grams = ring.tokens.unfold(0, n, 1)  # (W - n + 1, n)
        newest = ring.tokens[len(ring.tokens) - (n - 1) :]
        seen = (grams[:, : n - 1] == newest).all(-1) & (grams >= 0).all(-1)
        hidden = (
            torch.zeros_like(logits).scatter_add(
                -1, grams[:, -1].clamp(min=0), seen.to(logits.dtype)
            )
            > 0
        )
        return torch.where(hidden, -torch.inf, logits), ring

    return Sampler(lambda V: empty_ring(window), update, push, False, observe_prompt_ring)


@door
@printed
def dry(
    multiplier: float | Tensor = 0.8,
    *,
    base: float | Tensor = 1.75,
    allowed_length: int | Tensor = 2,
    breakers: Sequence[int] = (),
    window: int = 1024,
    longest: int = 50,
) -> Sampler:
    """DRY: penalize tokens that would extend a repeated passage.

    Where the passage has m tokens, the logit loses multiplier * base^(m - allowed_length).

    For each earlier position where the text matches its current end, m is the number of matching
    tokens, backward, up to the nearest breaker. The token after that position is penalized, from m
    = allowed_length on, by its longest match. The prompt counts.

    Args:
        multiplier: 0 changes nothing; llama.cpp `--dry-multiplier` (0 there).
        base, allowed_length: llama.cpp `--dry-base` (1.75), `--dry-allowed-length` (2).
        breakers: ids that end a match and are not penalized, such as those of a newline or a quote
            (`--dry-sequence-breaker` names strings; encode them).
        window: how many of the last tokens are searched, `--dry-penalty-last-n`.
        longest: matches are counted up to this many tokens, so that the power is finite.

    Source: p-e-w, text-generation-webui pull request 5677, "DRY: a modern repetition penalty".

    Law: equal to a loop over the text (test_repeats.py).
    """
    require(
        multiplier >= 0,
        "dry",
        "multiplier",
        "0 or more",
        multiplier,
        "0 changes nothing; 0.8 is usual.",
    )
    require(
        between(base, 1, LARGE),
        "dry",
        "base",
        f"at least 1, up to {LARGE:g}",
        base,
        "1.75 is usual.",
    )
    require(
        allowed_length >= 1, "dry", "allowed_length", "at least 1", allowed_length, "2 is usual."
    )
    require_integer("dry", "window", window, 2, "Look back farther.")
    require_integer("dry", "longest", longest, 1, "50 is usual.")
    if not all(isinstance(token, int) for token in breakers):
        errors.fail(
            "dry",
            "breakers",
            "ids as ints",
            repr(breakers),
            "Encode strings with the tokenizer.",
            TypeError,
        )

    def update(logits: Tensor, ring: Ring) -> tuple[Tensor, Ring]:
        text, W = ring.tokens, len(ring.tokens)
        whole = text >= 0
        for token in breakers:
            whole = whole & (text != token)
        M = min(longest, W - 1)
        before = torch.cat([torch.full((M,), -1, dtype=text.dtype, device=text.device), text])
        ends = before.unfold(0, M, 1)[1:W].flip(-1)  # ends[i, m] = text[i - m]
        newest = text[W - M :].flip(0)  # newest[m] = text[W - 1 - m]
        agree = (ends == newest) & whole[W - M :].flip(0)
        lengths = agree.long().cumprod(-1).sum(-1)  # (W - 1,): length of the match before i + 1
        lengths = torch.where(whole[1:], lengths, 0)
        places = torch.where(text[1:] >= 0, text[1:], 0)
        match = torch.zeros(
            logits.shape[-1], dtype=torch.int64, device=logits.device
        ).scatter_reduce(-1, places, lengths, "amax")
        power = bounded(
            torch.as_tensor(base, dtype=logits.dtype, device=logits.device)
            ** (match - allowed_length)
        )
        return logits - torch.where(match >= allowed_length, multiplier * power, 0), ring

    return Sampler(lambda V: empty_ring(window), update, push, False, observe_prompt_ring)
