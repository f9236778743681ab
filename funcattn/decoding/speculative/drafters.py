"""Drafters for `fa.speculate`: a model, n-gram lookup in the text, or any function.

They change the acceptance rate and the cost, never the distribution of the output. A drafter is
three pure functions of a pytree, which covers all tokens but the last:

    init(prompt, prompt_length, steps) -> state
    propose(key, last, state) -> (Draft, state)     N drafted tokens and their probabilities
    keep(tokens, count, state) -> state             commit: the first count of tokens (N + 1,)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import caches, collectives, randomness, sampling, transformer, tree
from ...caches import Branch, Cache, Delta, Hybrid, KVCache
from ...core import errors
from ...core.doors import door, printed, reprinted, uncalled, what_is
from ...models import Model, at_core, config_of, told
from ...records import ABSENT, formerly, is_absent, record
from ...sampling import Sampler
from ...tree import Tree
from ..loop import commit_owned, prefill
from .verification import select_state


@formerly(laws="probs")
@record
class Draft(NamedTuple):
    """Drafted tokens.

    tokens: int64 (N,). probs: (N, V), the probabilities that each was drawn from, or () for a
    deterministic draft. valid: int64 (), how many count.
    """

    tokens: Tensor
    probs: Tensor | tuple[()]
    valid: Tensor


@reprinted
class Drafter(NamedTuple):
    """The functions of a drafter. Not a record: it holds functions.

    Args:
        init: (prompt int64 (T,), prompt_length int64 (), steps) -> state, after the prompt without
            its last token.
        propose: (key, last int64 (), state) -> (Draft of N tokens, state), after `last`.
        keep: (tokens int64 (N + 1,), count int64 (), state) -> state, after the first `count` of
            tokens, which are those written in this round.
        length: N, a size.
        vocabulary: V, the number of token ids; None where it is unknown.
        sharing: for a model that drafts with the target's cache; None otherwise.
        text: the repr, the call that made it.
    """

    init: Callable[[Tensor, Tensor, int], Tree]
    propose: Callable[[Tensor, Tensor, Tree], tuple[Draft, Tree]]
    keep: Callable[[Tensor, Tensor, Tree], Tree]
    length: int
    vocabulary: int | None = None
    sharing: "Sharing | None" = None
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


@record
class ModelDrafterState(NamedTuple):
    """The state of a drafter that is a model.

    cache: of the text and the last draft. certain: int64 (), its length without the draft. states:
    sampler states before each token of the last draft and after it, leaves (N + 1, ...). draft: the
    delta of the last draft, for a cache with recurrent states, which is then that before it.
    """

    cache: KVCache
    certain: Tensor
    states: Tree
    draft: Delta | tuple[()] = ABSENT


@door(name="drafters.model")
@printed
def model(
    model: Model,
    params: Tree,
    *,
    length: int = 4,
    sampler: Sampler = sampling.greedy,
    chunk: int = 512,
) -> Drafter:
    """Draft with a model, token by token: a smaller one, or the target with cheaper weights.

    Where `fa.speculate` is given this same `model`, the draft reads the target's cache, whose
    keys and values are better than the drafter's, and needs no prefill:
    `fa.drafters.model(model, fa.quantize(fa.int8)(params))`. Otherwise it has a cache of its own.

    Args:
        model, params: any decoder of the same vocabulary.
        length: N, how many tokens to draft.
        sampler: how drafts are drawn; where the target is sampled, that same sampler is a good
            choice.
        chunk: as in `fa.generate`.
    """
    _check_length("drafters.model", length)
    if not errors.is_count(chunk, 1):
        remedy = "Tokens of the prompt read at a time."
        errors.fail("drafters.model", "chunk", "an int, at least 1", repr(chunk), remedy)

    def logits_of(x: Tensor) -> Tensor:
        logits = model.logits(params, x[-1])
        return logits if logits.dtype == torch.float64 else logits.float()

    def begun(prompt: Tensor, prompt_length: Tensor, logits: Tensor) -> Tree:
        state = sampling.observe_prompt(
            sampler, prompt, sampling.begin(sampler, logits), length=prompt_length
        )
        return tree.map(lambda leaf: leaf.expand(length + 1, *leaf.shape), state)

    def init(prompt: Tensor, prompt_length: Tensor, steps: int) -> ModelDrafterState:
        room = steps + length + 1
        start = prefill(
            model, params, prompt, ABSENT, room=room, prompt_length=prompt_length, chunk=chunk
        )
        return ModelDrafterState(
            start.cache, start.cache.length, begun(prompt, prompt_length, start.logits)
        )

    def share(
        prompt: Tensor, prompt_length: Tensor, logits: Tensor, cache: KVCache
    ) -> ModelDrafterState:
        return ModelDrafterState(
            cache, torch.zeros_like(prompt_length), begun(prompt, prompt_length, logits)
        )

    def read(
        key: Tensor, last: Tensor, state: ModelDrafterState, whole: bool
    ) -> tuple[Draft, ModelDrafterState]:
        cache, token, tokens, probs, states, deltas = state.cache, last, [], [], [], []
        dense = _is_dense(cache)
        owned = not whole and dense  # rows beyond the cache's length may be overwritten
        now = sampler.observe(last, select_state(state.states, torch.zeros_like(last)))
        keys = () if sampler.deterministic else randomness.split(key, length).unbind()
        for n in range(length):
            x, delta = model.hidden(params, token.reshape(1), cache)
            deltas.append(delta)
            if n < length - 1 or whole:
                # A cache that the first commit has copied is written in place from then on.
                ours = dense and (n > 0 or owned)
                cache = commit_owned(cache, delta, 1) if ours else caches.commit(cache, delta, 1)
            left, now = sampler.update(logits_of(x), now)
            states.append(now)
            token = (
                left.argmax(-1) if sampler.deterministic else randomness.categorical(keys[n], left)
            )
            tokens.append(token)
            if not sampler.deterministic:
                probs.append(left.softmax(-1))
            now = sampler.observe(token, now)
        if whole:  # the last token is read too: the cache is complete where all are accepted
            x, delta = model.hidden(params, token.reshape(1), cache)
            deltas.append(delta)
            cache = commit_owned(cache, delta, 1) if dense else caches.commit(cache, delta, 1)
            now = sampler.update(logits_of(x), now)[1] if tree.leaves(now) else now
        states = tree.map(lambda *leaves: torch.stack(leaves), *states, now)
        draft = Draft(
            torch.stack(tokens),
            torch.stack(probs) if probs else ABSENT,
            torch.full_like(last, length),
        )
        if whole and caches.states(cache):  # states cannot be shortened: `keep` commits again
            return draft, state._replace(states=states, draft=caches.joined(deltas))
        return draft, ModelDrafterState(cache, state.certain, states)

    def propose(
        key: Tensor, last: Tensor, state: ModelDrafterState
    ) -> tuple[Draft, ModelDrafterState]:
        return read(key, last, state, True)

    def keep_states(tokens: Tensor, count: Tensor, state: ModelDrafterState) -> ModelDrafterState:
        # The state that has observed all new tokens but the last.
        here = select_state(state.states, (count - 1).clamp(min=0))
        return state._replace(
            states=tree.map(lambda leaf: leaf.expand(length + 1, *leaf.shape), here)
        )

    def keep(tokens: Tensor, count: Tensor, state: ModelDrafterState) -> ModelDrafterState:
        certain = state.certain + count  # `last` of propose, and all new tokens but the last
        if is_absent(state.draft):
            cache = caches.with_length(state.cache, certain)
        else:
            cache = caches.commit(state.cache, state.draft, count)
        kept = keep_states(tokens, count, state)
        return kept._replace(cache=cache, certain=certain, draft=ABSENT)

    sharing = Sharing(
        model, share, lambda key, last, state: read(key, last, state, False), keep_states
    )
    return Drafter(init, propose, keep, length, _vocabulary(model, params), sharing)


_model = model


@door(name="drafters.skip")
@printed
def skip(
    model: Model,
    params: Tree,
    layers: Sequence[int],
    *,
    length: int = 4,
    sampler: Sampler = sampling.greedy,
    chunk: int = 512,
) -> Drafter:
    """Draft with the target model without some of its layers, with a cache of its own.

    Args:
        model, params: from `fa.decoder`, or compiled: then the draft is compiled alike. A replaced
            logits function is the draft's too.
        layers: which to leave out, 0 to L - 1; leaving out middle layers costs least acceptance.
        length, sampler, chunk: as in `model`.

    Source: Zhang et al., Draft and verify: lossless acceleration by self-speculative decoding,
        arXiv:2309.08168.
    """
    config = config_of(model, "hidden")
    if config is None:
        remedy = "Make it with fa.decoder."
        errors.fail("drafters.skip", "model", "from fa.decoder", told(model), remedy, TypeError)
    out = set(layers)
    if not out or not out < set(range(config.layers)):
        wanted = f"some of 0..{config.layers - 1}, not all"
        errors.fail(
            "drafters.skip", "layers", wanted, tuple(layers), "Leave out a few in the middle."
        )
    left = [i for i in range(config.layers) if i not in out]
    each = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fewer = {
        name: tuple(x[i] for i in left)
        for name, x in each.items()
        if isinstance(x, tuple) and len(x) == config.layers
    }
    smaller = dataclasses.replace(config, layers=len(left), **fewer)
    draft = at_core(model, lambda core: core.made.again(smaller) if core.made else core)
    weights = params._replace(layers=tuple(params.layers[i] for i in left))
    return _model(draft, weights, length=length, sampler=sampler, chunk=chunk)


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
    _check_length("drafters.function", length)

    def init(prompt: Tensor, prompt_length: Tensor, steps: int) -> LookupState:
        return LookupState(
            torch.cat([prompt, prompt.new_full((steps + length + 2,), -1)]), prompt_length
        )

    def propose(key: Tensor, last: Tensor, state: LookupState) -> tuple[Draft, LookupState]:
        places = torch.arange(len(state.tokens), device=last.device)
        text = torch.where(
            places == state.length, last, torch.where(places < state.length, state.tokens, -1)
        )
        found = f(text, state.length + 1)
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
        return Draft(tokens, ABSENT, valid), LookupState(text, state.length)

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
    _check_length("drafters.prompt_lookup", length)
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


def _vocabulary(model: object, params: Tree) -> int | None:
    """V of a model; None where it is unknown, or where this device has a shard of the head."""
    if (
        config_of(model, "logits") is None
        or not isinstance(params, transformer.Params)
        or collectives.bound()
    ):
        return None
    return tree.leaves(transformer.lm_head(params))[0].shape[0]


def _is_ids(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in tree.INTEGERS


def _is_dense(cache: KVCache) -> bool:
    cache = cache.rows if isinstance(cache, Hybrid) else cache
    return type(cache) is Cache or (type(cache) is Branch and type(cache.tail) is Cache)


def _check_length(function: str, length: int) -> None:
    if not errors.is_count(length, 1):
        remedy = "Draft one token at least; 4 is usual."
        errors.fail(function, "length", "an int, at least 1", repr(length), remedy)
