"""A bias wider than the queries is added in its own dtype, whether or not a derivative is asked."""

import pytest
import torch
from torch.func import grad, jvp

import funcattn as fa
from funcattn.kernels.dtypes import accumulation_dtype

NARROW = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
]
NARROW += [(torch.float32, torch.float64), (torch.bfloat16, torch.float64)]
ACCURACY = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(T, dtype, bias_dtype):
    q, k, v = (fa.random.normal(key, (2, T, 32)).to(dtype) for key in fa.split(fa.key(0), 3))
    # takes small numbers out of a narrower dtype
    level = {torch.float64: 2.0**30, torch.bfloat16: 0.0}.get(bias_dtype, 200.0)
    bias = (fa.random.normal(fa.key(1), (T, T), torch.float64) + level).to(bias_dtype)
    wanted = torch.softmax(q.double() @ k.double().mT / 32**0.5 + bias.double(), -1) @ v.double()
    return q, k, v, bias, wanted


def assert_near(got, wanted):
    accuracy = ACCURACY[got.dtype]
    torch.testing.assert_close(got.detach().double(), wanted, atol=accuracy, rtol=accuracy)


def test_sums_are_kept_in_float32_at_least_and_in_float64_where_an_input_is():
    half, single, double = (
        torch.ones(1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64)
    )
    assert accumulation_dtype(half, None) == accumulation_dtype(single, half) == torch.float32
    assert accumulation_dtype(half, double) == torch.float64


@pytest.mark.parametrize("T", [8, 40])
@pytest.mark.parametrize(("dtype", "bias_dtype"), NARROW, ids=str)
def test_a_bias_keeps_its_digits(T, dtype, bias_dtype):
    q, k, v, bias, wanted = inputs(T, dtype, bias_dtype)
    assert_near(fa.attention(q.clone().requires_grad_(), k, v, bias=bias), wanted)
    with torch.no_grad():
        assert_near(fa.attention(q, k, v, bias=bias), wanted)
        assert_near(fa.attend(q, k, v, bias=bias).out, wanted)
        with torch.autocast("cpu", torch.bfloat16):
            if dtype == torch.bfloat16:
                assert_near(fa.attention(q.float(), k.float(), v.float(), bias=bias), wanted)
        with fa.interop.override_sdpa():
            assert_near(
                torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias), wanted
            )
        weights = fa.attention_weights(q, k, bias=bias)
        assert_near((weights @ v.to(weights.dtype)).to(dtype), wanted)


@pytest.mark.parametrize("T", [8, 40])
def test_derivatives_of_a_float64_bias_are_float64_and_those_of_float32_queries_float32(T):
    q, k, v, bias, _ = inputs(T, torch.float32, torch.float64)
    loss = lambda f: lambda q, v, bias: f(q, k, v, bias=bias).double().square().sum()
    slope = grad(loss(fa.attention), (0, 1, 2))
    dense = lambda q, k, v, bias: (
        torch.softmax(q.double() @ k.double().mT / 32**0.5 + bias, -1) @ v.double()
    )
    got = jvp(slope, (q, v, bias), (q, v, torch.ones_like(bias).tril()))
    wanted = jvp(grad(loss(dense), (0, 1, 2)), (q, v, bias), (q, v, torch.ones_like(bias).tril()))
    for mine, theirs in zip(got, wanted, strict=True):
        assert [x.dtype for x in mine] == [torch.float32, torch.float32, torch.float64]
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, check_dtype=False)
    remade = fa.remat(lambda q: fa.attention(q, k, v, bias=bias))
    torch.testing.assert_close(
        grad(lambda q: remade(q).sum())(q),
        grad(lambda q: fa.attention(q, k, v, bias=bias).sum())(q),
    )
    compiled = torch.compile(
        lambda q: fa.attend(q, k, v, bias=bias), fullgraph=True, backend="aot_eager"
    )
    assert compiled(q).lse.dtype == fa.attend(q, k, v, bias=bias).lse.dtype == torch.float64


def test_a_bias_beyond_the_range_of_float16_is_no_infinity():
    q, k, v, _, _ = inputs(8, torch.float16, torch.float32)
    bias = torch.zeros(8, 8)
    bias[0] = -1e5
    q[:, 0] = 0
    with torch.no_grad():
        assert_near(fa.attention(q, k, v, bias=bias)[:, 0], v.double().mean(-2))


def test_a_narrower_bias_is_widened():
    q, k, v, bias, _ = inputs(8, torch.float32, torch.bfloat16)
    torch.testing.assert_close(
        fa.attention(q, k, v, bias=bias), fa.attention(q, k, v, bias=bias.float())
    )
