"""The kit on trial: every law holds of what is right, and each of many seeded bugs is caught by the
law that should.
"""

import functools
import inspect
import math
import re
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from places import ROOT
from torch import Tensor
from torch.autograd import Function, gradcheck, gradgradcheck
from torch.func import vjp

import funcattn as fa
from funcattn import caches, masks
from funcattn.caches import Branch, Cache
from funcattn.core.autograd import transforming
from funcattn.kernels.backends import torch_blocks
from funcattn.masks import Mask
from funcattn.records import Attended
from funcattn.sampling import Sampler, chain, greedy, min_p, stateless, temperature, top_k, top_p
from funcattn.testing import Report, Row, agreement, check_transforms, dense, laws, strategies
from funcattn.testing.agreement import agree

INF = float("inf")
SAMPLER_ARGUMENTS = st.tuples(strategies.logits(), strategies.keys())
CACHE_ARGUMENTS = st.tuples(st.integers(1, 6), strategies.keys())
flash = functools.partial(fa.attend, kernel="flash")


def by_name(value):
    return getattr(value, "__name__", str(value))


def prove(law, subject, arguments, examples=30):
    """law(subject, *values) for every tuple of values that hypothesis finds."""

    @settings(max_examples=examples, database=None)
    @given(arguments)
    def run(values):
        law(subject, *values)

    run()


def assert_caught(law, subject, arguments):
    """The law fails for some of the same 400 examples each time, in its own words."""

    @settings(
        max_examples=400,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        phases=[Phase.generate],
    )
    @given(arguments)
    def run(values):
        law(subject, *values)

    with pytest.raises(AssertionError, match=f"^{law.__name__}: "):
        run()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four keys, so that tiny inputs cross several."""
    for size, value in (("ELEMENTS", 64), ("KEYS", 4), ("ROWS", 4)):
        monkeypatch.setattr(torch_blocks, size, value)


# Laws of kernels hold of the library's own.

KERNELS = {
    "reference": functools.partial(fa.attend, kernel="reference"),
    "flash": flash,
}
FORWARD_MODE = [law for law in laws.kernel if re.match("jvp|hvp|.*tangents", law.__name__)]
VALUES_AND_GRADIENTS = [law for law in laws.kernel if law not in FORWARD_MODE]


@pytest.mark.parametrize("law", laws.kernel, ids=by_name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_law_holds_of_a_closed_kernel(kernel, law):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_blocks, "KEYS", 4)
        prove(law, KERNELS[kernel], strategies.problems(no_keys=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=by_name)
@pytest.mark.parametrize("law", laws.kernel, ids=by_name)
def test_every_law_holds_of_flash_within_the_rounding_of_its_dtype(law, dtype):
    prove(law, flash, strategies.problems(dtype=dtype), examples=15)


@pytest.mark.cpu("the native backend is for the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=by_name)
@pytest.mark.parametrize("law", laws.kernel, ids=by_name)
def test_every_law_holds_of_the_native_kernel_within_the_rounding_of_its_dtype(law, dtype):
    prove(
        law,
        functools.partial(fa.attend, kernel="native"),
        strategies.problems(dtype=dtype),
        examples=15,
    )


@pytest.mark.parametrize("law", VALUES_AND_GRADIENTS, ids=by_name)
# torch has no batching rule for its kernel
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_sdpa_keeps_the_laws_of_values_and_first_gradients(law):
    prove(law, functools.partial(fa.attention, kernel="sdpa"), strategies.problems())


@pytest.mark.cpu("of torch's kernel for the CPU; elsewhere its dense route composes")
@pytest.mark.parametrize(
    "law", [law for law in FORWARD_MODE if "shifting" not in law.__name__], ids=by_name
)
def test_sdpa_does_not_keep_the_laws_of_forward_mode(law):
    with pytest.raises(NotImplementedError, match="forward AD"):
        prove(
            law, functools.partial(fa.attention, kernel="sdpa"), strategies.problems(), examples=1
        )


# Seeded bugs of kernels. What they are made of, `logits` and `finish`, is right.


def repeat(x, q):
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


def logits(q, k):
    return q @ repeat(k, q).mT / math.sqrt(q.shape[-1])


def finish(S, seen, v):
    hidden = ~seen
    empty = hidden.all(-1, keepdim=True)
    P = torch.where(empty, 0, torch.where(empty, 0, torch.where(hidden, -INF, S)).softmax(-1))
    return P @ repeat(v, S)


def off_by_one(q, k, v, mask):
    return dense.attend(
        q, k, v, Mask(mask.start, mask.stop + 1) if isinstance(mask, Mask) else mask
    )


def scale_is_missing(q, k, v, mask):
    return dense.attend(q, k, v, mask, scale=1.0)


def softmax_over_queries(q, k, v, mask):
    S = torch.where(dense.seen(mask, q, k), logits(q, k), -INF)
    return S.softmax(-2).nan_to_num(0) @ repeat(v, q)


def heads_interleaved(q, k, v, mask):
    again = lambda x: torch.cat([x] * (q.shape[-3] // x.shape[-3]), -3)
    return dense.attend(q, again(k), again(v), mask)


def nan_on_an_empty_row(q, k, v, mask):
    return torch.where(dense.seen(mask, q, k), logits(q, k), -INF).softmax(-1) @ repeat(v, q)


def lse_of_base_two(q, k, v, mask):
    out, lse = dense.attend(q, k, v, mask)
    return Attended(out, lse / math.log(2))


def stale_last_block(q, k, v, mask):
    S = k.shape[-2]
    return finish(logits(q, k), dense.seen(mask, q, k) & (torch.arange(S) < max(S - S % 2, 1)), v)


def maximum_not_subtracted(q, k, v, mask):
    weight = torch.where(dense.seen(mask, q, k), logits(q, k).exp(), 0)
    mass = weight.sum(-1, keepdim=True)
    return weight / torch.where(mass == 0, 1, mass) @ repeat(v, q)


def a_little_in_the_denominator(q, k, v, mask):
    weight = torch.where(dense.seen(mask, q, k), logits(q, k).exp(), 0)
    return weight / (weight.sum(-1, keepdim=True) + 1e-6) @ repeat(v, q)


def normalizer_lost_in_lse(q, k, v, mask):
    """exp(S - lse) with both parts of lse in one number."""
    seen = dense.seen(mask, q, k)
    S = torch.where(seen | ~seen.any(-1, keepdim=True), logits(q, k), -INF)
    return torch.where(seen, (S - S.logsumexp(-1, keepdim=True)).exp(), 0) @ repeat(v, q)


def later_keys_preferred(q, k, v, mask):
    return finish(logits(q, k) + 0.01 * torch.arange(k.shape[-2]), dense.seen(mask, q, k), v)


def weights_held_fixed(q, k, v, mask):
    """Value, gradient and jvp are right; differentiated twice, the weights count as constants."""
    seen = dense.seen(mask, q, k)
    S, v = logits(q, k), repeat(v, q)
    empty = ~seen.any(-1, keepdim=True)
    P = torch.where(seen, torch.where(seen | empty, S, -INF).softmax(-1), 0).detach()
    moved = lambda x: x - x.detach()  # zero, with the derivative of x
    return (
        P @ v.detach()
        + moved(P @ v)
        + moved((P * (S - (P * S).sum(-1, keepdim=True))) @ v.detach())
    )


def right(q, k, v, seen):
    return finish(logits(q, k), seen, v)


class MaskForgottenInBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, seen):
        return right(q, k, v, seen)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        q, k, v, seen = ctx.saved_tensors
        return *vjp(lambda q, k, v: right(q, k, v, torch.ones_like(seen)), q, k, v)[1](g), None


class JvpSilentlyZero(MaskForgottenInBackward):
    @staticmethod
    def jvp(ctx, *tangents):
        return torch.zeros_like(right(*ctx.saved_tensors))


class RowsMixedUnderVmap(MaskForgottenInBackward):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, *inputs):
        of = lambda n: [
            x if d is None else x.select(d, n) for x, d in zip(inputs, in_dims, strict=True)
        ]
        return torch.stack([right(of(n)[0], *of(n - 1)[1:]) for n in range(info.batch_size)]), 0


def as_kernel(function):
    return lambda q, k, v, mask: function.apply(q, k, v, dense.seen(mask, q, k))


# for those whose exp would overflow, which is another bug
moderate = strategies.problems(large_logits=False)
SEEDED = [
    (off_by_one, "future_cannot_change_the_past"),
    (scale_is_missing, "agrees_with_the_reference"),
    (softmax_over_queries, "output_lies_in_the_hull_of_the_values"),
    (heads_interleaved, "agrees_with_the_reference"),
    (nan_on_an_empty_row, "masked_rows_are_zero_with_zero_gradients"),
    (nan_on_an_empty_row, "masked_rows_have_zero_tangents"),
    (lse_of_base_two, "merge_of_any_split_is_the_whole"),
    (lse_of_base_two, "agrees_with_the_reference"),
    (stale_last_block, "order_of_keys_does_not_matter"),
    (maximum_not_subtracted, "agrees_with_the_reference"),
    (a_little_in_the_denominator, "shifting_all_logits_of_a_query_changes_only_lse"),
    (normalizer_lost_in_lse, "shifting_all_logits_of_a_row_changes_nothing"),
    (normalizer_lost_in_lse, "shifting_all_logits_of_a_row_changes_no_tangents"),
    (later_keys_preferred, "order_of_keys_does_not_matter"),
    (as_kernel(MaskForgottenInBackward), "gradient_agrees_with_the_reference"),
    (as_kernel(JvpSilentlyZero), "jvp_agrees_with_the_reference"),
    (as_kernel(RowsMixedUnderVmap), "commutes_with_vmap"),
    (weights_held_fixed, "hvp_agrees_with_the_reference"),
]


@pytest.mark.parametrize(("kernel", "law"), SEEDED, ids=by_name)
def test_a_seeded_bug_of_a_kernel_is_caught_by_its_law(kernel, law):
    problems = moderate if kernel is a_little_in_the_denominator else strategies.problems()
    assert_caught(getattr(laws.kernels, law), kernel, problems)


def test_each_law_of_kernels_catches_some_seeded_bug():
    assert {law for _, law in SEEDED} == {law.__name__ for law in laws.kernel}


@pytest.mark.parametrize(
    "law",
    [
        "agrees_with_the_reference",
        "gradient_agrees_with_the_reference",
        "jvp_agrees_with_the_reference",
    ],
)
def test_a_bug_of_second_order_is_not_seen_at_first(law):
    prove(getattr(laws.kernels, law), weights_held_fixed, strategies.problems())


def fails(law, *arguments):
    try:
        law(*arguments)
    except AssertionError:
        return True
    return False


def test_an_off_by_one_shrinks_to_one_query_and_two_keys():
    law = laws.kernels.future_cannot_change_the_past
    smallest = find(
        strategies.problems(),
        lambda problem: fails(law, off_by_one, *problem),
        settings=settings(database=None),
    )
    assert (smallest.q.shape, smallest.k.shape, smallest.v.shape) == (
        (1, 1, 1),
        (1, 2, 1),
        (1, 2, 1),
    )
    assert smallest.mask is None
    assert (
        repr(smallest)
        == "Problem(q=float64[1,1,1], k=float64[1,2,1], v=float64[1,2,1], mask=None, key=[0, 0])"
    )


def test_interleaved_heads_shrink_to_the_fewest_heads_that_show_them():
    law = laws.kernels.agrees_with_the_reference
    smallest = find(
        strategies.problems(),
        lambda problem: fails(law, heads_interleaved, *problem),
        settings=settings(database=None),
    )
    assert (smallest.q.shape, smallest.k.shape) == ((4, 1, 1), (2, 1, 1))


def test_a_failure_names_the_law_the_place_the_error_and_what_was_allowed():
    q = k = v = torch.arange(6, dtype=torch.float64).reshape(1, 3, 2)
    with pytest.raises(AssertionError) as caught:
        laws.kernels.agrees_with_the_reference(scale_is_missing, q, k, v, None, fa.key(0))
    words = r"agrees_with_the_reference: out\[0, 0, 1\] is \S+, should be \S+\. It is off by \S+ where \S+e-1\d is allowed "
    assert re.match(
        words
        + r"\(rounding of float64 with logits up to \S+, q \(1, 3, 2\), .*\); \d of 6 entries",
        str(caught.value),
    )


def test_agreement_tells_nan_infinity_and_shape_from_numbers():
    x = torch.tensor([1.0, -INF, INF])
    agree(prove, "x", x, x, 0, "")
    for got in (
        torch.tensor([1.0, float("nan"), INF]),
        torch.tensor([1.0, INF, INF]),
        x[:2],
        torch.tensor([1.1, -INF, INF]),
    ):
        with pytest.raises(AssertionError, match="prove: x"):
            agree(prove, "x", got, x, 0.01, "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=by_name)
def test_a_tolerance_lets_no_weight_be_wrong_by_a_hundred_roundings(dtype):
    q, k, v = (fa.random.normal(fa.key(i), (2, 5, 4), torch.float64).to(dtype) for i in range(3))
    spoilt = lambda *x: dense.attend(*x).out + 1000 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError):
        laws.kernels.agrees_with_the_reference(spoilt, q, k, v, None, fa.key(0))


@given(strategies.problems(empty_rows=False))
def test_strategies_can_leave_no_query_without_a_key(problem):
    assert dense.attend(*problem[:4]).lse.isfinite().all()


@pytest.mark.parametrize(
    "sight",
    [
        lambda p: p.q.shape[-3] > p.k.shape[-3] > 1,
        lambda p: p.k.shape[-3] == 1 < p.q.shape[-3],
        lambda p: p.q.shape[-2] > p.k.shape[-2],
        lambda p: p.v.shape[-1] != p.q.shape[-1],
        lambda p: p.q.dim() != p.k.dim(),
        lambda p: p.q.dim() == p.v.dim() and p.q.shape[:-3] != p.v.shape[:-3],
        lambda p: isinstance(p.mask, Tensor) and p.mask.dim() > 2,
        lambda p: (
            isinstance(p.mask, Mask) and p.mask.start.shape[-1] > 1 and p.mask.start.dim() > 2
        ),
        lambda p: (dense.attend(*p[:4]).lse == -INF).any(),
        lambda p: p.k.shape[-2] == 0,
        lambda p: p.q.abs().max() > 100,
    ],
    ids=[
        "grouped",
        "multi-query",
        "long",
        "wide",
        "ranks",
        "broadcast",
        "per head",
        "intervals",
        "empty row",
        "no keys",
        "large",
    ],
)
def test_problems_come_in_every_kind(sight):
    find(
        strategies.problems(no_keys=True),
        sight,
        settings=settings(database=None, max_examples=2000, phases=[Phase.generate]),
    )


def test_what_may_be_beyond_the_range_of_a_dtype_may_be_infinite():
    law = laws.kernels.hvp_agrees_with_the_reference
    compare = lambda got, wanted, allowed=1.0: agreement.agree(
        law, "x", torch.tensor([got], dtype=torch.float16), torch.tensor([wanted]), allowed, ""
    )
    compare(torch.inf, 7.2e4)
    compare(-torch.inf, -7.2e4)
    compare(torch.inf, 6.5e4, 1e3)
    for got, wanted in (
        (torch.inf, 3.6e4),
        (-torch.inf, 7.2e4),
        (6e4, 6.1e4),
        (6e4, 7.2e4),
        (torch.nan, 7.2e4),
    ):
        with pytest.raises(AssertionError, match="x"):
            compare(got, wanted)


# Every nesting of transforms.


@pytest.mark.parametrize(
    "f", [fa.attention, functools.partial(fa.attention, kernel="flash"), flash]
)
def test_every_nesting_to_depth_three_is_exact(f, small_blocks):
    report = check_transforms(f, depth=3)
    assert len(report.rows) == 3 + 9 + 27 + 4
    assert report.worst.worst < 1e-12  # float64: orders below the 1e-9 that was asked


@pytest.mark.cpu("the native backend is for the CPU")
@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.causal(5, offset=1),
        pytest.param(masks.window(5, 2) | masks.sinks(5, 1), marks=pytest.mark.slow),
        pytest.param(torch.arange(6) % 3 > 0, marks=pytest.mark.slow),
    ],
)
def test_every_nesting_of_the_native_kernel_is_exact_in_float32(mask):
    q, k, v = (
        fa.random.normal(fa.key(i), shape)
        for i, shape in enumerate([(2, 5, 3), (1, 6, 3), (1, 6, 2)])
    )
    f = functools.partial(fa.attention, kernel="native")
    report = check_transforms(f, q, k, v, mask, depth=3, reference=fa.attention, tolerance=2e-4)
    assert len(report.rows) == 3 + 9 + 27 + 4


@pytest.mark.parametrize(
    "mask",
    [masks.causal(5, offset=-1), masks.window(5, 2) | masks.sinks(5, 1), torch.arange(6) % 3 > 0],
)
def test_every_nesting_is_exact_where_rows_are_empty_and_keys_scattered(mask, small_blocks):
    q, k, v = (
        fa.random.normal(fa.key(i), shape, torch.float64)
        for i, shape in enumerate([(2, 5, 3), (1, 6, 3), (1, 6, 2)])
    )
    check_transforms(flash, q, k, v, mask, depth=2)


def test_every_nesting_in_scale_and_bias_is_exact(small_blocks):
    q, k, v, bias = (
        fa.random.normal(fa.key(i), s, torch.float64)
        for i, s in enumerate([(2, 4, 2), (1, 5, 2), (1, 5, 2), (4, 5)])
    )
    scale = torch.tensor(0.7, dtype=torch.float64)
    ours = lambda q, k, v, scale, bias: flash(q, k, v, masks.causal(4), scale=scale, bias=bias)
    theirs = lambda q, k, v, scale, bias: dense.attend(
        q, k, v, masks.causal(4), scale=scale, bias=bias
    )
    check_transforms(ours, q, k, v, scale, bias, depth=2, reference=theirs)


# flash refuses is_grads_batched by name
@pytest.mark.parametrize(("kernel", "batched"), [("flash", False), ("reference", True)])
@pytest.mark.parametrize(
    "mask", [None, masks.causal(3), masks.causal(3, offset=-1)], ids=["full", "causal", "empty row"]
)
def test_gradcheck_and_gradgradcheck_hold_with_forward_mode(mask, kernel, batched, small_blocks):
    shapes = [(2, 3, 2), (1, 4, 2), (1, 4, 1)]
    inputs = [
        fa.random.normal(fa.key(i), shape, torch.float64).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    f = lambda q, k, v: fa.attention(q, k, v, mask, kernel=kernel)
    assert gradcheck(
        f,
        inputs,
        check_forward_ad=True,
        check_batched_grad=batched,
        check_batched_forward_grad=batched,
    )
    assert gradgradcheck(
        f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=batched
    )


@pytest.mark.cpu("of torch's kernel for the CPU, which has no jvp")
def test_a_report_shows_what_is_off_and_what_raised():
    with pytest.raises(AssertionError, match="of 12 nestings are off") as caught:
        check_transforms(as_kernel(JvpSilentlyZero), depth=2, hessians=False)
    lines = {line.split()[0]: line for line in str(caught.value).splitlines()}
    assert lines["jvp(f)"].endswith("off")
    assert not lines["vmap(vmap(f))"].endswith("off")
    with pytest.raises(
        AssertionError, match=r"jvp\(f\) +NotImplementedError: Trying to use forward AD"
    ):
        check_transforms(
            functools.partial(fa.attention, kernel="sdpa"), depth=1, hessians=False, vmapped=False
        )


def test_a_nesting_is_off_where_a_batch_is_mixed_only_under_one_more_vmap():
    with pytest.raises(AssertionError, match=r"grad\(f\) +0\.0e\+00 +1\.\de-01 +off"):
        check_transforms(
            RowsMixedInGradient.apply,
            torch.linspace(0, 1, 3).double(),
            depth=1,
            reference=torch.sin,
            hessians=False,
        )


class RowsMixedInGradient(Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * Rolled.apply(ctx.saved_tensors[0].cos())

    @staticmethod
    def jvp(ctx, dx):
        return dx * ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(info, in_dims, x):
        return RowsMixedInGradient.apply(x), in_dims[0]


class Rolled(Function):
    """The identity, but for vmap, which hands every row its neighbour's."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def vmap(info, in_dims, x):
        return x.roll(1, in_dims[0]), in_dims[0]


def test_a_function_of_trees_is_checked_against_the_reference_that_is_given():
    params = {
        "w": torch.linspace(-1, 1, 6).double().reshape(2, 3),
        "n": torch.tensor(2),
        "absent": (),
    }
    f = lambda params, x: {"y": torch.nn.functional.silu(params["w"] @ x) * params["n"]}
    reference = lambda params, x: {
        "y": (params["w"] @ x) / (1 + (-(params["w"] @ x)).exp()) * params["n"]
    }
    x = torch.linspace(0, 2, 3).double()
    assert check_transforms(f, params, x, depth=2, reference=reference).worst.worst < 1e-12
    wrong = lambda params, x: {"y": reference(params, x)["y"] * 1.0001}
    with pytest.raises(AssertionError, match="nestings are off"):
        check_transforms(f, params, x, depth=1, reference=wrong)


def test_single_precision_is_held_to_the_tolerance_that_is_given():
    q, k, v = (fa.random.normal(fa.key(i), (1, 4, 2)) for i in range(3))
    assert (
        1e-9 < check_transforms(fa.attention, q, k, v, depth=1, tolerance=1e-4).worst.worst < 1e-4
    )
    with pytest.raises(AssertionError, match="beyond 1e-09"):
        check_transforms(fa.attention, q, k, v, depth=1)


def test_the_reference_of_what_is_not_attention_has_to_be_given():
    x = torch.ones(3, dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=r"check_transforms: reference should be given with args, got none for .* reference=\.\.\.",
    ):
        check_transforms(torch.sin, x)
    with pytest.raises(ValueError, match="check_transforms: args should be with a floating tensor"):
        check_transforms(torch.abs, torch.ones(3, dtype=torch.int64), reference=torch.abs)


def test_a_report_is_a_table_in_text_and_in_html():
    report = Report(
        (Row("grad(f)", 1e-16, 2e-16, ""), Row("jvp(<f>)", 0.0, None, "TypeError: no")), 1e-9
    )
    assert [line.split() for line in repr(report).splitlines()[:3]] == [
        ["nesting", "error", "under", "vmap"],
        ["grad(f)", "1.0e-16", "2.0e-16"],
        ["jvp(<f>)", "TypeError:", "no"],
    ]
    assert repr(report).endswith("2 nestings, 1 beyond 1e-09; the worst is jvp(<f>): inf")
    assert "<td>jvp(&lt;f&gt;)</td>" in report._repr_html_()


# Laws of samplers, of pasts and of transforms of trees.

penalty = Sampler(  # what was seen becomes less likely
    lambda V: torch.zeros(V),
    lambda logits, seen: (logits - seen, seen),
    lambda token, seen: seen + (torch.arange(seen.shape[-1]) == token),
)
SAMPLERS = [
    temperature(0.7),
    top_k(3),
    top_p(0.9),
    min_p(0.1),
    greedy,
    penalty,
    chain(penalty, temperature(0.8), top_k(5), top_p(0.95)),
]


@pytest.mark.parametrize("law", laws.sampler, ids=by_name)
@pytest.mark.parametrize(
    "sampler",
    SAMPLERS,
    ids=["temperature", "top_k", "top_p", "min_p", "greedy", "penalty", "chain"],
)
def test_every_law_holds_of_a_sampler(sampler, law):
    prove(law, sampler, SAMPLER_ARGUMENTS, examples=20)


class FirstRowForAll(Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return x.movedim(in_dims[0], 0)[:1].expand(
            info.batch_size, *x.movedim(in_dims[0], 0).shape[1:]
        ), 0


SEEDED_SAMPLERS = [
    (stateless(lambda logits: logits.clamp(min=-2)), "no_hidden_token_comes_back"),
    (stateless(lambda logits: torch.where(logits > 0, logits, -INF)), "at_least_one_token_is_kept"),
    (stateless(lambda logits: torch.where(logits > 0, logits, -INF)), "law_sums_to_one"),
    (
        stateless(lambda logits: logits * logits.abs()),
        "adding_a_constant_to_logits_changes_nothing",
    ),
    (stateless(FirstRowForAll.apply), "commutes_with_vmap"),
    (temperature(1.0)._replace(deterministic=True), "draws_follow_the_law"),
    (
        penalty._replace(update=lambda logits, seen: (logits - seen, seen.double())),
        "state_keeps_its_form",
    ),
    (stateless(lambda logits: logits.mul_(2)), "arguments_stay_as_they_were"),
]


@pytest.mark.parametrize(
    ("sampler", "law"), SEEDED_SAMPLERS, ids=[law for _, law in SEEDED_SAMPLERS]
)
def test_a_seeded_bug_of_a_sampler_is_caught_by_its_law(sampler, law):
    assert_caught(getattr(laws.samplers, law), sampler, SAMPLER_ARGUMENTS)


class Prefixed:
    """A Branch behind an empty prefix, as a kind of past."""

    @staticmethod
    def empty(L, K, size, D, dtype):
        return Branch(Cache.empty(L, K, 2, D, dtype), Cache.empty(L, K, size, D, dtype))


class Paged:
    """A Branch whose prefix and tail are blocks."""

    @staticmethod
    def empty(*sizes):
        return Branch(caches.pages(block=3).empty(*sizes), caches.pages(block=2).empty(*sizes))


ROUNDS = {laws.pasts.remembers_what_was_committed}  # left out of a kind that rounds what it keeps
# a second and more for an example
TEXTS = {laws.texts.every_verb_writes_what_a_loop_over_apply_writes}
# and this of one that cannot be shortened by a length
FORGETS = {laws.pasts.entries_beyond_length_are_unobservable}
KINDS = {
    "Cache": (Cache, set()),
    "Branch": (Prefixed, set()),
    "Pages": (caches.Pages, set()),
    "pages(2)": (caches.pages(block=2), set()),
    "Branch of pages": (Paged, set()),
    "Ring": (caches.Ring, FORGETS),
    "ring(12)": (caches.ring(window=12, sinks=2, tail=2), FORGETS),
    "ring(3)": (caches.ring(window=3, sinks=1, tail=2), FORGETS | ROUNDS),
    "QuantizedCache": (caches.QuantizedCache, FORGETS),  # no row leaves the tail
    "quantized(8)": (caches.quantized(bits=8, block=2, recent=1), FORGETS | ROUNDS),
    "quantized(4)": (caches.quantized(bits=4, block=2, recent=0), FORGETS | ROUNDS),
}


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        pytest.param(kind, law, id=f"{name}-{law.__name__}")
        for name, (kind, out) in KINDS.items()
        for law in laws.cache
        if law not in out
    ],
)
def test_every_law_holds_of_a_kind_of_past(kind, law):
    prove(law, kind, CACHE_ARGUMENTS, 1 if law in TEXTS else 30)


def kind_of_past(write=None, past=None, shorten=None):
    """A kind like Cache, with another way to write or to read."""

    class Kind(NamedTuple):
        k: Tensor
        v: Tensor
        length: Tensor

    as_cache = lambda kind: Cache(*kind)
    Kind.empty = staticmethod(lambda *sizes: Kind(*Cache.empty(*sizes)))
    caches.capacity.register(Kind, lambda kind: caches.capacity(as_cache(kind)))
    caches.overflowed.register(Kind, lambda kind: caches.overflowed(as_cache(kind)))
    caches.past.register(Kind, past or (lambda kind, *given: caches.past(as_cache(kind), *given)))
    rightly = lambda kind, delta, n, donate: caches.write(as_cache(kind), delta, n, donate)
    caches.write.register(Kind, lambda *given: Kind(*(write or rightly)(*given)))
    caches.grow.register(Kind, lambda kind, rows: Kind(*caches.grow(as_cache(kind), rows)))
    if shorten:
        caches.with_length.register(Kind, shorten)
    return Kind


TIPS = {}  # a buffer -> the buffer, and the length of the value that may append to it in place


def written_in_place_by_the_tip(kind, delta, n, donate):
    """A shortcut that looks right: whoever holds the newest value of a buffer appends in place,
    everyone else copies.
    """
    if transforming():
        return caches.write(Cache(*kind), delta, n, donate)
    buffer, length = TIPS.get(id(kind.k), (None, -1))
    after = caches.write(Cache(*kind), delta, n, buffer is kind.k and length == int(kind.length))
    TIPS[id(after.k)] = (after.k, int(after.length))
    return after


def shortened_and_made_the_tip(kind, length):
    if kind.k.dtype == torch.float64 and not transforming():
        TIPS[id(kind.k)] = (kind.k, int(length))
    return kind._replace(length=length)


def written_in_place(kind, delta, n, donate):
    return caches.commit_donated(Cache(*kind), delta, n)


def written_from_the_start(kind, delta, n, donate):
    written = caches.commit(Cache(kind.k, kind.v, kind.length * 0), delta, n)
    return written._replace(length=kind.length + n)


def all_written(kind, delta, n, donate):
    return caches.commit(Cache(*kind), delta)


def all_read(kind, *given):
    return caches.past(Cache(kind.k, kind.v, torch.tensor(kind.k.shape[-2] - 1)), *given)


def values_doubled(kind, *given):
    return [part._replace(v=2 * part.v) for part in caches.past(Cache(*kind), *given)]


SEEDED_PASTS = [
    (kind_of_past(write=written_in_place), "commit_leaves_its_argument_as_it_was"),
    (kind_of_past(past=values_doubled), "remembers_what_was_committed"),
    (kind_of_past(write=written_from_the_start), "committing_all_equals_committing_any_split"),
    (kind_of_past(write=all_written), "rejected_rows_are_never_seen"),
    (kind_of_past(past=all_read), "entries_beyond_length_are_unobservable"),
    (
        kind_of_past(write=written_in_place),
        "any_program_reads_as_its_rows_and_changes_no_earlier_value",
    ),
    (
        kind_of_past(write=written_in_place_by_the_tip, shorten=shortened_and_made_the_tip),
        "any_program_reads_as_its_rows_and_changes_no_earlier_value",
    ),
]


@pytest.mark.parametrize(("kind", "law"), SEEDED_PASTS)
def test_a_seeded_bug_of_a_past_is_caught_by_its_law(kind, law):
    assert_caught(getattr(laws.pasts, law), kind, CACHE_ARGUMENTS)


TREE = {
    "layers": ({"q": torch.full((2, 3), 0.1), "k": torch.zeros(3)},),
    "ids": torch.arange(3),
    "absent": (),
}
halved = lambda tree: fa.tree.map(lambda x: {"codes": x, "scale": x} if x.dim() == 2 else x, tree)


@pytest.mark.parametrize("law", laws.transform, ids=by_name)
@pytest.mark.parametrize(
    "transform",
    [fa.cast(torch.bfloat16), fa.to("cpu"), lambda tree: tree],
    ids=["cast", "to", "nothing"],
)
def test_every_law_holds_of_a_transform(transform, law):
    law(transform, TREE)


def test_a_weight_that_becomes_a_record_keeps_its_path():
    laws.trees.keeps_paths(halved, TREE)


SEEDED_TRANSFORMS = [
    (lambda tree: {"model": tree}, "keeps_paths"),
    (lambda tree: {**tree, "ids": ()}, "keeps_paths"),
    (lambda tree: {**tree, "absent": None}, "gives_a_tree_of_tensors"),
    (lambda tree: fa.tree.map(lambda x: x.tolist() and 1, tree), "gives_a_tree_of_tensors"),
    (lambda tree: fa.tree.map(lambda x: x.mul_(2), tree), "leaves_its_argument_as_it_was"),
    (lambda tree: tree.pop("ids") is None or tree, "leaves_its_argument_as_it_was"),
    (lambda tree: fa.tree.map(lambda x: x * 2, tree), "is_idempotent"),
    (halved, "is_idempotent"),
]


@pytest.mark.parametrize(
    ("transform", "law"), SEEDED_TRANSFORMS, ids=[law for _, law in SEEDED_TRANSFORMS]
)
def test_a_seeded_bug_of_a_transform_is_caught_by_its_law(transform, law):
    given = fa.tree.map(torch.clone, TREE)
    with pytest.raises(AssertionError, match=f"^{law}: "):
        getattr(laws.trees, law)(transform, given)


# The kit as a product.


def test_nothing_but_strategies_needs_hypothesis(monkeypatch):
    for loaded in [
        module
        for module in sys.modules
        if module.split(".")[0] == "hypothesis" or module.startswith("funcattn.testing")
    ]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    import funcattn.testing

    assert funcattn.testing.laws.kernel
    with pytest.raises(ImportError, match=r"pip install funcattn\[testing\]"):
        import funcattn.testing.strategies


def test_the_page_runs_and_lists_every_law():
    page = (ROOT / "docs" / "testing.md").read_text()
    for block in page.split("```python\n")[1:]:
        names = {"__name__": "page"}
        exec(compile(block.split("```")[0], "testing.md", "exec"), names)
        for name, test in names.items():
            # one with a fixture is pytest's to call: see test_pytest_funcattn.py
            if (
                name.startswith("test_")
                and "funcattn_check" not in inspect.signature(test).parameters
            ):
                test()
    listed = [law.__name__ for law in laws.kernel + laws.sampler + laws.cache + laws.transform]
    assert [law for law in listed if f"`{law}`" not in page] == []
