"""Traces and diagonals against the dense Hessian of a decoder of 136 weights."""

import itertools
from functools import partial

import dense_curvature as dense
import pytest
import torch
from dense_curvature import FLAT, PARAMS, N, close, ravel

import funcattn as fa
from funcattn import curvature

hessian = partial(curvature.hvp, dense.loss, PARAMS)


def matrix(v):
    return dense.dense_hessian() @ v


def signs(key, n, like=PARAMS):
    rows = [fa.random.rademacher_like(fa.fold_in(key, i), like) for i in range(n)]
    return torch.stack([ravel(row) for row in rows])


def test_a_trace_is_that_of_the_dense_matrix():
    H, key = dense.dense_hessian(), fa.key(1)
    found = curvature.trace(key, hessian, PARAMS, draws=6)
    V = signs(fa.fold_in(key, 1), 6)
    samples = torch.einsum("np,pq,nq->n", V, H, V)
    close(found.samples, samples)
    close(found.value, samples.mean())
    close(found.error, samples.std() / 6**0.5)

    sketched = curvature.trace(key, hessian, PARAMS, draws=3, sketch=4)
    Q = torch.linalg.qr(H @ signs(fa.fold_in(key, 0), 4).mT)[0]
    G = signs(fa.fold_in(key, 1), 3)
    G = G - G @ Q @ Q.mT
    wanted = (Q.mT @ H @ Q).trace() + torch.einsum("np,pq,nq->n", G, H, G).mean()
    close(sketched.value, wanted)

    # Where the sketch spans the range, nothing is left to estimate.
    U = Q[:, :3]
    low = U @ torch.diag(torch.tensor([5.0, 1.0, 2.0]).double()) @ U.mT
    exact = curvature.trace(key, lambda v: low @ v, FLAT, draws=2, sketch=5)
    close(exact.value, torch.tensor(8.0).double())
    close(exact.captured, torch.tensor(8.0).double())
    assert exact.error < 1e-12


def test_hutch_plus_plus_has_less_error_where_few_eigenvalues_are_large():
    errors = [
        float(curvature.trace(fa.key(3), matrix, FLAT, draws=draws, sketch=sketch).error)
        for draws, sketch in ((60, 0), (20, 20))  # 60 products each
    ]
    assert errors[1] < errors[0] / 2


def test_estimates_lie_within_their_errors():
    true = dense.dense_hessian().diagonal()
    found = curvature.trace(fa.key(2), matrix, FLAT, draws=100)
    assert abs(found.value - true.sum()) < 5 * found.error
    each = curvature.diagonal(fa.key(2), matrix, FLAT, draws=100)
    apart = ((each.value - true) / each.error.clamp(min=1e-12)).abs()
    assert float(apart.max()) < 6  # of 136, each beyond with probability 1e-8
    variance = dense.dense_hessian().square().sum(1) - true.square()
    ratio = each.error.square() * 100 / variance
    assert 0.5 < float(ratio[variance > 1e-12].median()) < 1.5


def test_a_diagonal_is_that_of_the_dense_matrix():
    key = fa.key(4)
    found = curvature.diagonal(key, hessian, PARAMS, draws=5)
    V = signs(key, 5)
    samples = V * (V @ dense.dense_hessian())
    close(ravel(found.value), samples.mean(0))
    close(ravel(found.error), samples.std(0) / 5**0.5)
    assert fa.tree.paths(found.value) == fa.tree.paths(PARAMS)


def test_the_mean_over_all_signs_is_the_trace_and_the_diagonal():
    """What makes the estimates unbiased, by enumeration of the 2^5 vectors."""
    A = fa.random.normal(fa.key(0), (5, 5), torch.float64)
    A = A + A.mT
    V = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5))).double()
    close((V * (V @ A)).mean(0), A.diagonal(), 1e-12)


def test_runs_that_are_continued_have_the_bits_of_unbroken_ones():
    for run in (
        partial(curvature.trace, fa.key(1), matrix, FLAT, sketch=2),
        partial(curvature.diagonal, fa.key(1), matrix, FLAT),
    ):
        assert fa.tree.allclose(run(draws=7, state=run(draws=3)), run(draws=7), 0, 0)
        assert fa.tree.allclose(run(draws=3, state=run(draws=3)), run(draws=3), 0, 0)


def test_a_single_draw_has_no_error():
    assert curvature.trace(fa.key(0), matrix, FLAT, draws=1).error.isnan()
    assert curvature.diagonal(fa.key(0), matrix, FLAT, draws=1).error.isnan().all()


def test_half_precision_is_summed_in_single():
    like = torch.zeros(300, dtype=torch.bfloat16)
    found = curvature.trace(fa.key(0), lambda v: v, like, draws=2)
    assert found.value == 300  # 256 + 1 is 256 in bfloat16
    assert curvature.diagonal(fa.key(0), lambda v: v, like, draws=3).value.dtype == torch.float32


def test_estimates_print_in_a_line():
    assert (
        repr(curvature.diagonal(fa.key(0), matrix, FLAT, draws=2))
        == f"Diagonal(2 draws of {N} elements)"
    )
    assert (
        repr(curvature.trace(fa.key(0), lambda v: v, FLAT, draws=2)) == f"Trace({N} ± 0, 2 draws)"
    )


sketched = curvature.trace(fa.key(0), lambda v: v, FLAT, draws=2, sketch=2)
BAD = [
    (
        lambda: curvature.trace(fa.key(0), matrix, FLAT, draws=0),
        "trace: draws should be an int, 1 or more, got 0",
    ),
    (
        lambda: curvature.trace(fa.key(0), matrix, FLAT, sketch=-1),
        "trace: sketch should be an int, 0 or more, got -1",
    ),
    (
        lambda: curvature.trace(fa.key(0), matrix, FLAT, state=sketched),
        "trace: sketch should be 2 as of state, got 0",
    ),
    (lambda: curvature.trace(fa.key(0), matrix, ()), "trace: like should be a tree with elements"),
    (
        lambda: curvature.diagonal(fa.key(0), matrix, FLAT, draws=2.5),
        "diagonal: draws should be an int, 1 or more, got 2.5",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_a_mistake_is_one_clear_error(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)
