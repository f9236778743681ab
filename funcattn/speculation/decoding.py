"""Generate with drafts: what a drafter proposes is read by the model in one step, and the beginning that is accepted stays.

Nothing is rolled back. A step proposes keys and values for all drafted tokens, and only the accepted ones are committed; the
sampler's state is the older one at the place where the draft ended.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, randomness, sampling
from ..generation import _check, _check_length, _commit, _prefill
from ..records import ABSENT, Model, is_absent, record
from ..sampling import Sampler
from .acceptance import accept
from .rules import Rule, blockwise
from .verification import laws_along, rewind


@record
class Stats(NamedTuple):
    """How the drafts did, all int64 (): steps of the model, tokens drafted, tokens of them that stayed."""

    rounds: Tensor
    drafted: Tensor
    accepted: Tensor


@record
class Speculated(NamedTuple):
    """A text and how it came about: tokens (steps,), count () of them up to the stop id included, and Stats."""

    tokens: Tensor
    count: Tensor
    stats: Stats


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
        drafter: one of `fa.drafters`; it reads the prompt (not what a given cache holds).
        rule: how drafts are accepted.
        model, params, prompt, cache, steps, sampler, stop, prompt_length, chunk: as in `fa.generate`.

    Returns:
        Speculated, and the past of the prompt and all tokens but the last, as generate gives it.

    Raises:
        ValueError, TypeError: as generate.

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
    _check_length(prompt, prompt_length)
    N, whole = drafter.length, torch.full_like(prompt[0], len(prompt))
    start = _prefill(model, params, prompt, cache, steps, prompt_length, chunk)
    state = sampling.prime(sampler, prompt, sampling.begin(sampler, start.logits), length=prompt_length)
    drafting = drafter.init(prompt, whole if prompt_length is None else prompt_length, steps)
    keys = randomness.split(key, (steps + 1, 2))
    last, state = sampling.draw(keys[steps, 0], sampler, start.logits, state)
    places = torch.arange(steps, device=prompt.device)
    tokens = torch.where(places == 0, last, 0)
    zero = torch.zeros_like(whole)
    count, done, stats, past = zero + min(steps, 1), _ends(last, stop) | (steps <= 1), Stats(zero, zero, zero), start.cache
    for step in range(max(steps - 1, 0)):
        if _all(done):
            break
        draft, drafting = drafter.propose(keys[step, 0], last, drafting)
        logits, delta = model.extend(params, torch.cat([last.reshape(1), draft.tokens]), past)
        laws, states = laws_along(sampler, logits, draft.tokens, state)
        chance = F.one_hot(draft.tokens, logits.shape[-1]).to(laws.dtype) if is_absent(draft.laws) else draft.laws.to(laws.dtype)
        found = accept(keys[step, 1], laws.exp(), chance, draft.tokens, draft.valid, rule=rule, check=False)
        kept = torch.minimum(_until_stop(found.tokens, found.count + 1, stop), steps - count)
        kept = torch.where(done, 0, kept)
        past = _commit(past, delta, kept)  # the last token, and all but the last of the new ones
        new = found.tokens.index_select(0, (places - count).clamp(0, N))
        tokens = torch.where((places >= count) & (places < count + kept), new, tokens)
        last = torch.where(done, last, found.tokens.index_select(0, (kept - 1).clamp(min=0).reshape(1))[0])
        state = sampler.observe(last, rewind(states, (kept - 1).clamp(min=0)))
        drafting = drafter.keep(found.tokens, kept, drafting)
        open_ = (~done).long()
        stayed = torch.minimum(found.count, kept)
        stats = Stats(stats.rounds + open_, stats.drafted + open_ * draft.valid, stats.accepted + open_ * stayed)
        count = count + kept
        done = done | _ends(last, stop) | (count >= steps)
    tokens = torch.where(places < count, tokens, last)  # after the end, the stop id again
    return Speculated(tokens, count, stats), past


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
