"""override_sdpa where torch leaves room for doubt: masks that are causal too, sizes of zero, what
hides a call.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap
from torch.nn.attention import bias

import funcattn as fa
from funcattn.interop import override_sdpa

EXACT = {"atol": 1e-12, "rtol": 1e-12}  # float64: sums of some ten products
HIDDEN = torch.ones(6, 7, dtype=torch.bool)
HIDDEN[2:, 1] = False


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, dtype=torch.float64)


def dense(q, k, v, hidden, added=0.0):
    return (
        torch.softmax((q @ k.mT / q.shape[-1] ** 0.5 + added).masked_fill(hidden, -torch.inf), -1)
        @ v
    )


BOTH = {  # attn_mask for 6 queries and 7 keys
    "booleans": HIDDEN,
    "booleans along keys": HIDDEN[3:4],
    "booleans for each head": torch.stack([HIDDEN, HIDDEN.roll(3, -1) | (torch.arange(7) == 0)])[
        None
    ],
    "numbers": normal(9, 6, 7),
    "numbers that hide": torch.zeros(6, 7, dtype=torch.float64).masked_fill(~HIDDEN, -torch.inf),
    "numbers for each head": normal(8, 1, 2, 6, 7),
}


@pytest.mark.parametrize("given", BOTH.values(), ids=BOTH)
def test_a_mask_that_is_causal_too_hides_what_either_hides(given):
    q, k, v, t = (
        normal(1, 1, 2, 6, 8),
        normal(2, 1, 2, 7, 8),
        normal(3, 1, 2, 7, 8),
        normal(4, 1, 2, 6, 8),
    )
    causal = ~torch.ones(6, 7, dtype=torch.bool).tril()
    booleans = given.dtype == torch.bool
    right = lambda q: dense(
        q, k, v, causal | ~given if booleans else causal, 0.0 if booleans else given
    )
    f = lambda q: F.scaled_dot_product_attention(q, k, v, given, is_causal=True)
    if torch.__version__ >= torch.torch_version.TorchVersion("2.14"):
        with pytest.raises(RuntimeError, match="is_causal"):
            f(q)  # a canary: torch alone refuses both since 2.14
    else:
        torch.testing.assert_close(f(q), right(q), **EXACT)  # torch alone, on its CPU route
    slope = lambda f: grad(lambda q: f(q).sin().sum())
    with override_sdpa():
        torch.testing.assert_close(f(q), right(q), **EXACT)
        torch.testing.assert_close(jvp(f, (q,), (t,)), jvp(right, (q,), (t,)), **EXACT)
        torch.testing.assert_close(
            jvp(slope(f), (q,), (t,)), jvp(slope(right), (q,), (t,)), **EXACT
        )
        torch.testing.assert_close(
            vmap(f)(torch.stack([q, t])), torch.stack([right(q), right(t)]), **EXACT
        )


def test_a_causal_bias_of_torch_needs_no_mask_beside_it():
    q = normal(1, 1, 2, 6, 8)
    lower = bias.causal_lower_right(6, 6)
    with override_sdpa(), pytest.raises(ValueError, match="False with a CausalBias"):
        F.scaled_dot_product_attention(q, q, q, lower, is_causal=True)


@pytest.mark.parametrize(
    "sizes",
    [
        ((2, 2, 0, 4), (2, 2, 3, 4), (2, 2, 3, 4)),
        ((0, 3, 4), (0, 3, 4), (0, 3, 4)),
        ((3, 4), (3, 4), (3, 0)),
    ],
    ids=["no queries", "no examples", "no values"],
)
def test_sizes_of_zero_are_those_of_torch(sizes):
    q, k, v = (torch.ones(size, dtype=torch.float64) for size in sizes)
    f = lambda q: F.scaled_dot_product_attention(q, k, v)
    wanted = f(q)
    with override_sdpa():
        torch.testing.assert_close(f(q), wanted)
        torch.testing.assert_close(jvp(f, (q,), (q,)), (wanted, torch.zeros_like(wanted)))


# Rematerialization inside.


def attend_to_itself(q):
    return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("order", ["jvp", "grad of grad", "jvp of each row"])
def test_what_is_rematerialized_inside_has_every_derivative(order):
    q, t = normal(1, 1, 2, 20, 4), normal(2, 1, 2, 20, 4)
    square = lambda f: lambda q: f(q).square().sum()
    derivative = {
        "jvp": lambda f: jvp(f, (q,), (t,))[1],
        "grad of grad": lambda f: grad(square(grad(square(f))))(q),
        "jvp of each row": lambda f: vmap(lambda q: jvp(f, (q,), (q,))[1])(torch.stack([q, t])),
    }[order]
    wanted = derivative(lambda q: dense(q, q, q, torch.zeros(20, 20, dtype=torch.bool)))
    with override_sdpa():
        torch.testing.assert_close(
            derivative(fa.remat(attend_to_itself)), wanted, atol=1e-9, rtol=1e-9
        )


def test_a_rematerialized_layer_has_the_hvp_of_the_layer():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    apply, params = fa.interop.functional(layer)
    x, t = normal(1, 2, 20, 8), normal(2, 2, 20, 8)
    hvp = lambda f: jvp(grad(lambda x: f(params, x).square().sum()), (x,), (t,))[1]
    with override_sdpa():
        torch.testing.assert_close(hvp(fa.remat(apply)), hvp(apply), atol=1e-9, rtol=1e-9)
