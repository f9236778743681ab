"""The public door of attention: dropout's errors, the weights for those who plot them, and what
`explain` tells.
"""

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import masks, native

Q = torch.ones(2, 4, 20, 8)
KV = torch.ones(2, 2, 20, 8)


def normal(dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        fa.random.normal(key, x.shape, dtype=dtype)
        for key, x in zip(fa.split(fa.key(0), 3), (Q, KV, KV), strict=True)
    ]


ON_CPU = pytest.mark.cpu("a reason that holds there")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"dropout": 0.1},
            TypeError,
            "attention: key should be given with dropout, got None. Pass funcattn.key",
        ),
        (
            {"dropout": 1.0, "key": fa.key(0)},
            ValueError,
            r"dropout should be a rate in \[0, 1\), got 1.0",
        ),
        ({"dropout": -0.1, "key": fa.key(0)}, ValueError, "dropout should be a rate"),
        (
            {"dropout": 0.1, "key": fa.split(fa.key(0), 3)},
            ValueError,
            r"one key, int64 \(2,\), got .* Map over .* vmap",
        ),
        (
            {"dropout": 0.1, "key": fa.key(0), "kernel": "sdpa"},
            ValueError,
            "'sdpa': draws dropout from torch's global generator",
        ),
        pytest.param({"kernel": "sdpa:cudnn"}, ValueError, "for CUDA, not for cpu", marks=ON_CPU),
        (
            {"kernel": "fast"},
            ValueError,
            "kernel should be None or one of 'native', 'sdpa', 'triton', 'flash'",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(options, kind, message):
    with pytest.raises(kind, match=message):
        fa.attention(Q, KV, KV, **options)


def test_the_weights_are_those_that_mix_the_values():
    q, k, v = normal(torch.float64)
    m = masks.causal(20)
    P = fa.attention_weights(q, k, m)
    assert torch.allclose(
        P @ v.repeat_interleave(2, -3), fa.attention(q, k, v, m), rtol=0, atol=1e-13
    )
    assert torch.allclose(P.sum(-1), torch.ones_like(P[..., 0]), rtol=0, atol=1e-14)
    assert not P.triu(1).any()


def test_the_explanation_names_every_kernel_with_what_stands_against_it():
    told = {v.kernel: v.why_not for v in fa.explain(Q, KV, KV).verdicts}
    assert set(told) == {
        "native",
        "sdpa",
        "triton",
        "flash",
        "reference",
        *(f"sdpa:{name}" for name in ("flash", "efficient", "cudnn", "math")),
    }
    assert told["sdpa"] == told["flash"] == told["reference"] == ""
    assert told["native"] == native.load()
    assert (
        "float32"
        in {v.kernel: v.why_not for v in fa.explain(*normal(torch.float64)).verdicts}["native"]
    )
    assert "CUDA" in told["sdpa:efficient"]
    assert (
        "values of 3 features"
        in {v.kernel: v.why_not for v in fa.explain(Q, KV, KV[..., :3]).verdicts}["sdpa:flash"]
    )


@pytest.mark.parametrize(
    "kernel", ["native", "sdpa", "sdpa:flash", "sdpa:math", "flash", "reference"]
)
@pytest.mark.parametrize(
    "mask",
    [None, masks.causal(20), masks.window(20, 4), torch.ones(20, 20, dtype=torch.bool).tril()],
)
def test_every_kernel_that_can_run_gives_the_same(kernel, mask):
    q, k, v = normal(torch.float32)
    exact = fa.attention(q.double(), k.double(), v.double(), mask, kernel="reference")
    error = (fa.attention(q, k, v, mask, kernel=kernel) - exact).abs().max().item()
    # a mean of at most 20 values
    assert error < 20 * torch.finfo(torch.float32).eps * v.abs().max().item()


def test_the_choice_changes_with_what_may_be_asked():
    q, kv = Q.double(), KV.double()  # which the native kernel does not take
    assert fa.explain(q, kv, kv, masks.causal(20)).chosen == "sdpa"
    assert fa.explain(q, kv, kv, masks.window(20, 4)).chosen == "flash"
    assert fa.explain(q[..., :1, :], kv, kv).chosen == "sdpa"
    seen = []
    grad(lambda q: (seen.append(fa.explain(q, kv, kv).chosen), q.sum())[1])(q)
    grad(lambda q: (seen.append(fa.explain(q[..., :1, :], kv, kv).chosen), q.sum())[1])(q)
    assert seen == ["flash", "reference"]


@pytest.mark.cpu("the native backend is for the CPU")
@pytest.mark.skipif(bool(native.load()), reason=native.load())
def test_on_a_cpu_the_native_kernel_is_taken_for_values_and_derivatives():
    for mask in (None, masks.causal(20), masks.window(20, 4), masks.causal(20).dense(20)):
        assert fa.explain(Q, KV, KV, mask).chosen == "native"
    assert fa.explain(Q[..., :1, :], KV, KV).chosen == "native"  # values alone
    assert fa.explain(Q[..., :1, :].requires_grad_(), KV, KV).chosen != "native"
    long = torch.ones(2, 2, 2048, 8)  # a few queries behind it
    assert fa.explain(Q[..., :4, :], long, long).chosen == "native"
    assert fa.explain(Q[..., :1, :], long, long).chosen == "native"  # four heads read two
    longer = torch.ones(2, 4, 8192, 8)
    assert fa.explain(Q[..., :1, :], longer, longer).chosen == "sdpa"
    seen = []
    grad(lambda q: (seen.append(fa.explain(q, KV, KV).chosen), q.sum())[1])(Q)
    assert seen == ["native"]


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_a_mask_on_another_device_is_refused(name):
    elsewhere = masks.causal(20).dense(20).to("meta")
    options = {"mask": elsewhere} if name == "mask" else {"bias": elsewhere.float()}
    with pytest.raises(
        ValueError, match=f"{name} should be on {Q.device} as q is, got meta. Move it"
    ):
        fa.attention(Q, KV, KV, **options)


def test_a_mask_without_intervals_shows_nothing():
    nothing = masks.Mask(
        torch.zeros(20, 0, dtype=torch.int64), torch.zeros(20, 0, dtype=torch.int64)
    )
    for kernel in ("flash", "reference"):
        assert not fa.attention(Q, KV, KV, nothing, kernel=kernel).any()


# Sizes of zero.

NOTHING = {  # lead, H, K, T, S, D, Dv
    "no queries": ((2,), 2, 2, 0, 3, 4, 4),
    "no features": ((2,), 2, 2, 3, 3, 0, 4),
    "no values": ((2,), 2, 2, 3, 3, 4, 0),
    "no keys": ((2,), 2, 2, 3, 0, 4, 4),
    "no examples": ((2, 0), 4, 2, 20, 20, 8, 8),
    "no heads": ((), 0, 0, 3, 3, 4, 4),
    "many rows, no features": ((), 2, 1, 20, 20, 0, 4),
    "many rows, no values": ((), 2, 1, 20, 20, 4, 0),
    "many queries, no keys": ((), 2, 2, 20, 0, 8, 8),
    "nothing at all": ((), 2, 2, 0, 0, 0, 0),
}
KERNELS = [None, "flash", "reference", "sdpa", "sdpa:math"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", NOTHING.values(), ids=NOTHING)
def test_attention_over_nothing_has_the_shapes_of_attention(sizes, kernel):
    lead, H, K, T, S, D, Dv = sizes
    shapes = (*lead, H, T, D), (*lead, K, S, D), (*lead, K, S, Dv)
    x = [
        fa.random.normal(key, shape)
        for key, shape in zip(fa.split(fa.key(0), 3), shapes, strict=True)
    ]
    closed = not (kernel or "").startswith("sdpa")
    options: list[dict] = [
        {},
        {"mask": masks.causal(T, S)},
        {"mask": torch.ones(T, S, dtype=torch.bool)},
    ]
    options += [
        {"bias": torch.ones(H, T, S)},
        *([{"dropout": 0.5, "key": fa.key(1)}] if closed else []),
    ]
    for some in options:
        f = lambda q, k, v, some=some: fa.attention(q, k, v, kernel=kernel, **some)
        with torch.no_grad():
            out = f(*x)
        leaves = [t.clone().requires_grad_() for t in x]
        slopes = torch.autograd.grad(f(*leaves).sum(), leaves)
        assert out.shape == (*lead, H, T, Dv)
        assert [slope.shape for slope in slopes] == [t.shape for t in x]
        assert all(t.isfinite().all() for t in (out, *slopes))
        if not S:
            assert not out.any()
        if closed:
            (out, moved), each = (
                jvp(f, (*x,), (*x,)),
                vmap(f, (0, None, None))(torch.stack([x[0]] * 2), *x[1:]),
            )
            twice = jvp(grad(lambda q, f=f: f(q, *x[1:]).square().sum()), (x[0],), (x[0],))[1]
            assert moved.shape == out.shape == each.shape[1:]
            assert twice.shape == x[0].shape
            attended = fa.attend(*x, some.get("mask"), bias=some.get("bias"), kernel=kernel)
            assert (attended.out.shape, attended.lse.shape) == (out.shape, out.shape[:-1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_features_each_query_gets_the_mean_of_the_values_it_sees(kernel):
    q, k, v = torch.ones(2, 20, 0), torch.ones(2, 20, 0), fa.random.normal(fa.key(0), (2, 20, 4))
    means = v.cumsum(-2) / torch.arange(1, 21).unsqueeze(-1)
    torch.testing.assert_close(fa.attention(q, k, v, masks.causal(20), kernel=kernel), means)
    torch.testing.assert_close(
        fa.attention(q, k, v, kernel=kernel), v.mean(-2, keepdim=True).expand(2, 20, 4)
    )
    slope = grad(lambda v: fa.attention(q, k, v, kernel=kernel).sum())(v)
    # twenty queries, each a twentieth of each value
    torch.testing.assert_close(slope, torch.ones_like(v))


def test_keys_of_no_heads_serve_no_queries_alone():
    with pytest.raises(ValueError, match="K dividing H = 2"):
        fa.attention(torch.ones(2, 3, 4), torch.ones(0, 3, 4), torch.ones(0, 3, 4))
