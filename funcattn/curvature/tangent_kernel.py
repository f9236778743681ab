"""The empirical neural tangent kernel: inner products of the Jacobians of examples.

    K[m, n, i, j] = sum over params p of  d f_i(x1_m) / dp  *  d f_j(x2_n) / dp

Source: Jacot et al., Neural tangent kernel, arXiv:1806.07572; Novak et al., Fast finite width
    neural tangent kernel, arXiv:2206.08720 (NTK-vector products).
"""

from collections.abc import Callable

import torch
from torch import Tensor, func

from ..core import errors
from ..core.doors import door
from ..records import ABSENT, Tree, is_absent
from ..tree import leaves
from .iteration import Vector, check_vector


@door
def ntk(
    f: Callable[[Tree, Tree], Tensor],
    params: Vector,
    x1: Tree,
    x2: Tree = ABSENT,
    *,
    chunk: int | None = 1,
) -> Tensor:
    """The empirical neural tangent kernel J(x1) J(x2)^T, in blocks of outputs.

    The Jacobians of `chunk` examples of x2 are made at a time, by vmap of a vjp over the outputs,
    and pushed through f at all examples of x1 by vmap of a jvp. The Jacobians of x1 are not made.

    Args:
        f: a function of (params, example) to a floating tensor (*out).
        params: a tree of floating tensors.
        x1: a tree of tensors (N1, ...), examples along the first axis.
        x2: a tree of tensors (N2, ...); () is x1.
        chunk: examples of x2 at a time; memory is that of chunk * |out| copies of params. None is
            all.

    Returns:
        (N1, N2, *out, *out).

    Raises:
        TypeError: params have a leaf that is not floating; f does not return a floating tensor.
        ValueError: no parameters, no examples; chunk below 1.

    Example:
        >>> import torch
        >>> ntk(lambda w, x: w * x, torch.tensor(2.0), torch.tensor([1.0, 3.0]))
        tensor([[1., 3.],
                [3., 9.]])

    Law: equals the product of dense Jacobians
        (test_tangent_kernel.py::test_the_kernel_is_the_product_of_the_dense_jacobians).
    Source: Novak et al., arXiv:2206.08720, section 3.
    """
    check_vector("ntk", "params", params)
    second = x1 if is_absent(x2) else x2
    for name, x in (("x1", x1), ("x2", second)):
        tensors = [t for t in leaves(x) if isinstance(t, Tensor) and t.dim() and len(t)]
        if not tensors or len(tensors) < len(leaves(x)):
            remedy = "The first axis counts examples."
            errors.fail("ntk", name, "a tree of tensors (N, ...)", _shapes(x), remedy)
    if chunk is not None and not errors.is_count(chunk, 1):
        errors.fail("ntk", "chunk", "1 or more, or None", repr(chunk), "It counts examples of x2.")

    def block(x: Tree) -> Tensor:  # (|out|, N1, *out)
        out, pull = func.vjp(lambda p: f(p, x), params)[:2]
        if not isinstance(out, Tensor) or not out.is_floating_point():
            got = str(out.dtype) if isinstance(out, Tensor) else type(out).__name__
            remedy = "Choose one of its results."
            errors.fail("ntk", "f", "a function to a floating tensor", got, remedy, TypeError)
        n = out.numel()
        units = torch.eye(n, dtype=out.dtype, device=out.device).reshape(n, *out.shape)
        jacobian = func.vmap(lambda unit: pull(unit)[0])(units)
        every = lambda p: func.vmap(f, (None, 0))(p, x1)
        return func.vmap(lambda row: func.jvp(every, (params,), (row,))[1])(jacobian)

    found = func.vmap(block, chunk_size=chunk)(second)  # (N2, |out|, N1, *out)
    out = found.shape[3:]
    return found.permute(2, 0, *range(3, found.dim()), 1).reshape(
        found.shape[2], found.shape[0], *out, *out
    )


def _shapes(x: Tree) -> str:
    found = [str(errors.shape(t)) if isinstance(t, Tensor) else type(t).__name__ for t in leaves(x)]
    return " and ".join(found) or "no tensors"
