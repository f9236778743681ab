"""The loss is an attention: log-likelihoods over a vocabulary, without its logits in memory.

loss_i = log sum_v exp(hidden_i . head_v) - hidden_i . head_{target_i}

api           cross_entropy, with its arguments validated
likelihoods   the routes: tensors, records, few logits; sharded vocabularies
functions     the autograd Functions, closed at every order
operators     a pass as one operation of compiled code
passes        value, gradient and Hessian over blocks of rows
"""

from .api import cross_entropy
from .likelihoods import by_blocks, cross_entropies, of_logits, weighted_cross_entropy

__all__ = [
    "by_blocks",
    "cross_entropies",
    "cross_entropy",
    "of_logits",
    "weighted_cross_entropy",
]
