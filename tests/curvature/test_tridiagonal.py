"""Lanczos' method against the dense Hessian of a decoder of 136 weights."""

import io
import types
from functools import partial

import dense_curvature as dense
import pytest
import torch
from dense_curvature import FLAT, PARAMS, N, close, ravel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import funcattn as fa
from funcattn import curvature, progress


def hessian(v):
    return curvature.hvp(dense.loss, PARAMS, v)


def matrix(v):
    """The same product, of the dense matrix and a flat vector."""
    return dense.dense_hessian() @ v


def T_of(run):
    off = torch.diag(run.beta[:-1], 1)
    return torch.diag(run.alpha) + off + off.mT


def test_the_basis_makes_the_matrix_tridiagonal():
    run = curvature.lanczos(fa.key(1), hessian, PARAMS, 12)
    Q = torch.stack([ravel(v) for v in run.basis])
    close(Q @ Q.mT, torch.eye(12, dtype=torch.float64), 1e-12)
    close(Q @ dense.dense_hessian() @ Q.mT, T_of(run))
    rest = dense.dense_hessian() @ Q[-1] - Q.mT @ T_of(run)[:, -1]
    close(ravel(run.residual), rest)
    close(run.beta[-1], rest.norm())
    start = ravel(fa.random.normal_like(fa.key(1), PARAMS))
    close(Q[0], start / start.norm(), 1e-12)
    assert run.basis[0].layers[0].q.shape == PARAMS.layers[0].q.shape


def test_all_steps_give_all_eigenvalues():
    values = curvature.eigenvalues(curvature.lanczos(fa.key(1), matrix, FLAT, N + 5)).values
    wanted = torch.linalg.eigvalsh(dense.dense_hessian())
    # An eigenvalue that occurs several times (zeros: unused directions) is found once or more.
    away = wanted[wanted.abs() > 1e-6]
    near = (values.unsqueeze(1) - away).abs().amin(0)
    assert float(near.max()) < 1e-8 * float(wanted.abs().max())
    close(values[[0, -1]], wanted[[0, -1]])


def test_a_run_that_is_continued_has_the_bits_of_an_unbroken_one():
    whole = curvature.lanczos(fa.key(2), hessian, PARAMS, 20)
    part = curvature.lanczos(fa.key(2), hessian, PARAMS, 10)
    rest = curvature.lanczos(fa.key(9), hessian, PARAMS, 10, state=part)
    assert fa.tree.allclose(rest, whole, 0, 0)
    for options, kept in (({}, 1), ({"basis": True}, 20)):
        run = lambda steps, state=(), options=options: curvature.lanczos(
            fa.key(2), matrix, FLAT, steps, reorthogonalize=False, state=state, **options
        )
        assert fa.tree.allclose(run(10, run(10)), run(20), 0, 0)
        assert len(run(20).basis) == kept


@given(st.integers(0, 999), st.integers(2, 7), st.integers(1, 7))
@settings(max_examples=15)
def test_an_eigenvalue_lies_within_each_bound(seed, n, k):
    A = fa.random.normal(fa.key(seed), (n, n), torch.float64)
    A = A + A.mT
    run = curvature.lanczos(fa.key(seed + 1), lambda v: A @ v, torch.zeros(n).double(), k)
    values, bounds, weights = curvature.eigenvalues(run)
    assert len(values) == min(k, n)
    true = torch.linalg.eigvalsh(A)
    near = (values.unsqueeze(1) - true).abs().amin(1)
    assert bool((near <= bounds + 1e-12 * true.abs().max()).all())
    torch.testing.assert_close(weights.sum(), torch.ones(()).double())


def test_an_exhausted_space_ends_the_run_and_has_exact_eigenvalues():
    like = torch.zeros(6).double()
    zero = curvature.lanczos(fa.key(0), torch.zeros_like, like, 4)
    assert zero.alpha.tolist() == [0]
    diagonal = torch.tensor([1.0, 1, 1, 4, 4, 4]).double()
    run = curvature.lanczos(fa.key(0), lambda v: diagonal * v, like, 6)
    close(curvature.eigenvalues(run).values, torch.tensor([1.0, 4.0]).double(), 1e-12)
    again = curvature.lanczos(fa.key(0), lambda v: diagonal * v, like, 6, state=run)
    assert fa.tree.allclose(again, run, 0, 0)


def test_a_run_ends_where_every_dimension_is_taken():
    """Also where products round to float32, far above the rounding of vectors in float64."""
    A = torch.diag(torch.arange(1.0, 6.0)) + 0.1
    coarse = lambda v: (A @ v.float()).double()
    run = curvature.lanczos(fa.key(0), coarse, torch.zeros(5).double(), 9)
    assert len(run.alpha) == 5
    close(curvature.eigenvalues(run).values, torch.linalg.eigvalsh(A.double()), 1e-6)


def test_without_reorthogonalization_the_extreme_values_are_right():
    run = curvature.lanczos(fa.key(1), matrix, FLAT, 60, reorthogonalize=False)
    wanted = torch.linalg.eigvalsh(dense.dense_hessian())
    close(curvature.eigenvalues(run).values[[0, -1]], wanted[[0, -1]])


def test_runs_go_under_vmap():
    A = torch.diag(torch.arange(1.0, 7.0).double())
    keys = fa.split(fa.key(0), 3)
    run = lambda key: curvature.lanczos(key, lambda v: A @ v, torch.zeros(6).double(), 3)[:2]
    alpha, beta = vmap(run)(keys)
    for n, key in enumerate(keys):
        close(alpha[n], run(key)[0], 1e-12)
        close(beta[n], run(key)[1], 1e-12)


def test_a_run_prints_its_range():
    run = curvature.lanczos(fa.key(0), lambda v: 2 * v, torch.zeros(3), 1)
    assert repr(run) == "Lanczos(1 steps, Ritz values 2 to 2)"


rotation = torch.tensor([[1.0, -1, 0], [1, 2, -1], [0, 1, 3]])
three = torch.zeros(3)
diagonal = lambda v: torch.arange(3.0) * v
without = curvature.lanczos(fa.key(0), diagonal, three, 2, reorthogonalize=False)
BAD = [
    (
        lambda: curvature.lanczos(fa.key(0), lambda v: rotation @ v, three, 3),
        ValueError,
        "lanczos: matvec should be of a symmetric matrix, got q1.Aq2 =",
    ),
    (
        lambda: curvature.lanczos(fa.key(0), diagonal, three, 0),
        ValueError,
        "lanczos: steps should be an int, 1 or more, got 0",
    ),
    (
        lambda: curvature.lanczos(fa.key(0), diagonal, (), 2),
        ValueError,
        "lanczos: like should be a tree with elements",
    ),
    (
        lambda: curvature.lanczos(fa.key(0), diagonal, torch.arange(3), 2),
        TypeError,
        "lanczos: like should be a tree of floating tensors",
    ),
    (lambda: curvature.lanczos(0, diagonal, three, 2), TypeError, "key should be one key"),
    (
        lambda: curvature.lanczos(fa.key(0), 3, three, 2),
        TypeError,
        "lanczos: matvec should be a function, got 3",
    ),
    (
        lambda: curvature.lanczos(fa.key(0), diagonal, three, 2, state=without),
        ValueError,
        "lanczos: the basis of state should be whole, to reorthogonalize, got 1 of 2",
    ),
    (
        lambda: curvature.lanczos(fa.key(0), diagonal, torch.zeros(2), 2, state=without),
        ValueError,
        "lanczos: the residual of state should be (2,) as in like, got (3,)",
    ),
    (
        lambda: curvature.eigenvalues(without._replace(alpha=torch.zeros(0))),
        ValueError,
        "eigenvalues: run should be of at least one step",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # six products by 135 million weights
def test_a_run_on_smollm2_shows_a_bar_and_is_stopped_and_continued(smollm2, monkeypatch):
    config, params, tokenizer = smollm2
    model = fa.decoder(config)
    sentence = "The lamp on the cape was lit by hand for a hundred and forty years. "
    text = torch.tensor(tokenizer.encode(3 * sentence))[:32]
    assert len(text) == 32
    product = partial(curvature.hvp, lambda params: fa.loss(model, params, text), params)
    screen, calls = io.StringIO(), iter(range(100))
    screen.isatty = lambda: True
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=screen, modules={}))

    def stopped(v):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return product(v)

    run = partial(curvature.lanczos, fa.key(0))
    with pytest.warns(UserWarning, match="lanczos: interrupted after 2 of 3 steps"):
        part = run(stopped, params, 3)
    assert "lanczos 1/3 ########................" in screen.getvalue()
    rest = run(product, params, 1, state=part)
    whole = run(product, params, 3)
    assert torch.equal(rest.alpha, whole.alpha)
    assert torch.equal(rest.beta, whole.beta)
    assert fa.tree.allclose(rest.residual, whole.residual, 0, 0)
    # Orthogonal to the rounding of sums of 135 million products in float32.
    inner = [[float(fa.tree.dot(u, v)) for u in whole.basis] for v in whole.basis]
    close(torch.tensor(inner), torch.eye(3), 1e-5)
    assert float(curvature.eigenvalues(whole).values[-1]) > 10
