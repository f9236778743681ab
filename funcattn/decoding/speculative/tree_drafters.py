"""Trees of drafts from the distributions of a drafter: of one shape, or grown by probability.

    branching=(3, 2, 1)     3 children of the root, 2 of each of these, 1 of each of these
    branching=(2, 2, 2), width=1     children of the most probable node of each depth alone: the
                            chain of first choices, and beside each of these the second one
    nodes=12, depth=4       at each depth the most probable nodes get children; of all nodes the 12
                            with the greatest product of probabilities are verified

Children are the most probable tokens of the drafter at their node, without chance, unless a shape
is given and `children` says how they are drawn. A tree that is grown has chosen children only: a
tree that was drawn may not be pruned by what was drawn (docs/speculation.md).

The drafter reads the tree so far once for each depth.

Sources: Miao et al., SpecInfer, arXiv:2305.09781 (trees verified in one pass); Li et al., EAGLE-2,
arXiv:2406.16858 (grown by the product of probabilities, then reranked); Hu et al., Towards optimal
multi-draft speculative decoding, arXiv:2502.18779 (one child drawn behind the chosen ones).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import randomness, sampling
from ... import tree as trees
from ...core import errors
from ...core.doors import door, printed
from ...records import ABSENT, is_absent, record
from ...sampling import Sampler
from ...tree import Tree
from .drafters import Draft, Drafter, NodeReader, Sharing
from .tree_rules import deepest, kinship, most_probable, path_to
from .tree_shapes import Shape, shape_of
from .verification import select_state


@record
class TreeState(NamedTuple):
    """The state of a drafter of trees.

    cache: of the text, the target's where it is shared; () otherwise. reader: that of the drafter.
    tokens, parent: int64 (M,), the last tree. states: of the sampler after each node, leaves
    (M + 1, ...).
    """

    cache: Tree
    reader: Tree
    tokens: Tensor
    parent: Tensor
    states: Tree


@door(name="drafters.tree")
@printed
def tree(
    drafter: Drafter,
    *,
    branching: Sequence[int] | None = None,
    nodes: int | None = None,
    depth: int = 4,
    width: int | None = None,
    children: str = "top",
    sampler: Sampler | None = None,
    confidence: float = 0.0,
    least: float = 0.0,
) -> Drafter:
    """Draft a tree from the distributions of a drafter, verified in one forward pass.

    A branch of the drafter's second choice stays where the chain of its first ones is rejected. The
    law of the text is that of `generate` for every shape and sampler.

    Args:
        drafter: one that has distributions: of `model`, `skip` or a trained head. Its own length
            and sampler are not used. A model of the target with cheaper weights reads the target's
            cache, as it does for chains.
        branching: children of a node at each depth, such as (3, 2, 1, 1): a tree of one shape.
        nodes: how many nodes to verify, in place of `branching`: the tree is grown to `depth`,
            where the `width` most probable nodes of each depth get `width` children each, and the
            best `nodes` of all are kept.
        depth: of a tree that is grown.
        width: how many nodes of a depth get children, the most probable ones. None is all of a
            tree with `branching`, and 4 of one that is grown, with as many children each.
        children: "top", the most probable tokens, chosen without chance; "drawn", without
            replacement; "mixed", one drawn from all but the most probable tokens, then these.
        sampler: a transform of the drafter's logits, such as a temperature; the target's own is a
            good choice for "drawn" and "mixed". None leaves them as they are.
        confidence: a tree with `branching` ends behind the depth at which no path that could go on
            has at least this probability; 0 never stops.
        least: of a tree with `width`: nodes that get no children are left out where their path is
            less probable. So second choices are verified where the first one is not sure.

    Raises:
        ValueError: neither or both of branching and nodes; a shape without nodes; more nodes than
            grow; children drawn in a tree that is grown, or whose tokens decide which get children.
        TypeError: a drafter without distributions (prompt_lookup, function).

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> drafter = tree(fa.drafters.model(model, params), branching=(2, 1))
        >>> prompt = torch.tensor([1, 2, 3])
        >>> done, past = fa.speculate(fa.key(1), model, params, drafter, prompt, steps=7)
        >>> torch.equal(done.tokens, fa.generate(fa.key(1), model, params, prompt, steps=7)[0])
        True

    Law: distributed as generate, and equal to it under greedy (test_tree_drafters.py).
    """
    shape = shape_of(branching, nodes, depth, width, children, confidence, least)
    reader = getattr(drafter, "reader", None)
    if reader is None:
        got = repr(drafter) if isinstance(drafter, Drafter) else f"a {type(drafter).__name__}"
        remedy = (
            "Such as fa.drafters.model of a model without recurrent layers, whose states read "
            "tokens in one order; of a text fa.drafters.suffix drafts trees."
        )
        wanted = "one that has distributions"
        errors.fail("drafters.tree", "drafter", wanted, got, remedy, TypeError)
    transform = sampling.chain() if sampler is None else sampler
    if not isinstance(transform, Sampler) or transform.deterministic:
        wanted, got = "a sampler that leaves several tokens", repr(sampler)
        remedy = "Leave it out, or pass such as fa.sampling.temperature(0.8)."
        errors.fail("drafters.tree", "sampler", wanted, got, remedy)
    return of_reader(reader, shape, transform, drafter.vocabulary)


def of_reader(
    reader: NodeReader, shape: Shape, transform: Sampler, vocabulary: int | None
) -> Drafter:
    """A drafter of trees of this shape, by what reads their nodes and a sampler of logits."""
    length = len(shape.branching)

    def begun(
        prompt: Tensor, prompt_length: Tensor, logits: Tensor, held: Tree, cache: Tree
    ) -> TreeState:
        state = sampling.observe_prompt(
            transform, prompt, sampling.begin(transform, logits), length=prompt_length
        )
        nothing = prompt.new_full((shape.size,), -1)
        return TreeState(cache, held, nothing, nothing, _repeated(state, shape.size + 1))

    def init(prompt: Tensor, prompt_length: Tensor, steps: int, *features: Tensor) -> TreeState:
        logits, held = reader.init(prompt, prompt_length, steps + length + 1, *features)
        return begun(prompt, prompt_length, logits, held, ABSENT)

    def share(prompt: Tensor, prompt_length: Tensor, logits: Tensor, cache: Tree) -> TreeState:
        return begun(prompt, prompt_length, logits, ABSENT, cache)

    def propose(key: Tensor, last: Tensor, state: TreeState) -> tuple[Draft, TreeState]:
        shared = is_absent(state.reader)
        held = reader.share(state.cache) if shared else state.reader
        root = transform.observe(last, select_state(state.states, torch.zeros_like(last)))
        draft, states, held = _grown(key, shape, transform, last, root, reader, held)
        assert not is_absent(draft.parent)
        # The leaves are read too, so that the cache is complete where all are accepted; a head
        # reads what is accepted with the target's features.
        if not shared and not reader.taps:
            held = reader.read(last, draft.tokens, draft.parent, held, shape.size + 1, False)[1]
        after = TreeState(
            state.cache, ABSENT if shared else held, draft.tokens, draft.parent, states
        )
        if set(shape.branching) == {1}:  # a chain
            probs = ABSENT if is_absent(draft.probs) else draft.probs[:length]
            draft = Draft(draft.tokens, probs, draft.valid)
        return draft, after

    def keep(tokens: Tensor, count: Tensor, state: TreeState, *features: Tensor) -> TreeState:
        relations = kinship(state.parent)
        depths = relations.above.long().sum(-1)[1:] - 1
        same = state.tokens == tokens.index_select(0, (depths - 1).clamp(0, length))
        end = deepest(same & (state.parent >= 0) & (depths < count), relations)
        rows = F.pad(path_to(end, relations)[0], (1, 0))[: length + 1]
        held = (
            ABSENT
            if is_absent(state.reader)
            else (reader.keep(rows, tokens, count, state.reader, *features))
        )
        here = select_state(state.states, end)
        return state._replace(reader=held, states=_repeated(here, shape.size + 1))

    sharing = Sharing(reader.model, share, propose, keep) if reader.model is not None else None
    return Drafter(init, propose, keep, length, vocabulary, sharing, reader, reader.taps)


def _grown(
    key: Tensor,
    shape: Shape,
    sampler: Sampler,
    last: Tensor,
    root: Tree,
    reader: NodeReader,
    held: Tree,
) -> tuple[Draft, Tree, Tree]:
    """A tree of this shape behind `last`, the sampler's states at its nodes (M + 1, ...), and the
    reader's.

    Candidates are numbered from 1, in the order of their depths; those with children are read.
    """
    keys = randomness.split(key, len(shape.branching)).unbind()
    none = last.new_zeros(0)
    read, tokens, parents, scores = (none, none), [], [], []  # read: tokens and their parents
    states, probs, chosen = [trees.map(lambda leaf: leaf.unsqueeze(0), root)], [], []
    # The nodes that get children: their candidate numbers, scores and states, and the first of
    # them among the nodes that are read.
    ids, score, here, since = last.new_zeros(1), torch.zeros(1, device=last.device), states[0], 0
    first = 0  # the number of the first candidate of a depth
    goes_on = torch.ones_like(last, dtype=torch.bool)
    for depth, b in enumerate(shape.branching):
        logits, held = reader.read(last, *read, held, since, shape.width == 1)
        left, here = _update(sampler, logits, here)
        states[-1] = _put(states[-1], ids - first, here)
        found = _children(keys[depth], left, b, shape.children)
        first = 1 + sum(len(x) for x in tokens)
        over = torch.arange(len(ids), device=last.device).repeat_interleave(b)
        tokens.append(found.tokens)
        parents.append(torch.where(goes_on, ids.index_select(0, over), -1))
        scores.append(score.index_select(0, over) + found.score)
        below = trees.map(lambda leaf, over=over: leaf.index_select(0, over), here)
        states.append(_observe(sampler, found.tokens, below))
        probs.append(found.probs)
        chosen.append(found.certain)
        among = torch.arange(len(over), device=last.device)
        if shape.width:
            among = scores[-1].topk(min(shape.width, len(over))).indices
        if shape.least:
            stays = torch.zeros_like(found.certain).index_fill(0, among, True)
            stays = stays | (scores[-1].exp() >= shape.least)
            parents[-1] = torch.where(stays, parents[-1], -1)
        read = (
            torch.cat([read[0], found.tokens.index_select(0, among)]),
            torch.cat([read[1], since + over.index_select(0, among)]),
        )
        since = len(read[0]) - len(among) + 1
        ids, score = first + among, scores[-1].index_select(0, among)
        if shape.confidence:
            goes_on = goes_on & (score.amax(-1).exp() >= shape.confidence)
            if errors.value(goes_on) is not None and not goes_on:
                break
        here = trees.map(lambda leaf, among=among: leaf.index_select(0, among), states[-1])
    token, parent = torch.cat(tokens), torch.cat(parents)
    missing = shape.size - len(token) if not shape.nodes else 0
    states.append(_repeated(trees.map(lambda leaf: leaf[0], states[0]), missing))
    every = trees.map(lambda *leaves: torch.cat(leaves), *states)
    token, parent = F.pad(token, (0, missing)), F.pad(parent, (0, missing), value=-1)
    count = torch.full_like(last, shape.size)
    if shape.confidence or shape.least:
        count = (parent >= 0).sum()
    if shape.least:  # what is left out is at the end, where it is not read
        order = (parent < 0).long().sort(stable=True).indices
        number = F.pad(order.sort().indices + 1, (1, 0))  # the new number of each node
        above = number.index_select(0, parent.index_select(0, order).clamp(min=0))
        parent = torch.where(parent.index_select(0, order) < 0, -1, above)
        token = token.index_select(0, order)
        rows = F.pad(order + 1, (1, 0))
        every = trees.map(lambda leaf: leaf.index_select(0, rows), every)
    if shape.nodes:
        kept, over = most_probable(torch.cat(scores), parent, shape.nodes)
        rows = F.pad(kept + 1, (1, 0))
        every = trees.map(lambda leaf: leaf.index_select(0, rows), every)
        return Draft(token.index_select(0, kept), ABSENT, count, over), every, held
    if shape.children == "top":
        return Draft(token, ABSENT, count, parent), every, held
    inner = torch.cat(probs)
    leaves = inner.new_full((), 1 / inner.shape[-1])
    drawn = torch.cat([inner, leaves.expand(shape.size + 1 - len(inner), inner.shape[-1])])
    certain = F.pad(torch.cat(chosen), (0, missing))
    return Draft(token, drawn, count, parent, certain), every, held


class _Children(NamedTuple):
    """Children of f nodes: tokens, log-probabilities and certainty (f * b,), q (f, V)."""

    tokens: Tensor
    score: Tensor
    certain: Tensor
    probs: Tensor


def _children(key: Tensor, logits: Tensor, b: int, kind: str) -> _Children:
    """b children of each node of which these are the logits (f, V)."""
    if b > logits.shape[-1]:
        wanted = f"at most the {logits.shape[-1]} tokens that there are"
        errors.fail("drafters.tree", "branching", wanted, b, "Children of a node differ.")
    log_probs = logits.log_softmax(-1)
    q = log_probs
    if kind == "top":
        ids = log_probs.topk(b).indices
    elif kind == "drawn":
        noise = randomness.gumbel(key, tuple(log_probs.shape), log_probs.dtype)
        ids = (log_probs + noise).topk(b).indices
    else:
        best = log_probs.topk(b - 1).indices
        q = log_probs.scatter(-1, best, -torch.inf).log_softmax(-1)
        ids = torch.cat([randomness.categorical(key, q).unsqueeze(-1), best], -1)
    certain = (torch.arange(b, device=ids.device) > 0) & (kind == "mixed")
    return _Children(
        ids.reshape(-1),
        log_probs.gather(-1, ids).reshape(-1),
        certain.expand(ids.shape).reshape(-1),
        q.exp(),
    )


def _update(sampler: Sampler, logits: Tensor, states: Tree) -> tuple[Tensor, Tree]:
    """`sampler.update` of logits (f, V), each with its state."""
    if trees.leaves(states):
        return torch.func.vmap(sampler.update)(logits, states)
    return torch.func.vmap(lambda row: sampler.update(row, states)[0])(logits), states


def _observe(sampler: Sampler, tokens: Tensor, states: Tree) -> Tree:
    return torch.func.vmap(sampler.observe)(tokens, states) if trees.leaves(states) else states


def _put(rows: Tree, at: Tensor, new: Tree) -> Tree:
    """Rows (m, ...) of every leaf, those at `at` (f,) replaced by new (f, ...)."""

    def put(leaf: Tensor, fresh: Tensor) -> Tensor:
        hit = at == torch.arange(len(leaf), device=at.device).unsqueeze(-1)  # (m, f)
        row = fresh.index_select(0, hit.long().argmax(-1))
        return torch.where(hit.any(-1).reshape(-1, *[1] * (leaf.dim() - 1)), row, leaf)

    return trees.map(put, rows, new)


def _repeated(state: Tree, n: int) -> Tree:
    return trees.map(lambda leaf: leaf.expand(n, *leaf.shape), state)
