"""Drafts from the text itself: what followed the earlier places that end as the text does now.

A suffix automaton of the text is part of the drafter's state and grows with it: linear time for a
whole text, whatever its length. It counts what followed every earlier place, each weighted by how
many tokens before it are the same; the continuations with the greatest counts are the draft.

Sources: Oliaro et al., SuffixDecoding, arXiv:2411.04975; Saxena, Prompt lookup decoding (2023).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import tree as trees
from ...core import errors
from ...core.doors import door, printed, what_is
from ...records import ABSENT, record
from .drafters import Draft, Drafter
from .suffix_automaton import Automaton, continuations, empty, extended


@record
class SuffixState(NamedTuple):
    """The automaton of the text without its last token, and that token, int64 ()."""

    automaton: Automaton
    last: Tensor


@door(name="drafters.suffix")
@printed
def suffix(
    *,
    nodes: int = 12,
    length: int = 8,
    longest: int = 16,
    chain: bool = False,
    text: Tensor | None = None,
) -> Drafter:
    """Draft a tree of what followed the longest suffix of the text where it occurred before.

    With `longest=3` it is a tree of n-grams.

    Args:
        nodes: M, how many tokens to verify in a tree.
        length: N, the depth of the tree, or the length of a chain.
        longest: how many tokens of a match count: an earlier place before which m of them are the
            same counts 2^m.
        chain: draft the most frequent continuation alone, for models with recurrent layers too.
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
    counts = {"nodes": nodes, "length": length, "longest": longest}
    for name, n in counts.items():
        if not errors.is_count(n, 1):
            remedy = "nodes=12, length=8, longest=16 is usual."
            errors.fail("drafters.suffix", name, "an int, at least 1", repr(n), remedy)
    if text is not None and (
        not isinstance(text, Tensor) or text.dim() != 1 or text.dtype not in trees.INTEGERS
    ):
        remedy = "Pass torch.tensor(ids); join several texts by torch.cat."
        errors.fail("drafters.suffix", "text", "int64 (R,)", what_is(text), remedy)
    # -1 is no token: no match goes on through the end of the text.
    before = torch.zeros(0, dtype=torch.int64) if text is None else text.long().cpu()
    before = F.pad(before, (0, 1), value=-1) if len(before) else before

    def init(prompt: Tensor, prompt_length: Tensor, steps: int) -> SuffixState:
        room = len(before) + len(prompt) + steps + length + 2
        made = empty(room, longest + length)
        made = extended(made, before, torch.tensor(len(before)))
        return SuffixState(extended(made, prompt, prompt_length), torch.zeros_like(prompt[0]))

    def propose(key: Tensor, last: Tensor, state: SuffixState) -> tuple[Draft, SuffixState]:
        M = length if chain else nodes
        tokens, parent = continuations(
            state.automaton, last, nodes=M, length=length, longest=longest, chain=chain
        )
        valid = (parent >= 0).sum()
        draft = Draft(tokens, ABSENT, valid, ABSENT if chain else parent)
        return draft, SuffixState(state.automaton, last)

    def keep(tokens: Tensor, count: Tensor, state: SuffixState) -> SuffixState:
        new = torch.cat([state.last.reshape(1), tokens[:-1]])
        return SuffixState(extended(state.automaton, new, count), state.last)

    return Drafter(init, propose, keep, length)
