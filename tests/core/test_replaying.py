"""What remat computes again runs under the modes, the autocast and the values of the first time."""

import contextvars

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

import funcattn as fa
from funcattn.core import replaying
from funcattn.core.context import ContextValue
from funcattn.interop import override_sdpa
from funcattn.kernels import dispatch

FACTOR = contextvars.ContextVar("factor", default=1.0)
VALUE: ContextValue[str] = ContextValue("replayed", "")
EXACT = {"atol": 1e-9, "rtol": 1e-9}  # float64: a second derivative of a softmax over 20 keys


class Doubled(TorchFunctionMode):
    """torch.sin is twice itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.sin else out


class Tripled(TorchDispatchMode):
    """The same below autograd, for cosines too: three times both is the derivative of three times
    one.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 3 * out if func in (torch.ops.aten.sin.default, torch.ops.aten.cos.default) else out


def sines(x):
    return (torch.sin(x) * x).sum()


def normal(*shape):
    return fa.random.normal(fa.key(0), shape, dtype=torch.float64)


ORDERS = {
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "grad": lambda f: grad(f),
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).square().sum()),
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (x,))[1],
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (x,))[1]),
    "vmap of grad": lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(torch.stack([x, 2 * x])).sum()),
    "hessian": lambda f: torch.func.hessian(f),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_mode_of_ones_own_is_active_whenever_f_runs(order):
    x = normal(4)
    with Doubled():
        found, wanted = order(fa.remat(sines))(x), order(sines)(x)
    torch.testing.assert_close(found, wanted, **EXACT)
    assert not torch.allclose(found, order(sines)(x))


@pytest.mark.parametrize("mode", [Doubled, Tripled])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_a_backward_pass_runs_f_under_the_modes_of_the_forward(mode, inside):
    leaf = normal(4).requires_grad_()
    with mode():
        value = fa.remat(sines)(leaf)
        if inside:
            value.backward()
    if not inside:
        value.backward()
    factor = {Doubled: 2, Tripled: 3}[mode]
    torch.testing.assert_close(
        leaf.grad, factor * (leaf.cos() * leaf + leaf.sin()).detach(), **EXACT
    )


def test_a_mode_that_was_not_there_is_not_there_when_f_runs_again():
    leaf = normal(4).requires_grad_()
    value = fa.remat(sines)(leaf)
    with Doubled(), fa.kernels.use("reference"), torch.device("meta"):
        value.backward()
    torch.testing.assert_close(leaf.grad, (leaf.cos() * leaf + leaf.sin()).detach(), **EXACT)


def test_values_of_the_context_are_those_of_the_first_time():
    seen = []

    def f(x):
        seen.append(dispatch.current())
        return fa.taps.tap("here", x).sin().sum()

    leaf, plain = normal(4).requires_grad_(), normal(4)
    with fa.kernels.use("reference"), fa.taps.listening(lambda name, x: 5 * x):
        value = fa.remat(f)(leaf)
    with fa.kernels.use("flash"):
        value.backward()
    assert seen == ["reference"] * 2
    assert dispatch.current() is dispatch._forced._of_thread.last is None
    torch.testing.assert_close(leaf.grad, 5 * (5 * plain).cos(), **EXACT)


def test_a_context_variable_of_a_users_own_has_the_value_of_the_first_time():
    leaf = normal(4).requires_grad_()
    token = FACTOR.set(3.0)
    value = fa.remat(lambda x: (FACTOR.get() * x).sin().sum())(leaf)
    FACTOR.reset(token)
    value.backward()
    torch.testing.assert_close(leaf.grad, 3 * (3 * leaf).cos().detach(), **EXACT)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_that_runs_again_reads_the_values_of_the_first_time(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (len(VALUE.get()) * x).sin(), backend=backend)
    leaf = normal(4).requires_grad_()
    with VALUE.holding("three"):
        value = fa.remat(compiled)(leaf).sum()
    with VALUE.holding("of another length"):
        value.backward()
    torch.testing.assert_close(leaf.grad, 5 * (5 * leaf).cos().detach(), **EXACT)


def test_a_remat_within_a_remat_keeps_the_modes_of_both():
    x = normal(4)

    def nested(x):
        with Doubled():
            return fa.remat(sines)(x) + sines(x)

    for mode in (Doubled, Tripled):
        with mode():
            wanted, found = (ORDERS["jvp of grad"](f)(x) for f in (nested, fa.remat(nested)))
        torch.testing.assert_close(found, wanted, **EXACT)


def test_a_score_runs_under_the_modes_of_its_call():
    q = normal(1, 20, 4)
    score = lambda s, *_: torch.sin(s)
    f = lambda q, score: fa.kernels.attention_with_score(q, q, q, score).out.square().sum()
    with Doubled():
        found = jvp(grad(lambda q: f(q, score)), (q,), (q,))[1]
    wanted = jvp(grad(lambda q: f(q, lambda s, *_: 2 * torch.sin(s))), (q,), (q,))[1]
    torch.testing.assert_close(found, wanted, **EXACT)


def dropped(q):
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).square().sum()


@pytest.mark.parametrize(
    "order",
    [ORDERS["jvp"], ORDERS["grad of grad"], ORDERS["jvp of grad"]],
    ids=["jvp", "grad grad", "hvp"],
)
def test_dropout_draws_the_same_again_and_what_follows_draws_on(order):
    q = normal(1, 2, 20, 4)
    with override_sdpa(key=fa.key(0)):
        wanted = order(lambda q: dropped(q) + 2 * dropped(q))(q), dropped(q)
    with override_sdpa(key=fa.key(0)):
        found = order(fa.remat(lambda q: dropped(q) + 2 * dropped(q)))(q), dropped(q)
    torch.testing.assert_close(found[0], wanted[0], **EXACT)
    with override_sdpa(key=fa.key(0)):
        dropped(q), dropped(q)
        once = dropped(q)
    # counted once for each call that is written, however often it ran
    torch.testing.assert_close(found[1], once)


def test_dropout_in_a_backward_pass_that_has_ended_the_context_draws_the_same():
    leaf = normal(1, 2, 20, 4).requires_grad_()
    with override_sdpa(key=fa.key(0)):
        wanted = torch.autograd.grad(dropped(leaf), leaf)[0]
    with override_sdpa(key=fa.key(0)):
        value = fa.remat(dropped)(leaf)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], wanted, **EXACT)


def test_another_checkpoint_around_remat_is_still_refused_other_weights():
    leaf = normal(1, 2, 20, 4).requires_grad_()
    with override_sdpa(key=fa.key(0)), pytest.raises(RuntimeError, match="0 in a backward pass"):
        CheckpointFunction.apply(fa.remat(dropped), True, leaf).backward()


def test_compiled_code_sees_the_modes_in_a_rematerialized_function():
    torch._dynamo.reset()
    # "eager" runs the graph, into which a mode was written, under that mode once more
    backend = "aot_eager"
    forgetful, x = fa.remat(sines), normal(4)
    with Doubled():
        found = torch.compile(grad(forgetful), backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, 2 * grad(sines)(x), **EXACT)
    torch.testing.assert_close(
        torch.compile(grad(forgetful), backend=backend)(x), grad(sines)(x), **EXACT
    )


def test_modes_are_left_as_they_were_also_by_an_error():
    def fails(x):
        raise KeyError

    with Doubled() as mode, torch.device("cpu"):
        before = torch.overrides._get_current_function_mode_stack()
        with pytest.raises(KeyError):
            jvp(fa.remat(fails), (normal(4),), (normal(4),))
        assert [
            m is n
            for m, n in zip(torch.overrides._get_current_function_mode_stack(), before, strict=True)
        ] == [True] * 2
        assert mode in before
    assert replaying.State.of_now(["cpu"]).functions == ()
