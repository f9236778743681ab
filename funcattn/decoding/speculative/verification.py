"""Log-probabilities and sampler states along a draft, as if its tokens were sampled one by one.

    log_probs, states = log_probs_along_draft(sampler, logits, proposed, state)
    done = accept(key, log_probs.exp(), draft, proposed)
    state = sampler.observe(done.token, select_state(states, done.count))

To roll back is to select an earlier state of those that were computed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import randomness, tree
from ...core import errors
from ...core.doors import door
from ...records import formerly, is_absent, record
from ...sampling import Sampler, greedy, log_probs_with_state
from ...tree import Tree
from .acceptance import Accepted, accept, draw_row
from .drafters import Draft
from .rules import Rule, blockwise
from .trees import Branched, accept_chosen, accept_tree


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


def accept_along_tree(
    key: Tensor,
    sampler: Sampler,
    logits: Tensor,
    proposed: Tensor,
    parent: Tensor,
    probs: Tensor | tuple[()],
    certain: Tensor | tuple[()],
    state: Tree,
    *,
    rule: Rule = blockwise,
) -> tuple[Branched, Tree]:
    """`accept_tree` by logits and a sampler, whose state at each node has observed its path.

    Args:
        key: int64 (2,), randomness for all of it.
        logits: (M + 1, V), the model's at each node.
        proposed, parent: int64 (M,), of the tree.
        probs, certain: of the draft, as in `accept_tree`.
        state: the sampler's, at the root.

    Returns:
        Branched, whose token is -1 where the sampler allows none, and the sampler's states,
        leaves (M + 1, ...), each ready to observe the next token.
    """
    if sampler is greedy:
        chosen, states = logits.argmax(-1), _everywhere(state, len(logits))
        return accept_chosen(chosen, proposed, parent), states
    rows, states = _along_nodes(sampler, logits, proposed, parent, state)
    drawable = rows.amax(-1).isfinite()
    if sampler.deterministic:
        picked = torch.where(drawable, rows.argmax(-1), -1)
        return accept_chosen(picked, proposed, parent), states
    target = torch.where(drawable.unsqueeze(-1), rows.softmax(-1), 1 / rows.shape[-1])
    draft, judged = probs, None
    if not is_absent(probs):
        # Where the drafter's sampler allowed no token, what stands there was drawn from nothing.
        lost = ~probs.isfinite().all(-1)
        draft = torch.where(lost.unsqueeze(-1), 0, probs).to(target.dtype)
        judged = lost.index_select(0, parent.clamp(min=0)) | (
            torch.zeros_like(lost[1:]) if is_absent(certain) else certain
        )
    found = accept_tree(
        *(key, target, draft, proposed, parent), certain=judged, rule=rule, check=False
    )
    last = found.path.index_select(0, (found.count - 1).clamp(min=0).reshape(1))[0]
    end = torch.where(found.count > 0, last, 0)
    token = torch.where(drawable.index_select(0, end.reshape(1))[0], found.token, -1)
    places = torch.arange(len(found.tokens), device=token.device)
    tokens = torch.where(places == found.count, token, found.tokens)
    return Branched(found.count, found.path, token, tokens), states


def _along_nodes(
    sampler: Sampler, logits: Tensor, proposed: Tensor, parent: Tensor, state: Tree
) -> tuple[Tensor, Tree]:
    """The sampler's logits (M + 1, V) and its states at the nodes, each once."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not tree.leaves(state):
        update = lambda row: sampler.update(row, state)[0]
        return torch.func.vmap(update)(logits), state
    rows, states = [], []
    for n, row in enumerate(logits.unbind()):
        if n:
            before = tree.map(lambda *leaves: torch.stack(leaves), *states)
            above = select_state(before, parent[n - 1].clamp(min=0))
            state = sampler.observe(proposed[n - 1], above)
        left, state = sampler.update(row, state)
        rows.append(left)
        states.append(state)
    return torch.stack(rows), tree.map(lambda *leaves: torch.stack(leaves), *states)


def _everywhere(state: Tree, n: int) -> Tree:
    return tree.map(lambda leaf: leaf.expand(n, *leaf.shape), state)


def accepted(
    key: Tensor,
    sampler: Sampler,
    logits: Tensor,
    draft: Draft,
    proposed: Tensor,
    state: Tree,
    rule: Rule,
) -> tuple[Accepted, Tree]:
    """Accept a draft (N,) by its logits (N + 1, V); also the sampler's states along the draft."""
    if sampler.deterministic:
        return accept_greedy(sampler, logits, proposed, draft.valid, state)
    along = log_probs_along_draft(sampler, logits, proposed, state)
    dtype = along.log_probs.dtype
    if not len(proposed):  # drawn with the key of the token that follows an accepted draft
        drawable = along.log_probs.amax(-1, keepdim=True).isfinite()
        target = torch.where(drawable, along.log_probs.exp(), torch.nan)
        nothing = torch.zeros_like(draft.valid)
        token = draw_row(randomness.split(key)[1], target, nothing)
        return Accepted(nothing, token, token.reshape(1)), along.states
    probs = (
        F.one_hot(proposed, logits.shape[-1]).to(dtype)
        if is_absent(draft.probs)
        else draft.probs[: len(proposed)].to(dtype)
    )
    return accept_along(key, along, probs, proposed, draft.valid, rule=rule), along.states


def accepted_of_tree(
    key: Tensor,
    sampler: Sampler,
    logits: Tensor,
    draft: Draft,
    state: Tree,
    rule: Rule,
    *,
    depth: int,
) -> tuple[Accepted, Tensor, Tree]:
    """Accept a path of a tree: its tokens, its rows of the delta (N + 1,), the states along it."""
    assert not is_absent(draft.parent)
    found, states = accept_along_tree(
        *(key, sampler, logits, draft.tokens, draft.parent, draft.probs, draft.certain, state),
        rule=rule,
    )
    rows = F.pad(found.path, (1, 0))[: depth + 1]
    along = tree.map(lambda leaf: leaf.index_select(0, rows), states)
    return Accepted(found.count, found.token, found.tokens[: depth + 1]), rows, along


def select_state(states: Tree, count: Tensor) -> Tree:
    """Of the states along a draft, the one after its first `count` tokens, int64 ()."""
    return tree.map(lambda leaf: leaf.index_select(0, count.reshape(1))[0], states)
