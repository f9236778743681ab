"""Continuous batching: texts of different lengths decode side by side, each as if it were alone.

    slots = idle(model, params, model.cache(1024), 8)               8 free slots
    slots = enter(key, model, params, prompt, slots, 3, steps=100)  prefill a prompt into slot 3
    served, slots = step(model, params, slots)                      one decode step of every slot

All three are pure: the slots are a pytree stacked on its first axis, and a step is `vmap` of the
step of one slot. A slot becomes free in the step in which its text ends, so no text waits for the
longest; the only padding is the unused token of a free slot. Token i of a text is drawn with
`split(key, steps)[i]`, as in `generate`, so it does not depend on the other slots.

Source: Yu et al., Orca: A distributed serving system for transformer-based generative models, OSDI
    2022 (iteration-level
scheduling).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from .. import caches, collectives, randomness, sampling, transformer, tree
from ..caches import Branch, KVCache
from ..core import errors
from ..core.doors import door
from ..models import Model, Past
from ..records import ABSENT, is_absent, record
from ..sampling import Sampler
from ..tree import Tree
from .loop import is_stop, prefill
from .requests import check_prompt


@record
class Slot(NamedTuple):
    """The decoding state of one text; in `Slots` every leaf has a leading axis B."""

    cache: KVCache  # of this slot alone: the tokens read after the shared prefix
    logits: Tensor  # (V,), of the next token
    key: Tensor  # int64 (2,)
    drawn: Tensor  # int64 (), tokens drawn so far
    left: Tensor  # int64 (), tokens that may still be drawn; 0 in a free slot
    state: Tree  # sampler state


@record
class Slots(NamedTuple):
    """B slots, the cache of the prefix common to all, stored once, and the empty cache of a slot.

    prefix is `()` where there is none.
    """

    slots: Slot
    prefix: Past
    empty: KVCache

    @property
    def busy(self) -> Tensor:
        """Bool (B,): True where a slot has a text that has not ended."""
        return self.slots.left > 0


@record
class Served(NamedTuple):
    """The result of a step.

    token: int64 (B,). drawn: bool (B,), True where a token was drawn. ended: bool (B,), True where
    that token was the last of its text.
    """

    token: Tensor
    drawn: Tensor
    ended: Tensor


@door
def idle(
    model: Model,
    params: Tree,
    past: KVCache,
    count: int,
    *,
    sampler: Sampler = sampling.greedy,
    prefix: Past = ABSENT,
) -> Slots:
    """B free slots.

    Args:
        model, params: a decoder and its weights.
        past: the empty cache of each slot, `model.cache(size)`, with room for a prompt and its
            continuation. Of the cache kinds, `Pages` copies least in a step, and a `Ring` has room
            for texts of any length.
        count: B, how many texts are decoded side by side.
        sampler: the sampler that `step` will draw with.
        prefix: a cache that every text continues, such as that of a system prompt.
    """
    if not errors.is_count(count, 1):
        errors.fail(
            "idle",
            "count",
            "a number of slots, at least 1",
            count,
            "Say how many texts are decoded side by side.",
        )
    caches.capacity(past)  # raises where past is not a cache
    token = torch.zeros_like(past.length)
    logits = torch.zeros_like(
        model.logits(params, model.hidden(params, token.unsqueeze(0), past)[0][-1])
    )
    key, state = token.new_zeros(2), sampling.begin(sampler, logits)
    one = Slot(past, logits, key, token, token, state)
    return Slots(tree.map(lambda leaf: leaf.expand(count, *leaf.shape), one), prefix, past)


@door
def enter(
    key: Tensor,
    model: Model,
    params: Tree,
    prompt: Tensor,
    slots: Slots,
    slot: int,
    *,
    steps: int,
    sampler: Sampler = sampling.greedy,
    chunk: int = 512,
) -> Slots:
    """Prefill a prompt into a free slot; the following steps draw at most `steps` tokens for it.

    Args:
        key: int64 (2,), randomness of this text alone, as in `generate`.
        prompt: int64 (T,), T >= 1, which follows the prefix of all slots.
        slot: 0 to B - 1, one that is not busy.
        steps: the most tokens to draw, at least 1.
        sampler: that of `idle` and `step`.
        chunk: tokens of the prompt that are read at a time.

    Raises:
        ValueError: the slot is busy or has no room for prompt and text, or the prompt is empty.

    Law: the text is that of `generate` with this key, whatever the other slots hold
        (test_serving.py).
    """
    B = slots.slots.left.shape[0]
    if not 0 <= slot < B:
        errors.fail(
            "enter", "slot", f"between 0 and {B - 1}", slot, "There are as many slots as idle made."
        )
    if key.shape != slots.slots.key.shape[1:]:
        errors.fail(
            "enter", "key", "one key, int64 (2,)", errors.shape(key), "Make one with fa.key(seed)."
        )
    if errors.is_true(slots.busy[slot]):
        errors.fail(
            "enter",
            "slot",
            "free",
            f"{slot}, which is busy",
            "Take one where slots.busy is False, or leave it first.",
        )
    check_prompt("enter", prompt)
    if steps < 1:
        errors.fail("enter", "steps", "at least 1", steps, "A text of no tokens needs no slot.")
    values = {
        "key": key,
        "prompt": prompt,
        "slot": slot,
        "steps": steps,
        "chunk": chunk,
        "sampler": sampler,
    }
    collectives.agree("enter", values, params)
    before = tree.map(lambda leaf: leaf[slot], slots.slots)
    room = caches.capacity(before.cache)
    if len(prompt) + steps - 1 > room:
        got, remedy = (
            f"{len(prompt)} and {steps} for room of {room}",
            "Make the slots of a larger past.",
        )
        errors.fail(
            "enter", "prompt and steps", "as many tokens as a slot has room for", got, remedy
        )
    logits, cache = prefill(
        model, params, prompt, _behind(slots.prefix, before.cache), room=None, chunk=chunk
    )
    cache = cache.tail if isinstance(cache, Branch) and not is_absent(slots.prefix) else cache
    left = torch.full_like(before.left, steps)
    state = sampling.begin(sampler, logits)
    _check_sampler("enter", state, before.state)
    state = sampling.observe_prompt(sampler, prompt, state)
    here = Slot(cache, logits, key, torch.zeros_like(left), left, state)
    return slots._replace(slots=_put(slots.slots, before, here, slot))


@door
def step(
    model: Model,
    params: Tree,
    slots: Slots,
    *,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] = (),
) -> tuple[Served, Slots]:
    """One decode step: draw a token in every busy slot, and read it unless it was the last.

    A text ends after its `steps` tokens or at an id of `stop`, which counts as its last token; its
    slot is free in the slots that are returned.

    Raises:
        ValueError: the logits of a text are NaN, or the sampler leaves no token to draw.
        TypeError: stop is not a sequence of ids.
    """
    errors.stops("step", stop)
    _check_sampler(
        "step",
        sampling.begin(sampler, slots.slots.logits[0]),
        tree.map(lambda leaf: leaf[0], slots.slots.state),
    )

    def one(slot: Slot) -> tuple[Served, Slot]:
        busy = slot.left > 0
        token, state = sampling.draw(
            randomness.fold_in(slot.key, slot.drawn), sampler, slot.logits, slot.state, wanted=busy
        )
        ended = (slot.left == 1) | is_stop(token, stop)
        goes_on = busy & ~ended
        x, delta = model.hidden(params, token.unsqueeze(0), _behind(slots.prefix, slot.cache))
        cache = caches.commit(slot.cache, delta, goes_on.long())
        cache = transformer.renewed(model, params, cache) if is_absent(slots.prefix) else cache
        logits = torch.where(goes_on, model.logits(params, x[-1]), 0)
        state = tree.map(lambda new, old: torch.where(busy, new, old), state, slot.state)
        left = torch.where(goes_on, slot.left - 1, 0)
        after = Slot(
            caches.reset(cache, slots.empty, ~goes_on),
            logits,
            slot.key,
            slot.drawn + busy,
            left,
            state,
        )
        return Served(token, busy, busy & ended), after

    served, after = vmap(one)(slots.slots)
    return served, slots._replace(slots=after)


@door
def leave(slots: Slots, slot: int) -> Slots:
    """The slots with one of them free: its text ends at the tokens drawn so far."""
    here = torch.arange(slots.slots.left.shape[0], device=slots.slots.left.device) == slot
    one = slots.slots
    cache = vmap(caches.reset, (0, None, 0))(one.cache, slots.empty, here)
    return slots._replace(slots=one._replace(cache=cache, left=torch.where(here, 0, one.left)))


def _check_sampler(function: str, state: Tree, held: Tree) -> None:
    """Fail where a sampler's state does not have the shapes of the state in the slots."""
    given, kept = ([errors.shape(leaf) for leaf in tree.leaves(each)] for each in (state, held))
    if given != kept:
        remedy = "Give idle, enter and step the same sampler."
        errors.fail(function, "sampler", f"that of idle, with a state of {kept}", given, remedy)


def _behind(prefix: Past, cache: KVCache) -> KVCache:
    return cache if is_absent(prefix) else Branch(prefix, cache)


def _put(stacked: Tree, before: Tree, after: Tree, slot: int) -> Tree:
    """The stacked tree with one row replaced; leaves that are identical in both are not copied."""
    index = torch.tensor([slot], device=stacked.left.device)
    put = lambda rows, old, new: rows if new is old else rows.index_copy(0, index, new.unsqueeze(0))
    return tree.map(put, stacked, before, after)
