"""Drafters that are models: drafts that end early, and vocabularies of other padding."""

import dataclasses
import itertools

import pytest
import torch
from drafted import tables
from torch.func import vmap

import funcattn as fa
from funcattn import drafters, sampling
from funcattn.speculation import blockwise, speculate, tokenwise
from funcattn.testing.laws import acceptances

SMALL = fa.Config(vocabulary=24, layers=2, width=16, heads=2, head_size=8, feed_forward=32)
RECURRENT = dataclasses.replace(
    SMALL, mixers=("short_convolution", "attention"), convolution_size=3
)
PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def some(config=SMALL, seed=0, scale=3.0):
    model = fa.decoder(config)
    return model, fa.cast(torch.float64)(fa.tree.map(lambda w: scale * w, model.init(fa.key(seed))))


def worse(params):
    leaves = fa.tree.leaves(params)
    keys = iter(fa.split(fa.key(9), len(leaves)))
    noise = lambda w: fa.random.normal(next(keys), tuple(w.shape), w.dtype)
    return fa.tree.map(lambda w: w + 1.0 * w.std(correction=0) * noise(w), params)


def unsure(model, params):
    """Drafters that stop: on the target's cache, on one of their own, and on recurrent states."""
    other = fa.decoder(SMALL)
    recurrent, states = some(RECURRENT)
    options = {"length": 5, "confidence": 0.99}
    return {
        "the target's cache": drafters.model(model, worse(params), **options),
        "its own cache": drafters.model(other, worse(params), **options),
        "drawn": drafters.model(other, worse(params), sampler=sampling.temperature(0.7), **options),
        "recurrent": drafters.model(recurrent, states, **options),
    }


NAMES = list(unsure(*some()))


@pytest.mark.parametrize(
    "name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[2:])]
)
def test_a_draft_that_stops_early_writes_what_generate_writes(name):
    model, params = some()
    drafter = unsure(model, params)[name]
    prompts, lengths = torch.stack([PROMPT, PROMPT.flip(0)]), torch.tensor([8, 3])
    sampler = sampling.chain(sampling.no_repeat_ngram(3), sampling.greedy)
    one = lambda p, n: speculate(
        fa.key(0), model, params, drafter, p, steps=9, prompt_length=n, sampler=sampler
    )[0]
    rows, stopped = vmap(one)(prompts, lengths), False
    for i in range(2):
        prompt = prompts[i, : lengths[i]]
        wanted = fa.generate(fa.key(0), model, params, prompt, steps=9, sampler=sampler)[0]
        alone = one(prompt, lengths[i])
        assert rows.tokens[i].tolist() == alone.tokens.tolist() == wanted.tolist()
        assert [int(x[i]) for x in rows.stats] == [int(x) for x in alone.stats]
        stopped |= int(alone.stats.drafted) < 5 * int(alone.stats.rounds)
    assert stopped


def test_a_draft_ends_behind_the_first_token_that_is_not_sure():
    model, params = some()
    free = drafters.model(fa.decoder(SMALL), worse(params), length=5)
    n, last, text = torch.tensor(8), torch.tensor(7), torch.cat([PROMPT, torch.tensor([7])])
    whole, _ = free.propose(fa.key(0), last, free.init(PROMPT, n, 8))
    given = []
    for token in whole.tokens:
        log_probs = model.extend(worse(params), text, ())[0][-1].log_softmax(-1)
        given.append(float(log_probs[token].exp()))
        text = torch.cat([text, token.reshape(1)])
    assert min(given) < 0.99
    for confidence in (0.0, *(min(1.0, p + 1e-9) for p in given)):
        drafter = drafters.model(fa.decoder(SMALL), worse(params), length=5, confidence=confidence)
        draft, _ = drafter.propose(fa.key(0), last, drafter.init(PROMPT, n, 8))
        wanted = next((i for i, p in enumerate(given, 1) if p < confidence), 5)
        assert int(draft.valid) == wanted
        assert draft.tokens[:wanted].tolist() == whole.tokens[:wanted].tolist()


@pytest.mark.parametrize("rule", [tokenwise, blockwise])
def test_a_draft_whose_length_its_tokens_decide_has_the_law_of_the_target(rule):
    """Behind token 0 nothing more is drafted; every draft of two tokens enumerated."""
    target, draft = tables(1, 3), tables(2, 2)
    law = torch.zeros(3, 3, 3, dtype=torch.float64)

    def written(text, mass):
        for table in target[len(text) :]:
            mass = mass.unsqueeze(-1) * (table[text] if text else table)
        law[text] += mass

    for d in itertools.product(range(3), repeat=2):
        n = 1 if d[0] == 0 else 2
        p = torch.stack([target[0], target[1][d[0]], target[2][d]])
        q = torch.stack([draft[0], draft[1][d[0]]])
        chance = draft[0][d[0]] * draft[1][d]
        found = rule.regions(p, q, torch.tensor(d), torch.tensor(n))
        for count, share in enumerate(rule.pmf(found.threshold)):
            for token in range(3):
                text = (*d[:count], token)
                written(text, chance * share * found.correction[count, token])
    assert float((law - acceptances.joint(target)).abs().sum() / 2) <= acceptances.EXACT


@pytest.mark.parametrize("size", [20, 30])
@pytest.mark.parametrize("make", [drafters.model, lambda *a, **o: thin(*a, **o)])
def test_a_drafter_of_other_padding_drafts(make, size):
    model, params = some()
    other, weights = some(dataclasses.replace(SMALL, vocabulary=size))
    # the target's, without its last tokens or with more
    rows = torch.cat([params.embedding, 9 * params.embedding])[:size]
    weights = params._replace(embedding=rows)
    drafter = make(other, weights, vocabulary=24)
    prompt = torch.tensor([3, 23, 4, 22, 5, 9])  # with tokens that the smaller one lacks
    wanted = fa.generate(fa.key(0), model, params, prompt, steps=9)[0]
    got = speculate(fa.key(0), model, params, drafter, prompt, steps=9)[0]
    assert got.tokens.tolist() == wanted.tolist()
    assert int(got.stats.accepted) > 0
    with pytest.raises(ValueError, match=r"one of 2?3?0. .*drafters\.model\(\.\.\., vocabulary=24"):
        speculate(fa.key(0), model, params, make(other, weights), prompt, steps=4)


def thin(model, params, **options):
    return drafters.tree(drafters.model(model, params, **options), branching=(2, 1))


def test_probabilities_of_a_padded_drafter_are_those_of_the_tokens_that_both_have():
    for size in (20, 30):
        other, weights = some(dataclasses.replace(SMALL, vocabulary=size))
        drafter = drafters.model(
            other, weights, length=1, sampler=sampling.temperature(0.9), vocabulary=24
        )
        state = drafter.init(PROMPT, torch.tensor(8), 4)
        draft, _ = drafter.propose(fa.key(0), torch.tensor(7), state)
        rows = other.extend(weights, torch.cat([PROMPT, torch.tensor([7])]), ())[0][-1]
        wanted = (rows[:24] / 0.9).softmax(-1)
        assert draft.probs.shape == (1, 24)
        torch.testing.assert_close(draft.probs[0, : len(wanted)], wanted)
        assert float(draft.probs[0, len(wanted) :].sum()) == 0


def test_recurrent_models_are_drafted_for_by_chains():
    model, params = some(RECURRENT)
    chain = drafters.model(fa.decoder(RECURRENT), worse(params), length=3)
    wanted = fa.generate(fa.key(0), model, params, PROMPT, steps=9)[0]
    got = speculate(fa.key(0), model, params, chain, PROMPT, steps=9)[0]
    assert got.tokens.tolist() == wanted.tolist()
    with pytest.raises(TypeError, match=r"drafters\.tree: .*without recurrent layers"):
        drafters.tree(chain, branching=(2, 1))
    with pytest.raises(TypeError, match="speculate: drafter should be one of chains behind"):
        speculate(fa.key(0), model, params, drafters.suffix(), PROMPT, steps=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 1.5}, "confidence should be from 0 to 1"),
        ({"confidence": "high"}, "confidence should be from 0 to 1"),
        ({"confidence": float("nan")}, "confidence should be from 0 to 1"),
        ({"vocabulary": 0}, "vocabulary should be an int, at least 1"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(options, message):
    with pytest.raises(ValueError, match="drafters.model: " + message):
        drafters.model(*some(), **options)
