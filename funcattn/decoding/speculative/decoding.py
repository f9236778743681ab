"""Generate with drafts: what a drafter proposes is read by the model in one step, and the beginning that is accepted stays.

Nothing is rolled back. A step proposes keys and values for all drafted tokens, and only the accepted ones are committed; the
sampler's state is the older one at the place where the draft ended.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks, progress, randomness, sampling, transformer
from ..._doors import door
from ...models import Model
from ...records import ABSENT, by_rows, is_absent, record
from ...sampling import Sampler
from ...sampling.composition import require_drawable
from ..detokenization import StreamedText
from ..generation import Streamed, _agree, _check, _check_length, _check_parts, _check_stops, _commit, _ends_of, _prefill
from .rules import Rule, blockwise
from .verification import accept_along, laws_along, matched, rewind


@record
class Stats(NamedTuple):
    """How the drafts did, all int64 (): steps of the model, tokens drafted, tokens of them that stayed.

    Prints as a sentence; under vmap, with fields (B,), as one for each sequence.
    """

    rounds: Tensor
    drafted: Tensor
    accepted: Tensor

    @property
    def acceptance(self) -> Tensor:
        """The share of the drafted tokens that stayed, (); 0 where none was drafted."""
        return self.accepted / self.drafted.clamp(min=1)

    @property
    def tokens_per_round(self) -> Tensor:
        """How many tokens a step of the model gave, (): those that stayed and one more; 0 where there was none."""
        return torch.where(self.rounds > 0, 1 + self.accepted / self.rounds.clamp(min=1), 0)

    def __str__(self) -> str:
        if not all(isinstance(x, Tensor) and _checks.value(x) is not None for x in self):
            return repr(self)
        return by_rows(self, Stats._sentence)

    def _sentence(self) -> str:
        kept = f"{int(self.accepted)} of {int(self.drafted)} drafted tokens stayed ({float(self.acceptance):.0%})"
        return f"{kept}; {float(self.tokens_per_round):.2f} tokens a round in {int(self.rounds)} rounds"

    def speedup(self, draft: float, verify: float) -> Tensor:
        """How many times faster the text came than token by token, by what the parts cost, ().

            tokens a round / (drafted a round * draft + verify)

        Args:
            draft, verify: what a drafted token and a verification cost, where a step of one token costs 1.

        Source: Leviathan et al., arXiv:2211.17192, theorem 3.8.
        """
        return self.tokens_per_round / (self.drafted / self.rounds.clamp(min=1) * draft + verify)


@record
class Speculated(NamedTuple):
    """A text and how it came about: tokens (steps,), count () of them up to the stop id included, and Stats."""

    tokens: Tensor
    count: Tensor
    stats: Stats


@door
def speculate(
    key: Tensor,
    model: Model,
    params: Any,
    drafter: Any,
    prompt: Tensor,
    cache: Any = ABSENT,
    *,
    steps: int,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] = (),
    prompt_length: Tensor | None = None,
    rule: Rule = blockwise,
    chunk: int = 512,
) -> tuple[Speculated, Any]:
    """`fa.generate` with drafts: the same law of tokens, in fewer steps of the model.

    Args:
        key: randomness. The tokens are not those that generate draws with this key, but their law is the same; with `greedy` they
            are the same tokens, up to the rounding of one step against several at once.
        drafter: one of `fa.drafters`; it reads the prompt (not what a given cache holds). A drafter of this very model with other
            weights reads the past of the target instead, and nothing is read twice.
        rule: how drafts are accepted.
        model, params, prompt, cache, steps, sampler, stop, prompt_length, chunk: as in `fa.generate`.

    Returns:
        Speculated, and the past of the prompt and all tokens but the last, as generate gives it.

    Raises:
        ValueError, TypeError: as generate; a drafter of another vocabulary.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> lookup = fa.drafters.prompt_lookup(length=3)
        >>> done, past = speculate(fa.key(1), model, params, lookup, torch.tensor([1, 2, 3, 1, 2]), steps=6)
        >>> torch.equal(done.tokens, fa.generate(fa.key(1), model, params, torch.tensor([1, 2, 3, 1, 2]), steps=6)[0])
        True

    Law: the law of generate, and under greedy its tokens; vmap over prompts of different lengths equals the loop
        (test_decoding.py).
    """
    _check("speculate", prompt, cache, steps, chunk, stop)
    ends, places = tuple(stop), torch.arange(steps, device=prompt.device)
    tokens = count = last = None
    stats, past = None, cache
    turns = _rounds(key, model, params, drafter, prompt, cache, steps, sampler, ends, prompt_length, rule, chunk)
    for turn in progress.track(turns, "writing round"):
        if tokens is None or count is None:
            tokens = torch.where(places == 0, turn.last, 0)
            count = turn.kept
        else:
            new = turn.tokens.index_select(0, (places - count).clamp(0, len(turn.tokens) - 1))
            tokens = torch.where((places >= count) & (places < count + turn.kept), new, tokens)
            count = count + turn.kept
        last, stats, past = turn.last, turn.stats, turn.past
    assert tokens is not None
    assert count is not None
    assert last is not None
    assert stats is not None
    tokens = torch.where(places < count, tokens, last)  # after the end, the stop id again
    return Speculated(tokens, count, stats), past


@dataclass(frozen=True)
class Piece(Streamed):
    """`fa.Streamed`, and Stats so far."""

    stats: Stats


def stream(
    key: Tensor,
    model: Model,
    params: Any,
    drafter: Any,
    prompt: Tensor,
    cache: Any = ABSENT,
    *,
    steps: int,
    tokenizer: Any = None,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    rule: Rule = blockwise,
    chunk: int = 512,
) -> Iterator[Piece]:
    """`fa.stream` with drafts: a piece a round, of one token or several.

    A stop id or a stop string in the middle of a draft ends the text there, and the past holds no more than that.

    Args:
        drafter, rule: as in `speculate`; all others as in `fa.stream`.

    Raises:
        ValueError, TypeError: as `speculate` and `fa.stream`, at the first piece.

    Law: the tokens are those of `speculate`, the text ends where that of `fa.stream` ends (test_decoding.py).
    """
    _check_stops(tokenizer, stop_strings)
    ends = _ends_of("stream", tokenizer, stop)
    text, tokens, out = StreamedText(tokenizer, stop_strings), [], []

    def hear(new: list[int]) -> tuple[int, bool]:
        """How many of these tokens stay, and whether the text has ended."""
        for n, token in enumerate(new, 1):
            tokens.append(token)
            if token in ends or len(tokens) == steps:
                piece, found = text.add(token) if token not in ends else ("", False)
                out.append(piece if found else piece + text.finish())
                return n, True
            piece, found = text.add(token)
            out.append(piece)
            if found:
                return n, True
        return len(new), False

    for turn in _rounds(key, model, params, drafter, prompt, cache, steps, sampler, ends, None, rule, chunk, hear):
        piece, ended = "".join(out), bool(turn.done)
        out.clear()
        yield Piece(piece, tuple(tokens), turn.past, ended, turn.stats)


class _Round(NamedTuple):
    tokens: Tensor  # (N + 1,), of which the first kept are new
    kept: Tensor
    last: Tensor  # the last token that is written, which the past does not hold
    past: Any
    stats: Stats
    done: Tensor


def _rounds(
    key: Tensor,
    model: Model,
    params: Any,
    drafter: Any,
    prompt: Tensor,
    cache: Any,
    steps: int,
    sampler: Sampler,
    stop: Sequence[int],
    prompt_length: Tensor | None,
    rule: Rule,
    chunk: int,
    hear: Callable[[list[int]], tuple[int, bool]] | None = None,
) -> Iterator[_Round]:
    """The first token, then what each step of the model gave; `hear` is told the tokens, and may end the text among them."""
    _check_parts("speculate", model, sampler)
    _check("speculate", prompt, cache, steps, chunk, stop)
    _check_length(prompt, prompt_length)
    _check_drafter(drafter)
    options = {"ends": tuple(stop), "chunk": chunk, "sampler": sampler, "drafter": drafter, "rule": rule}
    _agree("speculate", params, key, prompt, cache, steps, prompt_length, **options)
    whole = torch.full_like(prompt[0], len(prompt))
    start = _prefill(model, params, prompt, cache, steps + drafter.length, prompt_length, chunk)
    _check_vocabulary(drafter, start.logits)
    state = sampling.prime(sampler, prompt, sampling.begin(sampler, start.logits), length=prompt_length)
    length = whole if prompt_length is None else prompt_length
    shared = drafter.sharing if drafter.sharing is not None and drafter.sharing.model is model else None
    drafting = shared.init(prompt, length, start.logits, start.cache) if shared else drafter.init(prompt, length, steps)
    keys = randomness.split(key, (steps + 1, 2))
    zero = torch.zeros_like(whole)
    stats, past = Stats(zero, zero, zero), start.cache
    _check_numbers(start.logits)
    last, state = sampling.draw(keys[steps, 0], sampler, start.logits, state)
    count = zero + min(steps, 1)
    done = _ends(last, stop) | (steps <= 1)
    if hear is not None and steps:
        done = done | hear([int(last)])[1]
    yield _Round(last.reshape(1), count, last, past, stats, done)
    for step in range(max(steps - 1, 0)):
        if _all(done):
            break
        draft, drafting = (
            shared.propose(keys[step, 0], last, drafting._replace(cache=past))
            if shared
            else drafter.propose(keys[step, 0], last, drafting)
        )
        nothing = sampler.deterministic and _checks.integer(draft.valid) == 0  # then a step of one token will do
        proposed = draft.tokens[:0] if nothing else draft.tokens
        logits, delta = transformer.along(model, params, torch.cat([last.reshape(1), proposed]), past)
        _check_numbers(logits)
        if sampler.deterministic:
            found, states = matched(sampler, logits, proposed, draft.valid, state)
        else:
            along = laws_along(sampler, logits, proposed, state)
            laws, states = along
            chance = F.one_hot(proposed, logits.shape[-1]).to(laws.dtype) if is_absent(draft.laws) else draft.laws.to(laws.dtype)
            found = accept_along(keys[step, 1], along, chance, proposed, draft.valid, rule=rule)
        kept = torch.minimum(_until_stop(found.tokens, found.count + 1, stop), steps - count)
        kept = torch.where(done, 0, kept)
        newest = found.tokens.index_select(0, (kept - 1).clamp(min=0).reshape(1))[0]
        require_drawable("speculate", done | (newest >= 0))
        heard = False
        if hear is not None:
            n, heard = hear(found.tokens[: int(kept)].tolist())
            kept = torch.full_like(kept, n)
        past = _commit(past, delta, kept)  # the last token, and all but the last of the new ones
        past = transformer.renewed(model, params, past)
        last = torch.where(done, last, found.tokens.index_select(0, (kept - 1).clamp(min=0).reshape(1))[0])
        state = sampler.observe(last, rewind(states, (kept - 1).clamp(min=0)))
        tokens = F.pad(found.tokens, (0, drafter.length - len(proposed)), value=-1)
        drafting = (shared or drafter).keep(tokens, kept, drafting)
        open_ = (~done).long()
        stayed = torch.minimum(found.count, kept)
        stats = Stats(stats.rounds + open_, stats.drafted + open_ * draft.valid, stats.accepted + open_ * stayed)
        count = count + kept
        done = done | _ends(last, stop) | (count >= steps) | heard
        yield _Round(tokens, kept, last, past, stats, done)


def _check_drafter(drafter: Any) -> None:
    if not hasattr(drafter, "length") or not hasattr(drafter, "keep"):
        remedy = "Such as fa.drafters.model(model, fa.quantize(fa.int8)(params)), or fa.drafters.prompt_lookup()."
        _checks.fail("speculate", "drafter", "one of fa.drafters", f"a {type(drafter).__name__}", remedy, TypeError)


def _check_vocabulary(drafter: Any, logits: Tensor) -> None:
    if drafter.vocabulary not in (None, logits.shape[-1]):
        remedy = "Draft with a model of the same tokenizer."
        _checks.fail("speculate", "drafter", f"of the model's {logits.shape[-1]} tokens", f"one of {drafter.vocabulary}", remedy)


def _check_numbers(logits: Tensor) -> None:
    if _checks.is_true(logits.isnan()):
        remedy = "Look for NaN in params and in the past; a past that overflowed inside a transform gives NaN too."
        _checks.fail("speculate", "the logits of a step", "numbers", "NaN", remedy)


def _ends(token: Tensor, stop: Sequence[int]) -> Tensor:
    found = torch.zeros_like(token, dtype=torch.bool)
    for one in stop:
        found = found | (token == one)
    return found


def _until_stop(tokens: Tensor, count: Tensor, stop: Sequence[int]) -> Tensor:
    """How many of the first `count` tokens there are up to the first stop id, it included."""
    ends = _ends(tokens, stop).long()
    before = ends.cumsum(-1) - ends
    return ((before == 0) & (torch.arange(len(tokens), device=tokens.device) < count)).sum(-1)


def _all(done: Tensor) -> bool:
    known = _checks.peek(done)
    return known is not None and bool(known.all())
