"""Patched models: every verb under vmap over strengths of a steering vector, compiled ones too."""

import functools

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import drafters, serving

CONFIG = fa.Config(
    vocabulary=16, width=8, layers=2, heads=2, kv_heads=2, head_size=4, feed_forward=8
)
MODEL = fa.decoder(CONFIG)
PARAMS = fa.tree.map(lambda x: 8 * x if x.dim() == 2 else x, MODEL.init(fa.key(0)))
PROMPT = torch.tensor([1, 2, 3, 1, 2])
PAST = MODEL.apply(PARAMS, torch.tensor([4, 5]), MODEL.cache(16))[1]
DIRECTION = torch.linspace(-1, 1, 8)
STRENGTHS = torch.tensor([0.0, 3.0, -6.0])
FAST = fa.compile(MODEL, backend="eager")


def steered(model, strength):
    return fa.patched(model, {"layers.0.output": lambda x: x + strength * DIRECTION})


MODELS = {
    "plain": functools.partial(steered, MODEL),
    "of compiled": functools.partial(steered, FAST),
    "compiled": lambda strength: fa.compile(steered(MODEL, strength), backend="eager"),
}
VERBS = {
    "generate": lambda m: fa.generate(fa.key(1), m, PARAMS, PROMPT, steps=4)[0],
    "generate behind a past": lambda m: fa.generate(fa.key(1), m, PARAMS, PROMPT, PAST, steps=4)[0],
    "generate, drawn": lambda m: fa.generate(
        fa.key(1), m, PARAMS, PROMPT, steps=4, sampler=fa.sampling.temperature(1.0)
    )[0],
    "speculate": lambda m: (
        fa.speculate(fa.key(1), m, PARAMS, drafters.prompt_lookup(), PROMPT, steps=4)[0].tokens
    ),
    "drafted by the plain model": lambda m: (
        fa.speculate(fa.key(1), m, PARAMS, drafters.model(MODEL, PARAMS), PROMPT, steps=4)[0].tokens
    ),
    "beams": lambda m: fa.beam_search(m, PARAMS, PROMPT, steps=3, beams=2).tokens,
    "score": lambda m: fa.score(m, PARAMS, PROMPT),
    "apply": lambda m: m.apply(PARAMS, PROMPT, PAST)[0],
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("verb", VERBS)
def test_strengths_of_a_steering_vector_are_mapped(model, verb):
    run = lambda strength: VERBS[verb](MODELS[model](strength))
    each = torch.stack([run(strength) for strength in STRENGTHS])
    torch.testing.assert_close(vmap(run)(STRENGTHS), each, rtol=2e-5, atol=2e-5)
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(each[0], VERBS[verb](MODEL), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
def test_streams_and_served_texts_are_steered(model):
    def served(m):
        slots = serving.idle(m, PARAMS, m.cache(12), 2)
        slots = serving.enter(fa.key(1), m, PARAMS, PROMPT, slots, 1, steps=4)
        tokens = []
        for _ in range(4):
            step, slots = serving.step(m, PARAMS, slots)
            tokens.append(int(step.token[1]))
        return tokens

    m = MODELS[model](STRENGTHS[1])
    wanted = fa.generate(fa.key(1), steered(MODEL, STRENGTHS[1]), PARAMS, PROMPT, steps=4)[0]
    *_, last = fa.stream(fa.key(1), m, PARAMS, PROMPT, steps=4)
    assert list(last.tokens) == wanted.tolist() == served(m)
    assert wanted.tolist() != fa.generate(fa.key(1), MODEL, PARAMS, PROMPT, steps=4)[0].tolist()


@pytest.mark.parametrize("model", MODELS)
def test_a_score_has_a_gradient_in_the_strength(model):
    f = lambda strength: fa.score(MODELS[model](strength), PARAMS, PROMPT).sum()
    slope = grad(f)(STRENGTHS[1])
    torch.testing.assert_close(jvp(f, (STRENGTHS[1],), (torch.ones(()),))[1], slope)
    each = torch.stack([grad(f)(strength) for strength in STRENGTHS])
    torch.testing.assert_close(vmap(grad(f))(STRENGTHS), each, rtol=1e-4, atol=1e-5)
    h = 1e-2  # truncation h^2 of a slope near 0.1, rounding 1e-6 / h
    torch.testing.assert_close(
        slope, (f(STRENGTHS[1] + h) - f(STRENGTHS[1] - h)) / (2 * h), rtol=1e-2, atol=1e-3
    )


def test_a_compiled_patched_model_says_that_its_layers_run_eagerly():
    for model in (MODELS["compiled"](1.0), MODELS["of compiled"](1.0)):
        assert model.explain(PARAMS) == (
            "patched('layers.0.output') in the place of hidden, which is not compiled: "
            "layers run eagerly"
        )
    assert "_replace(hidden=" in FAST._replace(hidden=MODEL.hidden).explain(PARAMS)


@pytest.mark.slow
def test_a_patched_model_inside_torch_compile_is_an_error_with_its_remedy():
    f = torch.compile(lambda params: steered(MODEL, 1.0).extend(params, PROMPT)[0], backend="eager")
    with pytest.raises(ValueError, match=r"outside of torch\.compile"):
        f(PARAMS)
