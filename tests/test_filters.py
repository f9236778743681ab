"""The filters beyond top-k, top-p and min-p: equal to transformers' where they exist there, and defined at their edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap
from transformers.generation import logits_process as theirs

import funcattn as fa
from funcattn.sampling import epsilon_cutoff, eta_cutoff, law, min_p, temperature, top_h, top_k, top_n_sigma, top_p, typical_p
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
    *(typical_p(0.1), typical_p(0.9), typical_p(1.0), epsilon_cutoff(0.02), epsilon_cutoff(1.0), eta_cutoff(0.05)),
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
            # the statistic is in the tests of composition; a constant moves the rounding of an entropy over a threshold's edge
            if rule not in (laws.samplers.draws_follow_the_law, laws.samplers.adding_a_constant_to_logits_changes_nothing):
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
    got = vmap(lambda option, row: law(make(option))(row))(torch.tensor(options, dtype=torch.float64), rows)
    for row, logits, option in zip(got, rows, options, strict=True):
        torch.testing.assert_close(row, law(make(option))(logits))


@pytest.mark.parametrize("sampler", NEW)
def test_the_derivative_of_a_law_is_finite_where_tokens_are_hidden(sampler):
    logits = torch.tensor([2.0, -INF, 1.0, -3.0], dtype=torch.float64)
    assert grad(lambda x: law(sampler)(x)[0])(logits).isfinite().all()


def test_compiled_filters_have_the_same_law():
    logits = fa.random.normal(fa.key(1), (9,))
    for sampler in NEW:
        assert torch.equal(torch.compile(law(sampler), fullgraph=True, backend="eager")(logits), law(sampler)(logits))
        torch.compiler.reset()  # all laws are one code object, of which Dynamo compiles eight


@given(st.floats(0.01, 1.0), strategies.keys())
def test_a_chain_with_every_filter_keeps_a_token(share, key):
    sampler = fa.sampling.chain(top_h(share), typical_p(share), eta_cutoff(share), epsilon_cutoff(share), top_n_sigma(share))
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
