"""The cross-entropy over a vocabulary against all logits in float64: every nesting of transforms,
every type of head, few and many rows, and that no pass ever makes all logits.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn.kernels import soft_cap
from funcattn.layers import linear
from funcattn.sharding import Grid, P, shard_map
from funcattn.testing import check_transforms
from funcattn.vocabulary import likelihoods, passes

# Sums of at most 100 products of size one: 1e3 ulp of float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def streamed(monkeypatch):
    """The passes, in blocks of three rows, of problems of any size."""
    monkeypatch.setattr(likelihoods, "SMALL", -1)
    monkeypatch.setattr(passes, "ELEMENTS", 0)
    monkeypatch.setattr(passes, "ROWS", 3)


def normal(seed, *shape, dtype=torch.float64):
    return fa.random.normal(fa.key(seed), shape, dtype)


def ids(N, V):
    return fa.random.randint(fa.key(9), (N,), 0, V)


def dense(hidden, head, targets, cap=None, reduction="mean"):
    logits = linear(head, hidden)
    logits = logits if cap is None else soft_cap(logits, cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


# At these sizes all logits and one of their derivatives are a few hundred numbers.
@pytest.mark.parametrize(
    ("cap", "reduction", "depth"),
    [(1.5, "mean", 2), (None, "none", 2), pytest.param(1.5, "none", 3, marks=pytest.mark.slow)],
)
def test_every_nesting_is_that_of_the_dense_loss(cap, reduction, depth, streamed):
    targets, options = ids(5, 7), {"cap": cap, "reduction": reduction}
    check_transforms(
        lambda x, w: fa.cross_entropy(x, w, targets, **options),
        normal(0, 5, 3),
        normal(1, 7, 3),
        depth=depth,
        reference=lambda x, w: dense(x, w, targets, **options),
        tolerance=1e-10,
    )


@pytest.mark.parametrize("cap", [None, 2.0])
def test_third_derivatives_are_those_of_the_dense_loss(cap, streamed):
    """The first derivatives that no pass computes."""
    targets, x, w = ids(5, 7), normal(0, 5, 3), normal(1, 7, 3)

    def third(f):
        along = lambda f: lambda *a: jvp(f, a, (x.sin(), w.cos()))[1]
        value = lambda x, w: f(x, w, targets, cap=cap)
        return (
            *along(along(grad(value, (0, 1))))(x, w),
            *grad(along(along(value)), (0, 1))(x, w),
            vmap(along(along(along(value))), (0, None))(torch.stack([x, x.cos()]), w),
        )

    for found, wanted in zip(third(fa.cross_entropy), third(dense), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, **EXACT)


@given(
    st.integers(0, 7),
    st.integers(1, 9),
    st.integers(0, 4),
    st.sampled_from([None, 0.5, 30.0]),
    st.sampled_from(["mean", "sum", "none"]),
    st.integers(1, 8),
)
@settings(max_examples=15, deadline=None)
def test_any_sizes_give_the_dense_loss_and_its_derivatives(N, V, E, cap, reduction, rows):
    """One class, no rows and no features included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihoods, "SMALL", -1)
        patch.setattr(passes, "ELEMENTS", 0)
        patch.setattr(passes, "ROWS", rows)
        targets, x, w = ids(N, V), normal(0, N, E), 3 * normal(1, V, E)
        weigh = lambda y: (y * torch.arange(1.0, 1 + y.numel()).double().view(y.shape)).sum()

        def results(f):
            value = lambda x, w: f(x, w, targets, cap=cap, reduction=reduction)
            slope = grad(lambda x, w: weigh(value(x, w)), (0, 1))
            if not N:  # the mean over no targets is NaN, and its gradient has no meaning
                return value(x, w)
            return value(x, w), slope(x, w), jvp(slope, (x, w), (x.sin(), w.cos()))[1]

        torch.testing.assert_close(
            results(fa.cross_entropy), results(dense), equal_nan=True, **EXACT
        )


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_logits_lose_no_more_than_their_differences(size, streamed):
    """Logits of `size` plus a few units: the loss is that of the units, if the sum keeps them."""
    dtype = torch.float32 if size < 1e4 else torch.float64
    units = torch.tensor([[0.0, 2.0, -1.0]], dtype=dtype).mT
    scale = 2.0 ** round(math.log2(size))
    head = torch.cat([torch.ones(3, 1, dtype=dtype), units], 1)
    x = torch.tensor([[scale, 1.0 if size < 1e4 else scale / 2**40]] * 4, dtype=dtype)
    at = torch.tensor([0, 1, 2, 0])
    exact = dense(x[:, 1:], units, at)
    torch.testing.assert_close(fa.cross_entropy(x, head, at), exact, rtol=1e-6, atol=0)
    found = grad(lambda x: fa.cross_entropy(x, head, at, reduction="sum"))(x)
    wanted = grad(lambda x: dense(x, units, at, reduction="sum"))(x[:, 1:])
    torch.testing.assert_close(found[:, 1:], wanted, rtol=1e-5, atol=1e-6)
    one = fa.cross_entropy(x, head[:1], torch.zeros(4, dtype=torch.int64), reduction="none")
    assert (one == 0).all()  # of one class nothing is lost, whatever its logit


def test_a_vmap_over_rows_heads_or_both_is_a_loop(streamed):
    x, w, targets = normal(0, 4, 5, 3), normal(1, 4, 7, 3), ids(20, 7).view(4, 5)
    for dims in ((0, None, 0), (None, 0, None), (0, 0, 0)):
        one = lambda x, dim: x if dim is not None else x[0]
        given = [one(t, d) for t, d in zip((x, w, targets), dims, strict=True)]
        for f in (
            lambda f: f,
            lambda f: grad(f, (0, 1)),
            lambda f: lambda x, w, t: jvp(lambda x, w: grad(f)(x, w, t), (x, w), (x, w))[1],
        ):
            torch.testing.assert_close(
                vmap(f(fa.cross_entropy), dims)(*given), vmap(f(dense), dims)(*given), **EXACT
            )


def heads():
    w = normal(1, 12, 8, dtype=torch.float32)
    adapted = fa.lora(2, lambda path, weight: True)(fa.key(3), {"w": w})["w"]
    return {
        "int8": fa.quantize(fa.int8, lambda *_: True)({"w": w})["w"],
        "int4": fa.quantize(fa.int4(group=4), lambda *_: True)({"w": w})["w"],
        "lora": adapted._replace(b=normal(4, *adapted.b.shape, dtype=torch.float32)),
    }


@pytest.mark.parametrize("name", heads())
def test_a_record_is_the_head_that_its_linear_is(name, monkeypatch):
    monkeypatch.setattr(passes, "ELEMENTS", 0)
    monkeypatch.setattr(passes, "ROWS", 3)
    head, targets = fa.cast(torch.float64)(heads()[name]), ids(7, 12)
    floating, rest = fa.tree.partition(head, lambda _, leaf: leaf.is_floating_point())
    for cap in (None, 2.0):
        f = lambda f, x, floating, cap=cap: f(x, fa.tree.combine(floating, rest), targets, cap=cap)
        x = normal(0, 7, 8)
        along = (x.sin(), fa.tree.map(torch.cos, floating))
        for transform in (
            lambda f: f,
            lambda f: grad(f, (0, 1)),
            lambda f: lambda *a: jvp(grad(f, (0, 1)), a, along)[1],
        ):
            found, wanted = (
                transform(lambda *a, g=g: f(g, *a))(x, floating) for g in (fa.cross_entropy, dense)
            )
            torch.testing.assert_close(fa.tree.leaves(found), fa.tree.leaves(wanted), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_the_rounding_of_its_logits(dtype, streamed):
    """Each logit is rounded once, by half an ulp of its size: the loss is 2-Lipschitz in the
    greatest error of a logit. The gradient rounds d once more, and the result once.
    """
    x, w, targets = normal(0, 40, 16).to(dtype), normal(1, 50, 16).to(dtype), ids(40, 50)
    found = fa.cross_entropy(x, w, targets, reduction="none")
    assert found.dtype == torch.float32
    exact = dense(x.double(), w.double(), targets, reduction="none")
    unit = torch.finfo(dtype).eps / 2
    error = unit * (x.double() @ w.double().mT).abs().amax(-1)
    assert ((found - exact).abs() <= 2 * error + 1e-5).all()
    g = grad(lambda x: fa.cross_entropy(x, w, targets, reduction="sum"))(x)
    wanted = grad(lambda x: dense(x, w.double(), targets, reduction="sum"))(x.double())
    assert g.dtype == dtype
    # p moves by at most a factor exp(2 error), d rounds by a unit, and both are weighed by |w|
    bound = (2 * (error.unsqueeze(-1) * 2).expm1() + 3 * unit) * w.double().abs().amax(0)
    assert ((g - wanted).abs() <= bound).all()


def test_autocast_is_that_of_linear(streamed):
    x, w, targets = (*(normal(n, 9, 4, dtype=torch.float32) for n in (0, 1)), ids(9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        found, slope = torch.func.grad_and_value(lambda x: fa.cross_entropy(x, w, targets))(x)[::-1]
        wanted = F.cross_entropy(F.linear(x, w).float(), targets)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert slope.dtype == torch.float32


ATEN = torch.ops.aten
PRODUCTS = (ATEN.mm.default, ATEN.addmm.default, ATEN.addmm_.default)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made, and of products."""

    def __init__(self):
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        self.products += function in PRODUCTS
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.fixture
def seen(monkeypatch):
    """What the passes make: a mode around them would be given one operation that hides it."""
    mode = Largest()

    def watched(run):
        def call(*arguments):
            with mode:
                return run(*arguments)

        return call

    for name in ("gradient", "hessian", "potential"):
        monkeypatch.setattr(passes, name, watched(getattr(passes, name)))
    return mode


@pytest.mark.parametrize("cap", [None, 1.0])
def test_no_pass_makes_all_logits(cap, seen, monkeypatch):
    """256 x 128 logits in blocks of 16 rows: no tensor is larger than a block or an argument."""
    monkeypatch.setattr(likelihoods, "SMALL", 0)
    monkeypatch.setattr(passes, "ELEMENTS", 0)
    monkeypatch.setattr(passes, "ROWS", 16)
    x, w, targets = normal(0, 256, 4), normal(1, 128, 4), ids(256, 128)
    f = lambda x, w: fa.cross_entropy(x, w, targets, cap=cap)
    hvp = lambda x, w: jvp(grad(f, (0, 1)), (x, w), (x, w))[1]
    for run in (f, grad(f, (0, 1)), hvp):
        seen.elements = 0
        run(x, w)
        assert 16 * 128 / 2 <= seen.elements <= 16 * 128


def test_a_value_is_one_product_a_gradient_three_and_an_hvp_ten(seen, monkeypatch):
    """Of (N, E) with (E, V): the gradient is computed with the value, from the same logits."""
    monkeypatch.setattr(likelihoods, "SMALL", 0)
    x, w, targets = normal(0, 20, 4), normal(1, 30, 4), ids(20, 30)
    f = lambda x, w: fa.cross_entropy(x, w, targets)
    counts = {
        f: 1,
        grad(f): 2,
        grad(f, (0, 1)): 3,
        lambda x, w: jvp(grad(f, (0, 1)), (x, w), (x, w)): 10,
        lambda x, w: jvp(grad(f), (x, w), (x, w)): 7,
    }
    for run, count in counts.items():
        seen.products = 0
        run(x, w)
        assert seen.products == count


def test_autograd_gives_what_grad_gives(streamed):
    x, w, targets = normal(0, 5, 3).requires_grad_(), normal(1, 7, 3).requires_grad_(), ids(5, 7)
    loss = fa.cross_entropy(x, w, targets)
    first = torch.autograd.grad(loss, (x, w), create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), (x, w))
    f = lambda x, w: sum((g * g).sum() for g in grad(dense, (0, 1))(x, w, targets))
    torch.testing.assert_close(first, grad(dense, (0, 1))(x.detach(), w.detach(), targets), **EXACT)
    torch.testing.assert_close(second, grad(f, (0, 1))(x.detach(), w.detach()), **EXACT)
    with torch.no_grad():
        assert not fa.cross_entropy(x, w, targets).requires_grad


@pytest.mark.parametrize("kind", ["tensors", "int8"])
def test_a_sharded_vocabulary_has_the_loss_of_the_whole(kind, streamed):
    """Under value, gradient and hvp; logits of a few hundreds, which exp of the sum would lose."""
    x, w, targets = normal(0, 6, 4), 100 * normal(1, 8, 4), ids(6, 8)
    coded = fa.cast(torch.float64)(fa.quantize(fa.int8, lambda *_: True)({"w": w})["w"])
    head = w if kind == "tensors" else coded
    cuts = fa.tree.map(lambda leaf: P("tensor"), head)
    of = lambda axis: (
        lambda x, head: likelihoods.cross_entropies(
            head,
            fa.collectives.copy_to_region(x, "tensor") if axis else x,
            targets,
            cap=30.0,
            axis=axis,
        ).mean()
    )
    for transform in (
        lambda f: f,
        grad,
        lambda f: lambda x, head: jvp(lambda x: grad(f)(x, head), (x,), (x.sin(),))[1],
    ):
        run = shard_map(transform(of("tensor")), Grid(tensor=2), (P(), cuts), P())
        # products of codes are rounded to float32 where they are neither mapped nor differentiated
        bound = EXACT if kind == "tensors" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(run(x, head), transform(of(None))(x, head), **bound)


@pytest.mark.parametrize("transform", ["grad", "hvp"])
def test_compiled_whole_it_is_what_it_is_eagerly(transform, streamed):
    x, w, targets = normal(0, 7, 3), normal(1, 5, 3), ids(7, 5)
    f = {
        "grad": lambda f: grad(f, (0, 1)),
        "hvp": lambda f: (
            lambda x, w, t: jvp(lambda x, w: grad(f, (0, 1))(x, w, t), (x, w), (x.sin(), w.cos()))[
                1
            ]
        ),
    }[transform]
    found = torch.compile(f(fa.cross_entropy), fullgraph=True, backend="aot_eager")(x, w, targets)
    torch.testing.assert_close(found, f(dense)(x, w, targets), **EXACT)


def test_compiled_code_takes_transposed_arguments(streamed):
    x, w, targets = normal(0, 3, 7).mT, normal(1, 3, 5).mT, ids(7, 5)
    f = torch.compile(grad(fa.cross_entropy, (0, 1)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(x, w, targets), grad(dense, (0, 1))(x, w, targets), **EXACT)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exported_and_traced_it_is_plain_operations(streamed):
    x, w, targets = normal(0, 7, 3), normal(1, 5, 3), ids(7, 5)

    class Loss(torch.nn.Module):
        def forward(self, x, w):
            return fa.cross_entropy(x, w, targets)

    exported = torch.export.export(Loss(), (x, w), strict=False).module()
    torch.testing.assert_close(exported(x, w), dense(x, w, targets), **EXACT)
    traced = torch.jit.trace(lambda x, w: fa.cross_entropy(x, w, targets), (x, w))
    torch.testing.assert_close(traced(x + 1, w), dense(x + 1, w, targets), **EXACT)


def test_it_is_rematerialized_as_any_function_is(streamed):
    x, w, targets = normal(0, 5, 3), normal(1, 7, 3), ids(5, 7)
    hvp = lambda f: jvp(lambda x, w: grad(f, (0, 1))(x, w, targets), (x, w), (x, w))[1]
    torch.testing.assert_close(hvp(fa.remat(fa.cross_entropy)), hvp(dense), **EXACT)


def test_operations_are_counted(streamed):
    """Three products of 6 x 3 with 3 x 7, at two for each multiply-add."""
    x, w, targets = normal(0, 6, 3), normal(1, 7, 3), ids(6, 7)
    with FlopCounterMode(display=False) as counter:
        grad(fa.cross_entropy, (0, 1))(x, w, targets)
    assert counter.get_total_flops() == 3 * 2 * 6 * 3 * 7


x, w, at = torch.ones(4, 3), torch.ones(5, 3), torch.arange(4)
BAD = [
    ((at, w, at), {}, TypeError, "hidden should be a floating tensor"),
    ((x, [w], at), {}, TypeError, "head should be a tensor (V, E) or a record"),
    ((x, w.mT, at), {}, ValueError, "head should be (V, E) with V at least 1 and E = 3"),
    ((x, w[:0], at), {}, ValueError, "head should be (V, E) with V at least 1"),
    ((x, w.double(), at), {}, TypeError, "head should be of the dtype of hidden, torch.float32"),
    ((x, w, at.float()), {}, TypeError, "targets should be an integer tensor"),
    ((x, w, at[:3]), {}, ValueError, "targets should be (4,), as hidden leads, got (3,)"),
    ((x, w, at + 2), {}, ValueError, "targets should be ids in 0..4"),
    ((x, w, at - 100), {}, ValueError, 'weigh the result of reduction="none"'),
    ((x, w, at), {"reduction": "max"}, ValueError, "reduction should be one of"),
    ((x, w, at), {"cap": 0.0}, ValueError, "cap should be a number above 0, or None"),
    ((x, w, at), {"cap": "30"}, ValueError, "cap should be a number above 0, or None"),
]


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), BAD)
def test_a_mistake_is_one_clear_error(arguments, options, kind, message):
    with pytest.raises(kind) as error:
        fa.cross_entropy(*arguments, **options)
    assert str(error.value).startswith("cross_entropy: ")
    assert message in str(error.value)


# The model's loss and its scores.


CONFIG = fa.Config(
    vocabulary=17, width=8, layers=1, heads=2, kv_heads=1, head_size=4, feed_forward=8
)


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": 0.25}, {"logit_cap": 2.0}, {"logit_scale": 3.0, "logit_cap": 2.0}],
)
@pytest.mark.parametrize("weights", ["tied", "untied", "int8"])
def test_a_model_has_the_loss_and_the_scores_of_its_logits(options, weights, streamed):
    config = fa.Config(**{**vars(CONFIG), "tied": weights == "tied", **options})
    model = fa.decoder(config)
    params = fa.cast(torch.float64)(model.init(fa.key(0)))
    if weights == "int8":
        params = fa.cast(torch.float64)(fa.quantize(fa.int8, "head")(params))
    tokens = ids(9, 17)
    logits = lambda p: model.extend(p, tokens[:-1])[0]
    wanted = lambda p: F.cross_entropy(logits(p), tokens[1:])
    floating, rest = fa.tree.partition(params, lambda _, leaf: leaf.is_floating_point())
    for ours in (
        lambda p: fa.loss(model, p, tokens),
        lambda p: -fa.score(model, p, tokens, chunk=3).mean(),
    ):
        for transform in (lambda f: f, grad):
            found, exact = (
                transform(lambda p, f=f: f(fa.tree.combine(p, rest)))(floating)
                for f in (ours, wanted)
            )
            # products of codes are rounded to float32 where they are not differentiated
            bound = 1e-6 if weights == "int8" else 1e-11
            torch.testing.assert_close(
                fa.tree.leaves(found), fa.tree.leaves(exact), rtol=bound, atol=bound
            )


def test_replaced_logits_are_those_of_the_loss_and_the_scores():
    model, tokens = fa.decoder(CONFIG), ids(9, 17)
    params = fa.cast(torch.float64)(model.init(fa.key(0)))
    louder = model._replace(logits=lambda params, x: 5 * model.logits(params, x))
    exact = F.cross_entropy(louder.extend(params, tokens[:-1])[0], tokens[1:], reduction="none")
    torch.testing.assert_close(fa.loss(louder, params, tokens), exact.mean(), **EXACT)
    torch.testing.assert_close(fa.score(louder, params, tokens, chunk=3), -exact, **EXACT)


def test_what_a_target_that_does_not_count_sees_is_unobservable(streamed):
    """NaN in its residual changes no value, gradient or second derivative."""
    model, tokens = fa.decoder(CONFIG), ids(9, 17)
    params = fa.cast(torch.float64)(model.init(fa.key(0)))
    counts = torch.arange(8) != 7

    def loss(params, spoilt):
        def hidden(*arguments, **options):
            x, delta = model.hidden(*arguments, **options)
            return torch.where(counts.unsqueeze(-1), x, spoilt), delta

        return fa.loss(model._replace(hidden=hidden), params, tokens, mask=counts)

    for transform in (
        lambda f: f,
        lambda f: grad(f),
        lambda f: lambda p, s: jvp(lambda p: grad(f)(p, s), (p,), (p,))[1],
    ):
        for a, b in zip(
            *(fa.tree.leaves(transform(loss)(params, s)) for s in (0.0, math.nan)), strict=True
        ):
            assert torch.equal(a, b)


def test_a_mean_over_many_classes_loses_no_small_ones():
    """The curvature along the residual itself is the variance of its logits, a small difference.

    A logit z is off by (E + 1) eps / 2 |z| at most, and so is what is weighted by it; the variance
    is a sum of products of two, of up to |z|^2.
    """
    E, V = 16, 50_000
    x, w = (fa.random.normal(fa.key(n), (rows, E), torch.float32) for n, rows in enumerate((8, V)))
    w = torch.cat([w, torch.ones(V, 1)], -1)
    x = torch.cat([x, 20 * torch.ones(8, 1)], -1)  # all logits of a row are shifted by 20
    targets = torch.arange(8)

    def bend(x, w):
        slope = grad(lambda x: fa.cross_entropy(x, w, targets))
        return (jvp(slope, (x,), (x,))[1] * x).sum()

    exact = bend(x.double(), w.double())
    largest = (x @ w.mT).abs().max()
    assert (bend(x, w) - exact).abs() <= (E + 2) * torch.finfo(torch.float32).eps * largest**2
