"""Samplers with a state along a draft: the law at every place is the one that ordinary sampling would have had there.

    laws, states = laws_along(sampler, logits, proposed, state)
    done = accept(key, laws.exp(), draft, proposed)
    state = sampler.observe(done.token, rewind(states, done.count))

Rolling back is keeping an older state: nothing is undone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, tree
from ..records import record
from ..sampling import Sampler, weigh


@record
class Along(NamedTuple):
    """Laws and states at each place of a draft.

    laws: (N + 1, V), log-probabilities, row n after the first n tokens. states: the state behind each law, leaves (N + 1, ...):
    it has observed those n tokens, and is ready to observe the next.
    """

    laws: Tensor
    states: Any


def laws_along(sampler: Sampler, logits: Tensor, proposed: Tensor, state: Any) -> Along:
    """The sampler's laws at the N + 1 places of a draft, and its states there.

    Args:
        sampler: any sampler; penalties, grammars and mirostat see the drafted tokens before each place.
        logits: (N + 1, V), the model's, row n after the first n tokens.
        proposed: int64 (N,).
        state: the sampler's state before the draft.

    Law: equal to sampling one token after another (test_verification.py).
    """
    if logits.shape[:-1] != (len(proposed) + 1,):
        wanted = f"(N + 1, V) with N = {len(proposed)} as proposed"
        _checks.fail("laws_along", "logits", wanted, _checks.shape(logits), "One row before the draft, one after each token.")
    laws, states = [], []
    for n, row in enumerate(logits.unbind()):
        law, state = weigh(sampler, row, state)
        laws.append(law)
        states.append(state)
        if n < len(proposed):
            state = sampler.observe(proposed[n], state)
    return Along(torch.stack(laws), tree.map(lambda *leaves: torch.stack(leaves), *states))


def rewind(states: Any, count: Tensor) -> Any:
    """The state after the first `count` tokens of a draft, int64 (), of those that `laws_along` gave."""
    return tree.map(lambda leaf: leaf.index_select(0, count.reshape(1))[0], states)
