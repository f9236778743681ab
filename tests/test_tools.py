"""Tools of torch around attention: compiled functions under transforms, the meta device, traces,
exports, counts of operations.
"""

import functools

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn.kernels.closed import operators
from funcattn.kernels.closed.specs import AttendSpec

H, T, D = 2, 20, 8
ONCE = 4 * H * T * T * D  # floating-point operations of q @ k.mT and p @ v
NEAR = {"atol": 1e-4, "rtol": 1e-4}  # float32: sums of 20 products, and their derivatives


def normal(seed, *shape, dtype=torch.float32):
    return fa.random.normal(fa.key(seed), shape, dtype=dtype)


def dense(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


# A compiled function under transforms, one after the other.

QKVT = [normal(seed, 2, 2, T, D, dtype=torch.float64) for seed in range(4)]
USES = {
    "plain": lambda f, q, k, v, t: f(q, k, v),
    "jvp": lambda f, q, k, v, t: jvp(lambda q: f(q, k, v), (q,), (t,))[1],
    "vmap": lambda f, q, k, v, t: vmap(lambda q: f(q, k, v))(torch.stack([q, t, k])),
    "hvp": lambda f, q, k, v, t: jvp(grad(lambda q: f(q, k, v).sin().sum()), (q,), (t,))[1],
    "vmap of grad": lambda f, q, k, v, t: vmap(grad(lambda q: f(q, k, v).sin().sum()))(
        torch.stack([q, t])
    ),
    "vmap of jvp": lambda f, q, k, v, t: vmap(lambda q: jvp(lambda q: f(q, k, v), (q,), (t,))[1])(
        torch.stack([q, k])
    ),
}
ORDERS = [("jvp", "vmap", "hvp", "plain", "vmap of jvp"), ("vmap of grad", "jvp", "vmap")]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("order", "queries"),
    [(ORDERS[0], T), (ORDERS[0], 4), (ORDERS[1], T)],
    ids=["long", "few", "maps first"],
)
def test_a_compiled_function_under_one_transform_after_another_is_the_function(
    order, queries, backend
):
    torch._dynamo.reset()
    f = torch.compile(lambda q, k, v: fa.attention(q, k, v), backend=backend)
    tensors = [x[..., :queries, :] for x in QKVT]
    for name in order:
        torch.testing.assert_close(USES[name](f, *tensors), USES[name](dense, *tensors))


# The meta device.


@pytest.mark.parametrize("queries", [T, 4])
@pytest.mark.parametrize("kernel", [None, "flash", "reference", "sdpa"])
def test_meta_tensors_have_shapes(kernel, queries):
    q, k = (
        torch.empty(1, 4, queries, D, device="meta"),
        torch.empty(1, 2, queries, D, device="meta"),
    )
    options = [
        {},
        {"mask": fa.to("meta")(fa.masks.causal(queries))},
        {"bias": torch.empty(queries, queries, device="meta")},
    ]
    options += [{"dropout": 0.5, "key": fa.key(0).to("meta")}] if kernel != "sdpa" else []
    for some in options:
        f = lambda q, some=some: fa.attention(q, k, k, kernel=kernel, **some)
        found = [f(q), torch.no_grad()(f)(q), vmap(f)(torch.stack([q]))[0]]
        if kernel != "sdpa":
            found += [jvp(f, (q,), (q,))[1], grad(lambda q, f=f: f(q).sum())(q)]
            found += [jvp(grad(lambda q, f=f: f(q).sum()), (q,), (q,))[1]]
        assert {(x.shape, x.device.type) for x in found} == {(q.shape, "meta")}
    attended = fa.kernels.attention_with_score(q, k, k, lambda s, *_: s.tanh(), options[1]["mask"])
    assert (attended.out.shape, attended.lse.shape) == (q.shape, q.shape[:-1])


# Traces.


@pytest.mark.parametrize("queries", [T, 4])
def test_jit_trace_gives_a_graph(queries):
    k, other = normal(1, 1, 1, queries, D), normal(2, 1, H, queries, D)
    for mask in (None, fa.masks.causal(queries)):
        f = lambda q, mask=mask: fa.attention(q, k, k, mask)
        for q in (normal(0, 1, H, queries, D), normal(0, 1, H, queries, D).requires_grad_()):
            traced = torch.jit.trace(f, (q,))
            torch.testing.assert_close(traced(other), f(other), **NEAR)
            torch.testing.assert_close(
                grad(lambda q, g=traced: g(q).sin().sum())(other),
                grad(lambda q, g=f: g(q).sin().sum())(other),
            )


def test_jit_trace_knows_sizes_of_masks_and_dropout():
    q, other = normal(0, 1, H, T, D), normal(2, 1, H, T, D)
    f = lambda q, key: fa.attention(q, q, q, fa.masks.causal(q.shape[-2]), dropout=0.3, key=key)
    torch.testing.assert_close(
        torch.jit.trace(f, (q, fa.key(0)))(other, fa.key(1)), f(other, fa.key(1)), **NEAR
    )


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("queries", [T, 4])
def test_make_fx_gives_a_graph(queries, mode):
    q, other = normal(0, 1, H, queries, D), normal(1, 1, H, queries + (mode == "symbolic"), D)
    f = lambda q: fa.attention(q, q, q)
    derivatives = [grad(lambda q: f(q).sin().sum()), lambda q: vmap(f)(torch.stack([q, q]))]
    # of which torch fixes sizes, of any function
    derivatives += [lambda q: jvp(f, (q,), (q,))[1]] if mode == "real" else []
    for g in (f, *derivatives):
        torch.testing.assert_close(make_fx(g, tracing_mode=mode)(q)(other), g(other), **NEAR)


def capped(q):
    return fa.kernels.attention_with_score(
        q, q, q, lambda s, *_: s.tanh(), fa.masks.causal(q.shape[-2])
    ).out


def masked(q):
    return fa.attention(q, q, q, fa.masks.causal(q.shape[-2]))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("f", "queries"), [(masked, T), (masked, 4), (capped, T)])
def test_export_gives_a_graph(f, queries, strict):
    class Module(torch.nn.Module):
        def forward(self, q):
            return f(q)

    q, other = normal(0, 1, H, queries, D), normal(1, 1, H, queries, D)
    torch.testing.assert_close(
        torch.export.export(Module(), (q,), strict=strict).module()(other), f(other), **NEAR
    )


def test_a_strict_export_refuses_what_is_no_plain_operation():
    class Module(torch.nn.Module):
        def forward(self, q):
            return fa.attention(q, q, q, kernel="flash")

    with pytest.raises(Exception, match="strict=True takes plain operations alone"):
        torch.export.export(Module(), (normal(0, 1, H, T, D),), strict=True)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_gives_a_graph_of_a_score():
    q, other = normal(0, 1, H, T, D), normal(2, 1, H, T, D)
    torch.testing.assert_close(torch.jit.trace(capped, (q,))(other), capped(other), **NEAR)


# Counts of operations.


def counted(f):
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def test_products_of_the_value_are_counted():
    q = normal(0, 1, H, T, D)
    wanted = counted(lambda: dense(q, q, q))
    assert wanted == ONCE
    for f in (fa.attend, fa.attention, torch.no_grad()(fa.attention)):
        assert counted(lambda f=f: f(q, q, q)) == ONCE
        # hidden pairs too, as torch counts
        assert counted(lambda f=f: f(q, q[:, :1], q[:, :1], fa.masks.causal(T))) == ONCE
    assert counted(lambda: vmap(lambda q: fa.attention(q, q, q))(torch.stack([q, q]))) == 2 * ONCE


def test_products_of_derivatives_are_counted():
    q = normal(0, 1, H, T, D)
    mine = [q.clone().requires_grad_() for _ in range(3)]
    attention = functools.partial(fa.attention, kernel="flash")
    out = attention(*mine)
    # four products, and the logits once more
    assert counted(lambda: torch.autograd.grad(out.sum(), mine)) == 2.5 * ONCE
    f = lambda q: attention(q, q[:, :, :7], q[:, :, 7:14])
    for g in (lambda q: jvp(f, (q,), (q,))[1], grad(lambda q: f(q).square().sum())):
        assert counted(lambda g=g: g(q)) > counted(lambda: f(q)) > 0
        assert counted(lambda g=g: jvp(g, (q,), (q,))) > counted(lambda g=g: g(q))


def test_products_of_a_value_and_its_tangent_in_one_pass_are_counted():
    q, k, v, t = normal(0, 4, 1, H, T, D).unbind()
    both = lambda: operators.attend_jvp(AttendSpec(D**-0.5), (True, False, False), [q, k, v, t])
    # the products of the value, t @ k.mT, and those weights times v
    assert counted(both) == 2 * ONCE


def test_products_by_experts_and_of_tiles_are_counted():
    x, weight, expert = normal(0, 5, 32), normal(1, 3, 16, 32), torch.tensor([0, 2, 1, 1, 0])
    assert counted(lambda: fa.layers.linear_experts(weight, x, expert)) == 2 * 5 * 32 * 16
    assert (
        counted(lambda: grad(lambda w: fa.layers.linear_experts(w, x, expert).sum())(weight))
        >= 2 * 2 * 5 * 32 * 16
    )
