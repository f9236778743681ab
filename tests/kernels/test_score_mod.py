"""Attention with a score function against the dense formula in float64, block sizes made small so
that there are many.
"""

import functools
import subprocess
import sys

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

import funcattn as fa
from funcattn import masks
from funcattn.kernels import attention_with_score, block_sums
from funcattn.masks import Mask

INF = float("inf")
LEAD, H, K, T, S, D, Dv = 2, 4, 2, 9, 11, 3, 5
ALL = (0, 1, 2, 3)
# float64 sums of a dozen terms of order one, twice differentiated
close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def normal(seed, *shape, dtype=torch.float64):
    return fa.random.normal(fa.key(seed), shape, dtype)


def of_bias(s, b, h, i, j, table):
    return s + table[h, i - j + S - 1]


SCORES = {  # a function, and the tensor it is differentiated by beside q, k and v
    "soft cap": (lambda s, b, h, i, j, cap: cap * torch.tanh(s / cap), normal(20).abs() + 1),
    "ALiBi": (lambda s, b, h, i, j, slopes: s - slopes[h] * (i - j).abs(), normal(21, H)),
    "relative bias": (of_bias, normal(22, H, T + S - 1)),
    "of the example": (
        lambda s, b, h, i, j, warmth: s * warmth[b, 0, 0] + warmth[b, i, j].sin(),
        normal(23, LEAD, T, S),
    ),
    "hiding": (lambda s, b, h, i, j, c: torch.where(j <= i - 1, s * c, -INF), normal(24)),
}
MASKS = {
    "none": None,
    "with empty rows": masks.causal(T, offset=-2),
    "two intervals": masks.causal(T, S, align="lower")
    & (masks.window(T, 3, offset=S - T) | masks.sinks(T, 1)),
    "per example": masks.padding(T, torch.tensor([0, 7])),
    "booleans": (torch.arange(T).unsqueeze(-1) + torch.arange(S)) % 3 > 0,
    "booleans of keys": torch.arange(S) % 2 > 0,
    "booleans of heads": torch.arange(H * T).reshape(H, T, 1) % 5 > 0,
}
INPUTS = {
    "multi-head": (normal(0, LEAD, H, T, D), normal(1, LEAD, H, S, D), normal(2, LEAD, H, S, Dv)),
    "grouped": (normal(3, LEAD, H, T, D), normal(4, LEAD, K, S, D), normal(5, LEAD, K, S, Dv)),
    "multi-query, shared keys": (normal(6, LEAD, H, T, D), normal(7, 1, S, D), normal(8, 1, S, Dv)),
}
CASES = [(inputs, score, "with empty rows") for inputs in INPUTS for score in SCORES]
CASES += [("grouped", "hiding", "none")]  # its first row is empty with no mask to say so
CASES += [("grouped", "relative bias", mask) for mask in MASKS if mask != "with empty rows"]


@pytest.fixture(autouse=True)
def blocks_of_four(monkeypatch):
    monkeypatch.setattr(block_sums, "SIDE", 4)


def dense(score, mask, q, k, v, p):
    """The formula: logits as a whole, an empty row replaced before it is normalised."""
    groups = q.shape[-3] // k.shape[-3]
    s = q @ k.repeat_interleave(groups, -3).mT / q.shape[-1] ** 0.5
    T, S = s.shape[-2:]
    index = lambda n, *shape: torch.arange(n).reshape(n, *shape)
    b = torch.arange(s.shape[:-3].numel()).reshape(*s.shape[:-3], 1, 1, 1)
    s = score(s, b, index(q.shape[-3], 1, 1), index(T, 1), index(S), p)
    seen = (
        torch.tensor(True)
        if mask is None
        else mask.dense(S).unsqueeze(-3)
        if isinstance(mask, Mask)
        else mask
    )
    seen = seen & (s > -INF)
    empty = ~seen.any(-1, keepdim=True)
    s = torch.where(seen, s, torch.where(empty, 0, -INF))
    probability = torch.where(empty, 0, s.softmax(-1))
    return probability @ v.repeat_interleave(groups, -3), torch.where(
        empty.squeeze(-1), -INF, s.logsumexp(-1)
    )


def streamed(score, mask, q, k, v, p):
    return attention_with_score(q, k, v, score, mask, parameters=(p,))


def loss(f):
    """A number of both results, in which an empty row's -inf counts for nothing."""

    def of(*args):
        out, lse = f(*args)
        return out.sin().sum() + torch.where(lse == -INF, 0, lse).cos().sum()

    return of


def case(inputs, score, mask):
    f, p = SCORES[score]
    return tuple(functools.partial(form, f, MASKS[mask]) for form in (streamed, dense)), (
        *INPUTS[inputs],
        p,
    )


def tangents(args):
    return tuple(x.cos() for x in args)


@pytest.mark.parametrize(("inputs", "score", "mask"), CASES)
def test_the_value_agrees_with_the_dense_formula(inputs, score, mask):
    (ours, wanted), args = case(inputs, score, mask)
    for got, want in zip(ours(*args), wanted(*args), strict=True):
        close(got, want)


TRANSFORMS = {
    "grad": lambda f: grad(f, ALL),
    "jvp": lambda f: lambda *args: jvp(f, args, tangents(args)),
    "hvp": lambda f: lambda *args: jvp(grad(f, ALL), args, tangents(args))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("inputs", "score", "mask"), CASES)
def test_derivatives_agree_with_the_dense_formula(inputs, score, mask, transform):
    (ours, wanted), args = case(inputs, score, mask)
    for got, want in zip(
        TRANSFORMS[transform](loss(ours))(*args),
        TRANSFORMS[transform](loss(wanted))(*args),
        strict=True,
    ):
        close(got, want)


NESTINGS = {
    "grad.grad": lambda f: grad(lambda *a: sum(g.sin().sum() for g in grad(f, ALL)(*a)), ALL),
    "grad.jvp": lambda f: grad(lambda *a: jvp(f, a, tangents(a))[1], ALL),
    "jvp.jvp": lambda f: lambda *a: jvp(lambda *a: jvp(f, a, tangents(a))[1], a, tangents(a)),
    "jvp.grad.jvp": lambda f: (
        lambda *a: jvp(grad(lambda *a: jvp(f, a, tangents(a))[1], ALL), a, tangents(a))[1]
    ),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_nested_derivatives_agree_with_the_dense_formula(nesting):
    (ours, wanted), args = case("multi-query, shared keys", "soft cap", "with empty rows")
    for got, want in zip(
        NESTINGS[nesting](loss(ours))(*args), NESTINGS[nesting](loss(wanted))(*args), strict=True
    ):
        close(got, want)


q, k, v, table = (
    normal(30, LEAD, H, T, D),
    normal(31, K, S, D),
    normal(32, K, S, Dv),
    normal(33, H, T + S - 1),
)
several = lambda x, dim: torch.stack([x, x.sin(), 2 * x], dim)
BATCHES = {
    "everything": ((several(q, 0), several(k, 0), several(v, 0), several(table, 0)), (0, 0, 0, 0)),
    "queries": ((several(q, 1), k, v, table), (1, None, None, None)),
    "keys and values": ((q, several(k, 2), several(v, 0), table), (None, 2, 0, None)),
    "values": ((q, k, several(v, 3), table), (None, None, 3, None)),
    "parameters": ((q, k, v, several(table, 0)), (None, None, None, 0)),
}


@pytest.mark.parametrize("over", BATCHES)
@pytest.mark.parametrize(
    "transform",
    [lambda f: f, lambda f: grad(loss(f), ALL), lambda f: TRANSFORMS["hvp"](loss(f))],
    ids=["value", "grad", "hvp"],
)
def test_vmap_is_a_loop(over, transform):
    args, dims = BATCHES[over]
    f = transform(functools.partial(streamed, of_bias, MASKS["with empty rows"]))
    row = lambda n: [x if d is None else x.select(d, n) for x, d in zip(args, dims, strict=True)]
    for got, *wanted in zip(vmap(f, dims)(*args), *[f(*row(n)) for n in range(3)], strict=True):
        close(got, torch.stack(wanted))


def test_vmap_inside_and_outside_of_derivatives_agrees_with_the_dense_formula():
    score, cap = SCORES["soft cap"]
    q, k, v = (x[0] for x in INPUTS["grouped"])
    queries, lengths = torch.stack([q, q.sin(), 2 * q]), torch.tensor([0, 5, 11])
    for form in (
        lambda f: grad(lambda q: vmap(f, (0, 0))(q, lengths).sum())(queries),
        lambda f: vmap(hessian(f), (0, 0))(queries, lengths),
    ):
        ours, wanted = (
            form(lambda q, n, f=f: loss(f)(q, k, v, cap, masks.padding(T, n)))
            for f in (
                lambda q, k, v, p, m: streamed(score, m, q, k, v, p),
                lambda q, k, v, p, m: dense(score, m, q, k, v, p),
            )
        )
        close(ours, wanted)


def test_without_a_score_it_is_attention():
    q, k, v = INPUTS["grouped"]
    scale = torch.tensor(0.7, dtype=torch.float64)
    plain = lambda s, b, h, i, j: s
    for mask in MASKS.values():
        got, wanted = (
            attention_with_score(q, k, v, plain, mask, scale=scale),
            fa.attend(q, k, v, mask, scale=scale, kernel="reference"),
        )
        close(got.out, wanted.out)
        close(got.lse, wanted.lse)
    by_scale = lambda f: jvp(grad(lambda scale: f(scale).out.sin().sum()), (scale,), (scale,))
    ours = by_scale(lambda scale: attention_with_score(q, k, v, plain, scale=scale))
    wanted = by_scale(lambda scale: fa.attend(q, k, v, scale=scale, kernel="reference"))
    close(ours[0], wanted[0])
    close(ours[1], wanted[1])


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (1, 1)])
def test_few_or_no_queries_and_keys_are_allowed(queries, keys):
    q, k, v = normal(40, H, queries, D), normal(41, K, keys, D), normal(42, K, keys, Dv)
    cap, p = SCORES["soft cap"]
    args = (q, k, v, p)
    for got, want in zip(streamed(cap, None, *args), dense(cap, None, *args), strict=True):
        close(got, want)
    for got in grad(loss(functools.partial(streamed, cap, None)), ALL)(*args):
        assert got.isfinite().all()


def test_rows_without_keys_have_zero_derivatives_at_every_order():
    (ours, _), args = case("grouped", "soft cap", "with empty rows")
    out, lse = ours(*args)
    assert (out[..., :2, :] == 0).all()
    assert (lse[..., :2] == -INF).all()
    first = lambda *a: ours(*a)[0][..., :2, :].sum()
    for derivative in (*grad(first, ALL)(*args), *jvp(grad(first, ALL), args, tangents(args))[1]):
        assert (derivative == 0).all()


def test_a_hidden_logit_may_be_of_any_size():
    q, k, v = INPUTS["grouped"]
    hidden = masks.causal(T)
    score = lambda s, b, h, i, j, c: s * c + torch.where(j > i, 1e4, 0)  # exp of it overflows
    args = (q, k, v, normal(60))
    for transform in TRANSFORMS.values():
        pair = [
            transform(loss(functools.partial(form, score, hidden)))(*args)
            for form in (streamed, dense)
        ]
        for got, wanted in zip(*pair, strict=True):
            close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    q, k, v = (x.to(dtype) for x in INPUTS["grouped"])
    score, cap = SCORES["soft cap"]
    seen = []
    got = attention_with_score(
        q, k, v, lambda s, *rest: seen.append(s.dtype) or score(s, *rest), parameters=(cap.float(),)
    )
    assert set(seen) == {torch.float32}
    assert (got.out.dtype, got.lse.dtype) == (dtype, torch.float32)
    wanted = dense(score, None, *(x.double() for x in (q, k, v)), cap)
    # one rounding to the dtype at the end; float32 inside
    torch.testing.assert_close(
        got.out, wanted[0].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


def test_autocast_rounds_the_inputs_and_no_sum():
    (ours, _), args = case("grouped", "soft cap", "none")
    args = tuple(x.float() for x in args)
    narrow = lambda *args: ours(*[x.bfloat16() for x in args[:3]], args[3])
    with torch.autocast(args[0].device.type, dtype=torch.bfloat16):
        got = grad(loss(ours), ALL)(*args)
    for g, w in zip(got, grad(loss(narrow), ALL)(*args), strict=True):
        assert torch.equal(g, w)


def test_parameters_are_trees_of_whatever_score_reads():
    q, k, v = INPUTS["grouped"]
    score = lambda s, b, h, i, j, tree, power: (
        s * tree["warmth"] ** power + tree["slopes"][0][h] * (i - j)
    )
    tree = {"warmth": normal(50), "slopes": [normal(51, H)]}
    got = grad(
        lambda tree: attention_with_score(q, k, v, score, parameters=(tree, 2)).out.sin().sum()
    )(tree)
    flat = lambda s, b, h, i, j, p: score(
        s, b, h, i, j, {"warmth": p[0], "slopes": [p[1:].reshape(H, 1, 1).squeeze((1, 2))]}, 2
    )
    p = torch.cat([tree["warmth"].reshape(1), tree["slopes"][0]])
    wanted = grad(lambda p: dense(flat, None, q, k, v, p)[0].sin().sum())(p)
    close(torch.cat([got["warmth"].reshape(1), got["slopes"][0]]), wanted)


def test_blocks_that_a_mask_hides_are_not_computed():
    q, k, v = INPUTS["multi-head"]
    seen = []
    note = lambda s, b, h, i, j: seen.append((int(i.max()), int(j.min()))) or s if s.numel() else s
    attention_with_score(q, k, v, note, masks.causal(T))
    # the probe's three calls; of 3 x 3 blocks the 6 on or below the diagonal, and an empty one,
    # which has no pairs to note; twice
    assert len(seen) == 3 + 2 * 6
    assert all(j <= i for i, j in seen[3:])


counter = torch.zeros(())
REFUSED = {
    "a sum over keys": lambda s, b, h, i, j: s - s.mean(-1, keepdim=True),
    "a softmax": lambda s, b, h, i, j: s.softmax(-1),
    "a running sum": lambda s, b, h, i, j: s.cumsum(-1),
    "an order of keys": lambda s, b, h, i, j: s + torch.arange(s.shape[-1]),
    "a mean over queries": lambda s, b, h, i, j: s - s.mean(-2, keepdim=True),
    "a count of calls": lambda s, b, h, i, j: s + counter.add_(1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_score_that_is_not_elementwise_is_refused(what):
    with pytest.raises(ValueError, match=r"score should be elementwise.*Let it read its own logit"):
        attention_with_score(*INPUTS["grouped"], REFUSED[what])


@pytest.mark.parametrize(
    "score",
    [lambda s, *_: s.sum(-1), lambda s, *_: s > 0, lambda s, *_: 3.0],
    ids=["a row", "booleans", "a number"],
)
def test_a_score_of_another_shape_or_kind_is_refused(score):
    with pytest.raises(
        ValueError,
        match=r"score should be a function to floating logits of the shape of s.*Keep the shape",
    ):
        attention_with_score(*INPUTS["grouped"], score)


def test_a_tracked_tensor_outside_of_parameters_is_refused():
    q, k, v = INPUTS["grouped"]
    with_slope = lambda slope: attention_with_score(
        q, k, v, lambda s, b, h, i, j: s - slope * (i - j)
    ).out.sum()
    slope = torch.ones((), dtype=torch.float64)
    remedy = r"attention_with_score: score should be a pure function.*tracked.*Give it what .* in parameters="
    for follow in (
        lambda: grad(with_slope)(slope),
        lambda: vmap(with_slope)(slope.expand(3)),
        lambda: with_slope(slope.requires_grad_()),
    ):
        with pytest.raises(ValueError, match=remedy):
            follow()


def test_a_score_that_draws_from_torch_is_refused():
    with pytest.raises(ValueError, match=r"score should be (elementwise|a pure function)"):
        attention_with_score(*INPUTS["grouped"], lambda s, b, h, i, j: s + torch.rand(s.shape))


def test_what_does_not_fit_is_named():
    q, k, v = INPUTS["grouped"]
    plain = lambda s, b, h, i, j: s
    with pytest.raises(ValueError, match="attention_with_score: k should be"):
        attention_with_score(q, k[..., :2], v, plain)
    with pytest.raises(
        TypeError, match=r"parameters should be a tuple, got a Tensor.*parameters=\(table,\)"
    ):
        attention_with_score(q, k, v, plain, parameters=q)


def test_compiled_code_runs_it_eagerly():
    torch._dynamo.reset()
    (_, wanted), args = case("grouped", "soft cap", "with empty rows")
    compiling = []

    def score(s, *rest):
        compiling.append(torch.compiler.is_compiling())
        return SCORES["soft cap"][0](s, *rest)

    ours = functools.partial(streamed, score, MASKS["with empty rows"])
    close(
        torch.compile(lambda *args: 2 * ours(*args)[0], backend="aot_eager")(*args),
        2 * wanted(*args)[0],
    )
    for got, want in zip(
        torch.compile(grad(loss(ours), ALL), backend="aot_eager")(*args),
        grad(loss(wanted), ALL)(*args),
        strict=True,
    ):
        close(got, want)
    assert not any(compiling)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    # T = S = 4096, two heads: one block of pairs is 1 MB, all pairs of float32 are 128 MB, and
    # dense hvp holds ten such.
    script = """
import torch, funcattn as fa
from torch.func import grad, jvp
torch.set_num_threads(1)
score = lambda s, b, h, i, j, table: 20 * torch.tanh(s / 20) + table[h, i - j + table.shape[-1] // 2]
attend = lambda q, k, v, table: fa.kernels.attention_with_score(q, k, v, score, fa.masks.causal(len(q[0])), parameters=(table,))
loss = lambda *inputs: attend(*inputs).out.sum()
inputs = lambda T: (torch.ones(2, T, 16), torch.ones(1, T, 16), torch.ones(1, T, 16), torch.ones(2, 2 * T))
everything = lambda f: grad(f, (0, 1, 2, 3))
transforms = [lambda *a: jvp(loss, a, a), everything(loss), lambda *a: jvp(everything(loss), a, a)]
status = lambda: open("/proc/self/status").read().split()  # ru_maxrss would begin at the parent's
peak = lambda: int((words := status())[words.index("VmHWM:") + 1]) / 1024
for f in transforms:
    f(*inputs(600))  # what torch loads on first use, and the blocks
for f in transforms:
    before, x = peak(), inputs(4096)
    f(*x)
    print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    # half of one matrix of pairs, all three together
    assert sum(map(float, done.stdout.split())) < 64, done.stdout
