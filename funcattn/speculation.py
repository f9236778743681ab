"""Speculative decoding that loses nothing: who drafts decides the speed, never the law.

    rules           tokenwise, blockwise: which of the drafted tokens stay, as functions of the uniforms
    acceptance      accept, acceptance_pmf: one row, static shapes, branch-free
    trees           accept_tree, accept_among: a tree of drafts, drawn without replacement or with
    verification    laws_along, accept_along, matched, rewind: samplers with a state along a draft
    decoding        speculate, stream: generate with drafts
    transcripts     transcript, Marks: a text with its accepted drafts marked

The token that is emitted has the law of the target, exactly, if `draft` is the law that the draft was drawn from: after
temperature, filters and penalties, in the dtype that was drawn from. `sampling.law` gives both.
"""

from .decoding.speculative.acceptance import Accepted, accept, acceptance_pmf
from .decoding.speculative.decoding import Piece, Speculated, Stats, speculate, stream
from .decoding.speculative.rules import Regions, Rule, blockwise, tokenwise
from .decoding.speculative.transcripts import Marks, Span, Transcript, transcript
from .decoding.speculative.trees import Branched, accept_among, accept_tree, tree_pmf
from .decoding.speculative.verification import Along, accept_along, laws_along, matched, rewind

__all__ = [
    "Accepted",
    "Along",
    "Branched",
    "Marks",
    "Piece",
    "Regions",
    "Rule",
    "Span",
    "Speculated",
    "Stats",
    "Transcript",
    "accept",
    "accept_along",
    "accept_among",
    "accept_tree",
    "acceptance_pmf",
    "blockwise",
    "laws_along",
    "matched",
    "rewind",
    "speculate",
    "stream",
    "tokenwise",
    "transcript",
    "tree_pmf",
]
