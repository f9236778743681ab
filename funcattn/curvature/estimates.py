"""Estimates of a trace and a diagonal from products with random signs, with their errors.

    trace A = E[v . A v],     diagonal A = E[v * (A v)],     v of independent signs

Source: Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989; Bekas,
    Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007; Meyer et al., Hutch++:
    optimal stochastic trace estimation, arXiv:2010.09649.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..core import errors
from ..core.doors import door
from ..randomness import fold_in, rademacher_like
from ..records import ABSENT, Tree, is_absent, record
from ..tree.vectors import axpy, dot, less_projection, norm, scale, vector_pairs
from .iteration import (
    Matvec,
    advance,
    applied,
    check_count,
    check_finite,
    check_vector,
    precision,
)


@record
class Trace(NamedTuple):
    """Draws of a trace: the result of `trace`, and the state from which it continues.

    samples: (draws,), of v . A v for the part of A that the sketch left.
    captured: the trace of the part in the sketch, exactly; a scalar.
    basis: orthonormal vectors of the sketch.
    """

    samples: Tensor
    captured: Tensor
    basis: tuple[Tree, ...]

    @property
    def value(self) -> Tensor:
        """The estimate, a scalar."""
        return self.captured + self.samples.mean()

    @property
    def error(self) -> Tensor:
        """Its standard error, a scalar; NaN of a single draw."""
        n = self.samples.shape[-1]
        if n < 2:
            return torch.full_like(self.captured, torch.nan)
        return self.samples.std() / n**0.5

    def __repr__(self) -> str:
        n = self.samples.shape[-1]
        if not n or errors.value(self.samples) is None:
            return f"Trace({n} draws)"
        return f"Trace({float(self.value):.6g} ± {float(self.error):.2g}, {n} draws)"


@record
class Diagonal(NamedTuple):
    """Draws of a diagonal: the result of `diagonal`, and the state from which it continues.

    value: the estimate, a vector.
    squares: sums of squared deviations from it, a vector.
    draws: int64 (), how many.
    """

    value: Tree
    squares: Tree
    draws: Tensor

    @property
    def error(self) -> Tree:
        """The standard error of each element, a vector; NaN of a single draw."""
        n = self.draws
        return tree.map(lambda x: (x / (n * (n - 1)).to(x.dtype)).sqrt(), self.squares)

    def __repr__(self) -> str:
        return f"Diagonal({int(self.draws)} draws of {tree.count(self.value)} elements)"


@door
def trace(
    key: Tensor,
    matvec: Matvec,
    like: Tree,
    *,
    draws: int = 32,
    sketch: int = 0,
    state: Trace | tuple[()] = ABSENT,
) -> Trace:
    """Estimate the trace of a symmetric matrix, with its standard error.

        sum_i q_i . A q_i + mean over draws of v . A v,    v signs without their part in Q

    Without a sketch it is Hutchinson's estimator, whose variance is that of the off-diagonal part:
    2 (|A|^2 - |diagonal A|^2) / draws. With one it is Hutch++: Q is an orthonormal basis of the
    products of A with `sketch` random vectors, whose part of the trace is exact. The error falls
    faster where few eigenvalues are large, as of a loss.

    A bar shows its progress. A KeyboardInterrupt ends it after the last whole step, with a warning.

    Args:
        key: int64 (2,). Draw n is of fold_in(fold_in(key, 1), n), vector i of the sketch of
            fold_in(fold_in(key, 0), i).
        matvec: the product of a symmetric matrix with a vector.
        like: a tree of floating tensors like a vector, such as params.
        draws: random vectors, in all with those of the state; a product each.
        sketch: vectors of the sketch; two products each, and all are in memory.
        state: a Trace to continue, with the same key and sketch.

    Returns:
        Trace, with `value` and `error`.

    Raises:
        ValueError: a product is not finite; the state is of another space or sketch.

    Example:
        >>> import torch, funcattn as fa
        >>> matrix = torch.diag(torch.arange(4.0))
        >>> trace(fa.key(0), lambda v: matrix @ v, torch.zeros(4), draws=2)
        Trace(6 ± 0, 2 draws)

    Law: equals the estimate by the dense matrix and the same vectors, and is exact where the sketch
        spans the range (test_estimates.py::test_a_trace_is_that_of_the_dense_matrix).
    Source: Hutchinson 1989; Meyer et al., arXiv:2010.09649, algorithm 1.
    """
    check_vector("trace", "like", like)
    check_count("trace", "draws", draws, 1)
    check_count("trace", "sketch", sketch, 0)
    if is_absent(state):
        zero = dot(like, like) * 0
        state = Trace(zero.new_zeros(0), zero.new_zeros(()), ())
    else:
        _check_state("trace", state, Trace)
        if len(state.basis) != sketch and state.samples.shape[-1]:
            remedy = "Continue with the sketch that it was begun with."
            errors.fail("trace", "sketch", f"{len(state.basis)} as of state", sketch, remedy)
    sketches, signs = fold_in(key, 0), fold_in(key, 1)

    def step(found: Trace) -> Trace:
        if (i := len(found.basis)) < sketch:
            drawn = rademacher_like(fold_in(sketches, i), like)
            vector = _orthonormal(applied("trace", matvec, drawn), found.basis)
            captured = dot(vector, applied("trace", matvec, vector))
            check_finite("trace", captured)
            return Trace(found.samples, found.captured + captured, (*found.basis, vector))
        drawn = rademacher_like(fold_in(signs, found.samples.shape[-1]), like)
        drawn = less_projection(drawn, found.basis)
        sample = dot(drawn, applied("trace", matvec, drawn))
        check_finite("trace", sample)
        return found._replace(samples=torch.cat([found.samples, sample.unsqueeze(0)]))

    left = sketch - len(state.basis) + draws - state.samples.shape[-1]
    finished = lambda found: found.samples.shape[-1] >= draws
    return advance(step, state, max(0, left), "trace", finished)


@door
def diagonal(
    key: Tensor,
    matvec: Matvec,
    like: Tree,
    *,
    draws: int = 32,
    state: Diagonal | tuple[()] = ABSENT,
) -> Diagonal:
    """Estimate the diagonal of a symmetric matrix, with standard errors.

    The variance of element i is sum_{j != i} A_ij^2 / draws. A bar shows its progress. A
    KeyboardInterrupt ends it after the last whole step, with a warning.

    Args:
        key: int64 (2,). Draw n is rademacher_like(fold_in(key, n), like).
        matvec: the product of a symmetric matrix with a vector.
        like: a tree of floating tensors like a vector, such as params.
        draws: random vectors, in all with those of the state; a product each.
        state: a Diagonal to continue, with the same key.

    Returns:
        Diagonal(value, squares, draws), with `error`; in float32 at least.

    Raises:
        ValueError: a product is not finite; the state is of another space.

    Example:
        >>> import torch, funcattn as fa
        >>> matrix = torch.diag(torch.arange(4.0))
        >>> diagonal(fa.key(0), lambda v: matrix @ v, torch.zeros(4), draws=2).value
        tensor([0., 1., 2., 3.])

    Law: equals the estimate by the dense matrix and the same vectors
        (test_estimates.py::test_a_diagonal_is_that_of_the_dense_matrix).
    Source: Bekas et al. 2007.
    """
    check_vector("diagonal", "like", like)
    check_count("diagonal", "draws", draws, 1)
    wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    if is_absent(state):
        zeros = tree.map(lambda x: wide(torch.zeros_like(x)), like)
        none = tree.leaves(like)[0].new_zeros((), dtype=torch.int64)
        state = Diagonal(zeros, zeros, none)
    else:
        _check_state("diagonal", state, Diagonal)
        vector_pairs("diagonal", ("like", "value of state"), like, state.value)

    def step(found: Diagonal) -> Diagonal:
        n = int(found.draws)
        drawn = rademacher_like(fold_in(key, n), like)
        product = applied("diagonal", matvec, drawn)
        check_finite("diagonal", dot(product, product))
        sample = tree.map(lambda v, w: wide(v) * wide(w), drawn, product)
        # Welford's update, which holds neither the samples nor a difference of large sums.
        apart = axpy(-1.0, found.value, sample)
        value = axpy(1 / (n + 1), apart, found.value)
        grown = tree.map(lambda s, d: s + d * d * (n / (n + 1)), found.squares, apart)
        return Diagonal(value, grown, found.draws + 1)

    left = max(0, draws - int(state.draws))
    return advance(step, state, left, "diagonal", lambda found: int(found.draws) >= draws)


def _orthonormal(vector: Tree, basis: tuple[Tree, ...]) -> Tree:
    """The part of a vector orthogonal to a basis, normalized; zero where it is but rounding."""
    whole = norm(vector)
    vector = less_projection(vector, basis)
    left = norm(vector)
    is_new = left > 100 * precision(vector) * whole
    return scale(torch.where(is_new, 1 / torch.where(is_new, left, 1.0), 0.0), vector)


def _check_state(function: str, state: object, kind: type) -> None:
    if not isinstance(state, kind):
        remedy = f"Pass what {function} returned."
        got = type(state).__name__
        errors.fail(function, "state", f"a {kind.__name__}", got, remedy, TypeError)
