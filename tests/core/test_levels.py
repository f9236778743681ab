"""An autograd Function at one level of torch.func, and what the levels outside see of it."""

import pytest
import torch
from torch.autograd import Function
from torch.func import grad, hessian, jvp, vjp, vmap

from funcattn.core.autograd import closed_jvp, tangent
from funcattn.core.levels import apply_at_level, is_gradient_inside_jvp


class Cube(Function):
    """x^3, which notes whether its forward mode ran."""

    pushed = 0

    @staticmethod
    def forward(x):
        return (x**3,)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @closed_jvp
    def jvp(ctx, saved, dx):
        Cube.pushed += 1
        return (3 * saved[0] ** 2 * dx,)

    @staticmethod
    def vmap(info, in_dims, x):
        return cube(x), in_dims


def cube(x):
    if is_gradient_inside_jvp():
        return apply_at_level(Cube, cube, x)
    SEEN.append(tangent(x) is not None)
    return Cube.apply(x)


SEEN: list[bool] = []
X, DX = torch.tensor([0.5, -2.0], dtype=torch.float64), torch.tensor([1.0, 3.0])
f = lambda x: cube(x)[0].sum()
plain = lambda x: (x**3).sum()


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()


def test_the_level_of_the_jvp_sees_the_tangent_of_a_gradient_inside():
    found = jvp(grad(f), (X,), (DX.double(),))
    torch.testing.assert_close(found, (3 * X**2, 6 * X * DX))
    assert SEEN == [True]


@pytest.mark.parametrize(
    "program",
    [
        lambda f: grad(lambda x: jvp(grad(f), (x,), (X.cos(),))[1].sin().sum())(X),
        lambda f: jvp(grad(lambda x: grad(f)(x).sin().sum()), (X,), (X.cos(),)),
        lambda f: jvp(lambda x: vmap(grad(f))(torch.stack([x, 2 * x])), (X,), (X.cos(),)),
        lambda f: vmap(lambda t: jvp(grad(f), (X,), (t,))[1])(torch.eye(2).double()),
        lambda f: hessian(f)(X),
        lambda f: jvp(lambda x: jvp(grad(f), (x,), (X.cos(),))[1], (X,), (X.sin(),)),
        lambda f: jvp(lambda x: vjp(f, x)[1](x.sum())[0], (X,), (X.cos(),)),
        lambda f: vjp(lambda x: jvp(grad(f), (x,), (x,))[1], X)[1](X.cos())[0],
    ],
)
def test_every_nesting_is_that_of_the_formula(program):
    torch.testing.assert_close(program(f), program(plain), rtol=1e-12, atol=1e-12)


def test_a_gradient_without_a_jvp_outside_is_left_to_torch():
    torch.testing.assert_close(grad(f)(X), 3 * X**2)
    assert SEEN == [False]
    assert not is_gradient_inside_jvp()


def test_a_vjp_whose_transform_has_ended_may_be_called():
    def program(f):
        def g(x):
            _, pull = vjp(f, x)
            return pull(torch.ones((), dtype=torch.float64))[0]

        return jvp(g, (X,), (X.cos(),))

    torch.testing.assert_close(program(f), program(plain), rtol=1e-12, atol=1e-12)


def test_an_error_leaves_the_levels_as_they_were():
    def fails(x):
        if is_gradient_inside_jvp():
            return apply_at_level(Cube, fails, x)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        jvp(grad(lambda x: fails(x)[0].sum()), (X,), (X,))
    torch.testing.assert_close(jvp(grad(f), (X,), (DX.double(),))[1], 6 * X * DX)
