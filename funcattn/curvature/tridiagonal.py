"""Lanczos' method: a symmetric matrix, seen from a few products, is a small tridiagonal one.

    A Q = Q T + residual e_k^T,     Q^T Q = 1,     T = tridiagonal(alpha, beta)

Q is an orthonormal basis of v, A v, A^2 v, ...; the eigenvalues of T (Ritz values) approach those
of A from inside, the extreme ones first.

Source: Lanczos, J. Res. Nat. Bur. Stand. 45, 1950; Paige, J. Inst. Math. Appl. 18, 1976 (rounding);
    Parlett, The symmetric eigenvalue problem, 1980, chapter 13 (bounds, reorthogonalization).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door
from ..randomness import normal_like
from ..records import ABSENT, Tree, is_absent, record
from ..tree.vectors import axpy, dot, less_projection, norm, scale, vector_pairs
from .iteration import (
    Matvec,
    advance,
    applied,
    check_count,
    check_finite,
    check_vector,
    concrete,
    precision,
)


@record
class Lanczos(NamedTuple):
    """A run of `lanczos` after k steps: its result, and the state from which it continues.

    alpha: (k,), the diagonal of T.
    beta: (k,): beta[:-1] is the off-diagonal of T, beta[-1] the norm of the residual.
    residual: a vector, the next one of the basis before it is normalized.
    basis: the orthonormal vectors, k where all are kept, else the last one.
        `fa.tree.stack(run.basis)` has leaves (k, *shape).
    """

    alpha: Tensor
    beta: Tensor
    residual: Tree
    basis: tuple[Tree, ...]

    def __repr__(self) -> str:
        k = self.alpha.shape[-1]
        if not k or errors.value(self.beta) is None:
            return f"Lanczos({k} steps)"
        low, high = (float(x) for x in eigenvalues(self).values[[0, -1]])
        return f"Lanczos({k} steps, Ritz values {low:.4g} to {high:.4g})"


@record
class Ritz(NamedTuple):
    """Eigenvalues of the tridiagonal matrix of a run, ascending, in float64.

    values: (k,).
    bounds: (k,): a true eigenvalue lies within this distance of each, up to rounding.
    weights: (k,), squared first components of the eigenvectors; they sum to 1. The values and
        weights are a quadrature: sum_i weights_i f(values_i) approximates v . f(A) v for the
        normalized first vector v, exactly for polynomials of degree below 2 k.
    """

    values: Tensor
    bounds: Tensor
    weights: Tensor


@door
def lanczos(
    key: Tensor,
    matvec: Matvec,
    like: Tree,
    steps: int,
    *,
    reorthogonalize: bool = True,
    basis: bool = False,
    state: Lanczos | tuple[()] = ABSENT,
) -> Lanczos:
    """Reduce a symmetric matrix to a tridiagonal one by `steps` products.

    A bar shows its progress. A KeyboardInterrupt ends it after the last whole step, with a warning.

    Args:
        key: int64 (2,), of the first vector, normal_like(key, like). Not used with a state.
        matvec: the product of a symmetric matrix with a vector, such as
            `partial(hvp, f, params)`.
        like: a tree of floating tensors, of which the structure, shapes and dtypes of vectors are
            taken, such as params. float32 at least: orthogonality is as good as the dtype.
        steps: how many products, in addition to those of the state.
        reorthogonalize: make each vector orthogonal to all before it, twice. Keeps all vectors in
            memory. Without it, orthogonality is lost once an eigenvalue has converged, and that
            value appears again.
        basis: keep all vectors where they are not reorthogonalized, too.
        state: a run to continue.

    Returns:
        Lanczos(alpha, beta, residual, basis). Fewer steps where the space of v, A v, ... is
        exhausted: the eigenvalues of T are then exact.

    Raises:
        ValueError: the matrix is not symmetric, or a product is not finite; the state is of another
            space, or lacks vectors to reorthogonalize against.

    Example:
        >>> import torch, funcattn as fa
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> run = lanczos(fa.key(0), lambda v: matrix @ v, torch.zeros(3), 3)
        >>> eigenvalues(run).values.round(decimals=4)
        tensor([1., 2., 5.], dtype=torch.float64)

    Law: Q^T A Q is T, and Q^T Q = 1
        (test_tridiagonal.py::test_the_basis_makes_the_matrix_tridiagonal);
        10 steps and 10 more are 20 steps, bit for bit
        (test_tridiagonal.py::test_a_run_that_is_continued_has_the_bits_of_an_unbroken_one).
    """
    check_vector("lanczos", "like", like)
    check_count("lanczos", "steps", steps, 1)
    if is_absent(state):
        state = begin(key, like)
    else:
        _check_state(state, like, reorthogonalize)
    keeps = reorthogonalize or basis
    step = lambda run: extend("lanczos", run, matvec, reorthogonalize, keeps)
    return advance(step, state, steps, "lanczos", is_exhausted)


@door
def eigenvalues(run: Lanczos) -> Ritz:
    """Ritz values of a run with their residual bounds: |A y - value y| = beta[-1] |s_k|.

    s is the eigenvector of T, y = Q s the Ritz vector; for eigenvalue i, y is
    sum_j s[j, i] basis[j].

    Args:
        run: of `lanczos`, of at least one step.

    Returns:
        Ritz(values, bounds, weights), each (k,) in float64, on the device of the run.

    Raises:
        ValueError: a run without steps.

    Example:
        >>> import torch, funcattn as fa
        >>> run = lanczos(fa.key(0), lambda v: 3 * v, torch.zeros(5), 1)
        >>> eigenvalues(run).values.round(decimals=4)
        tensor([3.], dtype=torch.float64)

    Law: each bound holds (test_tridiagonal.py::test_an_eigenvalue_lies_within_each_bound).
    Source: Parlett 1980, section 13.2.
    """
    if not run.alpha.shape[-1]:
        errors.fail("eigenvalues", "run", "of at least one step", "none", "Call lanczos first.")
    alpha, beta = run.alpha.double(), run.beta.double()
    off = torch.diag_embed(beta[..., :-1], 1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(alpha) + off + off.mT)
    bounds = beta[..., -1:] * vectors[..., -1, :].abs()
    return Ritz(values, bounds, vectors[..., 0, :].square())


def begin(key: Tensor, like: Tree) -> Lanczos:
    """A run of no steps, whose residual is a random vector."""
    drawn = normal_like(key, like)
    none = norm(drawn).new_zeros(0)
    return Lanczos(none, none, drawn, ())


def extend(
    function: str, run: Lanczos, matvec: Matvec, reorthogonalize: bool, keeps: bool
) -> Lanczos:
    """A run with one more step.

    Args:
        function: for errors, the public function.
        reorthogonalize: against all vectors of the basis, not the last two only.
        keeps: keep all vectors, not the last one only.
    """
    k = run.alpha.shape[-1]
    before = run.beta[-1] if k else norm(run.residual)
    vector = scale(1 / before, run.residual)
    product = applied(function, matvec, vector)
    alpha = dot(vector, product)
    check_finite(function, alpha)
    rest = axpy(-alpha, vector, product)
    if k:
        _check_symmetric(function, run, dot(run.basis[-1], product), precision(vector))
        rest = axpy(-before, run.basis[-1], rest)
    kept = (*run.basis, vector)
    if reorthogonalize:
        rest = less_projection(rest, kept)
    beta = norm(rest)
    check_finite(function, beta)
    join = lambda old, new: torch.cat([old, new.unsqueeze(0)])
    return Lanczos(join(run.alpha, alpha), join(run.beta, beta), rest, kept if keeps else (vector,))


def is_exhausted(run: Lanczos) -> bool:
    """True where no direction is left: the residual is rounding."""
    if not run.alpha.shape[-1]:
        return False
    rounding = 10 * precision(run.residual)
    return concrete(run.beta[-1] <= rounding * _size(run)) == 1.0


def _size(run: Lanczos) -> Tensor:
    """The largest entry of T, a lower bound of the norm of the matrix."""
    return torch.maximum(run.alpha.abs().amax(), run.beta.amax())


def _check_symmetric(function: str, run: Lanczos, found: Tensor, eps: float) -> None:
    """The entry of T above the diagonal, measured, against the one below."""
    wanted = run.beta[-1]
    # u.Hv and v.Hu of SmolLM2 in float32 differ by 4e-7; of another matrix by their size.
    bad = (found - wanted).abs() > 10 * eps**0.5 * torch.maximum(_size(run), found.abs())
    if concrete(bad) == 1.0:
        got = f"q1.Aq2 = {float(found):.6g} and q2.Aq1 = {float(wanted):.6g}"
        remedy = "Eigenvalues of another matrix need another method; use hvp or ggn."
        errors.fail(function, "matvec", "of a symmetric matrix", got, remedy)


def _check_state(state: Lanczos, like: Tree, reorthogonalize: bool) -> None:
    if not isinstance(state, Lanczos):
        remedy = "Pass what lanczos returned."
        errors.fail("lanczos", "state", "a Lanczos", type(state).__name__, remedy, TypeError)
    vector_pairs("lanczos", ("like", "the residual of state"), like, state.residual)
    if reorthogonalize and len(state.basis) < state.alpha.shape[-1]:
        got = f"{len(state.basis)} of {state.alpha.shape[-1]}"
        remedy = "It was run without; continue it with reorthogonalize=False."
        errors.fail("lanczos", "the basis of state", "whole, to reorthogonalize", got, remedy)
