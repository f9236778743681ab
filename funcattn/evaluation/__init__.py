"""What a model thinks of a text, and what it thinks with: scores, perplexity, activations, and the effect of changing them.

scores        score, score_continuation, foretold, windows, perplexity
activations   trace, patch, patched

All are pure functions of values: a score differentiates in the weights, a patched logit in the activation, and vmap runs many.
"""

from .activations import Change, Where, patch, patched, trace
from .scores import Window, foretold, perplexity, score, score_continuation, windows

__all__ = [
    "Change",
    "Where",
    "Window",
    "foretold",
    "patch",
    "patched",
    "perplexity",
    "score",
    "score_continuation",
    "trace",
    "windows",
]
