"""Training as pure functions: losses, optimizers, a step, and a resumable training loop.

optimizer = fa.training.chain(fa.training.clip(1.0), fa.training.adamw(fa.training.cosine(1e-3,
2000, warmup=100))) step = fa.training.step(model, optimizer)
params, state, metrics = step(params, optimizer.init(params), tokens)

params, state, history = fa.training.fit(key, model, params, text, optimizer=optimizer, steps=2000,
folder="run", resume=True)
"""

from .combined import accumulate, chain, clip
from .fitting import Fitted, Report, draw, fit
from .losses import loss
from .norms import norm
from .optimizers import Optimizer, adamw, apply, hidden_matrices, matrices, muon, orthogonal, sgd
from .schedules import constant, cosine, wsd
from .steps import Metrics, step
from .text import characters

__all__ = [
    "loss",
    "step",
    "fit",
    "draw",
    "Metrics",
    "Fitted",
    "Report",
    "Optimizer",
    "sgd",
    "adamw",
    "muon",
    "clip",
    "chain",
    "accumulate",
    "apply",
    "norm",
    "orthogonal",
    "matrices",
    "hidden_matrices",
    "constant",
    "cosine",
    "wsd",
    "characters",
]
