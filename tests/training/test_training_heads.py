"""A head trained on the target's own text drafts more of it."""

import pytest
import torch
from trained_heads import IDS, PROMPT, V, plainly, some_head, target

import funcattn as fa
from funcattn import drafters
from funcattn.speculation import speculate
from funcattn.training.heads import features_of, head_loss

CONFIG = fa.Config(vocabulary=12, width=16, layers=3, heads=2, head_size=8, feed_forward=32)


@pytest.mark.slow
def test_training_lowers_the_loss_and_raises_the_acceptance():
    model = fa.decoder(CONFIG)
    params = fa.tree.map(lambda w: 4 * w, model.init(fa.key(0)))
    before = fa.tree.map(torch.clone, params)
    text = fa.generate(
        fa.key(1), model, params, torch.tensor([1]), steps=400, sampler=fa.sampling.temperature(0.7)
    )[0]
    train = lambda steps, **options: drafters.train_head(
        fa.key(2), model, params, text, steps=steps, rows=4, context=24, progress=False, **options
    )
    optimizer = fa.training.adamw(1e-2)
    head, first, _ = train(0)
    _, trained, done = train(60, optimizer=optimizer, report_every=20)
    assert done.history[-1].training < done.history[0].training - 0.1
    kept = []
    for weights in (first, trained):
        drafter = drafters.head(head, weights, length=3)
        found = [
            speculate(fa.key(0), model, params, drafter, text[i : i + 8], steps=30)[0]
            for i in (5, 90)
        ]
        kept.append(sum(int(each.stats.accepted) for each in found))
    assert kept[1] > kept[0]
    assert fa.tree.allclose(params, before)
    again = train(1, start=(head, trained), optimizer=optimizer)
    assert not fa.tree.allclose(again[1].layers, trained.layers)
    assert again[1].embedding is params.embedding


def plain_features(model, params, taps, text):
    heard = {}
    with fa.taps.listening(lambda name, x: heard.setdefault(name, x)):
        model.hidden(params, text)
    return torch.cat([heard[name] for name in taps], -1)


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_the_loss_is_that_of_the_tokens_two_places_ahead_and_more(kind, ids):
    model, params = target()
    head, whole = some_head(kind, ids=ids)
    text = torch.cat([PROMPT, PROMPT.flip(0)])
    features = features_of(head, model, params, text)
    torch.testing.assert_close(features, plain_features(model, params, head.taps, text))
    own = whole._replace(embedding=(), head=(), ids=())
    places = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]])
    row_of = {int(token): row for row, token in enumerate(range(V) if ids is None else ids)}
    for ahead in (1, 3):
        got = head_loss(head, whole, text, features, ahead)(model, own, places)
        wanted = []
        for n in range(1, ahead + 1):
            each = []
            for row in places:
                tokens, carry = text[row], features[row]
                _, x = plainly(head, whole, tokens[1:-1], carry[:-2])
                logits, _ = plainly(head, whole, tokens[1:-1], carry[:-2])
                for s in range(2, n + 1):  # its own outputs in the place of the features
                    logits, x = plainly(head, whole, tokens[s:-1], carry[:0], x[:-1])
                for line, token in zip(logits, tokens[n + 1 :].tolist(), strict=True):
                    if token in row_of:
                        each.append(-line.log_softmax(-1)[token])
            wanted.append(torch.stack(each).mean())
        torch.testing.assert_close(got, torch.stack(wanted).mean())


def test_all_weights_of_a_head_are_trained_but_those_of_the_target():
    model = fa.decoder(CONFIG)
    params = model.init(fa.key(0))
    text = torch.arange(100) % 12
    for options in ({}, {"kind": "mtp", "vocabulary": 7, "ahead": 2, "validation": text[:70]}):
        train = lambda steps, options=options: drafters.train_head(
            fa.key(2), model, params, text, steps=steps, rows=2, progress=False, **options
        )
        head, first, _ = train(0)
        _, whole, done = train(2)
        assert whole.embedding is params.embedding
        assert float((whole.fuse - first.fuse).abs().max()) > 1e-5
        assert float((whole.layers[0].q - first.layers[0].q).abs().max()) > 1e-5
    assert head.kind == "mtp"
    # of equally frequent tokens the first: 0 to 3 are there nine times, the others eight
    assert whole.ids.tolist() == list(range(7))
    assert torch.equal(whole.head, params.embedding[:7])
    assert done.history[-1].validation > 0
    drafter = drafters.head(head, whole, length=2)
    got = speculate(fa.key(0), model, params, drafter, text[:5], steps=6)[0]
    assert torch.equal(got.tokens, fa.generate(fa.key(0), model, params, text[:5], steps=6)[0])


def test_a_run_goes_on_with_its_own_text_alone(tmp_path):
    model = fa.decoder(CONFIG)
    params, text = model.init(fa.key(0)), torch.arange(100) % 12
    train = lambda text, steps: drafters.train_head(
        *(fa.key(2), model, params, text),
        steps=steps,
        rows=2,
        context=8,
        progress=False,
        folder=tmp_path,
        resume=True,
    )
    train(text, 1)
    train(text, 2)
    with pytest.raises(ValueError, match="fit: key should be"):
        train(text.flip(0), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "medusa"}, "kind should be one of eagle3, mtp"),
        ({"vocabulary": 13}, "vocabulary should be an int from 1 to V = 12"),
        ({"vocabulary": 0}, "vocabulary should be"),
        ({"ahead": 0}, "ahead should be an int from 1, below context = 8"),
        ({"ahead": 8}, "ahead should be an int from 1, below context = 8"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(options, message):
    model = fa.decoder(CONFIG)
    given = (fa.key(2), model, model.init(fa.key(0)), torch.arange(100) % 12)
    with pytest.raises(ValueError, match="drafters.train_head: " + message):
        drafters.train_head(*given, steps=1, context=8, **options)
