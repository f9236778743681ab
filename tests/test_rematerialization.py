"""remat(f) against f: every nesting to depth three, what it refuses, and the memory it is for."""

import contextlib
import functools
import itertools
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import funcattn as fa
from funcattn.records import record

# float64, a few dozen roundings of numbers of order one, thrice differentiated
close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def normal(seed, *shape, dtype=torch.float64):
    return fa.random.normal(fa.key(seed), shape, dtype)


@record
class Layer(NamedTuple):
    weight: torch.Tensor
    shift: torch.Tensor


def segment(layer, x, *, activation, power):
    """A tree in, a tree out; a function and an int beside the tensors."""
    h = activation(layer.weight @ x + layer.shift)
    return {"h": h**power, "rest": (h.sin(), "name", None)}


def chain(segment):
    """Two segments as a function of one vector of 12."""

    def f(z):
        layer = Layer(z[:9].reshape(3, 3), z[9:])
        first = segment(layer, z[:3].cos(), activation=torch.tanh, power=2)
        second = segment(layer, first["h"], activation=torch.sigmoid, power=3)
        return torch.cat([second["h"], second["rest"][0] * first["rest"][0]])

    return f


STEPS = {  # a function of a vector into another
    "grad": lambda f: grad(lambda z: f(z).sin().sum()),
    "jvp": lambda f: lambda z: jvp(f, (z,), (z.cos(),))[1],
    "vmap": lambda f: lambda z: vmap(f)(torch.stack([z, z.sin(), 2 * z])).prod(0),
}
NESTINGS = [steps for depth in range(4) for steps in itertools.product(STEPS, repeat=depth)]


def nest(f, steps):
    for step in steps:
        f = STEPS[step](f)
    return f


@pytest.mark.parametrize("steps", NESTINGS, ids=lambda steps: ".".join(reversed(steps)) or "value")
def test_every_nesting_is_that_of_f(steps):
    z = normal(0, 12)
    close(nest(chain(fa.remat(segment)), steps)(z), nest(chain(segment), steps)(z))


@pytest.mark.parametrize(
    "transform", [jacrev, jacfwd, hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))]
)
def test_jacobians_and_hessians_are_those_of_f(transform):
    z = normal(1, 12)
    close(transform(chain(fa.remat(segment)))(z), transform(chain(segment))(z))


def test_one_remat_inside_another_is_right():
    inner = fa.remat(segment)
    z = normal(2, 12)
    for steps in NESTINGS[:13]:
        close(nest(fa.remat(chain(inner)), steps)(z), nest(chain(segment), steps)(z))


def test_plain_autograd_passes_torchs_own_checks():
    f = fa.remat(lambda x, n: (x * n).sin().cumsum(0))
    x = normal(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        f, (x, 2.0), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        f, (x, 2.0), check_fwd_over_rev=True, check_batched_grad=True
    )


def test_what_is_not_a_floating_tensor_passes_through():
    marker = object()

    def f(x, count, flag):
        return {
            "order": x.argsort(),
            "twice": count * 2,
            "flag": flag,
            "none": None,
            "value": x * count,
        }

    x = normal(4, 3).requires_grad_()
    out = fa.remat(f)(x, torch.tensor(3), marker)
    assert out["flag"] is marker
    assert out["none"] is None
    assert out["twice"].item() == 6
    close(out["order"], x.argsort())
    close(torch.autograd.grad(out["value"].sum(), x)[0], torch.full_like(x, 3))
    x = x.detach()
    by_order = lambda f: grad(
        lambda x: (out := f(x, torch.tensor(3), 0))["value"][out["order"][0]]
    )(x)
    close(by_order(fa.remat(f)), by_order(f))
    rows = torch.stack([x, -x])
    close(vmap(lambda x: fa.remat(f)(x, torch.tensor(3), 0)["order"])(rows), rows.argsort(-1))
    tangent = jvp(
        lambda x: {
            k: v
            for k, v in fa.remat(f)(x, torch.tensor(3), 0).items()
            if isinstance(v, torch.Tensor)
        },
        (x,),
        (x,),
    )[1]
    close(tangent["value"], 3 * x)


def test_an_argument_may_be_returned_as_it_is_and_twice():
    f = lambda x: (x, x, x.reshape(3, 1), x.detach())
    x = normal(5, 3)
    for steps in NESTINGS[:13]:
        sum_of = lambda f: lambda x: f(x)[0] * f(x)[1] ** 2 + f(x)[2].squeeze(-1) * f(x)[3]
        close(nest(sum_of(fa.remat(f)), steps)(x), nest(sum_of(f), steps)(x))
    y = x.clone().requires_grad_()
    out = fa.remat(f)(y)
    assert out[0] is not y
    assert y.is_leaf


def test_an_output_that_depends_on_nothing_has_no_derivative():
    f = fa.remat(lambda x: (x * 2, torch.ones(3, dtype=x.dtype, device=x.device)))
    x = normal(6, 3)
    close(grad(lambda x: f(x)[1].sum() + f(x)[0].sum())(x), torch.full_like(x, 2))
    close(jvp(lambda x: f(x)[1], (x,), (x,))[1], torch.zeros_like(x))


x, y, rows = normal(7, 3), normal(8, 3), normal(9, 3, 3)
CAPTURES = {
    "under grad": lambda: grad(lambda c: fa.remat(lambda x: x * c)(x).sum())(y),
    "through a view": lambda: grad(lambda c: fa.remat(lambda x: x @ c.T)(x).sum())(rows),
    "in a list": lambda: grad(lambda c: fa.remat(lambda x: torch.stack([x, c]))(x).sum())(y),
    "by writing it": lambda: grad(
        lambda c: fa.remat(lambda x: x.clone().index_put_((torch.tensor(0),), c))(x).sum()
    )(y[0]),
    "under jvp": lambda: jvp(lambda c: fa.remat(lambda x: x * c)(x), (y,), (y,)),
    "under vmap": lambda: vmap(lambda c: fa.remat(lambda x: x * c)(x))(rows),
    "at the same level of vmap": lambda: vmap(lambda c, x: fa.remat(lambda x: x * c)(x))(
        rows, rows
    ),
    "at another level of vmap": lambda: vmap(lambda c: vmap(fa.remat(lambda x: x * c[0]))(rows))(
        rows
    ),
    "below grad": lambda: vmap(lambda c: grad(lambda x: fa.remat(lambda x: x * c)(x).sum())(x))(
        rows
    ),
    "returned": lambda: grad(lambda c: fa.remat(lambda x: (x, c))(x)[1].sum())(y),
    "in a transform of its own": lambda: grad(
        lambda c: fa.remat(lambda x: grad(lambda x: (x * c).sum())(x))(x).sum()
    )(y),
    "by autograd": lambda: fa.remat(torch.nn.Linear(3, 3).double())(x.clone().requires_grad_()),
}


@pytest.mark.parametrize("how", CAPTURES)
def test_a_tracked_tensor_from_outside_is_refused(how):
    with pytest.raises(
        ValueError,
        match=r"remat: .* tracked float64\[.* from outside\. Pass it as an argument, or detach\(\) it before\.",
    ):
        CAPTURES[how]()


def test_a_constant_from_outside_is_welcome():
    c = normal(10, 3)
    w = c.clone().requires_grad_()
    close(hessian(fa.remat(lambda x: (x**3 * c).sum()))(x), hessian(lambda x: (x**3 * c).sum())(x))
    # its shape is no derivative
    close(grad(lambda c: (fa.remat(lambda x: x * c.shape[0])(x) * c).sum())(c), 3 * x)
    close(grad(lambda x: fa.remat(lambda x: x * w.detach())(x).sum())(x), c)


def test_where_nothing_is_differentiated_f_is_itself():
    w = y.clone().requires_grad_()
    # by w alone: autograd keeps what it needs, as it does for f
    fa.remat(lambda x: x * w)(x).sum().backward()
    close(w.grad, x)


def test_a_module_is_given_its_parameters():
    module = torch.nn.Linear(3, 3).double()
    apply = fa.remat(lambda params, x: functional_call(module, params, x))
    params = dict(module.named_parameters())
    wanted = grad(lambda p: functional_call(module, p, x).sin().sum())(params)
    got = grad(lambda p: apply(p, x).sin().sum())(params)
    for name in params:
        close(got[name], wanted[name])


@pytest.mark.parametrize(
    ("f", "what"),
    [
        (lambda x: x.mul_(2), "writes into an argument"),
        (
            lambda x: x * torch.rand(3, dtype=x.dtype, device=x.device),
            "draws from torch's global generator",
        ),
    ],
)
def test_a_function_that_is_not_pure_is_refused(f, what):
    with pytest.raises(ValueError, match=what):
        grad(lambda x: fa.remat(f)(x).sum())(normal(11, 3))


def test_what_is_drawn_from_a_key_is_drawn_again():
    f = lambda key, x: fa.random.bernoulli(key, 0.5, (64,)) * x**2
    x = normal(12, 64)
    close(
        grad(lambda x: fa.remat(f)(fa.key(1), x).sum())(x), grad(lambda x: f(fa.key(1), x).sum())(x)
    )
    keys = fa.split(fa.key(2), 3)
    per_key = lambda f: vmap(grad(lambda x, key: f(key, x).sum()), (None, 0))(x, keys)
    close(per_key(fa.remat(f)), per_key(f))


@pytest.mark.parametrize("at_call", [True, False])
def test_f_runs_again_under_the_autocast_of_its_call(at_call):
    seen = []

    def f(x):
        out = x @ x
        seen.append(out.dtype)
        return out.float()

    x = normal(13, 3, 3, dtype=torch.float32).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=at_call):
        out = fa.remat(f)(x)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=not at_call):
        out.sum().backward()
    assert seen == [torch.bfloat16 if at_call else torch.float32] * 2


@pytest.mark.cpu("it is about the default device")
@pytest.mark.parametrize("at_call", [None, "meta"])
def test_f_runs_on_the_default_device_of_its_call(at_call):
    x, seen = normal(13, 3), []
    under = lambda device: torch.device(device) if device else contextlib.nullcontext()

    def f(x):
        seen.append(torch.ones(3).device.type)
        return (x * x).sum()

    with under(at_call):
        here = torch.ones(3).device.type
        grad(fa.remat(f))(x)
        jvp(fa.remat(f), (x,), (x,))
        out = fa.remat(f)(x.requires_grad_())
    with under(None if at_call else "meta"):
        out.backward()
    assert seen == [here] * len(seen)
    assert len(seen) > 3


def test_autograd_keeps_the_inputs_of_segments_alone():
    def kept(segment):
        sizes = {}
        pack = lambda t: (
            sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = x
            for _ in range(4):
                out = segment(out)
        return sum(sizes.values())

    def segment(x):
        for _ in range(8):
            x = x.sin().exp()
        return x

    x = normal(14, 1000).requires_grad_()
    assert kept(fa.remat(segment)) == 4 * 8000
    assert kept(segment) > 4 * 8 * 8000


def test_gradients_and_hessian_products_peak_lower():
    # 8 segments of 8 layers of 1 MB: f keeps 64 layers or more, remat 8 inputs and the inside of
    # one segment.
    script = """
import torch, funcattn as fa
from torch.func import grad, jvp
torch.set_num_threads(1)
def segment(x):
    for _ in range(8):
        x = (x * 1.1).tanh()
    return x
def loss(segment):
    def f(x):
        for _ in range(8):
            x = segment(x)
        return x.square().sum()
    return f
status = lambda: open("/proc/self/status").read().split()  # ru_maxrss would begin at the parent's
peak = lambda: int((words := status())[words.index("VmHWM:") + 1])
def measure(f, x):
    before = peak(); f(x); return (peak() - before) / 1024
hvp = lambda f: lambda x: jvp(grad(f), (x,), (x,))[1]
small, x = torch.ones(8), torch.ones(2**18)
for f in (grad, hvp):
    f(loss(fa.remat(segment)))(small), f(loss(segment))(small)  # what torch loads on first use
first = measure(grad(loss(fa.remat(segment))), x)
second = first + measure(hvp(loss(fa.remat(segment))), x)
third = second + measure(grad(loss(segment)), x)
fourth = third + measure(hvp(loss(segment)), x)
print(first, second, third, fourth)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    ours_grad, ours_hvp, plain_grad, plain_hvp = map(float, done.stdout.split())
    assert ours_grad < plain_grad / 2, done.stdout
    assert ours_hvp < plain_hvp / 2, done.stdout


compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
doubled = lambda x, w: {"y": torch.tanh(x @ w) @ w.mT}
rematerialized = fa.remat(doubled)  # made outside of what is compiled


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: grad(lambda x, w: f(x, w).sin().sum()),
        lambda f: vmap(grad(lambda x, w: f(x, w).sin().sum()), (0, None)),
        lambda f: grad(lambda x, w: grad(lambda x: f(x, w).sin().sum())(x).sin().sum(), 1),
        lambda f: lambda x, w: jvp(grad(lambda x: f(x, w).sin().sum()), (x,), (x,))[1],
    ],
    ids=["value", "grad", "vmap.grad", "grad.grad", "jvp.grad"],
)
def test_compiled_code_gets_the_same_numbers(transform):
    torch._dynamo.reset()
    x, w = normal(15, 4, 3), normal(16, 3, 3)
    got = compiled(transform(lambda x, w: rematerialized(x, w)["y"]))(x, w)
    close(got, transform(lambda x, w: doubled(x, w)["y"])(x, w))


def test_a_compiled_call_of_remat_goes_under_one_transform_after_another():
    """Where a compiled function falls back to eager code, Dynamo would trace what remat is made of,
    and fail on the third.
    """
    torch._dynamo.reset()
    x, w = normal(15, 4, 3), normal(16, 3, 3)
    f, plain = (
        torch.compile(lambda x: rematerialized(x, w)["y"], backend="eager"),
        lambda x: doubled(x, w)["y"],
    )
    slope = lambda f: grad(lambda x: f(x).sin().sum())
    for verb in (
        lambda f: jvp(slope(f), (x,), (x,))[1],
        lambda f: vmap(slope(f))(torch.stack([x, x])),
        lambda f: f(x),
        lambda f: jvp(f, (x,), (x,))[1],
        lambda f: slope(slope(f))(x),
        lambda f: slope(f)(x),
    ):
        close(verb(f), verb(plain))


def test_inside_compiled_code_remat_is_f_and_may_read_what_it_likes():
    torch._dynamo.reset()
    f = lambda c: grad(lambda c: fa.remat(lambda x: x * c.sin())(x).sum())(c)
    close(compiled(f)(y), x * y.cos())


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize("of", [x, x.clone().requires_grad_()], ids=["constant", "differentiated"])
def test_compiled_code_loses_no_gradient_of_a_captured_tensor(of):
    torch._dynamo.reset()
    w = y.clone().requires_grad_()
    f = fa.remat(lambda x: x * w)
    with pytest.raises(Exception, match=r"from outside\. Pass it|nonstrict_trace"):
        compiled(lambda x: f(x))(of)


@pytest.mark.parametrize("name", ["silu", "gelu", "softplus", "leaky_relu", "hardswish"])
def test_products_with_the_hessian_go_through_activations_whose_fused_backward_has_no_forward_mode(
    name,
):
    """torch has two backward rules for some: a fused one where grad mode is off, and one that
    differentiates again.
    """
    f = lambda x: getattr(torch.nn.functional, name)(x).sin().sum()
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)
    hvp = lambda f: jvp(grad(f), (x,), (x.cos(),))[1]
    torch.testing.assert_close(hvp(fa.remat(f)), hvp(f))
    torch.testing.assert_close(
        vmap(lambda v: jvp(grad(fa.remat(f)), (x,), (v,))[1])(torch.eye(7).double()),
        torch.func.hessian(f)(x),
    )
