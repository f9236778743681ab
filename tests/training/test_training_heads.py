"""A head trained on the target's own text drafts more of it."""

import pytest
import torch
from trained_heads import LAYER, PROMPT, TAPS, plainly, some_head, target

import funcattn as fa
from funcattn import drafters
from funcattn.speculation import speculate
from funcattn.training.heads import head_loss

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


def test_the_loss_is_that_of_the_tokens_two_places_ahead():
    model, params = target()
    _, whole = some_head("eagle3")
    whole = whole._replace(embedding=params.embedding, head=params.embedding)
    head = drafters.Head("eagle3", LAYER, TAPS)
    batch = torch.stack([PROMPT, PROMPT.flip(0)])
    got = head_loss(head, params, whole)(model, whole._replace(embedding=(), head=()), batch)
    wanted = []
    for text in batch:
        heard = {}
        with fa.taps.listening(lambda name, x, heard=heard: heard.setdefault(name, x)):
            model.hidden(params, text)
        features = torch.cat([heard[name] for name in TAPS], -1)[:-2]
        logits, _ = plainly(head, whole, text[1:-1], features)
        wanted.append(torch.nn.functional.cross_entropy(logits, text[2:]))
    torch.testing.assert_close(got, torch.stack(wanted).mean())


def test_all_weights_of_a_head_are_trained_but_those_of_the_target():
    model = fa.decoder(CONFIG)
    params = model.init(fa.key(0))
    train = lambda steps: drafters.train_head(
        fa.key(2), model, params, torch.arange(100) % 12, steps=steps, rows=2, progress=False
    )
    head, first, _ = train(0)
    _, whole, _ = train(2)
    assert whole.embedding is params.embedding
    assert float((whole.fuse - first.fuse).abs().max()) > 1e-5
    assert float((whole.layers[0].q - first.layers[0].q).abs().max()) > 1e-5
    start = head, whole._replace(ids=torch.arange(3))
    with pytest.raises(ValueError, match=r"drafters\.train_head: start should be a head of all"):
        drafters.train_head(fa.key(2), model, params, torch.arange(100) % 12, steps=1, start=start)
