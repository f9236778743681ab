"""Drafts from the text itself: what followed the earlier places that end as the text does now.

The longest suffix of the text that occurs earlier is found for every place at once: with m_e the
number of tokens before place e that equal those before the end of the text, the places with the
greatest m_e are those that a suffix automaton would lead to. It costs O(S * longest) for a text of
S tokens, as tensors, so it is `vmap`ped and forked like any other state. What followed these places
is a trie, each place weighted 2^(m_e - max m); its most frequent nodes are the draft.

Sources: Oliaro et al., SuffixDecoding, arXiv:2411.04975; Saxena, Prompt lookup decoding (2023).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import tree as trees
from ...core import errors
from ...core.doors import door, printed, what_is
from ...records import ABSENT
from .drafters import Draft, Drafter, of_text
from .tree_rules import most_probable


@door(name="drafters.suffix")
@printed
def suffix(
    *,
    nodes: int = 12,
    length: int = 8,
    longest: int = 16,
    places: int = 16,
    text: Tensor | None = None,
) -> Drafter:
    """Draft a tree of what followed the longest suffix of the text where it occurred before.

    With `longest=3` it is a tree of n-grams; with `places=1` a chain, as `prompt_lookup` drafts.

    Args:
        nodes: M, how many tokens to verify.
        length: N, the depth of the tree.
        longest: how many tokens of a match count.
        places: how many of the earlier places to look at: those with the longest match, and of
            these the latest.
        text: int64 (R,), a text in front of every prompt in which places are looked for too, such
            as earlier answers; () or None is none.

    Raises:
        ValueError: a number below 1; a text that is not one sequence of ids.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> prompt = torch.tensor([1, 2, 3, 1, 2])
        >>> done, past = fa.speculate(fa.key(1), model, params, suffix(nodes=4), prompt, steps=6)
        >>> torch.equal(done.tokens, fa.generate(fa.key(1), model, params, prompt, steps=6)[0])
        True

    Law: distributed as generate, and equal to it under greedy; the draft is that of a count over
        all places by hand (test_suffix_drafters.py).
    """
    counts = {"nodes": nodes, "length": length, "longest": longest, "places": places}
    for name, n in counts.items():
        if not errors.is_count(n, 1):
            remedy = "nodes=12, length=8, longest=16, places=16 is usual."
            errors.fail("drafters.suffix", name, "an int, at least 1", repr(n), remedy)
    if nodes > places * length:
        wanted = f"at most places * length = {places * length}"
        errors.fail("drafters.suffix", "nodes", wanted, nodes, "Look at more places.")
    if text is not None and (
        not isinstance(text, Tensor) or text.dim() != 1 or text.dtype not in trees.INTEGERS
    ):
        remedy = "Pass torch.tensor(ids); join several texts by torch.cat."
        errors.fail("drafters.suffix", "text", "int64 (R,)", what_is(text), remedy)
    # -1 is no token: no match goes on through the end of the text.
    before = None if text is None or not len(text) else F.pad(text, (0, 1), value=-1)

    def draft(whole: Tensor, n: Tensor) -> Draft:
        ends, matched = _matches(whole, n, longest)
        best = (matched * len(whole) + ends).topk(min(places, len(ends))).indices
        matched, ends = matched.index_select(0, best), ends.index_select(0, best)
        weight = torch.where(matched > 0, torch.exp2((matched - matched.amax(-1)).float()), 0)
        return _trie(whole, n, ends, weight, nodes, length)

    return of_text(draft, length, before)


def _matches(text: Tensor, n: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Places e (S - 1,) in front of which tokens equal the last of the first n, and how many."""
    ends = torch.arange(1, len(text), device=text.device)
    going, matched = ends < n, torch.zeros_like(ends)
    for k in range(min(longest, len(text) - 1)):
        newest = text.index_select(0, (n - 1 - k).clamp(min=0).reshape(1))
        earlier = F.pad(text, (k, 0), value=-1)[: len(ends)]
        going = going & (earlier == newest) & (newest >= 0) & (k < n)
        matched = matched + going
    return ends, matched


def _trie(text: Tensor, n: Tensor, ends: Tensor, weight: Tensor, nodes: int, depth: int) -> Draft:
    """The most frequent of the texts that follow places `ends` (K,), as a tree of `nodes` tokens.

    A node is numbered by its depth and the first place that it follows.
    """
    K, here = len(ends), torch.arange(len(ends), device=ends.device)
    alike = (weight > 0) & (weight > 0).unsqueeze(-1)  # which places share the text so far
    over, tokens, parents, scores = torch.zeros_like(ends), [], [], []
    for j in range(depth):
        token = text.index_select(0, (ends + j).clamp(max=len(text) - 1))
        there = ends + j < n
        alike = alike & (token == token.unsqueeze(-1)) & there
        first = alike.long().argmax(-1)
        own = there & (first == here) & (weight > 0)
        tokens.append(token)
        parents.append(over)
        scores.append(torch.where(own, torch.where(alike, weight, 0).sum(-1), 0))
        over = 1 + j * K + first
    score = torch.cat(scores)
    count = min(nodes, len(score))
    kept, parent = most_probable(score, torch.cat(parents), count)
    counts = score.index_select(0, kept) > 0
    parent = torch.where(counts, parent, -1)
    token = torch.where(counts, torch.cat(tokens).index_select(0, kept), 0)
    token, parent = F.pad(token, (0, nodes - count)), F.pad(parent, (0, nodes - count), value=-1)
    return Draft(token, ABSENT, (parent >= 0).sum(), parent)
