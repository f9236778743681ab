"""Speculation loses nothing: every draft and text of small vocabularies, enumerated in float64; and
seeded mistakes are seen.
"""

import itertools

import pytest
import torch
from torch.func import grad, vmap

import funcattn as fa
from funcattn import sampling
from funcattn.decoding.speculative.rules import Regions, last_passed, until_refused
from funcattn.sampling import chain, greedy, law, min_p, repetition_penalty, temperature, top_k
from funcattn.speculation import Rule, accept, acceptance_pmf, blockwise, tokenwise
from funcattn.testing import laws
from funcattn.testing.laws import acceptances

RULES = {"tokenwise": tokenwise, "blockwise": blockwise}
SIZES = [(3, 1), (3, 2), (3, 3), (4, 2), (4, 3)]


def table(key, V, n, sampler=None, spread=2.0):
    """Conditional laws of n tokens: random logits for every text, as a sampler with its state
    leaves them.
    """
    sampler = chain() if sampler is None else sampler
    out = []
    for depth, fresh in enumerate(fa.split(key, n)):
        logits, rows = spread * fa.random.normal(fresh, (V,) * (depth + 1), torch.float64), []
        for text, row in zip(
            itertools.product(range(V), repeat=depth), logits.reshape(-1, V), strict=True
        ):
            state = sampler.init(V)
            for token in text:
                state = sampler.observe(torch.tensor(token), state)
            rows.append(law(sampler)(row, state).exp())
        out.append(torch.stack(rows).reshape(logits.shape))
    return out


def disjoint(V, N):
    """The target writes even ids, the draft odd ones."""
    even = sampling.allowed_tokens(range(0, V, 2))
    odd = sampling.allowed_tokens(range(1, V, 2))
    return table(fa.key(0), V, N + 1, even), table(fa.key(1), V, N, odd)


def cases(V, N):
    a, b = fa.split(fa.key(10 * V + N))
    plain = table(a, V, N + 1)
    penalties = chain(repetition_penalty(1.7), sampling.frequency_penalty(0.5), temperature(0.8))
    return {
        "two models": (plain, table(b, V, N)),
        "another temperature": (
            table(a, V, N + 1, temperature(0.5)),
            table(a, V, N, temperature(1.5)),
        ),
        "top-k zeros": (table(a, V, N + 1, top_k(2)), table(b, V, N)),
        "top-k of both": (table(a, V, N + 1, top_k(2)), table(b, V, N, top_k(2))),
        "penalties with a state": (table(a, V, N + 1, penalties), table(b, V, N, penalties)),
        "a grammar": (table(a, V, N + 1, sampling.no_repeat_ngram(2, window=4)), table(b, V, N)),
        "greedy drafts": (plain, table(b, V, N, greedy)),
        "greedy both": (table(a, V, N + 1, greedy), table(b, V, N, greedy)),
        "the same model": (plain, plain[:-1]),
        "disjoint": disjoint(V, N),
    }


CASES = list(cases(3, 1))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_has_the_law_of_the_target(case, rule, size):
    target, draft = cases(*size)[case]
    for proof in laws.acceptance:
        # sampled draws and a walk through every corner are done at the small sizes
        if size[0] ** size[1] <= 9 or proof not in (
            acceptances.counts_follow_the_pmf,
            acceptances.regions_have_the_volume_of_the_pmf,
        ):
            proof(rule, target, draft, fa.key(7))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_same_model_keeps_every_token_and_a_disjoint_one_none(rule):
    target, draft = cases(3, 3)["the same model"]
    torch.testing.assert_close(
        acceptances.expected_count(rule, target, draft), torch.tensor(3.0, dtype=torch.float64)
    )
    assert acceptances.expected_count(rule, *disjoint(4, 2)) == 0


def test_the_example_of_the_paper_keeps_ten_ninths_and_eleven_ninths():
    """arXiv:2403.10444, section 2: target (1/3, 2/3), draft (2/3, 1/3), independent tokens, N =
    2.
    """
    p, q = (
        torch.tensor([1 / 3, 2 / 3], dtype=torch.float64),
        torch.tensor([2 / 3, 1 / 3], dtype=torch.float64),
    )
    target, draft = (
        [p.expand((2,) * n + (2,)) for n in range(3)],
        [q.expand((2,) * n + (2,)) for n in range(2)],
    )
    kept = [
        float(acceptances.expected_count(rule, target, draft)) for rule in (tokenwise, blockwise)
    ]
    assert kept == pytest.approx([10 / 9, 11 / 9])


def changed(rule, change):
    """A rule whose regions a mistake has changed: change(regions, target, draft, proposed) ->
    Regions.
    """
    return Rule(lambda p, q, d, n: change(rule.regions(p, q, d, n), p, q, d), rule.count, rule.pmf)


def tempered(rule):
    """The law of the draft is not the one that was drawn from."""
    return Rule(
        lambda p, q, d, n: rule.regions(p, (q**2) / (q**2).sum(-1, keepdim=True), d, n),
        rule.count,
        rule.pmf,
    )


def softmaxed(regions, p, q, d):
    return regions._replace(correction=torch.cat([(p[:-1] - q).clamp(min=0).softmax(-1), p[-1:]]))


MISTAKES = {
    "resampling from the target": lambda rule: changed(
        rule, lambda r, p, q, d: r._replace(correction=p)
    ),
    "another law of the draft": tempered,
    "a softmax of the residual": lambda rule: changed(rule, softmaxed),
    "the residual of the other rule": lambda rule: changed(
        rule,
        lambda r, p, q, d: r._replace(
            correction=(tokenwise if rule is blockwise else blockwise)
            .regions(p, q, d, torch.tensor(len(d)))
            .correction
        ),
    ),
    "accepting all": lambda rule: changed(
        rule, lambda r, p, q, d: r._replace(threshold=torch.ones_like(r.threshold))
    ),
    "rows one off": lambda rule: changed(
        rule, lambda r, p, q, d: r._replace(correction=r.correction.roll(1, 0))
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_seeded_mistake_is_seen(mistake, rule):
    target, draft = cases(3, 2)["two models"]
    with pytest.raises(AssertionError, match="the total variation is"):
        acceptances.what_is_written_has_the_law_of_the_target(
            MISTAKES[mistake](rule), target, draft, fa.key(0)
        )


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_filter_forgotten_on_verified_tokens_is_seen(rule):
    a, b = fa.split(fa.key(3))
    draft, filtered, raw = table(b, 3, 2), table(a, 3, 3, min_p(0.6)), table(a, 3, 3)
    off = lambda shown: (
        (acceptances.emitted(rule, filtered, draft, shown=shown) - acceptances.joint(filtered))
        .abs()
        .sum()
        / 2
    )
    assert off(filtered) < acceptances.EXACT
    assert off([raw[0], *filtered[1:]]) > 1e-3
    assert off([*filtered[:2], raw[2]]) > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_a_uniform_of_zero_accepts_nothing_impossible(name):
    rule, inclusive = (
        RULES[name],
        {
            "tokenwise": lambda h, u: (u <= h).long().cumprod(-1).sum(-1),
            "blockwise": lambda h, u: torch.where(u <= h, torch.arange(1, len(h) + 1), 0).amax(),
        }[name],
    )
    assert int(rule.count(torch.zeros(3), torch.zeros(3))) == 0
    target, draft = cases(3, 2)["top-k zeros"]
    with pytest.raises(AssertionError, match=r"within one box|volume"):
        acceptances.regions_have_the_volume_of_the_pmf(
            rule._replace(count=inclusive), target, draft, fa.key(0)
        )


def test_uniforms_beside_a_threshold_decide():
    h = torch.tensor([0.3, 0.6, 0.2], dtype=torch.float64)
    below = torch.nextafter(h, torch.zeros_like(h))
    assert [int(count(h, u)) for count in (until_refused, last_passed) for u in (below, h)] == [
        3,
        0,
        3,
        0,
    ]
    mixed = torch.stack([below[0], h[1], below[2]])
    assert (int(until_refused(h, mixed)), int(last_passed(h, mixed))) == (1, 3)


# quantiles of chi-square at 1 - 1e-6
CHI_SQUARE = {1: 23.93, 2: 27.63, 26: 76.2}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_200_000_texts_follow_the_target(rule):
    """Draw a draft, accept, complete with the target: 27 texts of three tokens, and the counts of
    one draft.
    """
    N, V, trials = 2, 3, 200_000
    target, draft = table(fa.key(1), V, N + 1, spread=0.7), table(fa.key(2), V, N, spread=0.7)
    pick = lambda key, law: fa.random.categorical(key, law.log())

    def one(key):
        keys = fa.split(key, 2 * N + 2)
        first = pick(keys[0], draft[0])
        second = pick(keys[1], draft[1].index_select(0, first.reshape(1))[0])
        d = torch.stack([first, second])
        p = torch.stack(
            [
                target[0],
                target[1][first.reshape(1)][0],
                target[2].reshape(-1, V)[(V * first + second).reshape(1)][0],
            ]
        )
        q = torch.stack([draft[0], draft[1][first.reshape(1)][0]])
        tokens = accept(keys[2], p, q, d, rule=rule, check=False).tokens
        one = torch.where(tokens[1] >= 0, tokens[1], pick(keys[3], target[1][tokens[:1]][0]))
        two = pick(keys[4], target[2].reshape(-1, V)[(V * tokens[:1] + one)][0])
        return V * V * tokens[0] + V * one + torch.where(tokens[2] >= 0, tokens[2], two)

    seen = torch.bincount(vmap(one)(fa.split(fa.key(5), trials)), minlength=V**3).double()
    wanted = trials * acceptances.joint(target).reshape(-1)
    assert float(wanted.min()) > 5
    assert float(((seen - wanted) ** 2 / wanted).sum()) < CHI_SQUARE[26]

    # the draft that leaves most open
    undecided = int(acceptances.outcomes(rule, target, draft)[1].amin(-1).argmax())
    p, q, d = (
        x[undecided]
        for x in (acceptances.rows(target, N), acceptances.rows(draft, N), acceptances.drafts(V, N))
    )
    counts = vmap(lambda key: accept(key, p, q, d, rule=rule, check=False).count)(
        fa.split(fa.key(6), trials)
    )
    seen, wanted = (
        torch.bincount(counts, minlength=N + 1),
        trials * acceptance_pmf(p, q, d, rule=rule),
    )
    possible = wanted > 0
    assert not seen[~possible].any()
    assert (
        float(((seen - wanted) ** 2 / wanted)[possible].sum()) < CHI_SQUARE[int(possible.sum()) - 1]
    )


def some_row(N=3, V=5, dtype=torch.float64):
    keys = fa.split(fa.key(8), 3)
    target, draft = (
        fa.random.normal(keys[0], (N + 1, V), dtype).softmax(-1),
        fa.random.normal(keys[1], (N, V), dtype).softmax(-1),
    )
    return target, draft, fa.random.randint(keys[2], (N,), 0, V)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rows_of_a_batch_with_lengths_of_their_own_are_single_ones(rule):
    target, draft, proposed = some_row()
    keys, lengths = fa.split(fa.key(1), 40), torch.arange(40) % 4
    one = lambda key, n: accept(key, target, draft, proposed, n, rule=rule)
    rows = vmap(one)(keys, lengths)
    for i in range(40):
        single = one(keys[i], lengths[i])
        assert all(torch.equal(a[i], b) for a, b in zip(rows, single, strict=True))
        assert int(single.count) <= int(lengths[i])
        n = int(single.count)
        assert single.tokens.tolist() == [
            *proposed[:n].tolist(),
            int(single.token),
            *[-1] * (3 - n),
        ]
    compiled = torch.compile(one, fullgraph=True, backend="eager")(keys[0], lengths[0])
    assert all(torch.equal(a, b) for a, b in zip(compiled, one(keys[0], lengths[0]), strict=True))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rows_beyond_valid_do_not_matter_even_nan(rule):
    target, draft, proposed = some_row()
    nan = float("nan")
    dirty = (
        target.index_fill(0, torch.tensor([2, 3]), nan),
        draft.index_fill(0, torch.tensor([1, 2]), nan),
    )
    spoiled = proposed.index_fill(0, torch.tensor([1, 2]), -7)
    for key in fa.split(fa.key(2), 20):
        a = accept(key, target, draft, proposed, torch.tensor(1), rule=rule)
        b = accept(key, *dirty, spoiled, torch.tensor(1), rule=rule)
        assert torch.equal(a.tokens, b.tokens)
    wanted = acceptance_pmf(target, draft, proposed, torch.tensor(1), rule=rule)
    assert torch.equal(acceptance_pmf(*dirty, spoiled, torch.tensor(1), rule=rule), wanted)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_expected_length_can_be_climbed(rule):
    target, draft, proposed = some_row()
    f = lambda logits: (
        acceptance_pmf(target, logits.softmax(-1), proposed, rule=rule) * torch.arange(4)
    ).sum()
    logits, step = draft.log(), 1e-6
    got = grad(f)(logits)
    basis = torch.eye(logits.numel(), dtype=torch.float64).reshape(-1, *logits.shape)
    numeric = torch.stack(
        [(f(logits + step * e) - f(logits - step * e)) / (2 * step) for e in basis]
    ).reshape(logits.shape)
    torch.testing.assert_close(got, numeric, rtol=1e-6, atol=1e-9)  # step^2, and eps / step
    assert float(got.abs().max()) > 1e-3
    zeros = acceptance_pmf(
        target, torch.nn.functional.one_hot(proposed, 5).double(), proposed, rule=rule
    )
    assert zeros.isfinite().all()
    assert (
        grad(lambda q: acceptance_pmf(target, q, proposed, rule=rule, check=False)[0])(draft)
        .isfinite()
        .all()
    )


def test_a_nan_that_cannot_be_looked_at_is_a_token_of_minus_one():
    target, draft, proposed = some_row()
    done = torch.compile(accept, fullgraph=True, backend="eager")(
        fa.key(0), target * float("nan"), draft, proposed
    )
    assert int(done.token) == -1
    done = accept(fa.key(0), target * float("nan"), draft, proposed, check=False)
    assert int(done.token) == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_target_writes_what_greedy_writes(dtype):
    target, draft, proposed = some_row(dtype=dtype)
    best = target.argmax(-1)
    hard = torch.nn.functional.one_hot(best, 5).to(dtype)
    agreed = torch.cat([best[:2], (best[2:3] + 1) % 5])  # the third token is wrong
    for rule in RULES.values():
        done = accept(fa.key(3), hard, draft, agreed, rule=rule)
        assert done.tokens.tolist() == [*best[:3].tolist(), -1]


GOOD = some_row()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"target": GOOD[0][:3]},
            ValueError,
            r"target should be \(N \+ 1, V\) = \(4, 5\) with N = 3 as proposed, got \(3, 5\)",
        ),
        (
            {"draft": GOOD[1][:, :4]},
            ValueError,
            r"draft should be \(N, V\) = \(3, 5\).*Target and draft need one vocabulary",
        ),
        (
            {"proposed": GOOD[2][:0]},
            ValueError,
            "N at least 1.*With nothing drafted, draw from the target",
        ),
        ({"proposed": GOOD[2][None]}, ValueError, "one draft .* Map over many rows with vmap"),
        ({"proposed": torch.tensor([0, 5, 1])}, ValueError, "ids below V = 5"),
        (
            {"target": GOOD[0].half()},
            TypeError,
            "probabilities in float32 or float64, got torch.float16",
        ),
        (
            {"target": GOOD[0] * 1.1},
            ValueError,
            "target should be rows of probabilities that sum to one",
        ),
        (
            {"draft": GOOD[1] * float("nan")},
            ValueError,
            "draft should be rows of probabilities that sum to one",
        ),
        ({"draft": GOOD[1].log()}, ValueError, "draft should be rows of probabilities"),
        (
            {"draft": torch.eye(5, dtype=torch.float64)[(GOOD[2] + 1) % 5]},
            ValueError,
            "positive at the proposed tokens, got zero",
        ),
        ({"valid": torch.tensor(4)}, ValueError, "valid should be between 0 and N = 3, got 4"),
        ({"valid": torch.tensor(-1)}, ValueError, "between 0 and N = 3"),
        ({"valid": 2}, TypeError, "an integer tensor"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(change, kind, message):
    given = dict(zip(("target", "draft", "proposed"), GOOD, strict=True)) | change
    with pytest.raises(kind, match="accept: .*" + message):
        accept(fa.key(0), **given)
    with pytest.raises(kind, match="acceptance_pmf: .*" + message):
        acceptance_pmf(**given)


def test_checks_of_values_can_be_left_out_and_hold_in_every_row_of_a_vmap():
    target, draft, proposed = GOOD
    accept(fa.key(0), target * 1.1, draft, proposed, check=False)
    scales = torch.tensor([1.0, 1.1], dtype=torch.float64)
    with pytest.raises(ValueError, match="sum to one"):
        vmap(lambda s: accept(fa.key(0), target * s, draft, proposed).count)(scales)


def test_a_rule_of_ones_own_is_proved_by_the_kit():
    """Accept nothing, ever: slow, and without loss."""
    never = Rule(
        lambda p, q, d, n: Regions(torch.zeros_like(q[:, 0]), p), until_refused, tokenwise.pmf
    )
    target, draft = cases(3, 2)["two models"]
    for proof in laws.acceptance:
        if proof is not acceptances.accepts_as_many_as_tokenwise:
            proof(never, target, draft, fa.key(0))
    with pytest.raises(AssertionError, match="the mean count that is missing"):
        acceptances.accepts_as_many_as_tokenwise(never, target, draft, fa.key(0))
