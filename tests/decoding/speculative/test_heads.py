"""Trained heads draft with what they hear of the target; their weights cost no law."""

import pytest
import torch
from torch.func import vmap
from trained_heads import IDS, LAYER, PROMPT, TAPS, E, V, plainly, some_head, target

import funcattn as fa
from funcattn import drafters, sampling
from funcattn.decoding.speculative import heads
from funcattn.speculation import speculate

HEADS = {
    "eagle3": {"kind": "eagle3"},
    "eagle3, norm first": {"kind": "eagle3", "before": True, "seed": 2},
    "eagle3, a part of the vocabulary": {"kind": "eagle3", "ids": IDS},
    "mtp": {"kind": "mtp"},
}


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_a_plain_implementation(name):
    head, params = some_head(**HEADS[name])
    tokens = torch.tensor([1, 4, 1, 5, 9])
    width = 3 * E if head.kind == "eagle3" else E
    features = fa.random.normal(fa.key(5), (5, width), torch.float64)
    x, _ = heads.hidden(head, params, tokens, heads.carried(head, params, features))
    got = heads.logits(head, params, x)
    torch.testing.assert_close(got, plainly(head, params, tokens, features)[0])


def features_of(model, params, head, text):
    found = {}
    with fa.taps.listening(lambda name, x: found.setdefault(name, x)):
        model.hidden(params, text)
    return torch.cat([found[name] for name in head.taps], -1)


@pytest.mark.parametrize("name", HEADS)
def test_a_draft_is_what_the_head_says_of_the_whole_text(name):
    """Three rounds: the pairs that were kept were read with the target's features."""
    model, weights = target()
    head, params = some_head(**HEADS[name])
    drafter = drafters.head(head, params, length=2)
    text, n = PROMPT, len(PROMPT)
    state = drafter.init(PROMPT, torch.tensor(n), 12, features_of(model, weights, head, PROMPT))
    last = torch.tensor(7)
    for count in (1, 3, 2):
        draft, state = drafter.propose(fa.key(0), last, state)
        text = torch.cat([text, last.reshape(1)])
        features = features_of(model, weights, head, text)[:-1]
        rows, x = plainly(head, params, text[1:], features)
        drafted = rows[-1].argmax().reshape(1)
        rows, _ = plainly(head, params, torch.cat([text[1:], drafted]), features, x[-1:])
        assert draft.tokens.tolist() == [int(drafted), int(rows[-1].argmax())]
        # whatever the target wrote; of it `count` tokens, with the features of those before each
        written = torch.cat([draft.tokens, torch.tensor([8])])[-3:]
        written = torch.where(torch.arange(3) < count, written, -1)
        longer = torch.cat([text, written.clamp(min=0)])
        seen = features_of(model, weights, head, longer)[len(text) - 1 : len(text) + 2]
        state = drafter.keep(written, torch.tensor(count), state, seen)
        text, last = torch.cat([text, written[: count - 1]]), written[count - 1]


@pytest.mark.parametrize(
    ("name", "branching"), [(name, None) for name in HEADS] + [("eagle3", (3, 2)), ("mtp", (2, 2))]
)
def test_under_greedy_the_tokens_are_those_of_generate(name, branching):
    model, weights = target()
    confidence = 0.4 if name == "eagle3" else 0.0
    drafter = drafters.head(*some_head(**HEADS[name]), length=3, confidence=confidence)
    drafter = drafter if branching is None else drafters.tree(drafter, branching=branching)
    prompts, lengths = torch.stack([PROMPT, PROMPT.flip(0)]), torch.tensor([8, 3])
    one = lambda p, n: speculate(fa.key(0), model, weights, drafter, p, steps=7, prompt_length=n)[0]
    rows = vmap(one)(prompts, lengths)
    for i in range(2):
        prompt = prompts[i, : lengths[i]]
        wanted = fa.generate(fa.key(0), model, weights, prompt, steps=7)[0].tolist()
        assert rows.tokens[i].tolist() == wanted
        alone = speculate(fa.key(0), model, weights, drafter, prompt, steps=7)[0]
        assert alone.tokens.tolist() == wanted
        assert int(alone.stats.rounds) == int(rows.stats.rounds[i])


@pytest.mark.slow
def test_a_head_that_draws_is_accepted_by_its_distribution():
    model, weights = target()
    drafter = drafters.head(
        *some_head("eagle3", ids=IDS), length=2, sampler=sampling.temperature(0.9)
    )
    one = lambda key: speculate(
        key, model, weights, drafter, PROMPT[:2], steps=2, sampler=sampling.temperature(2.0)
    )[0].tokens[1]
    plain = lambda key: fa.generate(
        key, model, weights, PROMPT[:2], steps=2, sampler=sampling.temperature(2.0)
    )[0][1]
    counts = [
        torch.bincount(vmap(f)(fa.split(fa.key(3), 600)), minlength=V).double()
        for f in (one, plain)
    ]
    both = counts[0] + counts[1]
    statistic = ((counts[0] - counts[1]) ** 2 / both.clamp(min=1)).sum()
    assert float(statistic) < 62  # chi-square with 19 degrees of freedom at 1 - 1e-6 is 61.4


def test_taps_that_the_target_lacks_are_an_error():
    model, weights = target()
    head, params = some_head("eagle3")
    far = drafters.Head("eagle3", LAYER, ("layers.9.output", *TAPS[1:]))
    with pytest.raises(ValueError, match=r"speculate: the tap layers\.9\.output should be heard"):
        speculate(fa.key(0), model, weights, drafters.head(far, params), PROMPT, steps=4)
    with pytest.raises(TypeError, match=r"drafters\.head: head, params should be a Head"):
        drafters.head(params, head)
    with pytest.raises(ValueError, match="Head: kind should be one of eagle3, mtp"):
        drafters.Head("medusa", LAYER, TAPS)
