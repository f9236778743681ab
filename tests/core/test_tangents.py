"""Rules that compute a tangent with its value: right in every nesting, and without products of
zeros.
"""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn.core.tangents import affine, bilinear, split
from funcattn.testing import check_transforms


def normal(seed, *shape, dtype=torch.float64):
    return fa.random.normal(fa.key(seed), shape, dtype)


X, W, B = normal(0, 3, 4), normal(1, 2, 4), normal(2, 2)


@pytest.mark.parametrize("operands", [(X, W, B), (X, W)], ids=["bias", "none"])
def test_products_are_closed(operands):
    """Of arguments mapped and differentiated all together."""
    reference = lambda x, w, *b: sum(b, (x[:, None] * w).sum(-1))
    check_transforms(affine, *operands, depth=3, reference=reference, hessians=False)
    ours = lambda x, w, *b: bilinear(torch.matmul, x, w.mT)
    plain = lambda x, w, *b: (x[:, None] * w).sum(-1)
    check_transforms(ours, *operands, depth=3, reference=plain, hessians=False)


@pytest.mark.parametrize("moved", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_operands_without_a_tangent_are_constants(moved):
    """In jvp of jvp, gradient of jvp and jvp of gradient, of any operands, with vmap between."""
    operands = X, W, B
    plain = lambda x, w, b: (x.unsqueeze(-2) * w).sum(-1) + b

    def push(f):
        def along(*args):
            merged = lambda *some: f(
                *[some[moved.index(i)] if i in moved else args[i] for i in (0, 1, 2)]
            )
            given = tuple(args[i] for i in moved)
            return jvp(merged, given, tuple(x.cos() for x in given))[1]

        return along

    def summed(f):
        return lambda *args: f(*args).sin().sum()

    nestings = (
        push,
        lambda f: push(push(f)),
        lambda f: grad(summed(push(f)), (0, 1, 2)),
        lambda f: grad(summed(push(push(f))), (0, 1, 2)),
        lambda f: push(grad(summed(f))),
        lambda f: push(vmap(f, (0, None, None))),
        lambda f: vmap(push(f), (0, None, None)),
    )
    for nest in nestings:
        found, wanted = (
            nest(lambda *a: affine(*a).sin())(*operands),
            nest(lambda *a: plain(*a).sin())(*operands),
        )
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_tangents_of_two_levels_are_of_their_own_operands():
    """x moves in the inner jvp, the weight in the outer one, and the other way round."""

    def mixed(f, inner, outer):
        operands = [X, W]

        def along(moved):
            args = [moved if i == outer else a for i, a in enumerate(operands)]
            run = lambda a: f(*[a if i == inner else b for i, b in enumerate(args)]).sin()
            return jvp(run, (args[inner],), (operands[inner].cos(),))[1]

        return jvp(along, (operands[outer],), (operands[outer].sin(),))[1]

    plain = lambda x, w: (x.unsqueeze(-2) * w).sum(-1)
    for inner, outer in ((0, 1), (1, 0), (0, 0)):
        found, wanted = mixed(affine, inner, outer), mixed(plain, inner, outer)
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_compiled_code_is_that_of_torch():
    f = lambda x: jvp(lambda x: affine(x, W, B).sin(), (x,), (X,))[1]
    compiled = torch.compile(f, backend="aot_eager")
    torch.testing.assert_close(compiled(X), f(X))


def test_no_product_is_with_zeros():
    """A jvp has two products, its gradient in weights and inputs four more; torch has three and
    five.
    """
    product = 2 * X.numel() * len(W)

    def loss(f, w, x):
        y, dy = jvp(lambda x: f(x, w).sin(), (x,), (X,))
        return (y + dy).sum()

    def products(f, *, argnums=()):
        with FlopCounterMode(display=False) as counter:
            grad(loss, argnums)(f, W, X) if argnums else loss(f, W, X)
        return counter.get_total_flops() / product

    ours = (affine, lambda x, w: bilinear(torch.matmul, x, w.mT))
    for f in ours:
        assert products(f) == 2
        assert products(f, argnums=(1,)) == 2 + 2
    assert products(F.linear) > 2, "torch no longer multiplies by zeros: this module can go"


def test_autograd_in_the_level_of_forward_mode_keeps_tangents():
    """A gradient there wants the tangent of what was saved; only torch's own rule saves both."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    found = []
    for f in (affine, F.linear):
        with forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, X), w)
            (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
            found.append(forward_ad.unpack_dual(g).tangent)
            assert split(forward_ad.make_dual(x, X), w) is None
    torch.testing.assert_close(found[0], found[1])


def test_a_bias_alone_moves_the_result_in_its_dtype():
    x, w, b = (a.float() for a in (X[:1], W, B))
    with torch.autocast("cpu", torch.bfloat16):
        y, dy = jvp(lambda b: affine(x, w, b), (b,), (b,))
    assert y.dtype == dy.dtype == torch.bfloat16
    assert dy.shape == y.shape


def test_nothing_is_split_where_nothing_moves():
    assert split(X, W) is None
    assert grad(lambda x: (split(x, W) is None) * x.sum())(X).sum() == X.numel()
