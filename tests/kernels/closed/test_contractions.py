"""A contraction with its tangents in one pass, and what of it is computed once under vmap."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.kernels.closed import contractions, operators
from funcattn.kernels.closed.algebra import K, L, LowRankFactor, Output, Q, Term
from funcattn.kernels.closed.specs import ContractSpec, tensor_spec

T, S, D = 4, 6, 3
V, A, B = 3, 4, 5  # values, and a factor a . b
X = tuple(
    fa.random.normal(fa.key(n), shape, dtype=torch.float64)
    for n, shape in enumerate([(T, D), (S, D), (T, 1), (S, D), (T, 2), (S, 2)])
)
OUTPUTS = (
    Output("query", (Term((), V, 0.5),)),
    Output("key", (Term(((LowRankFactor(A, B, 2.0),),), Q),)),
)
CONTRACTION = contractions.Contraction(OUTPUTS, scale=0.7)
SPEC = ContractSpec(CONTRACTION, (tensor_spec(X[Q]), tensor_spec(X[K])))


def dense(*x):
    P = (0.7 * x[Q] @ x[K].mT - x[L]).exp()
    return 0.5 * P @ x[V], (P * 2 * (x[A] @ x[B].mT)).mT @ x[Q]


@pytest.fixture
def passes(monkeypatch):
    """Shapes of the outputs of every contraction that runs, where tangents are joined."""
    seen, contract = [], operators.contract
    monkeypatch.setattr(operators, "joins_tangents", lambda kernel: True)
    monkeypatch.setattr(
        operators,
        "contract",
        lambda spec, x: (seen.append([o.shape for o in spec.likes]), contract(spec, x))[1],
    )
    return seen


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("moved", [range(6), [Q], [V], [A, B], [L]], ids=str)
def test_values_and_tangents_are_one_pass(passes, moved):
    def program(f):
        g = lambda *some: f(*[some[list(moved).index(i)] if i in moved else X[i] for i in range(6)])
        return jvp(g, tuple(X[i] for i in moved), tuple(X[i].cos() for i in moved))

    close(program(lambda *x: contractions.contract(SPEC, *x)), program(dense))
    assert len(passes) == 1


def test_a_gradient_inside_of_a_jvp_joins_its_tangents(passes):
    def program(f):
        of_keys = grad(lambda k, q: sum(y.sin().sum() for y in f(q, k, *X[L:])))
        return jvp(of_keys, (X[K], X[Q]), (X[K].cos(), X[Q].cos()))

    close(program(lambda *x: contractions.contract(SPEC, *x)), program(dense))
    assert len(passes) == 2  # the value and its gradient, each with its tangent


def test_what_reads_nothing_mapped_is_computed_once(passes):
    mapped = lambda f: vmap(lambda a: f(*X[:A], a, X[B]))(torch.stack([X[A], X[A].sin()]))
    close(mapped(lambda *x: contractions.contract(SPEC, *x)), mapped(dense))
    assert passes == [[(T, D)], [(2, S, D)]]
    passes.clear()
    many = lambda f: vmap(lambda t: jvp(lambda v: f(*X[:V], v, *X[A:]), (X[V],), (t,)))(
        torch.stack([X[V], X[V].sin()])
    )
    found, wanted = many(lambda *x: contractions.contract(SPEC, *x)), many(dense)
    close(found[0], wanted[0])
    close(found[1][0], wanted[1][0])
    assert passes == [[(T, D), (S, D)], [(2, T, D)]]


def test_autograd_at_the_level_of_forward_mode_keeps_the_gradient_of_tangents(passes):
    v = X[V].clone().requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        moving = torch.autograd.forward_ad.make_dual(v, X[V].cos())
        out, _ = contractions.contract(SPEC, *X[:V], moving, *X[A:])
        (found,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
        found = torch.autograd.forward_ad.unpack_dual(found)
    of_values = grad(lambda v: dense(*X[:V], v, *X[A:])[0].square().sum())
    close(tuple(found), jvp(of_values, (X[V],), (X[V].cos(),)))
