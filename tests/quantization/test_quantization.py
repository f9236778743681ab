"""Quantized trees: what they stand for, what their products are worth, every transform through
them, and what is refused.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, jvp, vmap

import funcattn as fa
from funcattn.layers import embed, linear, prepare
from funcattn.low_rank import is_trained
from funcattn.quantization import (
    Int4,
    Int8,
    Int8Dynamic,
    Report,
    expand,
    is_quantized,
    packed,
    packing,
    tiles,
)
from funcattn.quantization.packed import PackedInt4
from funcattn.quantization.reports import Row
from funcattn.records import record
from funcattn.testing import strategies

CONFIG = fa.Config(
    vocabulary=33, width=16, layers=2, heads=2, kv_heads=1, head_size=8, feed_forward=32, context=64
)
MODEL = fa.decoder(CONFIG)
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])

SCHEMES = {
    "int8": fa.int8,
    "int8 in groups": fa.int8(group=8),
    "int4": fa.int4(group=8),
    "int4 symmetric": fa.int4(group=16, symmetric=True),
    "w8a8": fa.w8a8(group=8),
    "w8a8 by rows": fa.w8a8(group=None),
    "nf4": fa.nf4(group=8),
    "fp8": fa.fp8,
    "fp8 wide": fa.fp8(kind="e5m2"),
    "ternary": fa.ternary(group=8),
}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
U8, U16 = 2.0**-8, 2.0**-11  # what rounding to bfloat16 and to float16 changes, of the number


def weights(config=CONFIG, dtype=torch.float32):
    params = fa.decoder(config).init(fa.key(1))
    return fa.tree.map(lambda w: w.to(dtype) * (5 if w.dim() > 1 else 1), params)


def matrix(seed, N, K):
    return fa.random.normal(fa.key(seed), (N, K))


def groups(K, even=False, four=False):
    return st.sampled_from(
        [d for d in range(1, K + 1) if K % d == 0 and not (even and d % 2) and not (four and d % 4)]
    )


# What a record stands for.


@given(st.data(), st.integers(1, 6), st.integers(1, 5), strategies.keys())
def test_a_record_stands_for_a_matrix_near_the_weight(data, N, quarters, key):
    """|dequantize(quantize(w)) - w| is at most half the distance of neighbouring levels, and the rounding of scale and zero."""
    K = 4 * quarters
    w = fa.random.normal(key, (N, K)) * 10.0 ** data.draw(st.integers(-6, 3))
    kind = data.draw(
        st.sampled_from(
            ["int8", "int4", "int4 symmetric", "nf4", "e4m3", "e5m2", "ternary", "w8a8"]
        )
    )
    size = data.draw(groups(K, even=True, four=kind == "ternary"))
    by = packing.groups(w.double(), size)
    most = by.abs().amax(-1, keepdim=True)
    if kind in ("int8", "w8a8"):
        scheme = fa.int8(group=size) if kind == "int8" else fa.w8a8(group=size)
        bound = by.abs().amax(-1, keepdim=True) / 254 * (1 + U8)
    elif kind == "int4":
        low, high = by.amin(-1, keepdim=True), by.amax(-1, keepdim=True)
        scheme, bound = (
            fa.int4(group=size),
            (high - low) / 30 * (1 + U8) + U16 * (low.abs() + high - low),
        )
    elif kind == "int4 symmetric":
        scheme, bound = fa.int4(group=size, symmetric=True), most / 14 * (1 + U8)
    elif kind == "nf4":
        widest = max(b - a for a, b in zip(packing.NF4, packing.NF4[1:], strict=False))
        scheme, bound = fa.nf4(group=size), most * (widest / 2 + 2 * U16)
    elif kind == "ternary":
        scale = by.abs().mean(-1, keepdim=True)
        scheme, bound = (
            fa.ternary(group=size),
            torch.maximum(scale / 2, by.abs() - scale) + 2 * U16 * scale,
        )
    else:
        size, by = K, w.double().unsqueeze(-2)
        largest, digits, least = (
            (448.0, 2.0**-4, 2.0**-10) if kind == "e4m3" else (57344.0, 2.0**-3, 2.0**-17)
        )
        scale = by.abs().amax(-1, keepdim=True) / largest
        scheme, bound = (
            fa.fp8(kind=kind),
            torch.maximum(by.abs() * digits, scale * least) * (1 + U8),
        )
    error = (packing.groups(expand(scheme.encode(w)).double(), size) - by).abs()
    assert (error <= bound).all(), (kind, float((error - bound).max()))


@each_scheme
def test_a_group_of_zeros_stays_zero(scheme):
    w = matrix(0, 5, 16)
    w[1], w[:, :8], w[:, 3] = 0, 0, 0
    found = expand(scheme.encode(w))
    assert found.isfinite().all()
    assert (found[1] == 0).all()
    assert (found[:, :8] == 0).all()


@each_scheme
def test_quantizing_twice_is_quantizing_once(scheme):
    params = weights()
    before = fa.tree.map(torch.clone, params)
    once = fa.quantize(scheme)(params)
    assert fa.tree.allclose(fa.quantize(scheme)(once), once, rtol=0, atol=0)
    # records that are there stay
    assert fa.tree.allclose(fa.quantize(fa.int8)(once), once, rtol=0, atol=0)
    assert fa.tree.allclose(params, before, rtol=0, atol=0)
    assert fa.tree.paths(once, is_leaf=is_quantized) == fa.tree.paths(params)
    chosen = {
        path for path, leaf in fa.tree.items(once, is_leaf=is_quantized) if is_quantized(leaf)
    }
    assert chosen == {path for path, leaf in fa.tree.items(params) if leaf.dim() > 1}


@each_scheme
def test_dequantize_gives_the_tree_of_matrices(scheme):
    params = weights()
    quantized = fa.quantize(scheme)(params)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        back = fa.dequantize(quantized, dtype)
        assert fa.tree.paths(back) == fa.tree.paths(params)
        assert back.layers[0].q.dtype == dtype
        assert back.layers[0].q.shape == params.layers[0].q.shape
    assert torch.equal(fa.dequantize(quantized).layers[1].up, expand(quantized.layers[1].up))


def test_a_tied_head_is_one_record():
    tied = fa.quantize(fa.int4(group=8))(weights())
    assert isinstance(tied.embedding, Int8)
    assert tied.head == ()
    untied = fa.quantize(fa.int4(group=8))(weights(replace(CONFIG, tied=False)))
    assert isinstance(untied.embedding, Int8)
    assert isinstance(untied.head, Int8)


@each_scheme
def test_a_cast_changes_no_codes(scheme):
    quantized = fa.quantize(scheme)(weights())
    for change in (fa.tree.cast(torch.float64), fa.tree.to("cpu")):
        after = change(quantized)
        for (path, a), (_, b) in zip(fa.tree.items(quantized), fa.tree.items(after), strict=True):
            if path.endswith("codes"):
                assert a.dtype == b.dtype
                assert torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))
    assert fa.tree.cast(torch.float64)(quantized).layers[0].q.scale.dtype == torch.float64


# Products.


def allowed(record, x):
    """How far linear(record, x) may be from the product with the matrix, for each output; derived
    in the comments.
    """
    # what rounding errors are a share of
    size = x.double().abs() @ expand(record).double().abs().mT
    exact = (
        4 * x.shape[-1] * torch.finfo(x.dtype if x.element_size() > 2 else torch.float32).eps * size
    )
    if x.element_size() == 2:
        exact = exact + 2 * torch.finfo(x.dtype).eps * size  # of the weight and of the output
    if isinstance(record, Int8) and record.scale.shape[-1] == 1:
        return exact + 3.05 * U8 * size + 1e-30  # bfloat16: activations, scale, and output
    if isinstance(record, Int4):
        # bfloat16: activations and output as above; scale s and zero are rounded each, where (q -
        # 8) s + (zero + 8 s) is their sum, of parts no larger than 8 s and |zero + 8 s|
        scale, zero = record.scale.double(), record.zero.double()
        parts = packing.spread(8 * scale.abs() + (zero + 8 * scale).abs(), x.shape[-1])
        return exact + U8 * (2.1 * size + 1.05 * x.double().abs() @ parts.mT) + 1e-30
    if isinstance(record, Int8Dynamic):
        by = packing.groups(x.double().abs(), x.shape[-1] // record.scale.shape[-1]).amax(-1) / 127
        step = packing.spread(by, x.shape[-1])  # each activation is off by half of it
        return (
            exact
            + 8 * torch.finfo(torch.float32).eps * size
            + step / 2 * 1.001 @ expand(record).double().abs().mT
            + 1e-30
        )
    return exact + 1e-30


def coarser(scheme):
    """In groups that the fast kernel takes."""
    grouped = isinstance(scheme, type(fa.int4)) or (
        isinstance(scheme, type(fa.w8a8)) and scheme.group is not None
    )
    return scheme(group=32) if grouped else scheme


@pytest.fixture(params=[False, True], ids=["torch's kernels", "tiles"])
def tiled(request, monkeypatch):
    """Whether the operator of funcattn.native is there."""
    if request.param and tiles.missing():
        pytest.skip(tiles.missing())
    if not request.param:
        monkeypatch.setattr(tiles, "missing", lambda: "as a test wants it")
    return request.param


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 4), (40,)], ids=str)
def test_a_product_is_that_of_the_matrix(scheme, dtype, lead, tiled):
    for N, K, one in ((12, 16, scheme), (7, 48, scheme), (64, 64, coarser(scheme))):
        weight = one.encode(matrix(1, N, K))
        x = fa.random.normal(fa.key(2), (*lead, K)).to(dtype)
        found = linear(weight, x)
        assert found.dtype == dtype
        assert found.shape == (*lead, N)
        exact = x.double() @ expand(weight).double().mT
        assert ((found.double() - exact).abs() <= allowed(weight, x)).all(), float(
            (found - exact).abs().max()
        )


@pytest.mark.parametrize("narrow", [False, True], ids=["as float32", "fast bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [24, 25, 40])
def test_many_rows_of_large_numbers_are_that_of_the_matrix(dtype, rows, narrow, tiled, monkeypatch):
    """By whichever product the processor asks for; the sum of codes times x alone would be beyond
    float16.
    """
    monkeypatch.setattr("funcattn.quantization.multiplying.bfloat16_is_fast", lambda: narrow)
    for scheme in (fa.int8, fa.int8(group=16)):
        weight, x = scheme.encode(matrix(1, 24, 64)), (300 * matrix(2, rows, 64)).to(dtype)
        assert (x.double().abs() @ weight.codes.double().abs().mT).amax() > torch.finfo(
            torch.float16
        ).max
        found = linear(weight, x)
        assert found.dtype == dtype
        exact = x.double() @ expand(weight).double().mT
        assert ((found.double() - exact).abs() <= allowed(weight, x)).all()


@each_scheme
def test_every_derivative_is_that_of_the_matrix(scheme, tiled):
    weight = coarser(scheme).encode(matrix(1, 48, 32))
    dense = expand(weight).double()
    rows, direction = (fa.random.normal(fa.key(n), (5, 32), torch.float64) for n in (2, 3))
    ours = lambda x: (linear(weight, x) ** 3).sum()
    theirs = lambda x: (straight(weight, dense, x) ** 3).sum()
    hvp = lambda f: lambda x: jvp(grad(f), (x,), (direction[0],))[1]
    x = rows[0]
    product = lambda x: linear(weight, x)
    torch.testing.assert_close(
        jvp(product, (x,), (direction[0],))[1], dense @ direction[0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(jacrev(product)(x), dense, rtol=1e-5, atol=1e-5)
    for name, of in {
        "grad": lambda f: grad(f)(x),
        "jvp": lambda f: jvp(f, (x,), (direction[0],))[1],
        "vmap grad": lambda f: vmap(grad(f))(rows),
        "vmap": lambda f: vmap(f)(rows),
        "hvp": lambda f: hvp(f)(x),
        "vmap hvp": lambda f: vmap(hvp(f))(rows),
        "jacrev of grad": lambda f: jacrev(grad(f))(x),
        "jvp of jvp": lambda f: jvp(
            lambda y: jvp(f, (y,), (direction[0],))[1], (x,), (direction[1],)
        )[1],
    }.items():
        found, wanted = of(ours), of(theirs)
        assert wanted.abs().max() > 0.1, name
        # A cube of what `allowed` permits, thrice over, of the largest number; the derivatives of a
        # linear map are exact.
        share = (
            float((allowed(weight, x) / (x.abs() @ dense.abs().mT)).max())
            if not isinstance(weight, Int8Dynamic)
            else 1e-6
        )
        torch.testing.assert_close(
            found,
            wanted,
            rtol=0,
            atol=(4 * share * 10 + 1e-5) * float(wanted.abs().max()),
            msg=name,
        )


def straight(weight, dense, x):
    """The product in float64; of w8a8 with the activations rounded and the derivative of the
    identity.
    """
    if not isinstance(weight, Int8Dynamic):
        return x @ dense.mT
    still = x.detach()
    by = still.unflatten(-1, (weight.scale.shape[-1], -1)).abs().amax(-1, keepdim=True) / 127
    by = by.expand(*by.shape[:-1], x.shape[-1] // weight.scale.shape[-1]).flatten(-2)
    return (x + ((still / by.clamp(min=1e-30)).round() * by - still)) @ dense.mT


@given(
    strategies.keys(),
    st.sampled_from([8, 32, 64, None]),
    st.sampled_from([1, 3, 18]),
    st.integers(-9, 9),
)
def test_w8a8_is_the_product_of_what_both_were_rounded_to(key, group, rows, power):
    """Against float64, by every kernel; a scale of activations is shared by the columns that share
    one of weights.
    """
    one, two = fa.split(key)
    weight = fa.w8a8(group=group).encode(fa.random.normal(one, (20, 64)))
    x = fa.random.normal(two, (rows, 64), torch.float64) ** 3 * 10.0**power
    x[0, 8:16] = 0
    wanted = straight(weight, expand(weight).double(), x)
    size = x.abs() @ expand(weight).double().abs().mT
    # Sums of 64 products in float32, and an activation in digits is off by 2^-23 of the greatest of
    # its block.
    bound = (
        (2 * 64 + 4) * 2.0**-23 * (size + x.abs().amax() * expand(weight).double().abs().sum(-1))
    )
    assert ((linear(weight, x) - wanted).abs() <= bound).all()


def test_where_bytes_are_not_summed_exactly_they_are_not_used(monkeypatch):
    """As on processors before VNNI, where torch's product of bytes saturates."""
    wrong = lambda a, b: torch.zeros(len(a), b.shape[1], dtype=torch.int32)
    monkeypatch.setattr(packed.aten, "_int_mm", wrong)
    packed.bytes_are_exact.cache_clear()
    try:
        weight, x = fa.w8a8(group=None).encode(matrix(1, 8, 64)), matrix(2, 3, 64)
        torch.testing.assert_close(
            linear(weight, x), straight(weight, expand(weight), x), rtol=1e-5, atol=1e-5
        )
        assert not isinstance(prepare(weight, 3), packed.PackedDynamic)
    finally:
        packed.bytes_are_exact.cache_clear()


@each_scheme
def test_autograd_goes_through_a_product(scheme):
    weight = scheme.encode(matrix(1, 6, 16))
    x = matrix(2, 3, 16).requires_grad_()
    linear(weight, x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expand(weight).sum(0).expand(3, 16), rtol=1e-5, atol=1e-5)


def test_a_scale_has_its_derivative():
    weight, x = fa.int4(group=8).encode(matrix(1, 6, 16)), matrix(2, 2, 16)
    weight = fa.tree.cast(torch.float32)(weight)
    of = lambda f: grad(
        lambda scale, zero: (f(Int4(weight.codes, scale, zero)) ** 2).sum(), argnums=(0, 1)
    )(*weight[1:])
    found, wanted = of(lambda w: linear(w, x)), of(lambda w: x @ expand(w).mT)
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().sum() > 0
        # bfloat16 inside, of two factors
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * float(b.abs().max()))


@each_scheme
def test_an_embedding_is_rows_of_the_matrix(scheme):
    weight = scheme.encode(matrix(1, 9, 16))
    for ids in (torch.tensor(3), torch.tensor([1, 1, 8]), torch.tensor([[0, 2], [4, 8]])):
        assert torch.equal(embed(weight, ids), expand(weight)[ids])
    assert torch.equal(vmap(lambda i: embed(weight, i))(torch.arange(9)), expand(weight))


@each_scheme
def test_experts_are_encoded_one_by_one(scheme):
    w = torch.stack([matrix(n, 8, 16) for n in range(3)])
    tree = {"up": w}
    quantized = fa.quantize(scheme)(tree)["up"]
    for n in range(3):
        one = fa.tree.map(lambda field, n=n: field[n], quantized)
        assert fa.tree.allclose(one, scheme.encode(w[n]), rtol=0, atol=0)
    x, expert = matrix(7, 5, 16), torch.tensor([2, 0, 1, 1, 2])
    found = fa.layers.linear_experts(quantized, x, expert)
    for n, row in enumerate(found):
        weight = scheme.encode(w[expert[n]])
        assert (
            (row.double() - x[n].double() @ expand(weight).double().mT).abs()
            <= allowed(weight, x[n])
        ).all()


@each_scheme
def test_a_model_of_records_is_that_of_their_matrices(scheme):
    quantized = fa.quantize(scheme)(weights())
    of = lambda params: MODEL.logits(params, MODEL.hidden(params, TOKENS)[0])
    found, wanted = of(quantized), of(fa.dequantize(quantized))
    exact = not any(
        isinstance(w, (Int8, Int4, Int8Dynamic))
        for w in fa.tree.leaves(quantized, is_leaf=is_quantized)
    )
    # bfloat16 inside each of 14 products and the head, relative to logits: 16 * 3 * 2^-8 at worst,
    # and chance makes it its root
    assert (found - wanted).norm() <= (1e-5 if exact else 0.1) * wanted.norm()


@each_scheme
def test_an_adaptation_stands_upon_a_record(scheme):
    quantized = fa.quantize(scheme)(weights())
    adapted = fa.lora(2)(fa.key(0), quantized)
    trained, frozen = fa.tree.partition(adapted, is_trained)
    slope = grad(lambda t: fa.loss(MODEL, fa.tree.combine(t, frozen), TOKENS))(trained)
    assert all(float(b.abs().sum()) > 0 for path, b in fa.tree.items(slope) if path.endswith(".b"))


def test_a_sampled_text_comes_from_a_quantized_model():
    tokens = fa.generate(
        fa.key(0), MODEL, fa.quantize(fa.int4(group=8))(weights()), TOKENS, steps=5
    )[0]
    assert tokens.shape == (len(TOKENS) + 5,) or tokens.shape == (5,)


QUICK = ("int8 in groups", "int4", "w8a8")  # to compile; the others are slow


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(scheme, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, scheme in SCHEMES.items()
    ],
)
def test_a_compiled_model_of_records_is_the_model(scheme):
    """The graphs alone; the fast kernels are the same, but int8 meets one vector in float32."""
    params, fast = fa.quantize(scheme)(weights()), fa.compile(MODEL, backend="eager")
    for T in (1, 3):
        _, past = MODEL.apply(params, TOKENS, MODEL.cache(16))
        found, wanted = (
            fast.extend(params, TOKENS[:T], past)[0],
            MODEL.extend(params, TOKENS[:T], past)[0],
        )
        assert (found - wanted).norm() <= 0.1 * wanted.norm()  # see a_model_of_records above


WIDE = fa.Config(
    vocabulary=64,
    width=64,
    layers=2,
    heads=2,
    kv_heads=1,
    head_size=32,
    feed_forward=64,
    context=64,
)


@pytest.mark.cpu("what is packed is for kernels of the CPU")
@pytest.mark.parametrize("scheme", [fa.int8, fa.int4, fa.w8a8], ids=["int8", "int4", "w8a8"])
def test_the_compiler_takes_records_that_are_packed(scheme):
    """Sizes that every kernel takes, one vector and three, really compiled."""
    model, params = fa.decoder(WIDE), fa.quantize(scheme)(weights(WIDE))
    fast, same = fa.compile(model), fa.dequantize(params)
    assert scheme is not fa.int4 or isinstance(
        prepare(params.layers[0].q, 1), PackedInt4 if tiles.missing() else tiles.Tiles
    )
    _, past = model.apply(same, TOKENS, model.cache(16))
    exact = not tiles.missing() and scheme is not fa.w8a8  # else bfloat16, or activations of 8 bits
    for T in (1, 3):
        found, wanted = (
            fast.extend(params, TOKENS[:T], past)[0],
            model.extend(same, TOKENS[:T], past)[0],
        )
        assert (found - wanted).norm() <= (1e-5 if exact else 0.1) * wanted.norm()
    moved = lambda k: fast.extend(params, TOKENS[:1], past._replace(k=k))[0].sum()
    assert grad(moved)(past.k).abs().sum() > 0


def test_the_question_whether_bytes_are_exact_needs_no_real_tensors():
    """Where tensors have shapes alone, as while a graph is traced, the answer is still that of the
    processor.
    """
    answer, weight = packed.bytes_are_exact(), fa.w8a8(group=None).encode(matrix(1, 32, 64))
    packed.bytes_are_exact.cache_clear()
    with FakeTensorMode() as mode:
        found = linear(fa.tree.map(mode.from_tensor, weight), mode.from_tensor(matrix(2, 3, 64)))
    assert found.shape == (3, 32)
    assert packed.bytes_are_exact() is answer


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    "scheme", [fa.int8, fa.int4, fa.int4(group=None), fa.nf4(group=32), fa.w8a8], ids=str
)
def test_a_product_without_numbers_has_a_shape(scheme, rows):
    """Fake tensors have none to prepare: the plain product serves."""
    weight = scheme.encode(matrix(1, 32, 64))
    with FakeTensorMode() as mode:
        found = linear(fa.tree.map(mode.from_tensor, weight), mode.from_tensor(matrix(2, rows, 64)))
    assert found.shape == (rows, 32)


# A scheme of one's own.


@record
class Halves(NamedTuple):
    """The signs of a matrix times its mean size."""

    codes: torch.Tensor
    scale: torch.Tensor


expand.register(Halves, lambda weight: weight.codes.float() * weight.scale)
linear.register(Halves, lambda weight, x: x @ expand(weight).to(x.dtype).mT)


@dataclass(frozen=True)
class Signs:
    def encode(self, weight):
        return Halves(weight.sign().to(torch.int8), weight.abs().mean())


def test_a_scheme_of_ones_own():
    params = weights()
    quantized = fa.quantize(Signs(), r".*\.(up|down)")(params)
    assert isinstance(quantized.layers[0].up, Halves)
    assert quantized.layers[0].q is params.layers[0].q
    assert MODEL.hidden(quantized, TOKENS)[0].isfinite().all()
    assert fa.quantization.report(params, quantized)


# The report.


def test_a_report_says_bits_bytes_and_error():
    params = weights()
    quantized = fa.quantize(fa.int4(group=16))(params)
    rows = {row.path: row for row in fa.quantization.report(params, quantized)}
    assert rows["layers.0.q"].bits == 4 + 32 / 16
    assert rows["layers.0.q"].kind == "Int4"
    assert rows["layers.0.q"].nbytes == fa.tree.nbytes(quantized.layers[0].q)
    exact = (expand(quantized.layers[0].q) - params.layers[0].q).norm() / params.layers[0].q.norm()
    assert rows["layers.0.q"].error == pytest.approx(float(exact), rel=1e-5)
    assert rows["norm"].error == 0
    assert rows["norm"].bits == 32
    text = str(fa.quantization.report(params, quantized))
    assert "layers.0-1.q" in text
    assert "total" in text
    assert fa.quantization.report(params, quantized)._repr_html_().count("<tr>") == len(rows) + 1


def test_layers_of_another_kind_have_a_line_of_their_own():
    row = lambda path, kind, error, note="": Row(path, kind, 4.5, 9, error, note)
    rows = [
        row("layers.0.q", "Int4", 0.1),
        row("layers.1.q", "Int8", 0.01),
        row("layers.2.q", "Int4", 0.2),
        row("layers.3.q", "Int4", 0.3, "2 of 4 experts to nearest"),
        row("norm", "float32", 0.0),
    ]
    lines = [line.split() for line in str(Report(rows)).splitlines()[1:]]
    assert lines[0] == ["layers.0,2.q", "Int4", "4.50", "18", "10.00%", "to", "20.00%"]
    assert lines[1] == ["layers.1.q", "Int8", "4.50", "9", "1.00%"]
    assert lines[2] == [
        "layers.3.q",
        "Int4",
        "4.50",
        "9",
        "30.00%",
        *["2", "of", "4", "experts", "to", "nearest"],
    ]
    assert lines[3] == ["norm", "float32", "4.50", "9", "-"]


# Mistakes.


def spoiled(value):
    params = weights()
    params.layers[1].up[0, 0] = value
    return params


BAD = [
    (lambda: fa.quantize("int8"), TypeError, "quantize: scheme should be a scheme, got a str"),
    (
        lambda: fa.quantize(fa.int8, "(q"),
        ValueError,
        "quantize: where should be a regex of paths, got '(q'",
    ),
    (
        lambda: fa.quantize(fa.int8, 3),
        TypeError,
        "quantize: where should be a regex or a predicate",
    ),
    (
        lambda: fa.quantize(fa.int8, "nothing")(weights()),
        ValueError,
        "quantize: where should be a rule that chooses a leaf",
    ),
    (
        lambda: fa.quantize(fa.int4(group=5))(weights()),
        ValueError,
        "group should be an even divisor of the 16 columns, got 5",
    ),
    (lambda: fa.quantize(fa.int4(group=5))(weights()), ValueError, "layers.0."),
    (
        lambda: fa.quantize(fa.int8(group=3))(weights()),
        ValueError,
        "int8: group should be a divisor of the 16 columns, got 3",
    ),
    (
        lambda: fa.quantize(fa.w8a8)(weights()),
        ValueError,
        "w8a8: group should be a divisor of the 16 columns, got 32",
    ),
    (lambda: fa.quantize(fa.nf4(group=0))(weights()), ValueError, "nf4: group should be"),
    (
        lambda: fa.quantize(fa.ternary(group=2))(weights()),
        ValueError,
        "ternary: group should be a multiple of 4, got 2",
    ),
    (
        lambda: fa.quantize(fa.fp8(kind="e3m4"))(weights()),
        ValueError,
        'fp8: kind should be "e4m3" or "e5m2"',
    ),
    (
        lambda: fa.int4(size=3),
        TypeError,
        "settings should be by name: group, symmetric, clip, got size",
    ),
    (lambda: fa.int4(64), TypeError, "settings should be by name: group, symmetric, clip, got 64"),
    (lambda: fa.int8(weights()), TypeError, "fa.quantize(scheme)(params)"),
    (lambda: fa.ternary(bits=2), TypeError, "settings should be by name: group, got bits"),
    (
        lambda: fa.quantize(fa.int8)(fa.decoder(fa.Config())),
        TypeError,
        "quantize: params should be a tree of weights, got a Model",
    ),
    (lambda: fa.quantize(fa.int8)(()), TypeError, "got a tuple without leaves"),
    (
        lambda: fa.quantize(fa.int8)(spoiled(float("nan"))),
        ValueError,
        "layers.1.up should be finite",
    ),
    (
        lambda: fa.quantize(fa.int8)(spoiled(float("inf"))),
        ValueError,
        "layers.1.up should be finite",
    ),
    (
        lambda: fa.quantize(fa.int8, "w")({"w": torch.ones(2, 2, dtype=torch.int64)}),
        TypeError,
        "quantize: w should be a floating",
    ),
    (
        lambda: fa.quantize(fa.int8, "w")({"w": torch.ones(2)}),
        TypeError,
        "quantize: w should be a floating matrix",
    ),
    (
        lambda: fa.quantize(fa.int8, "w")({"w": torch.ones(0, 2)}),
        ValueError,
        "quantize: w should be a matrix with numbers",
    ),
    (
        lambda: fa.quantization.report(weights(), {"a": torch.ones(1)}),
        ValueError,
        "report: quantized should be a tree with a leaf",
    ),
    (
        lambda: expand(torch.ones(2, 2)),
        TypeError,
        "expand: weight should be a quantized record, got a Tensor",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_the_documentation_runs():
    text = (ROOT / "docs" / "quantization.md").read_text()
    names = {"__name__": "quantization"}
    for block in text.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "quantization.md", "exec"), names)
    chosen = {
        path
        for path, leaf in fa.tree.items(names["signs"], is_leaf=is_quantized)
        if is_quantized(leaf)
    }
    assert "layers.0.up" in chosen
    assert "layers.0.q" not in chosen


@pytest.mark.parametrize("group", [0, -1, 0.5, "32", True, float("inf")])
@pytest.mark.parametrize(
    "scheme", [fa.int8, fa.int4, fa.w8a8, fa.nf4, fa.ternary], ids=lambda scheme: scheme.name
)
def test_a_group_that_cannot_be_is_refused_when_the_scheme_is_made(scheme, group):
    with pytest.raises(
        (ValueError, TypeError), match=f"{scheme.name}: group should be a number of columns"
    ):
        scheme(group=group)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fa.int8(clip=0.0), r"int8: clip should be in \(0, 1\]"),
        (lambda: fa.w8a8(clip=float("nan")), r"w8a8: clip should be in \(0, 1\]"),
        (lambda: fa.int4(symmetric="yes"), "int4: symmetric should be True or False"),
        (lambda: fa.fp8(kind="e3m4"), 'fp8: kind should be "e4m3" or "e5m2"'),
    ],
)
def test_a_setting_of_a_scheme_that_cannot_be_is_refused_when_it_is_made(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("name", ["int8", "int4", "w8a8", "nf4", "fp8", "ternary"])
def test_a_scheme_called_without_settings_is_the_scheme(name):
    scheme = getattr(fa, name)
    assert scheme() == scheme
    assert scheme()() == scheme
    params = {"q": fa.random.normal(fa.key(0), (4, 64))}
    by_value, by_call = (fa.quantize(one)(params) for one in (scheme, scheme()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(fa.tree.leaves(by_value), fa.tree.leaves(by_call), strict=True)
    )


def test_experts_have_levels_of_their_own():
    experts = fa.random.normal(fa.key(0), (3, 8, 64))
    made = fa.quantize(fa.nf4, "gate")({"gate": experts})["gate"]
    each = [fa.quantize(fa.nf4, "gate")({"gate": one})["gate"] for one in experts]
    assert torch.equal(expand(made), torch.stack([expand(one) for one in each]))


@pytest.mark.parametrize("columns", [4, 24, 40])
def test_codes_of_any_number_of_columns_are_multiplied_within_their_matrix(columns):
    """Torch's product of int8 reads 16 columns at a time, and would end the process here."""
    weight = fa.int8.encode(fa.random.normal(fa.key(1), (31, columns)))
    whole = fa.layers.dense(weight, columns, torch.empty(0))
    for rows in (1, 7, 40):
        x = fa.random.normal(fa.key(2), (rows, columns))
        torch.testing.assert_close(fa.layers.linear(weight, x), x @ whole.mT, atol=1e-4, rtol=1e-4)
