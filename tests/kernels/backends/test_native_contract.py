"""Contractions in C++ equal their definition, for any sum of terms, sides, factors and broadcast
axes.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import vjp
from torch.nn.functional import scaled_dot_product_attention

import funcattn as fa
from funcattn import native
from funcattn.kernels import dropout
from funcattn.kernels.backends import native_contract, torch_blocks
from funcattn.kernels.closed import operators
from funcattn.kernels.closed.algebra import (
    ONES,
    Contraction,
    DenseFactor,
    LowRankFactor,
    Output,
    Term,
)
from funcattn.kernels.closed.specs import ContractSpec, TensorSpec

pytestmark = [
    pytest.mark.cpu("the operator in C++ is for the CPU"),
    pytest.mark.skipif(bool(native.load()), reason=native.load() or "built"),
]
EPSILON = torch.finfo(torch.float32).eps
HALF_EPSILON = torch.finfo(torch.bfloat16).eps / 2
NOTHING = float("-inf")
AVX2, AVX512 = 1, 2
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[AVX2, AVX512], ids=["AVX2", "AVX-512"])
def instructions(request):
    if torch.ops.funcattn.instructions(request.param) != request.param:
        pytest.skip("the processor has no AVX-512")
    yield request.param
    torch.ops.funcattn.instructions(-1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few queries and keys, so that small sizes have several of them."""
    monkeypatch.setattr(native_contract, "block_sizes", lambda *_: (13, 32))


def seen_pairs(spec, tensors, T, S):
    """Booleans (*lead, T, S) of the pairs that the mask shows, or None."""
    if not spec.mask:
        return None
    if len(spec.mask) == 1:
        return tensors[spec.mask[0]].expand(*tensors[spec.mask[0]].shape[:-2], T, S)
    start, stop = (tensors[p][..., None] for p in spec.mask)
    key = torch.arange(S)
    return ((start <= key) & (key < stop)).any(-2)


def definition(spec, shapes, tensors, absolute=False):
    """The outputs by their definition, dense in float64.

    With `absolute`, of absolute values, where P counts once more for each unit of its exponent:
    what rounding is multiplied with.
    """
    size = (lambda x: x.abs()) if absolute else (lambda x: x)
    x = [t.double() if t.is_floating_point() else t for t in tensors]
    T, S = x[0].shape[-2], x[1].shape[-2]
    logits, seen, lse = spec.scale * (x[0] @ x[1].mT), seen_pairs(spec, x, T, S), x[2]
    exponent = abs(spec.scale) * (x[0].abs() @ x[1].abs().mT) + lse.abs()
    if spec.bias != ONES:
        logits, exponent = logits + x[spec.bias], exponent + x[spec.bias].abs()
    if seen is not None:
        logits = torch.where(seen, logits, NOTHING)
    far = (lse.abs() > torch_blocks.FAR) & (lse != NOTHING)
    lse = torch.where(far, logits.logsumexp(-1, keepdim=True), lse)
    P = torch.where((lse == NOTHING) | (logits == NOTHING), 0, (logits - lse).exp())
    if spec.dropout != ONES:
        P = P * dropout.keep(tensors[spec.dropout], slice(0, T), slice(0, S), spec.rate).double()
    P = P * (1 + exponent.nan_to_num(0, 0, 0)) if absolute else P

    def summand(s):
        if isinstance(s, DenseFactor):
            return (size(x[s.m]) * size(torch.tensor(s.weight))).expand(*x[s.m].shape[:-2], T, S)
        a = x[s.b].new_ones(1, x[s.b].shape[-1]).expand(T, -1) if s.a == ONES else x[s.a]
        b = x[s.a].new_ones(1, x[s.a].shape[-1]).expand(S, -1) if s.b == ONES else x[s.b]
        return size(torch.tensor(s.weight)) * (size(a) @ size(b).mT)

    outputs = []
    for (side, terms), shape in zip(spec.outputs, shapes, strict=True):
        total = torch.zeros(shape, dtype=torch.float64)
        for factors, value, weight in terms:
            W = P * size(torch.tensor(weight))
            for factor in factors:
                W = W * sum(summand(s) for s in factor)
            if side == "query":
                W = W.sum(-1, keepdim=True) if value == ONES else W @ size(x[value])
            if side == "key":
                W = W.sum(-2).unsqueeze(-1) if value == ONES else W.mT @ size(x[value])
            W = W.reshape((1,) * (len(shape) - W.dim()) + W.shape)
            kept = (1,) * (W.dim() - len(shape)) + tuple(shape)
            extra = [n for n in range(W.dim()) if W.shape[n] != 1 and kept[n] == 1]
            W = W.sum(extra, keepdim=True) if extra else W
            total = total + W.reshape(W.shape[W.dim() - len(shape) :])
        outputs.append(total)
    return outputs


def bounds(spec, shapes, tensors, dtypes=()):
    """What rounding may change: a sum of n terms by n epsilon of the sum of their absolute
    values; of an output that becomes bfloat16, by half of bfloat16's epsilon too, which its weights
    are rounded by.
    """
    lead = math.prod(torch.broadcast_shapes(*[t.shape[:-2] for t in tensors]))
    features = sum(t.shape[-1] for t in tensors if t.is_floating_point())
    # 16: exp, and a few products
    terms = features + (tensors[0].shape[-2] + tensors[1].shape[-2]) * lead + 16
    off = [
        terms * EPSILON + (HALF_EPSILON if dtype == torch.bfloat16 else 0)
        for dtype in dtypes or [torch.float32] * len(shapes)
    ]
    sizes = definition(spec, shapes, tensors, absolute=True)
    return [far * x + 1e-30 for far, x in zip(off, sizes, strict=True)]


def assert_is_definition(spec, shapes, tensors, dtypes=()):
    got = native_contract.contract(spec, shapes, tensors, dtypes)
    wanted = definition(spec, shapes, tensors)
    blocks = torch_blocks.contract(spec, shapes, tensors)
    for one, other, block, bound in zip(
        got, wanted, blocks, bounds(spec, shapes, tensors, dtypes), strict=True
    ):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        assert ((one - other).abs() <= bound).all(), ((one - other).abs() / bound).max()
        assert ((one - block).abs() <= 2 * bound).all(), ((one - block).abs() / bound).max()
    return got


def normal(seed, shape, step=1):
    """Normal numbers whose last axis has a distance of `step`."""
    return fa.random.normal(fa.key(seed), (*shape[:-1], step * shape[-1]))[..., ::step]


class Drawn:
    """A contraction of random terms, with tensors that broadcast along random axes."""

    def __init__(self, draw, biggest=70, kinds=("none", "intervals", "booleans")):
        self.draw, self.tensors, self.seed = draw, [], draw(st.integers(0, 2**20))
        self.floats = draw(
            st.sampled_from([FLOATS[:1], FLOATS[1:], [*FLOATS, torch.bfloat16, torch.bfloat16]])
        )
        size = lambda n: draw(
            st.sampled_from([s for s in (1, 2, 7, 13, 16, 31, 32, 33, 50, 64, 69) if s <= n])
        )
        self.T, self.S, self.D = (
            size(biggest),
            size(biggest),
            draw(st.sampled_from([1, 3, 8, 16, 17, 40])),
        )
        self.lead = draw(st.sampled_from([(), (2,), (3,), (2, 3), (2, 1, 2)]))
        q, k = self.new(self.T, self.D), self.new(self.S, self.D)
        logits = self.tensors[q].float() @ self.tensors[k].float().mT / self.D**0.5
        lse = logits.logsumexp(-1, keepdim=True)
        self.tensors.append(lse + 0.1 * normal(self.next(), lse.shape))  # an independent input
        kind = draw(st.sampled_from(kinds))
        mask, bias = (), ONES
        if kind == "intervals":
            n = draw(st.integers(1, 3))
            edges = [
                torch.randint(
                    0, self.S + 1, (*self.some_lead(), self.T, n), generator=self.generator()
                )
                for _ in range(2)
            ]
            mask = (self.put(edges[0]), self.put(edges[1]))
        elif kind == "booleans":
            rows, columns = draw(st.sampled_from([(self.T, self.S), (1, self.S), (self.T, 1)]))
            mask = (
                self.put(
                    torch.rand(*self.some_lead(), rows, columns, generator=self.generator()) > 0.5
                ),
            )
        if draw(st.booleans()):
            bias = self.pair()
        keys, rate = ONES, draw(st.sampled_from([0.0, 0.25, 0.9]))
        if rate:
            keys = self.put(dropout.head_keys(fa.key(self.next()), self.some_lead()))
        # the factors of all terms are drawn from a few
        factors = [self.factor() for _ in range(draw(st.integers(1, 3)))]
        term = lambda side: Term(
            tuple(draw(st.lists(st.sampled_from(factors), max_size=3))),
            ONES if side == "pair" else draw(st.sampled_from([ONES, self.value(side)])),
            draw(st.sampled_from([1.0, -0.5, 0.25])),
        )
        outputs, self.shapes = [], []
        for side in draw(
            st.lists(st.sampled_from(["query", "key", "pair"]), min_size=1, max_size=4)
        ):
            terms = [term(side) for _ in range(draw(st.integers(1, 3)))]
            # values of an output are of one width
            if any(t.value == ONES for t in terms) or side == "pair":
                terms = [t._replace(value=ONES) for t in terms]
            outputs.append(Output(side, tuple(terms)))
            width = 1 if terms[0].value == ONES else self.D
            last = {
                "query": (self.T, width),
                "key": (self.S, width),
                "pair": draw(st.sampled_from([(self.T, self.S), (1, self.S), (self.T, 1)])),
            }
            self.shapes.append((*self.some_lead(), *last[side]))
        self.spec = Contraction(tuple(outputs), 1 / self.D**0.5, mask, bias, keys, rate)
        self.dtypes = [draw(st.sampled_from(self.floats)) for _ in outputs]

    def next(self):
        self.seed += 1
        return self.seed

    def generator(self):
        return torch.Generator().manual_seed(self.next())

    def some_lead(self):
        return tuple(n if self.draw(st.booleans()) else 1 for n in self.lead)

    def put(self, x):
        self.tensors.append(x)
        return len(self.tensors) - 1

    def new(self, rows, columns):
        step = self.draw(st.sampled_from([1, 1, 2]))
        x = normal(self.next(), (*self.some_lead(), rows, columns), step)
        return self.put(x.to(self.draw(st.sampled_from(self.floats))))

    def pair(self):
        rows, columns = self.draw(st.sampled_from([(self.T, self.S), (1, self.S), (self.T, 1)]))
        x = normal(self.next(), (*self.some_lead(), rows, columns))
        return self.put(self.draw(st.sampled_from([x, x.bfloat16(), x.mT.contiguous().mT])))

    def value(self, side):
        return self.new(self.S if side == "query" else self.T, self.D)

    def factor(self):
        kinds = self.draw(
            st.lists(
                st.sampled_from(["dot", "dot", "row", "column", "dense"]), min_size=1, max_size=3
            )
        )
        weight = self.draw(st.sampled_from([1.0, 0.5, -2.0]))
        made = {
            "dot": lambda: LowRankFactor(self.new(self.T, 5), self.new(self.S, 5), weight),
            "row": lambda: LowRankFactor(self.new(self.T, 2), ONES, weight),
            "column": lambda: LowRankFactor(ONES, self.new(self.S, 2), weight),
            "dense": lambda: DenseFactor(self.pair(), weight),
        }
        return tuple(made[kind]() for kind in kinds)


@st.composite
def contractions(draw, **options):
    return Drawn(draw, **options)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=contractions())
def test_random_contractions_are_their_definition(instructions, small_blocks, drawn):
    spec, tensors = drawn.spec, drawn.tensors
    assert native_contract.why_not_contract(spec, tensors) == ""
    assert_is_definition(spec, drawn.shapes, tensors, drawn.dtypes)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=contractions())
def test_runs_are_equal_in_every_bit_and_near_for_any_number_of_threads(small_blocks, drawn):
    spec, tensors = drawn.spec, drawn.tensors
    run = lambda: native_contract.contract(spec, drawn.shapes, tensors, drawn.dtypes)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads], again = run(), run()
            assert all(map(torch.equal, found[threads], again))
    finally:
        torch.set_num_threads(before)
    for bound, one, two, three in zip(
        bounds(spec, drawn.shapes, tensors, drawn.dtypes), *found.values(), strict=True
    ):
        assert ((one - two).abs() <= 2 * bound).all()
        assert ((one - three).abs() <= 2 * bound).all()


def first_gradient(T, S, D, dtype=torch.float32, heads=4, kv_heads=2, mask=()):
    """The contraction of the gradients of q, k and v, as attention makes it, with grouped heads."""
    q, g = (
        normal(0, (heads // kv_heads, kv_heads, T, D)),
        normal(1, (heads // kv_heads, kv_heads, T, D)),
    )
    k, v = normal(2, (kv_heads, S, D)), normal(3, (kv_heads, S, D))
    scale = D**-0.5
    logits = scale * q @ k.mT
    if mask:
        logits = torch.where(
            seen_pairs(Contraction((), mask=(0, 1)[: len(mask)]), mask, T, S), logits, NOTHING
        )
    lse = logits.logsumexp(-1, keepdim=True)
    out = (logits - lse).exp().nan_to_num() @ v
    delta = -(g * out).sum(-1, keepdim=True)
    tensors = [x.to(dtype) for x in (q, k)] + [lse] + [x.to(dtype) for x in (v, g)] + [delta, *mask]
    x = (LowRankFactor(4, 3), LowRankFactor(5, ONES))
    outputs = (
        Output("query", (Term((x,), 1, scale),)),
        Output("key", (Term((x,), 0, scale),)),
        Output("key", (Term((), 4),)),
    )
    spec = Contraction(outputs, scale, tuple(range(6, 6 + len(mask))))
    return spec, [q.shape, k.shape, v.shape], tensors


def causal(T, S):
    stop = torch.arange(1, T + 1).clamp(max=S)[:, None]
    return torch.zeros_like(stop), stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [(), causal(150, 301)], ids=["full", "causal"])
def test_blocks_of_their_own_size_are_the_definition(instructions, dtype, mask):
    assert_is_definition(*first_gradient(150, 301, 64, dtype, mask=mask), [dtype] * 3)


@pytest.mark.parametrize("size", [1, 4])
def test_gradients_in_bfloat16_are_as_near_as_those_of_torch(size):
    q, k, v, g = (normal(n, (1, 2, 300, 64)).mul(size).bfloat16() for n in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = torch.autograd.grad(scaled_dot_product_attention(*leaves), leaves, g)
    ours = vjp(lambda *x: fa.attention(*x, kernel="native"), q, k, v)[1](g)
    dense = lambda q, k, v: (q @ k.mT / 8).softmax(-1) @ v
    exact = vjp(dense, *(x.double() for x in (q, k, v)))[1](g.double())
    for mine, other, one in zip(ours, theirs, exact, strict=True):
        # 1.25: both round weights and results to bfloat16, at other places
        assert (mine - one).norm() <= 1.25 * (other - one).norm()


def test_heads_of_a_group_and_broadcast_examples_are_summed_in_the_outputs_that_lack_them(
    instructions, small_blocks
):
    spec, _, tensors = first_gradient(30, 40, 8)
    tensors[0] = tensors[0].expand(3, *tensors[0].shape)  # an axis of stride zero, which keys lack
    got = assert_is_definition(spec, [tensors[0].shape, (2, 40, 8), (2, 40, 8)], tensors)
    assert got[0].shape == (3, 2, 2, 30, 8)


def test_an_axis_that_a_term_and_its_output_lack_counts_once(small_blocks):
    q, k, c, d = normal(0, (5, 4)), normal(1, (6, 4)), normal(2, (3, 6, 4)), normal(3, (6, 4))
    lse = (q @ k.mT).logsumexp(-1, keepdim=True)
    both = Output("query", (Term((), 3), Term((), 4), Term(((LowRankFactor(0, 3),),), 4)))
    once, many = Output("query", (Term((), 4),)), Output("query", (Term((), 3),))
    shapes = [(5, 4), (5, 4), (3, 5, 4), (3, 5, 4)]
    assert_is_definition(Contraction((both, once, many, once)), shapes, [q, k, lse, c, d])


@pytest.mark.parametrize("level", [600.0, -1e4])
def test_rows_of_a_large_lse_have_weights_that_sum_to_one(instructions, small_blocks, level):
    q, k = normal(0, (2, 40, 8)), normal(1, (70, 8))
    bias = torch.zeros(40, 70)
    bias[3:9] = level
    bias[5, :50] = NOTHING
    lse = (q @ k.mT + bias).logsumexp(-1, keepdim=True)
    spec = Contraction((Output("query", (Term(()),)), Output("key", (Term((), 0),))), bias=3)
    total, _ = assert_is_definition(spec, [(2, 40, 1), (70, 8)], [q, k, lse, bias])
    # S - max is rounded to epsilon times the level, so weights are off by as much
    torch.testing.assert_close(total[:, 3:9], torch.ones(2, 6, 1), atol=70 * EPSILON, rtol=0)


def test_queries_that_see_nothing_have_no_weights(instructions, small_blocks):
    start, stop = causal(40, 50)
    start[10:20] = stop[10:20]
    spec, shapes, tensors = first_gradient(40, 50, 8, mask=(start, stop))
    tensors[2] = tensors[2].nan_to_num(neginf=NOTHING)
    assert (tensors[2][..., 10:20, :] == NOTHING).all()
    tensors[5] = tensors[5].nan_to_num()
    dq, *_ = assert_is_definition(spec, shapes, tensors)
    assert (dq[..., 10:20, :] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hidden_key_that_is_not_finite_is_unread_or_for_another_backend(small_blocks, bad):
    spec, shapes, tensors = first_gradient(40, 50, 8, mask=causal(40, 50))
    wanted = native_contract.contract(spec, shapes, tensors)
    for place in (1, 3):
        tensors[place][:, 40:] = bad  # seen by no query
    assert all(map(torch.equal, native_contract.contract(spec, shapes, tensors), wanted))
    tensors[1][:, 39] = bad  # seen by the last query alone
    assert native_contract.contract(spec, shapes, tensors) is None


def test_a_number_that_is_not_finite_is_for_another_backend():
    spec, shapes, tensors = first_gradient(40, 50, 8)
    tensors[1][0, 3] = float("nan")
    assert native_contract.contract(spec, shapes, tensors) is None
    likes = [TensorSpec(tuple(s), torch.float32) for s in shapes]
    dq, dk, _ = operators.contract(ContractSpec(spec, tuple(likes), "native"), tensors)
    assert dq[:, 0].isnan().all()
    assert dk[0, 3].isnan().all()
    assert dk[0, :3].isfinite().all()
    assert dq[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_logit_that_overflows_is_for_another_backend(dtype):
    spec, shapes, tensors = first_gradient(40, 50, 8, dtype)
    tensors[0][..., 0], tensors[1][..., 0] = 0, 0
    assert native_contract.contract(spec, shapes, tensors) is not None
    tensors[0][..., 7, 0], tensors[1][:, 9, 0] = 1e20, -1e20  # a logit of -inf, others as before
    assert native_contract.contract(spec, shapes, tensors) is None


def test_a_second_derivative_is_ten_products_of_four_matrices():
    """jvp of the gradient of attention: S; g . v; dq . k + q . dk; g . dv; and five sums."""
    x, y, z = (
        (LowRankFactor(4, 3), LowRankFactor(5, ONES)),
        (LowRankFactor(6, 1), LowRankFactor(0, 7), LowRankFactor(8, ONES)),
        (LowRankFactor(4, 9), LowRankFactor(10, ONES)),
    )
    terms = lambda c, d: (Term((x, y), c), Term((z,), c), Term((x,), d))
    outputs = (
        Output("query", terms(1, 7)),
        Output("key", terms(0, 6)),
        Output("key", (Term((y,), 4),)),
    )
    numbers, weights, buffers = native_contract.program(Contraction(outputs), (1,) * 11, (1,) * 3)
    assert buffers == 4
    described = native_contract._Compiler(Contraction(outputs), (1,) * 11, (1,) * 3)
    described.compile()
    assert sum(len(described._factor(f)[0]) for f in described.factors) == 5
    assert len(described.sums) == 3
    assert numbers[-1 - 4 * 5] == 5  # sinks, each of four numbers


REASONS = {
    "float64": (lambda spec, x: (spec, [t.double() for t in x]), "computes in float32"),
    "meta": (lambda spec, x: (spec, [t.to("meta") for t in x]), "for the CPU"),
    "empty": (lambda spec, x: (spec, [x[0][..., :0, :], *x[1:]]), "size is zero"),
    "axes": (
        lambda spec, x: (spec, [x[0].reshape((1,) * 20 + x[0].shape), *x[1:]]),
        "leading axes",
    ),
    "rows": (lambda spec, x: (spec, [*x[:3], x[3][..., :7, :], *x[4:]]), "as many rows"),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
def test_what_it_does_not_compute_has_a_reason(change, reason):
    spec, _, tensors = first_gradient(8, 9, 4)
    assert reason in native_contract.why_not_contract(*change(spec, tensors))


def test_a_program_that_does_not_fit_its_tensors_is_an_error():
    spec, shapes, tensors = first_gradient(8, 9, 4)
    with pytest.raises(RuntimeError, match="equal features"):
        native_contract.contract(spec, shapes, [*tensors[:3], tensors[3][..., :3], *tensors[4:]])
    with pytest.raises(RuntimeError, match="outputs as wide as values"):
        native_contract.contract(spec, [(*shapes[0][:-1], 3), *shapes[1:]], tensors)
    with pytest.raises(RuntimeError, match="rows of floats"):
        native_contract.contract(spec, shapes, [*tensors[:3], tensors[3][..., :7, :], *tensors[4:]])
    with pytest.raises(RuntimeError, match="leading axes"):
        native_contract.contract(spec, shapes, [*tensors[:3], normal(0, (3, 9, 4)), *tensors[4:]])
