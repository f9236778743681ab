"""Drafters that are models: a smaller one, the target with cheaper weights or without layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import caches, collectives, randomness, sampling, transformer, tree
from ...caches import Branch, Cache, Delta, Hybrid, KVCache
from ...core import errors
from ...core.doors import door, printed
from ...core.fingerprints import Held
from ...models import Model, Past, at_core, config_of, told
from ...records import ABSENT, is_absent, record
from ...sampling import Sampler
from ...tree import Tree
from ..loop import commit_owned, prefill
from .drafters import Draft, Drafter, NodeReader, Sharing, check_length, check_probability
from .tree_rules import kinship
from .verification import select_state


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
    confidence: float = 0.0,
    vocabulary: int | None = None,
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
        confidence: the draft ends behind a token to which the drafter gives a probability below
            it (the model itself under a deterministic sampler). Long drafts then stop where they
            would be rejected; 0 never stops.
        vocabulary: V of the target, for a drafter whose vocabulary has other padding: its logits
            are cut or filled by -inf to V, and ids that it lacks are read as token 0.

    Law: distributed as generate, and equal to it under greedy, with every option
        (test_model_drafters.py).
    """
    check_length("drafters.model", length)
    check_probability("drafters.model", "confidence", confidence)
    if vocabulary is not None:
        model = _padded(model, vocabulary)
    if not errors.is_count(chunk, 1):
        errors.fail(
            "drafters.model",
            "chunk",
            "an int, at least 1",
            repr(chunk),
            "Tokens of the prompt read at a time.",
        )

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

    weights = Held(params)

    def read(
        key: Tensor, last: Tensor, state: ModelDrafterState, whole: bool
    ) -> tuple[Draft, ModelDrafterState]:
        with weights.within():
            return drafted(key, last, state, whole)

    def drafted(
        key: Tensor, last: Tensor, state: ModelDrafterState, whole: bool
    ) -> tuple[Draft, ModelDrafterState]:
        cache, token, tokens, probs, states, deltas = state.cache, last, [], [], [], []
        goes_on, valid = torch.ones_like(last, dtype=torch.bool), torch.zeros_like(last)
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
            logits = logits_of(x)
            left, now = sampler.update(logits, now)
            states.append(now)
            token = (
                left.argmax(-1) if sampler.deterministic else randomness.categorical(keys[n], left)
            )
            tokens.append(token)
            if not sampler.deterministic:
                probs.append(left.softmax(-1))
            now = sampler.observe(token, now)
            valid = valid + goes_on.long()
            if confidence:
                # A deterministic sampler leaves one token, whatever the model finds.
                own = logits if sampler.deterministic else left
                sure = own.log_softmax(-1).gather(-1, token.reshape(1))[0].exp() >= confidence
                goes_on = goes_on & sure
                if errors.value(goes_on) is not None and not goes_on:
                    break
        if whole:  # the last token is read too: the cache is complete where all are accepted
            x, delta = model.hidden(params, token.reshape(1), cache)
            deltas.append(delta)
            cache = commit_owned(cache, delta, 1) if dense else caches.commit(cache, delta, 1)
            now = sampler.update(logits_of(x), now)[1] if tree.leaves(now) else now
        missing = length - len(tokens)
        states += [now] * (1 + missing)
        tokens += [torch.zeros_like(last)] * missing
        probs += probs[-1:] * missing
        states = tree.map(lambda *leaves: torch.stack(leaves), *states)
        draft = Draft(torch.stack(tokens), torch.stack(probs) if probs else ABSENT, valid)
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
    recurs = isinstance(model.config, transformer.Config) and model.config.recurrent_layers
    reader = None if recurs else _node_reader(model, params, chunk)
    tokens = _vocabulary(model, params) if vocabulary is None else vocabulary
    return Drafter(init, propose, keep, length, tokens, sharing, reader)


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
    confidence: float = 0.0,
) -> Drafter:
    """Draft with the target model without some of its layers, with a cache of its own.

    Args:
        model, params: from `fa.decoder`, or compiled: then the draft is compiled alike. A replaced
            logits function is the draft's too.
        layers: which to leave out, 0 to L - 1; leaving out middle layers costs least acceptance.
        length, sampler, chunk, confidence: as in `model`.

    Source: Zhang et al., Draft and verify: lossless acceleration by self-speculative decoding,
        arXiv:2309.08168.
    """
    config = config_of(model, "hidden")
    if config is None:
        errors.fail(
            "drafters.skip",
            "model",
            "from fa.decoder",
            told(model),
            "Make it with fa.decoder.",
            TypeError,
        )
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
    return _model(
        draft, weights, length=length, sampler=sampler, chunk=chunk, confidence=confidence
    )


@record
class NodeReaderState(NamedTuple):
    """The state of a model that reads trees: its cache before `last`, and the rows of the nodes.

    read: the delta of node 0 and all nodes read, () before the first. ahead: the cache with the
    nodes of a path, () where they are none.
    """

    cache: KVCache
    read: Delta | tuple[()] = ABSENT
    ahead: KVCache | tuple[()] = ABSENT


def _node_reader(model: Model, params: Tree, chunk: int) -> NodeReader:
    def init(prompt: Tensor, prompt_length: Tensor, steps: int) -> tuple[Tensor, NodeReaderState]:
        start = prefill(
            model, params, prompt, ABSENT, room=steps, prompt_length=prompt_length, chunk=chunk
        )
        return start.logits, NodeReaderState(start.cache)

    def read(
        last: Tensor, tokens: Tensor, parent: Tensor, state: NodeReaderState, since: int, path: bool
    ) -> tuple[Tensor, NodeReaderState]:
        if path:  # a text, of which only the new nodes are read
            before = state.cache if is_absent(state.ahead) else state.ahead
            new = torch.cat([last.reshape(1), tokens])[since:]
            x, delta = model.hidden(params, new, before)
            # Rows beyond the length of a cache may be overwritten.
            add = commit_owned if _is_dense(before) else caches.commit
            logits = model.logits(params, x)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return logits, NodeReaderState(state.cache, ahead=add(before, delta, len(new)))
        x, delta = transformer.hidden_of_tree(
            *(model, params, torch.cat([last.reshape(1), tokens]), state.cache),
            above=kinship(parent).above,
        )
        logits = model.logits(params, x[since:]) if since < len(x) else x[since:]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits, NodeReaderState(state.cache, delta)

    def keep(
        rows: Tensor, tokens: Tensor, count: Tensor, state: NodeReaderState
    ) -> NodeReaderState:
        assert not is_absent(state.read)
        kept = commit_owned(state.cache, transformer.rows_of_path(state.read, rows), count)
        return NodeReaderState(kept)

    return NodeReader(model, init, NodeReaderState, read, keep)


def _padded(model: Model, V: int) -> Model:
    """The model with V tokens: its logits cut or filled by -inf, ids that it lacks read as 0."""
    if not errors.is_count(V, 1):
        remedy = "Pass that of the target: model.config.vocabulary."
        errors.fail("drafters.model", "vocabulary", "an int, at least 1", repr(V), remedy)
    known = model.config.vocabulary if isinstance(model.config, transformer.Config) else V

    def hidden(params: Tree, tokens: Tensor, cache: Past = ABSENT, **given: Any) -> Any:
        return model.hidden(params, torch.where(tokens < known, tokens, 0), cache, **given)

    def logits(params: Tree, x: Tensor) -> Tensor:
        own = model.logits(params, x)
        return F.pad(own, (0, V - own.shape[-1]), value=-torch.inf)

    return model if known == V else model._replace(hidden=hidden, logits=logits)


def _vocabulary(model: object, params: Tree) -> int | None:
    """V of a model; None where it is unknown, or where this device has a shard of the head."""
    if (
        config_of(model, "logits") is None
        or not isinstance(params, transformer.Params)
        or collectives.bound()
    ):
        return None
    return tree.leaves(transformer.lm_head(params))[0].shape[0]


def _is_dense(cache: KVCache) -> bool:
    cache = cache.rows if isinstance(cache, Hybrid) else cache
    return type(cache) is Cache or (type(cache) is Branch and type(cache.tail) is Cache)
