"""Norms in narrow dtypes and with offsets, against float64 and against transformers' Gemma."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import funcattn as fa
from funcattn import layers
from funcattn.testing import check_transforms


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, torch.float64)


def plain(x, weight, offset):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (offset + weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_offset_norm_is_that_of_gemma(dtype):
    x, weight = normal(0, 3, 32).to(dtype), (0.1 * normal(1, 32)).to(dtype)
    theirs = Gemma3RMSNorm(32, eps=1e-6)
    theirs.weight.data = weight
    got = layers.rms_norm(x, weight, epsilon=1e-6, offset=1.0)
    assert got.dtype == dtype
    # theirs is in float32, and so is ours of what is narrow: the last rounding is the same but for
    # ties that float32 moved
    torch.testing.assert_close(
        got,
        theirs(x).to(dtype).detach(),
        rtol=torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-6,
        atol=1e-6,
    )


def test_a_narrow_norm_with_an_offset_is_rounded_once():
    """1 + weight of a small weight is not a number of bfloat16; the product is, to half a unit in
    its last place.
    """
    x, weight = normal(0, 64, 32).bfloat16(), (0.003 * normal(1, 32)).bfloat16()
    got = layers.rms_norm(x, weight, epsilon=1e-6, offset=1.0).double()
    wanted = plain(x.double(), weight.double(), 1.0)
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    # and float32's own rounding
    assert ((got - wanted).abs() <= wanted.abs() * half_a_unit * 1.001).all()
    early = plain(x.double(), (1 + weight).double() - 1, 1.0)
    # to add in bfloat16 would show
    assert ((early - wanted).abs() > wanted.abs() * half_a_unit / 2).any()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_differentiate_and_map(offset):
    x, weight = normal(0, 3, 8), normal(1, 8)
    ours = lambda x, weight: layers.rms_norm(x, weight, epsilon=1e-6, offset=offset).sin().sum()
    reference = lambda x, weight: plain(x, weight, offset).sin().sum()
    direction = (x.cos(), weight.sin())
    hvp = lambda f: jvp(grad(f, (0, 1)), (x, weight), direction)[1]
    for derive in (
        lambda f: grad(f, (0, 1))(x, weight),
        hvp,
        lambda f: vmap(grad(f), (0, None))(x, weight),
    ):
        for got, wanted in zip(derive(ours), derive(reference), strict=True):
            torch.testing.assert_close(got, wanted)


def test_a_norm_a_head_is_the_norm_of_each():
    x, weight, bias = normal(0, 5, 4, 8), normal(1, 4, 8), normal(2, 4, 8)
    got = layers.layer_norm(x, weight, bias, epsilon=1e-5)
    for head in range(4):
        torch.testing.assert_close(
            got[:, head], layers.layer_norm(x[:, head], weight[head], bias[head], epsilon=1e-5)
        )
    torch.testing.assert_close(layers.layer_norm(x, weight, epsilon=1e-5), got - bias)


MOVES = {
    "jvp": lambda f, dx: lambda x, *p: jvp(lambda x: f(x, *p), (x,), (dx,))[1],
    "jvp of all": lambda f, dx: lambda *a: jvp(f, a, (dx, *a[1:]))[1],
}


@pytest.mark.parametrize("moved", MOVES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_is_closed(has_bias, moved):
    """torch's fused norm is silently wrong in grad(jvp) and in jvp(jvp)."""
    x, dx, weight, bias = normal(0, 3, 4), normal(1, 3, 4), normal(2, 4), normal(3, 4)
    operands = (x, weight, bias) if has_bias else (x, weight)

    def written(x, weight, bias=()):
        z = x - x.mean(-1, keepdim=True)
        y = z / (z.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
        return y + bias if has_bias else y

    push = lambda f: MOVES[moved](f, dx)
    every = tuple(range(len(operands)))
    summed = lambda f: lambda *a: f(*a).sin().sum()
    nestings = {
        "jvp": push,
        "jvp of jvp": lambda f: push(push(f)),
        "grad of jvp": lambda f: grad(summed(push(f)), every),
        "grad of jvp of jvp": lambda f: grad(summed(push(push(f))), every),
        "jvp of grad": lambda f: push(lambda *a: grad(summed(f))(*a)),
        "grad of grad of grad": lambda f: grad(summed(grad(summed(grad(summed(f)))))),
    }
    ours = lambda *a: layers.layer_norm(*a, epsilon=0.1)
    for name, nest in nestings.items():
        torch.testing.assert_close(
            nest(ours)(*operands),
            nest(written)(*operands),
            atol=1e-10,
            rtol=1e-10,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, True, None)])
def test_gradients_of_gradients_of_a_layer_norm(wanted, heads):
    """torch's kernel is silently wrong from the third order on."""
    x, weight, bias = normal(0, 3, *heads, 4), normal(2, *heads, 4), normal(3, *heads, 4)
    given = [
        t.clone().requires_grad_(needed)
        for t, needed in zip((x, weight, bias), wanted, strict=True)
        if needed is not None
    ]

    def written(x, weight, bias=()):
        z = x - x.mean(-1, keepdim=True)
        y = z / (z.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
        return y + bias if isinstance(bias, Tensor) else y

    def derivatives(f):
        of, y = [t for t in given if t.requires_grad], f(*given).sin().sum()
        for order in range(3):
            found = torch.autograd.grad(y, of, create_graph=True, materialize_grads=True)
            yield from found
            y = sum((g * normal(order, *g.shape)).sum() for g in found)

    norm = lambda *a: layers.layer_norm(*a, epsilon=0.1)
    for ours, reference in zip(derivatives(norm), derivatives(written), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-10, rtol=1e-10)
    first = lambda f: torch.autograd.grad(
        f(*given).sin().sum(), [t for t in given if t.requires_grad]
    )
    torch.testing.assert_close(first(norm), first(written), atol=1e-12, rtol=1e-12)


def test_a_layer_norm_of_mixed_dtypes_is_recorded():
    x, weight = normal(0, 3, 8).bfloat16().requires_grad_(), normal(1, 8).float().requires_grad_()
    y = layers.layer_norm(x, weight, epsilon=0.1)
    assert y.dtype == torch.bfloat16
    of_x, of_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert (of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32)


def test_layer_norm_is_closed_to_third_order():
    x, weight = normal(0, 2, 4), normal(1, 4)

    def written(x, weight):
        z = x - x.mean(-1, keepdim=True)
        return z / (z.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight

    norm = lambda x, weight: layers.layer_norm(x, weight, epsilon=0.1)
    check_transforms(norm, x, weight, depth=3, reference=written, hessians=False)


@pytest.mark.parametrize("sizes", [(1,), (3,), (4, 1)])
def test_a_weight_of_another_width_is_an_error_under_transforms_too(sizes):
    x, weight, bias = normal(0, 3, 4), normal(1, sizes[0]), normal(2, sizes[-1])
    norm = lambda x: layers.layer_norm(x, weight, bias, epsilon=0.1).sum()
    for f in (norm, grad(norm)):
        with pytest.raises(RuntimeError, match="same shape"):
            f(x)
