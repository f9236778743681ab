"""Masks over the vocabulary: fixed ones, the minimal length, and states that every token moves."""

import itertools

import pytest
import torch
from torch.func import vmap
from transformers.generation import logits_process as theirs

import funcattn as fa
from funcattn.sampling import allowed_tokens, automaton, constrained, draw, law, min_new_tokens, prime, suppress_tokens
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
    state = prime(sampler, torch.tensor([1, 2, 3]), sampler.init(4))  # the prompt does not count
    other = theirs.MinNewTokensLengthLogitsProcessor(3, 2, 3, device=logits.device)
    text = [1, 2, 3]
    for token in (0, 1, 2):
        assert torch.equal(sampler.update(logits[0], state)[0], other(torch.tensor([text]), logits)[0])
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
    takes_turns = torch.full((2, V), -1).index_put((torch.tensor([0, 1]), torch.tensor([5, 9])), torch.tensor([1, 0]))
    one = lambda key: fa.generate(key, model, params, torch.tensor([1]), steps=4, sampler=automaton(takes_turns))[0]
    assert vmap(one)(fa.split(fa.key(1), 3)).tolist() == [[5, 9, 5, 9]] * 3


def test_a_grammar_whose_state_is_a_tree_keeps_the_laws_of_samplers():
    start = {"depth": torch.tensor(0), "last": torch.tensor(0)}  # brackets: 0 opens, 1 closes, 2 is text, 3 is text
    allowed = lambda s: (torch.arange(4) != 1) | (s["depth"] > 0)
    step = lambda token, s: {"depth": s["depth"] + (token == 0).long() - (token == 1).long(), "last": token}
    sampler = constrained(start, allowed, step)
    for rule in laws.sampler:
        rule(sampler, torch.tensor([0.3, 1.0, -0.5, 0.1]), fa.key(3))
        rule(min_new_tokens(3, (1,)), torch.tensor([0.3, 1.0, -0.5, 0.1]), fa.key(3))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: allowed_tokens("abc"), TypeError, "allowed_tokens: ids should be ints, or a bool tensor"),
        (lambda: law(allowed_tokens([7]))(torch.zeros(4)), ValueError, "below the vocabulary's 4"),
        (lambda: law(suppress_tokens([-1]))(torch.zeros(4)), ValueError, "below the vocabulary's 4"),
        (lambda: law(suppress_tokens(torch.ones(3, dtype=torch.bool)))(torch.zeros(4)), ValueError, "V = 4"),
        (lambda: min_new_tokens(-1, (0,)), ValueError, "n should be 0 or more"),
        (lambda: law(constrained((), lambda s: torch.ones(4), lambda t, s: s))(torch.zeros(4)), ValueError, "constrained: what"),
        (lambda: automaton([[0]]), TypeError, r"automaton: table should be int64 \(S, V\)"),
        (lambda: automaton(torch.tensor([[2]])), ValueError, r"in \[-1, S = 1\)"),
        (lambda: automaton(TABLE, 3), ValueError, r"start should be in \[0, S = 3\)"),
        (lambda: law(automaton(TABLE))(torch.zeros(4)), ValueError, "with V = 4 as the logits"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
