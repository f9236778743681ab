"""Drafts for `fa.speculate`: by a model, by the text itself, or by a function of yours."""

from .checkpoints.heads import load_head
from .checkpoints.saved_heads import save_head
from .decoding.speculative.drafters import (
    Draft,
    Drafter,
    NodeReader,
    Sharing,
    function,
    prompt_lookup,
)
from .decoding.speculative.heads import Head, HeadParams, head
from .decoding.speculative.model_drafters import model, skip
from .decoding.speculative.suffix_drafters import suffix
from .decoding.speculative.tree_drafters import tree
from .training.heads import train_head

__all__ = [
    "Draft",
    "Drafter",
    "Head",
    "HeadParams",
    "NodeReader",
    "Sharing",
    "function",
    "head",
    "load_head",
    "model",
    "prompt_lookup",
    "save_head",
    "skip",
    "suffix",
    "train_head",
    "tree",
]
