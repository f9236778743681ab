"""The filters beyond top-k, top-p and min-p: equal to transformers' where they exist there, and
defined at their edges.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from transformers.generation import logits_process as theirs

import funcattn as fa
from funcattn import sampling
from funcattn.sampling import (
    epsilon_cutoff,
    eta_cutoff,
    law,
    min_p,
    temperature,
    top_h,
    top_k,
    top_n_sigma,
    top_p,
    typical_p,
)
from funcattn.testing import laws, strategies

INF = float("inf")
PAIRS = [
    (temperature(0.7), theirs.TemperatureLogitsWarper(0.7)),
    (top_k(5), theirs.TopKLogitsWarper(5)),
    (top_p(0.8), theirs.TopPLogitsWarper(0.8)),
    (min_p(0.1), theirs.MinPLogitsWarper(0.1)),
    (typical_p(0.2), theirs.TypicalLogitsWarper(0.2)),
    (typical_p(0.9), theirs.TypicalLogitsWarper(0.9)),
    (epsilon_cutoff(0.03), theirs.EpsilonLogitsWarper(0.03)),
    (epsilon_cutoff(0.6), theirs.EpsilonLogitsWarper(0.6)),
    (eta_cutoff(0.03), theirs.EtaLogitsWarper(0.03)),
    (eta_cutoff(0.3), theirs.EtaLogitsWarper(0.3)),
    (top_h(0.4), theirs.TopHLogitsWarper(0.4)),
    (top_h(0.9), theirs.TopHLogitsWarper(0.9)),
]
NEW = [
    *(
        typical_p(0.1),
        typical_p(0.9),
        typical_p(1.0),
        epsilon_cutoff(0.02),
        epsilon_cutoff(1.0),
        eta_cutoff(0.05),
    ),
    *(top_n_sigma(1.0), top_n_sigma(0.0), top_h(0.3), top_h(1.0)),
]


@pytest.mark.parametrize(("ours", "other"), PAIRS, ids=[type(other).__name__ for _, other in PAIRS])
def test_a_filter_leaves_what_transformers_leaves(ours, other):
    rows = 3 * fa.random.normal(fa.key(3), (50, 40))
    got = vmap(lambda row: ours.update(row, ours.init(40))[0])(rows)
    assert torch.equal(got, other(torch.zeros(50, 1, dtype=torch.int64), rows))


def naive_top_n_sigma(logits, n):
    there = [x for x in logits if x > -INF]
    mean = math.fsum(there) / len(there)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in there) / len(there))
    return [x if x >= max(there) - n * sigma else -INF for x in logits]


@pytest.mark.parametrize("n", [0.0, 0.5, 1.0, 3.0])
def test_top_n_sigma_is_that_of_a_list_whatever_the_temperature(n):
    logits = fa.random.normal(fa.key(1), (30,), torch.float64)
    logits = torch.where(torch.arange(30) % 7 == 3, -INF, logits)
    got = top_n_sigma(n).update(logits, ())[0]
    assert got.tolist() == naive_top_n_sigma(logits.tolist(), n)
    for t in (0.25, 4.0):  # powers of two, exact
        assert torch.equal(top_n_sigma(n).update(logits / t, ())[0].isfinite(), got.isfinite())


@settings(max_examples=15)
@given(strategies.logits(), strategies.keys())
def test_every_filter_keeps_the_laws_of_samplers(logits, key):
    for sampler in NEW:
        for rule in laws.sampler:
            # the statistic is in the tests of composition; a constant moves the rounding of an
            # entropy over a threshold's edge
            if rule not in (
                laws.samplers.draws_follow_the_law,
                laws.samplers.adding_a_constant_to_logits_changes_nothing,
            ):
                rule(sampler, logits, key)


@pytest.mark.parametrize("sampler", NEW)
def test_ties_infinities_and_nan_have_a_defined_law(sampler):
    equal = law(sampler)(torch.zeros(4)).exp()
    kept = equal > 0
    torch.testing.assert_close(equal[kept], torch.full_like(equal[kept], 1 / int(kept.sum())))
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)  # of equals the lower ids
    assert law(sampler)(torch.tensor([-INF, -7.0, -INF])).tolist() == [-INF, 0.0, -INF]
    assert law(sampler)(torch.full((3,), -INF)).isnan().all()
    assert law(sampler)(torch.tensor([0.0, float("nan"), 1.0])).isnan().any()
    assert law(sampler)(torch.tensor([0.0, INF, 1.0])).isnan().any()
    with pytest.raises(ValueError, match="let no filter hide every token"):
        fa.sampling.draw(fa.key(0), sampler, torch.full((3,), -INF), ())


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (typical_p, [0.2, 0.9, 1.0]),
        (epsilon_cutoff, [0.01, 0.1, 0.9]),
        (eta_cutoff, [0.01, 0.1, 0.9]),
        (top_n_sigma, [0.0, 0.5, 2.0]),
        (top_h, [0.2, 0.6, 1.0]),
    ],
)
def test_thresholds_may_be_tensors_one_for_each_row(make, options):
    rows = fa.random.normal(fa.key(1), (3, 9), torch.float64)
    got = vmap(lambda option, row: law(make(option))(row))(
        torch.tensor(options, dtype=torch.float64), rows
    )
    for row, logits, option in zip(got, rows, options, strict=True):
        torch.testing.assert_close(row, law(make(option))(logits))


@pytest.mark.parametrize("sampler", NEW)
def test_the_derivative_of_a_law_is_finite_where_tokens_are_hidden(sampler):
    logits = torch.tensor([2.0, -INF, 1.0, -3.0], dtype=torch.float64)
    assert grad(lambda x: law(sampler)(x)[0])(logits).isfinite().all()


def test_compiled_filters_have_the_same_law():
    logits = fa.random.normal(fa.key(1), (9,))
    for sampler in NEW:
        assert torch.equal(
            torch.compile(law(sampler), fullgraph=True, backend="eager")(logits),
            law(sampler)(logits),
        )
        torch.compiler.reset()  # all laws are one code object, of which Dynamo compiles eight


@given(st.floats(0.01, 1.0), strategies.keys())
def test_a_chain_with_every_filter_keeps_a_token(share, key):
    sampler = fa.sampling.chain(
        top_h(share), typical_p(share), eta_cutoff(share), epsilon_cutoff(share), top_n_sigma(share)
    )
    assert law(sampler)(fa.random.normal(key, (12,))).isfinite().any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: typical_p(0.0), r"typical_p: p should be in \(0, 1\], got 0.0"),
        (lambda: epsilon_cutoff(-0.1), r"epsilon_cutoff: epsilon should be in \[0, 1\]"),
        (lambda: eta_cutoff(torch.tensor(2.0)), r"eta_cutoff: epsilon should be in \[0, 1\]"),
        (lambda: eta_cutoff(float("nan")), "got nan"),
        (lambda: top_n_sigma(-1.0), "top_n_sigma: n should be 0 or more"),
        (lambda: top_h(0.0), r"top_h: share should be in \(0, 1\]"),
        (lambda: top_h(0.5, candidates=0), "candidates should be at least 1"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("t", [1e-20, 1e-38, 1e-40, 1e-50])
def test_a_temperature_near_zero_is_the_limit_of_the_most_likely_tokens(t):
    rows = torch.tensor(
        [[1.0, 3.0, 3.0, -INF, 2.0], [-5.0, 1e30, 0.0, 1e-3, 1e30], [7.0, 7.0, 7.0, 7.0, 7.0]]
    )
    wanted = torch.tensor([[0, 0.5, 0.5, 0, 0], [0, 0.5, 0, 0, 0.5], [0.2] * 5])
    mapped = torch.full((3,), t, dtype=torch.float64)
    got = torch.stack([law(sampling.temperature(t))(row).exp() for row in rows])
    torch.testing.assert_close(got, wanted)
    one = lambda row, t: law(sampling.temperature(t))(row).exp()
    torch.testing.assert_close(vmap(one)(rows, mapped), wanted)
    slope = torch.func.grad(lambda row, t: (one(row, t) * torch.arange(5)).sum(), (0, 1))
    for row, by in zip(rows, mapped, strict=True):
        assert all(x.isfinite().all() for x in slope(row, by))


@pytest.mark.parametrize("t", [0.3, 0.8, 1.0, 5.0, INF])
def test_a_usual_temperature_divides_and_changes_no_bit(t):
    row = fa.random.normal(fa.key(0), (50,)).index_fill(0, torch.tensor(3), -INF)
    assert torch.equal(
        sampling.temperature(t).update(row, ())[0], (row / t).index_fill(0, torch.tensor(3), -INF)
    )


def test_logits_near_the_greatest_number_have_a_law_at_every_temperature():
    row = torch.tensor([3e38, 3e38, -3e38, 0.0])
    for t in (0.5, 1.0, 2.0):
        torch.testing.assert_close(
            law(sampling.temperature(t))(row).exp(), torch.tensor([0.5, 0.5, 0, 0])
        )


EXTREME = [
    sampling.repetition_penalty(1e-30),
    sampling.repetition_penalty(1e30),
    sampling.presence_penalty(1e30),
    sampling.presence_penalty(-1e30),
    sampling.frequency_penalty(-1e30),
    sampling.logit_bias({1: 1e30, 2: -1e30}),
    sampling.dry(0.0, base=1e30, allowed_length=1),
    sampling.dry(1e38, base=1e30, allowed_length=1),
    sampling.top_n_sigma(INF),
    sampling.top_n_sigma(1e39),
    sampling.mirostat(1e30, 1e30),
    sampling.min_p(1e-46),
    sampling.top_p(1e-46),
    sampling.typical_p(1e-46),
]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("sampler", EXTREME)
def test_what_is_accepted_when_made_leaves_a_law(sampler, scale):
    row = scale * torch.tensor([1.0, 0.5, -1.0, 0.0, 1.0])
    state = sampling.observe_prompt(sampler, torch.tensor([1, 2, 1, 2]), sampler.init(5))
    state = sampler.observe(torch.tensor(1), sampler.update(row, state)[1])
    assert float(law(sampler)(row, state).exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: sampling.repetition_penalty(1e39), "penalty"),
        (lambda: sampling.repetition_penalty(1e-50), "penalty"),
        (lambda: sampling.presence_penalty(1e39), "penalty"),
        (lambda: sampling.frequency_penalty(torch.tensor(-1e39, dtype=torch.float64)), "penalty"),
        (lambda: sampling.logit_bias({1: 1e39}), "bias"),
        (lambda: sampling.dry(base=1e39), "base"),
        (lambda: sampling.mirostat(tau=1e39), "tau"),
        (lambda: sampling.mirostat(eta=INF), "eta"),
        (lambda: sampling.guide(torch.zeros(2), torch.zeros(2), 1e39), "scale"),
        (lambda: sampling.top_h(0.5, candidates=2.5), "candidates"),
        (lambda: sampling.repetition_penalty(1.1, window=2.5), "window"),
        (lambda: sampling.no_repeat_ngram(2, window=2.5), "window"),
        (lambda: sampling.dry(longest=2.5), "longest"),
        (lambda: sampling.automaton(torch.zeros(2, 2, dtype=torch.int64), 0.5), "start"),
        (lambda: fa.drafters.prompt_lookup(length=True), "length"),
        (lambda: fa.drafters.model(fa.decoder(fa.Config()), (), chunk=0), "chunk"),
        (
            lambda: fa.search.contrastive(
                fa.decoder(fa.Config()), (), (), torch.zeros(2), beta=1e39
            ),
            "beta",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused_when_it_is_made(make, name):
    with pytest.raises((ValueError, TypeError), match=f"{name} should be"):
        make()


def test_a_temperature_keeps_the_digits_of_its_logits():
    """As a float32 tensor on the way, 0.8 would be another number: 1.5e-8 off."""
    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    assert torch.equal(fa.sampling.law(fa.sampling.temperature(0.8))(x), (x / 0.8).log_softmax(-1))
