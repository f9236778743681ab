"""Trained heads draft with what they hear of the target; their weights cost no law."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import funcattn as fa
from funcattn import drafters, sampling
from funcattn.decoding.speculative import heads
from funcattn.speculation import speculate
from funcattn.transformer import Layer

V, E, H, K, D, FF = 20, 16, 2, 1, 8, 24
TARGET = fa.Config(
    vocabulary=V, width=E, layers=3, heads=H, kv_heads=K, head_size=D, feed_forward=FF
)
LAYER = fa.Config(
    vocabulary=V, width=E, layers=1, heads=H, kv_heads=K, head_size=D, feed_forward=FF, tied=False
)
TAPS = ("embedding", "layers.1.output", "layers.2.output")
PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def target():
    model = fa.decoder(TARGET)
    params = fa.tree.map(lambda w: 3 * w, model.init(fa.key(0)))
    return model, fa.cast(torch.float64)(params)


def some_head(kind, *, ids=None, before=False, seed=1):
    """A head with random weights in float64."""
    keys = iter(fa.split(fa.key(seed), 20))
    w = lambda *shape: 0.3 * fa.random.normal(next(keys), shape, torch.float64)
    wide = 2 * E if kind == "eagle3" else E
    layer = Layer(
        attention_norm=() if kind == "eagle3" else 1 + w(E),
        q=w(H * D, wide),
        k=w(K * D, wide),
        v=w(K * D, wide),
        o=w(E, H * D),
        feed_forward_norm=1 + w(E),
        gate=w(FF, E),
        up=w(FF, E),
        down=w(E, FF),
    )
    rows = V if ids is None else len(ids)
    params = drafters.HeadParams(
        fuse=w(E, 3 * E if kind == "eagle3" else 2 * E),
        embedding=w(V, E),
        embedding_norm=1 + w(E),
        hidden_norm=1 + w(E),
        layers=(layer,),
        norm=1 + w(E),
        head=w(rows, E),
        ids=() if ids is None else ids,
    )
    taps = TAPS if kind == "eagle3" else ("output",)
    return drafters.Head(kind, LAYER, taps, before), params


def rms(x, w, eps=LAYER.norm_epsilon):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rotated(x):
    """Rotary embeddings as the published models have them: halves of a head turn together."""
    T, half = x.shape[-2], D // 2
    angles = torch.arange(T)[:, None] * LAYER.rope_base ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def plainly(head, params, tokens, features, outputs=None):
    """The logits and outputs of a head for all pairs of a text, in plain torch.

    outputs: what is carried at the last pairs, in the place of features.
    """
    T, layer = len(tokens), params.layers[0]
    e = rms(params.embedding[tokens], params.embedding_norm)
    if head.kind == "eagle3":
        x = features @ params.fuse.T
    else:
        x = features
    x = x if outputs is None else torch.cat([x, outputs])
    if head.kind == "eagle3":
        h = rms(x, params.hidden_norm)
        read, x = torch.cat([e, h], -1), h if head.norm_before_residual else x
    else:
        x = torch.cat([e, rms(x, params.hidden_norm)], -1) @ params.fuse.T
        read = rms(x, layer.attention_norm)
    split = lambda y, n: y.view(T, n, D).transpose(0, 1)
    q, k = rotated(split(read @ layer.q.T, H)), rotated(split(read @ layer.k.T, K))
    v = split(read @ layer.v.T, K)
    scores = q @ k.expand(H, T, D).mT / D**0.5
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    mixed = (scores.softmax(-1) @ v.expand(H, T, D)).transpose(0, 1).reshape(T, H * D)
    x = x + mixed @ layer.o.T
    y = rms(x, layer.feed_forward_norm)
    x = x + (F.silu(y @ layer.gate.T) * (y @ layer.up.T)) @ layer.down.T
    out = rms(x, params.norm) @ params.head.T
    if isinstance(params.ids, tuple):
        return out, x
    every = torch.full((T, V), -torch.inf, dtype=out.dtype)
    every[:, params.ids] = out
    return every, x


IDS = torch.tensor([0, 1, 2, 4, 5, 7, 11, 13, 17, 19])
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
    drafter = drafters.head(*some_head(**HEADS[name]), length=3)
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
