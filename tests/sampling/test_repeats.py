"""no_repeat_ngram against transformers, dry against the loop of its author's text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap
from transformers.generation import logits_process as theirs

import funcattn as fa
from funcattn.sampling import dry, law, no_repeat_ngram, observe_prompt
from funcattn.testing import laws, strategies

V = 5
TOKENS = st.lists(st.integers(0, V - 1), min_size=1, max_size=24)


@given(TOKENS, st.integers(1, 4))
def test_no_repeat_ngram_hides_what_transformers_hides(tokens, n):
    sampler, logits = no_repeat_ngram(n, window=24), fa.random.normal(fa.key(0), (V,))
    got = sampler.update(logits, observe_prompt(sampler, torch.tensor(tokens), sampler.init(V)))[0]
    assert torch.equal(
        got, theirs.NoRepeatNGramLogitsProcessor(n)(torch.tensor([tokens]), logits[None].clone())[0]
    )


@given(TOKENS, st.integers(2, 6))
def test_what_left_the_window_is_forgotten(tokens, window):
    sampler, logits = no_repeat_ngram(2, window=window), torch.zeros(V)
    got = sampler.update(logits, observe_prompt(sampler, torch.tensor(tokens), sampler.init(V)))[0]
    wanted = theirs.NoRepeatNGramLogitsProcessor(2)(
        torch.tensor([tokens[-window:]]), logits[None].clone()
    )[0]
    assert torch.equal(got, wanted)


def naive_dry(logits, text, multiplier, base, allowed, breakers, longest):
    """The loop of text-generation-webui's DRYLogitsProcessor."""
    logits, best = list(logits), {}
    if not text or text[-1] in breakers:
        return logits
    for i in [i for i in range(len(text) - 1) if text[i] == text[-1]]:
        follower = text[i + 1]
        if follower in breakers:
            continue
        length = 1
        while length < longest:
            j = i - length
            if j < 0:
                break
            previous = text[-(length + 1)]
            if text[j] != previous or previous in breakers:
                break
            length += 1
        best[follower] = max(length, best.get(follower, 0))
    for token, length in best.items():
        if length >= allowed:
            logits[token] -= multiplier * base ** (length - allowed)
    return logits


@given(
    TOKENS, st.sampled_from([(), (0,), (0, 3)]), st.integers(1, 3), st.integers(1, 9), st.booleans()
)
def test_dry_is_the_loop_over_the_text(tokens, breakers, allowed, longest, at_once):
    sampler = dry(
        0.8, base=1.75, allowed_length=allowed, breakers=breakers, window=24, longest=longest
    )
    logits, state = fa.random.normal(fa.key(1), (V,), torch.float64), sampler.init(V)
    if at_once:
        state = observe_prompt(sampler, torch.tensor(tokens), state)
    else:
        for token in tokens:
            state = sampler.observe(torch.tensor(token), state)
    wanted = torch.tensor(
        naive_dry(logits.tolist(), tokens, 0.8, 1.75, allowed, breakers, longest),
        dtype=torch.float64,
    )
    torch.testing.assert_close(sampler.update(logits, state)[0], wanted)


@settings(max_examples=10)
@given(strategies.logits(), strategies.keys())
def test_both_keep_the_laws_of_samplers(logits, key):
    for sampler in (dry(window=6), no_repeat_ngram(3, window=6)):
        for rule in laws.sampler:
            if rule is not laws.samplers.draws_follow_the_law:
                rule(sampler, logits, key)


def test_both_are_the_same_under_vmap_and_compile():
    texts, logits = fa.random.randint(fa.key(4), (6, 20), 0, V), torch.zeros(V)
    for sampler in (dry(window=16), no_repeat_ngram(2, window=16)):
        one = lambda text, sampler=sampler: sampler.update(
            logits, observe_prompt(sampler, text, sampler.init(V))
        )[0]
        wanted = torch.stack([one(text) for text in texts])
        assert torch.equal(vmap(one)(texts), wanted)
        assert torch.equal(torch.compile(one, fullgraph=True, backend="eager")(texts[0]), wanted[0])


def test_with_no_history_nothing_is_changed_and_all_hidden_is_loud():
    logits = fa.random.normal(fa.key(0), (V,))
    for sampler in (dry(), no_repeat_ngram(1), no_repeat_ngram(3)):
        assert torch.equal(sampler.update(logits, sampler.init(V))[0], logits)
    sampler = no_repeat_ngram(1)
    state = observe_prompt(sampler, torch.arange(V), sampler.init(V))
    assert law(sampler)(logits, state).isnan().all()
    with pytest.raises(ValueError, match="nothing to draw from"):
        fa.sampling.draw(fa.key(0), sampler, logits, state)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: no_repeat_ngram(0), ValueError, "no_repeat_ngram: n should be at least 1"),
        (lambda: no_repeat_ngram(2.0), TypeError, "an int, which sets shapes"),
        (lambda: no_repeat_ngram(4, window=3), ValueError, "window should be at least n = 4"),
        (lambda: dry(-1.0), ValueError, "dry: multiplier should be 0 or more"),
        (lambda: dry(base=0.5), ValueError, "base should be at least 1"),
        (lambda: dry(allowed_length=0), ValueError, "allowed_length should be at least 1"),
        (lambda: dry(window=1), ValueError, "window should be at least 2"),
        (lambda: dry(longest=0), ValueError, "longest should be at least 1"),
        (lambda: dry(breakers=["\n"]), TypeError, "Encode strings with the tokenizer"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
