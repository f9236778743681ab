"""psum and its kin over simulated devices: every derivative against the same function written for
all devices at once.
"""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jvp, vjp, vmap

import funcattn as fa
from funcattn import collectives
from funcattn.collectives import (
    Axis,
    all_gather,
    all_gather_invariant,
    axis_index,
    copy_to_region,
    local_slice,
    pmax,
    ppermute,
    psum,
    reduce_scatter,
)
from funcattn.sharding import Grid, P, shard_map, spmd

N = 3
RING = [(i, (i + 1) % N) for i in range(N)]
PART = [(0, 2), (2, 1)]  # nobody sends to 0, and 1 sends to nobody


def numbers(i, *shape):
    return fa.random.normal(fa.key(i), shape, torch.float64)


# name -> what a device does with its x (6, 2), and the same on the x (N, 6, 2) of all at once;
# results are each device's own.
VERBS = {
    "psum": (lambda x: psum(x, "t"), lambda x: x.sum(0).expand(N, 6, 2)),
    "all_gather": (
        lambda x: all_gather(x, "t", dim=1),
        lambda x: torch.cat(list(x), 1).expand(N, 6, 2 * N),
    ),
    "reduce_scatter": (lambda x: reduce_scatter(x, "t"), lambda x: x.sum(0).view(N, 2, 2)),
    "ppermute": (lambda x: ppermute(x, "t", RING), lambda x: x.roll(1, 0)),
    "a partial ppermute": (
        lambda x: ppermute(x, "t", PART),
        lambda x: torch.stack([0 * x[0], x[2], x[0]]),
    ),
}


def everywhere(f):
    """f on all devices at once, of stacked values."""
    return spmd(lambda *x: f(*[leaf[0] for leaf in x]).unsqueeze(0), "t", N, P("t"), P("t"))


def total(y):
    """One number that all devices hold alike, from each one's own y, nonlinear in it and different
    on every device.
    """
    mine = (y.sin() * (1.0 + axis_index("t"))).sum()
    return psum(mine, "t")


def total_of_all(y):
    weight = torch.arange(1.0, N + 1, dtype=y.dtype).view(N, *(1,) * (y.dim() - 1))
    return (y.sin() * weight).sum()


def varying(name):
    """A scalar of a device's x by way of a verb. psum makes what all hold alike, so it is entered
    before each goes its own way.
    """
    verb = VERBS[name][0]
    return lambda x: total(copy_to_region(verb(x * x), "t") if name == "psum" else verb(x * x))


@pytest.mark.parametrize("name", VERBS)
def test_a_collective_is_its_map_under_every_transform(name):
    verb, whole = VERBS[name]
    f, g = varying(name), lambda x: total_of_all(whole(x * x))
    x, t = numbers(0, N, 6, 2), numbers(1, N, 6, 2)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    close(everywhere(verb)(x), whole(x).contiguous())
    close(everywhere(grad(f))(x), grad(g)(x))
    close(everywhere(lambda x: vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0])(x), grad(g)(x))
    close(
        everywhere(lambda x, t: jvp(f, (x,), (t,))[1].reshape(1))(x, t)[0, 0], jvp(g, (x,), (t,))[1]
    )
    close(everywhere(lambda x, t: jvp(grad(f), (x,), (t,))[1])(x, t), jvp(grad(g), (x,), (t,))[1])
    twice = lambda h, sum_: grad(lambda x: sum_(grad(h)(x) ** 2))
    close(everywhere(twice(f, lambda y: psum(y.sum(), "t")))(x), twice(g, lambda y: y.sum())(x))
    close(
        everywhere(lambda x, t: grad(lambda x: jvp(f, (x,), (t,))[1])(x))(x, t),
        grad(lambda x: jvp(g, (x,), (t,))[1])(x),
    )
    batch = numbers(2, 4, N, 6, 2)
    each = spmd(lambda x: vmap(grad(f))(x[:, 0]).unsqueeze(1), "t", N, P(None, "t"), P(None, "t"))
    close(each(batch), vmap(grad(g))(batch))
    close(vmap(everywhere(grad(f)))(batch), vmap(grad(g))(batch))


@pytest.mark.parametrize("name", VERBS)
def test_derivatives_from_outside_are_those_from_inside(name):
    f, g = varying(name), lambda x: total_of_all(VERBS[name][1](x * x))
    outside = lambda x: everywhere(lambda x: f(x).reshape(1))(x)[0, 0]
    x, t = numbers(0, N, 6, 2), numbers(1, N, 6, 2)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    close(grad(outside)(x), grad(g)(x))
    close(jvp(outside, (x,), (t,))[1], jvp(g, (x,), (t,))[1])
    close(jvp(grad(outside), (x,), (t,))[1], jvp(grad(g), (x,), (t,))[1])
    leaf = x.clone().requires_grad_()
    outside(leaf).backward()
    close(leaf.grad, grad(g)(x))


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_copy_to_region_and_psum_are_transposes(n, seed):
    """<psum x, y> = <x, copy_to_region y>, and what all hold alike has one gradient: the sum of
    what each makes of it.
    """
    w, x = (
        fa.random.normal(fa.key(seed), (4,), torch.float64),
        fa.random.normal(fa.fold_in(fa.key(seed), 1), (n, 4), torch.float64),
    )
    loss = lambda w, x: psum((copy_to_region(w, "t") * x[0]).sum() ** 3, "t")
    found = spmd(grad(loss), "t", n, (P(), P("t")), P())(w, x)
    torch.testing.assert_close(
        found, grad(lambda w: ((w * x).sum(-1) ** 3).sum())(w), rtol=1e-10, atol=1e-10
    )
    found = spmd(hessian(loss), "t", n, (P(), P("t")), P())(w, x)
    torch.testing.assert_close(
        found, hessian(lambda w: ((w * x).sum(-1) ** 3).sum())(w), rtol=1e-10, atol=1e-10
    )


@given(st.integers(1, 4), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_gathers_and_slices_undo_each_other(n, dim, seed):
    x = fa.random.normal(fa.key(seed), (2 * n, 3 * n, n), torch.float64)
    cut = P(*("t" if i == dim else None for i in range(3)))
    assert torch.equal(
        spmd(lambda x: all_gather_invariant(x, "t", dim=dim), "t", n, cut, P())(x), x
    )
    assert torch.equal(
        spmd(
            lambda x: all_gather_invariant(local_slice(x, "t", dim=dim), "t", dim=dim),
            "t",
            n,
            P(),
            P(),
        )(x),
        x,
    )
    # all go on with it alike: the gradient is that of one
    alike = lambda x: (all_gather_invariant(x, "t", dim=dim) ** 3).sum()
    torch.testing.assert_close(spmd(grad(alike), "t", n, cut, cut)(x), 3 * x**2)
    each = lambda x: psum((local_slice(x, "t", dim=dim) ** 3).sum(), "t")
    torch.testing.assert_close(spmd(grad(each), "t", n, P(), P())(x), 3 * x**2)


def test_two_axes_do_not_mix():
    x = numbers(0, 2, 3)
    f = lambda x: torch.stack(
        [psum(x, "a").sum(), psum(x, "b").sum(), psum(psum(x, "a"), "b").sum()]
    ).view(3, 1, 1)
    found = shard_map(f, Grid(a=2, b=3), P("a", "b"), P(None, "a", "b"))(x)
    torch.testing.assert_close(found[0], x.sum(0).expand(2, 3))
    torch.testing.assert_close(found[1], x.sum(1, keepdim=True).expand(2, 3))
    torch.testing.assert_close(found[2], x.sum().expand(2, 3))


def test_what_all_hold_alike_is_summed_as_often_as_there_are_devices():
    assert int(spmd(lambda: psum(torch.tensor(7), "t"), "t", 4, (), P())()) == 28
    x = torch.tensor(2.0)
    # seen from outside: 4 x^2
    assert float(grad(spmd(lambda x: psum(x * x, "t"), "t", 4, P(), P()))(x)) == 16.0


def test_without_a_binding_there_is_one_device():
    x = numbers(0, 4, 2)
    for verb in (
        psum,
        copy_to_region,
        all_gather,
        reduce_scatter,
        all_gather_invariant,
        local_slice,
        pmax,
    ):
        assert verb(x, "nowhere") is x
    assert ppermute(x, "nowhere", [(0, 0)]) is x
    assert int(axis_index("nowhere")) == 0
    assert collectives.axis_size("nowhere") == 1


def test_an_axis_that_is_hidden_is_not_there():
    def f(x):
        with collectives.unbound("t"):
            return psum(x, "t")

    assert torch.equal(spmd(f, "t", 2, P("t"), P("t"))(torch.arange(4)), torch.arange(4))


def test_the_maximum_has_no_derivative_and_says_so():
    x = numbers(0, N, 2)
    assert torch.equal(everywhere(lambda x: pmax(x, "t"))(x)[0], x.amax(0))
    assert torch.equal(
        everywhere(grad(lambda x: (pmax(x.detach(), "t") * x).sum()))(x)[0], x.amax(0)
    )
    with pytest.raises(NotImplementedError, match="pmax: x should be detached"):
        everywhere(grad(lambda x: pmax(x, "t").sum()))(x)
    with pytest.raises(NotImplementedError, match="pmax: x should be detached"):
        everywhere(lambda x: jvp(lambda x: pmax(x, "t"), (x,), (x,))[1])(x)


def test_threads_do_not_see_each_others_axes():
    seen = []
    with collectives.binding(Axis("t", 4, rank=2, group="some")):
        thread = threading.Thread(target=lambda: seen.append(collectives.axis_size("t")))
        thread.start()
        thread.join()
        assert collectives.axis_size("t") == 4
        assert collectives.carried(lambda: collectives.axis_size("t"))() == 4
        carried = collectives.carried(lambda: seen.append(collectives.axis_size("t")))
        thread = threading.Thread(target=carried)
        thread.start()
        thread.join()
    assert seen == [1, 4]
    assert collectives.bound() == ()


BAD = {
    "reduce_scatter: x should be divisible by the 3 devices": lambda: everywhere(
        lambda x: reduce_scatter(x, "t")
    )(numbers(0, N, 4)),
    "local_slice: x should be divisible": lambda: everywhere(lambda x: local_slice(x, "t"))(
        numbers(0, N, 4)
    ),
    "all_gather: dim should be an axis of x": lambda: everywhere(
        lambda x: all_gather(x, "t", dim=2)
    )(numbers(0, N, 4)),
    "ppermute: pairs should be of different devices": lambda: everywhere(
        lambda x: ppermute(x, "t", [(0, 1), (0, 2)])
    )(numbers(0, N, 4)),
    "ppermute: pairs should be of different devices 0..2": lambda: everywhere(
        lambda x: ppermute(x, "t", [(0, 3)])
    )(numbers(0, N, 4)),
    "Grid: t should be 1 or more": lambda: Grid(t=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_told(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        BAD[message]()
