"""GPTQ: against the exact update in float64, better than round-to-nearest on what it saw, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch.func import grad

import funcattn as fa
from funcattn import calibration, packing
from funcattn.calibration import factor, fit, gptq
from funcattn.quantization import Int4, Int8, expand, is_quantized

CONFIG = fa.Config(vocabulary=33, width=32, layers=2, heads=2, kv_heads=1, head_size=16, feed_forward=48, context=64)
MODEL = fa.decoder(CONFIG)
TOKENS = fa.random.randint(fa.key(3), (200,), 0, CONFIG.vocabulary)
SCHEME = fa.int4(group=16)


def weights():
    return fa.tree.map(lambda w: w * (5 if w.dim() > 1 else 1), MODEL.init(fa.key(1)))


def activations(K, n=300):
    """Correlated, as those of a model are, with one feature that is always zero."""
    x = fa.random.normal(fa.key(0), (n, K), torch.float64) @ fa.random.normal(fa.key(1), (K, K), torch.float64)
    x[:, 3] = 0
    return x


def slow(plan, weight, H, damping):
    """The definition: round the heaviest column left, then move those left by what is best, from an inverse of their part of H."""
    K = weight.shape[1]
    H = H + damping * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    scale, least, greatest = packing.spread(plan.scale.double(), K), *((0, 15) if isinstance(plan, Int4) else (-127, 127))
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


@pytest.mark.parametrize("scheme", [SCHEME, fa.int4(group=16, symmetric=True), fa.int8(group=16), fa.w8a8], ids=str)
def test_the_codes_are_those_of_the_exact_update(scheme, monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK", 5)  # several blocks, the last one ragged
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
    assert torch.equal(fit(plan, weight, *factor(torch.zeros(32, 32, dtype=torch.float64))).codes, plan.codes)


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
    assert grad(lambda scale: MODEL.hidden(fitted._replace(norm=scale), windows[0])[0].sum())(fitted.norm).abs().sum() > 0


def test_where_chooses_what_is_fitted():
    fitted = gptq(MODEL, TOKENS, SCHEME, r".*\.(up|down)")(weights())
    chosen = {path.rpartition(".")[2] for path, leaf in fa.tree.items(fitted, is_leaf=is_quantized) if is_quantized(leaf)}
    assert chosen == {"up", "down"}


MIXED = replace(CONFIG, experts=4, experts_per_token=2, expert_size=16, expert_layers=(True, False))
BAD = [
    (lambda: gptq("model", TOKENS, SCHEME), TypeError, "gptq: model should be from fa.decoder, got a str"),
    (lambda: gptq(MODEL, TOKENS.float(), SCHEME), TypeError, "gptq: tokens should be integers (T,)"),
    (lambda: gptq(MODEL, TOKENS[None], SCHEME), TypeError, "gptq: tokens should be integers (T,)"),
    (lambda: gptq(MODEL, [1, 2], SCHEME), TypeError, "got a list"),
    (lambda: gptq(MODEL, TOKENS, "int4"), TypeError, "scheme should be a scheme"),
    (lambda: gptq(MODEL, TOKENS, SCHEME, damping=0.0), ValueError, "gptq: damping should be above 0"),
    (lambda: gptq(fa.decoder(MIXED), TOKENS, SCHEME), ValueError, "gptq: model should be one without experts"),
    (lambda: gptq(MODEL, TOKENS, fa.nf4(group=16))(weights()), TypeError, "gptq: scheme should be int4, int8 or w8a8"),
    (lambda: gptq(MODEL, TOKENS[:40], SCHEME)(weights()), ValueError, "gptq: tokens should be at least 48 tokens, the columns of"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
