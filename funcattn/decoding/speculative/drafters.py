"""Drafters for `fa.speculate`: a model, n-gram lookup in the text, or any function.

They change the acceptance rate and the cost, never the distribution of the output. A drafter is
three pure functions of a pytree, which covers all tokens but the last:

    init(prompt, prompt_length, steps) -> state
    propose(key, last, state) -> (Draft, state)     N drafted tokens and their probabilities
    keep(tokens, count, state) -> state             commit: the first count of tokens (N + 1,)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...core import errors
from ...core.doors import door, printed, reprinted, uncalled, what_is
from ...models import Model
from ...records import ABSENT, formerly, record
from ...tree import Tree


@formerly(laws="probs")
@record
class Draft(NamedTuple):
    """Drafted tokens.

    tokens: int64 (N,). probs: (N, V), the probabilities that each was drawn from, or () for a
    deterministic draft. valid: int64 (), how many count.

    Of a tree: tokens int64 (M,) of nodes 1 to M. probs: (M + 1, V), at each node those that its
    children were drawn from, or (). parent: int64 (M,), as in `accept_tree`; -1 where no token is.
    certain: bool (M,), which were chosen without chance, or () for none.
    """

    tokens: Tensor
    probs: Tensor | tuple[()]
    valid: Tensor
    parent: Tensor | tuple[()] = ABSENT
    certain: Tensor | tuple[()] = ABSENT


@reprinted
class Drafter(NamedTuple):
    """The functions of a drafter. Not a record: it holds functions.

    Args:
        init: (prompt int64 (T,), prompt_length int64 (), steps) -> state, after the prompt without
            its last token.
        propose: (key, last int64 (), state) -> (Draft of N tokens, state), after `last`.
        keep: (tokens int64 (N + 1,), count int64 (), state) -> state, after the first `count` of
            tokens, which are those written in this round.
        length: N, a size; of a tree its depth, whose Draft has more tokens.
        vocabulary: V, the number of token ids; None where it is unknown.
        sharing: for a model that drafts with the target's cache; None otherwise.
        reader: of one that `tree` can make trees of; None otherwise.
        taps: of the target, which the drafter hears: then init and keep take one more argument,
            their values (T, F) of the prompt, and (N + 1, F) of `last` and the N tokens.
        text: the repr, the call that made it.
    """

    init: Callable[..., Tree]
    propose: Callable[[Tensor, Tensor, Tree], tuple[Draft, Tree]]
    keep: Callable[..., Tree]
    length: int
    vocabulary: int | None = None
    sharing: "Sharing | None" = None
    reader: "NodeReader | None" = None
    taps: tuple[str, ...] = ()
    text: str = ""
    __call__ = uncalled

    def __repr__(self) -> str:
        return f"Drafter({self.text or 'init, propose, keep'})"


class Sharing(NamedTuple):
    """Drafting with other weights of the target model, on the target's cache.

    init(prompt, prompt_length, logits, cache) -> state. propose and keep are as in Drafter; the
    state's `cache` is set to the target's. The rows that propose writes are beyond the length of
    that cache, where the target's rows are committed next.
    """

    model: Model
    init: Callable[[Tensor, Tensor, Tensor, Tree], Tree]
    propose: Callable[[Tensor, Tensor, Tree], tuple[Draft, Tree]]
    keep: Callable[[Tensor, Tensor, Tree], Tree]


class NodeReader(NamedTuple):
    """How a drafter computes logits at the nodes of a tree. Not a record: it holds functions.

    Args:
        model: that the drafter shares a cache with, by identity; None for none.
        init: (prompt, prompt_length, steps, *features) -> (a row like logits (V,), state with room
            for `steps` tokens more).
        share: (cache of the target) -> state.
        read: (last (), tokens (m,), parent (m,), state, since, path) -> (logits (m + 1 - since, V)
            of the nodes from `since` on, the state with what was read of all nodes); path says
            that each node is below the one before, and that all before `since` were read.
        keep: (rows int64 (N + 1,), tokens (N + 1,), count (), state, *features) -> state, which
            has kept the first `count` of these nodes of what it read last; node 0 is `last`, and
            tokens are those after it.
        taps: as in Drafter; features are there where these are.
    """

    model: Model | None
    init: Callable[..., tuple[Tensor, Tree]]
    share: Callable[[Tree], Tree]
    read: Callable[[Tensor, Tensor, Tensor, Tree, int, bool], tuple[Tensor, Tree]]
    keep: Callable[..., Tree]
    taps: tuple[str, ...] = ()


@record
class LookupState(NamedTuple):
    """The state of a drafter that reads the text.

    tokens: int64 (S,), -1 beyond the text. length: int64 (), of the text without its last token.
    """

    tokens: Tensor
    length: Tensor


@door(name="drafters.function")
@printed
def function(f: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *, length: int = 4) -> Drafter:
    """Draft with a deterministic function: f(text (S,), n ()) -> (tokens (N,), valid ()).

    Args:
        f: maps the text, int64 (S,) of which the first n count, to N = `length` drafted tokens, of
            which the first `valid` count.
        length: N.
    """
    check_length("drafters.function", length)

    def draft(text: Tensor, n: Tensor) -> Draft:
        found = f(text, n)
        if not isinstance(found, tuple) or len(found) != 2 or not all(_is_ids(x) for x in found):
            got = (
                f"({', '.join(map(what_is, found))})"
                if isinstance(found, tuple)
                else what_is(found)
            )
            wanted, remedy = (
                f"tokens int64 (N,) with N = {length}, valid int64 ()",
                "Make tensors of both: torch.tensor(n).",
            )
            errors.fail("drafters.function", "what f returns", wanted, got, remedy, TypeError)
        tokens, valid = found
        if tokens.shape != (length,) or valid.dim():
            got = f"{errors.shape(tokens)} and {errors.shape(valid)}"
            errors.fail(
                "drafters.function",
                "what f returns",
                f"tokens (N,) with N = {length}, valid ()",
                got,
                "Pad the tokens.",
            )
        if errors.is_true((valid < 0) | (valid > length)):
            wanted, remedy = f"valid from 0 to N = {length}", "It counts the drafted tokens."
            got = errors.peek(valid)
            errors.fail("drafters.function", "what f returns", wanted, got, remedy)
        return Draft(tokens, ABSENT, valid.clamp(0, length))

    return of_text(draft, length)


def of_text(draft: Callable[[Tensor, Tensor], Draft], length: int) -> Drafter:
    """A drafter that reads the text alone: draft(text (S,), n ()) -> Draft of at most `length`."""

    def init(prompt: Tensor, prompt_length: Tensor, steps: int) -> LookupState:
        text = torch.cat([prompt, prompt.new_full((steps + length + 2,), -1)])
        return LookupState(text, prompt_length)

    def propose(key: Tensor, last: Tensor, state: LookupState) -> tuple[Draft, LookupState]:
        places = torch.arange(len(state.tokens), device=last.device)
        text = torch.where(
            places == state.length, last, torch.where(places < state.length, state.tokens, -1)
        )
        return draft(text, state.length + 1), LookupState(text, state.length)

    def keep(tokens: Tensor, count: Tensor, state: LookupState) -> LookupState:
        places = torch.arange(len(state.tokens), device=tokens.device) - state.length - 1
        new = tokens.index_select(0, places.clamp(0, length))
        return LookupState(
            torch.where((places >= 0) & (places < count), new, state.tokens), state.length + count
        )

    return Drafter(init, propose, keep, length)


@door(name="drafters.prompt_lookup")
@printed
def prompt_lookup(*, length: int = 4, ngram: int = 3) -> Drafter:
    """Draft what followed the last earlier occurrence of the text's final n-gram.

    The n-gram is the longest of 1 to `ngram` tokens that occurs earlier.

    Source: Saxena, Prompt lookup decoding (2023); transformers `prompt_lookup_num_tokens`, vLLM's
        "ngram".
    """
    check_length("drafters.prompt_lookup", length)
    if not errors.is_count(ngram, 1):
        errors.fail(
            "drafters.prompt_lookup", "ngram", "an int, at least 1", repr(ngram), "2 or 3 is usual."
        )

    def look(text: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        follows = torch.zeros_like(n)  # index after the occurrence; 0 where there is none
        for m in range(1, min(ngram, len(text)) + 1):
            ends = torch.arange(m, len(text) + 1, device=text.device)
            newest = text.index_select(
                0, (n - m + torch.arange(m, device=text.device)).clamp(min=0)
            )
            same = (text.unfold(0, m, 1) == newest).all(-1) & (ends < n) & (n > m)
            found = torch.where(same, ends, 0).amax(-1)
            follows = torch.where(found > 0, found, follows)
        places = (follows + torch.arange(length, device=text.device)).clamp(max=len(text) - 1)
        valid = torch.where(follows > 0, (n - follows).clamp(0, length), 0)
        there = torch.arange(length, device=text.device) < valid
        return torch.where(there, text.index_select(0, places), 0), valid

    return function(look, length=length)


def _is_ids(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in tree.INTEGERS


def check_probability(function: str, argument: str, p: float) -> None:
    """Fail where a probability at which drafts stop is none."""
    if not isinstance(p, int | float) or not 0 <= p <= 1:
        remedy = "0.4 is usual; 0 leaves nothing out."
        errors.fail(function, argument, "from 0 to 1", repr(p), remedy)


def check_length(function: str, length: int) -> None:
    """Fail where the length of a draft is not an int, at least 1."""
    if not errors.is_count(length, 1):
        errors.fail(
            function,
            "length",
            "an int, at least 1",
            repr(length),
            "Draft one token at least; 4 is usual.",
        )
