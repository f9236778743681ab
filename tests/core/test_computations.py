"""core/computations.py: the derivatives of a flat function are flat functions, equal to
torch.func's.
"""

import torch

import funcattn as fa
from funcattn.core.computations import Whole

X, Y, T = (fa.random.normal(fa.key(i), (3,), dtype=torch.float64) for i in range(3))


def f(x, y):
    return x * y.sin(), (x > 0).long(), y.exp()


def test_the_vjp_pulls_the_cotangents_of_some_outputs_back_to_some_inputs():
    pulled = Whole(f).vjp(2, [1], [0, 2])
    wanted = torch.func.vjp(lambda y: f(X, y)[::2], Y)[1]((T, 2 * T))
    torch.testing.assert_close(pulled(X, Y, T, 2 * T), wanted)


def test_the_jvp_pushes_the_tangents_of_some_inputs_to_the_floating_outputs():
    pushed = Whole(f).jvp(2, [1])
    wanted = torch.func.jvp(lambda y: f(X, y)[::2], (Y,), (T,))[1]
    torch.testing.assert_close(pushed(X, Y, T), wanted)


def test_the_derivative_of_a_derivative_is_one_too():
    twice = Whole(f).vjp(2, [1], [0]).jvp(3, [0])
    wanted = torch.func.jvp(lambda x: torch.func.vjp(lambda y: f(x, y)[0], Y)[1](T), (X,), (Y,))[1]
    torch.testing.assert_close(twice(X, Y, T, Y), wanted)


def test_vmap_maps_the_inputs_that_are_mapped():
    rows = torch.stack([X, T])
    found = Whole(f).vmap([True, False], "error")(rows, Y)
    torch.testing.assert_close(found, torch.func.vmap(f, in_dims=(0, None))(rows, Y))
