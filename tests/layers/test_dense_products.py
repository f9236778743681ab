"""Products of float32 with many vectors by the operator: the numbers of F.linear, by layout,
derivative, transform and mode; and which library is taken.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import native
from funcattn.layers import dense_products, linear
from funcattn.layers.dense_products import Measured, multiply

needs_operator = pytest.mark.skipif(bool(native.load()), reason=native.load())
pytestmark = pytest.mark.cpu("the operator multiplies on the CPU")
EPS = 2.0**-24


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """The operator is taken for any size, as where it was measured to be faster."""
    monkeypatch.setattr(dense_products, "measured", lambda: Measured(2.0, native.load()))
    monkeypatch.setattr(dense_products, "MIN_PRODUCTS", 0)


def matrix(seed, *sizes):
    return fa.random.normal(fa.key(seed), sizes)


@needs_operator
@pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])
@pytest.mark.parametrize("by", ["rows", "columns"])
@pytest.mark.parametrize(
    ("T", "N", "K"), [(16, 32, 8), (17, 1, 1), (29, 100, 193), (45, 33, 400), (64, 15, 16)]
)
def test_it_is_the_product_in_every_layout(T, N, K, by, instructions):
    if torch.ops.funcattn.instructions(instructions) != instructions:
        pytest.skip("the processor has no such instructions")
    weight = matrix(0, N, K) if by == "rows" else matrix(0, K, N).mT
    wide = matrix(1, T, K + 3)
    try:
        for x in (wide[:, :K], wide[:, :K].contiguous(), matrix(1, K, T).mT):
            got, exact = multiply(weight, x), x.double() @ weight.double().mT
            # Parts of 192 products, one of them in each lane: an error of (192 + K / 192) roundings
            # of sums that are at most |x| |w|.
            bound = (192 + K / 192) * EPS * (x.abs() @ weight.abs().mT)
            assert bool(((got - exact).abs() <= bound).all())
    finally:
        torch.ops.funcattn.instructions(-1)
    many = multiply(weight, x.expand(2, T, K))
    assert many.shape == (2, T, N)
    assert torch.equal(many[1], got if instructions == 2 else many[0])


@needs_operator
def test_a_row_is_the_same_among_any_others():
    weight, x = matrix(0, 70, 500), matrix(1, 61, 500)
    whole = multiply(weight, x)
    for rows in (slice(0, 16), slice(3, 40), slice(44, 61)):
        assert torch.equal(multiply(weight, x[rows]), whole[rows])
    assert torch.equal(multiply(weight[:33], x), whole[:, :33])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(multiply(weight, x.repeat(40, 1))[:61], whole)
    finally:
        torch.set_num_threads(threads)


@needs_operator
def test_what_is_not_finite_stays_in_its_row():
    weight, x = matrix(0, 40, 30), matrix(1, 20, 30)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    got = multiply(weight, x)
    assert bool(got[3].isnan().all())
    assert not bool(got[7].isfinite().any())
    rest = [t for t in range(20) if t not in (3, 7)]
    assert torch.allclose(got[rest], F.linear(x[rest], weight), atol=1e-5)


@needs_operator
def test_gradients_are_those_of_linear():
    weight, x = matrix(0, 24, 20).requires_grad_(), matrix(1, 2, 16, 20).requires_grad_()
    c = matrix(2, 2, 16, 24)

    def orders(f):
        y = f(x, weight)
        first = torch.autograd.grad((y.square() * c).sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))
        return y, *first, *second

    for got, wanted in zip(orders(lambda x, w: linear(w, x)), orders(F.linear), strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert multiply(weight, x[0]).grad_fn.name().startswith("_Linear")
    only = torch.autograd.grad(linear(weight.detach(), x).sum(), x)[0]
    assert torch.allclose(only, weight.detach().sum(0).expand_as(x), atol=1e-5)
    torch.autograd.grad(linear(weight, x.detach()).sum(), weight)
    for f in (lambda x, w: linear(w, x), F.linear):  # many cotangents at once
        several = torch.autograd.grad(
            f(x, weight)[0, :, :3].sum(0), (x, weight), torch.eye(3), is_grads_batched=True
        )
        assert torch.allclose(several[0][2, 0], weight[2].expand(16, 20), atol=1e-6)
        assert torch.allclose(several[1][2, 2], x[0].sum(0), atol=1e-5)


@needs_operator
def test_transforms_and_modes_get_linear():
    weight, x = matrix(0, 24, 20), matrix(1, 16, 20)
    seen = []
    watch = lambda x: (seen.append(multiply(weight, x) is None), linear(weight, x))[1]
    wanted = F.linear(x, weight)
    assert torch.equal(vmap(watch)(x.expand(2, 16, 20))[1], wanted)
    jvp(watch, (x,), (x,))
    grad(lambda x: watch(x).sum())(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert watch(x).dtype == torch.bfloat16
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        watch(x)
    assert counter.get_total_flops() == 2 * x.numel() * len(weight)
    with torch.autograd.forward_ad.dual_level():
        watch(torch.autograd.forward_ad.make_dual(x, x))
    assert seen == [True] * 6
    fullgraph = torch.compile(lambda x: linear(weight, x), fullgraph=True, backend="eager")
    assert torch.equal(fullgraph(x), wanted)


def test_other_operands_get_linear():
    weight, x = matrix(0, 24, 20), matrix(1, 16, 20)
    for w, v in (
        (weight.double(), x.double()),
        (weight, x[:15]),
        (weight, x[0]),
        (weight[:, ::2], x[:, ::2]),
        (weight.to("meta"), x.to("meta")),
    ):
        assert multiply(w, v) is None
        assert linear(w, v).shape == F.linear(v, w).shape
    with pytest.raises(RuntimeError, match="20"):
        linear(weight, x[:, :9].contiguous())


def test_the_faster_library_is_taken_and_told(monkeypatch):
    weight, x = matrix(0, 24, 20), matrix(1, 16, 20)
    for ratio, why_not in ((1.05, ""), (0.0, "no compiler is there")):
        monkeypatch.setattr(dense_products, "measured", lambda r=ratio, w=why_not: Measured(r, w))
        assert multiply(weight, x) is None
        assert "by torch" in dense_products.explain()
        assert (why_not or "1.05 times") in dense_products.explain()
    monkeypatch.setattr(dense_products, "measured", lambda: Measured(2.15))
    assert "by the operator funcattn::linear" in dense_products.explain()
    assert "2.15 times" in dense_products.explain()


@needs_operator
def test_a_measured_ratio_is_kept_for_later_processes(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("FUNCATTN_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    times = iter([1.25, 0.8])
    monkeypatch.setattr(dense_products, "_timed", lambda: next(times))
    fresh = dense_products.measured.__wrapped__
    assert fresh() == fresh() == Measured(1.25)
    (kept,) = tmp_path.iterdir()
    kept.write_text("no number")
    assert fresh() == fresh() == Measured(0.8)
    monkeypatch.setenv("FUNCATTN_CACHE", "/proc/none")
    monkeypatch.setattr(dense_products, "_timed", lambda: 1.5)
    assert fresh() == Measured(1.5)
