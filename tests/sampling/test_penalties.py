"""Penalties against transformers' processors and plain counts; what a prompt primes, and what rolls
back.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from transformers.generation import logits_process as theirs

import funcattn as fa
from funcattn import tree
from funcattn.sampling import (
    chain,
    frequency_penalty,
    law,
    logit_bias,
    observe_prompt,
    presence_penalty,
    primed,
    repetition_penalty,
)
from funcattn.testing import laws, strategies

INF = float("inf")
V = 11
TOKENS = st.lists(st.integers(0, V - 1), min_size=1, max_size=20)
COUNTING = [
    repetition_penalty(1.3),
    repetition_penalty(0.8, window=4),
    presence_penalty(0.5),
    frequency_penalty(0.25, window=3),
    frequency_penalty(-0.5),
    logit_bias({0: 1.5, 2: -INF}),
]


def fold(sampler, tokens, state):
    for token in tokens:
        state = sampler.observe(torch.tensor(token), state)
    return state


@given(TOKENS, TOKENS, st.sampled_from([0.7, 1.0, 1.3]))
def test_a_repetition_penalty_leaves_what_transformers_leaves(prompt, written, penalty):
    logits, sampler = fa.random.normal(fa.key(len(prompt)), (V,)), repetition_penalty(penalty)
    state = fold(sampler, written, observe_prompt(sampler, torch.tensor(prompt), sampler.init(V)))
    wanted = theirs.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + written]), logits[None].clone()
    )[0]
    assert torch.equal(sampler.update(logits, state)[0], wanted)


@given(TOKENS, TOKENS)
def test_presence_and_frequency_count_what_was_written(prompt, written):
    logits = fa.random.normal(fa.key(5), (V,))
    sampler = chain(presence_penalty(0.5), frequency_penalty(0.25))
    state = fold(sampler, written, observe_prompt(sampler, torch.tensor(prompt), sampler.init(V)))
    counts = torch.tensor([written.count(token) for token in range(V)])
    torch.testing.assert_close(
        sampler.update(logits, state)[0], logits - 0.5 * (counts > 0) - 0.25 * counts
    )


@given(TOKENS, TOKENS, st.integers(1, 6))
def test_a_window_counts_the_last_tokens_only(prompt, written, window):
    logits, sampler = torch.zeros(V), frequency_penalty(1.0, prompt=True, window=window)
    state = fold(sampler, written, observe_prompt(sampler, torch.tensor(prompt), sampler.init(V)))
    last = (prompt + written)[-window:]
    assert (-sampler.update(logits, state)[0]).tolist() == [last.count(token) for token in range(V)]


@pytest.mark.parametrize("make", [repetition_penalty, frequency_penalty])
@given(tokens=TOKENS, pads=st.integers(0, 4), cut=st.integers(0, 20))
def test_priming_ignores_pads_and_may_be_done_in_parts(make, tokens, pads, cut):
    for more in ({}, {"window": 5}):
        sampler = make(2.0, prompt=True, **more)
        wanted = fold(sampler, tokens, sampler.init(V))
        padded = torch.tensor(tokens + [0] * pads)
        got = observe_prompt(sampler, padded, sampler.init(V), length=torch.tensor(len(tokens)))
        parts = sampler.init(V)
        for part in (tokens[:cut], tokens[cut:]):
            parts = observe_prompt(sampler, torch.tensor(part, dtype=torch.int64), parts)
        assert tree.allclose(got, wanted)
        assert tree.allclose(parts, wanted)
        assert tree.allclose(primed(sampler, torch.tensor(tokens)).init(V), wanted)


def test_ragged_prompts_prime_under_vmap():
    sampler = chain(repetition_penalty(2.0), repetition_penalty(1.5, window=3))
    prompts, lengths = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
    got = vmap(lambda tokens, n: observe_prompt(sampler, tokens, sampler.init(V), length=n))(
        prompts, lengths
    )
    for row, (tokens, n) in zip(tree.unstack(got), zip(prompts, lengths, strict=True), strict=True):
        assert tree.allclose(row, observe_prompt(sampler, tokens[:n], sampler.init(V)))


def test_generate_counts_the_prompt_and_never_its_pads():
    model = fa.decoder(fa.Config())
    params = model.init(fa.key(0))
    prompt, steps = torch.tensor([5, 6, 7]), 6
    never = chain(repetition_penalty(1e9), frequency_penalty(1e9), fa.sampling.greedy)

    def naive(tokens):  # z / 1e9 or z * 1e9 of what was seen, and never what was written
        tokens, n = tokens.tolist(), len(tokens)
        for _ in range(steps):
            logits = model.extend(params, torch.tensor(tokens), ())[0][-1]
            seen = torch.tensor(sorted(set(tokens)))
            logits = logits.index_copy(
                0, seen, torch.where(logits[seen] > 0, logits[seen] / 1e9, logits[seen] * 1e9)
            )
            logits = logits.index_fill(0, torch.tensor(tokens[n:], dtype=torch.int64), -INF)
            tokens.append(int(logits.argmax()))
        return tokens[n:]

    assert fa.generate(fa.key(0), model, params, prompt, steps=steps, sampler=never)[
        0
    ].tolist() == naive(prompt)
    batch, lengths = torch.tensor([[5, 6, 7], [9, 1, 1]]), torch.tensor([3, 1])
    rows, _ = vmap(
        lambda p, n: fa.generate(
            fa.key(0), model, params, p, steps=steps, sampler=never, prompt_length=n
        )
    )(batch, lengths)
    assert rows.tolist() == [naive(prompt), naive(torch.tensor([9]))]


def test_an_older_state_is_a_rewound_penalty():
    sampler = frequency_penalty(1.0)
    older = fold(sampler, [1], sampler.init(V))
    fold(sampler, [2, 2], older)
    assert sampler.update(torch.zeros(V), older)[0].tolist() == [
        -1.0 if token == 1 else 0.0 for token in range(V)
    ]


@settings(max_examples=15)
@given(strategies.logits(), strategies.keys())
def test_every_penalty_keeps_the_laws_of_samplers(logits, key):
    for sampler in COUNTING[:-1]:
        for rule in laws.sampler:
            # a repetition penalty looks at signs
            constant = rule is laws.samplers.adding_a_constant_to_logits_changes_nothing
            if rule is not laws.samplers.draws_follow_the_law and not constant:
                rule(sampler, logits, key)


def test_draws_follow_the_law_of_a_penalized_row():
    sampler = chain(repetition_penalty(1.5), presence_penalty(0.3), logit_bias({1: 1.0}))
    laws.samplers.draws_follow_the_law(sampler, fa.random.normal(fa.key(0), (6,)), fa.key(1))


def test_a_bias_adds_and_never_shows_what_is_hidden():
    logits = torch.tensor([0.0, -INF, 2.0])
    assert logit_bias({1: 5.0, 2: -INF}).update(logits, ())[0].tolist() == [0.0, -INF, -INF]
    assert logit_bias(torch.tensor([1.0, 0.0, -2.0])).update(logits, ())[0].tolist() == [
        1.0,
        -INF,
        0.0,
    ]


def test_penalties_are_tensors_that_one_may_differentiate():
    row = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    f = lambda penalty: law(repetition_penalty(penalty))(row, torch.tensor([1, 1, 0]))[2]
    step, at = 1e-6, torch.tensor(1.3, dtype=torch.float64)
    # O(step^2) and eps/step
    torch.testing.assert_close(
        grad(f)(at), (f(at + step) - f(at - step)) / (2 * step), rtol=1e-7, atol=0
    )
    got = vmap(lambda p: law(repetition_penalty(p))(row, torch.tensor([1, 0, 0])))(
        torch.tensor([1.0, 2.0], dtype=torch.float64)
    )
    torch.testing.assert_close(got[1], law(repetition_penalty(2.0))(row, torch.tensor([1, 0, 0])))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: repetition_penalty(0.0),
            ValueError,
            "repetition_penalty: penalty should be above 0, got 0.0",
        ),
        (lambda: repetition_penalty(1.1, window=0), ValueError, "window should be at least 1"),
        (
            lambda: presence_penalty(INF),
            ValueError,
            "presence_penalty: penalty should be a finite number",
        ),
        (lambda: frequency_penalty(float("nan")), ValueError, "got nan"),
        (lambda: logit_bias({"hello": 1.0}), TypeError, "logit_bias: bias should be keyed by ids"),
        (lambda: logit_bias({1: INF}), ValueError, "To force a token, allow no other"),
        (lambda: logit_bias({1: float("nan")}), ValueError, "numbers or -inf"),
        (
            lambda: law(logit_bias({9: 1.0}))(torch.zeros(4)),
            ValueError,
            "ids should be below the vocabulary's 4",
        ),
        (lambda: law(logit_bias(torch.zeros(3)))(torch.zeros(4)), ValueError, r"\(V,\) with V = 4"),
        (
            lambda: observe_prompt(repetition_penalty(2.0), [1, 2], torch.zeros(3)),
            TypeError,
            "observe_prompt: tokens should be one sequence",
        ),
        (
            lambda: observe_prompt(repetition_penalty, torch.tensor([1]), ()),
            TypeError,
            "should be a Sampler",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
