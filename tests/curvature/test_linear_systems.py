"""Solutions are those of the dense system, and what cannot be solved says so."""

from functools import partial

import dense_curvature as dense
import pytest
import torch
from dense_curvature import PARAMS, N, close, ravel, vector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import funcattn as fa
from funcattn import curvature

fisher = partial(curvature.fisher, dense.logits, PARAMS)


@pytest.fixture(scope="module")
def F():
    """The dense Fisher matrix."""
    eye = torch.eye(N, dtype=torch.float64)
    rows = vmap(lambda e: ravel(curvature.fisher(dense.logits, PARAMS, dense.UNRAVEL(e))))(eye)
    return (rows + rows.mT) / 2


def test_a_solution_is_that_of_the_dense_system(F):
    b = vector(1)
    whole = curvature.cg(fisher, b, damping=1.0, tolerance=1e-12)
    close(ravel(whole.x), torch.linalg.solve(F + torch.eye(N).double(), ravel(b)))
    matrix = lambda v: dense.UNRAVEL(F @ ravel(v))
    for damping in (0.5, torch.tensor(0.05).double()):
        wanted = torch.linalg.solve(F + damping * torch.eye(N).double(), ravel(b))
        run = curvature.cg(matrix, b, damping=damping, tolerance=1e-12)
        close(ravel(run.x), wanted)
        found = curvature.solve(matrix, b, damping=damping, tolerance=1e-12)
        close(ravel(found.x), wanted)
        rest = ravel(b) - (F + damping * torch.eye(N).double()) @ ravel(found.x)
        torch.testing.assert_close(
            found.residual, rest.norm() / ravel(b).norm(), rtol=0.5, atol=1e-13
        )
        assert found.residual <= 1e-12
        assert int(found.steps) == len(run.norms)  # one more, for the check


@given(st.integers(0, 999), st.integers(1, 7), st.floats(0.01, 1))
@settings(max_examples=15)
def test_a_preconditioner_changes_the_way_and_not_the_solution(seed, n, damping):
    A = fa.random.normal(fa.key(seed), (n, n), torch.float64)
    A, b = A @ A.mT, fa.random.normal(fa.key(seed + 1), (n,), torch.float64)
    whole = A + damping * torch.eye(n).double()
    inverse = 1 / whole.diagonal()
    options = {"damping": damping, "tolerance": 1e-11, "max_steps": 100}
    run = lambda **more: curvature.solve(lambda v: A @ v, b, **options, **more)
    wanted = torch.linalg.solve(whole, b)
    close(run().x, wanted)
    close(run(preconditioner=lambda r: inverse * r).x, wanted)
    exact = run(preconditioner=lambda r: torch.linalg.solve(whole, r))
    close(exact.x, wanted)
    assert int(exact.steps) <= 4


def test_a_run_that_is_continued_has_the_bits_of_an_unbroken_one():
    b = vector(2)
    options = {"damping": 0.1, "tolerance": 0}
    whole = curvature.cg(fisher, b, max_steps=10, **options)
    part = curvature.cg(fisher, b, max_steps=5, **options)
    rest = curvature.cg(fisher, b, max_steps=5, state=part, **options)
    assert fa.tree.allclose(rest, whole, 0, 0)
    assert len(whole.norms) == 11


def test_nothing_is_solved_by_nothing():
    zero = torch.zeros(3)
    assert curvature.cg(lambda v: v, zero).x.tolist() == [0, 0, 0]
    found = curvature.solve(lambda v: v, zero)
    assert (found.x.tolist(), int(found.steps), float(found.residual)) == ([0, 0, 0], 0, 0)


def test_solutions_go_under_vmap():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0])).double()
    rows = fa.random.normal(fa.key(0), (4, 3), torch.float64)
    found = vmap(lambda b: curvature.cg(lambda v: A @ v, b, max_steps=8).x)(rows)
    close(found, torch.linalg.solve(A, rows.mT).mT)
    bad = vmap(lambda b: curvature.cg(lambda v: -(A @ v), b, max_steps=3).x)(rows)
    assert bool(bad.isnan().all())


def test_an_ill_conditioned_system_in_single_precision_is_solved_or_refused():
    """The recurrence of the residual says 1e-6 while the residual itself is far above."""
    A = torch.diag(torch.logspace(0, 6, 30))
    b = torch.ones(30)
    found = curvature.solve(lambda v: A @ v, b, tolerance=1e-4, max_steps=2000)
    true = float((b.double() - A.double() @ found.x.double()).norm() / b.norm())
    assert true <= 1.1e-4
    with pytest.raises(
        ValueError, match=r"solve: the residual should be 1.0e-12 \|b\| or less, got"
    ):
        curvature.solve(lambda v: A @ v, b, tolerance=1e-12, max_steps=2000)


def test_lissa_converges_to_the_dense_solution(F):
    b, damping = vector(1), 0.5
    scale = float(torch.linalg.eigvalsh(F).max()) + damping
    steps = int(25 * scale / damping)  # e^-25 is 1e-11
    matrix = lambda v: F @ v
    found = curvature.lissa(matrix, ravel(b), scale=scale, damping=damping, steps=steps)
    wanted = torch.linalg.solve(F + damping * torch.eye(N).double(), ravel(b))
    close(found.x, wanted)
    assert found.residual < 1e-8
    # One matrix of a sequence at a time: those of halves of a sum have its solution as fixed point
    # of their mean; two equal ones are one.
    twice = curvature.lissa([matrix, matrix], ravel(b), scale=scale, damping=damping, steps=steps)
    assert torch.equal(twice.x, found.x)


def test_a_step_of_lissa_takes_the_matrix_of_its_number():
    b, A = torch.tensor([1.0, 2.0]), [2.0, 6.0]
    x = b
    for j in range(3):
        x = b + x - (A[j % 2] + 0.5) * x / 8
    each = [lambda v: 2.0 * v, lambda v: 6.0 * v]
    found = curvature.lissa(each, b, scale=8.0, damping=0.5, steps=3)
    torch.testing.assert_close(found.x, x / 8)


two = torch.tensor([1.0, 2.0])
indefinite = lambda v: torch.tensor([2.0, -1.0]) * v
BAD = [
    (
        lambda: curvature.cg(indefinite, two),
        ValueError,
        "cg: matvec with damping should be positive definite, got p.(A + damping)p = -0.4 p.p at step 1. Raise damping by more than 0.4",
    ),
    (
        lambda: curvature.solve(indefinite, two, damping=0.1),
        ValueError,
        "solve: matvec with damping should be positive definite",
    ),
    (
        lambda: curvature.cg(lambda v: v, two, preconditioner=lambda r: -r),
        ValueError,
        "cg: preconditioner should be positive definite",
    ),
    (
        lambda: curvature.cg(lambda v: v, two, preconditioner=lambda r: r[:1]),
        ValueError,
        "cg: the result of preconditioner should be (2,)",
    ),
    (
        lambda: curvature.solve(lambda v: torch.tensor([1.0, 9.0]) * v, two, max_steps=1),
        ValueError,
        "solve: the residual should be 1.0e-05 |b| or less",
    ),
    (
        lambda: curvature.cg(lambda v: v, two, max_steps=0),
        ValueError,
        "cg: max_steps should be an int, 1 or more, got 0",
    ),
    (
        lambda: curvature.cg(lambda v: v, two, tolerance=-1.0),
        ValueError,
        "cg: tolerance should be a number, 0 or more, got -1.0",
    ),
    (
        lambda: curvature.cg(lambda v: v, torch.arange(2)),
        TypeError,
        "cg: b should be a tree of floating tensors",
    ),
    (
        lambda: vmap(lambda b: curvature.solve(lambda v: v, b).x)(two[None]),
        ValueError,
        "solve: b should be concrete",
    ),
    (
        lambda: curvature.lissa(lambda v: 3 * v, two, scale=1.0),
        ValueError,
        "lissa: the series should be convergent, got",
    ),
    (
        lambda: curvature.lissa(indefinite, two, scale=2.0),
        ValueError,
        "lissa: the series should be convergent, got",
    ),
    (
        lambda: curvature.lissa([], two, scale=2.0),
        ValueError,
        "lissa: matvecs should be at least one",
    ),
    (
        lambda: curvature.lissa(lambda v: v, two, scale=0),
        ValueError,
        "lissa: scale should be a positive number, got 0",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_results_print_in_a_line():
    run = curvature.cg(lambda v: 2 * v, two)
    assert repr(run) == "ConjugateGradient(1 steps, |residual| 0.00e+00 |b|)"
    assert (
        repr(curvature.solve(lambda v: 2 * v, two)) == "Solved(2 products, |residual| 0.00e+00 |b|)"
    )
