"""Speculation writes what generate writes: the same tokens under greedy, the same law where it
samples.
"""

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn import caches, drafters, sampling
from funcattn.speculation import Stats, blockwise, speculate, stream, tokenwise

MATRICES = r"layers.*\.(q|k|v|o|gate|up|down)"  # an embedding that is quantized gives float32
SMALL = fa.Config(vocabulary=24, layers=2)
RULES = {"tokenwise": tokenwise, "blockwise": blockwise}


def some(config=SMALL, seed=0, scale=3.0):
    """A decoder in float64: greedy decoding by one token or by several at once agrees but for the
    last bits.
    """
    model = fa.decoder(config)
    return model, fa.cast(torch.float64)(fa.tree.map(lambda w: scale * w, model.init(fa.key(seed))))


def noisy(params, share):
    """A worse model of the same text."""
    leaves = fa.tree.leaves(params)
    keys = iter(fa.split(fa.key(9), len(leaves)))
    return fa.tree.map(
        lambda w: (
            w + share * w.std(correction=0) * fa.random.normal(next(keys), tuple(w.shape), w.dtype)
        ),
        params,
    )


def another(model):
    """An equal model, whose past is not the target's."""
    return fa.decoder(model.config)


def each(model, params):
    # 0 to 3 times the last token
    says = lambda text, n: (text.index_select(0, (n - 1).reshape(1)).expand(3), n % 4)
    return {
        "a worse model": drafters.model(model, noisy(params, 0.1), length=3),
        "a worse model that samples": drafters.model(
            model, noisy(params, 0.1), length=4, sampler=sampling.temperature(0.7)
        ),
        "the same model": drafters.model(model, params, length=4),
        "the same model with a past of its own": drafters.model(another(model), params, length=4),
        "a worse model with a past of its own": drafters.model(
            another(model), noisy(params, 0.1), length=3
        ),
        "itself in int8": drafters.model(model, fa.quantize(fa.int8, MATRICES)(params), length=3),
        "itself without a layer": drafters.skip(model, params, [1], length=3),
        "prompt lookup": drafters.prompt_lookup(length=5, ngram=2),
        "a function": drafters.function(says, length=3),
    }


def foreign():
    model = fa.decoder(fa.Config(vocabulary=30, layers=1))
    return drafters.model(model, model.init(fa.key(0)))


NAMES = list(each(*some()))
PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", NAMES)
def test_under_greedy_the_tokens_are_those_of_generate(name, rule):
    model, params = some()
    wanted, wanted_past = fa.generate(fa.key(0), model, params, PROMPT, steps=64)
    got, past = speculate(
        fa.key(0), model, params, each(model, params)[name], PROMPT, steps=64, rule=rule
    )
    assert got.tokens.tolist() == wanted.tolist()
    assert int(got.count) == 64
    assert int(past.length) == int(wanted_past.length)
    n = int(past.length)
    torch.testing.assert_close(past.k[..., :n, :], wanted_past.k[..., :n, :])
    # a token a round, and those accepted; the last may be cut
    assert int(got.stats.rounds) + int(got.stats.accepted) in (63, 64)
    if name.startswith("the same model"):
        assert int(got.stats.rounds) == 13  # 63 tokens after the first, five a round


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_with_a_state_follows_the_accepted_text_alone(name):
    model, params = some()
    sampler = sampling.chain(
        *(
            sampling.repetition_penalty(1.2),
            sampling.frequency_penalty(0.3),
            sampling.no_repeat_ngram(2),
        ),
        *(sampling.dry(window=64), sampling.min_new_tokens(20, (9,)), sampling.greedy),
    )
    wanted = fa.generate(fa.key(0), model, params, PROMPT, steps=40, sampler=sampler)[0]
    got = speculate(
        fa.key(0), model, params, each(model, params)[name], PROMPT, steps=40, sampler=sampler
    )[0]
    assert got.tokens.tolist() == wanted.tolist()
    assert int(got.stats.accepted) > 0 or name in (
        "prompt lookup",
        "a function",
        "itself without a layer",
    )  # nothing is to be repeated here


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_id_ends_the_text_as_in_generate(name):
    model, params = some()
    free = fa.generate(fa.key(0), model, params, PROMPT, steps=30)[0].tolist()
    stop = (free[11],)
    wanted, wanted_past = fa.generate(fa.key(0), model, params, PROMPT, steps=30, stop=stop)
    got, past = speculate(
        fa.key(0), model, params, each(model, params)[name], PROMPT, steps=30, stop=stop
    )
    assert got.tokens.tolist() == wanted.tolist()
    assert int(got.count) == free.index(free[11]) + 1
    assert int(past.length) == int(wanted_past.length)


@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_is_single_ones(name):
    model, params = some()
    prompts = torch.stack([PROMPT, PROMPT.flip(0), (PROMPT + 7) % 24])
    lengths, steps, stop = torch.tensor([11, 4, 8]), 20, (7, 13)
    one = lambda key, prompt, n: speculate(
        *(key, model, params, each(model, params)[name], prompt),
        steps=steps,
        stop=stop,
        prompt_length=n,
        sampler=sampling.repetition_penalty(1.3),
    )[0]
    keys = fa.split(fa.key(4), 3)
    rows = vmap(one)(keys, prompts, lengths)
    for i in range(3):
        whole = one(keys[i], prompts[i][: lengths[i]], lengths[i])
        assert rows.tokens[i].tolist() == whole.tokens.tolist()
        assert int(rows.stats.rounds[i]) == int(whole.stats.rounds)
    greedy = vmap(
        lambda p, n: speculate(
            fa.key(0), model, params, each(model, params)[name], p, steps=steps, prompt_length=n
        )[0]
    )
    plain = vmap(
        lambda p, n: fa.generate(fa.key(0), model, params, p, steps=steps, prompt_length=n)[0]
    )
    assert greedy(prompts, lengths).tokens.tolist() == plain(prompts, lengths).tolist()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["a worse model that samples", "a worse model", "prompt lookup"])
def test_sampled_texts_have_the_law_of_the_model(name, rule):
    """All 27 texts of three tokens, with a penalty whose state follows the text: 3000 draws against
    the exact law.
    """
    model, params = some(fa.Config(vocabulary=3, layers=1), seed=3, scale=2.0)
    sampler = sampling.chain(sampling.repetition_penalty(1.5), sampling.frequency_penalty(0.5))
    prompt, trials = torch.tensor([1, 0, 1]), 3000
    law = torch.zeros(3, 3, 3, dtype=torch.float64)
    for text in torch.cartesian_prod(*[torch.arange(3)] * 3):
        state, mass = sampling.observe_prompt(sampler, prompt, sampler.init(3)), 1.0
        logits, _ = model.extend(params, torch.cat([prompt, text]), ())
        for row, token in zip(logits[2:5], text, strict=True):
            mass = mass * sampling.law(sampler)(row, state).exp()[token]
            state = sampler.observe(token, state)
        law[tuple(text.tolist())] = mass
    drafter = {
        "a worse model that samples": drafters.model(
            model, noisy(params, 0.5), length=2, sampler=sampler
        ),
        "a worse model": drafters.model(model, noisy(params, 0.5), length=2),
        "prompt lookup": drafters.prompt_lookup(length=2, ngram=1),
    }[name]
    one = lambda key: (
        speculate(key, model, params, drafter, prompt, steps=3, sampler=sampler, rule=rule)[
            0
        ].tokens
    )
    tokens = vmap(one)(fa.split(fa.key(8), trials))
    seen = torch.bincount((tokens * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
    wanted = trials * law.reshape(-1)
    torch.testing.assert_close(wanted.sum(), torch.tensor(float(trials), dtype=torch.float64))
    assert float(wanted.min()) > 4
    # chi-square with 26 degrees of freedom at 1 - 1e-6
    assert float(((seen - wanted) ** 2 / wanted).sum()) < 76.2


def test_a_given_past_stays_as_it_was_and_is_continued():
    model, params = some()
    cache = model.apply(params, PROMPT[:6], model.cache(8, dtype=torch.float64))[1]
    wanted = fa.generate(fa.key(0), model, params, PROMPT[6:], cache, steps=9)[0]
    got, past = speculate(
        fa.key(0), model, params, drafters.prompt_lookup(), PROMPT[6:], cache, steps=9
    )
    assert got.tokens.tolist() == wanted.tolist()
    assert (int(cache.length), int(past.length)) == (6, 19)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps_are_few_tokens(steps):
    model, params = some()
    got, _ = speculate(fa.key(0), model, params, drafters.prompt_lookup(), PROMPT, steps=steps)
    assert (
        got.tokens.tolist()
        == fa.generate(fa.key(0), model, params, PROMPT, steps=steps)[0].tolist()
    )
    assert int(got.count) == steps


KINDS = {
    "dense": caches.Cache,
    "pages": caches.pages(block=4),
    "ring": caches.ring(window=40, sinks=1, tail=8),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_draft_behind_the_past_of_the_target_leaves_no_trace_in_it(kind):
    model, params = some()
    empty = model.cache(64, kind=kind, dtype=torch.float64)
    wanted, wanted_past = fa.generate(fa.key(0), model, params, PROMPT, empty, steps=20)
    drafter = drafters.model(model, noisy(params, 0.3), length=4)
    got, past = speculate(fa.key(0), model, params, drafter, PROMPT, empty, steps=20)
    assert got.tokens.tolist() == wanted.tolist()
    assert 0 < int(got.stats.accepted) < int(got.stats.drafted)
    more = torch.tensor([5, 6])
    torch.testing.assert_close(
        model.extend(params, more, past)[0], model.extend(params, more, wanted_past)[0]
    )


def test_eight_ragged_texts_are_eight_single_ones():
    model, params = some()
    keys = fa.split(fa.key(3), 8)
    prompts = torch.stack([fa.random.randint(key, (9,), 0, 24) for key in keys])
    lengths = torch.tensor([9, 2, 5, 1, 7, 3, 8, 4])
    drafter = drafters.model(model, fa.quantize(fa.int4(group=8), MATRICES)(params), length=3)
    one = lambda key, prompt, n: speculate(
        key, model, params, drafter, prompt, steps=16, stop=(7,), prompt_length=n
    )[0]
    rows = vmap(one)(keys, prompts, lengths)
    for i in range(8):
        alone = one(keys[i], prompts[i, : lengths[i]], lengths[i])
        assert rows.tokens[i].tolist() == alone.tokens.tolist()
        assert (int(rows.count[i]), int(rows.stats.accepted[i])) == (
            int(alone.count),
            int(alone.stats.accepted),
        )


class Letters:
    """Token n is the letter n."""

    stop = ()

    def decode(self, ids):
        return "".join(chr(ord("a") + n) for n in ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_string_in_the_middle_of_a_draft_ends_the_text_there(name):
    model, params = some()
    free = fa.generate(fa.key(0), model, params, PROMPT, steps=30)[0].tolist()
    text = Letters().decode(free)
    for options in ({"stop_strings": (text[9:12],)}, {"stop": (free[14],)}, {}):
        wanted = list(
            fa.stream(fa.key(0), model, params, PROMPT, steps=30, tokenizer=Letters(), **options)
        )
        pieces = list(
            stream(
                fa.key(0),
                model,
                params,
                each(model, params)[name],
                PROMPT,
                steps=30,
                tokenizer=Letters(),
                **options,
            )
        )
        assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in wanted)
        assert pieces[-1].tokens == wanted[-1].tokens
        assert int(pieces[-1].cache.length) == int(wanted[-1].cache.length)
        assert [piece.ended for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_statistics_tell_the_speedup_from_what_the_parts_cost():
    stats = Stats(*map(torch.tensor, (10, 40, 25)))
    assert float(stats.acceptance) == 25 / 40
    assert float(stats.tokens_per_round) == 3.5
    assert float(stats.speedup(0.5, 1.5)) == pytest.approx(3.5 / (4 * 0.5 + 1.5))
    assert str(stats) == "25 of 40 drafted tokens stayed (62%); 3.50 tokens a round in 10 rounds"
    many = fa.tree.stack([stats, stats])
    assert repr(many) == "Stats(rounds=int64[2], drafted=int64[2], accepted=int64[2])"
    assert str(many).splitlines() == [f"{row}: {stats}" for row in (0, 1)]
    nothing = Stats(*[torch.tensor(0)] * 3)
    assert (float(nothing.acceptance), float(nothing.tokens_per_round)) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda m, p: speculate(
                fa.key(0), m, p, drafters.prompt_lookup(), PROMPT[None], steps=3
            ),
            "speculate: prompt should be one",
        ),
        (
            lambda m, p: speculate(fa.key(0), m, p, drafters.prompt_lookup(), PROMPT, steps=-1),
            "speculate: steps should be",
        ),
        (
            lambda m, p: speculate(fa.key(0), m, p, foreign(), PROMPT, steps=3),
            "speculate: drafter should be of the model's 24 tokens, got one of 30",
        ),
        (
            lambda m, p: speculate(
                fa.key(0),
                m,
                p,
                drafters.prompt_lookup(),
                PROMPT,
                m.cache(4, dtype=torch.float64),
                steps=3,
            ),
            "at most the 4 tokens that the cache has room for",
        ),
        (
            lambda m, p: drafters.skip(m, p, []),
            r"drafters.skip: layers should be some of 0..1, not all, got \(\)",
        ),
        (lambda m, p: drafters.skip(m, p, [0, 1]), "not all"),
        (
            lambda m, p: speculate(fa.key(0), m, p, p, PROMPT, steps=3),
            "speculate: drafter should be one of fa.drafters, got a Params",
        ),
        (
            lambda m, p: speculate(
                fa.key(0), m, p, drafters.prompt_lookup(), PROMPT, steps=3, rule="blockwise"
            ),
            "speculate: rule should be a Rule, got 'blockwise'",
        ),
        (
            lambda m, p: speculate(fa.key(0), p, m, drafters.prompt_lookup(), PROMPT, steps=3),
            "speculate: model should be from fa.decoder",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        wrong(*some())
