"""What a model thinks of a text, and what it thinks with: scores, perplexity, activations, and the effect of changing them.

scores        score, score_continuation, score_and_greedy, windows, perplexity
activations   trace, patch, patched

All are pure functions of values: a score differentiates in the weights, a patched logit in the activation, and vmap runs many.
"""

from .activations import Change, Where, patch, patched, trace
from .scores import Window, perplexity, score, score_and_greedy, score_continuation, windows

foretold = score_and_greedy  # an earlier name, which goes on working

__all__ = [
    "Change",
    "Where",
    "Window",
    "score_and_greedy",
    "patch",
    "patched",
    "perplexity",
    "score",
    "score_continuation",
    "trace",
    "windows",
]
