"""What no query sees cannot be observed, NaN and infinity included: not in a value, a tangent or a
gradient of any order.
"""

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

import funcattn as fa
from funcattn import masks
from funcattn.kernels import attention_with_score
from funcattn.kernels.unseen import take_out

KINDS = ["Mask", "booleans", "bias", "booleans of a head"]


def inputs(T, kind, bad=torch.nan):
    """Six keys, two of them padding that holds `bad`, and a query that sees none and is bad too;
    what says so; zeros for bad.
    """
    q, tq = (fa.random.normal(key, (2, T, 8), torch.float64) for key in fa.split(fa.key(0)))
    k, v, tk, tv = (
        fa.random.normal(key, (2, 6, 8), torch.float64) for key in fa.split(fa.key(1), 4)
    )
    for x in (k, v, tk, tv):
        x[:, 4:] = bad
    for x in (q, tq):
        x[:, 1] = bad
    seen = (torch.arange(6) < 4) & (torch.arange(T) != 1).unsqueeze(-1)
    kinds = {"booleans": (seen, {}), "booleans of a head": (seen.expand(2, T, 6), {})}
    kinds["bias"] = None, {"bias": torch.where(seen, 0.0, -torch.inf).double()}
    stop = torch.where(torch.arange(T) == 1, 0, 4).unsqueeze(-1)
    kinds["Mask"] = masks.Mask(torch.zeros_like(stop), stop), {}
    mask, options = kinds[kind]
    return (q, k, v), (tq, tk, tv), mask, options, seen


def dense(q, k, v, seen):
    S = torch.where(seen, q @ k.mT / 8**0.5, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    return torch.where(empty, 0, torch.where(empty, 0, S).softmax(-1)) @ v


def finite(x):
    return tuple(torch.where(y.isfinite(), y, 0) for y in x)


def assert_all_close(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("T", [6, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_query_sees_reaches_no_value_tangent_or_gradient(kind, T, bad):
    x, moves, mask, options, seen = inputs(T, kind, bad)
    mine, theirs = lambda *x: fa.attention(*x, mask, **options), lambda *x: dense(*x, seen)
    g = fa.random.normal(fa.key(3), (2, T, 8), torch.float64)
    # the cotangent of a query that sees nothing
    weight = torch.where(seen.any(-1, keepdim=True), g, bad)
    with torch.no_grad():
        torch.testing.assert_close(mine(*x), theirs(*finite(x)))
    assert_all_close(jvp(mine, x, moves), jvp(theirs, finite(x), finite(moves)))
    loss = lambda f, g: grad(lambda *x: (f(*x).square() * g).sum(), (0, 1, 2))
    assert_all_close(loss(mine, weight)(*x), loss(theirs, g)(*finite(x)))
    assert_all_close(
        jvp(loss(mine, weight), x, moves)[1], jvp(loss(theirs, g), finite(x), finite(moves))[1]
    )
    along = lambda f, g, moves: grad(lambda *x: (jvp(f, x, moves)[1] * g).sum(), (0, 1, 2))
    assert_all_close(along(mine, weight, moves)(*x), along(theirs, g, finite(moves))(*finite(x)))


@pytest.mark.parametrize("kernel", ["reference", "flash", "sdpa", "sdpa:math", "score"])
@pytest.mark.parametrize(
    "mask", [masks.causal(20), torch.ones(20, 20).tril().bool()], ids=["Mask", "booleans"]
)
def test_nan_in_the_future_does_not_reach_the_past(kernel, mask):
    """A key that some queries see: those that do not are as without it, and those that do are
    NaN.
    """
    q, k, v, t = fa.random.normal(fa.key(0), (4, 2, 20, 8), torch.float64)
    k[:, 15], v[:, 17] = torch.nan, torch.inf
    if kernel == "score":
        run = lambda *x: attention_with_score(*x, lambda s, *_: s, mask).out
    else:
        run = lambda *x: fa.attention(*x, mask, kernel=kernel)
    seen = torch.ones(15, 15).tril().bool()
    wanted = lambda q, k, v: dense(q, k, v, seen)
    cut = lambda *x: tuple(y[:, :15] for y in x)
    out = run(q, k, v)
    torch.testing.assert_close(out[:, :15], wanted(*cut(q, k, v)))
    assert not out[:, 17:].isfinite().any()
    if kernel.startswith("sdpa"):
        return
    got = jvp(run, (q, k, v), (t, t, t))[1]
    torch.testing.assert_close(got[:, :15], jvp(wanted, cut(q, k, v), cut(t, t, t))[1])
    # to k and v the NaN rows give zero times NaN
    mine = grad(lambda q: run(q, k, v)[:, :15].square().sum())(q)[:, :15]
    torch.testing.assert_close(
        mine, grad(lambda q: wanted(q, *cut(k, v)).square().sum())(q[:, :15])
    )


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kernel", ["reference", "flash", "score", "few"])
def test_a_tangent_of_nan_reaches_those_who_see_it_alone(kernel, which, mapped):
    """Of q at query 5, of k or v at key 5: jvp, the jvp of a gradient and the gradient of a jvp,
    with and without vmap.
    """
    T = 8 if kernel == "few" else 20
    x, moves = fa.random.normal(fa.key(0), (2, 3, 2, T, 8), torch.float64)
    bad = moves.clone()
    bad[which, :, 5] = torch.nan
    zero = moves.clone()
    zero[which, :, 5] = 0
    if kernel == "score":
        run = lambda *x: attention_with_score(*x, lambda s, *_: s.tanh(), masks.causal(T)).out
    else:
        run = lambda *x: fa.attention(
            *x, masks.causal(T), kernel=None if kernel == "few" else kernel
        )
    early = lambda *x: run(*x)[:, :5]
    loss = lambda *x: early(*x).square().sum()
    rules = [  # gradients of q: to k and v the later rows give zero times NaN
        lambda *t: jvp(early, tuple(x), t)[1],
        lambda *t: jvp(grad(loss), tuple(x), t)[1][..., :5, :],
        lambda *t: grad(lambda *x: jvp(early, x, t)[1].sin().sum())(*x)[..., :5, :],
    ]
    for rule in rules:
        rule = vmap(rule) if mapped else rule
        pair = lambda t: t.unsqueeze(1).repeat(1, 2, 1, 1, 1) if mapped else t
        torch.testing.assert_close(rule(*pair(bad)), rule(*pair(zero)))


@pytest.mark.parametrize("kernel", ["reference", "flash", "score"])
def test_a_cotangent_of_nan_reaches_what_its_query_sees_alone(kernel):
    x = fa.random.normal(fa.key(0), (3, 2, 20, 8), torch.float64)
    if kernel == "score":
        run = lambda *x: (
            attention_with_score(*x, lambda s, *_: s.abs().sqrt(), masks.causal(20)).out
        )
    else:
        run = lambda *x: fa.attention(*x, masks.causal(20), kernel=kernel)
    g = fa.random.normal(fa.key(1), (2, 20, 8), torch.float64)
    slope = lambda g: vjp(run, *x)[1](g)
    bad, zero = g.clone(), g.clone()
    bad[:, 5], zero[:, 5] = torch.nan, 0
    for got, wanted in zip(slope(bad), slope(zero), strict=True):
        torch.testing.assert_close(got[:, 6:], wanted[:, 6:])


@pytest.mark.parametrize("T", [6, 20])
def test_padding_of_each_example_stays_unseen_under_vmap_and_compile(T):
    (q, k, v), (tq, *_), _, _, _ = inputs(T, "Mask")
    q = finite([q])[0]
    lengths = torch.tensor([4, 2, 3])
    masked = lambda n: masks.Mask(torch.zeros(T, 1, dtype=torch.int64), n.expand(T, 1))
    value = lambda q, n: fa.attention(q, k, v, masked(n)).square().sum()
    got = vmap(grad(value), (None, 0))(q, lengths)
    for n, one in zip(lengths.tolist(), got, strict=True):
        wanted = grad(
            lambda q, n=n: dense(q, k[:, :n], v[:, :n], torch.ones(T, n).bool()).square().sum()
        )(q)
        torch.testing.assert_close(one, wanted)
    compiled = torch.compile(
        lambda q: fa.attention(q, k, v, masked(lengths[0])), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), fa.attention(q, k, v, masked(lengths[0])))
    assert compiled(q).isfinite().all()


def test_dropout_and_weights_see_nothing_of_padding():
    (q, k, v), _, mask, _, seen = inputs(6, "Mask")
    assert fa.attention_weights(q, k, mask).isfinite().all()
    for kernel in ("reference", "flash"):
        run = lambda q, k, v, kernel=kernel: fa.attention(
            q, k, v, mask, dropout=0.5, key=fa.key(4), kernel=kernel
        )
        torch.testing.assert_close(run(q, k, v), run(*finite((q, k, v))))
        slope = grad(lambda q, run=run: run(q, k, v).square().sum())(q)
        torch.testing.assert_close(
            slope, grad(lambda q, run=run: run(q, *finite((k, v))).square().sum())(finite([q])[0])
        )


@pytest.mark.parametrize("K", [1, 2])
def test_a_key_that_one_head_of_a_group_sees_is_kept(K):
    """Of four query heads one sees key 2, and no head sees key 3; one example sees what the other
    does not.
    """
    q, k = torch.ones(2, 4, 3, 8), torch.ones(K, 4, 8)
    seen = torch.zeros(2, 4, 3, 4, dtype=torch.bool)
    seen[..., :2] = True
    seen[1, 0, 0, 2] = True
    taken = take_out(q, k, k, seen)
    assert taken.blind is None
    assert taken.k[0].sum(-1).tolist() == [8, 8, 8, 0]
    assert K == 1 or taken.k[1].sum(-1).tolist() == [8, 8, 0, 0]


def test_an_example_of_padding_does_not_spoil_the_gradient_of_the_batch():
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x, memory = fa.random.normal(fa.key(0), (2, 4, 8)), fa.random.normal(fa.key(1), (2, 5, 8))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1] = True

    def slope(need_weights):
        module.zero_grad()
        out, weights = module(
            x, memory, memory, key_padding_mask=padding, need_weights=need_weights
        )
        out.square().sum().backward()
        assert weights is None or not weights[1].any()
        return module.in_proj_weight.grad.clone()

    with fa.interop.override_sdpa():
        wanted = slope(False)
        assert wanted.isfinite().all()
        torch.testing.assert_close(slope(True), wanted, atol=1e-5, rtol=1e-4)
