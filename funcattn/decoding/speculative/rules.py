"""Acceptance rules: thresholds for uniforms, and the correction that the next token is drawn from.

With p_i the target's probabilities of token i given the draft before it, q_i the draft's, and d_i
the drafted token (i = 1..N):

    tokenwise    h_i = min(1, p_i(d_i) / q_i(d_i)), stop at the first u_i >= h_i
                 then (p - q)+, normalized
    blockwise    w_0 = 1, w_i = min(1, w_{i-1} p_i(d_i) / q_i(d_i)),
                 S_i = sum (w_i p_{i+1} - q_{i+1})+
                 h_i = S_i / (S_i + 1 - w_i), h_N = w_N, keep up to the last u_i < h_i
                 then (w p - q)+, normalized

Both draw from p_{N+1} if all tokens are accepted. Blockwise accepts at least as many tokens on
average, for every pair of models.

A rule is three functions, so that decisions can be examined: `regions` gives the thresholds,
`count` decides for given uniforms, `pmf` integrates over them. The inequality is strict: a uniform
may be 0, and a token of probability 0 must not be accepted.

Sources: Leviathan, Kalman and Matias, Fast inference from transformers via speculative decoding,
arXiv:2211.17192, algorithm 1; Sun et al., Block verification accelerates speculative decoding,
arXiv:2403.10444, algorithm 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.doors import uncalled
from ...records import ABSENT
from . import tree_rules
from .regions import Regions, at, divide, normalize
from .tree_rules import TreeRule


class Rule(NamedTuple):
    """An acceptance rule; test a new one with `funcattn.testing.laws.acceptance`.

    regions: (target (N + 1, V), draft (N, V), proposed (N,), valid ()) -> Regions
    count: (threshold (N,), uniforms (N,)) -> int64 ()
    pmf: threshold (N,) -> (N + 1,), the probability of each count
    tree: the rule for trees of drafts; () where there is none
    """

    regions: Callable[[Tensor, Tensor, Tensor, Tensor], Regions]
    count: Callable[[Tensor, Tensor], Tensor]
    pmf: Callable[[Tensor], Tensor]
    tree: TreeRule | tuple[()] = ABSENT
    __call__ = uncalled


def until_refused(threshold: Tensor, uniforms: Tensor) -> Tensor:
    """How many tokens pass before the first that fails."""
    return (uniforms < threshold).long().cumprod(-1).sum(-1)


def until_refused_pmf(threshold: Tensor) -> Tensor:
    """The probability of each count of `until_refused`: h_1 .. h_n (1 - h_{n+1})."""
    mass, left = [], torch.ones_like(threshold[0])
    for h in threshold.unbind():
        mass.append(left * (1 - h))
        left = left * h
    return torch.stack([*mass, left])


def last_passed(threshold: Tensor, uniforms: Tensor) -> Tensor:
    """The index, from 1, of the last token that passes; 0 where none does."""
    places = torch.arange(1, len(threshold) + 1, device=threshold.device)
    return torch.where(uniforms < threshold, places, 0).amax(-1)


def last_passed_pmf(threshold: Tensor) -> Tensor:
    """The probability of each count of `last_passed`: h_n (1 - h_{n+1}) .. (1 - h_N)."""
    mass, left = [], torch.ones_like(threshold[0])
    for h in threshold.flip(0).unbind():
        mass.append(left * h)
        left = left * (1 - h)
    return torch.stack([left, *mass[::-1]])


def _tokenwise(target: Tensor, draft: Tensor, proposed: Tensor, valid: Tensor) -> Regions:
    N = len(proposed)
    there = torch.arange(N, device=target.device) < valid
    ratio = divide(at(target[:N], proposed), at(draft, proposed), 0.0).clamp(max=1)
    residual = normalize((target[:N] - draft).clamp(min=0), target[:N])
    # Beyond the last valid token of a short draft: the target itself.
    correction = torch.where(there.unsqueeze(-1), residual, target[:N])
    return Regions(torch.where(there, ratio, 0), torch.cat([correction, target[N:]]))


def _blockwise(target: Tensor, draft: Tensor, proposed: Tensor, valid: Tensor) -> Regions:
    N = len(proposed)
    places = torch.arange(N + 1, device=target.device)
    ratio = divide(at(target[:N], proposed), at(draft, proposed), 0.0)
    weights = [torch.ones_like(ratio[0])]
    for r in ratio.unbind():
        weights.append((weights[-1] * r).clamp(max=1))
    w = torch.stack(weights)  # (N + 1,), row n is w_n
    residual = (w[:N, None] * target[:N] - draft).clamp(min=0)
    S = residual.sum(-1)
    # 0 / 0 where target and draft agree: then a later test always passes.
    h = divide(S, S + 1 - w[:N], 1.0).clamp(0, 1)
    h = torch.cat([h, w[N:]])
    h = torch.where(places < valid, h, torch.where(places == valid, w, 0))
    there = (places[:N] < valid).unsqueeze(-1)
    correction = torch.where(there, normalize(residual, target[:N]), target[:N])
    return Regions(h[1:], torch.cat([correction, target[N:]]))


tokenwise = Rule(_tokenwise, until_refused, until_refused_pmf, tree_rules.tokenwise)
blockwise = Rule(_blockwise, last_passed, last_passed_pmf, tree_rules.blockwise)
