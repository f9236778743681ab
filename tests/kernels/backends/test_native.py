"""The native backend beside float64: attention and its tangent, within what rounding explains, for
every shape, mask and bias.
"""

import contextlib
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import jvp

from funcattn import masks, native
from funcattn.kernels.backends import native as backend
from funcattn.kernels.backends import torch_attend
from funcattn.kernels.closed import operators
from funcattn.kernels.closed.specs import AttendSpec
from funcattn.native import building

pytestmark = pytest.mark.skipif(bool(native.load()), reason=native.load())
LEVELS = {"AVX2": 1, "AVX-512": 2}
UNIT = 2.0**-24  # half the distance of floats from 1 up
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LEAST = {
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-120,
    torch.float16: 2.0**-25,
}  # in steps of what is lost below the normal numbers
EXPONENTIAL = 2e-7  # of itself, what it is off by at most; what gemm.h says
EXP = EXPONENTIAL + 2**-24  # with the difference before it, where weights count
DRIVER = Path(__file__).with_name("native_driver.cpp")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
LEADS = [
    ((), ()),
    ((2,), (2,)),
    ((3,), (1,)),
    ((2, 2, 3), (2, 2, 1)),
    ((2, 1, 3), (1, 2, 1)),
    ((1,), (2,)),
    ((), (2,)),
]


@contextlib.contextmanager
def instructions(name):
    """Runs with these vector instructions alone, and skips where the processor has none."""
    try:
        if torch.ops.funcattn.instructions(LEVELS[name]) != LEVELS[name]:
            pytest.skip("the processor has no such instructions")
        yield
    finally:
        torch.ops.funcattn.instructions(-1)


def dense(q, k, v, seen, bias, scale):
    """Attention in float64, where rows that see nothing give 0 and -inf."""
    s = scale * q @ k.mT
    s = s if bias is None else s + bias
    s = s if seen is None else torch.where(seen, s, -torch.inf)
    lse = s.logsumexp(-1, keepdim=True)
    return torch.exp(s - torch.where(lse.isfinite(), lse, 0)) @ v, lse


def bounds(q, k, v, tangents, seen, bias, scale, dtype):
    """How far out, lse and their tangents may be off: n roundings of the absolute values, for a sum
    of n products.

    Logits are off by `wrong`, so weights by expm1(2 wrong) of themselves, the roundings of their
    sum, and those of pairs of bfloat16 (where the exponent is scaled in float32 too: 100 roundings
    at the depth at which weights vanish).
    """
    S, D = k.shape[-2:]
    visible = lambda x: x if seen is None else torch.where(seen, x, 0)
    largest = lambda x: visible(x).amax(-1, keepdim=True)
    s = scale * q @ k.mT + (0 if bias is None else bias)
    P = torch.softmax(s if seen is None else torch.where(seen, s, -torch.inf), -1).nan_to_num(0)
    near = s.abs().nan_to_num(0, 0, 0)
    wrong = largest((D + 4) * UNIT * abs(scale) * (q.abs() @ k.abs().mT) + 4 * UNIT * near)
    pair = 2 * ROUNDING[dtype] + 100 * UNIT if dtype == torch.bfloat16 else 0
    part = torch.expm1(2 * wrong) + (S + 32) * UNIT + 2 * EXP + pair
    mixed = P @ v.abs()
    lost = lambda x: ROUNDING[dtype] * x + LEAST[dtype]
    lse = (
        torch.logsumexp(torch.where(P > 0, s, -torch.inf), -1, keepdim=True)
        .abs()
        .nan_to_num(0, 0, 0)
    )
    first = lost(mixed) + part * mixed, wrong + (S + 32) * UNIT + EXP + 4 * UNIT * lse
    dq, dk, dv = (
        torch.zeros_like(x) if t is None else t for x, t in zip((q, k, v), tangents, strict=True)
    )
    slopes = abs(scale) * (dq.abs() @ k.abs().mT + q.abs() @ dk.abs().mT)
    slope_off = largest(2 * (D + 4) * UNIT * slopes)
    mean = (P * visible(slopes)).sum(-1, keepdim=True)
    moved = (P * visible(slopes)) @ v.abs() + P @ dv.abs() + 2 * mean * mixed
    return (
        *first,
        2 * part * moved + 2 * slope_off * mixed + lost(2 * moved),
        part * mean + slope_off,
    )


def hold(q, k, v, mask=(), bias=None, scale=0.3, tangents=None, seen=None):
    """Value, and tangent if there is one, against float64, on each set of instructions."""
    exact = [x.double() for x in (q, k, v)]
    moved = [None if t is None else t.double() for t in tangents or (None,) * 3]
    wide = None if bias is None else bias.double()
    f = lambda q, k, v: dense(q, k, v, seen, wide, scale)
    zeros = tuple(
        torch.zeros_like(x) if t is None else t.expand(torch.broadcast_shapes(x.shape, t.shape))
        for x, t in zip(exact, moved, strict=True)
    )
    full = [x.expand(t.shape).contiguous() for x, t in zip(exact, zeros, strict=True)]
    (out, lse), (dout, dlse) = jvp(f, tuple(full), zeros)
    off = bounds(*exact, moved, seen, wide, scale, q.dtype)
    names = ("out", "lse", "tangent of out", "tangent of lse")
    for name in LEVELS:
        with instructions(name):
            got = backend.attend(q, k, v, mask, bias, scale)
            got = [(got, (out, lse))] + (
                [(backend.attend_jvp(q, k, v, tangents, mask, scale), (out, lse, dout, dlse))]
                if tangents
                else []
            )
        for ours, wanted in got:
            for what, mine, theirs, far in zip(names, ours, wanted, off, strict=False):
                theirs = torch.nan_to_num(theirs, nan=0, neginf=-torch.inf)
                apart = torch.where(mine.double() == theirs, 0, (mine.double() - theirs).abs())
                assert (apart <= far).all(), (
                    f"{name}: {what} is off by {apart.max():.2e}, {(apart / far).max():.2g} of "
                    "what it may be"
                )


def laid_out(x, how):
    """The same tensor, with rows or features elsewhere in memory."""
    if how == "features first":
        return x.mT.contiguous().mT
    if how == "every second":
        return torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
    if how == "heads last" and x.dim() > 2:
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if how == "odd":
        return torch.cat([x, x[..., :1]], -1)[..., :-1]
    return x


@st.composite
def problems(draw):
    """q, k, v, mask (tensors and booleans), bias, tangents."""
    leads = draw(st.sampled_from(LEADS))
    T, S = (
        draw(st.integers(1, 110)),
        draw(st.one_of(st.integers(1, 70), st.sampled_from([200, 257, 300, 600]))),
    )
    D, Dv = draw(st.integers(1, 80)), draw(st.sampled_from([1, 7, 8, 16, 33, 48, 64, 72, 128]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    how = draw(st.sampled_from(["", "features first", "every second", "heads last", "odd"]))
    make = lambda lead, *shape: laid_out(torch.randn(*lead, *shape).to(dtype), how)
    q, k, v = make(leads[0], T, D), make(leads[1], S, D), make(leads[1], S, Dv)
    tangents = [
        make(x.shape[:-2], *x.shape[-2:]) if draw(st.booleans()) else None for x in (q, k, v)
    ]
    kind = draw(
        st.sampled_from(["none", "causal", "window", "holes", "dense", "row", "column", "nothing"])
    )
    lead = draw(st.sampled_from([(), leads[0], (2, *leads[0])]))  # the last has an axis of its own
    start, width = (
        torch.randint(-5, S + 5, (*lead, T, 3)),
        torch.randint(-2, S // 2 + 2, (*lead, T, 3)),
    )
    mask = {
        "none": (),
        "causal": tuple(masks.causal(T, S, align=draw(st.sampled_from(["upper", "lower"])))),
        "window": tuple(masks.window(T, draw(st.integers(1, 40)), offset=draw(st.integers(-3, S)))),
        "holes": (start, start + width),
        "dense": (torch.rand(*lead, T, S) < 0.6,),
        "row": (torch.rand(*lead, T, 1) < 0.6,),
        "column": (torch.rand(*lead, 1, S) < 0.6,),
        "nothing": (torch.zeros(T, 1, dtype=torch.int64),) * 2,
    }[kind]
    seen = (
        None
        if not mask
        else mask[0].expand(*mask[0].shape[:-2], T, S)
        if len(mask) == 1
        else masks.Mask(*mask).dense(S)
    )
    bias = draw(
        st.sampled_from(["none", "none", "full", "row", "column", "heads", "hidden", "lowest"])
    )
    shape = {"row": (1, S), "column": (T, 1), "heads": (*leads[0], T, S)}.get(bias, (T, S))
    bias = (
        None
        if bias == "none"
        else torch.where(
            torch.rand(shape) < 0.3,
            {"hidden": -torch.inf, "lowest": -1e4}.get(bias, 1.0),
            torch.randn(shape),
        )
    )
    return q, k, v, mask, seen, bias, tangents


@given(problems())
def test_values_and_tangents_are_those_of_float64(problem):
    q, k, v, mask, seen, bias, tangents = problem
    scale = q.shape[-1] ** -0.5
    hold(
        q,
        k,
        v,
        mask,
        bias,
        scale,
        None,
        seen if bias is None else (True if seen is None else seen) & (bias != -torch.inf),
    )
    if any(t is not None for t in tangents):
        hold(q, k, v, mask, None, scale, tangents, seen)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("D", [16, 40, 64, 128, 256])
def test_long_problems_are_those_of_float64(D, dtype):
    torch.manual_seed(D)
    q, k, v, *tangents = (torch.randn(2, n, D).to(dtype) for n in (230, 700, 700) * 2)
    mask = masks.causal(230, 700, align="lower")
    hold(q, k, v, tuple(mask), None, D**-0.5, tangents, mask.dense(700))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_mask_of_booleans_may_hide_or_show_whole_blocks(dtype):
    torch.manual_seed(0)
    q, k, v, *tangents = (torch.randn(2, n, 24).to(dtype) for n in (200, 800, 800) * 2)
    seen = masks.causal(200, 800, align="lower").dense(800)
    seen[:100, :300] = False
    seen[5] = False
    hold(q, k, v, (seen,), None, 0.2, tangents, seen)


@pytest.mark.parametrize("moved", ["q", "k", "v"])
def test_a_tangent_may_have_axes_that_its_primal_lacks(moved):
    torch.manual_seed(0)
    primals = [torch.randn(2, n, 16) for n in (5, 70, 70)]
    at = "qkv".index(moved)
    tangents = [torch.randn(3, 2, *primals[at].shape[-2:]) if i == at else None for i in range(3)]
    hold(*primals, tangents=tangents)
    out, lse, dout, dlse = backend.attend_jvp(*primals, tangents, (), 1.0)
    assert (out.shape, lse.shape, dout.shape) == ((2, 5, 16), (2, 5, 1), (3, 2, 5, 16))
    assert dlse.shape == ((2, 5, 1) if moved == "v" else (3, 2, 5, 1))


def test_values_with_axes_of_their_own_leave_one_log_sum_exp():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 70, 16), torch.randn(3, 2, 70, 16)
    out, lse = backend.attend(q, k, v)
    assert (out.shape, lse.shape) == ((3, 2, 5, 16), (2, 5, 1))
    hold(q, k, v)


@pytest.mark.parametrize("level", [1e5, -1e9, 1e30, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("T", [1, 40])
def test_softmax_does_not_change_under_a_shift_of_its_logits(T, level):
    torch.manual_seed(0)
    q, k, v = torch.zeros(2, T, 8), torch.randn(2, 90, 8), torch.randn(2, 90, 8)
    wanted = v.double().mean(-2, keepdim=True).expand(2, T, 8)
    for name in LEVELS:
        with instructions(name):
            out, lse = backend.attend(q, k, v, (), torch.full((T, 90), level), 1.0)
            torch.testing.assert_close(out.double(), wanted, atol=(90 + 32) * UNIT, rtol=0)
            torch.testing.assert_close(lse, torch.full_like(lse, level), rtol=2 * UNIT, atol=5)


@pytest.mark.parametrize("at", [-torch.inf, torch.inf, torch.nan])
def test_logits_that_are_not_finite_are_as_in_blocks_of_torch(at):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 8), torch.randn(2, 40, 8), torch.randn(2, 40, 8)
    bias = torch.randn(6, 40)
    bias[2, 7] = at
    bias[4] = -torch.inf
    for name in LEVELS:
        with instructions(name):
            got = operators.attend(AttendSpec(0.5, biased=True, kernel="native"), [q, k, v, bias])
            for mine, theirs in zip(got, torch_attend.attend(q, k, v, (), bias, 0.5), strict=True):
                torch.testing.assert_close(mine, theirs, equal_nan=True, atol=1e-5, rtol=1e-5)
    q[1, 3, 0] = at
    assert backend.attend(q, k, v) is None
    got = operators.attend(AttendSpec(1.0, kernel="native"), [q, k, v])
    for mine, theirs in zip(got, torch_attend.attend(q, k, v), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.tuples(*[st.sampled_from([-30, -10, 0, 0, 5, 10, 15, 19, 20, 30, 37])] * 3),
    st.sampled_from([0.125, 1.0, 1e-3, 1e-20, 1e-25, 1e10]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
@example(torch.bfloat16, (20, 35, 0), 1e-20, True, False, 3)  # all products overflow, no logit
def test_a_finite_result_of_large_numbers_is_true_or_that_of_blocks(
    dtype, powers, scale, falls, hides, seed
):
    torch.manual_seed(seed)
    sizes = (9, 70, 70)
    q, k, v = (torch.randn(n, 8) * 10.0**p for n, p in zip(sizes, powers, strict=True))
    q, k = (q.abs(), -k.abs()) if falls else (q, k)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    mask = tuple(masks.prefix(9, 40)) if hides else ()
    spec = AttendSpec(scale, masks=len(mask), kernel="native")
    seen = torch.arange(70) < 40 if hides else None
    exact = dense(*(x.double() for x in (q, k, v)), seen, None, scale)
    blocks = torch_attend.attend(q, k, v, mask, None, scale)
    # 2^-6: weights and results are rounded to bfloat16; in float32, logits of thousands are
    near = lambda x, y: (x.double() - y.double()).abs() <= 2**-6 * y.double().abs().amax()
    ours = operators.attend(spec, [q, k, v, *mask])
    for mine, other, one in zip(ours, blocks, exact, strict=True):
        assert (near(mine, one) | near(mine, other) | ~mine.isfinite()).all()
        assert (near(mine, one) | ~near(other, one)).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rise", [0.5, 20.0, 300.0])
def test_logits_that_rise_from_block_to_block_are_those_of_float64(dtype, rise):
    torch.manual_seed(0)
    q, k, v, *tangents = (torch.randn(2, n, 16) for n in (30, 900, 900) * 2)
    q[..., 0], k[..., 0] = 1, torch.linspace(0, rise, 900)
    q, k, v, *tangents = (x.to(dtype) for x in (q, k, v, *tangents))
    hold(q, k, v, (), None, 0.5, tangents)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_hidden_key_changes_nothing_even_if_it_is_nan(dtype):
    torch.manual_seed(0)
    q, k, v, *tangents = (torch.randn(2, n, 16).to(dtype) for n in (30, 50, 50) * 2)
    mask = tuple(masks.prefix(30, 40))
    spec = AttendSpec(0.5, masks=2, kernel="native")
    run = lambda: (
        *operators.attend(spec, [q, k, v, *mask]),
        *operators.attend_jvp(spec, [True] * 3, [q, k, v, *mask, *tangents]),
    )
    wanted = (
        *backend.attend(q, k, v, mask, None, 0.5),
        *backend.attend_jvp(q, k, v, tangents, mask, 0.5),
    )
    assert all(map(torch.equal, run(), wanted))
    k[:, 45], v[:, 44], tangents[1][:, 46], tangents[2][:, 47] = (
        torch.nan,
        torch.inf,
        torch.nan,
        torch.nan,
    )
    assert backend.attend(q, k, v, mask, None, 0.5) is None
    assert backend.attend_jvp(q, k, v, tangents, mask, 0.5) is None
    # the fallback sums in another order
    near = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 5e-3}[dtype]
    for mine, theirs in zip(run(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=near, rtol=near)


@pytest.mark.parametrize("n", [1, 2])
def test_ends_of_intervals_may_be_the_least_and_the_largest_integers(n):
    torch.manual_seed(0)
    q, k, v, *tangents = (torch.randn(2, rows, 16) for rows in (40, 300, 300) * 2)
    start = torch.randint(0, 300, (40, n))
    stop = start + torch.randint(0, 300, (40, n))
    start[::2], stop[::3] = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    start[7], stop[7] = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
    hold(q, k, v, (start, stop), None, 0.3, tangents, masks.Mask(start, stop).dense(300))


def test_a_boolean_of_any_byte_but_zero_shows_a_key():
    torch.manual_seed(0)
    q, k, v, *tangents = (torch.randn(2, rows, 16) for rows in (40, 600, 600) * 2)
    bytes = torch.where(torch.rand(40, 600) < 0.5, 2, 0).to(torch.uint8)
    bytes[:, 256:512] = 255
    bytes[3] = 0
    seen = bytes != 0
    hold(q, k, v, (bytes.view(torch.bool),), None, 0.3, tangents, seen)


def test_weights_that_underflow_are_zero_and_denormal_values_stay():
    q, k = torch.tensor([[1.0]]), torch.tensor([[0.0], [-90.0], [-200.0]])
    v = torch.tensor([[2.0**-140], [1.0], [1e30]])
    for name in LEVELS:
        with instructions(name):
            out, _ = backend.attend(q, k, v[:1].expand(3, 1), (), None, 1.0)
            assert out.item() == 2.0**-140
            out, _ = backend.attend(q, k, torch.tensor([[0.0], [1.0], [0.0]]), (), None, 1.0)
            torch.testing.assert_close(
                out.double().item(), 8.194012623990515e-40, rtol=2e-6, atol=2.0**-149
            )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "shape", [(1, 1, 5000), (2, 300, 700), (3, 50, 900)], ids=["decoding", "blocks", "heads"]
)
def test_threads_change_roundings_alone_and_runs_change_nothing(shape, dtype):
    torch.manual_seed(0)
    H, T, S = shape
    q, k, v, *tangents = (torch.randn(H, n, 64).to(dtype) for n in (T, S, S) * 2)
    mask = tuple(masks.causal(T, S, align="lower"))
    run = lambda: (
        *backend.attend(q, k, v, mask, None, 0.125),
        *backend.attend_jvp(q, k, v, tangents, mask, 0.125),
    )
    before, results = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads] = run()
            for _ in range(3):
                assert all(map(torch.equal, run(), results[threads]))
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        for one, other in zip(results[1], results[threads], strict=True):
            torch.testing.assert_close(
                one, other, atol=1e3 * ROUNDING[dtype] / 16, rtol=16 * ROUNDING[dtype]
            )


def test_what_it_does_not_take_it_says():
    x = torch.randn(2, 4, 8)
    assert not backend.why_not_attend(x, x, x)
    assert "float64" in backend.why_not_attend(x.double(), x.double(), x.double())
    assert "zero" in backend.why_not_attend(x, x[:, :0], x[:, :0])
    assert "meta" in backend.why_not_attend(x.to("meta"), x, x)
    assert "float64" in backend.why_not_attend(x, x, x, (), torch.zeros(4, 4, dtype=torch.float64))
    assert "masks" in backend.why_not_attend(x, x, x, (torch.ones(4, 4),))
    assert "zero" in backend.why_not_attend(x, x, x, (torch.zeros(4, 0, dtype=torch.int64),) * 2)
    assert "float64" in backend.why_not_attend_jvp(x, x.double(), x)
    with pytest.raises(RuntimeError, match="of the size of queries"):
        torch.ops.funcattn.native_attend(x, x[..., :4], x, [], None, 1.0)


@pytest.mark.parametrize(
    "flags", [("-O2",), pytest.param(SANITIZED, marks=pytest.mark.slow)], ids=["plain", "sanitized"]
)
def test_kernels_stay_within_their_tensors_and_the_exponential_within_its_bound(flags, tmp_path):
    program = tmp_path / "driver"
    command = [
        building.found_compiler(),
        "-std=c++20",
        "-w",
        *flags,
        str(DRIVER),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, timeout=600)
    done = subprocess.run(
        [str(program), "20"], capture_output=True, text=True, timeout=600, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines[-1] == "done"
    assert not [line for line in lines if line.startswith("wrong")]
    found = {
        name: float(bound)
        for word, name, bound in (line.split() for line in lines[:-1])
        if word == "bound"
    }
    assert {"avx2_exp", "avx2_exp2"} <= set(found)
    assert max(found.values()) <= EXPONENTIAL
