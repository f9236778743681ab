"""Normalizations under the override: derivatives of every nesting against the formula of each.

Not against torch's reverse mode, whose third derivatives of fused normalizations are wrong too.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import funcattn as fa
from funcattn.interop import functional, override_sdpa

EXACT = {"atol": 1e-9, "rtol": 1e-9}  # float64: third derivatives of quotients over 24 numbers


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, dtype=torch.float64)


X, TANGENT, W, B = normal(1, 2, 6, 4), normal(2, 2, 6, 4), normal(3, 6), normal(4, 6)
ROW = normal(5, 4)


def written(axes, eps=1e-5):
    return lambda x: (x - x.mean(axes, True)) / (x.var(axes, False, keepdim=True) + eps).sqrt()


def grouped(x):
    groups = x.reshape(2, 3, 2, 4)
    return written((2, 3), 1e-3)(groups).reshape(x.shape) * W[:, None] + B[:, None]


NORMS = {  # torch's function, and what it computes
    "layer": (lambda x: F.layer_norm(x, (4,), ROW, -ROW), lambda x: written(-1)(x) * ROW - ROW),
    "layer, two axes": (lambda x: F.layer_norm(x, (6, 4)), written((-2, -1))),
    "layer, weights of x": (
        lambda x: F.layer_norm(x, (4,), x[0, 0], x[1, 1].sin()),
        lambda x: written(-1)(x) * x[0, 0] + x[1, 1].sin(),
    ),
    "group": (lambda x: F.group_norm(x, 3, W, B, 1e-3), grouped),
    "batch in training": (
        lambda x: F.batch_norm(x, None, None, W, B, training=True),
        lambda x: written((0, 2))(x) * W[:, None] + B[:, None],
    ),
    "instance": (lambda x: F.instance_norm(x, eps=1e-2), written(-1, 1e-2)),
    "batch in eval": (
        lambda x: F.batch_norm(x, B, B.exp(), W),
        lambda x: (x - B[:, None]) / (B.exp() + 1e-5).sqrt()[:, None] * W[:, None],
    ),
}


def along(f):
    """The derivative of a scalar f along TANGENT, in reverse mode."""
    return lambda x: (grad(f)(x) * TANGENT).sum()


def push(f):
    return lambda x: jvp(f, (x,), (TANGENT,))[1]


NESTINGS = {  # what is nested, and the same in reverse mode
    "jvp": (push, along),
    "jvp of jvp": (lambda f: push(push(f)), lambda f: along(along(f))),
    "grad of jvp": (lambda f: grad(push(f)), lambda f: grad(along(f))),
    "jvp of grad": (lambda f: push(grad(f)), lambda f: grad(along(f))),
    "jvp of jacrev": (torch.no_grad()(lambda f: push(jacrev(f))), lambda f: grad(along(f))),
    "vmap of grad": (lambda f: lambda x: vmap(grad(f))(x[None])[0], grad),
    "grad of jvp of jvp": (lambda f: grad(push(push(f))), lambda f: grad(along(along(f)))),
    "jvp of grad of jvp": (lambda f: push(grad(push(f))), lambda f: grad(along(along(f)))),
    "grad of grad of grad": (
        lambda f: grad(lambda x: (grad(along(f))(x) * TANGENT).sum()),
        lambda f: grad(along(along(f))),
    ),
}


def scalar(f):
    return lambda x: f(x).sin().sum()


@pytest.mark.parametrize("name", NORMS)
def test_every_nesting_is_that_of_the_formula(name):
    torchs, formula = NORMS[name]
    torch.testing.assert_close(torchs(X), formula(X), **EXACT)
    for nesting, (nested, reverse) in NESTINGS.items():
        wanted = reverse(scalar(formula))(X)
        with override_sdpa(), torch.set_grad_enabled(nesting != "jvp of jacrev"):
            found = nested(scalar(torchs))(X)
        torch.testing.assert_close(
            found, wanted, msg=lambda text, n=nesting: f"{n}: {text}", **EXACT
        )


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="a canary of torch 2.13")
@pytest.mark.parametrize("name", ["layer", "batch in training", "instance"])
def test_torch_is_silently_wrong_in_grad_of_jvp(name):
    """pytorch/pytorch#196700; where it is mended, the closed form can go."""
    torchs, formula = NORMS[name]
    assert not torch.allclose(grad(push(scalar(torchs)))(X), grad(along(scalar(formula)))(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_value_is_rounded_as_torch_rounds_it(dtype):
    x = X.to(dtype)
    for f in (
        lambda x: F.layer_norm(x, (4,), ROW.to(dtype)),
        lambda x: F.group_norm(x, 2, W.to(dtype)),
        lambda x: F.batch_norm(x, None, None, W.to(dtype), training=True),
    ):
        wanted = f(x)
        with override_sdpa():
            found = jvp(f, (x,), (x,))[0]
        assert found.dtype == dtype
        # one rounding here, at most two there; float32: some ten
        step = torch.finfo(dtype).eps * (10 if dtype == torch.float32 else 2)
        torch.testing.assert_close(found, wanted, atol=step, rtol=step)


@pytest.mark.parametrize("norm", [F.batch_norm, F.instance_norm])
def test_running_statistics_are_written_as_torch_writes_them(norm):
    wanted, found = ([torch.zeros(6).double(), torch.ones(6).double()] for _ in range(2))
    option = {"training" if norm is F.batch_norm else "use_input_stats": True, "momentum": 0.3}
    out = norm(X, *wanted, **option)
    with override_sdpa():
        pushed = jvp(lambda x: norm(x, *found, **option), (X,), (TANGENT,))[0]
    torch.testing.assert_close((pushed, found), (out, wanted), **EXACT)
    assert wanted[0].any()


def test_the_gradient_of_a_jvp_through_a_module_is_exact():
    """The training step of mean flows: the loss holds a jvp of the network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4)).double()
    apply, params = functional(net)
    x, t = X[0], TANGENT[0]

    def loss(params):
        out, rate = jvp(lambda x: apply(params, x), (x,), (t,))
        return (out - rate).square().sum()

    def by_hand(params):
        p = lambda name, x: x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

        def f(x):
            h = written(-1)(p("0", x)) * params["1.weight"] + params["1.bias"]
            return p("3", h / (1 + (-h).exp()))

        out, rate = jvp(f, (x,), (t,))
        return (out - rate).square().sum()

    with override_sdpa():
        found = grad(loss)(params)
    torch.testing.assert_close(found, grad(by_hand)(params), **EXACT)


def test_errors_are_those_of_torch():
    with override_sdpa():
        for wrong in (
            lambda x: F.layer_norm(x, (5,)),
            lambda x: F.layer_norm(x, (4,), W),
            lambda x: F.group_norm(x, 4),
            lambda x: F.batch_norm(x[:1, :, :1], None, None, training=True),
            lambda x: F.instance_norm(x[..., :1]),
        ):
            with pytest.raises((RuntimeError, ValueError)):
                grad(scalar(wrong))(X)


@pytest.mark.slow
def test_a_compiled_jvp_of_a_normalization_is_closed():
    """torch itself fails to compile the jvp of F.layer_norm."""
    torch._dynamo.reset()
    net = nn.LayerNorm(4).double().requires_grad_(False)
    f = lambda x: functional_call(net, dict(net.named_parameters()), x).sin().sum()
    with override_sdpa():
        found = torch.compile(lambda x: jvp(f, (x,), (TANGENT,))[1], backend="aot_eager")(X)
    torch.testing.assert_close(found, push(scalar(written(-1)))(X), **EXACT)
