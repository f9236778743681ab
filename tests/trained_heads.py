"""Heads with random weights, a target for them, and their mathematics in plain torch."""

import torch
import torch.nn.functional as F

import funcattn as fa
from funcattn import drafters
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
