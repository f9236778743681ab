"""Influence functions: what each training example does to a loss.

    score_i = - g . (H + damping)^-1 g_i,     H = 1/N sum_i d^2 f(example_i) / d params^2

It is the derivative of the queried loss, at the optimum of (1/N + epsilon) f(example_i) + ..., by
the weight epsilon of example i: a negative score says that the example lowers the loss.

Source: Koh and Liang, Understanding black-box predictions via influence functions,
    arXiv:1703.04730.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, func

from ..core import errors
from ..core.doors import door
from ..progress import track
from ..records import Tree
from ..tree import leaves
from ..tree.vectors import scale, vector_pairs
from .iteration import Matvec, Vector, applied, check_vector
from .linear_systems import solve
from .products import check_batches, hvp


@door
def influence(
    f: Callable[[Tree, Tree], Tensor],
    params: Vector,
    batches: Iterable[Tree],
    query: Tree,
    *,
    damping: float = 0.0,
    inverse: Matvec | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 100,
) -> Tensor:
    """Score training examples by their influence on a queried loss.

    One solve gives x = (H + damping)^-1 query. Then the scores of a batch are one directional
    derivative of its losses along x: no gradient of a single example is made. The Hessian is
    indefinite away from a minimum; damping above its most negative eigenvalue, or the inverse of a
    Gauss-Newton matrix, mends that.

    Args:
        f: a function of (params, example) to the loss of one example, a scalar.
        params: a tree of floating tensors.
        batches: an iterable of batches that can be read again. A batch is a tree of tensors
            (n, ...) with n examples; one batch at a time is in memory.
        query: a vector, the gradient of the queried loss: `torch.func.grad(question)(params)`.
        damping: added to the diagonal of H.
        inverse: a function of a vector to the inverse matrix times it, in place of conjugate
            gradients with H and damping:
            `lambda b: solve(ggn_of_mean, b, damping=0.1).x`, `lambda b: lissa(..., b, ...).x`, or
            `lambda b: b` for inner products of gradients.
        tolerance, max_steps: of conjugate gradients, as in `solve`.

    Returns:
        Scores (N,), in the order of the examples.

    Raises:
        ValueError: H + damping is not positive definite, or the solution is not reached; no
            examples; sizes.
        TypeError: batches is an iterator; a leaf is not floating; f is not a scalar.

    Example:
        >>> import torch
        >>> f = lambda w, x: (w - x) ** 2 / 2  # w is the mean of the examples
        >>> influence(f, torch.tensor(2.0), [torch.tensor([1.0, 3.0])], torch.tensor(1.0))
        tensor([-1.,  1.])

    Law: equals - g . (H + damping)^-1 g_i of the dense matrix, and the derivative of retraining
        (test_influences.py::test_scores_are_those_of_the_dense_inverse,
        test_influences.py::test_a_score_is_the_derivative_of_retraining).
    Source: Koh and Liang, arXiv:1703.04730, equation 2.
    """
    check_vector("influence", "params", params)
    vector_pairs("influence", ("params", "query"), params, query)
    check_batches("influence", batches)
    if inverse is None:
        N = sum(_rows(batch) for batch in batches)
        if not N:
            errors.fail("influence", "batches", "of examples", "none", "Give training examples.")
        whole = lambda p, batch: _losses(f, batch)(p).sum()
        mean = lambda v: scale(1 / N, hvp(whole, params, v, batches=batches))
        inverse = partial(_solved, mean, damping, tolerance, max_steps)
    x = applied("influence", inverse, query, "inverse")
    scores = [
        -func.jvp(_losses(f, batch), (params,), (x,))[1] for batch in track(batches, "influence")
    ]
    if not scores:
        errors.fail("influence", "batches", "of examples", "none", "Give training examples.")
    return torch.cat(scores)


def _solved(mean: Matvec, damping: float, tolerance: float, max_steps: int, b: Tree) -> Tree:
    return solve(mean, b, damping=damping, tolerance=tolerance, max_steps=max_steps).x


def _losses(f: Callable[[Tree, Tree], Tensor], batch: Tree) -> Callable[[Tree], Tensor]:
    """The losses (n,) of the examples of a batch, as a function of params."""
    n = _rows(batch)

    def losses(params: Vector) -> Tensor:
        found = func.vmap(f, (None, 0))(params, batch)
        if not isinstance(found, Tensor) or found.shape != (n,):
            got = errors.shape(found[0]) if isinstance(found, Tensor) else type(found).__name__
            remedy = "It takes one example, and returns its loss."
            errors.fail("influence", "f", "a function to a scalar", got, remedy, TypeError)
        return found

    return losses


def _rows(batch: Tree) -> int:
    """The number of examples of a batch."""
    sizes = {x.shape[:1] if isinstance(x, Tensor) else None for x in leaves(batch)}
    if len(sizes) != 1 or None in sizes or torch.Size() in sizes:
        got = " and ".join(sorted(map(str, sizes))) or "no tensors"
        remedy = "The first axis counts examples."
        errors.fail("influence", "a batch", "a tree of tensors (n, ...) with one n", got, remedy)
    return sizes.pop()[0]  # pyright: ignore[reportOptionalSubscript]
