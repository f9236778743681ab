"""Closed forms under the override: every nesting of derivatives, against torch's reverse mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn.interop import override_sdpa

EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64: third derivatives of sums of 24 numbers


def normal(seed, *shape, dtype=torch.float64):
    return fa.random.normal(fa.key(seed), shape, dtype=dtype)


X, TANGENT, TARGET = normal(1, 4, 6), normal(2, 4, 6), normal(3, 4, 6)
FORMS = {
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x + 0, inplace=True),
    "mish": F.mish,
    "mish in place": lambda x: nn.Mish(inplace=True)(x + 0),
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "glu": F.glu,
    "glu along the first axis": lambda x: F.glu(x, 0),
    "rrelu in eval": lambda x: F.rrelu(x, 0.1, 0.3),
    "mse": lambda x: F.mse_loss(x, TARGET),
    "mse, summed and weighted": lambda x: F.mse_loss(x, TARGET, reduction="sum", weight=X**2),
    "huber": lambda x: nn.HuberLoss(delta=0.7)(x, TARGET),
    "huber, weighted": lambda x: F.huber_loss(x, TARGET, "sum", weight=X**2),
    "soft margin": lambda x: F.soft_margin_loss(x, TARGET.sign(), reduction="none"),
    "logit": lambda x: torch.logit(x.sigmoid()),
    "logit, clamped": lambda x: x.sigmoid().logit(0.3),
    "linear": lambda x: F.linear(x.sin(), TARGET, X[:, 0]),
    "linear of weights of x": lambda x: F.linear(TARGET, x.sin(), x[:, 0]),
    "products": lambda x: torch.mm(TARGET.mT, x.sin() @ TARGET.mT @ x),
    "products by name": lambda x: torch.bmm(input=x[None], mat2=TARGET.mT[None]),
}
# what torch does not differentiate twice in reverse mode either, in other functions
TWICE = {FORMS["hardsigmoid"]: lambda x: (3 * x + 3).clamp(0, 6) / 6}


def scalar(f):
    return lambda x: f(x).sin().sum()


def reverse_along(f, t):
    """The derivative of a scalar f along t, in reverse mode alone."""
    return lambda x: (grad(f)(x) * t).sum()


@pytest.mark.parametrize("f", FORMS.values(), ids=FORMS)
def test_every_nesting_is_what_reverse_mode_of_torch_says(f):
    torch.testing.assert_close(TWICE.get(f, f)(X), f(X), **EXACT)
    ours, f = scalar(f), scalar(TWICE.get(f, f))
    first, hvp = grad(f)(X), grad(reverse_along(f, TANGENT))(X)
    curved = reverse_along(reverse_along(f, TANGENT), TANGENT)(X)
    third = grad(reverse_along(reverse_along(f, TANGENT), TANGENT))(X)
    all_ones = grad(lambda x: (grad(reverse_along(f, torch.ones_like(X)))(x) * TANGENT).sum())(X)
    push, f = lambda f: lambda x: jvp(f, (x,), (TANGENT,))[1], ours
    with override_sdpa():
        found = {
            "vmap of grad": vmap(grad(f))(torch.stack([X, X]))[1],
            "jvp of jvp": push(push(f))(X),
            "jvp of grad": push(grad(f))(X),
            "jvp of grad of jvp": push(grad(push(f)))(X),
            "grad of jvp of grad": grad(lambda x: (push(grad(f))(x) * TANGENT).sum())(X),
        }
        with torch.no_grad():  # as curvature operators call it
            found["jvp of jacrev"] = push(jacrev(f))(X)
            found["jvp of jacrev of jacrev"] = push(lambda x: jacrev(jacrev(f))(x).sum((2, 3)))(X)
    wanted = [first, curved, hvp, third, third, hvp, all_ones]
    for (name, got), right in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(got, right, msg=lambda text, n=name: f"{n}: {text}", **EXACT)


REFUSED = ["silu", "mish", "hardsigmoid", "glu", "mse", "huber", "soft margin"]


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="a canary of torch 2.13")
@pytest.mark.parametrize("name", [*REFUSED, "logit"])
def test_torch_refuses_one_of_these_nestings(name):
    """What needs no closed form any more can leave the table."""
    f = scalar(FORMS[name])
    nestings = [
        lambda: jvp(grad(f), (X,), (X,)),
        lambda: jvp(lambda x: jvp(f, (x,), (X,))[1], (X,), (X,)),
        torch.no_grad()(lambda: jvp(jacrev(f), (X,), (X,))),
    ]

    def refused(nesting):
        try:
            nesting()
        except RuntimeError:  # NotImplementedError is one
            return True
        return False

    assert any(refused(nesting) for nesting in nestings)


SIGNS = TARGET.sign()
LOW_PRECISION = {
    "silu": F.silu,
    "mish": F.mish,
    "hardsigmoid": F.hardsigmoid,
    "glu": F.glu,
    "rrelu": F.rrelu,
    "mse": lambda x: F.mse_loss(x, SIGNS.to(x.dtype)),
    "huber": lambda x: F.huber_loss(x, SIGNS.to(x.dtype), reduction="none"),
    "soft margin": lambda x: F.soft_margin_loss(x, SIGNS.to(x.dtype)),
    "logit": lambda x: x.sigmoid().logit(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("f", LOW_PRECISION.values(), ids=LOW_PRECISION)
def test_the_value_is_rounded_as_torch_rounds_it(f, dtype):
    x = (3 * X).to(dtype)
    wanted = f(x)
    with override_sdpa():
        found = jvp(f, (x,), (x,))[0]
    assert found.dtype == dtype
    # sums in float32, rounded once where torch may round twice; float32 itself: eight roundings
    step = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 2)
    torch.testing.assert_close(found, wanted, atol=step, rtol=step)


def test_far_from_zero_nothing_overflows():
    x = torch.tensor([-1e4, -800.0, -30.0, 0.0, 30.0, 800.0, 1e4], dtype=torch.float64)
    for f in (F.silu, F.mish):
        wanted = f(x), grad(scalar(f))(x)
        with override_sdpa():
            value, slope = jvp(f, (x,), (x,))[0], grad(scalar(f))(x)
        torch.testing.assert_close((value, slope), wanted, atol=1e-14, rtol=1e-13)


def test_without_a_transform_torchs_kernel_runs():
    x = X.clone().requires_grad_()
    name = lambda x: F.silu(x).grad_fn.name()
    with override_sdpa():
        assert name(x) == "SiluBackward0"
        with torch.autograd.forward_ad.dual_level():
            assert name(torch.autograd.forward_ad.make_dual(x, TANGENT)) != "SiluBackward0"


def test_forward_over_reverse_of_plain_autograd_is_closed():
    """loss.backward() of dual weights, as in tools without torch.func."""
    forward_ad = torch.autograd.forward_ad
    wanted = grad(reverse_along(scalar(F.silu), TANGENT))(X)
    x = X.clone().requires_grad_()
    with override_sdpa(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, TANGENT)
        (slope,) = torch.autograd.grad(scalar(F.silu)(dual), dual)
        torch.testing.assert_close(forward_ad.unpack_dual(slope).tangent, wanted, **EXACT)


def test_complex_numbers_and_integers_are_left_to_torch():
    z, n = torch.complex(X, TANGENT), X.long()
    wanted = F.silu(z)
    with override_sdpa():
        assert torch.equal(vmap(F.silu)(z), wanted)
        with pytest.raises(RuntimeError, match="not implemented"):
            vmap(F.mse_loss)(n, n)


def test_errors_are_those_of_torch():
    with override_sdpa():
        for wrong in (
            lambda x: F.glu(x[:, :3]),
            lambda x: F.huber_loss(x, TARGET, delta=-1.0),
            lambda x: F.mse_loss(x, TARGET, reduction="median"),
        ):
            with pytest.raises((RuntimeError, ValueError)):
                grad(scalar(wrong))(X)
        with pytest.warns(UserWarning, match="different to the input size"):
            grad(lambda x: F.mse_loss(x, TARGET[0]))(X)


def test_the_hessian_of_a_llama_is_closed_as_curvature_tools_take_it():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config).double().eval()
    tokens = torch.tensor([[1, 5, 2, 7, 3, 3]])
    params = {name: p.detach() for name, p in net.named_parameters()}
    tangents = {name: normal(n, *p.shape) for n, (name, p) in enumerate(params.items())}

    def loss(params):
        return functional_call(net, params, (), {"input_ids": tokens, "labels": tokens}).loss

    with override_sdpa(), torch.no_grad():
        found = jvp(jacrev(loss), (params,), (tangents,))[1]
    net.set_attn_implementation("eager")
    along = lambda params: sum((g * tangents[n]).sum() for n, g in grad(loss)(params).items())
    # its norms are computed in float32: some ten roundings of 6e-8, of numbers up to 20
    torch.testing.assert_close(found, grad(along)(params), atol=2e-5, rtol=2e-5)


def test_no_matrix_product_is_with_zeros():
    """A jvp of a linear layer has two products, and its gradient in the weights two more."""
    layer = nn.Linear(6, 5, bias=True).double()
    weights = dict(layer.named_parameters())

    def products(call):
        def loss(weights):
            y, dy = jvp(lambda x: call(weights, x).sin(), (X,), (TANGENT,))
            return (y * dy).sum()

        with override_sdpa(), FlopCounterMode(display=False) as counter:
            grad(loss)(weights)
        return counter.get_total_flops() / (2 * X.numel() * 5)

    assert products(lambda weights, x: functional_call(layer, weights, x)) == 4
    for multiply in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, lambda x, w: x @ w):
        assert products(lambda weights, x, f=multiply: f(x, weights["weight"].mT)) == 4
