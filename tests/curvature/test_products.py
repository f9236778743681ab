"""Products with curvature are those of the dense matrices of a decoder of 136 weights."""

import weakref
from functools import partial

import dense_curvature as dense
import pytest
import torch
import torch.nn.functional as F
from dense_curvature import FLAT, PARAMS, TEXTS, close, ravel, vector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacrev, jvp, vmap

import funcattn as fa
from funcattn import curvature


def total_cross_entropy(logits, text=TEXTS[0]):
    return F.cross_entropy(logits, text[1:], reduction="sum")


def softmax_hessian(logits):
    """(T, V, V): diag(p) - p p^T of each row."""
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def dense_fisher(params=PARAMS):
    J = dense.dense_jacobian()
    return torch.einsum("tip,tij,tjq->pq", J, softmax_hessian(dense.logits(params)), J)


def dense_empirical():
    J = dense.dense_jacobian(dense.losses)
    return J.mT @ J


PRODUCTS = {
    "hvp": (lambda v: curvature.hvp(dense.loss, PARAMS, v), dense.dense_hessian),
    "ggn": (lambda v: curvature.ggn(dense.logits, total_cross_entropy, PARAMS, v), dense_fisher),
    "fisher": (lambda v: curvature.fisher(dense.logits, PARAMS, v), dense_fisher),
    "empirical_fisher": (
        lambda v: curvature.empirical_fisher(dense.losses, PARAMS, v),
        dense_empirical,
    ),
}
products = pytest.mark.parametrize(("product", "matrix"), PRODUCTS.values(), ids=PRODUCTS.keys())


@products
def test_products_are_those_of_the_dense_matrices(product, matrix):
    v = vector(1)
    close(ravel(product(v)), matrix() @ ravel(v))


def test_jacobian_products_are_those_of_the_dense_jacobian():
    J, v = dense.dense_jacobian(), vector(1)
    u = fa.random.normal(fa.key(2), J.shape[:2], torch.float64)
    close(curvature.jvp(dense.logits, PARAMS, v), J @ ravel(v))
    close(ravel(curvature.vjp(dense.logits, PARAMS, u)), torch.einsum("tv,tvp->p", u, J))


@given(st.integers(0, 99))
@settings(max_examples=5)
def test_jacobian_products_are_transposes(seed):
    f = lambda x: {"s": (x["a"] @ x["b"]).sin(), "t": (x["b"].sum() ** 3,)}
    x = fa.random.normal_like(fa.key(seed), {"a": torch.zeros(3, 2), "b": torch.zeros(2)})
    x = fa.cast(torch.float64)(x)
    u, v = fa.random.normal_like(fa.key(seed + 1), f(x)), fa.random.normal_like(fa.key(7), x)
    left = fa.tree.dot(u, curvature.jvp(f, x, v))
    torch.testing.assert_close(left, fa.tree.dot(curvature.vjp(f, x, u), v))


def test_the_fisher_matrix_is_the_expectation_over_all_labels():
    """Of one row: sum over labels y of p(y) g(y) g(y)^T."""
    v = vector(3)
    one = lambda params: dense.logits(params)[2:3]
    p = one(PARAMS).softmax(-1)[0]
    nll = lambda label: lambda params: -one(params).log_softmax(-1)[:, label]
    parts = [p[y] * ravel(curvature.empirical_fisher(nll(y), PARAMS, v)) for y in range(len(p))]
    close(ravel(curvature.fisher(one, PARAMS, v)), sum(parts))


def test_the_sampled_fisher_matrix_is_that_of_the_drawn_labels():
    v, key = vector(3), fa.key(5)
    found = curvature.sampled_fisher(key, dense.logits, PARAMS, v, batches=TEXTS[:2])
    wanted = 0
    for n, text in enumerate(TEXTS[:2]):
        labels = fa.random.categorical(fa.fold_in(key, n), dense.logits(PARAMS, text))
        J = jacrev(
            dense.flat(
                lambda p, text=text, labels=labels: (
                    dense.logits(p, text).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
                )
            )
        )(FLAT)
        wanted = wanted + J.mT @ (J @ ravel(v))
    close(ravel(found), wanted)


def test_a_product_over_batches_is_that_of_the_sum():
    v = vector(4)
    whole = lambda params: sum(dense.loss(params, text) for text in TEXTS)
    streamed = curvature.hvp(dense.loss, PARAMS, v, batches=TEXTS)
    close(ravel(streamed), ravel(curvature.hvp(whole, PARAMS, v)), 1e-12)
    slopes = curvature.summed(lambda text: grad(dense.loss)(PARAMS, text), list(TEXTS))
    close(ravel(slopes), ravel(grad(whole)(PARAMS)), 1e-12)
    both = curvature.ggn(dense.logits, total_cross_entropy, PARAMS, v, batches=TEXTS[:2])
    each = [
        curvature.fisher(lambda p, text=text: dense.logits(p, text), PARAMS, v)
        for text in TEXTS[:2]
    ]
    close(ravel(both), ravel(each[0]) + ravel(each[1]), 1e-12)


def test_a_sum_holds_one_batch_at_a_time():
    alive, most = set(), []

    class Texts:
        def __iter__(self):
            for n in range(4):
                text = TEXTS[n].clone()
                alive.add(n)
                weakref.finalize(text, alive.discard, n)
                most.append(len(alive))
                yield text
                del text

    curvature.hvp(dense.loss, PARAMS, vector(0), batches=Texts())
    assert max(most) <= 2  # the one being made, and the one before it in the loop's variable


@products
def test_products_are_linear_under_vmap(product, matrix):
    rows = [vector(n) for n in range(2)]
    found = vmap(product)(fa.tree.stack(rows))
    close(vmap(ravel)(found), torch.stack([ravel(v) for v in rows]) @ matrix().mT)


def test_an_hvp_is_differentiable_again():
    f = lambda x: (x["a"].sin().prod() * x["b"]).sum()
    x = {"a": torch.tensor([0.3, 0.8]).double(), "b": torch.tensor([1.5]).double()}
    v = {"a": torch.tensor([1.0, -2.0]).double(), "b": torch.tensor([0.5]).double()}
    flat, unravel = fa.tree.ravel(x)
    w = ravel(v)
    third = lambda p: fa.tree.dot(v, curvature.hvp(f, p, v))
    T = jacrev(hessian(lambda z: f(unravel(z))))(flat)
    close(ravel(grad(third)(x)), torch.einsum("ijk,i,j->k", T, w, w), 1e-12)
    pushed = jvp(lambda p: ravel(curvature.hvp(f, p, v)), (x,), (v,))[1]
    close(pushed, torch.einsum("ijk,j,k->i", T, w, w), 1e-12)
    once = jacrev(lambda z: ravel(curvature.hvp(f, x, unravel(z))))(w)
    close(once, hessian(lambda z: f(unravel(z)))(flat), 1e-12)


def test_an_hvp_compiles():
    f = lambda x: (x["a"].sin() @ x["b"]).sum() ** 2
    x = fa.random.normal_like(fa.key(0), {"a": torch.zeros(2, 3), "b": torch.zeros(3)})
    v = fa.random.normal_like(fa.key(1), x)
    product = partial(curvature.hvp, f)
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert fa.tree.allclose(compiled(x, v), product(x, v), 1e-5, 1e-6)


def test_a_part_of_params_has_the_block_of_the_hessian():
    part, rest = fa.tree.partition(PARAMS, r".*norm.*")
    f = lambda part: dense.loss(fa.tree.combine(part, rest))
    v = fa.random.normal_like(fa.key(0), part)
    zeros = fa.tree.map(torch.zeros_like, rest)
    whole = curvature.hvp(dense.loss, PARAMS, fa.tree.combine(v, zeros))
    found = curvature.hvp(f, part, v)
    assert fa.tree.allclose(found, fa.tree.partition(whole, r".*norm.*")[0], 1e-9, 1e-12)


def test_a_linear_function_has_no_curvature():
    x = {"a": torch.ones(3)}
    assert curvature.hvp(lambda x: x["a"].sum(), x, x)["a"].tolist() == [0, 0, 0]


x, v = {"a": torch.ones(2)}, {"a": torch.ones(2)}
square = lambda x: (x["a"] ** 2).sum()
codes = {"a": torch.ones(2), "n": torch.arange(2)}
BAD = [
    (
        lambda: curvature.hvp(square, codes, codes),
        TypeError,
        "hvp: params should be a tree of floating tensors, got torch.int64 at 'n'. Split off",
    ),
    (
        lambda: curvature.hvp(square, (), ()),
        ValueError,
        "hvp: params should be a tree with elements, got none",
    ),
    (
        lambda: curvature.hvp(square, x, {"a": torch.ones(3)}),
        ValueError,
        "hvp: vector should be (2,) at 'a' as in params, got (3,)",
    ),
    (
        lambda: curvature.hvp(square, x, {"b": torch.ones(2)}),
        ValueError,
        "hvp: vector should be of the structure of params",
    ),
    (
        lambda: curvature.hvp(square, x, {"a": torch.ones(2).double()}),
        TypeError,
        "hvp: vector should be torch.float32 as params, got torch.float64",
    ),
    (
        lambda: curvature.hvp(lambda x: x["a"], x, v),
        TypeError,
        "hvp: f should be a function to a scalar, got torch.float32 (2,)",
    ),
    (
        lambda: curvature.hvp(lambda x: 3.0, x, v),
        TypeError,
        "hvp: f should be a function to a scalar, got float",
    ),
    (lambda: curvature.hvp(3, x, v), TypeError, "hvp: f should be a function, got 3"),
    (
        lambda: curvature.hvp(square, x, v, batches=iter([x])),
        TypeError,
        "hvp: batches should be an iterable that can be read again, got a list_iterator",
    ),
    (
        lambda: curvature.hvp(square, x, v, batches=3),
        TypeError,
        "hvp: batches should be an iterable that can be read again, got 3",
    ),
    (
        lambda: curvature.hvp(square, x, v, batches=[]),
        ValueError,
        "hvp: batches should be at least one, got none",
    ),
    (
        lambda: curvature.ggn(lambda x: x["a"], lambda y: y, x, v),
        TypeError,
        "ggn: loss_f should be a function to a scalar",
    ),
    (
        lambda: curvature.vjp(lambda x: x["a"], x, torch.ones(3)),
        ValueError,
        "vjp: vector should be (2,) as in the outputs, got (3,)",
    ),
    (
        lambda: curvature.sampled_fisher(0, lambda x: x["a"], x, v),
        TypeError,
        "sampled_fisher: key should be one key",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
