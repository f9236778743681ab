"""Attention over a text in parts, against attention over the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import masks
from funcattn.kernels import rings
from funcattn.records import Attended
from funcattn.sharding import P, spmd

ROWS = P(None, "context", None)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 1))
def test_unzigzag_undoes_zigzag(n, C, dim):
    x = torch.arange(4 * n * C).view(2 * n * C, 2).movedim(0, dim)
    assert torch.equal(rings.unzigzag(rings.zigzag(x, n, dim=dim), n, dim=dim), x)
    order = rings.zigzag(torch.arange(2 * n * C), n)
    assert torch.equal(
        spmd(lambda: rings.places(2 * C, "context"), "context", n, (), P("context"))(), order
    )


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_ring_attends_to_the_whole(n, C, causal, seed):
    """Value, log-sum-exp, gradient, jvp, hvp, gradients of each sample."""
    T = 2 * n * C
    key = lambda i: fa.fold_in(fa.key(seed), i)
    q, t = (fa.random.normal(key(i), (4, T, 3), torch.float64) for i in (0, 1))
    k, v = (fa.random.normal(key(i), (2, T, 3), torch.float64) for i in (2, 3))
    mask = masks.causal(T) if causal else None
    to = lambda x: rings.zigzag(x, n, dim=-2)
    over = lambda f, out, count=3: spmd(f, "context", n, (ROWS,) * count, out)
    part = lambda q, k, v: rings.ring(q, k, v, "context", causal=causal)
    found, whole = (
        over(part, Attended(ROWS, P(None, "context")))(to(q), to(k), to(v)),
        fa.attend(q, k, v, mask),
    )
    close(found[0], to(whole.out))
    close(found[1], rings.zigzag(whole.lse, n))
    ours = lambda q, k, v: fa.psum(
        (part(q, k, v).out.sin()).sum() + part(q, k, v).lse.cos().sum(), "context"
    )
    theirs = lambda q, k, v: (
        fa.attend(q, k, v, mask).out.sin().sum() + fa.attend(q, k, v, mask).lse.cos().sum()
    )
    moved = (to(q), to(k), to(v))
    gradient = grad(theirs, (0, 1, 2))(q, k, v)
    for a, b in zip(over(grad(ours, (0, 1, 2)), (ROWS,) * 3)(*moved), gradient, strict=True):
        close(a, to(b))
    hvp = lambda f: lambda q, k, v, t: jvp(lambda q: grad(f, 1)(q, k, v), (q,), (t,))
    for a, b in zip(
        over(hvp(ours), (ROWS,) * 2, 4)(*moved, to(t)), hvp(theirs)(q, k, v, t), strict=True
    ):
        close(a, to(b))
    each = spmd(vmap(grad(ours)), "context", n, (P(None, *ROWS),) * 3, P(None, *ROWS))
    two = lambda x: torch.stack([x, 2 * x])
    close(each(*[two(x) for x in moved]), to(vmap(grad(theirs))(two(q), two(k), two(v))))


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_past_in_parts_is_one_past(n, seed):
    """Devices hold different numbers of keys, some none; the derivative is exact, and zero where
    nobody holds any.
    """
    key = lambda i: fa.fold_in(fa.key(seed), i)
    S = 3 * n
    q, k, v = (
        fa.random.normal(key(i), shape, torch.float64)
        for i, shape in enumerate([(4, 2, 3), (2, S, 3), (2, S, 3)])
    )
    held = fa.random.randint(key(4), (n,), 0, 4)
    seen = (torch.arange(3) < held.unsqueeze(-1)).flatten().expand(2, S)

    def ours(q, k, v, held):
        mask = (torch.arange(3) < held).expand(2, 3)
        return rings.merge_over(
            fa.attend(fa.collectives.copy_to_region(q, "context"), k, v, mask), "context"
        )

    cuts = (P(), ROWS, ROWS, P("context"))
    found, whole = spmd(ours, "context", n, cuts, P())(q, k, v, held), fa.attend(q, k, v, seen)
    close(found.out, whole.out)
    close(found.lse, whole.lse)
    loss = lambda f: lambda q, k, v, x: f(q, k, v, x).out.sin().sum()
    one = lambda q, k, v, seen: fa.attend(q, k, v, seen)
    expected = grad(loss(one), (0, 1, 2))(q, k, v, seen)
    for a, b in zip(
        spmd(grad(loss(ours), (0, 1, 2)), "context", n, cuts, cuts[:3])(q, k, v, held),
        expected,
        strict=True,
    ):
        close(a, b)
    hvp = lambda f: lambda q, k, v, x: jvp(lambda q: grad(loss(f))(q, k, v, x), (q,), (q,))[1]
    close(spmd(hvp(ours), "context", n, cuts, P())(q, k, v, held), hvp(one)(q, k, v, seen))


@pytest.mark.parametrize("level", [-1e9, 1e30])
@pytest.mark.parametrize("causal", [False, True])
def test_a_ring_far_from_zero_is_the_mean_of_what_is_seen(level, causal):
    """Each logit is the level, in float32: the mean of the values up to the query, and its
    derivatives; so is a past in parts.
    """
    T, size = 12, abs(level) ** 0.5
    q, k = torch.full((2, T, 1), level / size), torch.full((2, T, 1), size)
    v, t = fa.random.normal(fa.key(0), (2, 2, T, 4))
    seen = (torch.ones(T, T).tril() if causal else torch.ones(T, T)).expand(2, T, T)
    wanted = lambda v: (seen / seen.sum(-1, keepdim=True)) @ v
    part = lambda q, k, v: rings.ring(q, k, v, "context", causal=causal, scale=1.0).out
    ring = spmd(part, "context", 3, (ROWS,) * 3, ROWS)
    order = lambda x: rings.zigzag(x, 3, dim=-2)
    found = lambda v: ring(order(q), order(k), order(v))
    torch.testing.assert_close(found(v), order(wanted(v)))
    torch.testing.assert_close(jvp(found, (v,), (t,))[1], order(wanted(t)))
    slope = lambda f: grad(lambda v: f(v).square().sum())(v)
    torch.testing.assert_close(slope(found), slope(wanted))
    if not causal:
        over = lambda q, k, v: (
            fa.kernels.join_over(fa.kernels.partial(q, k, v, scale=1.0), "context").out
        )
        past = spmd(over, "context", 3, (P(), ROWS, ROWS), P())
        torch.testing.assert_close(past(q, k, v), wanted(v))


def test_a_ring_without_a_mask_takes_shards_of_any_length():
    q, k, v = (fa.random.normal(fa.key(i), (2, 6, 3), torch.float64) for i in range(3))
    part = lambda q, k, v: rings.ring(q, k, v, "context", causal=False).out
    found = spmd(part, "context", 2, (ROWS,) * 3, ROWS)(q, k, v)  # 3 tokens on each device
    close(found, fa.attention(q, k, v))


def test_what_does_not_fit_is_told():
    with pytest.raises(
        ValueError,
        match="zigzag: x should be a multiple of 2 n = 4 long along axis -1, got \\(6,\\)",
    ):
        rings.zigzag(torch.arange(6), 2)
    x = torch.ones(1, 6, 2)
    with pytest.raises(
        ValueError,
        match="ring: tokens should be an even number on each of the 2 devices of 'context', got 3",
    ):
        spmd(lambda x: rings.ring(x, x, x, "context").out, "context", 2, ROWS, ROWS)(x)
    with pytest.raises(ValueError, match="ring: k should be of the 6 tokens of q"):
        rings.ring(x, x[:, :4], x[:, :4], "context")
