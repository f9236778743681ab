"""Values of small problems: the same numbers and the same errors as by the general route."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import native
from funcattn.kernels import small
from funcattn.testing import dense, strategies

pytestmark = [
    pytest.mark.skipif(bool(native.load()), reason=native.load()),
    pytest.mark.cpu("the native backend is for the CPU"),
]


def qkv(T=5, S=7, D=8, Dv=8, dtype=torch.float32, lead=(2, 3)):
    shapes = (*lead, T, D), (*lead, S, D), (*lead, S, Dv)
    return tuple(
        fa.random.normal(fa.key(n), shape, torch.float32).to(dtype)
        for n, shape in enumerate(shapes)
    )


@given(strategies.keys(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 33))
def test_it_is_the_dense_formula(key, T, S, D):
    q, k, v = (
        fa.random.normal(one, (2, n, D), torch.float32)
        for one, n in zip(fa.split(key, 3), (T, S, S), strict=True)
    )
    found = small.attend_small(q, k, v, None)
    wanted = dense.attend(q.double(), k.double(), v.double())
    # two dot products, of D numbers and of S, and an exponential; see test_entry.close
    far = 2 * (max(D, S) + 2) / 2 * torch.finfo(torch.float32).eps
    assert (found.out - wanted.out).abs().max() <= far * (1 + v.abs().max())
    assert (found.lse - wanted.lse).abs().max() <= far * (1 + wanted.lse.abs().max())
    assert torch.equal(fa.attention(q, k, v), found.out)
    assert all(map(torch.equal, fa.attend(q, k, v), found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.3, -2.0])
def test_every_dtype_and_scale_has_the_bits_of_the_forced_kernel(dtype, scale):
    x = qkv(dtype=dtype)
    found, wanted = fa.attend(*x, scale=scale), fa.attend(*x, scale=scale, kernel="native")
    assert all(map(torch.equal, found, wanted))
    assert [y.dtype for y in found] == [dtype, torch.float32]


DECLINED = {
    "grouped heads": lambda: (qkv()[0], *(x[:, :1] for x in qkv()[1:])),
    "broadcast leading axes": lambda: (qkv()[0], *(x[:1] for x in qkv()[1:])),
    "values of another size": lambda: qkv(Dv=5),
    "many pairs": lambda: qkv(T=80, S=80),
    "float64": lambda: qkv(dtype=torch.float64),
    "no queries": lambda: qkv(T=0),
    "no features": lambda: qkv(D=0, Dv=0),
    "a leaf": lambda: (qkv()[0].requires_grad_(), *qkv()[1:]),
    "a parameter": lambda: (torch.nn.Parameter(qkv()[0]), *qkv()[1:]),
    "a negative view": lambda: (torch._neg_view(qkv()[0]), *qkv()[1:]),
    "meta tensors": lambda: [x.to("meta") for x in qkv()],
    "mixed dtypes": lambda: (qkv()[0], *(x.half() for x in qkv()[1:])),
    "two axes": lambda: [x[0, 0] for x in qkv()],
    "no tensors": lambda: [None, [1.0], "v"],
    "integers": lambda: [torch.ones(1, 2, 3, dtype=torch.int64)] * 3,
}


@pytest.mark.parametrize("kind", DECLINED)
def test_what_needs_another_question_is_left_to_the_general_route(kind):
    assert small.attend_small(*DECLINED[kind](), None) is None


def test_transforms_forced_kernels_and_modes_take_the_general_route(monkeypatch):
    taken = []
    monkeypatch.setattr(small, "attend_rows", lambda *x: taken.append(x))
    q, k, v = qkv()
    f = lambda q: fa.attention(q, k, v)
    grad(lambda q: f(q).sum())(q)
    jvp(f, (q,), (q,))
    vmap(f, 0)(q.unsqueeze(0))
    with torch.autocast("cpu"):
        f(q)
    with fa.kernels.use("reference"):
        f(q)
    for other in (torch.tensor(0.5), 2, float("nan"), 1e38):
        assert small.attend_small(q, k, v, other) is None
    fa.attention(q, k, v, dropout=0.5, key=fa.key(0))
    fa.attention(q, k, v, fa.masks.full(5, 7))
    fa.attention(q, k, v, bias=torch.zeros(5, 7))
    torch.compile(f, backend="eager")(q)
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(q, q))
    assert not taken
