"""The empirical tangent kernel is the product of the dense Jacobians."""

import dense_curvature as dense
import pytest
import torch
from dense_curvature import FLAT, PARAMS, TEXTS, close
from torch.func import grad, jacrev, vmap

import funcattn as fa
from funcattn import curvature


def last(params, text):
    """Three outputs of a text."""
    return dense.logits(params, text)[-1, :3]


def jacobians(texts):
    return torch.stack([jacrev(dense.flat(lambda p: last(p, text)))(FLAT) for text in texts])


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_the_kernel_is_the_product_of_the_dense_jacobians(chunk):
    J1, J2 = jacobians(TEXTS[:3]), jacobians(TEXTS[2:])
    found = curvature.ntk(last, PARAMS, TEXTS[:3], TEXTS[2:], chunk=chunk)
    close(found, torch.einsum("mip,njp->mnij", J1, J2))


def test_the_kernel_of_one_set_is_symmetric_and_that_of_scalars_has_no_blocks():
    found = curvature.ntk(dense.loss, PARAMS, TEXTS)
    J = torch.stack([jacrev(dense.flat(dense.loss))(FLAT, text) for text in TEXTS])
    close(found, J @ J.mT)
    assert found.shape == (4, 4)


def test_outputs_of_any_shape_and_trees_of_examples():
    f = lambda w, x: w["a"] * x["x"].outer(x["y"]) + w["b"]
    w = fa.random.normal_like(fa.key(0), {"a": torch.zeros(2, 3), "b": torch.zeros(())})
    x = fa.random.normal_like(fa.key(1), {"x": torch.zeros(4, 2), "y": torch.zeros(4, 3)})
    y = fa.tree.map(lambda t: t[:1], x)
    found = curvature.ntk(f, w, x, y)
    flat, unravel = fa.tree.ravel(w)
    J = vmap(lambda x: jacrev(lambda z: f(unravel(z), x))(flat))(x)
    torch.testing.assert_close(found, torch.einsum("mabp,ncdp->mnabcd", J, J[:1]))


def test_a_kernel_is_differentiable():
    f = lambda w, x: (w * x).sin().sum()
    x = torch.tensor([[0.3, 0.7], [1.1, -0.2]]).double()
    w = torch.tensor([0.5, 2.0]).double()
    J = lambda w: vmap(grad(f), (None, 0))(w, x)
    wanted = grad(lambda w: (J(w) @ J(w).mT).sum())(w)
    torch.testing.assert_close(grad(lambda w: curvature.ntk(f, w, x).sum())(w), wanted)


one = torch.ones(3)
f = lambda w, x: w * x
BAD = [
    (
        lambda: curvature.ntk(f, one, torch.tensor(1.0)),
        ValueError,
        "ntk: x1 should be a tree of tensors (N, ...), got ()",
    ),
    (
        lambda: curvature.ntk(f, one, one[None], torch.ones(0, 3)),
        ValueError,
        "ntk: x2 should be a tree of tensors (N, ...), got (0, 3)",
    ),
    (
        lambda: curvature.ntk(f, one, one[None], chunk=0),
        ValueError,
        "ntk: chunk should be 1 or more, or None, got 0",
    ),
    (
        lambda: curvature.ntk(lambda w, x: (w, x), one, one[None]),
        TypeError,
        "ntk: f should be a function to a floating tensor, got tuple",
    ),
    (
        lambda: curvature.ntk(f, torch.arange(3), one[None]),
        TypeError,
        "ntk: params should be a tree of floating tensors",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
