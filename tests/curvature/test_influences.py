"""Influences are those of the dense inverse, and the derivative of retraining."""

from functools import partial

import dense_curvature as dense
import pytest
import torch
from dense_curvature import FLAT, PARAMS, TEXTS, UNRAVEL, N, close, ravel
from torch.func import grad, hessian, jacrev, vmap

import funcattn as fa
from funcattn import curvature

BATCHES = [TEXTS[:3], TEXTS[3:]]  # of 3 and 1 texts
QUERY = grad(dense.loss)(PARAMS, TEXTS.flip(0, 1)[0])


def gradients():
    """(4, N), one a text."""
    return vmap(lambda text: ravel(grad(dense.loss)(PARAMS, text)))(TEXTS)


def test_scores_are_those_of_the_dense_inverse():
    mean = lambda z: vmap(partial(dense.loss, UNRAVEL(z)))(TEXTS).mean()
    H = hessian(mean)(FLAT)
    damping = 1 - 2 * float(torch.linalg.eigvalsh(H)[0])  # few steps of conjugate gradients
    x = torch.linalg.solve(H + damping * torch.eye(N).double(), ravel(QUERY))
    found = curvature.influence(
        dense.loss, PARAMS, BATCHES, QUERY, damping=damping, tolerance=1e-11
    )
    close(found, -gradients() @ x)


def test_an_inverse_of_ones_own_takes_the_place_of_conjugate_gradients():
    plain = curvature.influence(dense.loss, PARAMS, BATCHES, QUERY, inverse=lambda b: b)
    close(plain, -gradients() @ ravel(QUERY))
    J = jacrev(dense.flat(dense.logits))(FLAT)
    fisher = partial(curvature.fisher, dense.logits, PARAMS)
    solve = lambda b: curvature.solve(fisher, b, damping=0.5, tolerance=1e-11).x
    found = curvature.influence(dense.loss, PARAMS, BATCHES, QUERY, inverse=solve)
    p = dense.logits(PARAMS).softmax(-1)
    S = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    F = torch.einsum("tip,tij,tjq->pq", J, S, J) + 0.5 * torch.eye(N).double()
    close(found, -gradients() @ torch.linalg.solve(F, ravel(QUERY)))


def test_a_score_is_the_derivative_of_retraining():
    """Ridge regression, whose optimum under any weights of examples is a linear system."""
    X = fa.random.normal(fa.key(0), (6, 3), torch.float64)
    y = fa.random.normal(fa.key(1), (6,), torch.float64)
    f = lambda w, example: (
        (example["x"] @ w["w"] - example["y"]) ** 2 / 2 + 0.1 * (w["w"] ** 2).sum()
    )
    asked = lambda w: (w["w"].sin()).sum()

    def trained(weights):
        A = torch.einsum("n,ni,nj->ij", weights, X, X) + 0.2 * weights.sum() * torch.eye(3).double()
        return torch.linalg.solve(A, (weights * y) @ X)

    equal = torch.full((6,), 1 / 6, dtype=torch.float64)
    wanted = jacrev(lambda weights: asked({"w": trained(weights)}))(equal)
    w = {"w": trained(equal)}
    batches = [{"x": X[n : n + 2], "y": y[n : n + 2]} for n in (0, 2, 4)]
    close(curvature.influence(f, w, batches, grad(asked)(w), tolerance=1e-12), wanted)


one = torch.ones(3)
f = lambda w, x: (w @ x) ** 2
BAD = [
    (
        lambda: curvature.influence(f, one, iter([one[None]]), one),
        TypeError,
        "influence: batches should be an iterable that can be read again",
    ),
    (
        lambda: curvature.influence(f, one, [], one),
        ValueError,
        "influence: batches should be of examples, got none",
    ),
    (
        lambda: curvature.influence(f, one, [], one, inverse=lambda b: b),
        ValueError,
        "influence: batches should be of examples, got none",
    ),
    (
        lambda: curvature.influence(f, one, [{"x": one[None], "y": torch.ones(2)}], one),
        ValueError,
        "influence: a batch should be a tree of tensors (n, ...) with one n",
    ),
    (
        lambda: curvature.influence(f, one, [torch.tensor(1.0)], one),
        ValueError,
        "influence: a batch should be a tree of tensors (n, ...)",
    ),
    (
        lambda: curvature.influence(f, one, [one[None]], torch.ones(2)),
        ValueError,
        "influence: query should be (3,) as in params, got (2,)",
    ),
    (
        lambda: curvature.influence(lambda w, x: w * x, one, [one[None]], one, inverse=lambda b: b),
        TypeError,
        "influence: f should be a function to a scalar, got (3,)",
    ),
    (
        lambda: curvature.influence(lambda w, x: -f(w, x), one, [one[None]], one),
        ValueError,
        "solve: matvec with damping should be positive definite",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
