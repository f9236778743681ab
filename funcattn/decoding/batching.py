"""Continuous batching: texts that come and go, decoded side by side, each as it would be alone.

    slots = idle(model, params, model.cache(1024), 8)                          room for 8 texts
    slots = enter(key, model, params, prompt, slots, 3, steps=100)             a text takes slot 3
    served, slots = step(model, params, slots)                                 a token for each text, whatever its length

All three are pure: the slots are a value, stacked on the first axis, and a step is `vmap` of the step of one slot. A text leaves
its slot when it ends, at the same step, and its room is free for the next: no text waits for the longest, and nothing is padded
but the tokens of a slot that is idle. Token i of a text spends `split(key, steps)[i]`, as in `generate`, so what is drawn does
not depend on the company.

Source: Yu et al., Orca: A distributed serving system for transformer-based generative models, OSDI 2022 (iteration-level
scheduling).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from .. import caches, collectives, randomness, sampling, transformer, tree
from ..caches import Branch
from ..core import errors
from ..core.doors import door
from ..models import Model
from ..records import ABSENT, is_absent, record
from ..sampling import Sampler
from .loop import is_stop, prefill
from .requests import check_prompt


@record
class Slot(NamedTuple):
    """One text in the making; in `Slots` every leaf has an axis of B in front."""

    cache: Any  # what it has read: a past of its own
    logits: Tensor  # (V,), of its next token
    key: Tensor  # int64 (2,)
    drawn: Tensor  # int64 (), how many tokens it has written
    left: Tensor  # int64 (), how many it may still write: 0 in a free slot
    state: Any  # the sampler's


@record
class Slots(NamedTuple):
    """B slots, the past that all their texts continue, held once (`()` where there is none), and the empty past of a free slot."""

    slots: Slot
    prefix: Any
    empty: Any

    @property
    def busy(self) -> Tensor:
        """Bool (B,): which slots have a text that goes on."""
        return self.slots.left > 0


@record
class Served(NamedTuple):
    """What a step wrote: token int64 (B,), which of them count, bool (B,), and which were the last of their text, bool (B,)."""

    token: Tensor
    drawn: Tensor
    ended: Tensor


@door
def idle(model: Model, params: Any, past: Any, count: int, *, sampler: Sampler = sampling.greedy, prefix: Any = ABSENT) -> Slots:
    """Slots without a text.

    Args:
        model, params: a decoder and its weights.
        past: the empty past of each slot, `model.cache(size)`: room for a prompt and its text. Of the kinds, `Pages` copies least
            in a step, and a `Ring` has room for texts of any length.
        count: B, how many texts are decoded side by side.
        sampler: the one that `step` will draw with.
        prefix: a past that every text continues, such as that of a system prompt.
    """
    if not errors.is_count(count, 1):
        errors.fail("idle", "count", "a number of slots, at least 1", count, "Say how many texts are decoded side by side.")
    caches.capacity(past)  # says what is wrong where it is no past
    token = torch.zeros_like(past.length)
    logits = torch.zeros_like(model.logits(params, model.hidden(params, token.unsqueeze(0), past)[0][-1]))
    key, state = token.new_zeros(2), sampling.begin(sampler, logits)
    one = Slot(past, logits, key, token, token, state)
    return Slots(tree.map(lambda leaf: leaf.expand(count, *leaf.shape), one), prefix, past)


@door
def enter(
    key: Tensor,
    model: Model,
    params: Any,
    prompt: Tensor,
    slots: Slots,
    slot: int,
    *,
    steps: int,
    sampler: Sampler = sampling.greedy,
    chunk: int = 512,
) -> Slots:
    """Read a prompt into a free slot; the steps that follow continue it by at most `steps` tokens.

    Args:
        key: randomness of this text alone, as in `generate`.
        prompt: int64 (T,), T >= 1, behind the prefix of all slots.
        slot: 0 to B - 1, one that is not busy.
        chunk: tokens of the prompt that are read at a time.

    Raises:
        ValueError: the slot is busy or has no room for prompt and text, or the prompt is empty.

    Law: the text is that of `generate` with this key, whoever else is served (test_serving.py).
    """
    B = slots.slots.left.shape[0]
    if not 0 <= slot < B:
        errors.fail("enter", "slot", f"between 0 and {B - 1}", slot, "There are as many slots as idle made.")
    if key.shape != slots.slots.key.shape[1:]:
        errors.fail("enter", "key", "one key, int64 (2,)", errors.shape(key), "Make one with fa.key(seed).")
    if errors.is_true(slots.busy[slot]):
        errors.fail("enter", "slot", "free", f"{slot}, which is busy", "Take one where slots.busy is False, or leave it first.")
    check_prompt("enter", prompt)
    if steps < 1:
        errors.fail("enter", "steps", "at least 1", steps, "A text of no tokens needs no slot.")
    values = {"key": key, "prompt": prompt, "slot": slot, "steps": steps, "chunk": chunk, "sampler": sampler}
    collectives.agree("enter", values, params)
    before = tree.map(lambda leaf: leaf[slot], slots.slots)
    room = caches.capacity(before.cache)
    if len(prompt) + steps - 1 > room:
        got, remedy = f"{len(prompt)} and {steps} for room of {room}", "Make the slots of a larger past."
        errors.fail("enter", "prompt and steps", "as many tokens as a slot has room for", got, remedy)
    logits, cache = prefill(model, params, prompt, _behind(slots.prefix, before.cache), room=None, chunk=chunk)
    cache = cache if is_absent(slots.prefix) else cache.tail
    left = torch.full_like(before.left, steps)
    state = sampling.begin(sampler, logits)
    _check_sampler("enter", state, before.state)
    state = sampling.observe_prompt(sampler, prompt, state)
    here = Slot(cache, logits, key, torch.zeros_like(left), left, state)
    return slots._replace(slots=_put(slots.slots, before, here, slot))


@door
def step(
    model: Model, params: Any, slots: Slots, *, sampler: Sampler = sampling.greedy, stop: Sequence[int] = ()
) -> tuple[Served, Slots]:
    """Write one token in every slot that has a text, and read it unless it was the last.

    A text ends after its `steps` or with an id of `stop`, which counts as its last token; its slot is free in what is returned.

    Raises:
        ValueError: the logits of a text are NaN, or the sampler leaves nothing to draw.
        TypeError: stop is anything but ids.
    """
    errors.stops("step", stop)
    _check_sampler("step", sampling.begin(sampler, slots.slots.logits[0]), tree.map(lambda leaf: leaf[0], slots.slots.state))

    def one(slot: Slot) -> tuple[Served, Slot]:
        busy = slot.left > 0
        token, state = sampling.draw(randomness.fold_in(slot.key, slot.drawn), sampler, slot.logits, slot.state, wanted=busy)
        ended = (slot.left == 1) | is_stop(token, stop)
        goes_on = busy & ~ended
        x, delta = model.hidden(params, token.unsqueeze(0), _behind(slots.prefix, slot.cache))
        cache = caches.commit(slot.cache, delta, goes_on.long())
        cache = transformer.renewed(model, params, cache) if is_absent(slots.prefix) else cache
        logits = torch.where(goes_on, model.logits(params, x[-1]), 0)
        state = tree.map(lambda new, old: torch.where(busy, new, old), state, slot.state)
        left = torch.where(goes_on, slot.left - 1, 0)
        after = Slot(caches.reset(cache, slots.empty, ~goes_on), logits, slot.key, slot.drawn + busy, left, state)
        return Served(token, busy, busy & ended), after

    served, after = vmap(one)(slots.slots)
    return served, slots._replace(slots=after)


@door
def leave(slots: Slots, slot: int) -> Slots:
    """The slots without the text of one of them, which ends where it is."""
    here = torch.arange(slots.slots.left.shape[0], device=slots.slots.left.device) == slot
    one = slots.slots
    cache = vmap(caches.reset, (0, None, 0))(one.cache, slots.empty, here)
    return slots._replace(slots=one._replace(cache=cache, left=torch.where(here, 0, one.left)))


def _check_sampler(function: str, state: Any, held: Any) -> None:
    """Fail where the state of a sampler is not of the form that the slots hold."""
    given, kept = ([errors.shape(leaf) for leaf in tree.leaves(each)] for each in (state, held))
    if given != kept:
        remedy = "Give idle, enter and step the same sampler."
        errors.fail(function, "sampler", f"that of idle, with a state of {kept}", given, remedy)


def _behind(prefix: Any, cache: Any) -> Any:
    return cache if is_absent(prefix) else Branch(prefix, cache)


def _put(stacked: Any, before: Any, after: Any, slot: int) -> Any:
    """The stack with one row replaced; a leaf that is what it was is not copied."""
    index = torch.tensor([slot], device=stacked.left.device)
    put = lambda rows, old, new: rows if new is old else rows.index_copy(0, index, new.unsqueeze(0))
    return tree.map(put, stacked, before, after)
