"""One text, one set of logits: rotary scalings that follow the length of a text, read in every way
there is.

The oracle is the text read whole, without a past, by this library in float64; and by transformers,
which reads it so too.
"""

import dataclasses
import itertools

import pytest
import torch
import transformers
from samples import load
from torch.func import grad, vmap

import funcattn as fa
from funcattn import caches, serving
from funcattn.caches import Branch, pages, quantized, ring
from funcattn.layers import RopeScaling
from funcattn.sharding import Grid, shard_map
from funcattn.transformer import cache_layers

BORDER, V = 12, 40
SHORT, LONG = (1.0, 1.1, 1.2, 1.3), (1.5, 4.0, 9.0, 20.0)
SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 4.0),
    "yarn": RopeScaling("yarn", 4.0, context=BORDER),
    "llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, BORDER),
    "dynamic": RopeScaling("dynamic", 4.0, context=BORDER),
    "longrope": RopeScaling("longrope", context=BORDER, short=SHORT, long=LONG),
}
FOLLOWING = ("dynamic", "longrope")
SIZES = {
    "vocabulary": V,
    "width": 16,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 8,
    "feed_forward": 24,
    "context": 200,
}
X = fa.random.randint(fa.key(1), (40,), 0, V)


def model_of(kind, **more):
    model = fa.decoder(fa.Config(**{**SIZES, "rope_scaling": SCALINGS[kind], **more}))
    return model, fa.tree.map(
        lambda x: (8 * x if x.dim() == 2 else x).double(), model.init(fa.key(0))
    )


def whole(model, params, x):
    return model.extend(params, x, ())[0]


def close(got, want, atol=1e-9):
    torch.testing.assert_close(got, want, atol=atol, rtol=atol)


def naive(model, params, x, steps):
    """Greedy, the whole text read for each token."""
    for _ in range(steps):
        x = torch.cat([x, whole(model, params, x)[-1:].argmax(-1)])
    return x[-steps:].tolist()


CACHES = {
    "dense": lambda model: model.cache(50, dtype=torch.float64),
    "pages": lambda model: model.cache(50, kind=pages(block=5), dtype=torch.float64),
    "ring": lambda model: model.cache(0, kind=ring(window=60, tail=3), dtype=torch.float64),
    "8 bits": lambda model: model.cache(
        50, kind=quantized(block=4, recent=40), dtype=torch.float64
    ),
    "branch": lambda model: Branch(
        model.cache(50, dtype=torch.float64), model.cache(50, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", SCALINGS)
def test_a_text_read_in_any_way_has_the_logits_of_the_whole(kind, cache):
    model, params = model_of(kind)
    for cuts in ((BORDER - 1, 1, 1, 9), (5, 20, 1), (BORDER + 5, 1, 3), (3, 4)):
        past, end = CACHES[cache](model), 0
        for n in cuts:
            end += n
            got, past = model.apply(params, X[end - n : end], past)
            close(got, whole(model, params, X[:end])[-n:])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "head_size"), [(300000, 4), (2, 2), (9, 32)])
def test_what_a_past_remembers_of_its_text_is_exact_in_every_dtype_and_in_codes(
    vocabulary, head_size, dtype, bits
):
    kind = {"rope_scaling": SCALINGS["dynamic"], "head_size": head_size, "vocabulary": vocabulary}
    model = fa.decoder(fa.Config(**{**SIZES, **kind}))
    config = dataclasses.replace(fa.Config(**SIZES), **kind)
    ids = fa.random.randint(fa.key(3), (20,), 0, vocabulary)
    past = model.cache(20, kind=quantized(bits=bits, block=4, recent=4), dtype=dtype)
    rows = (torch.zeros(2, 20, head_size, dtype=dtype),) * 2
    delta = fa.transformer.noted(config, caches.Delta(rows, rows), ids, torch.tensor(BORDER + 1))
    text = fa.transformer.lengths.remembered(config, caches.commit(past, delta))
    assert torch.equal(text.ids, ids)
    assert text.beyond.all()


@pytest.mark.parametrize("kind", FOLLOWING)
def test_generate_is_the_loop_that_reads_the_whole_text_for_each_token(kind):
    model, params = model_of(kind)
    drafter = fa.drafters.model(model, params, length=3)
    other = fa.drafters.model(*model_of(kind), length=3)
    lookup = fa.drafters.prompt_lookup(length=3)
    for n in (5, BORDER, 20):
        want = naive(model, params, X[:n], 12)
        made = lambda n=n, **options: fa.generate(
            fa.key(0), model, params, X[:n], steps=12, **options
        )[0].tolist()
        assert made() == made(chunk=4) == want
        *_, last = fa.stream(fa.key(0), model, params, X[:n], steps=12, chunk=7)
        assert list(last.tokens) == want
        for draft in (drafter, other, lookup):
            assert (
                fa.speculate(fa.key(0), model, params, draft, X[:n], steps=12)[0].tokens.tolist()
                == want
            )
        before = CACHES["pages"](model), CACHES["ring"](model), CACHES["branch"](model)
        for past in (model.apply(params, X[: n - 2], past)[1] for past in before):
            assert (
                fa.generate(fa.key(0), model, params, X[n - 2 : n], past, steps=12)[0].tolist()
                == want
            )


@pytest.mark.parametrize("kind", FOLLOWING)
def test_prompts_of_several_lengths_side_by_side_are_each_as_alone(kind):
    model, params = model_of(kind)
    lengths = torch.tensor([4, BORDER - 1, BORDER + 3, 25])
    rows = torch.stack([torch.where(torch.arange(25) < n, X[:25], 7) for n in lengths])
    go = lambda row, n: fa.generate(
        fa.key(0), model, params, row, steps=2, prompt_length=n, chunk=9
    )[0]
    got = vmap(go)(rows, lengths)
    for row, n in zip(got, lengths, strict=True):
        assert row.tolist() == naive(model, params, X[: int(n)], 2)
        assert go(rows[0], lengths[0]).tolist() == naive(model, params, X[:4], 2)
    seen = []
    look = fa.sampling.stateless(lambda logits: (seen.append(logits), logits)[1])
    for row, n in zip(rows, lengths, strict=True):
        fa.generate(fa.key(0), model, params, row, steps=1, prompt_length=n, chunk=9, sampler=look)
        close(seen[-1], whole(model, params, X[: int(n)])[-1])
    slots = serving.idle(model, params, model.cache(40, dtype=torch.float64), 2)
    for i, n in enumerate((BORDER - 2, 20)):
        slots = serving.enter(fa.key(i), model, params, X[:n], slots, i, steps=5, chunk=6)
    served = []
    for _ in range(5):
        one, slots = serving.step(model, params, slots)
        served.append(one.token)
    for i, n in enumerate((BORDER - 2, 20)):
        assert torch.stack(served)[:, i].tolist() == naive(model, params, X[:n], 5)


@pytest.mark.parametrize("kind", FOLLOWING)
def test_beams_search_among_whole_texts(kind):
    model, params = model_of(kind, vocabulary=3)
    x = X[: BORDER - 1] % 3
    found = fa.beam_search(model, params, x, steps=3, beams=27, best=2)
    score = lambda text: sum(
        whole(model, params, torch.cat([x, text[:i]]))[-1].log_softmax(-1)[text[i]]
        for i in range(len(text))
    )
    texts = [torch.tensor(text) for text in itertools.product(range(3), repeat=3)]
    order = sorted(texts, key=score, reverse=True)
    assert found.tokens.tolist() == [text.tolist() for text in order[:2]]
    close(3 * found.scores, torch.stack([score(text) for text in order[:2]]))  # a score is a mean


@pytest.mark.parametrize("kind", FOLLOWING)
def test_a_score_is_that_of_the_whole_text(kind):
    model, params = model_of(kind)
    for n in (BORDER, BORDER + 1, 30):
        logs = whole(model, params, X[:n]).log_softmax(-1)[:-1].gather(-1, X[1:n, None])[:, 0]
        close(fa.score(model, params, X[:n]), logs)
        past = fa.generate(fa.key(0), model, params, X[:5], steps=0)[1]
        close(fa.score_continuation(model, params, X[5:6], X[6:n], past), logs[5:])


@pytest.mark.parametrize("kind", FOLLOWING)
def test_packed_documents_are_each_as_alone(kind):
    model, params = model_of(kind)
    lengths = (5, BORDER + 6, 1, BORDER)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    x, documents = X[: len(segments)], fa.masks.segments(segments)
    mask = fa.masks.intersection(documents, fa.masks.causal(len(x)))
    places = torch.arange(len(x)) - documents.start.squeeze(-1)
    alone = torch.cat([whole(model, params, document) for document in x.split(lengths)])
    close(model.extend(params, x, (), mask=mask, positions=places)[0], alone)
    rows = torch.stack([x, x.flip(0)])
    close(model.extend(params, rows, (), mask=mask, positions=places.expand(2, -1))[0][0], alone)
    several = [document for document in x.split(lengths) if len(document) > 1]
    each = [float(fa.loss(model, params, document)) * (len(document) - 1) for document in several]
    assert float(fa.loss(model, params, x, segments=segments)) == pytest.approx(
        sum(each) / sum(len(d) - 1 for d in several)
    )


@pytest.mark.parametrize("kind", FOLLOWING)
def test_a_mask_and_the_place_in_a_tree_of_drafts_hold_in_a_text_that_is_read_again(kind):
    model, params = model_of(kind)
    past = model.apply(params, X[: BORDER - 1], model.cache(40, dtype=torch.float64))[1]
    # two tokens behind the first
    fork = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    depth = BORDER - 1 + torch.tensor([0, 1, 1])
    got, delta = model.extend(params, X[20:23], past, mask=fork, positions=depth)
    for end in (1, 2):
        text = torch.cat([X[: BORDER - 1], X[20:21], X[20 + end : 21 + end]])
        close(got[end], whole(model, params, text)[-1])
    after = caches.commit(past, delta, 2, index=torch.tensor([0, 2]))
    text = torch.cat([X[: BORDER - 1], X[20:21], X[22:23], X[30:31]])
    close(model.extend(params, X[30:31], after)[0], whole(model, params, text)[-1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_compiled_sharded_and_captured_steps_read_the_whole_text(kind):
    model, params = model_of(kind)
    quick = fa.compile(model, backend="eager")
    both = shard_map(model, Grid(tensor=2))
    for read in (4, BORDER - 1, 20):
        for used, given in ((quick, model), (both, both)):
            empty = given.cache(40, dtype=torch.float64)
            past = used.apply(params, X[:read], empty)[1]
            for n in (read, read + 1):
                got, past = used.apply(params, X[n : n + 1], past)
                close(got, whole(model, params, X[: n + 1])[-1:])
        past = model.apply(params, X[:read], model.cache(30, dtype=torch.float64))[1]
        step = torch.compile(
            lambda x, past: model.extend(params, x, past)[0], backend="eager", dynamic=False
        )
        close(step(X[read : read + 2], past), whole(model, params, X[: read + 2])[-2:])
    assert fa.generate(fa.key(0), quick, params, X[:9], steps=9)[0].tolist() == naive(
        model, params, X[:9], 9
    )


@pytest.mark.parametrize("kind", FOLLOWING)
def test_a_batch_behind_pasts_of_several_lengths_and_its_gradient_are_those_of_the_whole_texts(
    kind,
):
    model, params = model_of(kind)
    lengths = torch.tensor([3, BORDER, 20])
    pasts = [model.apply(params, X[:n], model.cache(30, dtype=torch.float64))[1] for n in lengths]
    stacked = fa.tree.map(lambda *x: torch.stack(x), *pasts)
    got = vmap(lambda past: model.extend(params, X[30:32], past)[0])(stacked)
    texts = [torch.cat([X[:n], X[30:32]]) for n in lengths]
    for row, text in zip(got, texts, strict=True):
        close(row, whole(model, params, text)[-2:])
    loss = lambda embedding, past: model.extend(
        params._replace(embedding=embedding), X[30:31], past
    )[0].sum()
    assert grad(loss)(params.embedding, pasts[1]).isfinite().all()


@pytest.mark.parametrize("kind", FOLLOWING)
def test_pads_and_drafts_of_a_wrapped_model_are_those_of_the_model(kind):
    model, params = model_of(kind)
    few = fa.sharding.candidates(model, 3)
    wrapped = (
        shard_map(few, Grid(tensor=2)),
        fa.compile(few, backend="eager"),
        model._replace(logits=model.logits),
    )
    rows = torch.stack(
        [torch.where(torch.arange(20) < n, X[:20], 7) for n in (BORDER - 1, BORDER + 3)]
    )
    for used in wrapped:
        go = lambda row, n, used=used: fa.generate(
            fa.key(0), used, params, row, steps=2, prompt_length=n, chunk=9
        )[0]
        for n, got in zip(
            (BORDER - 1, BORDER + 3),
            vmap(go)(rows, torch.tensor([BORDER - 1, BORDER + 3])),
            strict=True,
        ):
            assert got.tolist() == naive(model, params, X[:n], 2)
        draft = fa.drafters.model(used, params, length=3)
        got = fa.speculate(fa.key(0), used, params, draft, X[: BORDER - 2], steps=4)[0].tokens
        assert got.tolist() == naive(model, params, X[: BORDER - 2], 4)


def test_a_window_of_a_layer_is_kept_in_a_text_that_is_read_again():
    model, params = model_of("longrope", window=5, window_layers=(True, False))
    past = model.apply(params, X[: BORDER - 1], model.cache(40, dtype=torch.float64))[1]
    close(
        model.extend(params, X[BORDER - 1 : 16], past)[0],
        whole(model, params, X[:16])[BORDER - 1 :],
    )
    many = fa.tree.map(lambda x: torch.stack([x, x]), past)
    got = vmap(lambda past: model.extend(params, X[BORDER - 1 : 16], past)[0])(many)
    close(got[1], whole(model, params, X[:16])[BORDER - 1 :])


def test_beyond_the_context_longrope_is_read_again_once_and_within_it_never():
    model, params = model_of("longrope")
    heard = []
    with fa.taps.listening(lambda name, x: heard.append(len(x)) or x if name == "embedding" else x):
        fa.generate(fa.key(0), model, params, X[:6], steps=20)
    # the prompt, the step over the border, the past anew
    assert sorted(n for n in heard if n > 1) == [6, BORDER + 1, BORDER + 1]


def test_a_past_that_forgot_its_text_says_that_it_cannot_be_read_again():
    model, params = model_of("longrope")
    past = model.cache(0, kind=ring(window=4, tail=2), dtype=torch.float64)
    for i in range(BORDER):
        past = model.apply(params, X[i : i + 1], past)[1]
    with pytest.raises(
        ValueError, match=r"cache should be a past that holds all of its text where .* got a Ring"
    ):
        model.extend(params, X[BORDER : BORDER + 1], past)


def test_a_past_of_another_model_is_refused_by_its_layers():
    model, params = model_of("longrope")
    plain = model_of("none")[0].cache(20, dtype=torch.float64)
    assert cache_layers(fa.Config(**SIZES, rope_scaling=SCALINGS["longrope"])) == 3
    with pytest.raises(
        ValueError, match=r"of \(layers, kv_heads, head_size\) = \(3, 2, 8\), got \(2, 2, 8\)"
    ):
        model.extend(params, X[:2], plain)


def test_a_scaling_that_no_layer_uses_changes_no_past():
    config = fa.Config(**SIZES, rope_scaling=SCALINGS["dynamic"], rotary_layers=(False, False))
    assert not config.follows_length
    assert cache_layers(config) == 2


THEIRS = {
    "phi3": {
        "original_max_position_embeddings": BORDER,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
            "original_max_position_embeddings": BORDER,
        },
    },
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        "max_position_embeddings": BORDER,
    },
}


@pytest.mark.parametrize("kind", THEIRS)
def test_texts_on_either_side_of_the_border_have_the_logits_of_transformers(kind, tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ids = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
    }
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **{**sizes, **ids, **THEIRS[kind]})
    ).eval()
    for p in theirs.parameters():
        p.data.normal_(0, 0.3) if p.dim() > 1 else None
    theirs.save_pretrained(tmp_path)
    config, params, _ = load(tmp_path)
    model = fa.decoder(config)
    for n, read in ((BORDER, 5), (BORDER + 1, 5), (BORDER + 1, BORDER), (30, BORDER - 3), (30, 29)):
        with torch.no_grad():
            want = theirs(X[None, :n], use_cache=False).logits[0]
        past = fa.generate(fa.key(0), model, params, X[:read], steps=0, chunk=4)[1]
        close(model.extend(params, X[read:n], past)[0], want[read:], 1e-3)
