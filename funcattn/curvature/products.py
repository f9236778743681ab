"""Products with the Hessian, the Gauss-Newton matrix, the Fisher matrix and the Jacobian.

    hvp       H v,  H = d^2 f / d params^2          forward over reverse: jvp of grad
    ggn       J^T (d^2 loss / d outputs^2) J v      jvp, hvp of the loss, vjp
    fisher    sum_n E_y [g_n(y) g_n(y)^T] v         g_n(y) = d log p_n(y) / d params

No matrix is made: a product costs a few gradients in time and, with attention that is linear in the
length, the memory of a gradient and its tangent. `fa.remat`, or `fa.decoder(config, remat=True)`,
recomputes activations instead of holding them.

With `batches`, functions take (params, batch), and a product is the sum over the batches, read one
after the other. Products are pure: they go under vmap, grad, jvp and torch.compile, and are
differentiable again.

Source: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994;
    Schraudolph, Fast curvature matrix-vector products, Neural Computation 14, 2002;
    Martens, New insights and perspectives on the natural gradient method, arXiv:1412.1193.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, func

from .. import randomness
from ..core import errors
from ..core.doors import door, what_is
from ..records import Tree
from ..tree.vectors import axpy, vector_leaves, vector_pairs
from .iteration import Vector, check_vector

Function = Callable[..., Any]  # of params, and of a batch where there are batches


@door
def summed(product: Callable[[Tree], Tree], batches: Iterable[Tree]) -> Tree:
    """The sum of product(batch) over batches, of which one at a time is in memory.

    Args:
        product: a function of a batch whose result is a tree of floating tensors, such as a
            gradient.
        batches: any iterable that can be read again: a list, a tensor (of which each row is a
            batch), an object with `__iter__`; no iterator, which would be empty the next time.

    Raises:
        TypeError: batches is an iterator, or no iterable.
        ValueError: there are no batches.

    Example:
        >>> import torch
        >>> slope = torch.func.grad(lambda w, x: (w * x) ** 2)
        >>> summed(lambda x: slope(torch.tensor(1.0), x), torch.tensor([1.0, 2.0]))
        tensor(10.)

    Law: the sum is that of all batches at once
        (test_products.py::test_a_product_over_batches_is_that_of_the_sum).
    """
    return _summed("summed", product, batches)


@door
def hvp(
    f: Callable[..., Tensor], params: Vector, vector: Tree, *, batches: Iterable[Tree] | None = None
) -> Tree:
    """The product of the Hessian of f with a vector: the derivative of its gradient along it.

    Args:
        f: a function of params, or of (params, batch), to a scalar.
        params: a tree of floating tensors, where the Hessian is taken.
        vector: a tree of the structure, shapes and dtypes of params.
        batches: as in `summed`; the Hessian is then that of the sum of f over them.

    Returns:
        H v, a tree like params.

    Raises:
        TypeError: params or vector have a leaf that is not floating (`fa.tree.partition` splits
            such leaves off), or of another dtype; f is not a scalar; batches is an iterator.
        ValueError: the vector is not like params; no parameters; no batches.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0])
        >>> hvp(lambda x: (x**3).sum(), x, torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])

    Law: equals the dense Hessian (torch.func.hessian) times v
        (test_products.py::test_products_are_those_of_the_dense_matrices).
    Source: Pearlmutter 1994.
    """
    _check("hvp", params, vector)
    gradient = func.grad(_scalar("hvp", "f", f))
    product = lambda *batch: func.jvp(lambda p: gradient(p, *batch), (params,), (vector,))[1]
    return _over("hvp", product, batches)


@door
def ggn(
    model_f: Function,
    loss_f: Callable[..., Tensor],
    params: Vector,
    vector: Tree,
    *,
    batches: Iterable[Tree] | None = None,
) -> Tree:
    """The product of the generalized Gauss-Newton matrix J^T H_L J with a vector.

    J is the Jacobian of the outputs by params, H_L the Hessian of the loss by the outputs. It is
    the Hessian of loss_f(model_f(params)) without the curvature of the model, and positive
    semi-definite where the loss is convex in the outputs.

    Args:
        model_f: a function of params, or of (params, batch), to outputs: a floating tensor, or a
            tree of them.
        loss_f: a function of outputs, or of (outputs, batch), to a scalar.
        params: a tree of floating tensors.
        vector: a tree like params.
        batches: as in `summed`; the matrix is then the sum over them.

    Returns:
        J^T H_L J v, a tree like params.

    Raises:
        TypeError, ValueError: as `hvp`.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0])
        >>> ggn(lambda x: x**3, lambda y: (y**2).sum() / 2, x, torch.tensor([1.0, 1.0]))
        tensor([  9., 144.])

    Law: equals J^T H_L J v of the dense matrices
        (test_products.py::test_products_are_those_of_the_dense_matrices).
    Source: Schraudolph 2002.
    """
    _check("ggn", params, vector)
    return _ggn("ggn", model_f, loss_f, params, vector, batches)


@door
def fisher(
    logits_f: Function, params: Vector, vector: Tree, *, batches: Iterable[Tree] | None = None
) -> Tree:
    """The product of the true Fisher matrix of categorical outputs with a vector, exactly.

        F = sum over rows n of E over y ~ softmax(logits_n) of g_n(y) g_n(y)^T
          = sum over rows n of J_n^T (diag(p_n) - p_n p_n^T) J_n

    The expectation over labels is taken in closed form: it is the Gauss-Newton matrix of
    sum_n logsumexp(logits_n), or of the summed cross-entropy with whatever targets. Divide by the
    number of rows for the matrix of a mean.

    Args:
        logits_f: a function of params, or of (params, batch), to logits (*rows, V).
        params: a tree of floating tensors.
        vector: a tree like params.
        batches: as in `summed`.

    Returns:
        F v, a tree like params.

    Raises:
        TypeError, ValueError: as `hvp`.

    Example:
        >>> import torch
        >>> fisher(lambda logits: logits, torch.zeros(2), torch.tensor([1.0, 0.0]))
        tensor([ 0.2500, -0.2500])

    Law: equals the dense matrix, and the enumeration of all labels
        (test_products.py::test_the_fisher_matrix_is_the_expectation_over_all_labels).
    Source: Martens, arXiv:1412.1193, section 9.2.
    """
    _check("fisher", params, vector)
    loss = lambda logits, *_: torch.logsumexp(logits, -1).sum()
    return _ggn("fisher", logits_f, loss, params, vector, batches)


@door
def empirical_fisher(
    losses_f: Function, params: Vector, vector: Tree, *, batches: Iterable[Tree] | None = None
) -> Tree:
    """The product of the empirical Fisher matrix, sum_n g_n g_n^T, with a vector.

    g_n is the gradient of the loss of example n at its actual label. No gradient of a single
    example is made: it is J^T (J v) of the losses.

    Args:
        losses_f: a function of params, or of (params, batch), to the losses of examples, (N,) or
            of any shape: each element has its own gradient.
        params: a tree of floating tensors.
        vector: a tree like params.
        batches: as in `summed`.

    Returns:
        The product, a tree like params.

    Raises:
        TypeError, ValueError: as `hvp`.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0])
        >>> empirical_fisher(lambda x: x**2, x, torch.tensor([1.0, 1.0]))
        tensor([ 4., 16.])

    Law: equals the sum of outer products of the gradients
        (test_products.py::test_products_are_those_of_the_dense_matrices).
    Source: Kunstner et al., Limitations of the empirical Fisher approximation, arXiv:1905.12558.
    """
    _check("empirical_fisher", params, vector)
    product = lambda *batch: _outer(lambda p: losses_f(p, *batch), params, vector)
    return _over("empirical_fisher", product, batches)


@door
def sampled_fisher(
    key: Tensor,
    logits_f: Function,
    params: Vector,
    vector: Tree,
    *,
    batches: Iterable[Tree] | None = None,
) -> Tree:
    """The product of the Fisher matrix with labels drawn from the model: unbiased for `fisher`.

        sum over rows n of g_n(y_n) g_n(y_n)^T v,   y_n ~ softmax(logits_n)

    Args:
        key: int64 (2,). Labels of batch i are drawn with fold_in(key, i); one key is one matrix.
        logits_f: a function of params, or of (params, batch), to logits (*rows, V).
        params: a tree of floating tensors.
        vector: a tree like params.
        batches: as in `summed`.

    Returns:
        The product, a tree like params.

    Raises:
        TypeError, ValueError: as `hvp`.

    Example:
        >>> import torch, funcattn as fa
        >>> sampled_fisher(fa.key(0), lambda logits: logits, torch.zeros(2), torch.ones(2))
        tensor([0., 0.])

    Law: its mean over keys is `fisher`
        (test_products.py::test_the_sampled_fisher_matrix_is_that_of_the_drawn_labels).
    Source: Martens, arXiv:1412.1193, section 5.
    """
    _check("sampled_fisher", params, vector)
    randomness.keys.check_key("sampled_fisher", key)
    numbers = iter(range(2**32))

    def product(*batch: Tree) -> Tree:
        spent = randomness.fold_in(key, next(numbers))
        labels = randomness.categorical(spent, logits_f(params, *batch))

        def losses(p: Tree) -> Tensor:
            log_probs = torch.log_softmax(logits_f(p, *batch), -1)
            return -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

        return _outer(losses, params, vector)

    return _over("sampled_fisher", product, batches)


@door
def jvp(f: Function, params: Vector, vector: Tree) -> Tree:
    """The product of the Jacobian of f with a vector, J v: the derivative of f along it.

    Args:
        f: a function of params to a floating tensor, or a tree of them.
        params: a tree of floating tensors.
        vector: a tree like params.

    Returns:
        J v, a tree like f(params).

    Raises:
        TypeError, ValueError: as `hvp`.

    Example:
        >>> import torch
        >>> jvp(lambda x: x**2, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([2., 4.])

    Law: equals the dense Jacobian times v
        (test_products.py::test_products_are_those_of_the_dense_matrices).
    """
    _check("jvp", params, vector)
    return func.jvp(f, (params,), (vector,))[1]


@door
def vjp(f: Function, params: Vector, vector: Tree) -> Tree:
    """The product of the transposed Jacobian of f with a vector of outputs, J^T u.

    Args:
        f: a function of params to a floating tensor, or a tree of them.
        params: a tree of floating tensors.
        vector: a tree like f(params).

    Returns:
        J^T u, a tree like params.

    Raises:
        TypeError: a leaf that is not floating.
        ValueError: the vector is not like the outputs; no parameters.

    Example:
        >>> import torch
        >>> vjp(lambda x: x**2, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor([2., 0.])

    Law: u . (J v) == (J^T u) . v
        (test_products.py::test_jacobian_products_are_transposes).
    """
    check_vector("vjp", "params", params)
    outputs, pull = func.vjp(f, params)[:2]
    vector_pairs("vjp", ("the outputs", "vector"), outputs, vector)
    return pull(vector)[0]


def _ggn(
    function: str,
    model_f: Function,
    loss_f: Callable[..., Tensor],
    params: Vector,
    vector: Tree,
    batches: Iterable[Tree] | None,
) -> Tree:
    loss = _scalar(function, "loss_f", loss_f)

    def product(*batch: Tree) -> Tree:
        model = lambda p: model_f(p, *batch)
        outputs, pushed = func.jvp(model, (params,), (vector,))[:2]
        vector_leaves(function, "the outputs", outputs)
        slope = func.grad(lambda outputs: loss(outputs, *batch))
        curved = func.jvp(slope, (outputs,), (pushed,))[1]
        return func.vjp(model, params)[1](curved)[0]

    return _over(function, product, batches)


def _outer(losses: Function, params: Vector, vector: Tree) -> Tree:
    """J^T J v."""
    pushed = func.jvp(losses, (params,), (vector,))[1]
    return func.vjp(losses, params)[1](pushed)[0]


def _over(function: str, product: Callable[..., Tree], batches: Iterable[Tree] | None) -> Tree:
    return product() if batches is None else _summed(function, product, batches)


def _summed(function: str, product: Callable[[Tree], Tree], batches: Iterable[Tree]) -> Tree:
    check_batches(function, batches)
    total: Tree = None
    for batch in batches:
        one = product(batch)
        total = one if total is None else axpy(1.0, one, total)
        del one  # before the next is made
    if total is None:
        errors.fail(function, "batches", "at least one", "none", "A sum over none has no shape.")
    return total


def check_batches(function: str, batches: Iterable[Tree]) -> None:
    """Fail where batches cannot be read more than once."""
    if not hasattr(batches, "__iter__") or hasattr(batches, "__next__"):
        remedy = "Pass a list, or an object whose __iter__ begins anew each time."
        wanted = "an iterable that can be read again"
        errors.fail(function, "batches", wanted, what_is(batches), remedy, TypeError)


def _scalar(function: str, argument: str, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f, checked to return a floating scalar."""

    def checked(*args: Tree) -> Tensor:
        value = f(*args)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            got = type(value).__name__
            got = f"{value.dtype} {errors.shape(value)}" if isinstance(value, Tensor) else got
            remedy = "Return a loss, such as a mean."
            errors.fail(function, argument, "a function to a scalar", got, remedy, TypeError)
        return value

    return checked


def _check(function: str, params: Vector, vector: Tree) -> None:
    check_vector(function, "params", params)
    for x, v in vector_pairs(function, ("params", "vector"), params, vector):
        if x.dtype != v.dtype:
            remedy = "Bring both to one: fa.cast(dtype)(tree)."
            errors.fail(function, "vector", f"{x.dtype} as params", v.dtype, remedy, TypeError)
