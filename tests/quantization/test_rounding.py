"""Weights that multiply vectors of 8 bits: the rounded product, on every path."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.layers import dense, embed, linear, linear_experts, prepare
from funcattn.quantization import Int8Affine, RoundedInputs, expand, packing, round_activations
from funcattn.quantization import tiles as in_tiles
from funcattn.quantization.packed import rounded
from funcattn.quantization.tiles import Tiles

SCHEMES = {
    "int8": fa.int8.encode,
    "int8 in groups": fa.int8(group=32).encode,
    "int8 in groups of 16": fa.int8(group=16).encode,
    "int4": fa.int4.encode,
    "int4 in groups of 64": fa.int4(group=64).encode,
    "int4 symmetric": fa.int4(symmetric=True).encode,
    "int8 with zeros": lambda w: Int8Affine(*packing.affine(w, 32, 256)),
}
each_scheme = pytest.mark.parametrize("encode", SCHEMES.values(), ids=SCHEMES)
EPS = 2.0**-24


def matrix(seed, *sizes):
    return fa.random.normal(fa.key(seed), sizes)


def close(got, weight, x):
    """Within the roundings of a float32 sum over K of the exact product with the rounded x."""
    wide, near = expand(weight).double(), rounded(x, x.shape[-1] // 32).double()
    bound = x.shape[-1] * EPS * (near.abs() @ wide.abs().mT)
    return bool(((got.double() - near @ wide.mT).abs() <= bound).all())


@each_scheme
@pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])
@pytest.mark.parametrize("rows", [1, 3, 7, 8, 21])
def test_it_multiplies_the_rounded_vector(encode, rows, instructions):
    weight, x = encode(matrix(0, 37, 192)), matrix(1, rows, 192)
    x[0, :32], x[-1, 32:64], x[-1, 64:96] = 0, x[-1, 32:64] * 2.0**-70, x[-1, 64:96] * 2.0**66
    if not in_tiles.missing() and torch.ops.funcattn.instructions(instructions) != instructions:
        pytest.skip("the processor has no such instructions")
    try:
        assert close(linear(RoundedInputs(weight), x), weight, x)
    finally:
        if not in_tiles.missing():
            torch.ops.funcattn.instructions(-1)
    narrow = linear(RoundedInputs(weight), x.bfloat16()[None])
    assert narrow.dtype == torch.bfloat16
    assert narrow.shape == (1, rows, 37)


@each_scheme
def test_an_entry_is_off_by_half_a_step(encode):
    weight, x = encode(matrix(0, 48, 128)), matrix(1, 5, 128)
    off = (linear(RoundedInputs(weight), x) - linear(weight, x)).abs()
    step = x.unflatten(-1, (-1, 32)).abs().amax(-1) / 127  # (5, 4)
    bound = step / 2 @ expand(weight).abs().unflatten(-1, (-1, 32)).sum(-1).mT
    assert bool((off <= 1.01 * bound).all())
    assert bool((off > 0.01 * bound).any())  # and is rounded


@each_scheme
def test_derivatives_are_those_without_rounding(encode):
    weight, x, c = encode(matrix(0, 20, 64)), matrix(1, 3, 64), matrix(2, 3, 20)
    of = lambda x: (linear(RoundedInputs(weight), x) * c).sum()
    assert torch.allclose(grad(of)(x), c @ expand(weight), atol=1e-5)
    value, moved = jvp(lambda x: linear(RoundedInputs(weight), x), (x,), (x,))
    assert close(value, weight, x)
    assert torch.allclose(moved, x @ expand(weight).mT, atol=1e-4)
    many = vmap(lambda x: linear(RoundedInputs(weight), x))(matrix(3, 4, 3, 64))
    assert close(many[2], weight, matrix(3, 4, 3, 64)[2])
    tiled = prepare(RoundedInputs(weight), 3)
    assert torch.allclose(
        grad(lambda x: (linear(tiled, x) * c).sum())(x), c @ expand(weight), atol=1e-5
    )


def test_layouts_of_compiled_code_are_tiles_of_int8():
    weight = fa.int4.encode(matrix(0, 32, 64))
    form = prepare(RoundedInputs(weight), 4)
    if in_tiles.missing():
        assert isinstance(form, RoundedInputs)
        return
    assert isinstance(form, Tiles)
    assert form.blocks.dtype == torch.int8
    x = matrix(1, 4, 64)
    assert torch.equal(linear(form, x), linear(RoundedInputs(weight), x))
    both = torch.ops.funcattn.products([form.blocks, prepare(weight, 4).blocks], [], [32, 32], x)
    assert torch.equal(both, torch.cat([linear(form, x), linear(weight, x)], -1))
    traced = torch.compile(lambda x: linear(form, x), fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(x), linear(form, x))


def test_a_tree_is_the_same_but_for_its_products():
    params = fa.quantize(fa.int4)(fa.decoder(CONFIG).init(fa.key(0)))
    near = round_activations()(params)
    again = round_activations()(near)
    assert fa.tree.allclose(fa.dequantize(near), fa.dequantize(params), rtol=0, atol=0)
    assert near.layers[0].q.weight.codes is params.layers[0].q.codes
    assert again.layers[0].q.weight is near.layers[0].q.weight
    assert torch.equal(
        embed(near.embedding, torch.tensor([3])), embed(params.embedding, torch.tensor([3]))
    )
    assert torch.equal(dense(near.layers[0].q, 32, torch.ones(())), expand(params.layers[0].q))
    some = round_activations(r"layers\.0\.(q|up)")(params)
    assert isinstance(some.layers[0].up, RoundedInputs)
    assert not isinstance(some.layers[1].up, RoundedInputs)


CONFIG = fa.Config(
    vocabulary=64, width=32, layers=2, heads=2, kv_heads=1, head_size=16, feed_forward=64
)


def test_a_model_decodes_alike_eager_and_compiled():
    model, tokens = fa.decoder(CONFIG), torch.arange(7)
    near = round_activations()(fa.quantize(fa.int4)(model.init(fa.key(0))))
    whole = model.logits(near, model.hidden(near, tokens)[0])
    for made in (model, fa.compile(model, backend="eager")):
        with torch.no_grad():
            first, past = made.apply(near, tokens[:3], made.cache(8))
            rest, _ = made.apply(near, tokens[3:], past)
        assert torch.allclose(torch.cat([first, rest]), whole, atol=2e-2 * float(whole.abs().max()))
    if not in_tiles.missing():
        assert "operator funcattn::layers" in fa.compile(model).explain(near)


def test_experts_multiply_rounded_vectors():
    weight = fa.tree.stack([fa.int8.encode(matrix(n, 8, 32)) for n in range(3)])
    x, expert = matrix(4, 5, 32), torch.tensor([0, 2, 2, 1, 0])
    got = linear_experts(RoundedInputs(weight), x, expert)
    assert torch.allclose(got, linear_experts(weight, rounded(x), expert))


def test_what_cannot_be_rounded_is_an_error():
    params = {"w": matrix(0, 4, 32), "v": fa.int8.encode(matrix(0, 4, 24))}
    with pytest.raises(ValueError, match="round_activations"):
        round_activations()(params)
    for where in ("w", "v"):
        with pytest.raises(TypeError, match=f"round_activations: {where} should be Int8"):
            round_activations(where)(params)
