"""Attention over parts: the past and the new tokens, in the ways a decode step meets them."""

import subprocess
import sys

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn.kernels import KVSegment, attend_segments
from funcattn.records import Attended


def normal(number: int, *shape: int) -> torch.Tensor:
    return fa.random.normal(fa.key(number), shape)


def test_parts_without_any_key_give_zero():
    q, none = normal(0, 4, 1, 8), torch.zeros(2, 0, 8)
    assert torch.equal(
        attend_segments(q, [KVSegment(none, none), KVSegment(none, none)], scale=1.0),
        torch.zeros_like(q),
    )


def test_no_new_tokens_over_an_empty_past_give_no_logits():
    model = fa.decoder(fa.Config())
    params = model.init(fa.key(0))
    logits, _ = model.extend(params, torch.zeros(0, dtype=torch.int64), model.cache(4))
    assert logits.shape == (0, 256)


def test_large_products_do_not_overflow_in_float16():
    q, k = (
        torch.full((1, 1, 8), 300.0, dtype=torch.float16),
        torch.full((1, 3, 8), 300.0, dtype=torch.float16),
    )
    v = normal(1, 1, 3, 8).half()
    for T in (1, 2):
        out = attend_segments(q.expand(1, T, 8), [KVSegment(k, v), KVSegment(k, v)], scale=0.5)
        # all keys alike: the mean of the values
        assert (out - v.mean(-2)).abs().max() < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("kernel", ["sdpa", "flash", "reference"])
@pytest.mark.parametrize("T", [1, 3, 20])
def test_a_forced_kernel_serves_a_cached_step_too(kernel, T):
    config = fa.Config(layers=1)
    model, forced = fa.decoder(config), fa.decoder(config, kernel=kernel)
    params = model.init(fa.key(0))
    tokens = fa.random.randint(fa.key(1), (30,), 0, 256)
    _, past = model.apply(params, tokens[:9], model.cache(40))
    wanted = model.extend(params, tokens[9 : 9 + T], past)[0]
    error = (forced.extend(params, tokens[9 : 9 + T], past)[0] - wanted).abs().max().item()
    with fa.kernels.use(kernel):
        error = max(
            error, (model.extend(params, tokens[9 : 9 + T], past)[0] - wanted).abs().max().item()
        )
    assert error < 1e-5  # float32 logits of order one


def test_merge_names_both_shapes_of_what_does_not_fit():
    a = Attended(torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match=r"lse \(2, 3\) as in a, got out \(2, 3, 4\) and lse \(2, 5\)"
    ):
        fa.merge(a, Attended(a.out, torch.zeros(2, 5)))
    with pytest.raises(ValueError, match="merge: b should be"):
        fa.merge(
            Attended(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3)),
            Attended(torch.zeros(3, 2, 3, 4), torch.zeros(3, 2, 3)),
        )


def test_a_cached_step_runs_under_autocast():
    model = fa.decoder(fa.Config())
    params = model.init(fa.key(0))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        logits, past = model.apply(params, torch.arange(5), model.cache(8, dtype=torch.bfloat16))
        logits, past = model.apply(params, torch.arange(1), past)
    assert int(past.length) == 6
    assert logits.isfinite().all()


# Caps and sinks, against the dense formula in float64.

H, K, D, SINKS = 4, 2, 3, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
SIZES = (4, 0, 7)  # keys of each part; one has none


def wide(number: int, *shape: int) -> torch.Tensor:
    return fa.random.normal(fa.key(number), shape, torch.float64)


def inputs(T: int):
    """q, and k and v of all parts together."""
    return wide(0, H, T, D), wide(1, K, sum(SIZES), D), wide(2, K, sum(SIZES), D)


def visible(T: int) -> torch.Tensor:
    """(T, 11): the first part whole, of the last what is not after the row; nothing at all for the
    last row.
    """
    seen = torch.cat(
        [torch.ones(T, 4).bool(), torch.arange(7) <= torch.arange(T).unsqueeze(-1)], -1
    )
    seen[-1] = T == 1
    return seen


def by_parts(T: int, cap: float | None):
    """The function under test, of plain tensors."""
    seen = visible(T).split(SIZES, -1)

    def f(q, k, v, *sinks):
        parts = zip(k.split(SIZES, -2), v.split(SIZES, -2), seen, strict=True)
        return attend_segments(
            q,
            [KVSegment(*part) for part in parts],
            scale=0.8,
            cap=cap,
            sinks=sinks[0] if sinks else None,
        )

    return f


def by_definition(T: int, cap: float | None):
    seen = visible(T)

    def f(q, k, v, *sinks):
        k, v = (x.repeat_interleave(H // K, -3) for x in (k, v))
        S = 0.8 * q @ k.mT
        S = S if cap is None else cap * (S / cap).tanh()
        S = torch.where(seen, S, -torch.inf)
        if sinks:  # one more key, of value 0
            S = torch.cat([S, sinks[0][:, None, None].expand(*S.shape[:-1], 1)], -1)
            v = torch.cat([v, torch.zeros_like(v[..., :1, :])], -2)
        none = S.eq(-torch.inf).all(-1, keepdim=True)
        return torch.where(none, 0, torch.where(none, 0, S).softmax(-1)) @ v

    return f


WAYS = [
    (T, cap, sinks) for T in (1, 3, 16, 17, 20) for cap in (None, 1.5) for sinks in ((), (SINKS,))
]


@pytest.mark.parametrize(("T", "cap", "sinks"), WAYS)
def test_caps_and_sinks_are_the_dense_formula_with_every_derivative(T, cap, sinks):
    x = (*inputs(T), *sinks)
    tangents = tuple(t.cos() for t in x)
    total = lambda f: lambda *x: f(*x).sin().sum()
    every = tuple(range(len(x)))
    pair = tuple(torch.stack([t, t.sin()]) for t in x)
    rules = [
        lambda f: (f(*x),),
        lambda f: grad(total(f), every)(*x),
        lambda f: (jvp(f, x, tangents)[1],),
        lambda f: jvp(grad(total(f), every), x, tangents)[1],
        lambda f: vmap(grad(total(f), every))(*pair),
        lambda f: (vmap(f, (0, *[None] * (len(x) - 1)))(pair[0], *x[1:]),),
        lambda f: vmap(lambda *x: jvp(f, x, x)[1], (None, *[0] * (len(x) - 1)))(x[0], *pair[1:])[
            None
        ],
    ]
    for rule in rules:
        for got, wanted in zip(rule(by_parts(T, cap)), rule(by_definition(T, cap)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("T", [1, 3, 20])
def test_a_sink_is_one_more_key_of_value_zero(T):
    """A feature of q that is always one makes a key whose logit is the same for every query."""
    q, k, v = wide(0, H, T, D), wide(1, H, 6, D), wide(2, H, 6, D)
    ones, zeros = (
        torch.ones(H, T, 1, dtype=torch.float64),
        torch.zeros(H, 6, 1, dtype=torch.float64),
    )
    key = torch.cat([torch.zeros(H, 1, D, dtype=torch.float64), SINKS[:, None, None] / 0.5], -1)
    parts = [
        KVSegment(torch.cat([k, zeros], -1), v),
        KVSegment(key, torch.zeros(H, 1, D, dtype=torch.float64)),
    ]
    wanted = attend_segments(torch.cat([q, ones], -1), parts, scale=0.5)
    torch.testing.assert_close(
        attend_segments(q, [KVSegment(k, v)], scale=0.5, sinks=SINKS),
        wanted,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("T", [1, 3, 20])
def test_sinks_over_no_keys_take_all_mass(T):
    q, none = wide(0, H, T, D), torch.zeros(K, 0, D, dtype=torch.float64)
    f = lambda q, sinks: attend_segments(q, [KVSegment(none, none)], scale=1.0, sinks=sinks)
    assert not f(q, SINKS).any()
    for g in grad(lambda q, sinks: f(q, sinks).sum(), (0, 1))(q, SINKS):
        assert torch.equal(g, torch.zeros_like(g))
    assert not jvp(f, (q, SINKS), (q, SINKS))[1].any()


@pytest.mark.parametrize("T", [1, 3, 20])
def test_a_step_with_sinks_that_nobody_differentiates_is_the_same_step(T):
    """A plain step takes torch's fused kernel; in float32 too."""
    q, k, v = inputs(T)
    parts = [
        KVSegment(k[:, :4], v[:, :4]),
        KVSegment(k[:, 4:5], v[:, 4:5]),
        KVSegment(k[:, 5:], v[:, 5:]),
    ]
    wanted = attend_segments(q, [KVSegment(k, v)], scale=0.8, sinks=SINKS, kernel="reference")
    torch.testing.assert_close(
        attend_segments(q, parts, scale=0.8, sinks=SINKS), wanted, rtol=1e-12, atol=1e-12
    )
    narrow = [KVSegment(part.k.float(), part.v.float()) for part in parts]
    torch.testing.assert_close(
        attend_segments(q.float(), narrow, scale=0.8, sinks=SINKS).double(),
        wanted,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(("T", "cap"), [(1, None), (3, None), (20, None), (20, 1e31)])
@pytest.mark.parametrize("level", [-1e9, 1e30])
def test_rows_that_are_far_from_zero_in_all_parts_are_one_softmax(T, cap, level):
    """Each logit is the level: the mean of all values, however they are cut into parts, and so are
    its derivatives.
    """
    size = abs(level) ** 0.5
    q, k = torch.full((2, T, 1), level / size), torch.full((2, 30, 1), size)
    v, t = fa.random.normal(fa.key(0), (2, 2, 30, 4))
    cuts = slice(0, 23), slice(23, 29), slice(29, 30)
    past = lambda v: attend_segments(
        q, [KVSegment(k[:, n], v[:, n]) for n in cuts], scale=1.0, cap=cap
    )
    wanted = lambda v: v.mean(-2, keepdim=True).expand(2, T, 4)
    torch.testing.assert_close(past(v), wanted(v))
    torch.testing.assert_close(jvp(past, (v,), (t,)), jvp(wanted, (v,), (t,)))
    slope = lambda f: vmap(grad(lambda v: f(v).square().sum()))(torch.stack([v, t]))
    torch.testing.assert_close(slope(past), slope(wanted))


@pytest.mark.parametrize("T", [3, 20])
def test_compiled_and_eager_parts_far_from_zero_are_the_reference_in_float64(T):
    """Logits of +-2^30 in every part, and some a unit in the last place lower or two: the shares
    are exact.

    Value and gradient; grouped heads, a mask that hides a whole part from some rows, tensors laid
    out in float32.
    """
    q, v = torch.zeros(4, T, 3), normal(1, 2, 30, 4)
    q[..., 0], q[..., 1] = 2.0**15, 128.0
    k = torch.zeros(2, 30, 3)
    k[..., 0] = torch.tensor([2.0**15, -(2.0**15)])[:, None]
    k[..., 1] = -(torch.arange(30) % 3).float()
    seen = torch.arange(23, 30) - 23 < torch.arange(T)[:, None]
    cut = slice(0, 23), slice(23, 30)

    def f(q, k, v):
        parts = [KVSegment(k[:, cut[0]], v[:, cut[0]]), KVSegment(k[:, cut[1]], v[:, cut[1]], seen)]
        return attend_segments(q, parts, scale=1.0)

    every = torch.cat([torch.ones(T, 23, dtype=torch.bool), seen], -1)
    wanted = fa.attention(q.double(), k.double(), v.double(), every, scale=1.0, kernel="reference")
    eager = f(q, k, v)
    # sums of thirty; logits are exact
    tolerance = {"rtol": 0, "atol": 64 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(eager.double(), wanted, **tolerance)
    slope = lambda f: torch.autograd.grad(f(q, k, x := v.clone().requires_grad_()).sin().sum(), x)[
        0
    ]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v).double(), wanted, **tolerance)
    torch.testing.assert_close(slope(compiled), slope(f))


@pytest.mark.parametrize("T", [1, 3, 20])
def test_compiled_parts_hide_what_is_not_finite(T):
    """Hidden from all queries, and from some: the later tokens of a draft, the padding behind a
    past.
    """
    q, k, v = (x.float() for x in inputs(T))
    new = [x[:, :1].expand(-1, T, -1).clone() for x in (k, v)]
    seen = (torch.arange(11) < 9).expand(T, -1)

    def f(q, k, v, *new):
        return attend_segments(
            q, [KVSegment(k, v, seen), KVSegment(*new, fa.masks.causal(T))], scale=0.8
        )

    spoilt = [x.clone() for x in (k, v, *new)]
    for x in spoilt[:2]:
        x[:, 9:] = torch.nan
    for x in spoilt[2:]:
        x[:, 2:] = torch.nan
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    wanted = f(q, k, v, *new)[:, :2]
    torch.testing.assert_close(compiled(q, *spoilt)[:, :2], wanted)
    torch.testing.assert_close(f(q, *spoilt)[:, :2], wanted)
    assert compiled(q, *spoilt)[:, 2:].isnan().all()


@pytest.mark.cpu("parts that are not finite are seen where numbers can be looked at")
@pytest.mark.parametrize("T", [1, 3, 20])
def test_what_no_query_sees_of_a_part_reaches_nothing(T):
    """Two keys of the second part are hidden and hold NaN, as tokens of padding behind a past
    do.
    """
    q, k, v = inputs(T)
    seen = (torch.arange(k.shape[-2] - 4) < k.shape[-2] - 6).expand(T, -1)
    past = lambda q, k, v: attend_segments(
        q, [KVSegment(k[:, :4], v[:, :4]), KVSegment(k[:, 4:], v[:, 4:], seen)], scale=0.8
    )
    slope = lambda q, k, v: grad(lambda *x: past(*x).square().sum(), (0, 1, 2))(q, k, v)
    bad = lambda x: torch.cat([x[:, :-2], torch.full_like(x[:, -2:], torch.nan)], 1)
    torch.testing.assert_close(past(q, bad(k), bad(v)), past(q, k, v))
    for one, other in zip(slope(q, bad(k), bad(v)), slope(q, k, v), strict=True):
        torch.testing.assert_close(one, other)


def test_a_cap_bends_large_logits_and_leaves_small_ones():
    x = torch.tensor([-1e6, -1e-3, 0.0, 1e-3, 1e6], dtype=torch.float64)
    y = fa.kernels.soft_cap(x, 30.0)
    torch.testing.assert_close(y[1:4], x[1:4], rtol=1e-8, atol=0)
    assert torch.equal(y[[0, 4]], torch.tensor([-30.0, 30.0], dtype=torch.float64))


MEMORY = """
import torch
from funcattn.kernels import KVSegment, attend_segments
from torch.func import grad
torch.set_num_threads(1)
status = lambda: open("/proc/self/status").read().split()  # ru_maxrss would begin at the parent's
peak = lambda: int((words := status())[words.index("VmHWM:") + 1]) / 1024
from funcattn import masks
def f(q, k, v, sinks, cap):
    T = q.shape[-2]
    segments = [KVSegment(k[:, :99], v[:, :99]), KVSegment(k, v, masks.causal(T))]
    return attend_segments(q, segments, scale=0.2, cap=cap, sinks=sinks).sum()
inputs = lambda T: (torch.ones(2, T, 16), torch.ones(1, T, 16), torch.ones(1, T, 16), torch.ones(2))
for cap in (None, 30.0):
    grad(f, (0, 1, 2, 3))(*inputs(600), cap)  # what torch loads on first use, and the blocks
before = peak()
for cap in (None, 30.0):
    grad(f, (0, 1, 2, 3))(*inputs(4096), cap)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_caps_and_sinks_over_many_tokens_take_linear_memory():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    # half of one matrix of pairs, 2 x 4096 x 4096 floats
    assert float(done.stdout) < 64, done.stdout


@pytest.mark.cpu("of the autocast of the CPU")
@pytest.mark.parametrize("T", [2, 16])
def test_logits_of_parts_are_float32_under_autocast(T):
    """As those of attention: what is rounded is values and weights, to eps |v|; rounded logits are
    off by several times as much.
    """
    q, k, v = (fa.random.normal(fa.key(i), (8, n, 16)) for i, n in enumerate((T, 33, 33)))
    q, k, v = (3 * q).bfloat16(), (3 * k).bfloat16(), v.bfloat16()
    parts = [KVSegment(k[:, :32], v[:, :32]), KVSegment(k[:, 32:], v[:, 32:])]
    exact = fa.attention(q.double(), k.double(), v.double(), scale=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend_segments(q, parts, scale=0.25)
    assert (found.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * v.abs().max()


@pytest.mark.cpu("of the kernel of the CPU")
def test_the_logit_of_a_part_of_one_key_is_float32():
    """Two equal keys of values 1 and -1, in two parts, weigh alike: out is their mean."""
    q, k = (3 * fa.random.normal(fa.key(i), (64, 1, 16)).bfloat16() for i in range(2))
    one = torch.ones_like(k)
    away = torch.zeros_like(k)  # a key of logit 0 and value 0
    sign = torch.where((q * k).sum(-1, keepdim=True) < 0, -1, 1).to(k.dtype)  # logits above 0
    parts = [
        KVSegment(torch.cat([sign * k, away], 1), torch.cat([one, away], 1)),
        KVSegment(sign * k, -one),
    ]
    with torch.no_grad():
        found = attend_segments(q, parts, scale=0.25)
    assert found.abs().max() <= torch.finfo(torch.bfloat16).eps


@pytest.mark.cpu("of the kernels of the CPU")
@pytest.mark.parametrize("parts", [1, 2])
def test_tracers_and_counters_see_a_step_as_plain_operations(parts):
    q, *flat = (normal(i, H, n, 8) for i, (H, n) in enumerate([(4, 1), *[(2, 50)] * (2 * parts)]))
    step = lambda q, *x: attend_segments(
        q, [KVSegment(*x[i : i + 2]) for i in range(0, len(x), 2)], scale=0.3
    )
    wanted = step(q, *flat)
    traces = [
        make_fx(step)(q, *flat),
        make_fx(step, tracing_mode="fake")(q, *flat),
        torch.jit.trace(step, (q, *flat), check_trace=False),
    ]
    for trace in traces:
        torch.testing.assert_close(trace(q, *flat), wanted)
        assert torch.isfinite(trace(100 * q, *flat)).all()  # no branch of the traced values is kept
    with FlopCounterMode(display=False) as counter:
        step(q, *flat)
    assert counter.get_total_flops() == parts * 2 * 4 * 50 * (8 + 8)
