"""Log-probabilities and sampler states along a draft, as if its tokens were sampled one by one.

    log_probs, states = log_probs_along_draft(sampler, logits, proposed, state)
    done = accept(key, log_probs.exp(), draft, proposed)
    state = sampler.observe(done.token, select_state(states, done.count))

To roll back is to select an earlier state of those that were computed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...core import errors
from ...core.doors import door
from ...records import formerly, record
from ...sampling import Sampler, greedy, log_probs_with_state
from ...tree import Tree
from .acceptance import Accepted, accept
from .rules import Rule, blockwise


@formerly(laws="log_probs")
@record
class AlongDraft(NamedTuple):
    """Log-probabilities and sampler states at the N + 1 positions of a draft.

    log_probs: (N + 1, V), row n after the first n tokens. states: the sampler state of each row,
    leaves (N + 1, ...): row n has observed n tokens, and is ready to observe the next.
    """

    log_probs: Tensor
    states: Tree


@door
def log_probs_along_draft(
    sampler: Sampler, logits: Tensor, proposed: Tensor, state: Tree
) -> AlongDraft:
    """The sampler's log-probabilities and states at the N + 1 positions of a draft.

    Args:
        sampler: any sampler; penalties, grammars and mirostat observe the drafted tokens before
            each position.
        logits: (N + 1, V), the model's, row n after the first n tokens.
        proposed: int64 (N,), the draft.
        state: the sampler's state before the draft.

    Law: equal to sampling one token after another (test_verification.py).
    """
    if proposed.dim() != 1 or logits.shape[:-1] != (len(proposed) + 1,):
        wanted = (
            f"(N + 1, V) with N = {errors.shape(proposed)[0] if proposed.dim() else None} as "
            "proposed"
        )
        errors.fail(
            "log_probs_along_draft",
            "logits",
            wanted,
            errors.shape(logits),
            "One row before the draft, one after each token.",
        )
    rows, states = [], []
    for n, row in enumerate(logits.unbind()):
        log_probs, state = log_probs_with_state(sampler, row, state)
        rows.append(log_probs)
        states.append(state)
        if n < len(proposed):
            state = sampler.observe(proposed[n], state)
    return AlongDraft(torch.stack(rows), tree.map(lambda *leaves: torch.stack(leaves), *states))


@door
def accept_greedy(
    sampler: Sampler, logits: Tensor, proposed: Tensor, valid: Tensor, state: Tree
) -> tuple[Accepted, Tree]:
    """`accept` for a deterministic sampler: drafted tokens are accepted while they are the argmax.

    No softmax is computed.

    Args:
        sampler: a deterministic one.
        logits, proposed, state: as in `log_probs_along_draft`.
        valid: int64 (), how many of the N count.

    Returns:
        The Accepted of `accept`, and the states of `log_probs_along_draft`; where the sampler
        allows no token, the token is -1.

    Law: equal to `accept` of the probabilities along the draft (test_verification.py).
    """
    N = len(proposed)
    if sampler is greedy:
        chosen, states = (
            logits.argmax(-1),
            tree.map(lambda leaf: leaf.expand(N + 1, *leaf.shape), state),
        )
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


def accept_along(
    key: Tensor,
    along: AlongDraft,
    draft: Tensor,
    proposed: Tensor,
    valid: Tensor,
    *,
    rule: Rule = blockwise,
) -> Accepted:
    """`accept` along a draft where the sampler may allow no token at some positions: -1 there.

    Such a position (after the end of a grammar) does not reject the draft before it; a position
    where the drafter's sampler allowed no token ends the draft.

    Args:
        key: int64 (2,), randomness for all of it.
        along: from `log_probs_along_draft`.
        draft: (N, V), the probabilities that each drafted token was drawn from; NaN where there
            were none.
        proposed: int64 (N,). valid: int64 (), how many count.
        rule: how drafts are accepted.
    """
    N, V = draft.shape
    drawable = along.log_probs.amax(-1).isfinite()
    target = torch.where(drawable.unsqueeze(-1), along.log_probs.exp(), 1 / V)
    drawn = (draft.isfinite().all(-1)).long().cumprod(0).sum()
    found = accept(
        key, target, draft, proposed, torch.minimum(valid, drawn), rule=rule, check=False
    )
    token = torch.where(drawable.index_select(0, found.count.reshape(1))[0], found.token, -1)
    tokens = torch.where(
        torch.arange(N + 1, device=token.device) == found.count, token, found.tokens
    )
    return Accepted(found.count, token, tokens)


def select_state(states: Tree, count: Tensor) -> Tree:
    """Of the states along a draft, the one after its first `count` tokens, int64 ()."""
    return tree.map(lambda leaf: leaf.index_select(0, count.reshape(1))[0], states)
