"""Samplers with a state along a draft are what they are one token after another."""

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn import sampling, tree
from funcattn.sampling import chain, greedy, law, mirostat, repetition_penalty, temperature
from funcattn.speculation import accept, accept_greedy, log_probs_along_draft, select_state

V, N = 6, 3
SAMPLERS = [
    chain(),
    greedy,
    chain(
        repetition_penalty(1.5),
        sampling.frequency_penalty(0.4),
        temperature(0.8),
        sampling.top_p(0.9),
    ),
    chain(sampling.dry(window=8), sampling.no_repeat_ngram(2, window=8), sampling.xtc(0.5, 0.1)),
    chain(sampling.automaton(torch.arange(V).expand(V, V)), mirostat(1.5, 0.3)),
]


def drafted(seed=0):
    keys = fa.split(fa.key(seed))
    return 2 * fa.random.normal(keys[0], (N + 1, V), torch.float64), fa.random.randint(
        keys[1], (N,), 0, V
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_laws_along_a_draft_are_those_of_one_token_after_another(sampler):
    logits, proposed = drafted()
    state = sampler.observe(torch.tensor(2), sampler.init(V))
    along = log_probs_along_draft(sampler, logits, proposed, state)
    for n in range(N + 1):
        assert torch.equal(along.log_probs[n], law(sampler)(logits[n], state))
        state = sampler.update(logits[n], state)[1]
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                tree.leaves(select_state(along.states, torch.tensor(n))),
                tree.leaves(state),
                strict=True,
            )
        )
        if n < N:
            state = sampler.observe(proposed[n], state)


@pytest.mark.parametrize("sampler", SAMPLERS[2:])
def test_rolling_back_is_as_if_the_rest_was_never_drafted(sampler):
    logits, proposed = drafted(1)
    state, other = sampler.init(V), torch.cat([proposed[:1], (proposed[1:] + 1) % V])
    one, two = (
        select_state(log_probs_along_draft(sampler, logits, d, state).states, torch.tensor(1))
        for d in (proposed, other)
    )
    for a, b in zip(tree.leaves(one), tree.leaves(two), strict=True):
        assert torch.equal(a, b)


def test_rows_of_a_batch_roll_back_on_their_own():
    sampler = SAMPLERS[2]
    logits, proposed = (
        torch.stack(x) for x in zip(*(drafted(seed) for seed in range(8)), strict=True)
    )
    uniform = torch.full((N, V), 1 / V, dtype=torch.float64)

    def step(key, logits, proposed, state):
        log_probs, states = log_probs_along_draft(sampler, logits, proposed, state)
        done = accept(key, log_probs.exp(), uniform, proposed)
        return done, sampler.observe(done.token, select_state(states, done.count))

    keys, start = fa.split(fa.key(3), 8), sampler.init(V)
    done, states = vmap(step, (0, 0, 0, None))(keys, logits, proposed, start)
    assert len(set(done.count.tolist())) > 1
    for i, after in enumerate(tree.unstack(states)):
        wanted = start
        for token in done.tokens[i][: int(done.count[i]) + 1]:
            wanted = sampler.observe(token, wanted)
        assert tree.allclose(after, wanted)


def test_a_row_too_few_is_an_error():
    logits, proposed = drafted()
    with pytest.raises(
        ValueError, match=r"log_probs_along_draft: logits should be \(N \+ 1, V\) with N = 3"
    ):
        log_probs_along_draft(chain(), logits[:N], proposed, ())


@pytest.mark.parametrize(
    "sampler", [greedy, chain(repetition_penalty(1.5), sampling.frequency_penalty(0.4), greedy)]
)
@pytest.mark.parametrize("valid", range(N + 1))
def test_matching_ids_is_accepting_one_hot_laws(sampler, valid):
    for seed in range(20):
        logits, proposed = drafted(seed)
        state, valid = sampler.observe(torch.tensor(2), sampler.init(V)), torch.as_tensor(valid)
        log_probs, states = log_probs_along_draft(sampler, logits, proposed, state)
        # some beginnings stay
        proposed = torch.where(torch.arange(N) < seed % (N + 1), log_probs.argmax(-1)[:N], proposed)
        log_probs, states = log_probs_along_draft(sampler, logits, proposed, state)
        wanted = accept(
            fa.key(0),
            log_probs.exp(),
            torch.nn.functional.one_hot(proposed, V).double(),
            proposed,
            valid,
        )
        found, found_states = accept_greedy(sampler, logits, proposed, valid, state)
        assert found.tokens.tolist() == wanted.tokens.tolist()
        assert (int(found.count), int(found.token)) == (int(wanted.count), int(wanted.token))
        assert tree.allclose(found_states, states, atol=0, rtol=0)
