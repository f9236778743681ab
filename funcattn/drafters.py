"""Drafts for `fa.speculate`: by a model, by the text itself, or by a function of yours."""

from .decoding.speculative.drafters import (
    Draft,
    Drafter,
    Sharing,
    function,
    model,
    prompt_lookup,
    skip,
)

__all__ = ["Draft", "Drafter", "Sharing", "function", "model", "prompt_lookup", "skip"]
