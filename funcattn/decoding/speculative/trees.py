"""Acceptance of a tree of drafts: a path from its root is kept, and one more token drawn.

Node 0 is the text so far, node n the drafted token n - 1; `parent` names an earlier node. A star is
multi-draft verification. A parent of -1 marks a missing token, so ragged trees have one shape. The
rules, and their sources, are in `tree_rules`.

What the rule must be told is how the children of a node came about: drawn from `draft` without
replacement or with, or chosen without chance (`certain`, or `draft=()`), as the top k of a drafter
are. A child that was chosen and is judged as if it had been drawn changes the law of the text.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import randomness
from ...core import errors
from ...core.doors import door, what_is
from ...records import is_absent, record
from ...tree import INTEGERS
from . import tree_rules
from .acceptance import check_probs, check_values, draw_row
from .regions import Regions
from .rules import Rule, tokenwise
from .tree_rules import (
    Kinship,
    TreeRule,
    end_of_matching,
    kinship,
    path_to,
    regions_of_chosen,
)


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
    draft: Tensor | tuple[()],
    proposed: Tensor,
    parent: Tensor,
    *,
    certain: Tensor | None = None,
    replacement: bool = False,
    rule: Rule = tokenwise,
    check: bool = True,
) -> Branched:
    """Accept a path from the root of a tree and draw one more token, distributed as the target.

    Args:
        key: int64 (2,), randomness for all of it.
        target: (M + 1, V), float32 or float64: at each node, the target's probabilities of the next
            token.
        draft: (M + 1, V), at each node the probabilities that its children were drawn from (any at
            a leaf); () where all were chosen without chance: the top k of a drafter, n-grams.
        proposed: int64 (M,), the token of node 1, 2, ..., M; children of one node in the order in
            which they were drawn.
        parent: int64 (M,), the parent of each node: of node n one of 0, ..., n - 1, or -1 where
            there is no token.
        certain: bool (M,), True at the tokens that were chosen without chance; behind a sibling
            that was drawn from all tokens but these, acceptance is the most that is possible. None
            is none.
        replacement: whether candidates were drawn independently, and may be equal.
        rule: `tokenwise`, or `blockwise`, which decides from the leaves to the root.
        check: validate values where they can be read.

    Raises:
        ValueError, TypeError: as `accept`; a parent that is not an earlier node.

    Law: distributed as the target exactly, by enumeration (test_trees.py).
    """
    if is_absent(draft):
        _check("accept_tree", target, draft, proposed, parent, check)
        _rule_of("accept_tree", rule)
        relations = kinship(parent)
        threshold, correction = regions_of_chosen(target, proposed, parent, relations)
        for_uniforms, for_token = randomness.split(key).unbind()
        uniforms = randomness.uniform(for_uniforms, (len(proposed),), torch.float64)
        end = tree_rules.tokenwise.end(threshold, uniforms, relations)  # every rule is this one
        token = draw_row(for_token, correction(end).unsqueeze(0), torch.zeros_like(end))
        return _branched(end, token, proposed, relations)
    regions = _regions(
        "accept_tree", target, draft, proposed, parent, replacement, check, rule, certain
    )
    for_uniforms, for_token = randomness.split(key).unbind()
    uniforms = randomness.uniform(for_uniforms, (len(proposed),), torch.float64)
    relations = kinship(parent)
    end = _rule_of("accept_tree", rule).end(regions.threshold.double(), uniforms, relations)
    return _branched(end, draw_row(for_token, regions.correction, end), proposed, relations)


def accept_chosen(chosen: Tensor, proposed: Tensor, parent: Tensor) -> Branched:
    """Accept the path whose tokens are those of the target, such as its argmax at each node.

    Args:
        chosen: int64 (M + 1,), the target's token at each node, whatever was drafted there.
        proposed, parent: as in `accept_tree`.
    """
    relations = kinship(parent)
    end = end_of_matching(chosen, proposed, parent, relations)
    return _branched(end, chosen.index_select(0, end.reshape(1))[0], proposed, relations)


def _branched(end: Tensor, token: Tensor, proposed: Tensor, relations: Kinship) -> Branched:
    path, count = path_to(end, relations)
    places = torch.arange(len(proposed) + 1, device=proposed.device)
    written = proposed.index_select(0, (torch.cat([path, path[:1]]) - 1).clamp(min=0))
    tokens = torch.where(places < count, written, torch.where(places == count, token, -1))
    return Branched(count, path, token, tokens)


@door
def accept_among(
    key: Tensor,
    target: Tensor,
    draft: Tensor | tuple[()],
    proposed: Tensor,
    *,
    certain: Tensor | None = None,
    replacement: bool = False,
    rule: Rule = tokenwise,
    check: bool = True,
) -> Branched:
    """Accept one of M candidates for one token, or draw another: a tree of depth one.

    This is multi-draft verification.

    Args:
        key: int64 (2,), randomness for all of it.
        target: (V,), the target's probabilities at this position.
        draft: (V,), the probabilities that the M candidates were drawn from; () for chosen ones.
        proposed: int64 (M,), the candidates in the order in which they were drawn.
        certain, replacement, rule, check: as in `accept_tree`.

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
        draft if is_absent(draft) else rows(draft),
        proposed,
        torch.zeros_like(proposed),
        certain=certain,
        replacement=replacement,
        rule=rule,
        check=check,
    )
    token = done.tokens[0]
    return Branched(
        done.count, done.path, token, torch.cat([token.reshape(1), torch.full_like(proposed, -1)])
    )


@door
def tree_pmf(
    target: Tensor,
    draft: Tensor | tuple[()],
    proposed: Tensor,
    parent: Tensor,
    *,
    certain: Tensor | None = None,
    replacement: bool = False,
    rule: Rule = tokenwise,
    check: bool = True,
) -> Tensor:
    """The probability (M + 1,) that the path ends at each node, given the tree.

    Exact and differentiable. Args as in `accept_tree`.
    """
    threshold = _regions(
        "tree_pmf", target, draft, proposed, parent, replacement, check, rule, certain
    ).threshold
    return _rule_of("tree_pmf", rule).pmf(threshold, kinship(parent))


def _regions(
    function: str,
    target: Tensor,
    draft: Tensor | tuple[()],
    proposed: Tensor,
    parent: Tensor,
    replacement: bool,
    check: bool,
    rule: Rule = tokenwise,
    certain: Tensor | None = None,
) -> Regions:
    _check(function, target, draft, proposed, parent, check)
    if certain is None:
        certain = torch.zeros_like(proposed, dtype=torch.bool)
    elif certain.shape != proposed.shape or certain.dtype != torch.bool:
        got = f"{certain.dtype} {errors.shape(certain)}"
        remedy = "Say of each token whether it was chosen without chance."
        errors.fail(function, "certain", f"bool (M,) with M = {len(proposed)}", got, remedy)
    return _rule_of(function, rule).regions(target, draft, proposed, parent, certain, replacement)


def _rule_of(function: str, rule: Rule) -> TreeRule:
    if is_absent(rule.tree):
        remedy = "Pass blockwise or tokenwise, or give yours a TreeRule: rule._replace(tree=...)."
        errors.fail(function, "rule", "one with a rule for trees", "one without", remedy, TypeError)
    return rule.tree


def _check(
    function: str,
    target: Tensor,
    draft: Tensor | tuple[()],
    proposed: Tensor,
    parent: Tensor,
    check: bool,
) -> None:
    if not isinstance(draft, Tensor) and not is_absent(draft):
        wanted = "(M + 1, V), or () where all tokens were chosen"
        remedy = "Stack the distributions of the nodes."
        errors.fail(function, "draft", wanted, what_is(draft), remedy, TypeError)
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
    if not is_absent(draft):
        check_probs(function, "draft", draft, (M + 1, V), "(N + 1, V)", M)
    for argument, ids in (("proposed", proposed), ("parent", parent)):
        if ids.dtype not in INTEGERS:
            errors.fail(function, argument, "int64 (M,)", ids.dtype, "Pass ids.long().", TypeError)
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
            if not is_absent(probs):
                counts = torch.ones_like(probs[..., 0], dtype=torch.bool)
                check_values(function, argument, probs, counts)
