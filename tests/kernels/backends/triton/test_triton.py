"""The kernels written in Triton: on a GPU where there is one, else on CPU under Triton's
interpreter; the same tests.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from places import TESTS
from torch.func import grad, hessian, jvp

import funcattn as fa
from funcattn import masks
from funcattn.kernels.backends import torch_attend, torch_blocks
from funcattn.kernels.closed import operators, specs
from funcattn.kernels.closed.algebra import ONES, Contraction, K, LowRankFactor, Output, Q, Term
from funcattn.masks import Mask
from funcattn.records import Attended
from funcattn.testing import laws, strategies

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from funcattn.kernels.backends.triton import conditions, launching, tuning

# Rows of a block that lie behind the last key have no logits that the log-sum-exp knows of; they
# are never stored.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.real("Triton knows no device that is pretended"),
]

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ROUNDING = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The smallest blocks a matrix product takes, 16 x 16, so that small inputs cross several."""
    monkeypatch.setattr(tuning, "of_attend", lambda q, v: (tuning.SMALLEST,))
    of_attend_jvp = tuning.of_attend_jvp
    monkeypatch.setattr(
        tuning, "of_attend_jvp", lambda q, v: of_attend_jvp(q, v) and (tuning.SMALLEST,)
    )
    monkeypatch.setattr(tuning, "of_contract", lambda program, q: (tuning.SMALLEST,))


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    """Triton's interpreter patches its language at every call of a device function, half of its
    time; once a launch will do.
    """
    if GPU:
        return
    from triton.runtime import interpreter

    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    done = set()

    def once(function):
        names = frozenset(
            name for name in ("tl", "core", "language") if name in function.__globals__
        )
        if names in done:
            return interpreter._LangPatchScope()
        done.add(names)
        return patch(function)

    monkeypatch.setattr(interpreter, "_patch_lang", once)
    monkeypatch.setattr(
        interpreter._LangPatchScope, "restore", lambda scope: (done.clear(), restore(scope))[1]
    )


def normal(number: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return fa.random.normal(fa.key(number), shape).to(dtype)


def kernel(q, k, v, mask=None, **options):
    """attend by Triton where Triton runs, for inputs and results on CPU."""
    there = fa.to(DEVICE)
    out, lse = fa.attend(
        *(x.to(DEVICE) for x in (q, k, v)),
        None if mask is None else there(mask),
        kernel="triton",
        **options,
    )
    return Attended(out.cpu(), lse.cpu())


def attention(q, k, v, mask=None, **options):
    """attention by Triton, likewise."""
    moved = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    mask = None if mask is None else fa.to(DEVICE)(mask)
    return fa.attention(*(x.to(DEVICE) for x in (q, k, v)), mask, kernel="triton", **moved).cpu()


# The laws of every kernel, on small shapes of any kind and on one of several blocks.


def several_blocks(dtype: torch.dtype = torch.float32) -> strategies.Problem:
    """20 queries, 37 keys, two query heads on one key; a window and sinks (two intervals), and a
    query that sees nothing.
    """
    T, S = 20, 37
    mask = masks.causal(T, offset=17) & (masks.window(T, 9, offset=17) | masks.sinks(T, 2))
    row = torch.arange(T).unsqueeze(-1) == 3
    mask = Mask(torch.where(row, 0, mask.start), torch.where(row, 0, mask.stop))
    q, k, v = (
        normal(1, 2, T, 5, dtype=dtype),
        normal(2, 1, S, 5, dtype=dtype),
        normal(3, 1, S, 18, dtype=dtype),
    )
    return strategies.Problem(q, k, v, mask, fa.key(4))


# Minutes under the interpreter; what they add to the others is in the layers above, which all
# backends share.
LONG = {
    "commutes_with_vmap",
    "masked_rows_are_zero_with_zero_gradients",
    "masked_rows_have_zero_tangents",
    "merge_of_any_split_is_the_whole",
    "order_of_keys_does_not_matter",
}
LAWS = [
    pytest.param(law, marks=pytest.mark.slow if law.__name__ in LONG else ()) for law in laws.kernel
]
named = lambda law: law.__name__
AGREE = [law for law in laws.kernel if "agrees" in law.__name__]


@pytest.mark.parametrize("law", LAWS, ids=named)
def test_every_law_holds_over_several_blocks(law):
    law(kernel, *several_blocks())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    "law",
    [pytest.param(law, marks=pytest.mark.slow if "hvp" in law.__name__ else ()) for law in AGREE],
    ids=named,
)
def test_narrow_dtypes_agree_within_their_rounding(law, dtype):
    law(kernel, *several_blocks(dtype))


@pytest.mark.parametrize(
    "law",
    [pytest.param(x, marks=() if x in AGREE else pytest.mark.slow) for x in laws.kernel],
    ids=named,
)
def test_every_law_holds_of_small_shapes(law):
    small = strategies.problems(dtype=torch.float32, leads=1, no_keys=True, booleans=False)

    @settings(
        max_examples=30 if GPU else 2,
        phases=[Phase.generate, Phase.shrink] if GPU else [Phase.generate],
    )
    @given(small)
    def run(problem):
        law(kernel, *problem)

    run()


# The two primitives, against blocks of torch operations in float64.

MASKS = {
    "none": lambda T, S: (),
    "causal": lambda T, S: masks.causal(T, S, offset=-3),
    "two intervals": lambda T, S: (
        masks.causal(T, offset=9) & (masks.window(T, 9, offset=9) | masks.sinks(T, 3))
    ),
    "overlapping and unsorted": lambda T, S: tuple(
        torch.tensor([[9, 0, 30]]).expand(T, 3) + n * 8 for n in (0, 1)
    ),
    "no interval": lambda T, S: tuple(torch.zeros(T, 0, dtype=torch.int64) for _ in range(2)),
}


def close(found, wanted, terms: int):
    """Sums of as many terms, each rounded a few times, relative to the largest of the results."""
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert torch.equal(x.cpu().isinf(), y.isinf())
        if not y.numel():
            continue
        y = torch.where(y.isinf(), 0, y)
        x = torch.where(x.isinf(), 0, x).cpu()
        assert (x - y).abs().max().item() <= terms * ROUNDING * max(1.0, y.abs().max().item())


def there(tensors):
    return [x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize(
    "leads", [((2,), (2,)), ((2, 3), (2, 1)), ((3, 1, 2), (2, 2)), ((), (2,))], ids=str
)
@pytest.mark.parametrize("mask", MASKS)
def test_attend_is_that_of_blocks(mask, leads):
    if leads != ((2, 3), (2, 1)) and mask not in ("none", "causal"):
        return
    (T, S), m = (20, 37), list(MASKS[mask](20, 37))
    q, k, v = normal(1, *leads[0], T, 5), normal(2, *leads[1], S, 5), normal(3, *leads[1], S, 17)
    found = launching.attend(*there([q, k, v]), there(m), 0.3)
    close(found, torch_attend.attend(q.double(), k.double(), v.double(), m, None, 0.3), S)


@pytest.mark.parametrize("scale", [-0.3, 0.0, -0.0, 1e-40])
def test_the_scale_may_have_any_sign(scale):
    """The kernel takes the greatest product of a row before the scale; some queries see nothing."""
    (T, S), m = (20, 37), list(MASKS["causal"](20, 37))
    q, k, v = normal(1, 1, T, 5).expand(2, T, 5), normal(2, 1, S, 5), normal(3, 2, S, 5)
    found = launching.attend(*there([q, k, v]), there(m), scale)
    close(found, torch_attend.attend(q.double(), k.double(), v.double(), m, None, scale), S)


@pytest.mark.parametrize("moved", range(1, 8))
@pytest.mark.parametrize("mask", ["none", "two intervals"])
def test_a_push_is_the_value_and_the_jvp_of_blocks(mask, moved):
    """Tangents of any of q, k and v, also where they alone have an axis, and a negative scale."""
    (T, S), m = (20, 37), list(MASKS[mask](20, 37))
    q, k, v = normal(1, 2, T, 5), normal(2, 1, S, 5), normal(3, 1, S, 17)
    dq, dk, dv = normal(4, 3, 2, T, 5), normal(5, 1, S, 5), normal(6, 2, S, 17)
    tangents = [x if moved >> n & 1 else None for n, x in enumerate((dq, dk, dv))]
    found = launching.attend_jvp(
        *there([q, k, v]), [None if x is None else x.to(DEVICE) for x in tangents], there(m), -0.3
    )
    wide = lambda x: x.double() if x.is_floating_point() else x
    there_are = [wide(x) for x in tangents if x is not None]
    plan = specs.AttendSpec(-0.3, len(m))
    close(
        found,
        operators.attend_jvp(
            plan, [x is not None for x in tangents], [*map(wide, (q, k, v)), *m, *there_are]
        ),
        8 * S,
    )


def launched(monkeypatch, program) -> list[str]:
    """The names of the kernels that a program starts, in order."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names, kind = [], JITFunction if GPU else InterpretedFunction
    run = kind.run
    monkeypatch.setattr(
        kind, "run", lambda self, *x, **y: (names.append(self.fn.__name__), run(self, *x, **y))[1]
    )
    program()
    return names


def test_a_jvp_is_one_launch(monkeypatch):
    q, k, v = (
        x.to(DEVICE) for x in (normal(1, 2, 20, 5), normal(2, 1, 37, 5), normal(3, 1, 37, 17))
    )
    f = lambda q, k, v: fa.attention(q, k, v, kernel="triton")
    assert launched(monkeypatch, lambda: jvp(f, (q, k, v), (q, k, v))) == ["attend"]
    assert launched(monkeypatch, lambda: jvp(lambda k: f(q, k, v), (k,), (k,))) == ["attend"]
    assert launched(monkeypatch, lambda: f(q, k, v)) == ["attend"]
    wide = tuple(torch.cat([x] * 14, -1).bfloat16() for x in (q, k, v))
    assert launched(monkeypatch, lambda: jvp(f, wide, wide)) == ["attend", "statistics", "contract"]


def test_a_kernel_reads_no_numbers_that_torch_has_yet_to_make():
    """A view that is to be negated, and zeros that are not stored."""
    q, k, v = normal(1, 2, 20, 5), normal(2, 2, 37, 5), normal(3, 2, 37, 5)
    negated, zeros = torch._neg_view(q), torch._efficientzerotensor(q.shape)
    f = lambda q: (attention(q, k, v), grad(lambda q: attention(q, k, v).sin().sum())(q))
    close(f(negated), f(-q), 1)
    close(f(zeros), f(torch.zeros_like(q)), 1)
    plan = specs.AttendSpec(kernel="triton")
    on_device = [x.to(DEVICE) for x in (q, k, v)]
    pushed = lambda dq: [
        x.cpu() for x in operators.attend_jvp(plan, [True, False, False], [*on_device, dq])
    ]
    close(pushed(torch._neg_view(on_device[0])), pushed(-on_device[0]), 1)
    close(
        pushed(torch._efficientzerotensor(q.shape, device=DEVICE)),
        pushed(torch.zeros_like(on_device[0])),
        1,
    )


@pytest.mark.parametrize(("lead", "T", "S"), [(2, 0, 7), (2, 5, 0), (0, 5, 7)])
def test_nothing_to_attend_has_derivatives(lead, T, S):
    q, k, v = (normal(n, lead, 2, rows, 3).to(DEVICE) for n, rows in ((1, T), (2, S), (3, S)))
    loss = lambda *x: fa.attention(*x, kernel="triton").sin().sum()
    for found in (grad(loss, (0, 1, 2)), grad(lambda *x: jvp(loss, x, x)[1], (0, 1, 2))):
        assert all(
            torch.equal(x, torch.zeros_like(y))
            for x, y in zip(found(q, k, v), (q, k, v), strict=True)
        )


def contractions(at: int) -> dict[str, tuple[Output, ...]]:
    """By the number of factors, on both sides; places: q, k, lse, mask, from `at` v, g, a (T, 1),
    tangents of q, k, v.
    """
    v, g, level, dq, dk, dv = range(at, at + 6)
    x, dS = (
        (LowRankFactor(g, v), LowRankFactor(level, ONES, -1.0)),
        (LowRankFactor(dq, K, 0.3), LowRankFactor(Q, dk, 0.3)),
    )
    return {
        "no factor": (
            Output("query", (Term((), v),)),
            Output("query", (Term(()),)),
            Output("key", (Term((), g),)),
        ),
        "one factor": (
            Output("query", (Term((x,), K, 0.3),)),
            Output("key", (Term((x,), Q, 0.3),)),
            Output("key", (Term((), g),)),
        ),
        "two factors": (
            Output(
                "query",
                (
                    Term((dS, x), K, 0.3),
                    Term((x,), dk, 0.3),
                    Term(((LowRankFactor(g, dv),),), K, 0.3),
                ),
            ),
            Output("key", (Term((dS, x), Q, 0.3), Term((x,), dq, 0.3), Term((), dq))),
            Output("key", (Term((dS,), g), Term((dS, dS), g, -1.0))),
            Output("key", (Term((dS, x), level),)),
            Output("query", (Term((dS,)), Term((dS, x), ONES, 2.0))),
        ),
    }


@pytest.mark.parametrize("order", ["no factor", "one factor", "two factors"])
@pytest.mark.parametrize(
    "mask", ["none", pytest.param("causal", marks=pytest.mark.slow), "two intervals"]
)
@pytest.mark.parametrize(("leads", "dropped"), [((2, 2), False), ((), True)], ids=str)
def test_both_contractions_are_those_of_blocks(order, mask, leads, dropped):
    (T, S), m, of_key = (20, 37), list(MASKS[mask](20, 37)), leads[:1] + (1,) * len(leads[1:])
    q, k, v = normal(1, *leads, T, 5), normal(2, *of_key, S, 5), normal(3, *of_key, S, 7)
    lse = torch_attend.attend(q.double(), k.double(), v.double(), m, None, 0.3)[1].float()
    x = [q, k, lse, *m, v, normal(4, *leads, T, 7), normal(5, *leads, T, 1)]
    x += [normal(6, *leads, T, 5), normal(7, *of_key, S, 5), normal(8, *of_key, S, 7)]
    spec = Contraction(contractions(3 + len(m))[order], 0.3, tuple(range(3, 3 + len(m))))
    if dropped:
        spec = spec._replace(dropout=len(x), rate=0.3)
        x.append(fa.key(9).reshape(1, 2))
    sides = {"query": (*leads, T), "key": (*of_key, S)}
    width = lambda output: (
        1 if output.terms[0].value == ONES else x[output.terms[0].value].shape[-1]
    )
    shapes = [(*sides[output.side], width(output)) for output in spec.outputs]
    assert not conditions.why_not_contract(spec, there(x))
    found = launching.contract(spec, shapes, there(x), [torch.float32] * len(shapes))
    wide = [y.double() if y.is_floating_point() else y for y in x]
    # a factor is itself a sum over features
    close(found, torch_blocks.contract(spec, shapes, wide), 8 * S)


def test_an_axis_that_an_output_lacks_is_summed_once_for_each_term_that_has_it():
    """Values alone have an axis: the first term lacks it, the second does not, and the output has
    none.
    """
    (T, S), three = (5, 7), 3
    q, k, c = normal(1, 2, T, 4), normal(2, 2, S, 4), normal(3, three, 1, S, 4)
    lse = torch_attend.attend(q.double(), k.double(), k.double(), (), None, 0.3)[1].float()
    spec = Contraction((Output("query", (Term((), K), Term((), 3))),), 0.3)
    found = launching.contract(spec, [q.shape], there([q, k, lse, c]), [torch.float32])
    close(
        found, torch_blocks.contract(spec, [q.shape], [x.double() for x in (q, k, lse, c)]), 3 * S
    )


def test_blocks_that_nobody_sees_are_not_read():
    """Keys and values of the first and the last block are NaN, which a product with a weight of
    zero would not hide.
    """
    T, S, seen = 20, 48, slice(16, 32)
    q, k, v = normal(1, 1, T, 5), normal(2, 1, S, 5), normal(3, 1, S, 5)
    m = Mask(torch.full((T, 1), seen.start), torch.full((T, 1), seen.stop))
    hide = lambda x: torch.where((torch.arange(S) // 16 == 1).unsqueeze(-1), x, float("nan"))
    of = lambda q, k, v, m: grad(lambda *x: attention(*x, m).sin().sum(), (0, 1, 2))(q, k, v)
    found, wanted = of(q, hide(k), hide(v), m), of(q, k[:, seen], v[:, seen], None)
    close([found[0], *(x[:, seen] for x in found[1:])], wanted, 1)
    assert not any(x[:, :16].any() or x[:, 32:].any() for x in found[1:])


@pytest.mark.parametrize("level", [1e30])
def test_the_level_of_a_row_changes_no_value_and_no_derivative(level):
    """The first query and the last feature of the keys make it; the other queries do not see that
    feature.
    """
    T, S, size = 20, 37, abs(level) ** 0.5
    q, k, v, t = normal(1, 2, T, 5), normal(2, 1, S, 5), normal(3, 1, S, 18), normal(4, 1, S, 18)
    q[:, 0], q[..., -1], k[..., -1] = 0, 0, size
    flat = q.double(), k.double(), v.double()
    q[:, 0, -1] = level / size
    m = masks.causal(T, offset=17) & (masks.window(T, 9, offset=17) | masks.sinks(T, 2))
    slope = lambda f, x: grad(lambda v: f(*x[:2], v, m).sin().sum())
    found = jvp(slope(attention, (q, k)), (v,), (t,))
    close(found, jvp(slope(fa.attention, flat), (flat[2],), (t.double(),)), 8 * S)
    of = lambda f, x: [y[..., :-1] for y in grad(lambda *x: f(*x, m).sin().sum(), (0, 1))(*x)]
    close(of(attention, (q, k, v)), of(fa.attention, flat), 8 * S)


def test_nan_that_a_query_does_not_see_reaches_nothing_of_it():
    """Keys, values and their tangents within a block that is seen in part; and a query that sees
    nothing.
    """
    T, S, blind = 20, 24, 3
    q, k, v, dq, dk, dv = (normal(n, 1, rows, 5) for n, rows in enumerate((T, S, S, T, S, S)))
    stop = torch.where(torch.arange(T) == blind, 0, 20).unsqueeze(-1)
    m = Mask(torch.zeros_like(stop), stop)
    hide = lambda x, rows: torch.where(rows.unsqueeze(-1), float("nan"), x)
    tail, row = torch.arange(S) >= 20, torch.arange(T) == blind
    bad = (
        [hide(x, row if len(x[0]) == T else tail) for x in (q, k, v)],
        [hide(x, row if len(x[0]) == T else tail) for x in (dq, dk, dv)],
    )
    loss = grad(lambda *x: attention(*x, m).sin().sum(), (0, 1, 2))
    zero = lambda xs: [torch.where(x.isfinite(), x, 0) for x in xs]
    for run in (
        lambda x, t: jvp(lambda *x: attention(*x, m), tuple(x), tuple(t)),
        lambda x, t: sum(jvp(loss, tuple(x), tuple(t)), ()),
    ):
        found = run(*bad)
        assert all(x.isfinite().all() for x in found)
        close(found, run(*map(zero, bad)), 1)
    k[:, 10], v[:, 12] = float("nan"), float("inf")
    causal = masks.causal(T)
    found = attention(q, k, v, causal)
    assert found[:, :10].isfinite().all()
    assert not found[:, 12:].isfinite().any()
    slope = grad(lambda q: attention(q, k, v, causal)[:, :10].sin().sum())(q)
    assert slope[:, :10].isfinite().all()


def test_shared_keys_are_never_expanded(monkeypatch):
    """64 query heads over one key head of 256 KB: nothing as large as two of them is allocated."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [
                x.untyped_storage().nbytes()
                for x in torch.utils._pytree.tree_leaves(out)
                if isinstance(x, torch.Tensor)
            ]
            Largest.size = max([Largest.size, *sizes])
            return out

    q, k, v = (
        torch.zeros(64, 1, 8, device=DEVICE),
        torch.zeros(1, 2**13, 8, device=DEVICE),
        torch.zeros(1, 2**13, 8, device=DEVICE),
    )
    seen = [x.to(DEVICE) for x in masks.prefix(1, 20)]
    with Largest():
        launching.attend(q, k, v, seen, 0.3)
    assert Largest.size < 2 * k.nbytes


def test_dropout_drops_the_same_pairs_as_the_reference():
    T, S = 5, 18
    # so that the output is the weights
    q, k, v = normal(1, 2, T, 5), normal(2, 1, S, 5), torch.eye(S).unsqueeze(0)
    drop = {"dropout": 0.4, "key": fa.key(3)}
    found, wanted = attention(q, k, v, **drop), fa.attention(q, k, v, kernel="reference", **drop)
    assert torch.equal(found == 0, wanted == 0)
    close([found], [wanted], S)
    of = lambda f: grad(lambda q, k, v: f(q, k, v, **drop).sin().sum(), (0, 1, 2))(q, k, v)
    close(
        of(attention),
        of(lambda q, k, v, **drop: fa.attention(q, k, v, kernel="reference", **drop)),
        8 * S,
    )


def test_the_scale_may_be_a_tensor():
    q, k, v = normal(1, 2, 20, 5), normal(2, 2, 20, 5), normal(3, 2, 20, 5)
    of = lambda f: hessian(lambda scale: f(q, k, v, scale=scale).sin().sum())(torch.tensor(0.4))
    close([of(attention)], [of(lambda *x, **y: fa.attention(*x, kernel="reference", **y))], 64 * 20)


@pytest.mark.slow  # of interest on a GPU, where an order of additions could change
def test_the_same_inputs_give_the_same_bits():
    problem = several_blocks()
    loss = lambda q, k, v: kernel(q, k, v, problem.mask).out.sin().sum()
    first, second = (grad(loss, (0, 1, 2))(*problem[:3]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(("T", "S"), [(0, 3), (3, 0), (1, 1)])
def test_there_may_be_no_queries_no_keys_or_one(T, S):
    q, k, v = normal(1, 2, T, 5), normal(2, 2, S, 5), normal(3, 2, S, 4)
    found, wanted = kernel(q, k, v), fa.attend(q, k, v, kernel="reference")
    close(found, wanted, 8)
    of = lambda f: grad(lambda q: f(q).sin().sum())(q)
    close(
        [of(lambda q: attention(q, k, v))],
        [of(lambda q: fa.attention(q, k, v, kernel="reference"))],
        64,
    )


def test_derivatives_beyond_two_factors_go_by_torch_and_agree(monkeypatch):
    q, k, v = normal(1, 1, 5, 4), normal(2, 1, 5, 4), normal(3, 1, 5, 4)
    spec = Contraction((Output("query", (Term(((LowRankFactor(Q, K),),) * 3, K),)),))
    assert (
        conditions.why_not_contract(spec, there([q, k, q[..., :1]])) == "it has more than 2 factors"
    )
    third = lambda f: grad(
        lambda q: grad(lambda q: grad(lambda q: f(q).sin().sum())(q).sin().sum())(q).sin().sum()
    )(q)
    close(
        [third(lambda q: attention(q, k, v))],
        [third(lambda q: fa.attention(q, k, v, kernel="reference"))],
        512,
    )


OBSTACLES = {
    "float64": (
        lambda q: fa.explain(q.double(), q.double(), q.double()),
        "float32, float16 and bfloat16 only",
    ),
    "wide": (
        lambda q: fa.explain(*[q[..., :1].expand(2, 20, 257)] * 3),
        "heads of at most 256 features, not 257",
    ),
    "bias": (lambda q: fa.explain(q, q, q, bias=q[0, 0, 0]), "takes no dense bias"),
    "booleans": (
        lambda q: fa.explain(q, q, q, q[0, 0, 0] > 0),
        "takes a Mask of intervals, not booleans",
    ),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_explain_says_why_it_cannot_run(case):
    explain, reason = OBSTACLES[case]
    assert (
        reason
        in {v.kernel: v.why_not for v in explain(normal(1, 2, 20, 5).to(DEVICE)).verdicts}["triton"]
    )


def test_explain_says_that_it_is_not_installed_or_for_cuda(monkeypatch):
    told = lambda: {v.kernel: v.why_not for v in fa.explain(*[normal(1, 2, 20, 5)] * 3).verdicts}[
        "triton"
    ]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert told() == "interpreted: for tests"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert told().startswith("for CUDA, not for cpu")
    monkeypatch.setattr(fa.kernels.closed.entry, "TRITON", False)
    assert told() == "Triton is not installed: pip install funcattn[triton]"


def test_a_compiled_program_holds_one_node_for_the_value_and_one_for_each_pass():
    from torch._dynamo.backends.common import aot_autograd

    q, k, v = (
        x.to(DEVICE) for x in (normal(1, 2, 20, 5), normal(2, 2, 20, 5), normal(3, 2, 20, 4))
    )
    m, nodes = fa.to(DEVICE)(masks.causal(20)), []

    def compiler(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    loss = lambda q: fa.attention(q, k, v, m, kernel="triton").sin().sum()
    program = lambda q: jvp(grad(loss), (q,), (q,))[1]
    torch._dynamo.reset()
    found = torch.compile(program, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(q)
    close([found], [program(q).cpu()], 1)
    ours = lambda: [node for node in nodes if node.startswith("funcattn")]
    # the value with its tangent, the tangent of the gradient
    assert ours() == ["funcattn.attend_jvp.default", "funcattn.contract.default"]
    nodes.clear()
    pushed = lambda q: jvp(loss, (q,), (q,))
    found = torch.compile(pushed, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(q)
    close(found, [x.cpu() for x in pushed(q)], 1)
    assert ours() == ["funcattn.attend_jvp.default"]


@pytest.mark.slow
def test_every_kernel_compiles_for_cards_that_are_not_here():
    """To the machine code of an H100 (90) and an A100 (80). It fits their shared memory; of the
    instructions in the loop over whole blocks at most an eighth fetch what a thread had spilled (the
    tangent of 128 features does; blocks that need not issue a quarter more in all); and
    an H100 multiplies numbers of two bytes by warp groups."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_DEFAULT_FP_FUSION": "1"
    }
    script = TESTS / "ahead.py"
    done = subprocess.run(
        [sys.executable, script, "90", "80"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) > 20
    for name, card, sizes, _, _, shared, instructions, reloads, products in lines:
        assert int(shared) <= {"90": 232448, "80": 166912}[card], (name, card)
        if name.startswith(("bounds", "statistics")):  # no loop, and one that hardly ever runs
            continue
        own, other, warps = map(int, re.split("[x ]", sizes)[:3])
        loop = float(instructions) * own * other / 32 / warps
        assert int(reloads) <= loop / 8, (name, card, reloads, loop)
        if card == "90" and "float32" not in name and "256" not in name:
            assert products == "HGMMA", name
