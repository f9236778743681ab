"""The loss of a language model: against its definition in float64, under every derivative, packed
and masked.
"""

import math

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.vocabulary import likelihoods, passes

CONFIG = fa.Config(
    vocabulary=17, width=8, layers=4, heads=2, kv_heads=1, head_size=4, feed_forward=12, context=32
)
MODEL = fa.decoder(CONFIG)
# Products of at most 12 numbers of size one, some hundreds of them one after the other: 1e3 ulp of
# float64, and ten times that.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def weights(dtype=torch.float64, scale=10.0, config=CONFIG):
    """Larger than at the beginning of training, so that no derivative is about zero."""
    return fa.tree.map(
        lambda w: (w * scale if w.dim() > 1 else w).to(dtype), fa.decoder(config).init(fa.key(1))
    )


def tokens(*shape):
    return fa.random.randint(fa.key(2), shape, 0, CONFIG.vocabulary)


def dense(params, tokens):
    """The same decoder written out in plain operations, a mean of -log softmax at the targets."""
    D = CONFIG.head_size
    T = tokens.shape[-1] - 1
    norm = lambda x, w: x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_epsilon).sqrt() * w
    turn = (1 / CONFIG.rope_base ** (torch.arange(0, D, 2, dtype=torch.float32) / D)).to(
        torch.float32
    )
    angle = torch.arange(T).float()[:, None] * turn
    cos, sin = angle.cos().double(), angle.sin().double()  # the library's angles are float32

    def rotate(x):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = params.embedding[tokens[..., :-1]]
    hidden = torch.arange(T)[:, None] < torch.arange(T)
    for layer in params.layers:
        y = norm(x, layer.attention_norm)
        heads = [
            (y @ w.mT).unflatten(-1, (-1, D)).transpose(-2, -3) for w in (layer.q, layer.k, layer.v)
        ]
        q, k, v = rotate(heads[0]), rotate(heads[1]), heads[2]
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(hidden, float("-inf"))
        p = scores.exp() / scores.exp().sum(-1, keepdim=True)
        x = x + (p @ v).transpose(-2, -3).flatten(-2) @ layer.o.mT
        y = norm(x, layer.feed_forward_norm)
        gate = y @ layer.gate.mT
        x = x + (gate * torch.sigmoid(gate) * (y @ layer.up.mT)) @ layer.down.mT
    logits = norm(x, params.norm) @ params.embedding.mT
    picked = logits.gather(-1, tokens[..., 1:, None]).squeeze(-1)
    return (logits.exp().sum(-1).log() - picked).mean()


def directions(params, seed):
    return fa.tree.map_with_path(
        lambda path, w: fa.random.normal(
            fa.fold_in(fa.key(seed), sum(i * ord(c) for i, c in enumerate(path))), w.shape, w.dtype
        ),
        params,
    )


def same(a, b, **bounds):
    for (path, x), y in zip(fa.tree.items(a), fa.tree.leaves(b), strict=True):
        torch.testing.assert_close(
            x, y, **(bounds or EXACT), msg=lambda m, path=path: f"{path}: {m}"
        )


TRANSFORMS = {
    "value": lambda f, params, t: f(params, t),
    "grad": lambda f, params, t: grad(f)(params, t),
    "per-sample gradients": lambda f, params, t: vmap(grad(f), (None, 0))(params, t),
    "jvp": lambda f, params, t: jvp(lambda p: f(p, t), (params,), (directions(params, 3),)),
    "hvp": lambda f, params, t: jvp(lambda p: grad(f)(p, t), (params,), (directions(params, 3),))[
        1
    ],
    "hvp, reverse over forward": lambda f, params, t: grad(
        lambda p: jvp(lambda w: f(w, t), (p,), (directions(params, 3),))[1]
    )(params),
    "per-sample hvp": lambda f, params, t: vmap(
        lambda r: jvp(lambda p: grad(f)(p, r), (params,), (directions(params, 3),))[1]
    )(t),
}


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "in blocks"])
@pytest.mark.parametrize("kernel", [None, "reference", "flash"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_the_loss_are_those_of_the_reference(name, kernel, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(likelihoods, "SMALL", 0)
        # four positions at a time
        monkeypatch.setattr(passes, "ELEMENTS", 4 * CONFIG.vocabulary)
        monkeypatch.setattr(passes, "ROWS", 1)
    params, rows = weights(), tokens(3, 8)
    model = fa.decoder(CONFIG, kernel=kernel)
    same(
        TRANSFORMS[name](lambda p, t: fa.loss(model, p, t), params, rows),
        TRANSFORMS[name](dense, params, rows),
    )


def test_the_reference_moves_as_its_differences_do():
    """The reference is held by nothing but arithmetic: a central difference, exact to h^2 and to
    rounding over h.
    """
    params, rows, h = weights(), tokens(2, 8), 1e-5
    along = directions(params, 3)
    at = lambda t: dense(fa.tree.map(lambda w, d: w + t * d, params, along), rows)
    slope = jvp(lambda p: dense(p, rows), (params,), (along,))[1]
    torch.testing.assert_close(slope, (at(h) - at(-h)) / (2 * h), rtol=1e-6, atol=1e-6)


def test_packed_documents_lose_what_they_lose_alone():
    params, lengths = weights(), (5, 2, 7, 1)
    documents = [
        tokens(20)[start : start + n] for start, n in zip((0, 5, 7, 14), lengths, strict=True)
    ]
    packed = torch.cat(documents)
    segments = torch.cat([torch.full((n,), 9 - i) for i, n in enumerate(lengths)])
    targets = [n - 1 for n in lengths]
    alone = sum(
        fa.loss(MODEL, params, d) * n for d, n in zip(documents, targets, strict=True) if n
    ) / sum(targets)
    torch.testing.assert_close(fa.loss(MODEL, params, packed, segments=segments), alone, **EXACT)
    both = fa.loss(
        MODEL, params, torch.stack([packed, packed]), segments=torch.stack([segments, segments])
    )
    torch.testing.assert_close(both, alone, **EXACT)


def test_a_document_sees_nothing_of_its_neighbour():
    params = weights()
    segments = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    # the targets of the second, and one that crosses
    counts = torch.tensor([False, False, True, True, True, True])
    of = lambda embedding: fa.loss(
        MODEL,
        params._replace(embedding=embedding, head=params.embedding),
        row,
        segments=segments,
        mask=counts,
    )
    row = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    touched = grad(of)(params.embedding).abs().sum(-1)
    assert touched[4:7].all()
    assert not touched[1:4].any()


def test_targets_that_do_not_count_do_not_count():
    params, row = weights(), tokens(8)
    counts = torch.tensor([True, False, True, True, False, False, True])
    logits = MODEL.logits(params, MODEL.hidden(params, row[:-1])[0])
    each = -logits.log_softmax(-1).gather(-1, row[1:, None]).squeeze(-1)
    torch.testing.assert_close(
        fa.loss(MODEL, params, row, mask=counts), each[counts].mean(), **EXACT
    )
    torch.testing.assert_close(
        fa.loss(MODEL, params, row[None].expand(3, -1), mask=counts), each[counts].mean(), **EXACT
    )


def test_no_target_that_counts_is_an_error_or_nan():
    params, row, none = weights(), tokens(4), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="loss: mask should be true of some target"):
        fa.loss(MODEL, params, row, mask=none)
    found = vmap(lambda mask: fa.loss(MODEL, params, row, mask=mask))(torch.stack([none, ~none]))
    assert found.isnan().tolist() == [True, False]


def test_logits_are_held_a_block_at_a_time(monkeypatch):
    """With 32 times the vocabulary of positions, no tensor of all logits is ever made, in any
    pass.
    """
    config = fa.Config(
        vocabulary=2048, width=8, layers=1, heads=1, kv_heads=1, head_size=8, feed_forward=8
    )
    monkeypatch.setattr(likelihoods, "SMALL", 0)
    monkeypatch.setattr(passes, "ELEMENTS", 8 * config.vocabulary)
    monkeypatch.setattr(passes, "ROWS", 1)
    model, largest = fa.decoder(config), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    params = model.init(fa.key(0))
    with Watch():
        grad(lambda p: fa.loss(model, p, torch.arange(65)))(params)
    assert max(largest) <= config.vocabulary * max(8, config.width)


def test_half_precision_is_compared_in_single():
    params = weights(torch.bfloat16)
    found = fa.loss(MODEL, params, tokens(3, 8))
    assert found.dtype == torch.float32
    exact = fa.loss(MODEL, fa.cast(torch.float64)(params), tokens(3, 8))
    # 2^-8 a rounding, some 10 in a row, of logits near 10
    torch.testing.assert_close(found.double(), exact, rtol=0.1, atol=0)


row = torch.arange(6)
BAD = [
    ((row.float(),), {}, TypeError, "loss: tokens should be an integer tensor, got torch.float32"),
    ((row[:1],), {}, ValueError, "loss: tokens should be (*lead, T) with T at least 2, got (1,)"),
    ((row[:0],), {}, ValueError, "loss: tokens should be (*lead, T) with T at least 2, got (0,)"),
    ((row[None][:0],), {}, ValueError, "loss: tokens should be (*lead, T)"),
    ((row + 14,), {}, ValueError, "got 17"),
    ((torch.tensor([1, 2, 17]),), {}, ValueError, "loss: tokens should be ids in 0..16"),
    ((torch.tensor([1, 2, -100]),), {}, ValueError, "loss: tokens should be ids in 0..16"),
    ((row,), {"mask": torch.ones(5)}, TypeError, "loss: mask should be booleans"),
    (
        (row,),
        {"mask": torch.ones(6, dtype=torch.bool)},
        ValueError,
        "loss: mask should be such that it broadcasts to (5,)",
    ),
    ((row,), {"segments": torch.ones(6)}, TypeError, "loss: segments should be integers"),
    ((row,), {"segments": row[:5]}, ValueError, "loss: segments should be (6,) as tokens are"),
    (
        (row,),
        {"segments": torch.tensor([0, 1, 0, 0, 1, 1])},
        ValueError,
        "masks.segments: ids should be one run for each document",
    ),
]


def test_params_in_the_place_of_the_model_are_named():
    with pytest.raises(TypeError, match=r"loss: model should be from fa\.decoder, got a "):
        fa.loss(weights(), MODEL, row)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"), BAD, ids=[message for *_, message in BAD]
)
def test_a_mistake_is_one_clear_error(arguments, options, kind, message):
    with pytest.raises(kind) as error:
        fa.loss(MODEL, weights(), *arguments, **options)
    assert message in str(error.value)
