"""What may follow a computation, asked of this thread and of these tensors alone."""

import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, jvp, vjp, vmap

import funcattn as fa
from funcattn.core.autograd import has_tangent, in_forward_mode, is_recorded

X = torch.ones(2)


@contextmanager
def another_thread_inside(transform):
    """While another thread runs a function of X under a transform."""
    inside, leave = threading.Event(), threading.Event()

    def wait(x):
        inside.set()
        leave.wait()
        return x.sin().sum()

    thread = threading.Thread(target=lambda: transform(wait))
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def under_a_dual_level(f):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(X, X))


TRANSFORMS = {
    "jvp": lambda f: jvp(f, (X,), (X,)),
    "grad": lambda f: grad(f)(X),
    "vmap": lambda f: vmap(f)(torch.ones(3, 2)),
    "a dual level": under_a_dual_level,
    "autograd": lambda f: f(X.clone().requires_grad_()).backward(),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_follows_is_known_of_this_thread_and_these_tensors(transform):
    asked = []
    transform(lambda x: asked.append(is_recorded({"a": [x, None], "b": X})) or x.sum())
    assert asked == [True]
    assert not is_recorded(X)
    with another_thread_inside(transform):
        assert not any(ask(X) for ask in (is_recorded, has_tangent, in_forward_mode))
    with torch.no_grad():
        assert not is_recorded(X.clone().requires_grad_())
        jvp(lambda x: asked.append(is_recorded(x)) or x, (X,), (X,))
    assert asked == [True, True]


def test_forward_mode_is_seen_through_a_vmap():
    asked = []
    look = lambda x: asked.append((in_forward_mode(x), is_recorded(x))) or x.sin()
    jvp(lambda x: vmap(look)(x), (torch.ones(3, 2),), (torch.ones(3, 2),))
    vmap(lambda x: jvp(look, (x,), (x,))[1])(torch.ones(3, 2))
    jvp(lambda x: vjp(look, x)[1](x)[0], (X,), (X,))
    assert asked == [(True, True)] * 3
    vmap(look)(torch.ones(3, 2))
    assert asked[-1] == (False, True)


@pytest.mark.parametrize(
    "transform", [TRANSFORMS["jvp"], TRANSFORMS["a dual level"]], ids=["jvp", "a dual level"]
)
def test_another_threads_jvp_changes_no_bit_and_refuses_nothing(transform):
    model = fa.decoder(fa.Config())
    params = fa.quantize(fa.int8)(model.init(fa.key(0)))
    compiled = fa.compile(model, backend="eager")
    q = fa.random.normal(fa.key(1), (1, 2, 20, 8))
    forgetful = fa.remat(lambda q: fa.attention(q, q, q).square().sum())

    def everything():
        with torch.no_grad():
            logits = model.apply(params, torch.arange(1, 8), model.cache(16))[0]
            stepped = compiled.step(params, torch.tensor([1]), model.cache(16))[0]
            tokens = fa.generate(fa.key(1), model, params, torch.arange(1, 4), steps=4)[0]
        leaf = q.clone().requires_grad_()
        gradient = torch.autograd.grad(forgetful(leaf), leaf)[0]
        return logits, stepped, tokens, gradient, fa.kernels.explain(q, q, q).chosen

    wanted = everything()
    with another_thread_inside(transform):
        found = everything()
    assert found[-1] == wanted[-1] != "reference"
    for x, y in zip(found[:-1], wanted[:-1], strict=True):
        assert torch.equal(x, y)


SCRIPT = """
import threading, warnings, torch
import funcattn as fa
from funcattn import native

load, meeting, alone = native.load, threading.Barrier(2), []

def together():
    try:
        meeting.wait(2)
    except threading.BrokenBarrierError:
        alone.append(1)  # the other waits for its turn
    return load()

native.load = together
model = fa.decoder(fa.Config())
params = fa.quantize(fa.int8)(model.init(fa.key(0)))
found = []

def run():
    with torch.no_grad():
        found.append(model.apply(params, torch.arange(1, 8), model.cache(16))[0])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
assert torch.equal(*found)
assert alone, "both were there at once"
assert not [str(warning.message) for warning in caught if "registered" in str(warning.message)], caught[0].message
"""


def test_two_threads_that_are_first_to_use_the_operator_register_it_once():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr[-600:]
