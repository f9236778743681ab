"""Acceptance rules for trees: thresholds for uniforms, and what is drawn where the path ends.

Node 0 is the text so far. At a node with target p, a child x that was drawn from q takes from the
mass m that is left of p (m = p before the first child):

    tokenwise    x passes with probability min(1, m(x) / q(x)); otherwise m <- (m - q)+, normalized.
                 The path goes to the first child that passes, and ends where none does.
    blockwise    m begins as w p, with w the weight of the node: 1 at the root,
                 w_x = min(1, m(x) / q(x)) at a child; then m <- (m - q)+ / (1 - sum min(m, q)).
                 A node passes with probability sum m after its children; of the nodes in
                 post-order, the path ends at the first that passes (the root always does).

The token after the path is drawn from the m that is left at its end. Without replacement q is
renormalized without the children before. A child that was chosen without chance (a top-k tree) has
q = 1 at itself: it takes m(x), all there is. On a chain these are the rules of `rules`.

No rule can accept a token y more often than it is drafted, nor than the target has it: at most
sum_y min(m(y), P(y is a child)). Chosen children attain the bound, and so does one child drawn from
the rest followed by chosen ones.

Sources: Miao et al., SpecInfer, arXiv:2305.09781; Jeon et al., Recursive speculative decoding,
arXiv:2402.14160 (tokenwise); Weng et al., Traversal verification, arXiv:2505.12398, and UniVer,
arXiv:2605.04543 (post-order; weights of prefixes); Hu et al., Towards optimal multi-draft
speculative decoding, arXiv:2502.18779 (the bound; chosen children and a drawn one).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import errors
from ...core.doors import uncalled
from ...records import is_absent, record
from .regions import Regions, divide, normalize


@record
class Kinship(NamedTuple):
    """Relations of the nodes of a tree, bool (M + 1, M + 1).

    above: [n, a], whether a is n or an ancestor of it. earlier: [n, s], whether s is a sibling of
    n, before it.
    """

    above: Tensor
    earlier: Tensor


class TreeRule(NamedTuple):
    """An acceptance rule for trees.

    regions: (target (M + 1, V), draft (M + 1, V) or (), proposed (M,), parent (M,), certain (M,),
        replacement) -> Regions of M thresholds and M + 1 corrections
    end: (threshold (M,), uniforms (M,), Kinship) -> int64 (), the node at which the path ends
    pmf: (threshold (M,), Kinship) -> (M + 1,), the probability of each end
    """

    regions: Callable[[Tensor, Tensor | tuple[()], Tensor, Tensor, Tensor, bool], Regions]
    end: Callable[[Tensor, Tensor, Kinship], Tensor]
    pmf: Callable[[Tensor, Kinship], Tensor]
    __call__ = uncalled


def kinship(parent: Tensor) -> Kinship:
    """The relations of nodes 0 to M whose parents are int64 (M,); a missing node has none."""
    M = len(parent)
    nodes = torch.arange(M + 1, device=parent.device)
    over = F.pad(parent, (1, 0), value=-1)
    above = ((over.unsqueeze(-1) == nodes) | (nodes.unsqueeze(-1) == nodes)).float()
    for _ in range(M.bit_length()):  # products of 2^k steps
        above = (above @ above > 0).float()
    same = (over.unsqueeze(-1) == over) & (over >= 0)
    return Kinship(above > 0, same & (nodes < nodes.unsqueeze(-1)))


def most_probable(score: Tensor, parent: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """The candidates of a tree with the greatest scores, and their parents among themselves.

    Args:
        score: (C,) of candidates 1 to C, none greater than that of its parent; equal ones keep
            their order. parent: int64 (C,), numbers of candidates, each before its child; 0 is the
            root.

    Returns:
        Indices int64 (nodes,) into the candidates, ascending, and parents int64 (nodes,), -1 where
        the parent is not among them.
    """
    kept = score.sort(descending=True, stable=True).indices[:nodes].sort().values
    over = parent.index_select(0, kept)
    same = kept + 1 == over.unsqueeze(-1)
    where = torch.where(same.any(-1), same.long().argmax(-1) + 1, -1)
    return kept, torch.where(over == 0, 0, where)


def path_to(end: Tensor, relations: Kinship) -> tuple[Tensor, Tensor]:
    """The nodes from the root's child to `end`, int64 (M,) padded with 0, and their number."""
    on = relations.above.index_select(0, end.reshape(1))[0][1:]
    count, places = on.long().sum(), torch.arange(len(on), device=on.device)
    order = torch.where(on, places, len(on)).sort().values
    return torch.where(places < count, order + 1, 0), count


def end_of_matching(chosen: Tensor, proposed: Tensor, parent: Tensor, relations: Kinship) -> Tensor:
    """The end of the path whose tokens are those chosen at its nodes: int64 ().

    Args:
        chosen: int64 (M + 1,), a token at each node. proposed, parent: of the tree.
    """
    same = (proposed == chosen.index_select(0, parent.clamp(min=0))) & (parent >= 0)
    return deepest(same, relations)


def deepest(steps: Tensor, relations: Kinship) -> Tensor:
    """The deepest node of which every step from the root, bool (M,), is True."""
    above = relations.above
    blocked = (above[:, 1:] & ~steps).any(-1)
    return torch.where(blocked, 0, above.long().sum(-1)).argmax(-1)


def _first_child(threshold: Tensor, uniforms: Tensor, relations: Kinship) -> Tensor:
    passes = F.pad(uniforms < threshold, (1, 0))
    return deepest((passes & ~(relations.earlier & passes).any(-1))[1:], relations)


def regions_of_chosen(
    target: Tensor, proposed: Tensor, parent: Tensor, relations: Kinship
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`tokenwise` where all children were chosen without chance, at the cost of a few numbers.

    Returns:
        The thresholds float64 (M,), and a function from a node () to its correction (V,).
    """
    rows = target.index_select(0, parent.clamp(min=0))
    p = rows.gather(-1, proposed.unsqueeze(-1)).squeeze(-1).double()
    # A token that is drafted twice counts once.
    earlier = relations.earlier[1:, 1:]
    again = (earlier & (proposed.unsqueeze(-1) == proposed)).any(-1)
    p = torch.where((parent < 0) | again, 0, p)
    left = 1 - torch.where(earlier, p, 0).sum(-1)
    vocabulary = torch.arange(target.shape[-1], device=target.device)

    def correction(node: Tensor) -> Tensor:
        row = target.index_select(0, node.reshape(1))[0]
        children = torch.where(parent == node, proposed, -1)
        taken = (vocabulary == children.unsqueeze(-1)).any(0)
        return normalize(torch.where(taken, 0, row), row)

    return divide(p, left, 0.0).clamp(max=1), correction


def _first_child_pmf(threshold: Tensor, relations: Kinship) -> Tensor:
    above, earlier = relations
    h = F.pad(threshold, (1, 0), value=1.0)
    each = h * torch.where(earlier, 1 - h, 1).prod(-1)
    # A child: all nodes above it but itself are above its parent, which has one fewer.
    depth = above.long().sum(-1)
    child = above.transpose(-1, -2) & (depth == depth.unsqueeze(-1) + 1)
    return torch.where(above, each, 1).prod(-1) * torch.where(child, 1 - h, 1).prod(-1)


def _before(relations: Kinship) -> Tensor:
    """Bool (M + 1, M + 1): [n, m], whether m is before n in post-order."""
    above, earlier = (x.float() for x in relations)
    left = above @ earlier @ above.transpose(-1, -2)
    itself = torch.eye(len(above), dtype=torch.bool, device=above.device)
    return (left > 0) | (relations.above.transpose(-1, -2) & ~itself)


def _first_in_postorder(threshold: Tensor, uniforms: Tensor, relations: Kinship) -> Tensor:
    passes = F.pad(uniforms < threshold, (1, 0), value=True)
    return torch.where(passes, _before(relations).long().sum(-1), len(passes)).argmin(-1)


def _first_in_postorder_pmf(threshold: Tensor, relations: Kinship) -> Tensor:
    h = F.pad(threshold, (1, 0), value=1.0)
    return h * torch.where(_before(relations), 1 - h, 1).prod(-1)


def _regions(
    scaled: bool,
    target: Tensor,
    draft: Tensor | tuple[()],
    proposed: Tensor,
    parent: Tensor,
    certain: Tensor,
    replacement: bool,
) -> Regions:
    V, concrete = target.shape[-1], errors.value(parent)
    above = list(parent.unbind()) if concrete is None else concrete.tolist()
    vocabulary = torch.arange(V, device=target.device)
    masses = [target[0]]
    draws = [] if is_absent(draft) else list(draft.unbind())
    weights = []
    for n, a in enumerate(above):
        x, m = proposed[n], _take(masses, a)
        here = vocabulary == x
        mx = m.gather(0, x.reshape(1))[0]
        q = here.to(m.dtype) if is_absent(draft) else _take(draws, a)
        qx = q.gather(0, x.reshape(1))[0]
        tried = (parent[n] >= 0) & (certain[n] | (qx > 0))  # of probability 0: changes nothing
        sure = certain[n] | torch.full_like(tried, is_absent(draft))
        weight = torch.where(tried, divide(mx, torch.where(sure, 1, qx), 0.0).clamp(max=1), 0)
        rest = torch.where(sure, torch.where(here, 0, m), (m - q).clamp(min=0))
        if scaled:
            left = rest.sum()
            after = divide(rest, left + 1 - m.sum(), 0.0)
        else:
            after = normalize(rest, m)
        _put(masses, a, torch.where(tried, after, m))
        if not is_absent(draft) and not replacement:
            others = torch.where(here, 0, q)
            _put(draws, a, torch.where(tried, normalize(others, others), q))
        weights.append(weight)
        masses.append(weight * target[n + 1] if scaled else target[n + 1])
    mass = torch.stack(masses)
    if not scaled:
        return Regions(torch.stack(weights), mass)
    return Regions(mass[1:].sum(-1).clamp(0, 1), normalize(mass, target))


def _take(rows: list[Tensor], at: int | Tensor) -> Tensor:
    if isinstance(at, int):
        return rows[max(at, 0)]
    return torch.stack(rows).index_select(0, at.clamp(min=0).reshape(1))[0]


def _put(rows: list[Tensor], at: int | Tensor, row: Tensor) -> None:
    if isinstance(at, int):
        rows[max(at, 0)] = row
    else:
        rows[:] = [torch.where(at == n, row, old) for n, old in enumerate(rows)]


tokenwise = TreeRule(partial(_regions, False), _first_child, _first_child_pmf)
blockwise = TreeRule(partial(_regions, True), _first_in_postorder, _first_in_postorder_pmf)
