"""torch.utils.checkpoint inside `closed`: every derivative is that of the function as it is."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import funcattn as fa
from funcattn.interop import closed, functional

EXACT = {"atol": 1e-9, "rtol": 1e-9}  # float64: two derivatives of sums of some hundred products


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, dtype=torch.float64)


X, TANGENT = normal(1, 3, 8), normal(2, 3, 8)


class Block(nn.Module):
    """A layer of attention and one of dropout; `rerun` calls what is checkpointed."""

    def __init__(self, rerun):
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.MultiheadAttention(8, 2, dtype=torch.float64)
        self.feed = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Dropout(0.5)).double()
        self.norm = nn.LayerNorm(8).double()
        self.rerun = rerun

    def part(self, x, *, scale, other):
        h = self.norm(x)
        return x + scale * self.attend(h, h, h, need_weights=False)[0], [self.feed(x), other]

    def forward(self, x):
        x, (y, other) = self.rerun(self, x)
        assert other == "other"
        return x + y


def plainly(self, x):
    return self.part(x, scale=2.0, other="other")


WAYS = {  # of calling it
    "keywords": lambda self, x: checkpoint(
        self.part, x, use_reentrant=False, scale=2.0, other="other", early_stop=False
    ),
    "a closure": lambda self, x: checkpoint(lambda x: plainly(self, x), x, use_reentrant=True),
    "a partial": lambda self, x: checkpoint(
        functools.partial(self.part, scale=2.0, other="other"),
        x,
        use_reentrant=True,
        preserve_rng_state=False,
    ),
    "x in the closure": lambda self, x: checkpoint(
        lambda: plainly(self, x), use_reentrant=False, determinism_check="none"
    ),
    "modules as arguments": lambda self, x: checkpoint(plainly, self, x, use_reentrant=False),
    "one within another": lambda self, x: checkpoint(
        lambda x: WAYS["keywords"](self, x), x, use_reentrant=False
    ),
}


def scalar(f):
    return lambda *x: f(*x).sin().sum()


def pushed(f, x, t):
    return jvp(f, (x,), (t,))[1]


DERIVATIVES = {  # of f(params, x) along t (of params)
    "grad": lambda f, p, t: grad(scalar(f), (0, 1))(p, X),
    "jvp": lambda f, p, t: jvp(f, (p, X), (t, TANGENT)),
    "jvp of grad": lambda f, p, t: pushed(grad(lambda p: scalar(f)(p, X)), p, t),
    "grad of jvp": lambda f, p, t: grad(lambda p: pushed(lambda x: scalar(f)(p, x), X, TANGENT))(p),
    "vmap": lambda f, p, t: vmap(lambda x: f(p, x), randomness="same")(torch.stack([X, TANGENT])),
    "vmap of jvp": lambda f, p, t: vmap(
        lambda t: jvp(lambda x: f(p, x), (X,), (t,)), randomness="different"
    )(torch.stack([X, TANGENT])),
    "vmap over params": lambda f, p, t: vmap(grad(scalar(f)), (0, None), randomness="different")(
        {name: torch.stack([x, 2 * x]) for name, x in p.items()}, X
    ),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("way", WAYS)
def test_every_derivative_is_that_without_a_checkpoint(way, derivative):
    results = []
    for rerun in (plainly, WAYS[way]):
        apply, params = functional(Block(rerun))
        # not those of the module, to which functional_call restores it before a backward pass
        params = {name: 1.5 * p + 0.1 for name, p in params.items()}
        tangents = {name: p.cos() for name, p in params.items()}
        torch.manual_seed(5)  # of dropout
        with closed():
            results.append((derivative(apply, params, tangents), torch.rand(3)))
    torch.testing.assert_close(results[1], results[0], **EXACT)


@pytest.mark.parametrize("way", WAYS)
def test_backward_after_the_context_gives_every_parameter_its_gradient(way):
    results = []
    for rerun in (plainly, WAYS[way]):
        block, x = Block(rerun), X.clone().requires_grad_()
        torch.manual_seed(5)
        with closed():
            loss = scalar(block)(x)
        loss.backward()
        results.append([x.grad, *(p.grad for p in block.parameters())])
    assert all(g.any() for g in results[0] if g.dim() > 1)
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_second_derivatives_of_plain_autograd():
    results = []
    for rerun in (plainly, WAYS["a closure"]):
        block, x = Block(rerun).eval(), X.clone().requires_grad_()
        with closed():
            (slope,) = torch.autograd.grad(scalar(block)(x), x, create_graph=True)
        (slope * TANGENT).sum().backward()
        results.append([x.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_intermediates_are_not_saved():
    runs, saved = [], []
    layers = nn.Sequential(*[nn.Linear(64, 64), nn.Tanh()] * 4).double()
    x = normal(3, 32, 64)

    def f(x):
        runs.append(None)
        return layers(x)

    def keep(t):
        saved.append(t)
        return t

    with closed(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = checkpoint(f, x, use_reentrant=False)
    assert len(runs) == 1
    weights = {p.data_ptr() for p in layers.parameters()}
    assert {t.data_ptr() for t in saved} <= weights | {x.data_ptr()}
    y.sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize("derivative", ["grad", "jvp of grad"])
def test_segments_of_a_sequence(derivative):
    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Mish()) for _ in range(5))).double()
    apply, params = functional(net)
    rerun = nn.Module()
    rerun.net = net
    rerun.forward = lambda x: checkpoint_sequential(net, 2, x, use_reentrant=False)
    again, _ = functional(rerun)
    prefixed = lambda p: {f"net.{name}": x for name, x in p.items()}
    tangents = {name: p.cos() for name, p in params.items()}
    with closed():
        wanted, found = (
            DERIVATIVES[derivative](f, params, tangents)
            for f in (apply, lambda p, x: again(prefixed(p), x))
        )
    torch.testing.assert_close(found, wanted, **EXACT)


class Doubled(TorchFunctionMode):
    """torch.sin is twice itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.sin else out


@pytest.mark.parametrize("inside", [True, False], ids=["mode in context", "context in mode"])
def test_the_recomputation_is_under_the_modes_of_the_forward(inside):
    x, w = X.clone().requires_grad_(), nn.Parameter(TANGENT.clone())
    first, second = (closed(), Doubled()) if inside else (Doubled(), closed())
    with first, second:
        y = checkpoint(lambda x: (torch.sin(x) * w).sum(), x, use_reentrant=False)
    y.backward()
    torch.testing.assert_close(x.grad, (2 * x.cos() * w).detach(), **EXACT)
    torch.testing.assert_close(w.grad, (2 * x.sin()).detach(), **EXACT)


def test_attention_in_a_recomputation_after_the_context_is_closed():
    """Forward over reverse of a checkpoint, whose backward pass runs attention again."""
    q = normal(3, 1, 2, 5, 4)
    f = lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.3).square().sum()
    once = lambda q: checkpoint(f, q, use_reentrant=True)
    results = []
    for g in (f, once):
        with closed(key=fa.key(7)):
            results.append(pushed(grad(g), q, q.cos()))
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_without_derivatives_the_function_is_called_once():
    calls = []
    with closed(), torch.no_grad():
        checkpoint(lambda x: calls.append(0) or x, X, use_reentrant=False)
    assert len(calls) == 1


class Tagging(nn.Module):
    """Leaves a tensor behind, as mixtures do for their auxiliary loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8).double()

    def forward(self, x):
        out = self.layer(x)
        self.loss = out.square().mean()
        return out


def test_what_cannot_be_tracked_is_a_clear_error():
    hidden = type("Holder", (), {})()
    hidden.weight = nn.Parameter(X)
    with closed():
        with pytest.raises(ValueError, match="Pass it as an argument"):
            grad(lambda x: checkpoint(lambda x: x * hidden.weight, x).sum())(X)
        with pytest.raises(ValueError, match="leaves its modules as they were, got one that sets"):
            checkpoint(Tagging(), X, use_reentrant=False)
        selective = lambda: (torch.no_grad(), torch.no_grad())
        with pytest.raises(ValueError, match="context_fn should be absent"):
            grad(
                lambda x: checkpoint(torch.sin, x, use_reentrant=False, context_fn=selective).sum()
            )(X)
    assert checkpoint(torch.sin, X, use_reentrant=False) is not None


def test_a_context_of_ones_own_is_left_to_torch():
    entered = []

    class Noted:
        def __enter__(self):
            entered.append(self)

        def __exit__(self, *_):
            pass

    x = X.clone().requires_grad_()
    with closed():
        y = checkpoint(torch.sin, x, use_reentrant=False, context_fn=lambda: (Noted(), Noted()))
        y.sum().backward()
    assert len(entered) == 2
    torch.testing.assert_close(x.grad, x.cos().detach())
