"""Continuous batching: texts of different lengths decode side by side, each as if it were alone.

    slots = idle(model, params, model.cache(1024), 8)               8 free slots
    slots = enter(key, model, params, prompt, slots, 3, steps=100)  prefill a prompt into slot 3
    served, slots = step(model, params, slots)                      one decode step of every slot

All three are pure: the slots are a pytree stacked on its first axis, and a step is `vmap` of the
step of one slot. A server that has no use for the slots before a step passes `donate=True`: rows
are then written in place, where a pure step copies all that is remembered. A slot becomes free in
the step in which its text ends, so no text waits for the longest; the only padding is the unused
token of a free slot. Token i of a text is drawn with `split(key, steps)[i]`, as in `generate`, so
it does not depend on the other slots.

Source: Yu et al., Orca: A distributed serving system for transformer-based generative models, OSDI
    2022 (iteration-level scheduling).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from .. import caches, collectives, randomness, sampling, transformer, tree
from ..caches import Branch, KVCache
from ..core import errors
from ..core.autograd import has_tangent, transforming
from ..core.doors import door
from ..models import Model, Past
from ..records import ABSENT, is_absent, record
from ..sampling import Sampler
from ..tree import Tree
from .loop import is_stop, prefill
from .requests import check_prompt

DONATED = -1  # tokens left in slots that were donated


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
            continuation. A `Cache` is written in place where slots are donated, of the other kinds
            `Pages` copies least in a step, and a `Ring` has room for texts of any length.
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
    donate: bool = False,
) -> Slots:
    """Prefill a prompt into a free slot; the following steps draw at most `steps` tokens for it.

    Args:
        key: int64 (2,), randomness of this text alone, as in `generate`.
        prompt: int64 (T,), T >= 1, which follows the prefix of all slots.
        slot: 0 to B - 1, one that is not busy.
        steps: the most tokens to draw, at least 1.
        sampler: that of `idle` and `step`.
        chunk: tokens of the prompt that are read at a time.
        donate: write into the tensors of the given slots, as in `step`.

    Raises:
        ValueError: the slot is busy or has no room for prompt and text, or the prompt is empty; the
            slots were donated.

    Law: the text is that of `generate` with this key, whatever the other slots hold
        (test_serving.py).
    """
    B = slots.slots.left.shape[0]
    _check_held("enter", slots, donate)
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
    after = _put(slots.slots, before, here, slot, donate)
    if donate:
        slots.slots.left.fill_(DONATED)
    return slots._replace(slots=after)


@door
def step(
    model: Model,
    params: Tree,
    slots: Slots,
    *,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] = (),
    donate: bool = False,
) -> tuple[Served, Slots]:
    """One decode step: draw a token in every busy slot, and read it unless it was the last.

    A text ends after its `steps` tokens or at an id of `stop`, which counts as its last token; its
    slot is free in the slots that are returned.

    Args:
        model, params, slots, sampler: as in `idle` and `enter`.
        stop: ids that end a text.
        donate: write into the tensors of the given slots where their kind of cache allows it
            (`Cache`, and the tail of a `QuantizedCache`), instead of copying all that is
            remembered. The given slots, and any that share their tensors, must not be used
            afterwards; those given raise.

    Raises:
        ValueError: the logits of a text are NaN, or the sampler leaves no token to draw; the slots
            were donated, or a transform is active and they should be.
        TypeError: stop is not a sequence of ids.

    Law: donated or not, a step gives the same (test_serving.py).
    """
    errors.stops("step", stop)
    _check_held("step", slots, donate)
    commit = caches.commit_donated if donate else caches.commit
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
        cache = commit(slot.cache, delta, goes_on.long())
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
    if donate:
        slots.slots.left.fill_(DONATED)
    return served, slots._replace(slots=after)


@door
def leave(slots: Slots, slot: int) -> Slots:
    """The slots with one of them free: its text ends at the tokens drawn so far."""
    _check_held("leave", slots)
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


def _check_held(function: str, slots: Slots, donate: bool = False) -> None:
    """Fail where the slots were donated, or cannot be."""
    if errors.is_true(slots.slots.left == DONATED):
        remedy = "Go on with the slots that were returned, or leave donate=True out."
        errors.fail(function, "slots", "those of the last call", "slots that were donated", remedy)
    if donate and (transforming() or has_tangent(slots) or torch.compiler.is_compiling()):
        remedy = "Leave donate=True out: a donation cannot be undone."
        errors.fail(function, "the call", "outside of every transform", "one inside", remedy)


def _behind(prefix: Past, cache: KVCache) -> KVCache:
    return cache if is_absent(prefix) else Branch(prefix, cache)


def _put(stacked: Slot, before: Slot, after: Slot, slot: int, donate: bool) -> Slot:
    """The stacked tree with one row replaced; leaves that are identical in both are not copied."""
    index = torch.tensor([slot], device=stacked.left.device)

    def put(rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
        if new is old:
            return rows
        # counts are small, and `left` tells the slots that were donated from those returned
        own = donate and rows.dtype != torch.int64 and all(rows.stride())
        own = own and not (rows.requires_grad or new.requires_grad)
        return (rows.index_copy_ if own else rows.index_copy)(0, index, new.unsqueeze(0))

    return tree.map(put, stacked, before, after)
