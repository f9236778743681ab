"""Evaluation: scores and perplexity of texts, activations, lenses, interventions, and pictures.

scores        score, score_continuation, score_and_greedy, windows, perplexity
activations   trace, patch, patched
jacobians     jacobian_lens: the mean transport of a layer's residual to the final one
lenses        logit_lens: what each layer would predict
patterns      attention_pattern: how much each token attends to each other one
sweeps        patching_sweep: activations of one text in another, layer by position
pictures      heat_map, lens_table, attention_maps, surprise, bars, ranked, curve
drawing       what pictures are made of

All but pictures are pure functions: a score has a gradient in the weights, a patched logit in the
activation, and vmap maps both.
"""

from .activations import Change, Where, patch, patched, trace
from .jacobians import JacobianLens, jacobian_lens
from .lenses import LogitLens, logit_lens
from .patterns import attention_pattern
from .pictures import (
    Picture,
    attention_maps,
    bars,
    curve,
    heat_map,
    lens_table,
    ranked,
    surprise,
    token_labels,
)
from .scores import Window, perplexity, score, score_and_greedy, score_continuation, windows
from .sweeps import Sweep, patching_sweep

foretold = score_and_greedy  # a deprecated name, which still works

__all__ = [
    "Change",
    "JacobianLens",
    "LogitLens",
    "Picture",
    "Sweep",
    "Where",
    "Window",
    "attention_maps",
    "attention_pattern",
    "bars",
    "curve",
    "heat_map",
    "jacobian_lens",
    "lens_table",
    "logit_lens",
    "score_and_greedy",
    "patch",
    "patched",
    "patching_sweep",
    "perplexity",
    "ranked",
    "score",
    "score_continuation",
    "surprise",
    "token_labels",
    "trace",
    "windows",
]
