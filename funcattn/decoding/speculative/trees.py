"""Acceptance of a tree of drafts: candidates at each node are tried in turn.

At a node with target p, its children x_1, x_2, ... are drawn from q without replacement (q
renormalized without the earlier ones):

    accept x_k with probability min(1, p(x_k) / q(x_k))
    otherwise p <- (p - q)+ normalized, q <- q without x_k, normalized

If all children are rejected, the next token is drawn from the p that remains. Node 0 is the text so
far, node n the drafted token n - 1; `parent` names an earlier node. A chain is `tokenwise`; a star
is multi-draft verification. A parent of -1 marks a missing token, so ragged trees have one shape.

Sources: Jeon et al., Recursive speculative decoding, arXiv:2402.14160 (without replacement); Miao
et al., SpecInfer, arXiv:2305.09781 (with it).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import randomness
from ...core import errors
from ...core.doors import door
from ...records import record
from .acceptance import check_probs, check_values, draw_row
from .rules import Regions, divide, normalize


@record
class Branched(NamedTuple):
    """The result of accepting a tree.

    count: int64 (), how many drafted tokens are accepted. path: int64 (M,), their nodes, then 0.
    Given a delta of the text's last token and the M drafts, the cache with the accepted tokens is
    `commit(cache, delta, count + 1, index=cat([zero, path]))`. token, tokens (M + 1,): as in
    `Accepted`.
    """

    count: Tensor
    path: Tensor
    token: Tensor
    tokens: Tensor


@door
def accept_tree(
    key: Tensor,
    target: Tensor,
    draft: Tensor,
    proposed: Tensor,
    parent: Tensor,
    *,
    replacement: bool = False,
    check: bool = True,
) -> Branched:
    """Accept a path from the root of a tree and draw one more token, distributed as the target.

    Args:
        key: int64 (2,), randomness for all of it.
        target, draft: (M + 1, V), float32 or float64: at each node, the target's probabilities of
            the next token, and those that the node's children were drawn from (any at a leaf).
        proposed: int64 (M,), the token of node 1, 2, ..., M; children of one node in the order in
            which they were drawn.
        parent: int64 (M,), the parent of each node: of node n one of 0, ..., n - 1, or -1 where
            there is no token.
        replacement: whether candidates were drawn independently, and may be equal.
        check: validate values where they can be read.

    Raises:
        ValueError, TypeError: as `accept`; a parent that is not an earlier node.

    Law: distributed as the target exactly, by enumeration (test_trees.py).
    """
    regions = _regions("accept_tree", target, draft, proposed, parent, replacement, check)
    for_uniforms, for_token = randomness.split(key).unbind()
    uniforms = randomness.uniform(for_uniforms, (len(proposed),), torch.float64)
    node, path, count = walk(regions.threshold.double(), uniforms, parent)
    token = draw_row(for_token, regions.correction, node)
    places = torch.arange(len(proposed) + 1, device=proposed.device)
    written = proposed.index_select(0, (torch.cat([path, path[:1]]) - 1).clamp(min=0))
    tokens = torch.where(places < count, written, torch.where(places == count, token, -1))
    return Branched(count, path, token, tokens)


@door
def accept_among(
    key: Tensor,
    target: Tensor,
    draft: Tensor,
    proposed: Tensor,
    *,
    replacement: bool = False,
    check: bool = True,
) -> Branched:
    """Accept one of M candidates for one token, or draw another: a tree of depth one.

    This is multi-draft verification.

    Args:
        key: int64 (2,), randomness for all of it.
        target: (V,), the target's probabilities at this position.
        draft: (V,), the probabilities that the M candidates were drawn from.
        proposed: int64 (M,), the candidates in the order in which they were drawn.
        replacement, check: as in `accept_tree`.

    Returns:
        Branched, with `token` the token of this position whether it was drafted or not, and
        `tokens` (M + 1,) it and -1.

    Law: distributed as the target exactly (test_trees.py).
    """
    if proposed.dim() != 1:
        errors.fail(
            "accept_among",
            "proposed",
            "(M,)",
            errors.shape(proposed),
            "Map over many rows with vmap.",
        )
    M = len(proposed)
    rows = lambda probs: probs.expand(M + 1, *probs.shape[-1:])
    done = accept_tree(
        key,
        rows(target),
        rows(draft),
        proposed,
        torch.zeros_like(proposed),
        replacement=replacement,
        check=check,
    )
    token = done.tokens[0]
    return Branched(
        done.count, done.path, token, torch.cat([token.reshape(1), torch.full_like(proposed, -1)])
    )


@door
def tree_pmf(
    target: Tensor,
    draft: Tensor,
    proposed: Tensor,
    parent: Tensor,
    *,
    replacement: bool = False,
    check: bool = True,
) -> Tensor:
    """The probability (M + 1,) that the path ends at each node, given the tree.

    Exact and differentiable. Args as in `accept_tree`.
    """
    threshold = _regions("tree_pmf", target, draft, proposed, parent, replacement, check).threshold
    nodes = torch.arange(len(proposed) + 1, device=proposed.device)
    ends = (nodes == 0).to(threshold.dtype)
    for n, h in enumerate(threshold.unbind(), 1):
        above = nodes == parent[n - 1]
        moved = torch.where(above, ends, 0).sum() * h
        ends = ends - torch.where(above, moved, 0) + torch.where(nodes == n, moved, 0)
    return ends


def walk(threshold: Tensor, uniforms: Tensor, parent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last node of the path for uniforms (M,), the path (M,) padded with 0, and its length."""
    node, count = torch.zeros_like(parent[0]), torch.zeros_like(parent[0])
    path, places = torch.zeros_like(parent), torch.arange(len(parent), device=parent.device)
    for n in range(1, len(parent) + 1):
        moves = (parent[n - 1] == node) & (uniforms[n - 1] < threshold[n - 1])
        path = torch.where(moves & (places == count), n, path)
        node, count = torch.where(moves, n, node), count + moves
    return node, path, count


def _regions(
    function: str,
    target: Tensor,
    draft: Tensor,
    proposed: Tensor,
    parent: Tensor,
    replacement: bool,
    check: bool,
) -> Regions:
    _check(function, target, draft, proposed, parent, check)
    M = len(proposed)
    nodes, vocabulary = (
        torch.arange(M + 1, device=target.device),
        torch.arange(target.shape[-1], device=target.device),
    )
    p_all, q_all, thresholds = target, draft, []
    for n in range(M):
        here, x = parent[n].clamp(min=0).reshape(1), proposed[n].reshape(1)
        p, q = p_all.index_select(0, here)[0], q_all.index_select(0, here)[0]
        px, qx = p.gather(0, x)[0], q.gather(0, x)[0]
        tried = (parent[n] >= 0) & (qx > 0)  # a token of probability 0 changes nothing
        thresholds.append(torch.where(tried, divide(px, qx, 0.0).clamp(max=1), 0))
        row = ((nodes == here) & tried).unsqueeze(-1)
        p_all = torch.where(row, normalize((p - q).clamp(min=0), p), p_all)
        if not replacement:
            rest = torch.where(vocabulary == x, 0, q)
            q_all = torch.where(row, normalize(rest, rest), q_all)
    return Regions(torch.stack(thresholds), p_all)


def _check(
    function: str, target: Tensor, draft: Tensor, proposed: Tensor, parent: Tensor, check: bool
) -> None:
    if proposed.dim() != 1:
        errors.fail(
            function, "proposed", "(M,)", errors.shape(proposed), "Map over many rows with vmap."
        )
    M, V = len(proposed), target.shape[-1] if target.dim() else 0
    if not M:
        errors.fail(
            function,
            "proposed",
            "(M,) with M at least 1",
            (0,),
            "With nothing drafted, draw from the target.",
        )
    check_probs(function, "target", target, (M + 1, V), "(N + 1, V)", M)
    check_probs(function, "draft", draft, (M + 1, V), "(N + 1, V)", M)
    if parent.shape != proposed.shape:
        errors.fail(
            function,
            "parent",
            f"(M,) with M = {M} as proposed",
            errors.shape(parent),
            "Name each token's node.",
        )
    if errors.is_true((parent < -1) | (parent > torch.arange(M, device=parent.device))):
        got = errors.peek(parent)
        errors.fail(
            function,
            "parent",
            "an earlier node, or -1",
            got,
            "Order the tree from its root; node 0 is the text so far.",
        )
    if errors.is_true((proposed < 0) | (proposed >= V)):
        errors.fail(
            function,
            "proposed",
            f"ids below V = {V}",
            errors.peek(proposed),
            "A missing token has parent -1, and id 0.",
        )
    if check:
        for argument, probs in (("target", target), ("draft", draft)):
            check_values(
                function, argument, probs, torch.ones_like(probs[..., 0], dtype=torch.bool)
            )
