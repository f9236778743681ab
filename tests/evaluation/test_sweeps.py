"""Patching sweeps against one patch at a time."""

import functools

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.evaluation import patching_sweep

CONFIG = fa.Config(
    vocabulary=40, width=8, layers=3, heads=2, kv_heads=1, head_size=4, feed_forward=16
)
MODEL = fa.decoder(CONFIG)
PARAMS = fa.tree.map(lambda x: (x if x.dim() == 1 else 10 * x).double(), MODEL.init(fa.key(0)))
TOKENS, SOURCE = fa.random.randint(fa.key(1), (2, 7), 0, 40)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)
difference = lambda logits: logits[3] - logits[5]


def one_by_one(names, tokens=TOKENS, source=SOURCE, params=PARAMS):
    _, clean = fa.trace(MODEL, params, source)
    effects = []
    for name in names:
        for place in range(len(tokens)):
            here = (torch.arange(len(tokens)) == place)[:, None]
            swap = lambda x, name=name, here=here: torch.where(here, clean[name], x)
            effects.append(difference(fa.patch(MODEL, params, tokens, {name: swap})[-1]))
    return torch.stack(effects).view(len(names), -1)


@pytest.mark.parametrize("chunk", [1, 3, 32])
@pytest.mark.parametrize(
    "where",
    [r"layers\.\d\.output", ["embedding", "layers.1.attention.mixed", "layers.2.attention.k"]],
    ids=["residuals", "others"],
)
def test_a_sweep_is_one_patch_at_a_time(where, chunk):
    sweep = patching_sweep(MODEL, PARAMS, TOKENS, SOURCE, difference, where, chunk=chunk)
    names = [f"layers.{n}.output" for n in range(3)] if isinstance(where, str) else where
    close(sweep.effects, one_by_one(names))
    close(sweep.before, difference(MODEL.extend(PARAMS, TOKENS)[0][-1]))
    close(sweep.source, difference(MODEL.extend(PARAMS, SOURCE)[0][-1]))


def test_the_last_residual_at_the_last_position_is_the_whole_effect():
    sweep = patching_sweep(MODEL, PARAMS, TOKENS, SOURCE, difference)
    close(sweep.effects[-1, -1], sweep.source)
    close(sweep.effects[-1, :-1], sweep.before.expand(6))


def test_a_sweep_goes_through_transforms():
    pairs = torch.stack([SOURCE, SOURCE.flip(0)])
    sweep = lambda params, source: patching_sweep(MODEL, params, TOKENS, source, difference).effects
    close(vmap(sweep, (None, 0))(PARAMS, pairs), torch.stack([sweep(PARAMS, row) for row in pairs]))
    total = lambda params: sweep(params, SOURCE).sin().sum()
    direction = fa.tree.map(torch.cos, PARAMS)
    both = zip(fa.tree.leaves(grad(total)(PARAMS)), fa.tree.leaves(direction), strict=True)
    close(jvp(total, (PARAMS,), (direction,))[1], sum((g * d).sum() for g, d in both))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: patching_sweep(MODEL, PARAMS, TOKENS, SOURCE[:3], difference), "of T = 7 tokens"),
        (lambda: patching_sweep(MODEL, PARAMS, TOKENS[None], SOURCE, difference), r"text \(T,\)"),
        (lambda: patching_sweep(MODEL, PARAMS, TOKENS[:0], SOURCE[:0], difference), r"text \(T,\)"),
        (lambda: patching_sweep(MODEL, PARAMS, TOKENS, SOURCE, lambda x: x), "a scalar tensor"),
        (lambda: patching_sweep(MODEL, PARAMS, TOKENS, SOURCE, lambda x: 1.0), "a scalar tensor"),
        (lambda: patching_sweep(MODEL, PARAMS, TOKENS, SOURCE, difference, chunk=0), "chunk"),
        (
            lambda: patching_sweep(MODEL, PARAMS, TOKENS, SOURCE, difference, ["layers.0.outputs"]),
            "Did you mean",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
