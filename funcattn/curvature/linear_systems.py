"""Linear systems of curvature: (A + damping) x = b by conjugate gradients, or by Neumann's series.

Source: Hestenes and Stiefel, Methods of conjugate gradients, 1952; Martens, Deep learning via
    Hessian-free optimization, ICML 2010; Agarwal, Bullins and Hazan, Second-order stochastic
    optimization (LiSSA), arXiv:1602.03943.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door
from ..progress import track
from ..records import ABSENT, Tree, is_absent, record
from ..tree.vectors import axpy, dot, norm, vector_pairs
from ..tree.vectors import scale as scaled
from .iteration import Matvec, advance, applied, check_count, check_finite, check_vector, concrete


@record
class ConjugateGradient(NamedTuple):
    """A run of `cg` after k steps: its result, and the state from which it continues.

    x: the solution so far, a vector.
    residual: b - (A + damping) x, a vector, by its recurrence.
    direction: the next direction, a vector.
    product: residual . preconditioner(residual), a scalar.
    norms: (k + 1,), of the residuals; norms[0] is |b|.
    """

    x: Tree
    residual: Tree
    direction: Tree
    product: Tensor
    norms: Tensor

    def __repr__(self) -> str:
        left = "" if errors.value(self.norms) is None else f", |residual| {_relative(self):.2e} |b|"
        return f"ConjugateGradient({self.norms.shape[-1] - 1} steps{left})"


@record
class Solved(NamedTuple):
    """A solution.

    x: the solution, a vector.
    residual: |b - (A + damping) x| / |b|, a scalar.
    steps: int64 (), the number of products with A.
    """

    x: Tree
    residual: Tensor
    steps: Tensor

    def __repr__(self) -> str:
        return f"Solved({int(self.steps)} products, |residual| {float(self.residual):.2e} |b|)"


@door
def cg(
    matvec: Matvec,
    b: Tree,
    *,
    damping: float | Tensor = 0.0,
    preconditioner: Matvec | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 100,
    state: ConjugateGradient | tuple[()] = ABSENT,
) -> ConjugateGradient:
    """Conjugate gradients for (A + damping) x = b, as a run that can be stopped and continued.

    A bar shows its progress. A KeyboardInterrupt ends it after the last whole step, with a warning.
    `solve` raises where the residual is not reached; this does not. Under vmap, where residuals are
    not concrete, all max_steps are taken, and an indefinite matrix gives NaN.

    Args:
        matvec: the product of a symmetric matrix A with a vector, A + damping positive definite.
        b: a vector, a tree of floating tensors.
        damping: added to the diagonal.
        preconditioner: the product of a symmetric positive definite matrix near (A + damping)^-1
            with a vector.
        tolerance: end where |residual| <= tolerance |b|.
        max_steps: the most products, in addition to those of the state.
        state: a run to continue, of the same system.

    Returns:
        ConjugateGradient(x, residual, direction, product, norms).

    Raises:
        ValueError: the matrix or the preconditioner is not positive definite (the error says by how
            much), or a product is not finite.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> cg(lambda v: matrix @ v, torch.tensor([3.0, 4.0])).x.round(decimals=4)
        tensor([1., 1.])

    Law: equals the dense solution
        (test_linear_systems.py::test_a_solution_is_that_of_the_dense_system);
        5 steps and 5 more are 10, bit for bit
        (test_linear_systems.py::test_a_run_that_is_continued_has_the_bits_of_an_unbroken_one).
    Source: Hestenes and Stiefel 1952.
    """
    _check("cg", b, tolerance, max_steps)
    if not is_absent(state):
        if not isinstance(state, ConjugateGradient):
            remedy = "Pass what cg returned."
            got = type(state).__name__
            errors.fail("cg", "state", "a ConjugateGradient", got, remedy, TypeError)
        vector_pairs("cg", ("b", "x of state"), b, state.x)
    run = _begin("cg", b, preconditioner) if is_absent(state) else state
    step = lambda run: _step("cg", run, matvec, damping, preconditioner)
    return advance(step, run, max_steps, "cg", lambda run: _is_solved(run, tolerance))


@door
def solve(
    matvec: Matvec,
    b: Tree,
    *,
    damping: float | Tensor = 0.0,
    preconditioner: Matvec | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 100,
) -> Solved:
    """Solve (A + damping) x = b by conjugate gradients, to a residual that is checked.

    The residual is computed at the end from x, not by its recurrence, which drifts in rounding;
    where it is above the tolerance, conjugate gradients go on from there.

    Args:
        matvec, b, damping, preconditioner: as in `cg`.
        tolerance: of |b - (A + damping) x| / |b|.
        max_steps: the most products, those of the checks included.

    Returns:
        Solved(x, residual, steps).

    Raises:
        ValueError: the residual is not reached; otherwise as `cg`.

    Example:
        >>> import torch
        >>> solve(lambda v: 3 * v, torch.tensor([3.0, 6.0]), damping=1.0).x
        tensor([0.7500, 1.5000])

    Law: equals the dense solution
        (test_linear_systems.py::test_a_solution_is_that_of_the_dense_system).
    """
    _check("solve", b, tolerance, max_steps)
    whole, x, residual, steps, reached = norm(b), scaled(0.0, b), b, 0, 1.0
    if concrete(whole) is None:
        remedy = "Under vmap use cg, which takes all of its steps."
        errors.fail("solve", "b", "concrete", "a tensor under vmap or compile", remedy)
    while concrete(whole) and steps < max_steps:
        run = _begin("solve", residual, preconditioner)
        aim = tolerance / reached
        for _ in track(range(max_steps - steps - 1), "solve"):
            if _is_solved(run, aim):
                break
            run = _step("solve", run, matvec, damping, preconditioner)
            steps += 1
        x = axpy(1.0, run.x, x)
        product = axpy(damping, x, applied("solve", matvec, x))
        steps += 1
        residual = axpy(-1.0, product, b)
        before, reached = reached, float(norm(residual) / whole)
        if reached <= tolerance:
            break
        if not reached < before / 2:
            got = f"{reached:.1e} after {steps} products"
            remedy = "Raise max_steps or damping, use a preconditioner or float64."
            errors.fail("solve", "the residual", f"{tolerance:.1e} |b| or less", got, remedy)
    else:
        if concrete(whole):
            got = f"{reached:.1e} after {steps} products"
            remedy = "Raise max_steps or damping, or use a preconditioner."
            errors.fail("solve", "the residual", f"{tolerance:.1e} |b| or less", got, remedy)
        reached = 0.0
    return Solved(x, whole.new_tensor(reached), torch.tensor(steps, device=whole.device))


@door
def lissa(
    matvecs: Matvec | Sequence[Matvec],
    b: Tree,
    *,
    scale: float,
    damping: float = 0.0,
    steps: int = 1000,
) -> Solved:
    """Approximate (A + damping)^-1 b by Neumann's series, with a matrix that may differ by step.

        x_0 = b,     x_{j+1} = b + x_j - (A_j + damping) x_j / scale,     result x_steps / scale

    Each step can take the matrix of another batch, where conjugate gradients need the same one. For
    one matrix it converges where 0 < eigenvalues < 2 scale, slowly for small ones: the error falls
    by 1 - eigenvalue / scale a step.

    Args:
        matvecs: the product with A; or a sequence of products, such as one for each batch, of which
            step j takes number j modulo their count.
        b: a vector.
        scale: above half of the largest eigenvalue of A + damping.
        damping: added to the diagonal.
        steps: products.

    Returns:
        Solved(x, residual, steps); residual is |x_steps - x_{steps-1}| / |b|, the one before the
        last step for one matrix.

    Raises:
        ValueError: the series diverges, or scale is not positive.

    Example:
        >>> import torch
        >>> lissa(lambda v: 3 * v, torch.tensor([3.0, 6.0]), scale=4.0, steps=30).x
        tensor([1., 2.])

    Law: converges to the dense solution
        (test_linear_systems.py::test_lissa_converges_to_the_dense_solution).
    Source: Agarwal et al., arXiv:1602.03943; Koh and Liang, arXiv:1703.04730, section 3.
    """
    check_vector("lissa", "b", b)
    check_count("lissa", "steps", steps, 1)
    if not isinstance(scale, float | int) or not scale > 0:
        remedy = "Take the largest Ritz value of lanczos."
        errors.fail("lissa", "scale", "a positive number", scale, remedy)
    each = [matvecs] if callable(matvecs) else list(matvecs)
    if not each:
        errors.fail("lissa", "matvecs", "at least one", "none", "Give one for each batch.")
    size, x, change = norm(b), b, norm(b)
    for j in track(range(steps), "lissa"):
        product = axpy(damping, x, applied("lissa", each[j % len(each)], x, "matvecs"))
        after = axpy(1.0, b, axpy(-1 / scale, product, x))
        change = norm(axpy(-1.0, x, after))
        x = after
        # With 0 < eigenvalues < 2 scale no change is above |b|; of single batches it may be.
        if concrete(change <= 100 * size) == 0.0:
            got = f"a change of {float(change):.2e} at step {j + 1}, |b| = {float(size):.2e}"
            remedy = f"Raise scale above {scale}, or damping where A has negative eigenvalues."
            errors.fail("lissa", "the series", "convergent", got, remedy)
    x = scaled(1 / scale, x)
    relative = torch.where(size > 0, change / size, torch.zeros_like(size))
    return Solved(x, relative, torch.tensor(steps, device=size.device))


def _begin(function: str, b: Tree, preconditioner: Matvec | None) -> ConjugateGradient:
    direction, product = _preconditioned(function, preconditioner, b)
    return ConjugateGradient(scaled(0.0, b), b, direction, product, norm(b).unsqueeze(0))


def _step(
    function: str,
    run: ConjugateGradient,
    matvec: Matvec,
    damping: float | Tensor,
    preconditioner: Matvec | None,
) -> ConjugateGradient:
    p = run.direction
    product = axpy(damping, p, applied(function, matvec, p))
    curvature = dot(p, product)
    k = run.norms.shape[-1]
    check_finite(function, curvature)
    if concrete((curvature <= 0) & (run.product != 0)) == 1.0:
        quotient = float((curvature / dot(p, p)).detach())
        got = f"p.(A + damping)p = {quotient:.3g} p.p at step {k}"
        remedy = f"Raise damping by more than {-quotient:.3g}, or use ggn or fisher for hvp."
        errors.fail(function, "matvec with damping", "positive definite", got, remedy)
    # NaN where the curvature is not positive and could not be looked at; 0 where b is solved.
    positive = torch.where(curvature > 0, curvature, torch.nan)
    length = torch.where(run.product == 0, 0.0, run.product / positive)
    x = axpy(length, p, run.x)
    residual = axpy(-length, product, run.residual)
    direction, new = _preconditioned(function, preconditioner, residual)
    ratio = torch.where(run.product == 0, 0.0, new / run.product)
    return ConjugateGradient(
        x,
        residual,
        axpy(ratio, p, direction),
        new,
        torch.cat([run.norms, norm(residual).unsqueeze(0)]),
    )


def _preconditioned(
    function: str, preconditioner: Matvec | None, residual: Tree
) -> tuple[Tree, Tensor]:
    """P r, and r . P r."""
    if preconditioner is None:
        return residual, dot(residual, residual)
    direction = applied(function, preconditioner, residual, "preconditioner")
    product = dot(residual, direction)
    if concrete(product < 0) == 1.0:
        remedy = "It stands for the inverse of A + damping."
        got = f"r.Pr = {float(product):.3g}"
        errors.fail(function, "preconditioner", "positive definite", got, remedy)
    return direction, product


def _is_solved(run: ConjugateGradient, tolerance: float) -> bool:
    return concrete(run.norms[-1] <= tolerance * run.norms[0]) == 1.0


def _relative(run: ConjugateGradient) -> float:
    return float(run.norms[-1] / run.norms[0]) if run.norms[0] else 0.0


def _check(function: str, b: Tree, tolerance: float, max_steps: int) -> None:
    check_vector(function, "b", b)
    check_count(function, "max_steps", max_steps, 1)
    if not isinstance(tolerance, float | int) or not tolerance >= 0:
        remedy = "It is relative to |b|."
        errors.fail(function, "tolerance", "a number, 0 or more", tolerance, remedy)
