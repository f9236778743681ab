"""Each sampler's law against lists and sorted(), and draws against the law that was promised."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from places import ROOT
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import sampling
from funcattn.sampling import (
    Sampler,
    begin,
    chain,
    draw,
    greedy,
    law,
    min_p,
    mixture,
    stateless,
    temperature,
    top_k,
    top_p,
)

INF = float("inf")

# few values, so that there are ties, and hidden tokens among them
LOGITS = st.lists(st.sampled_from([-INF, -3.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=8)
# none is a sum of the probabilities that these logits give, but the last
SHARES = [1e-9, 0.123, 0.37, 0.61, 0.83, 0.99, 1.0]


def softmax(logits):
    mass = [math.exp(x - max(logits)) for x in logits]
    return [m / math.fsum(mass) for m in mass]


def ranked(logits):
    """Ids from the most to the least likely, equals by id."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def hide(logits, kept):
    return [x if i in kept else -INF for i, x in enumerate(logits)]


def naive_top_p(logits, p):
    probability, kept, reached = softmax(logits), [], 0.0
    for i in ranked(logits):
        if p == 1 or reached < p:
            kept.append(i)
        reached += probability[i]
    return hide(logits, kept)


def naive_min_p(logits, p):
    probability = softmax(logits)
    return hide(
        logits,
        [i for i, share in enumerate(probability) if share >= p * max(probability) * (1 - 1e-12)],
    )


NAIVE = {
    "temperature": (temperature, lambda x, t: [a / t for a in x], [0.1, 0.7, 1.0, 3.0]),
    "top_k": (top_k, lambda x, k: hide(x, ranked(x)[:k]), [1, 2, 3, 100]),
    "top_p": (top_p, naive_top_p, SHARES),
    "min_p": (min_p, naive_min_p, [0.0, 0.05, 0.5, 1.0]),
    "greedy": (lambda _: greedy, lambda x, _: hide(x, ranked(x)[:1]), [0]),
}


@given(
    LOGITS,
    st.sampled_from(
        [(name, option) for name, (_, _, options) in NAIVE.items() for option in options]
    ),
)
def test_the_law_of_each_sampler_is_that_of_a_list(logits, which):
    assume(max(logits) > -INF)
    make, naive, _ = NAIVE[which[0]]
    got = law(make(which[1]))(torch.tensor(logits, dtype=torch.float64)).exp()
    torch.testing.assert_close(
        got, torch.tensor(softmax(naive(logits, which[1])), dtype=torch.float64)
    )


@given(LOGITS, st.permutations([temperature(0.5), top_k(3), top_p(0.9), min_p(0.1)]))
def test_a_law_sums_to_one_in_any_order(logits, samplers):
    assume(max(logits) > -INF)
    got = law(chain(*samplers))(torch.tensor(logits))
    torch.testing.assert_close(got.exp().sum(), torch.tensor(1.0))
    assert not got.isnan().any()


@given(LOGITS, st.integers(1, 9))
def test_exactly_k_tokens_are_kept(logits, k):
    assume(max(logits) > -INF)
    kept = law(top_k(k))(torch.tensor(logits)).isfinite().sum()
    assert int(kept) == min(k, sum(x > -INF for x in logits))


def test_of_equals_the_lower_ids_are_kept():
    equal = torch.zeros(4)
    ids = lambda sampler: law(sampler)(equal).isfinite().nonzero().flatten().tolist()
    assert ids(top_k(2)) == [0, 1]
    assert ids(top_p(0.5)) == [0, 1]  # a quarter each: two reach a half
    assert ids(top_p(0.6)) == [0, 1, 2]
    assert ids(greedy) == [0]
    assert ids(min_p(1.0)) == [0, 1, 2, 3]


def test_a_share_of_one_keeps_every_token_however_unlikely():
    logits = torch.tensor([50.0, 0.0, -50.0])  # in float32 the first has all the mass
    assert law(top_p(1.0))(logits).tolist() == [0.0, -50.0, -100.0]
    assert law(top_p(torch.tensor(1.0)))(logits).tolist() == [0.0, -50.0, -100.0]
    assert law(min_p(0.0))(logits).tolist() == [0.0, -50.0, -100.0]


@pytest.mark.parametrize("sampler", [temperature(0.5), top_k(2), top_p(0.5), min_p(0.5), greedy])
def test_the_only_token_left_is_certain(sampler):
    logits = torch.tensor([-INF, -7.0, -INF])
    assert law(sampler)(logits).tolist() == [-INF, 0.0, -INF]
    assert draw(fa.key(0), sampler, logits, sampler.init(3))[0] == 1


def test_the_order_of_a_chain_matters():
    logits = torch.tensor([2.0, 1.0, 0.0])
    flat, kept = temperature(10.0), top_p(0.6)
    assert law(chain(kept, flat))(logits).isfinite().tolist() == [True, False, False]
    assert law(chain(flat, kept))(logits).isfinite().tolist() == [True, True, False]


def test_a_chain_of_chains_is_one_chain_and_the_empty_one_is_softmax():
    logits = fa.random.normal(fa.key(0), (9,))
    nested = chain(chain(temperature(0.5), top_k(4)), chain(), top_p(0.9))
    assert torch.equal(
        law(nested)(logits), law(chain(temperature(0.5), top_k(4), top_p(0.9)))(logits)
    )
    assert torch.equal(law(chain())(logits), logits.log_softmax(-1))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_mixture_has_the_mixed_law(share):
    logits = torch.tensor([0.0, 1.0, -INF, 2.0], dtype=torch.float64)
    sampler = mixture(share, top_k(1), temperature(3.0))
    wanted = (1 - share) * law(top_k(1))(logits).exp() + share * law(temperature(3.0))(logits).exp()
    torch.testing.assert_close(law(sampler)(logits).exp(), wanted)
    assert grad(lambda x: law(sampler)(x)[0])(logits).isfinite().all()


def test_half_precision_logits_have_a_float32_law():
    logits = fa.random.normal(fa.key(0), (9,)).bfloat16()
    assert torch.equal(law(temperature(0.7))(logits), law(temperature(0.7))(logits.float()))
    assert law(top_k(2))(logits).dtype == torch.float32


CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}  # quantiles at 0.999 by degrees of freedom


@pytest.mark.parametrize(
    "sampler",
    [chain(), temperature(0.5), chain(temperature(2.0), top_k(3)), top_p(0.7), min_p(0.2)],
)
def test_draws_follow_the_law(sampler):
    logits, N = torch.tensor([0.0, 1.0, -1.0, 1.5, -INF, 0.3]), 4000
    tokens = vmap(lambda key: draw(key, sampler, logits, sampler.init(6))[0])(
        fa.split(fa.key(7), N)
    )
    counts, expected = torch.bincount(tokens, minlength=6), N * law(sampler)(logits).exp()
    kept = expected > 0
    assert not counts[~kept].any()
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < CHI_SQUARE[int(kept.sum()) - 1]


@pytest.mark.parametrize(
    "sampler", [chain(temperature(0.7), top_k(3), top_p(0.9)), greedy, min_p(0.3)]
)
def test_vmap_is_the_loop(sampler):
    rows, keys = fa.random.normal(fa.key(1), (5, 7)), fa.split(fa.key(2), 5)
    one = lambda key, logits: draw(key, sampler, logits, sampler.init(7))[0]
    assert torch.equal(
        vmap(one)(keys, rows),
        torch.stack([one(key, row) for key, row in zip(keys, rows, strict=True)]),
    )
    assert torch.equal(vmap(law(sampler))(rows), torch.stack([law(sampler)(row) for row in rows]))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (temperature, [0.5, 1.0, 2.0]),
        (top_k, [1, 2, 5]),
        (top_p, [0.2, 0.8, 1.0]),
        (min_p, [0.0, 0.3, 1.0]),
    ],
)
def test_thresholds_may_be_tensors_one_for_each_row(make, options):
    rows = fa.random.normal(fa.key(1), (3, 5), torch.float64)
    tensors = torch.tensor(options, dtype=torch.int64 if make is top_k else torch.float64)
    got = vmap(lambda option, row: law(make(option))(row))(tensors, rows)
    for row, logits, option in zip(got, rows, options, strict=True):
        torch.testing.assert_close(row, law(make(option))(logits))


def test_a_law_has_finite_derivatives_where_tokens_are_hidden():
    logits = torch.tensor([0.0, 1.0, -INF, 2.0], dtype=torch.float64)
    f = lambda logits: law(chain(temperature(0.5), top_k(2)))(logits)[3]
    # probability of token 1, whose logit is 2 below that of token 3 at this temperature
    of_the_other = 1 / (1 + math.exp(2))
    wanted = torch.tensor([0.0, -2 * of_the_other, 0.0, 2 * of_the_other], dtype=torch.float64)
    torch.testing.assert_close(grad(f)(logits), wanted)
    tangent = jvp(f, (logits,), (torch.arange(4.0, dtype=torch.float64),))[1]
    torch.testing.assert_close(tangent, (wanted * torch.arange(4)).sum())


def test_compiled_samplers_have_the_same_law():
    sampler = chain(temperature(0.7), top_k(4), top_p(0.9), min_p(0.01))
    logits = fa.random.normal(fa.key(1), (9,))
    one = lambda key, logits: draw(key, sampler, logits, sampler.init(9))[0]
    assert torch.equal(
        torch.compile(law(sampler), fullgraph=True, backend="eager")(logits), law(sampler)(logits)
    )
    assert torch.equal(
        torch.compile(one, fullgraph=True, backend="eager")(fa.key(3), logits),
        one(fa.key(3), logits),
    )


def once():
    """A sampler with a state: what was drawn is not drawn again."""
    return Sampler(
        lambda V: torch.zeros(V, dtype=torch.bool),
        lambda logits, seen: (torch.where(seen, -INF, logits), seen),
        lambda token, seen: seen | (torch.arange(len(seen)) == token),
    )


def test_the_states_of_a_chain_are_those_of_its_parts_and_values():
    sampler = chain(temperature(0.5), once(), greedy)
    logits = torch.tensor([0.0, 3.0, 1.0])
    state, tokens, states = sampler.init(3), [], []
    for key in fa.split(fa.key(0), 3):
        states.append(state)
        token, state = draw(key, sampler, logits, state)
        tokens.append(int(token))
    assert tokens == [1, 2, 0]
    # an older state is a rewound sampler
    assert int(draw(fa.key(0), sampler, logits, states[1])[0]) == 2
    assert [int(s[1].sum()) for s in (*states, state)] == [0, 1, 2, 3]
    assert law(sampler)(logits, states[2]).tolist() == [0.0, -INF, -INF]
    with pytest.raises(
        ValueError, match="draw: what the sampler leaves should be one token at least"
    ):
        draw(fa.key(0), sampler, logits, state)


def test_greedy_draws_without_noise_wherever_it_stands_in_a_chain():
    assert greedy.deterministic
    assert chain(greedy, temperature(2.0)).deterministic
    assert chain(temperature(2.0), chain(greedy)).deterministic
    assert not chain(temperature(2.0), top_k(1)).deterministic


def test_smaller_thresholds_keep_no_more():
    logits = fa.random.normal(fa.key(1), (20,))
    for make, options in (
        (top_k, [1, 2, 5, 30]),
        (top_p, [0.1, 0.5, 0.9, 1.0]),
        (min_p, [1.0, 0.5, 0.1, 0.0]),
    ):
        kept = [law(make(option))(logits).isfinite() for option in options]
        assert all((fewer <= more).all() for fewer, more in pairwise(kept))
        assert kept[0].any()
        assert kept[-1].all()


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: temperature(0.0),
            ValueError,
            "temperature: t should be above 0, got 0.0. For the most likely token use "
            "sampling.greedy",
        ),
        (lambda: temperature(float("nan")), ValueError, "above 0, got nan"),
        (lambda: temperature(torch.tensor(-1.0)), ValueError, "temperature: t should be above 0"),
        (
            lambda: vmap(lambda t: law(temperature(t))(torch.ones(2)))(torch.tensor([1.0, 0.0])),
            ValueError,
            "above 0",
        ),
        (
            lambda: temperature("hot"),
            TypeError,
            "temperature: t should be a number or a tensor, got 'hot'",
        ),
        (lambda: top_k("3"), TypeError, "top_k: k should be a number or a tensor, got '3'"),
        (lambda: top_p(None), TypeError, "top_p: p should be a number or a tensor, got None"),
        (lambda: min_p([0.1]), TypeError, "min_p: p should be a number or a tensor"),
        (lambda: top_k(0), ValueError, "top_k: k should be at least 1, got 0"),
        (lambda: top_k(torch.tensor(0)), ValueError, "at least 1"),
        (
            lambda: top_k(2.5),
            TypeError,
            "an integer, got 2.5. For a share of the probability use top_p",
        ),
        (lambda: top_p(0.0), ValueError, r"top_p: p should be in \(0, 1\], got 0.0"),
        (lambda: top_p(1.5), ValueError, r"in \(0, 1\]"),
        (lambda: top_p(torch.tensor([0.5, 1.5])), ValueError, r"in \(0, 1\]"),
        (lambda: min_p(-0.1), ValueError, r"min_p: p should be in \[0, 1\]"),
        (lambda: min_p(torch.tensor(2.0)), ValueError, r"in \[0, 1\]"),
        (
            lambda: chain(temperature(1.0), top_k),
            TypeError,
            r"argument 1 should be a Sampler, got a function\. Call a factory",
        ),
        (
            lambda: law(chain()._replace(update=lambda x, state: x))(torch.zeros(3)),
            TypeError,
            r"a pair, logits \(3,\) and a state, got",
        ),
        (
            lambda: begin(greedy._replace(init=lambda V: 0), torch.zeros(3)),
            TypeError,
            "init returns should be a tree of tensors, got 0",
        ),
        (
            lambda: draw(fa.key(0), chain(), torch.tensor([0.0, float("nan")]), ()),
            ValueError,
            "no NaN",
        ),
        (
            lambda: draw(fa.key(0), greedy, torch.tensor([0.0, float("nan")]), ()),
            ValueError,
            "no NaN",
        ),
        (
            lambda: draw(fa.key(0), stateless(lambda x: x - INF), torch.zeros(3), ()),
            ValueError,
            "let no filter hide every token",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_the_figures_of_the_page_are_those_of_the_code():
    page = (ROOT / "docs" / "sampling.md").read_text()
    scope, figures = {}, 0
    for block in page.split("```python\n")[1:]:
        for line in block.split("```")[0].splitlines():
            code, _, comment = line.partition("#")
            wanted = [float(word) for word in comment.split() if word[0].isdigit()]
            if not wanted:
                exec(code, scope)
                continue
            # three digits are shown
            torch.testing.assert_close(eval(code, scope), torch.tensor(wanted), atol=5e-4, rtol=0)
            figures += 1
    assert figures == 4


def test_greedy_is_a_value_and_is_called_as_its_siblings_are():
    assert greedy() is greedy
    logits = torch.tensor([0.0, 2.0, 1.0])
    assert torch.equal(
        law(chain(temperature(0.5), greedy()))(logits), law(chain(temperature(0.5), greedy))(logits)
    )


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        (greedy, "greedy()"),
        (chain(temperature(0.7), top_p(0.9)), "chain(temperature(0.7), top_p(0.9))"),
        (chain(chain(top_k(3)), greedy), "chain(chain(top_k(3)), greedy())"),
        (chain(), "chain()"),
        (
            mixture(0.25, greedy, chain(top_k(2), min_p(0.1))),
            "mixture(0.25, greedy(), chain(top_k(2), min_p(0.1)))",
        ),
        (temperature(torch.tensor([0.5, 1.0])), "temperature(float32[2])"),
        (sampling.repetition_penalty(1.1, window=64), "repetition_penalty(1.1, window=64)"),
        (sampling.logit_bias({1: 2.0}), "logit_bias({1: 2.0})"),
        (sampling.primed(top_k(3), torch.tensor([1, 2])), "primed(top_k(3), int64[2])"),
        (sampling.allowed_tokens(list(range(100))), "allowed_tokens(list(...))"),
    ],
)
def test_a_sampler_prints_as_the_calls_that_made_it(sampler, text):
    assert repr(sampler) == f"Sampler({text})"


def test_a_sampler_with_another_field_does_not_print_as_the_call_that_made_it():
    other = top_k(3)._replace(update=greedy.update)
    assert "top_k" not in repr(other)
    assert repr(top_k(3)._replace()) == "Sampler(top_k(3))"
    assert repr(other._replace(prime=greedy.observe_prompt, text="mine")) == "Sampler(mine)"


def test_a_copy_of_greedy_can_be_called_as_greedy_can():
    assert copy.copy(greedy)() == greedy


def test_a_sampler_of_ones_own_prints_no_address():
    for sampler in (
        Sampler(lambda V: (), lambda logits, state: (logits, state), lambda token, state: state),
        stateless(torch.neg),
    ):
        assert " at 0x" not in repr(sampler)
        assert " at 0x" not in repr(chain(sampler, temperature(0.5)))


def test_earlier_names_go_on_working():
    assert sampling.law is sampling.log_probs
    assert sampling.weigh is sampling.log_probs_with_state
    assert sampling.prime is sampling.observe_prompt
    seen = lambda tokens, length, state: state + length
    init, update, observe = (
        (lambda V: torch.tensor(0)),
        (lambda logits, state: (logits, state)),
        (lambda token, state: state),
    )
    for sampler in (
        Sampler(init, update, observe, prime=seen),
        Sampler(init, update, observe)._replace(prime=seen),
        Sampler(init, update, observe, False, seen),
    ):
        assert sampler.prime is sampler.observe_prompt is seen
        assert (
            int(
                sampling.observe_prompt(
                    chain(sampler), torch.tensor([1, 2]), chain(sampler).init(3)
                )[0]
            )
            == 2
        )


def test_greedy_draws_what_a_chain_of_it_draws():
    """`draw` knows `greedy`, and takes the largest logit without a tensor for the others."""
    rows = torch.tensor(
        [
            [0.0, 2.0, 1.0, 2.0],
            [-torch.inf, -3.0, -torch.inf, -3.0],
            [-torch.inf] * 4,
            [0.0, torch.nan, 5.0, 1.0],
            [torch.inf, 0.0, 1.0, torch.inf],
        ]
    )
    greedy, chained = fa.sampling.greedy, fa.sampling.chain(fa.sampling.greedy)
    for logits in rows:
        drawn = []
        for sampler in (greedy, chained):
            try:
                state = fa.sampling.begin(sampler, logits)
                drawn.append(int(fa.sampling.draw(fa.key(0), sampler, logits, state)[0]))
            except ValueError as error:
                drawn.append(str(error))
        assert drawn[0] == drawn[1]
    every = lambda sampler: torch.func.vmap(
        lambda logits, wanted: fa.sampling.draw(
            fa.key(0), sampler, logits, fa.sampling.begin(sampler, logits), wanted=wanted
        )[0]
    )(rows, torch.tensor([True, True, False, False, False]))
    assert torch.equal(every(greedy), every(chained))
