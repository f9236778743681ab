"""Regions of acceptance, and the arithmetic of probabilities that every rule uses."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...records import record


@record
class Regions(NamedTuple):
    """Thresholds of acceptance, and the distribution of the token that follows.

    threshold: (N,), h; token i passes its test where u_i < h_i.
    correction: (N + 1, V), row n the probabilities of the token after the first n of the draft.
    """

    threshold: Tensor
    correction: Tensor


def divide(a: Tensor, b: Tensor, otherwise: Tensor | float) -> Tensor:
    """a / b where b > 0, else `otherwise`; derivatives are finite."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), otherwise)


def normalize(mass: Tensor, otherwise: Tensor) -> Tensor:
    """Non-negative rows (*lead, V) normalized to sum to one.

    Rows that sum to 0 become those of `otherwise`; they are never drawn from.
    """
    return divide(mass, mass.sum(-1, keepdim=True), otherwise)


def at(probs: Tensor, tokens: Tensor) -> Tensor:
    """The probability of one token in each row: (N, V), (N,) -> (N,)."""
    return probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
