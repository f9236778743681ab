"""What calibrates: GPTQ against the exact update in float64, searches against each choice tried,
and what is refused.
"""

from dataclasses import replace

import pytest
import torch
from torch.func import grad

import funcattn as fa
from funcattn.quantization import Int4, Int8, expand, is_quantized, packing
from funcattn.quantization.calibration import (
    awq,
    clipped,
    clipping,
    gptq,
    gptq_columns,
    smooth,
    smoothquant,
)
from funcattn.quantization.calibration.gptq_columns import factor, fit

CONFIG = fa.Config(
    vocabulary=33,
    width=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_size=16,
    feed_forward=48,
    context=64,
)
MODEL = fa.decoder(CONFIG)
TOKENS = fa.random.randint(fa.key(3), (200,), 0, CONFIG.vocabulary)
SCHEME = fa.int4(group=16)


def weights():
    return fa.tree.map(lambda w: w * (5 if w.dim() > 1 else 1), MODEL.init(fa.key(1)))


def activations(K, n=300):
    """Correlated, as those of a model are, with one feature that is always zero."""
    x = fa.random.normal(fa.key(0), (n, K), torch.float64) @ fa.random.normal(
        fa.key(1), (K, K), torch.float64
    )
    x[:, 3] = 0
    return x


def slow(plan, weight, H, damping):
    """The definition: round the heaviest column left, then move those left by what is best, from an
    inverse of their part of H.
    """
    K = weight.shape[1]
    H = H + damping * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    scale, least, greatest = (
        packing.spread(plan.scale.double(), K),
        *((0, 15) if isinstance(plan, Int4) else (-127, 127)),
    )
    zero = packing.spread(plan.zero.double(), K) if isinstance(plan, Int4) else 0 * scale
    w, left, codes = weight.double().clone(), list(range(K)), torch.zeros(weight.shape)
    for j in sorted(left, key=lambda j: -float(H[j, j])):
        inverse = torch.linalg.inv(H[left][:, left])
        here = left.index(j)
        codes[:, j] = ((w[:, j] - zero[:, j]) / scale[:, j]).round().clamp(least, greatest)
        error = w[:, j] - (codes[:, j] * scale[:, j] + zero[:, j])
        w[:, left] -= error[:, None] * (inverse[here] / inverse[here, here])[None]
        left.remove(j)
    return codes


@pytest.mark.parametrize(
    "scheme",
    [
        SCHEME,
        fa.int4(group=16, symmetric=True),
        fa.int8(group=16),
        fa.w8a8(group=16),
        fa.w8a8(group=None),
    ],
    ids=str,
)
def test_the_codes_are_those_of_the_exact_update(scheme, monkeypatch):
    monkeypatch.setattr(gptq_columns, "BLOCK", 5)  # several blocks, the last one ragged
    weight, x = fa.random.normal(fa.key(2), (6, 32), torch.float64), activations(32)
    H, plan = x.mT @ x, scheme.encode(weight)
    found = fit(plan, weight, *factor(H, 0.01))
    codes = packing.unpack(found.codes, 2, 4) if isinstance(found, Int4) else found.codes
    assert torch.equal(codes.double(), slow(plan, weight, H, 0.01).double())
    off = lambda record: ((expand(record).double() - weight) @ x.mT).norm()
    assert off(found) < 0.8 * off(plan)


def test_without_activations_it_is_round_to_nearest():
    weight = fa.random.normal(fa.key(2), (6, 32), torch.float64)
    plan = SCHEME.encode(weight)
    assert torch.equal(
        fit(plan, weight, *factor(torch.zeros(32, 32, dtype=torch.float64))).codes, plan.codes
    )


def test_a_calibrated_model_is_nearer_than_one_rounded_to_nearest():
    params, windows = weights(), TOKENS[:192].reshape(3, 64)
    before = fa.tree.map(torch.clone, params)
    seen = []
    fitted = gptq(MODEL, TOKENS, SCHEME, progress=lambda done, of: seen.append((done, of)))(params)
    rounded = fa.quantize(SCHEME)(params)
    of = lambda params: torch.stack([MODEL.hidden(params, row)[0] for row in windows])
    wanted = of(params)
    assert (of(fitted) - wanted).norm() < 0.9 * (of(rounded) - wanted).norm()
    assert seen == [(1, 2), (2, 2)]
    assert fa.tree.allclose(params, before, rtol=0, atol=0)
    assert fa.tree.paths(fitted) == fa.tree.paths(rounded)
    assert isinstance(fitted.layers[1].down, Int4)
    assert isinstance(fitted.embedding, Int8)
    assert torch.equal(fitted.layers[0].q.scale, rounded.layers[0].q.scale)
    assert not torch.equal(fitted.layers[0].q.codes, rounded.layers[0].q.codes)
    again = gptq(MODEL, TOKENS, SCHEME)(fitted)  # records stay
    assert fa.tree.allclose(again, fitted, rtol=0, atol=0)
    assert (
        grad(lambda scale: MODEL.hidden(fitted._replace(norm=scale), windows[0])[0].sum())(
            fitted.norm
        )
        .abs()
        .sum()
        > 0
    )


def test_where_chooses_what_is_fitted():
    fitted = gptq(MODEL, TOKENS, SCHEME, r".*\.(up|down)")(weights())
    chosen = {
        path.rpartition(".")[2]
        for path, leaf in fa.tree.items(fitted, is_leaf=is_quantized)
        if is_quantized(leaf)
    }
    assert chosen == {"up", "down"}


MIXED = replace(CONFIG, experts=4, experts_per_token=2, expert_size=16, expert_layers=(True, False))


def rows_of_experts(model, params, tokens):
    """What goes into `up` and into `down` of each expert of layer 0, token by token, from the
    definition.
    """
    layer, up, down = params.layers[0], [[] for _ in range(4)], [[] for _ in range(4)]
    for window in tokens.reshape(-1, 64):
        for y in fa.trace(model, params, window, where="layers.0.feed_forward.input")[1][
            "layers.0.feed_forward.input"
        ]:
            for i in (layer.router @ y).topk(2).indices.tolist():
                up[i].append(y.double())
                down[i].append(
                    (torch.nn.functional.silu(layer.gate[i] @ y) * (layer.up[i] @ y)).double()
                )
    return [torch.stack(rows) for rows in up], [torch.stack(rows) for rows in down]


@pytest.mark.parametrize(("count", "few"), [(192, 0), (64, 1)])
def test_an_expert_is_fitted_by_the_tokens_it_is_sent(count, few):
    model = fa.decoder(MIXED)
    params = fa.tree.map(lambda w: w * (5 if w.dim() > 1 else 1), model.init(fa.key(1)))
    plan = fa.quantize(SCHEME)(params).layers[0]
    found = gptq(model, TOKENS[:count], SCHEME)(params)
    into_up, into_down = rows_of_experts(model, params, TOKENS[:count])
    seen = [len(rows) for rows in into_up]
    assert sum(seen) == 2 * count
    assert sum(n < 32 for n in seen) == few
    for names, inputs in ((("gate", "up"), into_up), (("down",), into_down)):
        for name in names:
            for i, x in enumerate(inputs):
                one, planned = (
                    fa.tree.unstack(getattr(layer, name))[i] for layer in (found.layers[0], plan)
                )
                weight = getattr(params.layers[0], name)[i]
                enough = len(x) >= weight.shape[1]
                wanted = slow(planned, weight, x.mT @ x, 0.01) if enough else unpacked(planned)
                assert torch.equal(unpacked(one).double(), wanted.double()), (name, i)
                assert torch.equal(one.codes, planned.codes) is not enough
    noted = {row.path: row.note for row in fa.quantization.report(params, found)}
    assert noted["layers.0.up"] == (f"{few} of 4 experts to nearest" if few else "")
    assert noted["layers.1.up"] == ""
    assert "experts to nearest" in str(fa.quantization.report(params, fa.quantize(SCHEME)(params)))


def unpacked(record):
    return packing.unpack(record.codes, record.scale.shape[-1], 4)


@pytest.mark.parametrize("scheme", [SCHEME, fa.int8, fa.w8a8(group=16)], ids=str)
def test_experts_that_saw_too_little_are_rounded_to_nearest(scheme):
    config = replace(MIXED, expert_layers=(True, True))
    model = fa.decoder(config)
    params = fa.tree.map(lambda w: w * (5 if w.dim() > 1 else 1), model.init(fa.key(1)))
    found, rounded = gptq(model, TOKENS[:34], scheme)(params), fa.quantize(scheme)(params)
    notes = {row.path: row.note for row in fa.quantization.report(params, found)}
    assert notes["layers.0.up"] == "4 of 4 experts to nearest"
    assert fa.tree.allclose(found.layers[0].up, rounded.layers[0].up, rtol=0, atol=0)
    assert not torch.equal(found.layers[0].q.codes, rounded.layers[0].q.codes)
    assert notes["layers.0.q"] == ""
    assert fa.decoder(config).hidden(found, TOKENS[:8])[0].isfinite().all()


# Clipping.


def test_a_clip_is_the_best_of_those_tried_for_each_group():
    weight, x = fa.random.normal(fa.key(4), (6, 48)) ** 3, activations(48).float()
    square = x.square().sum(0)
    found = clipping.best_clip(SCHEME, weight, square)
    for row in range(6):
        for group in range(3):
            part = slice(16 * group, 16 * group + 16)
            off = lambda record: (
                (expand(record)[row, part] - weight[row, part]).square() * square[part]
            ).sum()
            tried = min(off(SCHEME(clip=clip).encode(weight)) for clip in clipping.CLIPS)
            torch.testing.assert_close(off(found), tried, rtol=1e-4, atol=0)
    assert (found.scale < SCHEME.encode(weight).scale).any()


@pytest.mark.parametrize(
    "scheme", [SCHEME, fa.int8(group=16), fa.int8, fa.w8a8(group=16), fa.w8a8(group=None)], ids=str
)
def test_a_clipped_tree_is_of_the_records_of_quantize(scheme):
    params = weights()
    before = fa.tree.map(torch.clone, params)
    found, rounded = clipped(MODEL, TOKENS, scheme)(params), fa.quantize(scheme)(params)
    assert [
        (p, type(leaf), leaf.shape) for p, leaf in fa.tree.items(found, is_leaf=is_quantized)
    ] == [(p, type(leaf), leaf.shape) for p, leaf in fa.tree.items(rounded, is_leaf=is_quantized)]
    assert (found.layers[0].q.scale <= rounded.layers[0].q.scale * 1.001).all()
    assert fa.tree.allclose(params, before, rtol=0, atol=0)
    assert fa.tree.allclose(clipped(MODEL, TOKENS, scheme)(found), found, rtol=0, atol=0)


# Scaling.


def outlying(params):
    """Weights whose features differ in size: some of what norms, v and up give is 20 times larger,
    as trained models have it.
    """
    layers = []
    for layer in params.layers:
        big = lambda n: torch.where(torch.arange(n) % 7 == 3, 20.0, 1.0)
        by = {
            name: getattr(layer, name) * big(CONFIG.width)
            for name in ("attention_norm", "feed_forward_norm")
        }
        by |= {
            name: getattr(layer, name) * big(len(getattr(layer, name)))[:, None]
            for name in ("v", "up")
        }
        layers.append(layer._replace(**by))
    return params._replace(layers=tuple(layers))


FAMILIES = {
    "llama": {},
    "groups": {"heads": 4, "kv_heads": 2, "head_size": 8},
    "gemma": {"norm_offset": 1.0, "norm_placement": "around", "activation": "gelu_tanh"},
    "after": {"norm_placement": "after", "head_norm": "rms_width"},
    "biased": {"qkv_bias": True, "output_bias": True, "feed_forward_bias": True},
    "gpt2": {"norm": "layer", "norm_bias": True, "gated": False, "activation": "gelu"},
    "cohere": {"norm": "layer", "parallel": True, "shared_norm": True},
    "experts": {
        "experts": 4,
        "experts_per_token": 2,
        "expert_size": 16,
        "expert_layers": (True, False),
    },
}


@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES.keys())
def test_smoothing_keeps_the_function(fields):
    config = replace(CONFIG, **fields)
    model = fa.decoder(config, kernel="reference")
    params = fa.to(torch.float64)(model.init(fa.key(1)))
    # no zeros, no ones
    params = fa.tree.map(lambda w: w + 0.1 * fa.random.normal(fa.key(7), w.shape, w.dtype), params)
    tokens = TOKENS[:64]
    before = fa.tree.map(torch.clone, params)
    found = smooth(model, tokens, fa.int4(group=8))(params)
    moved = [
        p
        for (p, a), b in zip(fa.tree.items(found), fa.tree.leaves(params), strict=True)
        if not torch.equal(a, b)
    ]
    assert any(path.endswith(".o") for path in moved)
    logits = lambda params: model.logits(params, model.hidden(params, tokens)[0])
    torch.testing.assert_close(logits(found), logits(params), rtol=1e-9, atol=1e-9)
    assert fa.tree.allclose(params, before, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", [SCHEME, fa.w8a8(group=None)], ids=str)
def test_scaled_weights_lose_less(scheme):
    params, windows = outlying(weights()), TOKENS[:192].reshape(3, 64)
    of = lambda params: torch.stack([MODEL.hidden(params, row)[0] for row in windows])
    wanted = of(params)
    off = lambda params: float((of(params) - wanted).norm())
    nearest, scaled = (
        off(fa.quantize(scheme)(params)),
        off(fa.quantize(scheme)(smooth(MODEL, TOKENS, scheme)(params))),
    )
    assert scaled < 0.9 * nearest
    assert off(awq(MODEL, TOKENS, scheme)(params)) < 0.9 * nearest


def test_a_place_that_nothing_improves_stays():
    params = weights()
    # every weight has a scale of its own: nothing is lost anywhere
    found = smooth(MODEL, TOKENS, fa.int8(group=1))(params)
    kept = [
        torch.equal(a, b)
        for a, b in zip(fa.tree.leaves(found), fa.tree.leaves(params), strict=True)
    ]
    assert sum(kept) >= len(kept) // 2


def test_records_and_what_feeds_them_are_left_alone():
    params = fa.quantize(fa.int8, r".*\.(v|gate)")(outlying(weights()))
    found = smooth(MODEL, TOKENS, SCHEME)(params)
    same = lambda name: all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(found.layers, params.layers, strict=True)
    )
    assert same("o")
    assert same("feed_forward_norm")
    assert not same("down")


def test_heads_that_share_a_value_share_its_scale():
    s = torch.tensor([1.0, 2, 3, 4])
    assert smoothquant.spread(s, (2, 2)).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]


# What is refused.

BAD = [
    (
        lambda: gptq("model", TOKENS, SCHEME),
        TypeError,
        "gptq: model should be from fa.decoder, got a str",
    ),
    (
        lambda: gptq(MODEL, TOKENS.float(), SCHEME),
        TypeError,
        "gptq: tokens should be integers (T,)",
    ),
    (lambda: gptq(MODEL, TOKENS[None], SCHEME), TypeError, "gptq: tokens should be integers (T,)"),
    (lambda: gptq(MODEL, [1, 2], SCHEME), TypeError, "got a list"),
    (lambda: gptq(MODEL, TOKENS, "int4"), TypeError, "scheme should be a scheme"),
    (
        lambda: gptq(MODEL, TOKENS, SCHEME, damping=0.0),
        ValueError,
        "gptq: damping should be above 0",
    ),
    (
        lambda: gptq(MODEL, TOKENS, fa.nf4(group=16))(weights()),
        TypeError,
        "gptq: scheme should be int4, int8 or w8a8",
    ),
    (
        lambda: gptq(MODEL, TOKENS[:40], SCHEME)(weights()),
        ValueError,
        "gptq: tokens should be at least 48 tokens, the columns of",
    ),
    (
        lambda: clipped("model", TOKENS, SCHEME),
        TypeError,
        "clipped: model should be from fa.decoder, got a str",
    ),
    (
        lambda: clipped(MODEL, TOKENS, fa.nf4),
        TypeError,
        "clipped: scheme should be one with a clip",
    ),
    (
        lambda: clipped(MODEL, TOKENS[:0], SCHEME),
        ValueError,
        "clipped: tokens should be a text, got none",
    ),
    (
        lambda: smooth(MODEL, TOKENS.float(), SCHEME),
        TypeError,
        "smooth: tokens should be integers (T,)",
    ),
    (lambda: smooth(MODEL, TOKENS, "int4"), TypeError, "scheme should be a scheme"),
    (lambda: awq("model", TOKENS, SCHEME), TypeError, "awq: model should be from fa.decoder"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
