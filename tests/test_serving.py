"""Texts that come and go: whatever the schedule, each is what it would be alone."""

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import funcattn as fa
from funcattn import caches, serving
from funcattn.sampling import Sampler, chain, greedy, temperature

CONFIG = fa.Config(
    vocabulary=24, layers=2, kv_heads=2, head_size=4, heads=4, width=16, feed_forward=16
)
MODEL = fa.decoder(CONFIG)
# float64 and large weights: laws are far from flat, and the same to 1e-12 in any company
PARAMS = optree.tree_map(lambda x: (x if x.dim() == 1 else 10 * x).double(), MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(1), (60,), 0, 24)
HARDLY_AGAIN = Sampler(  # a penalty, whose state is how often each token came
    lambda V: torch.zeros(V, dtype=torch.float64),
    lambda logits, seen: (logits - seen, seen),
    lambda token, seen: seen + torch.nn.functional.one_hot(token, 24),
)
WARM = chain(HARDLY_AGAIN, temperature(1.5))
STOP = (3, 11)
KINDS = {
    "dense": caches.Cache,
    "pages": caches.pages(block=4),
    "int8": caches.quantized(bits=8, block=4, recent=1),
    "ring": caches.ring(window=6, sinks=1, tail=3),
}


def empty(kind, size=24):
    return MODEL.cache(size, kind=kind, dtype=torch.float64)


def alone(key, prompt, steps, kind, sampler, prefix):
    """The text by generate, up to its stop, continuing an empty past of the same kind."""
    past = empty(kind) if type(prefix) is tuple else fa.caches.Branch(prefix, empty(kind))
    tokens, _ = fa.generate(
        key, MODEL, PARAMS, prompt, past, steps=steps, sampler=sampler, stop=STOP, chunk=4
    )
    tokens = tokens.tolist()
    return tokens[: min((tokens.index(end) for end in STOP if end in tokens), default=steps) + 1]


def test_a_penalty_knows_the_prompt_as_in_generate():
    sampler = chain(fa.sampling.repetition_penalty(3.0), fa.sampling.no_repeat_ngram(2), greedy)
    slots = serving.idle(MODEL, PARAMS, empty(KINDS["dense"], 32), 2, sampler=sampler)
    slots = serving.enter(fa.key(5), MODEL, PARAMS, TOKENS[:9], slots, 1, steps=9, sampler=sampler)
    text = []
    for _ in range(9):
        served, slots = serving.step(MODEL, PARAMS, slots, sampler=sampler)
        text.append(int(served.token[1]))
    assert (
        text
        == fa.generate(fa.key(5), MODEL, PARAMS, TOKENS[:9], steps=9, sampler=sampler)[0].tolist()
    )


REQUESTS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=7
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)  # of each kind
@given(
    requests=REQUESTS,
    count=st.integers(1, 3),
    sampler=st.sampled_from([greedy, WARM]),
    shared=st.booleans(),
    donate=st.booleans(),
)
def test_a_schedule_of_arrivals_is_each_text_alone(kind, requests, count, sampler, shared, donate):
    """Requests are (length of the prompt, steps, steps of the others before it may come); each
    takes the first free slot. Slots are donated or copied.
    """
    kind = KINDS[kind]
    prefix = MODEL.apply(PARAMS, TOKENS[50:57], empty(kind))[1] if shared else ()
    waiting = list(enumerate(requests))
    slots = serving.idle(MODEL, PARAMS, empty(kind), count, sampler=sampler, prefix=prefix)
    texts, who, now = {i: [] for i in range(len(requests))}, [None] * count, 0
    while waiting or any(i is not None for i in who):
        while (
            waiting
            and None in who
            and (waiting[0][1][2] <= now or not any(i is not None for i in who))
        ):
            i, (T, steps, _) = waiting.pop(0)
            slot, key = who.index(None), fa.fold_in(fa.key(7), i)
            slots = serving.enter(
                key,
                MODEL,
                PARAMS,
                TOKENS[i : i + T],
                slots,
                slot,
                steps=steps,
                sampler=sampler,
                chunk=4,
                donate=donate,
            )
            who[slot] = i
        assert slots.busy.tolist() == [i is not None for i in who]
        served, slots = serving.step(
            MODEL, PARAMS, slots, sampler=sampler, stop=STOP, donate=donate
        )
        assert served.drawn.tolist() == [i is not None for i in who]
        for slot, i in enumerate(who):
            if i is not None:
                texts[i].append(int(served.token[slot]))
                who[slot] = None if served.ended[slot] else i
        now += 1
    assert not slots.slots.cache.length.any()
    for i, (T, steps, _) in enumerate(requests):
        assert texts[i] == alone(
            fa.fold_in(fa.key(7), i), TOKENS[i : i + T], steps, kind, sampler, prefix
        )


def test_a_step_and_an_arrival_leave_the_slots_as_they_were():
    slots = serving.idle(MODEL, PARAMS, empty(caches.pages(block=4)), 3)
    one = serving.enter(fa.key(0), MODEL, PARAMS, TOKENS[:5], slots, 1, steps=4)
    before = optree.tree_map(torch.clone, one)
    _, two = serving.step(MODEL, PARAMS, one)
    serving.enter(fa.key(1), MODEL, PARAMS, TOKENS[5:9], two, 2, steps=4)
    serving.leave(two, 1)
    for now, then in zip(optree.tree_leaves(one), optree.tree_leaves(before), strict=True):
        assert torch.equal(now, then)
    assert not slots.busy.any()


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_donated_slots_are_written_in_place(kind):
    """Rows of a dense past, and of the tail of one in codes; the slots before are gone."""
    past = empty(caches.quantized(block=9, recent=8) if kind == "int8" else KINDS[kind])
    enter = lambda slots, slot: serving.enter(
        fa.key(slot), MODEL, PARAMS, TOKENS[:5], slots, slot, steps=9, donate=True
    )
    rows = lambda slots: slots.slots.cache.k if kind == "dense" else slots.slots.cache.tail_k
    first = enter(serving.idle(MODEL, PARAMS, past, 3), 1)
    second = enter(first, 2)
    third = serving.step(MODEL, PARAMS, second, donate=True)[1]
    fourth = serving.step(MODEL, PARAMS, serving.leave(third, 1), donate=True)[1]
    assert rows(first).data_ptr() == rows(fourth).data_ptr()
    fifth = serving.step(MODEL, PARAMS, fourth)[1]
    assert rows(fifth).data_ptr() != rows(fourth).data_ptr()
    serving.step(MODEL, PARAMS, fourth)
    for use in (
        lambda: serving.step(MODEL, PARAMS, second),
        lambda: serving.leave(first, 1),
        lambda: enter(first, 0),
    ):
        with pytest.raises(ValueError, match=r"slots should be those of the last call, got slots "):
            use()
    with pytest.raises(ValueError, match="the call should be outside of every transform"):
        vmap(lambda _: serving.step(MODEL, PARAMS, fifth, donate=True)[0])(torch.zeros(2))


def test_what_a_step_reads_is_what_the_longest_remembers_and_not_what_is_reserved():
    slots = serving.idle(MODEL, PARAMS, empty(caches.Cache, 500), 4)
    slots = serving.enter(fa.key(0), MODEL, PARAMS, TOKENS[:40], slots, 0, steps=9)
    slots = serving.enter(fa.key(0), MODEL, PARAMS, TOKENS[:5], slots, 3, steps=9)
    reads = []
    read = lambda cache: (
        reads.append(caches.past(cache, 0, cache.length.reshape(1))[0].k.shape[-2]) or cache.length
    )
    torch.func.vmap(read)(slots.slots.cache)
    torch.func.vmap(read)(serving.leave(slots, 0).slots.cache)
    assert reads == [40, 5]


def test_a_text_that_left_makes_room():
    slots = serving.enter(
        fa.key(0),
        MODEL,
        PARAMS,
        TOKENS[:5],
        serving.idle(MODEL, PARAMS, empty(caches.Cache), 1),
        0,
        steps=9,
    )
    slots = serving.leave(serving.step(MODEL, PARAMS, slots)[1], 0)
    assert not serving.step(MODEL, PARAMS, slots)[0].drawn.any()
    slots = serving.enter(fa.key(2), MODEL, PARAMS, TOKENS[9:12], slots, 0, steps=6)
    text = []
    for _ in range(6):
        served, slots = serving.step(MODEL, PARAMS, slots)
        text.append(int(served.token[0]))
    assert text == fa.generate(fa.key(2), MODEL, PARAMS, TOKENS[9:12], steps=6)[0].tolist()
    assert not slots.busy.any()


FULL = serving.enter(
    fa.key(0),
    MODEL,
    PARAMS,
    TOKENS[:5],
    serving.idle(MODEL, PARAMS, empty(caches.Cache), 2),
    0,
    steps=9,
)
arrive = lambda prompt, slot, steps=4: serving.enter(
    fa.key(0), MODEL, PARAMS, prompt, FULL, slot, steps=steps
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: serving.idle(MODEL, PARAMS, empty(caches.Cache), 0),
            "idle: count should be a number of slots, at least 1, got 0",
        ),
        (lambda: arrive(TOKENS[:3], 2), "enter: slot should be between 0 and 1, got 2"),
        (lambda: arrive(TOKENS[:3], 0), "enter: slot should be free, got 0, which is busy"),
        (lambda: arrive(TOKENS[:0], 1), r"enter: prompt should be \(T,\) with T at least 1"),
        (lambda: arrive(TOKENS[:3], 1, 0), "enter: steps should be at least 1, got 0"),
        (
            lambda: serving.step(MODEL, PARAMS, FULL, sampler=fa.sampling.repetition_penalty(1.2)),
            "step: sampler should be that of idle, with a state of",
        ),
        (
            lambda: arrive(TOKENS[:20], 1, 6),
            "as many tokens as a slot has room for, got 20 and 6 for room of 24",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
