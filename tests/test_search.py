"""Beams against every text there is and against transformers; the best of several samples; contrast
with a weaker model.
"""

import itertools

import pytest
import torch
import transformers
from samples import load
from torch.func import vmap

import funcattn as fa
from funcattn import sampling
from funcattn.search import beam_search, best_of, contrastive

TINY = fa.Config(vocabulary=4)
INF = float("inf")


def tiny(seed=0, scale=3.0):
    """A model whose texts differ in probability: 4 tokens, weights larger than at the start of
    training.
    """
    model = fa.decoder(TINY)
    params = fa.tree.cast(torch.float64)(fa.tree.map(lambda w: scale * w, model.init(fa.key(seed))))
    return model, params


def log_p(model, params, prompt, text):
    logits, _ = model.extend(params, torch.tensor([*prompt, *text[:-1]]), ())
    return float(
        logits[len(prompt) - 1 :].log_softmax(-1).gather(-1, torch.tensor(text)[:, None]).sum()
    )


def exhaustive(model, params, prompt, steps, stop, penalty):
    """Every text that ends at its first stop id, or after all steps, from the best."""
    texts = set()
    for text in itertools.product(range(TINY.vocabulary), repeat=steps):
        end = next((n + 1 for n, token in enumerate(text) if token in stop), steps)
        texts.add(text[:end])
    return sorted(
        ((log_p(model, params, prompt, text) / len(text) ** penalty, text) for text in texts),
        reverse=True,
    )


@pytest.mark.parametrize("stop", [(), (2,), (0, 3)], ids=str)
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_beams_enough_for_all_texts_find_the_best_ones(seed, penalty, stop):
    model, params = tiny(seed)
    prompt, steps = [1, 3], 4
    wanted = exhaustive(model, params, prompt, steps, stop, penalty)[:5]
    got = beam_search(
        *(model, params, torch.tensor(prompt)),
        steps=steps,
        beams=300,
        best=5,
        stop=stop,
        length_penalty=penalty,
        early_stop="never",
    )
    for row, score, length, (best, text) in zip(
        got.tokens, got.scores, got.lengths, wanted, strict=True
    ):
        assert tuple(row[:length].tolist()) == text
        assert set(row[length:].tolist()) <= {text[-1]}
        assert float(score) == pytest.approx(best, rel=1e-10)


def llama(seed):
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("early_stop", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 5])
def test_beams_find_what_transformers_finds(tmp_path, beams, penalty, early_stop):
    theirs = llama(0)
    theirs.save_pretrained(tmp_path)
    prompt, steps, stop = torch.tensor([3, 1, 4]), 8, (5, 9)
    loaded = load(tmp_path)
    model, params = fa.decoder(loaded.config), fa.cast(torch.float64)(loaded.params)
    options = {
        "num_beams": beams,
        "num_return_sequences": beams,
        "early_stopping": early_stop,
        "length_penalty": penalty,
    }
    wanted = theirs.generate(
        prompt[None],
        **options,
        max_new_tokens=steps,
        eos_token_id=list(stop),
        pad_token_id=16,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    got = beam_search(
        model,
        params,
        prompt,
        steps=steps,
        beams=beams,
        best=beams,
        stop=stop,
        length_penalty=penalty,
        early_stop=early_stop,
    )
    for row, length, text in zip(got.tokens, got.lengths, wanted.sequences, strict=True):
        text = text[3:].tolist()
        assert row[:length].tolist() == text[: int(length)]
        assert set(text[int(length) :]) <= {16}
    # theirs are float32
    torch.testing.assert_close(got.scores, wanted.sequences_scores.double(), rtol=1e-5, atol=0)


def test_one_beam_is_greedy_and_more_are_no_worse():
    model, params = tiny(4)
    prompt = torch.tensor([1, 2, 0])
    one = beam_search(model, params, prompt, steps=6, beams=1, length_penalty=0.0)
    assert (
        one.tokens[0].tolist() == fa.generate(fa.key(0), model, params, prompt, steps=6)[0].tolist()
    )
    many = beam_search(model, params, prompt, steps=6, beams=64, length_penalty=0.0)
    assert float(many.scores[0]) >= float(one.scores[0])


def test_prompts_of_a_batch_and_a_past_that_is_given_change_nothing():
    model, params = tiny(2)
    prompts = torch.tensor([[1, 2, 3], [0, 0, 2], [3, 1, 1]])
    search = lambda prompt, cache=(): beam_search(
        model, params, prompt, cache, steps=5, beams=3, best=2, stop=(2,)
    )
    rows = vmap(search)(prompts)
    for i, prompt in enumerate(prompts):
        one = search(prompt)
        assert torch.equal(rows.tokens[i], one.tokens)
        torch.testing.assert_close(rows.scores[i], one.scores)
        cache = model.apply(params, prompt[:2], model.cache(8, dtype=torch.float64))[1]
        behind = search(prompt[2:], cache)
        assert torch.equal(behind.tokens, one.tokens)
        torch.testing.assert_close(behind.scores, one.scores)
        assert int(cache.length) == 2


def test_each_beam_has_the_state_of_its_sampler():
    model, params = tiny(3)
    prompt = [1]
    got = beam_search(
        *(model, params, torch.tensor(prompt)),
        steps=3,
        beams=40,
        best=40,
        sampler=sampling.no_repeat_ngram(1, window=8),
        length_penalty=0.0,
    )
    found = {
        tuple(row.tolist())
        for row, score in zip(got.tokens, got.scores, strict=True)
        if score > -INF
    }
    # nothing twice, and not the prompt's token
    assert found == set(itertools.permutations([0, 2, 3]))
    assert int((got.scores == -INF).sum()) == 34


def test_the_prompt_is_stored_once():
    model, params = tiny(0)
    prompt = torch.zeros(60, dtype=torch.int64)
    rows = []
    hidden = model.hidden

    def spy(params, tokens, cache=(), **more):
        if isinstance(cache, fa.Branch):
            rows.append(
                (
                    cache.prefix.k.shape,
                    cache.tail.k.shape,
                    torch._C._functorch.is_batchedtensor(cache.prefix.k),
                )
            )
        return hidden(params, tokens, cache, **more)

    beam_search(model._replace(hidden=spy), params, prompt, steps=4, beams=3)
    assert rows
    for prefix, own, mapped in rows:
        assert prefix[2] >= 60  # 59 tokens and a scratch row, rounded up or not
        # 4 steps and a scratch row; the prompt is not mapped over beams
        assert (own[2], mapped) == (5, False)


def test_the_best_of_several_samples_is_what_generate_writes():
    model, params = tiny(5)
    prompt, stop, n = torch.tensor([1, 3]), (2,), 6
    options = {
        "steps": 5,
        "sampler": sampling.chain(sampling.repetition_penalty(1.2), sampling.temperature(0.9)),
        "stop": stop,
    }
    got = best_of(fa.key(1), model, params, prompt, n=n, **options)
    single = [
        fa.generate(key, model, params, prompt, **options)[0].tolist()
        for key in fa.split(fa.key(1), n)
    ]
    assert sorted(got.tokens.tolist()) == sorted(single)
    assert got.scores.tolist() == sorted(got.scores.tolist(), reverse=True)
    for row, length, score in zip(
        got.tokens.tolist(), got.lengths.tolist(), got.scores.tolist(), strict=True
    ):
        assert length == next((i + 1 for i, token in enumerate(row) if token in stop), 5)
        # scored in float32
        assert score == pytest.approx(log_p(model, params, [1, 3], row[:length]) / length, rel=1e-5)
    few = best_of(
        fa.key(1),
        model,
        params,
        prompt,
        n=n,
        score=lambda tokens: (tokens == 3).sum().float(),
        **options,
    )
    assert few.scores[0] == max(row.count(3) for row in single)


def test_contrast_is_the_difference_of_two_models():
    model, params = tiny(6)
    weak = tiny(7)[1]
    prompt, steps, alpha, beta = [1, 2], 5, 0.1, 0.5
    logits, past = model.apply(weak, torch.tensor(prompt), model.cache(16, dtype=torch.float64))
    sampler = sampling.chain(
        contrastive(model, weak, past, logits[-1], alpha=alpha, beta=beta), sampling.greedy
    )
    tokens, _ = fa.generate(
        fa.key(0), model, params, torch.tensor(prompt), steps=steps, sampler=sampler
    )
    written = []
    for _ in range(steps):
        expert, amateur = (
            model.extend(p, torch.tensor(prompt + written), ())[0][-1].log_softmax(-1)
            for p in (params, weak)
        )
        score = torch.where(
            expert.exp() >= alpha * expert.exp().max(), (1 + beta) * expert - beta * amateur, -INF
        )
        written.append(int(score.argmax()))
    assert tokens.tolist() == written


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"beams": 0}, ValueError, "beam_search: beams should be an int, at least 1, got 0"),
        ({"best": 9}, ValueError, "best should be at most the 4 beams, got 9"),
        ({"steps": 0}, ValueError, "steps should be an int, at least 1"),
        ({"early_stop": "soon"}, ValueError, 'early_stop should be True, False or "never"'),
        ({"stop": "end"}, TypeError, "stop should be ids as ints"),
        ({"prompt": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "one sequence"),
        ({"prompt": torch.zeros(0, dtype=torch.int64)}, ValueError, "T at least 1"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(options, kind, message):
    model, params = tiny()
    given = {"prompt": torch.tensor([1]), "steps": 2} | options
    with pytest.raises(kind, match=message):
        beam_search(model, params, given.pop("prompt"), **given)
    with pytest.raises(ValueError, match="best_of: n should be an int, at least 1"):
        best_of(fa.key(0), model, params, torch.tensor([1]), n=0, steps=2, sampler=sampling.greedy)


# Grammars that allow fewer tokens than there are beams.

NARROW = fa.decoder(fa.Config(vocabulary=8, layers=1))
WEIGHTS = NARROW.init(fa.key(0))
STOP = 7
TABLE = torch.full((4, 8), -1)  # 3, then 4 or 5, then 6, then 7, behind which nothing may follow
TABLE[0, 3], TABLE[1, 4], TABLE[1, 5], TABLE[2, 6], TABLE[3, STOP] = 1, 2, 2, 3, 3
GRAMMATICAL = [(3, 4, 6, STOP), (3, 5, 6, STOP)]


def grammatical_log_p(prompt, text):
    """Of a text under the model and the grammar, token by token."""
    total, state = 0.0, 0
    for n, token in enumerate(text):
        logits = NARROW.extend(WEIGHTS, torch.tensor([*prompt, *text[:n]]), ())[0][-1]
        total += float(logits.masked_fill(TABLE[state] < 0, -INF).log_softmax(-1)[token])
        state = int(TABLE[state, token])
    return total


def narrow(prompt, beams, best, table=TABLE, stop=(STOP,), steps=4, cache=(), **more):
    sampler = sampling.automaton(table)
    return beam_search(
        NARROW,
        WEIGHTS,
        prompt,
        cache,
        steps=steps,
        beams=beams,
        best=best,
        stop=stop,
        sampler=sampler,
        **more,
    )


@pytest.mark.parametrize("beams", [1, 2, 3, 4, 20])
def test_every_text_with_a_finite_score_is_grammatical_and_more_beams_never_lose_the_best(beams):
    wanted = sorted(GRAMMATICAL, key=lambda text: grammatical_log_p([1, 2], text), reverse=True)
    found = narrow(torch.tensor([1, 2]), beams, beams)
    assert found.scores.isfinite().tolist() == [n < min(2, beams) for n in range(beams)]
    for row, score, text in zip(found.tokens, found.scores, wanted, strict=False):
        assert tuple(row.tolist()) == text
        assert float(score) == pytest.approx(grammatical_log_p([1, 2], text) / 4, abs=1e-5)
    rest = found.scores == -INF
    assert not found.tokens[rest].any()
    assert not found.lengths[rest].any()


def test_narrow_beams_of_many_prompts_are_vmap():
    prompts = torch.tensor([[1, 2], [2, 5]])
    found = vmap(lambda prompt: narrow(prompt, 3, 2))(prompts)
    for row, prompt in zip(found.tokens, prompts.tolist(), strict=True):
        wanted = sorted(
            GRAMMATICAL,
            key=lambda text, prompt=prompt: grammatical_log_p(prompt, text),
            reverse=True,
        )
        assert [tuple(text) for text in row.tolist()] == wanted
    assert found.scores.isfinite().all()


@pytest.mark.parametrize("early_stop", [False, True, "never"])
def test_a_beam_in_a_dead_end_gives_way_and_beams_that_all_end_there_are_no_texts(early_stop):
    table = torch.full((3, 8), -1)
    table[0, 2], table[0, 3], table[1, 4] = 2, 1, 1  # behind 2 nothing may follow
    found = narrow(torch.tensor([1, 2]), 2, 2, table, (), 3, early_stop=early_stop)
    assert found.tokens.tolist() == [[3, 4, 4], [0, 0, 0]]
    assert found.scores.isfinite().tolist() == [True, False]
    table[1, 4] = -1
    found = vmap(lambda prompt: narrow(prompt, 2, 2, table, (), 3, early_stop=early_stop))(
        torch.tensor([[1, 2], [2, 5]])
    )
    assert (found.scores == -INF).all()
    assert not found.lengths.any()


@pytest.mark.parametrize("more", ["guidance", "xtc", "NaN of what is left"])
def test_what_follows_a_grammar_in_a_chain_makes_no_text_of_a_dead_end(more):
    logits, past = NARROW.apply(WEIGHTS, torch.tensor([1]), NARROW.cache(8))
    after = {
        "guidance": sampling.guidance(1.0, NARROW, WEIGHTS, past, logits[-1]),
        "xtc": sampling.xtc(0.0),
        "NaN of what is left": sampling.stateless(lambda x: x.log_softmax(-1)),
    }[more]
    sampler = sampling.chain(sampling.automaton(TABLE), after)
    prompt = torch.tensor([1, 2])
    found = beam_search(
        NARROW, WEIGHTS, prompt, steps=4, beams=4, best=3, stop=(STOP,), sampler=sampler
    )
    wanted = narrow(prompt, 4, 3)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    torch.testing.assert_close(found.scores, wanted.scores)


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_beams_on_numbers_that_are_none_are_an_error_and_not_a_ranking(bad):
    spoil = sampling.stateless(lambda logits: logits.index_fill(-1, torch.tensor(3), bad))
    with pytest.raises(
        ValueError, match="what the sampler leaves in step 0 should be numbers or -inf"
    ):
        beam_search(NARROW, WEIGHTS, torch.tensor([1, 2]), steps=2, sampler=spoil)
    nan = WEIGHTS._replace(norm=torch.full_like(WEIGHTS.norm, float("nan")))
    with pytest.raises(ValueError, match="the logits of step 0 should be numbers, got NaN"):
        beam_search(NARROW, nan, torch.tensor([1, 2]), steps=2)
    with pytest.raises(ValueError, match="length_penalty should be a number for which 3"):
        beam_search(NARROW, WEIGHTS, torch.tensor([1, 2]), steps=3, length_penalty=1e4)


def test_a_score_that_is_nan_ranks_last_and_one_of_another_form_is_an_error():
    options = {"n": 4, "steps": 2, "sampler": sampling.temperature(2.0)}
    rate = lambda tokens: torch.where(tokens[0] % 2 == 0, float("nan"), tokens[0].float())
    found = best_of(fa.key(0), NARROW, WEIGHTS, torch.tensor([1, 2]), score=rate, **options)
    odd = int((found.tokens[:, 0] % 2).sum())
    assert 0 < odd < 4
    assert found.scores[:odd].isfinite().all()
    assert found.scores[odd:].isnan().all()
    with pytest.raises(TypeError, match="what score returns should be a tensor"):
        best_of(
            fa.key(0), NARROW, WEIGHTS, torch.tensor([1, 2]), score=lambda tokens: 1.0, **options
        )


def test_beams_behind_a_ring_read_the_ring():
    model, params = tiny(3)
    prompt, steps = torch.tensor([1, 2, 0, 3]), 5
    empty = model.cache(0, kind=fa.caches.ring(window=3, tail=2), dtype=torch.float64)
    found = beam_search(model, params, prompt, empty, steps=steps, beams=3, best=3)
    for text, score in zip(found.tokens, found.scores, strict=True):
        past, total = model.apply(params, prompt[:-1], empty)[1], 0.0
        for last, token in zip(torch.cat([prompt[-1:], text[:-1]]), text, strict=True):
            logits, past = model.apply(params, last[None], past)
            total += float(logits[-1].log_softmax(-1)[token])
        assert float(score) == pytest.approx(total / steps, abs=1e-12)
    best = best_of(
        fa.key(1), model, params, prompt, empty, n=2, steps=steps, sampler=sampling.temperature(1.0)
    )
    past, total = model.apply(params, prompt[:-1], empty)[1], 0.0
    for last, token in zip(
        torch.cat([prompt[-1:], best.tokens[0, :-1]]), best.tokens[0], strict=True
    ):
        logits, past = model.apply(params, last[None], past)
        total += float(logits[-1].log_softmax(-1)[token])
    assert float(best.scores[0]) == pytest.approx(total / steps, rel=1e-5)  # scored in float32
