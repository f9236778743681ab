"""Speculative decoding: drafts decide the speed, never the distribution of texts.

    rules           tokenwise, blockwise: which of the drafted tokens stay, of the uniforms
    acceptance      accept, acceptance_pmf: one row, static shapes, branch-free
    trees           accept_tree, accept_among: a tree of drafts, drawn without replacement or with,
                    or chosen without chance
    tree_rules      the same rules for trees: TreeRule
    verification    log_probs_along_draft, accept_along, accept_greedy, select_state: samplers with
                    a state along a draft
    decoding        speculate, stream: generate with drafts
    transcripts     transcript, Marks: a text with its accepted drafts marked

The token that is emitted is distributed as the target, exactly, if `draft` holds the probabilities
that the draft was drawn from: after temperature, filters and penalties, in the dtype that was drawn
from. `sampling.log_probs` gives the logarithm of both.
"""

from .decoding.speculative.acceptance import Accepted, accept, acceptance_pmf
from .decoding.speculative.decoding import Piece, Speculated, Stats, speculate, stream
from .decoding.speculative.regions import Regions
from .decoding.speculative.rules import Rule, blockwise, tokenwise
from .decoding.speculative.transcripts import Marks, Span, Transcript, transcript
from .decoding.speculative.tree_rules import TreeRule
from .decoding.speculative.trees import Branched, accept_among, accept_tree, tree_pmf
from .decoding.speculative.verification import (
    AlongDraft,
    accept_along,
    accept_greedy,
    log_probs_along_draft,
    select_state,
)

# Earlier names, which go on working.
Along, laws_along, matched, rewind = AlongDraft, log_probs_along_draft, accept_greedy, select_state

__all__ = [
    "Accepted",
    "AlongDraft",
    "Branched",
    "Marks",
    "Piece",
    "Regions",
    "Rule",
    "Span",
    "Speculated",
    "Stats",
    "Transcript",
    "TreeRule",
    "accept",
    "accept_along",
    "accept_greedy",
    "accept_among",
    "accept_tree",
    "acceptance_pmf",
    "blockwise",
    "log_probs_along_draft",
    "select_state",
    "speculate",
    "stream",
    "tokenwise",
    "transcript",
    "tree_pmf",
]
