"""Samplers with a state along a draft: the law at every place is the one that ordinary sampling would have had there.

    laws, states = laws_along(sampler, logits, proposed, state)
    done = accept(key, laws.exp(), draft, proposed)
    state = sampler.observe(done.token, rewind(states, done.count))

Rolling back is keeping an older state: nothing is undone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _checks, tree
from ..._doors import door
from ...records import record
from ...sampling import Sampler, greedy, weigh
from .acceptance import Accepted, accept
from .rules import Rule, blockwise


@record
class Along(NamedTuple):
    """Laws and states at each place of a draft.

    laws: (N + 1, V), log-probabilities, row n after the first n tokens. states: the state behind each law, leaves (N + 1, ...):
    it has observed those n tokens, and is ready to observe the next.
    """

    laws: Tensor
    states: Any


@door
def laws_along(sampler: Sampler, logits: Tensor, proposed: Tensor, state: Any) -> Along:
    """The sampler's laws at the N + 1 places of a draft, and its states there.

    Args:
        sampler: any sampler; penalties, grammars and mirostat see the drafted tokens before each place.
        logits: (N + 1, V), the model's, row n after the first n tokens.
        proposed: int64 (N,).
        state: the sampler's state before the draft.

    Law: equal to sampling one token after another (test_verification.py).
    """
    if proposed.dim() != 1 or logits.shape[:-1] != (len(proposed) + 1,):
        wanted = f"(N + 1, V) with N = {_checks.shape(proposed)[0] if proposed.dim() else None} as proposed"
        _checks.fail("laws_along", "logits", wanted, _checks.shape(logits), "One row before the draft, one after each token.")
    laws, states = [], []
    for n, row in enumerate(logits.unbind()):
        law, state = weigh(sampler, row, state)
        laws.append(law)
        states.append(state)
        if n < len(proposed):
            state = sampler.observe(proposed[n], state)
    return Along(torch.stack(laws), tree.map(lambda *leaves: torch.stack(leaves), *states))


@door
def matched(sampler: Sampler, logits: Tensor, proposed: Tensor, valid: Tensor, state: Any) -> tuple[Accepted, Any]:
    """`accept` where the sampler leaves one token: drafts stay while they are that token. No law is computed.

    Args:
        sampler: a deterministic one.
        logits, proposed, state: as in `laws_along`.
        valid: int64 (), how many of the N count.

    Returns:
        What `accept` gives, and the states of `laws_along`; where the sampler leaves nothing, the token is -1.

    Law: equal to `accept` of the laws along the draft (test_verification.py).
    """
    N = len(proposed)
    if sampler is greedy:
        chosen, states = logits.argmax(-1), tree.map(lambda leaf: leaf.expand(N + 1, *leaf.shape), state)
    else:
        picks, kept = [], []
        for n, row in enumerate(logits.unbind()):
            left, state = sampler.update(row if row.dtype == torch.float64 else row.float(), state)
            picks.append(torch.where(left.amax(-1).isfinite(), left.argmax(-1), -1))
            kept.append(state)
            if n < N:
                state = sampler.observe(proposed[n], state)
        chosen, states = torch.stack(picks), tree.map(lambda *leaves: torch.stack(leaves), *kept)
    places = torch.arange(N + 1, device=proposed.device)
    count = ((chosen[:N] == proposed) & (places[:N] < valid)).long().cumprod(0).sum()
    token = chosen.index_select(0, count.reshape(1))[0]
    return Accepted(count, token, torch.where(places <= count, chosen, -1)), states


def accept_along(key: Tensor, along: Along, draft: Tensor, proposed: Tensor, valid: Tensor, *, rule: Rule = blockwise) -> Accepted:
    """`accept` of the laws along a draft, some of which may be none: there the text ends, or the token is -1.

    A place behind which the sampler leaves no token (what follows the end of a grammar) says nothing against the draft before it;
    a place whose draft was drawn from no law ends the draft.
    """
    N, V = draft.shape
    drawable = along.laws.amax(-1).isfinite()
    target = torch.where(drawable.unsqueeze(-1), along.laws.exp(), 1 / V)
    drawn = (draft.isfinite().all(-1)).long().cumprod(0).sum()
    found = accept(key, target, draft, proposed, torch.minimum(valid, drawn), rule=rule, check=False)
    token = torch.where(drawable.index_select(0, found.count.reshape(1))[0], found.token, -1)
    tokens = torch.where(torch.arange(N + 1, device=token.device) == found.count, token, found.tokens)
    return Accepted(found.count, token, tokens)


def rewind(states: Any, count: Tensor) -> Any:
    """The state after the first `count` tokens of a draft, int64 (), of those that `laws_along` gave."""
    return tree.map(lambda leaf: leaf.index_select(0, count.reshape(1))[0], states)
