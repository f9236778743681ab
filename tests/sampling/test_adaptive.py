"""A coin integrated exactly, a surprise that is steered, and guidance by a second past."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap
from transformers.generation import logits_process as theirs

import funcattn as fa
from funcattn.sampling import (
    chain,
    draw,
    greedy,
    guidance,
    guide,
    law,
    mirostat,
    mixture,
    temperature,
    top_k,
    xtc,
)
from funcattn.testing import laws

INF = float("inf")


def softmax(logits):
    mass = [math.exp(x - max(logits)) for x in logits]
    return [m / math.fsum(mass) for m in mass]


def excluded(logits, threshold):
    probability = softmax(logits)
    above = sorted(
        (i for i, p in enumerate(probability) if p >= threshold), key=lambda i: (-probability[i], i)
    )
    return [-INF if i in above[:-1] else x for i, x in enumerate(logits)]


@given(
    st.lists(st.sampled_from([-INF, 0.0, 0.5, 2.0]), min_size=2, max_size=7),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
)
def test_xtc_is_a_coin_integrated_exactly(logits, probability, sharpened):
    if max(logits) == -INF:
        return
    threshold, t = 0.1234, 0.5 if sharpened else 1.0
    got = law(xtc(probability, threshold, then=temperature(t)))(
        torch.tensor(logits, dtype=torch.float64)
    ).exp()
    outcomes = [softmax([x / t for x in row]) for row in (logits, excluded(logits, threshold))]
    wanted = [(1 - probability) * a + probability * b for a, b in zip(*outcomes, strict=True)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


def test_draws_from_xtc_follow_its_law():
    for rule in laws.sampler:
        rule(xtc(0.5, 0.15), torch.tensor([1.0, 0.7, -0.5, 0.1]), fa.key(3))
        rule(
            chain(top_k(3), xtc(0.3, 0.15, then=temperature(0.7))),
            torch.tensor([1.0, 0.7, -0.5, 0.1]),
            fa.key(4),
        )


def test_one_greedy_outcome_does_not_make_a_mixture_deterministic():
    sampler = mixture(0.5, greedy, chain())
    assert not sampler.deterministic
    tokens = vmap(lambda key: draw(key, sampler, torch.zeros(4), sampler.init(4))[0])(
        fa.split(fa.key(0), 100)
    )
    assert tokens.unique().tolist() == [0, 1, 2, 3]


def naive_mirostat(logits, mu, tau, eta, token):
    """llama.cpp's llama_sampler_mirostat_v2: what is left, and mu after the token."""
    probability = softmax(logits)
    order = sorted(range(len(logits)), key=lambda i: (-probability[i], i))
    kept = [i for n, i in enumerate(order) if n == 0 or -math.log2(probability[i]) <= mu]
    left = softmax([x if i in kept else -INF for i, x in enumerate(logits)])
    return left, mu - eta * (-math.log2(left[token]) - tau)


def test_mirostat_moves_as_llama_cpp_says():
    sampler, tau, eta = mirostat(1.2, 0.3), 1.2, 0.3
    state, mu = sampler.init(8), 2 * tau
    for key in fa.split(fa.key(2), 12):
        logits = 2 * fa.random.normal(key, (8,), torch.float64)
        got = law(sampler)(logits, state).exp()
        token, state = draw(key, sampler, logits, state)
        left, mu = naive_mirostat(logits.tolist(), mu, tau, eta, int(token))
        torch.testing.assert_close(got, torch.tensor(left, dtype=torch.float64))
        # a float32 state, twelve sums
        torch.testing.assert_close(state.most, torch.tensor(mu), rtol=1e-5, atol=0)


def test_mirostat_keeps_the_laws_of_samplers():
    for rule in laws.sampler:
        rule(mirostat(1.0, 0.1), torch.tensor([1.0, 0.7, -0.5, 0.1]), fa.key(3))


def test_guidance_is_transformers_formula_where_nothing_is_hidden():
    c, u = fa.random.normal(fa.key(0), (2, 9))

    class Model:
        def __call__(self, ids, **_):
            return type("Out", (dict,), {"logits": u[None, None]})()

    other = theirs.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, Model(), torch.tensor([[1]]))
    torch.testing.assert_close(guide(c, u, 1.7), other(torch.tensor([[1]]), c[None])[0])
    torch.testing.assert_close(guide(c, u, 1.0), c.log_softmax(-1))


def test_a_token_hidden_on_either_side_is_no_nan():
    c, u = torch.tensor([0.0, -INF, 1.0, -INF]), torch.tensor([0.0, 1.0, -INF, -INF])
    got = guide(c, u, 2.0)
    assert got.isfinite().tolist() == [True, False, True, False]
    assert torch.equal(got[2], c.log_softmax(-1)[2])


def test_guidance_reads_both_texts():
    model = fa.decoder(fa.Config())
    params = model.init(fa.key(0))
    prompt, negative, steps = [1, 2, 3], [9, 8], 5
    logits, past = model.apply(params, torch.tensor(negative), model.cache(16))
    sampler = chain(guidance(2.5, model, params, past, logits[-1]), greedy)
    tokens, _ = fa.generate(
        fa.key(0), model, params, torch.tensor(prompt), steps=steps, sampler=sampler
    )
    written = []
    for _ in range(steps):
        rows = [
            model.extend(params, torch.tensor(text + written), ())[0][-1]
            for text in (prompt, negative)
        ]
        written.append(int(guide(*rows, 2.5).argmax()))
    assert tokens.tolist() == written
    assert int(past.length) == 2  # the past that was given stays as it was
    one = lambda key: fa.generate(
        key, model, params, torch.tensor(prompt), steps=steps, sampler=sampler
    )[0]
    rows = vmap(one)(fa.split(fa.key(0)))
    assert rows.tolist() == [written, written]


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: xtc(1.5), ValueError, r"xtc: probability should be in \[0, 1\]"),
        (lambda: xtc(0.5, -0.1), ValueError, r"threshold should be in \[0, 1\]"),
        (lambda: mixture(2.0, greedy, greedy), ValueError, r"mixture: share should be in \[0, 1\]"),
        (lambda: mixture(0.5, greedy, top_k), TypeError, "argument 1 should be a Sampler"),
        (lambda: mirostat(0.0), ValueError, "mirostat: tau should be above 0 bits"),
        (lambda: mirostat(1.0, -1.0), ValueError, "eta should be 0 or more"),
        (
            lambda: guidance(float("nan"), None, (), (), torch.zeros(3)),
            ValueError,
            "scale should be a number",
        ),
        (lambda: guidance(1.5, None, (), (), torch.zeros(2, 3)), ValueError, r"Pass logits\[-1\]"),
        (
            lambda: law(guidance(1.5, None, (), (), torch.zeros(3)))(torch.zeros(4)),
            ValueError,
            "one vocabulary",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
