"""A kind of past of one's own is read by every verb that writes or scores texts, or refused; never
replaced by another.
"""

import ast
import re
from typing import NamedTuple

import pytest
import torch
from places import ROOT
from torch.func import vmap

import funcattn as fa
from funcattn import caches
from funcattn.records import record
from funcattn.testing import laws

REACH = 5
PAGE = ROOT / "docs" / "caches.md"


def registered(kind, **other):
    """A kind that wraps a past, `inner`, with some of the verbs otherwise."""
    verbs = {
        "capacity": lambda cache: caches.capacity(cache.inner),
        "sizes": lambda cache: caches.sizes(cache.inner),
        "overflowed": lambda cache: caches.overflowed(cache.inner),
        "grow": lambda cache, rows: kind(caches.grow(cache.inner, rows)),
        "with_length": lambda cache, length: kind(caches.with_length(cache.inner, length)),
        "past": lambda cache, *given: caches.past(cache.inner, *given),
        "write": lambda cache, delta, n, donate: kind(caches.write(cache.inner, delta, n, donate)),
    } | other
    for verb, function in verbs.items():
        getattr(caches, verb).register(kind, function)
    return kind


def wrapping(name, inner=fa.Cache):
    made = record(NamedTuple(name, [("inner", object)]))
    made.length = property(lambda cache: cache.inner.length)
    made.empty = classmethod(lambda cls, *sizes: cls(inner.empty(*sizes)))
    return made


def near(cache, layer, places, window=None):
    return caches.past(cache.inner, layer, places, min(REACH, window or REACH))


Near = registered(wrapping("Near"), past=near)  # each token sees the last five tokens only
MODEL = fa.decoder(fa.Config(vocabulary=16))
PARAMS = fa.tree.map(lambda weight: 3 * weight, MODEL.init(fa.key(1)))
PROMPT = torch.tensor([1, 2, 3])
STEPS = 12


def room(kind=Near):
    return MODEL.cache(32, kind=kind)


def along(text, cache):
    """Log-probabilities of each token of a text behind the prompt, token by token."""
    logits, cache = MODEL.apply(PARAMS, PROMPT, cache)
    found = []
    for token in text:
        found.append(logits[-1].log_softmax(-1)[token])
        logits, cache = MODEL.apply(PARAMS, token[None], cache)
    return torch.stack(found)


def by_hand(kind):
    logits, cache = MODEL.apply(PARAMS, PROMPT, room(kind))
    tokens = []
    for _ in range(STEPS):
        tokens.append(int(logits[-1].argmax()))
        logits, cache = MODEL.apply(PARAMS, torch.tensor(tokens[-1:]), cache)
    return tokens


@pytest.mark.parametrize("law", laws.cache, ids=lambda law: law.__name__)
def test_a_kind_that_wraps_another_keeps_every_law(law):
    law(Near, REACH - 1, fa.key(0))


def test_every_verb_writes_what_a_loop_over_apply_writes_and_not_what_a_dense_past_would():
    wanted = by_hand(Near)
    assert wanted != by_hand(fa.Cache)
    tokens, past = fa.generate(fa.key(0), MODEL, PARAMS, PROMPT, room(), steps=6)
    more = fa.generate(fa.key(0), MODEL, PARAMS, tokens[-1:], past, steps=STEPS - 6)[0]
    assert [*tokens.tolist(), *more.tolist()] == wanted
    assert list(fa.stream(fa.key(0), MODEL, PARAMS, PROMPT, room(), steps=STEPS))[
        -1
    ].tokens == tuple(wanted)
    weights = fa.quantize(fa.int8, r"layers.*\.(q|k|v|o|gate|up|down)")(PARAMS)
    for drafter in (
        fa.drafters.prompt_lookup(length=2),
        fa.drafters.model(MODEL, weights, length=2),
    ):
        assert (
            fa.speculate(fa.key(0), MODEL, PARAMS, drafter, PROMPT, room(), steps=STEPS)[
                0
            ].tokens.tolist()
            == wanted
        )
    compiled = fa.compile(MODEL, backend="eager")
    assert (
        fa.generate(fa.key(0), compiled, PARAMS, PROMPT, room(), steps=STEPS)[0].tolist() == wanted
    )
    with pytest.raises(
        TypeError, match="step: cache should be a Cache, or a Branch of such, got a Near"
    ):
        compiled.step(PARAMS, PROMPT, room())
    rows = vmap(lambda key: fa.generate(key, MODEL, PARAMS, PROMPT, room(), steps=STEPS)[0])(
        fa.split(fa.key(2), 2)
    )
    assert rows.tolist() == [wanted, wanted]


@pytest.mark.parametrize(
    "kind",
    [Near, caches.ring(window=3, tail=2), caches.ring(window=7, tail=2)],
    ids=["Near", "3", "7"],
)
def test_a_draft_longer_than_a_past_remembers_is_verified_token_by_token(kind):
    draft, size = torch.tensor([3, 9, 14, 2, 7, 11, 5]), {"atol": 1e-4, "rtol": 1e-4}
    past = MODEL.apply(PARAMS, PROMPT, room(kind))[1]
    logits, delta = fa.transformer.along(MODEL, PARAMS, draft, past)
    after, wanted = past, []
    for token in draft:
        one, after = MODEL.apply(PARAMS, token[None], after)
        wanted.append(one[0])
    torch.testing.assert_close(logits, torch.stack(wanted), **size)
    kept = caches.commit(past, delta, 4)
    torch.testing.assert_close(MODEL.extend(PARAMS, draft[4:5], kept)[0][0], wanted[4], **size)


def test_beams_and_scores_are_those_of_the_texts_token_by_token():
    found = fa.beam_search(MODEL, PARAMS, PROMPT, room(), steps=STEPS, beams=3, best=3)
    for text, score in zip(found.tokens, found.scores, strict=True):
        torch.testing.assert_close(score, along(text, room()).mean(), atol=1e-4, rtol=1e-4)
    text = found.tokens[0]
    scores = fa.evaluation.score_continuation(MODEL, PARAMS, PROMPT, text, room())
    torch.testing.assert_close(scores, along(text, room()), atol=1e-4, rtol=1e-4)
    best = fa.search.best_of(
        fa.key(0),
        MODEL,
        PARAMS,
        PROMPT,
        room(),
        n=2,
        steps=STEPS,
        sampler=fa.sampling.temperature(1.0),
    )
    torch.testing.assert_close(
        best.scores[0], along(best.tokens[0], room()).mean(), atol=1e-4, rtol=1e-4
    )


def test_a_model_over_a_grid_refuses_a_kind_that_it_cannot_cut():
    model = fa.sharding.shard_map(MODEL, fa.sharding.Grid(tensor=2))
    with pytest.raises(
        TypeError, match="cache should be a Cache, or a Branch of such, over a Grid, got a Near"
    ):
        model.apply(PARAMS, PROMPT, room())


def test_the_kind_of_the_page_keeps_its_laws():
    names = {"__name__": "page"}
    for block in page().split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "caches.md", "exec"), names)
    Evicting = names["Evicting"]
    evicted = MODEL.cache(4, kind=Evicting)
    tokens, past = fa.generate(fa.key(0), MODEL, PARAMS, PROMPT, evicted, steps=STEPS)
    assert (type(past), past.k.shape[-2]) == (Evicting, 4)
    torch.testing.assert_close(
        along(tokens, evicted),
        fa.evaluation.score_continuation(MODEL, PARAMS, PROMPT, tokens, evicted),
    )


def page():
    return PAGE.read_text().split("## A kind of your own")[1]


def test_the_kind_of_the_page_uses_public_names_alone():
    nodes = [
        node
        for block in page().split("```python\n")[1:]
        for node in ast.walk(ast.parse(block.split("```")[0]))
    ]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    assert [node.attr for node in attributes if node.attr.startswith("_")] == []
    of_caches = {
        node.attr
        for node in attributes
        if isinstance(node.value, ast.Name) and node.value.id == "caches"
    }
    assert of_caches
    assert of_caches <= set(caches.__all__)


def test_the_page_names_every_verb_that_a_kind_registers_with():
    verbs = {name for name in caches.__all__ if hasattr(getattr(caches, name), "register")}
    assert set(re.findall(r"^\| `(\w+)\(", page(), re.MULTILINE)) == verbs


def dense_tail(cache, delta, size):
    return caches.Branch(cache, caches.fork((), delta, size))


SEEDED = {
    "a dense tail": registered(wrapping("DenseTail"), past=near, fork=dense_tail),
    "another kind": registered(
        wrapping("Another"), past=near, write=lambda cache, *rest: caches.write(cache.inner, *rest)
    ),
    "a slot that is not emptied": registered(
        wrapping("NotEmptied"), reset=lambda cache, empty, where: cache
    ),
}


@pytest.mark.parametrize("kind", SEEDED.values(), ids=SEEDED)
def test_a_seeded_bug_is_caught_by_the_law_of_texts(kind):
    with pytest.raises((AssertionError, TypeError, ValueError)) as caught:
        laws.texts.every_verb_writes_what_a_loop_over_apply_writes(kind, REACH - 1, fa.key(0))
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "every_verb_writes_what_a_loop_over_apply_writes" in told


def test_a_record_that_is_derived_from_another_is_refused_rather_than_written_as_that_one():
    class Derived(fa.Cache):
        pass

    cache = Derived(*room(fa.Cache))
    assert not caches.keeps_all(cache)
    with pytest.raises(
        TypeError, match="commit: what write returns should be a Derived as the past, got a Cache"
    ):
        MODEL.apply(PARAMS, PROMPT, cache)
    Bare = wrapping("Bare")
    with pytest.raises(
        TypeError, match="capacity: cache should be a past such as Cache or Branch, got a Bare"
    ):
        fa.generate(fa.key(0), MODEL, PARAMS, PROMPT, Bare(room(fa.Cache)), steps=1)


@pytest.mark.parametrize("wrong", [(), "cache", None])
def test_what_is_no_cache_is_told_by_the_verb(wrong):
    with pytest.raises(TypeError, match="overflowed: cache should be a past"):
        fa.caches.overflowed(wrong)
