"""Speculative decoding: one forward pass verifies a draft, and its accepted prefix is kept.

There is no rollback. A forward pass returns keys and values of all drafted tokens as a delta, and
only those of accepted tokens are committed; of the sampler states along the draft, the one after
the last accepted token is selected.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import progress, randomness, sampling, transformer
from ...caches import KVCache
from ...core import errors
from ...core.doors import door
from ...models import Model, Past
from ...records import ABSENT, by_rows, is_absent, record
from ...sampling import Sampler
from ...sampling.composition import require_drawable
from ...tree import Tree
from ..detokenization import Detokenizer
from ..loop import Choice, Chooser, Start, Text, begun, decode, prefill, until_stop
from ..requests import Request, check_numbers
from ..streams import Heard, Streamed, check_stop_strings, ends_of
from .drafters import Draft, Drafter
from .features import Features
from .rules import Rule, blockwise
from .tree_rules import kinship
from .verification import accepted, accepted_of_tree, select_state


@record
class Stats(NamedTuple):
    """Statistics of the drafts, all int64 ().

    rounds: forward passes of the model. drafted: tokens drafted. accepted: how many of these were
    accepted. Prints as a sentence; under vmap, with fields (B,), as one for each sequence.
    """

    rounds: Tensor
    drafted: Tensor
    accepted: Tensor

    @property
    def acceptance(self) -> Tensor:
        """Acceptance rate (): accepted / drafted; 0 where none was drafted."""
        return self.accepted / self.drafted.clamp(min=1)

    @property
    def tokens_per_round(self) -> Tensor:
        """Mean tokens a forward pass, (): the accepted tokens and one more; 0 for no rounds."""
        return torch.where(self.rounds > 0, 1 + self.accepted / self.rounds.clamp(min=1), 0)

    def __str__(self) -> str:
        if not all(isinstance(x, Tensor) and errors.value(x) is not None for x in self):
            return repr(self)
        return by_rows(self, Stats._sentence)

    def _sentence(self) -> str:
        kept = (
            f"{int(self.accepted)} of {int(self.drafted)} drafted tokens stayed "
            f"({float(self.acceptance):.0%})"
        )
        return (
            f"{kept}; {float(self.tokens_per_round):.2f} tokens a round in {int(self.rounds)} "
            "rounds"
        )

    def speedup(self, draft: float, verify: float) -> Tensor:
        """Speedup over decoding token by token, from the measured cost of a draft, ().

            tokens a round / (drafted a round * draft + verify)

        Args:
            draft, verify: cost of a drafted token and of a verification, where a decode step of one
                token costs 1.

        Source: Leviathan et al., arXiv:2211.17192, theorem 3.8.
        """
        return self.tokens_per_round / (self.drafted / self.rounds.clamp(min=1) * draft + verify)


@record
class Speculated(NamedTuple):
    """tokens int64 (steps,), count int64 () of them up to and with the stop id, and Stats."""

    tokens: Tensor
    count: Tensor
    stats: Stats


@door
def speculate(
    key: Tensor,
    model: Model,
    params: Tree,
    drafter: Drafter,
    prompt: Tensor,
    cache: Past = ABSENT,
    *,
    steps: int,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] = (),
    prompt_length: Tensor | None = None,
    rule: Rule = blockwise,
    chunk: int = 512,
) -> tuple[Speculated, KVCache]:
    """`fa.generate` with drafts: the same distribution of texts, in fewer forward passes.

    Args:
        key: int64 (2,), randomness. Tokens have the same distribution as those of generate, but are
            not the ones it draws with this key; with `greedy` they are the same, up to the rounding
            of a forward pass of one token against several at once.
        drafter: one of `fa.drafters`; it reads the prompt (not the text of a given cache). A
            drafter of this same model with other weights reads the target's cache instead, and
            needs no prefill.
        rule: how drafts are accepted.
        model, params, prompt, cache, steps, sampler, stop, prompt_length, chunk: as in
            `fa.generate`.

    Returns:
        Speculated, and the cache of the prompt and all tokens but the last, as in generate.

    Raises:
        ValueError, TypeError: as generate; a drafter of another vocabulary.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> lookup = fa.drafters.prompt_lookup(length=3)
        >>> done, past = speculate(fa.key(1), model, params, lookup, torch.tensor([1, 2, 3, 1, 2]),
        ...     steps=6)
        >>> torch.equal(done.tokens, fa.generate(fa.key(1), model, params, torch.tensor([1, 2, 3, 1,
        ...     2]), steps=6)[0])
        True

    Law: distributed as generate, and equal to it under greedy; vmap over prompts of different
        lengths equals the loop (test_decoding.py).
    """
    request = Request(
        "speculate", model, params, prompt, cache, steps, sampler, stop, prompt_length, chunk
    )
    start, chooser = _begin(request, key, drafter, rule)
    places, past, stats = torch.arange(steps, device=prompt.device), start.cache, no_rounds(prompt)
    tokens, count = torch.zeros_like(places), torch.zeros_like(prompt[0])
    last = count
    for text in progress.track(decode(request, start, chooser), "writing round"):
        new = text.tokens.index_select(0, (places - count).clamp(0, len(text.tokens) - 1))
        tokens = torch.where((places >= count) & (places < count + text.kept), new, tokens)
        count, last, past, stats = count + text.kept, text.last, text.cache, text.state.stats
    tokens = torch.where(places < count, tokens, last)  # the stop id after the end
    return Speculated(tokens, count, stats), past


@dataclass(frozen=True)
class Piece(Streamed):
    """A `fa.Streamed`, with the Stats so far."""

    stats: Stats


def stream(
    key: Tensor,
    model: Model,
    params: Tree,
    drafter: Drafter,
    prompt: Tensor,
    cache: Past = ABSENT,
    *,
    steps: int,
    tokenizer: Detokenizer | None = None,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    rule: Rule = blockwise,
    chunk: int = 512,
) -> Iterator[Piece]:
    """`fa.stream` with drafts: a piece for each round, of one token or several.

    A stop id or stop string in the middle of a draft ends the text there, and the cache has no
    later tokens.

    Args:
        drafter, rule: as in `speculate`; all others as in `fa.stream`.

    Raises:
        ValueError, TypeError: as `speculate` and `fa.stream`, at the first piece.

    Law: the tokens are those of `speculate`, the text ends where that of `fa.stream` ends
        (test_decoding.py).
    """
    check_stop_strings(tokenizer, stop_strings)
    ends = ends_of("stream", tokenizer, stop)
    request = Request("stream", model, params, prompt, cache, steps, sampler, ends, None, chunk)
    start, chooser = _begin(request, key, drafter, rule, stop_strings=tuple(stop_strings))
    heard = Heard(tokenizer, steps, ends, stop_strings)
    if not steps:
        yield Piece("", (), start.cache, True, no_rounds(prompt))
    for text in decode(request, start, chooser, heard):
        yield Piece(
            heard.new_text(), tuple(heard.tokens), text.cache, heard.ended, text.state.stats
        )


class Drafting(NamedTuple):
    """The state between rounds: that of the sampler, that of the drafter, and Stats."""

    sampler: Tree
    drafter: Tree
    stats: Stats


def _begin(
    request: Request, key: Tensor, drafter: Drafter, rule: Rule, **values: object
) -> tuple[Start, Chooser]:
    """Prefill with room for drafts, and the chooser of the rounds after it."""
    _check_drafter(request.verb, drafter)
    if not isinstance(rule, Rule):
        remedy = "Pass fa.speculation.blockwise or tokenwise, or one of your own."
        errors.fail(request.verb, "rule", "a Rule", repr(rule), remedy, TypeError)
    request.checked(key=key, drafter=drafter, rule=rule, **values)
    features = Features(request.verb, drafter.taps, request.model)
    with features.listening():
        start = prefill(
            *(features.model, request.params, request.prompt, request.cache),
            room=request.steps + drafter.length,
            prompt_length=request.prompt_length,
            chunk=request.chunk,
        )
    _check_vocabulary(request.verb, drafter, start.logits)
    return start, verifying(request, key, drafter, rule, start, features)


def verifying(
    request: Request, key: Tensor, drafter: Drafter, rule: Rule, start: Start, features: Features
) -> Chooser:
    """A chooser of several tokens a round: the accepted prefix of a draft, and one more.

    Args:
        request, key, drafter, rule: as in `speculate`.
        start: the result of prefill. features: what the drafter's taps heard in it.
    """
    model, params, sampler, steps = features.model, request.params, request.sampler, request.steps
    prompt, stop = request.prompt, request.stop
    shared = (
        drafter.sharing
        if drafter.sharing is not None and drafter.sharing.model is request.model
        else None
    )
    keys = randomness.split(key, (steps + 1, 2))

    def first(logits: Tensor) -> tuple[Tensor, Drafting]:
        check_numbers(request.verb, "the logits of a step", logits)
        token, state = sampling.draw(keys[steps, 0], sampler, logits, begun(request, logits))
        length = (
            torch.full_like(prompt[0], len(prompt))
            if request.prompt_length is None
            else request.prompt_length
        )
        drafting = (
            shared.init(prompt, length, logits, start.cache)
            if shared
            else drafter.init(prompt, length, steps, *features.rows(len(prompt)))
        )
        return token, Drafting(state, drafting, no_rounds(prompt))

    def propose(n: int, text: Text) -> tuple[Draft, Tree]:
        held = text.state.drafter
        return (shared or drafter).propose(
            keys[n - 1, 0], text.last, held._replace(cache=text.cache) if shared else held
        )

    def follow(n: int, text: Text) -> Choice:
        draft, drafting = propose(n, text)
        # Tokens that do not count are not read, where their number is known.
        valid = errors.integer(draft.valid)
        proposed = draft.tokens
        if is_absent(draft.parent) or valid == 0:
            proposed = proposed[:valid]
        elif valid is not None:
            draft = _without_end(draft)
            proposed = draft.tokens
        read = torch.cat([text.last.reshape(1), proposed])
        if is_absent(draft.parent) or not len(proposed):
            with features.listening():
                logits, delta = transformer.along(model, params, read, text.cache)
            seen = features.rows(len(read), drafter.length + 1)
            check_numbers(request.verb, "the logits of a step", logits)
            found, states = accepted(
                keys[n - 1, 1], sampler, logits, draft, proposed, text.state.sampler, rule
            )
        else:
            with features.listening():
                logits, delta = transformer.along_tree(
                    *(model, params, read, text.cache),
                    above=kinship(draft.parent).above,
                    depth=drafter.length,
                )
            check_numbers(request.verb, "the logits of a step", logits)
            found, rows, states = accepted_of_tree(
                *(keys[n - 1, 1], sampler, logits, draft, text.state.sampler, rule),
                depth=drafter.length,
            )
            delta, proposed = transformer.rows_of_path(delta, rows), proposed[: drafter.length]
            rows = F.pad(rows, (0, drafter.length + 1 - len(rows)))
            seen = [x.index_select(0, rows) for x in features.rows(len(read))]
        assert text.left is not None  # rounds write different numbers of tokens
        kept = torch.minimum(until_stop(found.tokens, found.count + 1, stop), text.left)
        kept = torch.where(text.done, 0, kept)
        newest = found.tokens.index_select(0, (kept - 1).clamp(min=0).reshape(1))[0]
        require_drawable(request.verb, text.done | (newest >= 0))
        tokens = F.pad(found.tokens, (0, drafter.length - len(proposed)), value=-1)

        def settle(kept: Tensor, last: Tensor) -> Drafting:
            state = sampler.observe(last, select_state(states, (kept - 1).clamp(min=0)))
            after = (shared or drafter).keep(tokens, kept, drafting, *seen)
            return Drafting(state, after, _counted(text, draft, torch.minimum(found.count, kept)))

        return Choice(tokens, kept, torch.where(text.done, text.last, newest), delta, settle)

    return Chooser(first, follow, drafter.length)


def _without_end(draft: Draft) -> Draft:
    """A tree without the missing nodes at its end, to a few sizes: each is compiled once."""
    assert not is_absent(draft.parent)
    there = (draft.parent >= 0).nonzero()
    last = 1 + int(there.max()) if len(there) else 0
    M = min(len(draft.tokens), (1 << last.bit_length()) - 1)
    probs = draft.probs if is_absent(draft.probs) else draft.probs[: M + 1]
    certain = draft.certain if is_absent(draft.certain) else draft.certain[:M]
    return Draft(draft.tokens[:M], probs, draft.valid, draft.parent[:M], certain)


def no_rounds(prompt: Tensor) -> Stats:
    """Stats of no rounds, on the device of the prompt (T,)."""
    zero = torch.zeros_like(prompt[0])
    return Stats(zero, zero, zero)


def _counted(text: Text, draft: Draft, stayed: Tensor) -> Stats:
    """The Stats with one round added, where the text had not ended."""
    stats, goes_on = text.state.stats, (~text.done).long()
    return Stats(
        stats.rounds + goes_on,
        stats.drafted + goes_on * draft.valid,
        stats.accepted + goes_on * stayed,
    )


def _check_drafter(verb: str, drafter: Drafter) -> None:
    if not hasattr(drafter, "length") or not hasattr(drafter, "keep"):
        remedy = (
            "Such as fa.drafters.model(model, fa.quantize(fa.int8)(params)), or "
            "fa.drafters.prompt_lookup()."
        )
        errors.fail(
            verb, "drafter", "one of fa.drafters", f"a {type(drafter).__name__}", remedy, TypeError
        )


def _check_vocabulary(verb: str, drafter: Drafter, logits: Tensor) -> None:
    if drafter.vocabulary not in (None, logits.shape[-1]):
        remedy = (
            "Draft with a model of the same tokenizer; of one that differs in padding alone, "
            f"with fa.drafters.model(..., vocabulary={logits.shape[-1]})."
        )
        errors.fail(
            verb,
            "drafter",
            f"of the model's {logits.shape[-1]} tokens",
            f"one of {drafter.vocabulary}",
            remedy,
        )
