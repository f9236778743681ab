"""Evaluation: scores and perplexity of texts, activations, and interventions on them.

scores        score, score_continuation, score_and_greedy, windows, perplexity
activations   trace, patch, patched
jacobians     jacobian_lens: the mean transport of a layer's residual to the final one
lenses      logit_lens: what each layer would predict

All are pure functions: a score has a gradient in the weights, a patched logit in the activation,
and vmap maps both.
"""

from .activations import Change, Where, patch, patched, trace
from .jacobians import JacobianLens, jacobian_lens
from .lenses import LogitLens, logit_lens
from .scores import Window, perplexity, score, score_and_greedy, score_continuation, windows

foretold = score_and_greedy  # a deprecated name, which still works

__all__ = [
    "Change",
    "JacobianLens",
    "LogitLens",
    "Where",
    "Window",
    "jacobian_lens",
    "logit_lens",
    "score_and_greedy",
    "patch",
    "patched",
    "perplexity",
    "score",
    "score_continuation",
    "trace",
    "windows",
]
