"""What functions capture: found wherever it is, and replaced in a copy or inside the `with`."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from funcattn.interop.captured import Captured

TABLE = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
NET = nn.Linear(2, 1, bias=False)


class Pair(NamedTuple):
    weight: torch.Tensor
    name: str


def leaf(*numbers):
    return torch.tensor(numbers).requires_grad_()


def neighbour(x):
    return x * TABLE


def closing(weight):
    return lambda x: x * weight


def with_default(x, weight=leaf(3.0, 4.0), *, other=leaf(5.0, 6.0)):  # noqa: B008
    return x * weight + other


w = leaf(3.0, 4.0)
FUNCTIONS = {
    "a closure": closing(w),
    "a closure of a closure": (lambda f: lambda x: f(x))(closing(w)),
    "a partial": functools.partial(torch.mul, w),
    "a list": (lambda held: lambda x: x * held[0][0])([[w]]),
    "a dict": (lambda held: lambda x: x * held["w"])({"w": w, "n": 2}),
    "a named tuple": (lambda held: lambda x: x * held.weight)(Pair(w, "w")),
    "a global of a neighbour": lambda x: neighbour(x),
    "a global in a comprehension": lambda x: sum(t * x for t in [TABLE]),
    "defaults": with_default,
    "a module": NET,
    "its method": NET.forward,
    "a global module": lambda x: NET(x),
    "a list of modules": (lambda nets: lambda x: nets[0](x))([nn.Sequential(NET)]),
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_it_captures_is_replaced(f):
    x = torch.ones(2)
    captured = Captured(f)
    wanted = f(x)
    with captured.placed([2 * t.detach() for t in captured.tensors]) as replaced:
        out = replaced(x)
        assert not out.requires_grad
        torch.testing.assert_close(out, 2 * wanted.detach())
    torch.testing.assert_close(f(x), wanted)


def test_a_module_keeps_what_functional_call_had_put_there():
    found = []
    keeping = Keeping(NET, found)
    grad(lambda weight: functional_call(keeping, {"net.weight": weight}, ()))(torch.ones(1, 2))
    assert len(found[0].tensors) == 1
    with found[0].placed([torch.full((1, 2), 7.0)]) as net:
        assert net(torch.ones(2)) == 14
    assert isinstance(NET.weight, nn.Parameter)


class Keeping(nn.Module):
    def __init__(self, net, found):
        super().__init__()
        self.net, self.found = net, found

    def forward(self):
        self.found.append(Captured(self.net))
        return self.net(torch.ones(2)).sum()


def test_constants_and_cycles_are_left_alone():
    def recursive(n):
        return recursive(n - 1) if n else constant

    constant = torch.ones(2)
    captured = Captured((recursive, [constant, list(range(5000))], None, "text"))
    assert not captured.tensors
    with captured.placed([]) as (f, *_):
        assert f is recursive


def test_one_tensor_in_two_places_is_one():
    captured = Captured([closing(w), closing(w), {"w": w}])
    assert len(captured.tensors) == 1
