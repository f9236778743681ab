"""The Jacobian lens against one vjp at a time, of the double sum written out."""

import functools
import itertools

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

import funcattn as fa
from funcattn.evaluation import JacobianLens, jacobian_lens

CONFIG = fa.Config(
    vocabulary=40, width=8, layers=3, heads=2, kv_heads=1, head_size=4, feed_forward=16
)
MODEL = fa.decoder(CONFIG)
# ten times the weights of a fresh model, so that the layers matter
PARAMS = fa.tree.map(lambda x: (x if x.dim() == 1 else 10 * x).double(), MODEL.init(fa.key(0)))
TEXTS = [fa.random.randint(fa.key(n), (n,), 0, 40) for n in (6, 8)]
SKIP, E = 2, 8
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def one_by_one(model, params, texts, basis, skip=SKIP):
    """Rows of the mean lens: for each text, layer, direction and position t' a vjp of its own."""
    last = f"layers.{model.config.layers - 1}.output"
    total = torch.zeros(model.config.layers - 1, len(basis), E, dtype=torch.float64)
    for text, layer in itertools.product(texts, range(model.config.layers - 1)):
        name, inner = f"layers.{layer}.output", range(skip, len(text) - 1)
        x = fa.trace(model, params, text, [name])[1][name]
        h, pull = vjp(
            lambda x, text=text, name=name: fa.trace(
                model, params, text, [last], changes={name: x}
            )[1][last],
            x,
        )
        for row, later in itertools.product(range(len(basis)), inner):
            cotangent = torch.zeros_like(h)
            cotangent[later] = basis[row]
            slopes = pull(cotangent)[0]
            total[layer, row] += slopes[skip:-1].sum(0) / len(inner) / len(texts)
    return total


@pytest.mark.parametrize("chunk", [5, 64])
def test_a_lens_is_as_many_vjps_as_the_residual_is_wide(chunk):
    lens = jacobian_lens(MODEL, PARAMS, TEXTS, skip=SKIP, chunk=chunk)
    close(lens.matrices, one_by_one(MODEL, PARAMS, TEXTS, torch.eye(E).double()))
    assert lens.texts == 2


@pytest.mark.parametrize("scheme", [fa.int4(group=8), fa.int8], ids=["int4", "int8"])
def test_a_lens_through_quantized_weights_is_that_of_the_numbers_they_stand_for(scheme):
    params = fa.cast(torch.float32)(PARAMS)
    small = fa.quantize(scheme)(params)
    lens = jacobian_lens(MODEL, small, TEXTS, skip=SKIP).matrices
    wide = fa.cast(torch.float64)(fa.dequantize(small))
    same = one_by_one(MODEL, wide, TEXTS, torch.eye(E).double())
    # a chain of some thirty products of 16 terms, each rounded to float32
    assert (lens - same).norm() < 30 * 16 * 2**-24 * same.norm()
    other = jacobian_lens(MODEL, params, TEXTS, skip=SKIP).matrices
    assert (lens - other).norm() > 1e-3 * other.norm()


def test_directions_are_rows_of_the_matrices():
    whole = jacobian_lens(MODEL, PARAMS, TEXTS, skip=SKIP)
    directions = fa.layers.embed(PARAMS.embedding, torch.tensor([3, 1, 4]))
    some = jacobian_lens(MODEL, PARAMS, TEXTS, skip=SKIP, directions=directions, chunk=2)
    close(some.matrices, directions @ whole.matrices)


def test_a_lens_is_the_mean_over_its_texts():
    each = [jacobian_lens(MODEL, PARAMS, text, skip=0).matrices for text in TEXTS]
    close(jacobian_lens(MODEL, PARAMS, TEXTS, skip=0).matrices, torch.stack(each).mean(0))
    rows = torch.stack([TEXTS[0], TEXTS[1][:6]])
    both = jacobian_lens(MODEL, PARAMS, list(rows), skip=0)
    close(jacobian_lens(MODEL, PARAMS, rows, skip=0).matrices, both.matrices)


def test_the_last_token_and_those_that_are_skipped_do_not_count():
    """The last token is read by nothing; the first ones are, but no derivative is taken there."""
    text = TEXTS[0]
    end = torch.cat([text[:-1], (text[-1:] + 1) % 40])
    begin = torch.cat([(text[:1] + 1) % 40, text[1:]])
    lens = lambda text: jacobian_lens(MODEL, PARAMS, text, skip=SKIP).matrices
    close(lens(end), lens(text))
    assert not torch.allclose(lens(begin), lens(text))
    close(lens(begin), one_by_one(MODEL, PARAMS, [begin], torch.eye(E).double()))


def test_a_lens_of_a_patched_model_is_that_of_what_it_computes():
    """A layer without its attention and feed-forward passes its residual on."""
    without = {
        "layers.2.attention.output": torch.zeros_like,
        "layers.2.feed_forward.output": torch.zeros_like,
    }
    lens = jacobian_lens(fa.patched(MODEL, without), PARAMS, TEXTS, skip=0)
    close(lens.matrices[1], torch.eye(E).double())
    assert not torch.allclose(lens.matrices[0], torch.eye(E).double())


@pytest.mark.parametrize(
    "config",
    [
        {"experts": 4, "experts_per_token": 2, "expert_size": 8},
        {"window": 3, "norm": "layer", "norm_bias": True, "gated": False, "activation": "gelu"},
        {"rope_scaling": fa.layers.RopeScaling("dynamic", 2.0, context=5), "context": 64},
        {"attention_cap": 5.0, "logit_cap": 3.0, "norm_placement": "around"},
    ],
    ids=["experts", "window", "length", "caps"],
)
def test_a_lens_of_other_families_is_that_of_their_vjps(config):
    model = fa.decoder(fa.Config(**{**vars_of(CONFIG), "layers": 2, **config}))
    params = fa.tree.map(lambda x: (x if x.dim() == 1 else 10 * x).double(), model.init(fa.key(1)))
    lens = jacobian_lens(model, params, TEXTS[:1], skip=SKIP)
    close(lens.matrices, one_by_one(model, params, TEXTS[:1], torch.eye(E).double()))


def vars_of(config):
    names = ("vocabulary", "width", "heads", "kv_heads", "head_size", "feed_forward")
    return {name: getattr(config, name) for name in names}


def test_a_lens_goes_through_transforms():
    """vmap over texts, and the derivative in the weights of one entry."""
    rows = torch.stack([TEXTS[0], TEXTS[1][:6]])
    directions = torch.eye(E).double()[:3]
    f = lambda params, text: (
        jacobian_lens(MODEL, params, text, skip=SKIP, directions=directions).matrices
    )
    close(vmap(lambda row: f(PARAMS, row))(rows), torch.stack([f(PARAMS, row) for row in rows]))
    total = lambda params: f(params, rows[0]).sin().sum()
    direction = fa.tree.map(torch.cos, PARAMS)
    pairs = zip(fa.tree.leaves(grad(total)(PARAMS)), fa.tree.leaves(direction), strict=True)
    close(jvp(total, (PARAMS,), (direction,))[1], sum((g * d).sum() for g, d in pairs))


def test_a_lens_of_half_precision_is_summed_in_float32():
    params = fa.cast(torch.bfloat16)(PARAMS)
    lens = jacobian_lens(MODEL, params, TEXTS, skip=SKIP)
    assert lens.matrices.dtype == torch.float32
    exact = jacobian_lens(MODEL, fa.cast(torch.float64)(params), TEXTS, skip=SKIP).matrices
    # a chain of some thirty rounded products: thirty times the rounding of bfloat16, 2^-9
    assert (lens.matrices - exact).norm() < 30 * 2**-9 * exact.norm()


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: jacobian_lens(MODEL, PARAMS, TEXTS), ValueError, r"skip \+ 2 = 18 tokens or more"),
        (lambda: jacobian_lens(MODEL, PARAMS, []), ValueError, "one or more, got none"),
        (lambda: jacobian_lens(MODEL, PARAMS, [[1, 2, 3]], skip=0), TypeError, r"\(T,\) each"),
        (lambda: jacobian_lens(MODEL, PARAMS, TEXTS, skip=-1), ValueError, "got -1"),
        (lambda: jacobian_lens(MODEL, PARAMS, TEXTS, skip=0, chunk=0), ValueError, "chunk"),
        (
            lambda: jacobian_lens(MODEL, PARAMS, TEXTS, skip=0, directions=torch.ones(2, 3)),
            ValueError,
            r"directions should be floating \(M, E\) with E = 8",
        ),
        (
            lambda: jacobian_lens(MODEL, PARAMS, torch.zeros(1, 2, 9).long(), skip=0),
            ValueError,
            r"\(T,\) or \(N, T\)",
        ),
        (
            lambda: jacobian_lens(
                fa.decoder(fa.Config(layers=1)),
                fa.decoder(fa.Config(layers=1)).init(fa.key(0)),
                TEXTS,
                skip=0,
            ),
            ValueError,
            "two layers or more",
        ),
        (
            lambda: jacobian_lens(
                MODEL._replace(hidden=lambda p, t, c=(), **o: (p.embedding[t], ())),
                PARAMS,
                TEXTS,
                skip=0,
            ),
            ValueError,
            "one with taps",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_a_lens_of_a_compiled_model_is_that_of_the_model():
    fast = fa.compile(MODEL, backend="eager")
    lens = jacobian_lens(fast, PARAMS, TEXTS, skip=0)
    assert torch.equal(lens.matrices, jacobian_lens(MODEL, PARAMS, TEXTS, skip=0).matrices)


def test_a_lens_is_a_record():
    lens = jacobian_lens(MODEL, PARAMS, TEXTS, skip=0)
    assert isinstance(fa.tree.map(lambda x: 2 * x, lens), JacobianLens)
