"""Masks over the vocabulary: fixed ones, the minimal length, and states that every token moves."""

import itertools

import pytest
import torch
from torch.func import vmap
from transformers.generation import logits_process as theirs

import funcattn as fa
from funcattn import sampling
from funcattn.sampling import (
    allowed_tokens,
    automaton,
    constrained,
    draw,
    law,
    min_new_tokens,
    observe_prompt,
    suppress_tokens,
)
from funcattn.testing import laws

INF = float("inf")


def test_tokens_are_allowed_or_suppressed_by_id_or_by_mask():
    logits = fa.random.normal(fa.key(0), (6,))
    mask = torch.tensor([False, True, False, False, True, False])
    for ids in ([1, 4], (4, 1), torch.tensor([1, 4]), mask):
        assert torch.equal(allowed_tokens(ids).update(logits, ())[0].isfinite(), mask)
        wanted = theirs.SuppressTokensLogitsProcessor([1, 4])(torch.zeros(1, 1), logits[None])[0]
        assert torch.equal(suppress_tokens(ids).update(logits, ())[0], wanted)


def test_a_stop_id_is_hidden_until_enough_is_written():
    sampler, logits = min_new_tokens(2, (3,)), torch.zeros(1, 4)
    # the prompt does not count
    state = observe_prompt(sampler, torch.tensor([1, 2, 3]), sampler.init(4))
    other = theirs.MinNewTokensLengthLogitsProcessor(3, 2, 3, device=logits.device)
    text = [1, 2, 3]
    for token in (0, 1, 2):
        assert torch.equal(
            sampler.update(logits[0], state)[0], other(torch.tensor([text]), logits)[0]
        )
        state, text = sampler.observe(torch.tensor(token), state), [*text, token]


# texts of a b* c: states 0 -> 1 -> 2 (end, where only c may follow)
TABLE = torch.tensor([[1, -1, -1], [-1, 1, 2], [-1, -1, 2]])


def test_an_automaton_writes_exactly_its_language():
    sampler, language = automaton(TABLE), set()
    for text in itertools.product(range(3), repeat=4):
        state, probability = sampler.init(3), 1.0
        for token in text:
            probability *= float(law(sampler)(torch.zeros(3), state).exp().nan_to_num()[token])
            state = sampler.observe(torch.tensor(token), state)
        if probability > 0:
            language.add(text)
    assert language == {(0, 1, 1, 1), (0, 1, 1, 2), (0, 1, 2, 2), (0, 2, 2, 2)}


def test_a_text_that_left_the_automaton_never_comes_back():
    sampler = automaton(TABLE)
    lost = sampler.observe(torch.tensor(0), sampler.observe(torch.tensor(2), sampler.init(3)))
    assert law(sampler)(torch.zeros(3), lost).isnan().all()
    with pytest.raises(ValueError, match="nothing to draw from"):
        draw(fa.key(0), sampler, torch.zeros(3), lost)


def test_generation_under_vmap_keeps_the_grammar_of_each_row():
    model = fa.decoder(fa.Config())
    params = model.init(fa.key(0))
    V = fa.Config().vocabulary
    takes_turns = torch.full((2, V), -1).index_put(
        (torch.tensor([0, 1]), torch.tensor([5, 9])), torch.tensor([1, 0])
    )
    one = lambda key: fa.generate(
        key, model, params, torch.tensor([1]), steps=4, sampler=automaton(takes_turns)
    )[0]
    assert vmap(one)(fa.split(fa.key(1), 3)).tolist() == [[5, 9, 5, 9]] * 3


def test_a_grammar_whose_state_is_a_tree_keeps_the_laws_of_samplers():
    # brackets: 0 opens, 1 closes, 2 is text, 3 is text
    start = {"depth": torch.tensor(0), "last": torch.tensor(0)}
    allowed = lambda s: (torch.arange(4) != 1) | (s["depth"] > 0)
    step = lambda token, s: {
        "depth": s["depth"] + (token == 0).long() - (token == 1).long(),
        "last": token,
    }
    sampler = constrained(start, allowed, step)
    for rule in laws.sampler:
        rule(sampler, torch.tensor([0.3, 1.0, -0.5, 0.1]), fa.key(3))
        rule(min_new_tokens(3, (1,)), torch.tensor([0.3, 1.0, -0.5, 0.1]), fa.key(3))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: allowed_tokens("abc"),
            TypeError,
            "allowed_tokens: ids should be ints, or a bool tensor",
        ),
        (lambda: law(allowed_tokens([7]))(torch.zeros(4)), ValueError, "below the vocabulary's 4"),
        (
            lambda: law(suppress_tokens([-1]))(torch.zeros(4)),
            ValueError,
            "below the vocabulary's 4",
        ),
        (
            lambda: law(suppress_tokens(torch.ones(3, dtype=torch.bool)))(torch.zeros(4)),
            ValueError,
            "V = 4",
        ),
        (lambda: min_new_tokens(-1, (0,)), ValueError, "n should be 0 or more"),
        (
            lambda: law(constrained((), lambda s: torch.ones(4), lambda t, s: s))(torch.zeros(4)),
            ValueError,
            "constrained: what",
        ),
        (lambda: automaton([[0]]), TypeError, r"automaton: table should be int64 \(S, V\)"),
        (lambda: automaton(torch.tensor([[2]])), ValueError, r"in \[-1, S = 1\)"),
        (lambda: automaton(TABLE, 3), ValueError, r"start should be in \[0, S = 3\)"),
        (lambda: law(automaton(TABLE))(torch.zeros(4)), ValueError, "with V = 4 as the logits"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


# Where a grammar allows nothing: behind its end that is no harm, before it it is an error.

MODEL = fa.decoder(fa.Config(vocabulary=8, layers=1))
PARAMS = MODEL.init(fa.key(0))
END = 7
# 3 or the end in state 0, the end alone in state 1, and behind the end nothing
ENDING = torch.full((3, 8), -1)
ENDING[0, 3], ENDING[0, END], ENDING[1, END] = 1, 2, 2
LOST = torch.full((2, 8), -1)
LOST[0, 3] = 1  # behind 3 nothing may follow
PROMPT = torch.tensor([1, 2])
WAYS = {"drawn": sampling.chain(), "greedy": sampling.greedy}


def proposes(*tokens):
    return fa.drafters.function(
        lambda text, n: (torch.tensor(tokens), torch.tensor(len(tokens))), length=len(tokens)
    )


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_texts_of_a_batch_that_ended_may_be_where_nothing_follows(way):
    sampler = sampling.chain(sampling.automaton(ENDING), way)
    options = {"steps": 4, "stop": [END], "sampler": sampler}
    keys = fa.split(fa.key(2), 12)
    one = lambda key: fa.generate(key, MODEL, PARAMS, PROMPT, **options)[0]
    assert vmap(one)(keys).tolist() == [one(key).tolist() for key in keys]
    drafted = lambda key: (
        fa.speculate(key, MODEL, PARAMS, proposes(3, END), PROMPT, **options)[0].tokens
    )
    assert set(map(tuple, vmap(drafted)(keys).tolist())) <= {(3, END, END, END), (END,) * 4}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_slot_whose_text_ended_disturbs_no_other(way):
    sampler = sampling.chain(sampling.automaton(ENDING), way)
    slots = fa.serving.idle(MODEL, PARAMS, MODEL.cache(8), 2, sampler=sampler)
    slots = fa.serving.enter(fa.key(0), MODEL, PARAMS, PROMPT, slots, 0, steps=4, sampler=sampler)
    for turn in range(4):
        served, slots = fa.serving.step(MODEL, PARAMS, slots, sampler=sampler, stop=[END])
        if turn == 2:
            slots = fa.serving.enter(
                fa.key(0), MODEL, PARAMS, PROMPT, slots, 1, steps=4, sampler=sampler
            )
    assert bool(served.drawn[1])
    assert not bool(served.drawn[0])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_text_that_nothing_may_follow_is_an_error_in_every_verb(way):
    sampler = sampling.chain(sampling.automaton(LOST), way)
    options = {"steps": 3, "sampler": sampler}

    def served():
        slots = fa.serving.idle(MODEL, PARAMS, MODEL.cache(8), 2, sampler=sampler)
        slots = fa.serving.enter(fa.key(0), MODEL, PARAMS, PROMPT, slots, 0, **options)
        for _ in range(2):
            slots = fa.serving.step(MODEL, PARAMS, slots, sampler=sampler)[1]

    runs = [
        lambda: fa.generate(fa.key(0), MODEL, PARAMS, PROMPT, **options),
        lambda: list(fa.stream(fa.key(0), MODEL, PARAMS, PROMPT, **options)),
        lambda: fa.speculate(fa.key(0), MODEL, PARAMS, proposes(3, 5), PROMPT, **options),
        lambda: list(
            fa.speculation.stream(fa.key(0), MODEL, PARAMS, proposes(5), PROMPT, **options)
        ),
        lambda: fa.search.best_of(fa.key(0), MODEL, PARAMS, PROMPT, n=2, **options),
        served,
    ]
    for run in runs:
        with pytest.raises(
            ValueError, match="what the sampler leaves should be one token at least"
        ):
            run()


@pytest.mark.parametrize(
    "rule", [fa.speculation.blockwise, fa.speculation.tokenwise], ids=["blockwise", "tokenwise"]
)
def test_an_end_that_was_drafted_is_written_as_often_as_the_law_says(rule):
    """Behind the end the sampler's law is none; the draft goes on there, and what it says there
    counts for nothing.
    """
    # one token more in front, since the first is drawn and not drafted
    table = torch.full((4, 8), -1)
    table[0, 5], table[1, 3], table[1, END], table[2, END] = 1, 2, 3, 3
    start = torch.cat([PROMPT, torch.tensor([5])])
    law = sampling.law(sampling.automaton(table, 1))(MODEL.extend(PARAMS, start, ())[0][-1]).exp()
    drafter, trials = proposes(END, 3), 2000
    options = {"steps": 3, "stop": [END], "sampler": sampling.automaton(table), "rule": rule}
    tokens = vmap(
        lambda key: fa.speculate(key, MODEL, PARAMS, drafter, PROMPT, **options)[0].tokens
    )(fa.split(fa.key(3), trials))
    seen, wanted = int((tokens[:, 1] == END).sum()), trials * float(law[END])
    spread = (wanted * (1 - float(law[END]))) ** 0.5
    assert abs(seen - wanted) < 6 * spread  # a binomial, which is farther off once in 10^9
