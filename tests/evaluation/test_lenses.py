"""The logit lens against models that end earlier, and against one softmax over all logits."""

import functools

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.evaluation import jacobian_lens, logit_lens

CONFIG = fa.Config(
    vocabulary=40, width=8, layers=3, heads=2, kv_heads=1, head_size=4, feed_forward=16
)
MODEL = fa.decoder(CONFIG)
# ten times the weights of a fresh model, so that the layers matter
PARAMS = fa.tree.map(lambda x: (x if x.dim() == 1 else 10 * x).double(), MODEL.init(fa.key(0)))
PARAMS = PARAMS._replace(norm=torch.linspace(0.5, 2.0, 8).double())
TOKENS = fa.random.randint(fa.key(1), (9,), 0, 40)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def shortened(model, params, layers):
    """The model of the first layers."""
    config = model.config.__class__(**{**vars(model.config), "layers": layers})
    return fa.decoder(config), params._replace(layers=params.layers[:layers])


def whole(params, tokens, layers, model=MODEL):
    """Log-probabilities (T, V) of the model of the first layers."""
    short, weights = shortened(model, params, layers)
    return short.extend(weights, tokens)[0].log_softmax(-1)


@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_a_layer_says_what_a_model_that_ends_there_would(chunk):
    found = logit_lens(MODEL, PARAMS, TOKENS, k=3, chunk=chunk)
    final = whole(PARAMS, TOKENS, 3)
    assert torch.equal(found.targets, final.argmax(-1))
    assert (found.ranks[-1] == 0).all()
    for layer in range(3):
        log_p = whole(PARAMS, TOKENS, layer + 1)
        best, ids = log_p.topk(3, -1)
        assert torch.equal(found.ids[layer], ids)
        close(found.log_probs[layer], best)
        close(found.target_log_probs[layer], log_p.gather(-1, final.argmax(-1)[:, None])[:, 0])
        order = log_p.argsort(-1, descending=True)
        assert torch.equal(
            found.ranks[layer], (order == final.argmax(-1)[:, None]).int().argmax(-1)
        )
        close(found.entropies[layer], torch.distributions.Categorical(logits=log_p).entropy())


@pytest.mark.parametrize(
    "config",
    [
        {"norm": "layer", "norm_bias": True},
        {"norm_offset": 1.0, "logit_cap": 3.0, "logit_scale": 0.5, "embedding_scale": 2.0},
    ],
    ids=["layer norm", "gemma"],
)
def test_each_family_is_read_by_its_own_norm_and_head(config):
    model = fa.decoder(fa.Config(**{**vars(CONFIG), **config}))
    params = fa.tree.map(lambda x: (x + 0.3).double(), model.init(fa.key(2)))
    found = logit_lens(model, params, TOKENS, k=1)
    for layer in range(3):
        close(
            found.log_probs[layer], whole(params, TOKENS, layer + 1, model).amax(-1, keepdim=True)
        )


def test_targets_are_those_that_are_given():
    wanted = TOKENS.roll(-1)
    found = logit_lens(MODEL, PARAMS, TOKENS, targets=wanted)
    for layer in range(3):
        log_p = whole(PARAMS, TOKENS, layer + 1)
        close(found.target_log_probs[layer], log_p.gather(-1, wanted[:, None])[:, 0])
    close(found.target_log_probs[-1, :-1], fa.score(MODEL, PARAMS, TOKENS))


def test_a_lens_transports_the_residual_before_the_norm():
    lens = jacobian_lens(MODEL, PARAMS, TOKENS, skip=0)
    found = logit_lens(MODEL, PARAMS, TOKENS, lens=lens, k=40)
    plain = logit_lens(MODEL, PARAMS, TOKENS, k=40)
    _, seen = fa.trace(MODEL, PARAMS, TOKENS, r"layers\.\d\.output")
    for layer in range(2):
        x = seen[f"layers.{layer}.output"] @ lens.matrices[layer].mT
        x = x * (x.square().mean(-1, keepdim=True) + CONFIG.norm_epsilon).rsqrt() * PARAMS.norm
        log_p = MODEL.logits(PARAMS, x).log_softmax(-1)
        close(found.log_probs[layer], log_p.sort(-1, descending=True).values)
    assert not torch.allclose(found.log_probs[0], plain.log_probs[0])
    close(found.log_probs[-1], plain.log_probs[-1])
    same = lens._replace(matrices=torch.eye(8).double().expand(2, 8, 8))
    close(logit_lens(MODEL, PARAMS, TOKENS, lens=same, k=40).log_probs, plain.log_probs)


def test_leading_axes_are_rows_and_vmap_maps_them():
    rows = torch.stack([TOKENS, TOKENS.flip(0)])
    found = logit_lens(MODEL, PARAMS, rows, k=2)
    for n, row in enumerate(rows):
        one = logit_lens(MODEL, PARAMS, row, k=2)
        close(found.log_probs[:, n], one.log_probs)
        assert torch.equal(found.ranks[:, n], one.ranks)
    mapped = vmap(lambda row: logit_lens(MODEL, PARAMS, row, k=2))(rows)
    close(mapped.log_probs, found.log_probs.movedim(1, 0))


@pytest.mark.parametrize("chunk", [4, 512])
def test_a_log_probability_at_a_layer_has_a_gradient(chunk):
    f = lambda params: (
        logit_lens(MODEL, params, TOKENS, targets=TOKENS, chunk=chunk).target_log_probs[1].sum()
    )
    plain = lambda params: whole(params, TOKENS, 2).gather(-1, TOKENS[:, None]).sum()
    direction = fa.tree.map(torch.cos, PARAMS)
    for ours, theirs in zip(
        fa.tree.leaves(grad(f)(PARAMS)), fa.tree.leaves(grad(plain)(PARAMS)), strict=True
    ):
        close(ours, theirs)
    close(*(jvp(g, (PARAMS,), (direction,))[1] for g in (f, plain)))


def test_a_patched_and_a_compiled_model_say_what_they_compute():
    louder = fa.patched(MODEL, {"layers.1.output": lambda x: -x})
    found, plain = logit_lens(louder, PARAMS, TOKENS), logit_lens(MODEL, PARAMS, TOKENS)
    close(found.log_probs[0], plain.log_probs[0])
    assert not torch.allclose(found.log_probs[1], plain.log_probs[1])
    close(found.target_log_probs[-1], louder.extend(PARAMS, TOKENS)[0].log_softmax(-1).amax(-1))
    fast = logit_lens(fa.compile(MODEL, backend="eager"), PARAMS, TOKENS)
    close(fast.log_probs, plain.log_probs)


def test_logits_are_never_all_in_memory():
    """At most chunk rows go through the head at a time."""
    sizes = []

    def logits(params, x):
        sizes.append(x.numel() // 8)
        return MODEL.logits(params, x)

    logit_lens(MODEL._replace(logits=logits), PARAMS, TOKENS, chunk=4)
    assert max(sizes) == 4


def test_logits_that_are_nan_have_a_rank_that_no_token_has():
    broken = fa.patched(MODEL, {"layers.1.output": lambda x: x / 0 * 0})
    found = logit_lens(broken, PARAMS, TOKENS)
    assert found.target_log_probs[1:].isnan().all()
    assert (found.ranks[1:] == 40).all()
    assert (found.ranks[0] < 40).all()


LENS = jacobian_lens(MODEL, PARAMS, TOKENS, skip=0, directions=torch.eye(8)[:2])


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: logit_lens(MODEL, PARAMS, TOKENS, k=41), ValueError, r"k should be in 1\.\.V"),
        (lambda: logit_lens(MODEL, PARAMS, TOKENS, k=0), ValueError, "k should be"),
        (lambda: logit_lens(MODEL, PARAMS, TOKENS, chunk=0), ValueError, "chunk"),
        (
            lambda: logit_lens(MODEL, PARAMS, TOKENS, targets=TOKENS[:3]),
            ValueError,
            r"targets should be \(9,\) as tokens, got \(3,\)",
        ),
        (
            lambda: logit_lens(MODEL, PARAMS, TOKENS, targets=TOKENS.double()),
            TypeError,
            "targets should be integers",
        ),
        (
            lambda: logit_lens(MODEL, PARAMS, TOKENS, targets=TOKENS + 40),
            ValueError,
            r"ids in 0\.\.39",
        ),
        (lambda: logit_lens(MODEL, PARAMS, TOKENS, lens=LENS), ValueError, r"= \(2, 8, 8\), got"),
        (
            lambda: logit_lens(
                fa.Model(MODEL.init, MODEL.cache, MODEL.hidden, MODEL.logits), PARAMS, TOKENS
            ),
            ValueError,
            "from fa.decoder",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
