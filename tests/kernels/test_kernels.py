"""Attention against a loop over rows in float64, and the laws that every kernel and every merge
must keep.
"""

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import funcattn as fa
from funcattn import masks
from funcattn.kernels import KVSegment, attend_segments, products
from funcattn.kernels.dispatch import Explanation, Verdict
from funcattn.masks import Mask
from funcattn.records import Attended

INF = float("inf")
NAMES = ["q", "k", "v"]
# float64 sums of a handful of terms of order one: a few hundred roundings of 1.1e-16 at most
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, torch.float64)


def naive(q, k, v, seen=None, bias=None, scale=None):
    """Attended by the definition, row by row: seen and bias broadcast to (*lead, H, T, S)."""
    H, T, D = q.shape[-3:]
    K, S = k.shape[-3:-1]
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    scale = D**-0.5 if scale is None else float(scale)
    q, k, v = (x.expand(*lead, *x.shape[-3:]) for x in (q, k, v))
    seen = torch.ones(S, dtype=torch.bool) if seen is None else seen
    seen = (seen if bias is None else seen & (bias > -INF)).expand(*lead, H, T, S)
    bias = torch.zeros(S, dtype=torch.float64) if bias is None else bias
    bias = bias.expand(*lead, H, T, S)
    out, lse = q.new_zeros(*lead, H, T, v.shape[-1]), q.new_full((*lead, H, T), -INF)
    for at in itertools.product(*map(range, lead)):
        for h, i in itertools.product(range(H), range(T)):
            keys = [j for j in range(S) if seen[(*at, h, i, j)]]
            if keys:
                head = (*at, h // (H // K))
                logits = torch.stack(
                    [scale * (q[(*at, h, i)] @ k[(*head, j)]) + bias[(*at, h, i, j)] for j in keys]
                )
                mass = (logits - logits.max()).exp()
                out[(*at, h, i)] = (
                    sum(m * v[(*head, j)] for m, j in zip(mass, keys, strict=True)) / mass.sum()
                )
                lse[(*at, h, i)] = logits.max() + mass.sum().log()
    return Attended(out, lse)


SHAPES = {  # q, k, v
    "multi-head": ((2, 3, 4), (2, 3, 4), (2, 3, 4)),
    "grouped": ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
    "multi-query, wide values": ((4, 3, 2), (1, 5, 2), (1, 5, 7)),
    "one query": ((2, 4, 1, 4), (2, 2, 5, 4), (2, 2, 5, 3)),
    "more queries than keys": ((2, 5, 4), (2, 2, 4), (2, 2, 4)),
    "broadcast leads": ((3, 1, 2, 3, 4), (2, 1, 5, 4), (1, 1, 1, 5, 4)),
    "no keys": ((2, 3, 4), (1, 0, 4), (1, 0, 6)),
}
MASKS = {
    "none": lambda T, S: None,
    "causal": lambda T, S: masks.causal(T),
    "with an empty row": lambda T, S: masks.causal(T, offset=-1),
    "two intervals": lambda T, S: (
        masks.causal(T, S, align="lower") & (masks.window(T, 2, offset=S - T) | masks.sinks(T, 1))
    ),
    "booleans": lambda T, S: (torch.arange(T).unsqueeze(-1) + torch.arange(S)) % 3 > 0,
    "booleans of keys alone": lambda T, S: torch.arange(S) % 2 > 0,
}
BIASES = {
    "none": lambda T, S: None,
    "of heads": lambda T, S: normal(9, 1, T, S),
    "with -inf": lambda T, S: normal(9, T, S).masked_fill(
        (torch.arange(T).unsqueeze(-1) + torch.arange(S)) % 4 < 2, -INF
    ),
    "with a row of -inf": lambda T, S: normal(9, T, S).index_fill(0, torch.tensor(0), -INF),
}


def case(shapes, mask, bias):
    q, k, v = (normal(i, *shape) for i, shape in enumerate(SHAPES[shapes]))
    T, S = q.shape[-2], k.shape[-2]
    return q, k, v, MASKS[mask](T, S), BIASES[bias](T, S)


def visible(mask, S):
    return mask.dense(S) if isinstance(mask, Mask) else mask


@pytest.mark.parametrize("kernel", [None, "reference", "flash"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_attend_agrees_with_the_loop(shapes, mask, bias, kernel):
    q, k, v, m, b = case(shapes, mask, bias)
    wanted = naive(q, k, v, visible(m, k.shape[-2]), b)
    got = fa.attend(q, k, v, m, bias=b, kernel=kernel)
    close(got.out, wanted.out)
    close(got.lse, wanted.lse)
    close(fa.attention(q, k, v, m, bias=b, kernel=kernel), wanted.out)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shapes", [name for name in SHAPES if name != "no keys"])
def test_the_sdpa_kernel_agrees_with_the_loop(shapes, mask, bias):
    q, k, v, m, b = case(shapes, mask, bias)
    close(
        fa.attention(q, k, v, m, bias=b, kernel="sdpa"),
        naive(q, k, v, visible(m, k.shape[-2]), b).out,
    )


def test_masks_differ_per_sequence():
    q, k, v = normal(0, 2, 4, 3, 4), normal(1, 2, 2, 5, 4), normal(2, 2, 2, 5, 4)
    mask = masks.padding(3, torch.tensor([0, 4]))
    wanted = naive(q, k, v, mask.dense(5).unsqueeze(-3))
    for kernel in (None, "reference", "flash", "sdpa"):
        close(fa.attention(q, k, v, mask, kernel=kernel), wanted.out)


@pytest.mark.parametrize("scale", [0.7, 2, torch.tensor(0.3, dtype=torch.float64)])
def test_scale_is_a_number_or_a_tensor(scale):
    q, k, v = normal(0, 2, 3, 4), normal(1, 2, 5, 4), normal(2, 2, 5, 4)
    wanted = naive(q, k, v, scale=scale)
    close(fa.attend(q, k, v, scale=scale).lse, wanted.lse)
    close(fa.attention(q, k, v, scale=scale), wanted.out)


def test_the_derivative_with_respect_to_scale_is_that_of_the_logits():
    q, k, v = normal(0, 2, 3, 4), normal(1, 2, 5, 4), normal(2, 2, 5, 4)
    by_scale = grad(lambda scale: fa.attend(q, k, v, scale=scale).lse.sum())
    scale = torch.tensor(0.3, dtype=torch.float64)
    raw = q @ k.mT
    P = (scale * raw).softmax(-1)
    close(by_scale(scale), (P * raw).sum())
    variance = (P * raw**2).sum(-1) - (P * raw).sum(-1) ** 2
    close(grad(by_scale)(scale), variance.sum())
    assert by_scale(scale.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_float32_statistics(dtype):
    q, k, v = (normal(i, 2, 5, 8).to(dtype) for i in range(3))
    wanted = naive(*(x.double() for x in (q, k, v)))
    got = fa.attend(q, k, v, masks.full(5))
    assert (got.out.dtype, got.lse.dtype) == (dtype, torch.float32)
    assert fa.attention(q, k, v).dtype == dtype
    # inputs are exact, sums are of 8 and 5 terms in float32, and the output is rounded once
    slack = 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.lse.double(), wanted.lse, rtol=slack, atol=slack)
    rounding = torch.finfo(dtype).eps / 2 + slack
    torch.testing.assert_close(got.out.double(), wanted.out, rtol=rounding, atol=rounding)


def test_large_logits_do_not_overflow():
    q, k, v = 1e3 * normal(0, 1, 2, 4), 1e3 * normal(1, 1, 3, 4), normal(2, 1, 3, 4)
    wanted = naive(q, k, v)
    close(fa.attend(q, k, v).out, wanted.out)
    close(fa.attend(q, k, v).lse, wanted.lse)


# Transforms.


@pytest.mark.parametrize(
    "in_dims",
    [
        dims
        for dims in itertools.product([None, 0, 2], repeat=3)
        if any(d is not None for d in dims)
    ],
)
def test_vmap_in_any_argument_is_the_loop(in_dims):
    shapes = [(4, 3, 2), (2, 5, 2), (2, 5, 3)]
    inputs = [normal(i, *shape) for i, shape in enumerate(shapes)]
    mapped = [
        x if d is None else torch.stack([x, x.sin(), x.cos()], d)
        for x, d in zip(inputs, in_dims, strict=True)
    ]
    f = lambda q, k, v: tuple(fa.attend(q, k, v, masks.causal(3, 5, align="lower")))
    got = vmap(f, in_dims)(*mapped)
    for b in range(3):
        wanted = f(
            *(x if d is None else x.select(d, b) for x, d in zip(mapped, in_dims, strict=True))
        )
        close(got[0][b], wanted[0])
        close(got[1][b], wanted[1])


def dense(q, k, v, seen):
    """Plain torch operations, for derivatives; rows that see no key are replaced before the
    softmax.
    """
    G = q.shape[-3] // k.shape[-3]
    S = q @ k.repeat_interleave(G, -3).mT / q.shape[-1] ** 0.5
    empty = ~seen.any(-1, keepdim=True)
    P = torch.where(empty, 0, torch.where(seen | empty, S, -INF).softmax(-1))
    return P @ v.repeat_interleave(G, -3)


@pytest.mark.parametrize(
    "mask", [masks.causal(3), masks.causal(3, offset=-1), masks.window(3, 1, offset=1)]
)
def test_derivatives_of_both_modes_and_orders_agree_with_plain_operations(mask):
    x = (normal(0, 4, 3, 2), normal(1, 2, 4, 2), normal(2, 2, 4, 3))
    tangent = (normal(3, 4, 3, 2), normal(4, 2, 4, 2), normal(5, 2, 4, 3))
    ours = lambda q, k, v: (fa.attention(q, k, v, mask) ** 2).sum()
    plain = lambda q, k, v: (dense(q, k, v, mask.dense(4)) ** 2).sum()
    hvp = lambda f: jvp(grad(f, (0, 1, 2)), x, tangent)[1]
    close(jvp(ours, x, tangent)[1], jvp(plain, x, tangent)[1])
    for order in (lambda f: grad(f, (0, 1, 2))(*x), hvp):
        for ours_too, plain_too in zip(order(ours), order(plain), strict=True):
            close(ours_too, plain_too)
    twice = lambda f: jvp(lambda *x: jvp(f, x, tangent)[1], x, tangent)[1]
    close(twice(ours), twice(plain))
    close(hessian(ours)(*x), hessian(plain)(*x))


@pytest.mark.parametrize("no_keys", ["a mask that hides all", "an empty past", "a bias of -inf"])
def test_a_query_with_no_key_has_zero_derivatives_of_every_order(no_keys):
    S = 0 if no_keys == "an empty past" else 3
    q, k, v = normal(0, 2, 3, 4), normal(1, 1, S, 4), normal(2, 1, S, 5)
    mask = masks.prefix(3, 0) if no_keys == "a mask that hides all" else None
    bias = torch.full((3, S), -INF, dtype=torch.float64) if no_keys == "a bias of -inf" else None
    attend = lambda q, k, v: fa.attend(q, k, v, mask, bias=bias)
    out, lse = attend(q, k, v)
    assert torch.equal(out, torch.zeros(2, 3, 5, dtype=torch.float64))
    assert torch.equal(lse, torch.full((2, 3), -INF, dtype=torch.float64))
    loss = lambda q, k, v: (attend(q, k, v).out.cos() * torch.arange(5)).sum()
    x, tangent = (q, k, v), tuple(torch.ones_like(t) for t in (q, k, v))
    zero = lambda tree: all(torch.equal(t, torch.zeros_like(t)) for t in tree)
    assert zero(grad(loss, (0, 1, 2))(*x))
    assert zero([jvp(lambda *x: attend(*x).out, x, tangent)[1]])
    assert zero(jvp(grad(loss, (0, 1, 2)), x, tangent)[1])
    assert zero([jvp(lambda *x: jvp(lambda *x: attend(*x).out, x, tangent)[1], x, tangent)[1]])
    assert zero(vmap(grad(loss, (0, 1, 2)), (0, None, None))(torch.stack([q, 2 * q]), k, v))
    assert zero(jacfwd(lambda *x: attend(*x).out, (0, 1, 2))(*x))


def test_autograd_without_a_transform_differentiates_twice():
    x = [normal(i, 2, 3, 4).requires_grad_() for i in range(3)]
    assert torch.autograd.gradgradcheck(lambda q, k, v: fa.attention(q, k, v, masks.causal(3)), x)
    assert torch.autograd.gradcheck(
        lambda q, k, v: fa.attend(q, k, v, masks.causal(3)), x, check_forward_ad=True
    )


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_compiled_attention_is_one_graph(kernel):
    q, k, v = normal(0, 2, 3, 4), normal(1, 1, 5, 4), normal(2, 1, 5, 4)
    f = lambda q, k, v: tuple(fa.attend(q, k, v, masks.causal(3, 5, align="lower"), kernel=kernel))
    for got, wanted in zip(
        torch.compile(f, fullgraph=True, backend="eager")(q, k, v), f(q, k, v), strict=True
    ):
        close(got, wanted)


class Storages(TorchDispatchMode):
    """Remembers the largest storage that any operation returned, in elements of float64."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // 8)
        return out


B, H, K, T, SHARED, D = 16, 4, 2, 2, 512, 16  # up to products.COPIED elements, copying is cheaper


@pytest.mark.parametrize("kernel", [None, "reference", "flash"])
@pytest.mark.parametrize("wanted", ["values", "gradients", "tangents"])
def test_keys_shared_by_a_vmap_or_by_heads_are_never_repeated(wanted, kernel):
    q, k, v = normal(0, B, H, T, D), normal(1, K, SHARED, D), normal(2, K, SHARED, D)
    f = lambda q: fa.attend(q, k, v, kernel=kernel).out.sum()
    g = {"values": f, "gradients": grad(f), "tangents": lambda q: jvp(f, (q,), (q,))[1]}[wanted]
    with Storages() as seen:
        vmap(g)(q)
    logits = B * H * T * SHARED
    assert 0 < seen.largest <= logits < B * k.numel()


def test_the_product_repeats_nothing_where_the_plain_one_does():
    q, k = normal(0, B, K, T, D), normal(1, K, SHARED, D)
    largest = []
    for product in (products.product, torch.matmul):
        with Storages() as seen:
            vmap(lambda q, product=product: product(q, k.mT))(q)
        largest.append(seen.largest)
    assert largest == [B * K * T * SHARED, B * k.numel()]


# The product.


def nest(name, f):
    """One transform over f(x, w) -> tensor, again a function (x, w) -> tensor."""
    if name == "grad":
        return lambda x, w: torch.cat(
            [g.flatten() for g in grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))(x, w)]
        )
    if name == "jvp":
        return lambda x, w: jvp(f, (x, w), (x.cos(), w.sin()))[1]
    if name == "jvp in x":
        return lambda x, w: jvp(lambda x: f(x, w), (x,), (x.cos(),))[1]
    dims = {"vmap x": (1, None), "vmap w": (None, 2), "vmap both": (2, 0)}[name]
    spread = lambda t, d: t if d is None else torch.stack([t, t.sin(), t * t], d)
    return lambda x, w: vmap(f, dims)(spread(x, dims[0]), spread(w, dims[1]))


STEPS = ["grad", "jvp", "jvp in x", "vmap x", "vmap w", "vmap both"]


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_a_compiled_product_are_in_float32_whatever_the_compiler(dtype, by_columns):
    """300 * 300 is beyond float16, and the square of 1 + 2^-7 is in neither; yet what is left of
    the sums is.
    """
    compiled = torch.compile(products.product, fullgraph=True, backend="eager")
    for x, w in (
        ([300.0, 1, 300], [300.0, 1, -300]),
        ([1 + 2**-7, 1 + 2**-6, 0], [1 + 2**-7, -1.0, 0]),
    ):
        x, w = torch.tensor([x], dtype=dtype), torch.tensor([w], dtype=dtype).mT
        w = w if by_columns else w.expand(3, 2)
        assert torch.equal(compiled(x, w), (x.double() @ w.double()).to(dtype))


@pytest.mark.parametrize(
    "shapes",
    [((2, 3), (3, 2)), ((2, 2, 3), (3, 2)), ((2, 3), (2, 3, 2)), ((2, 1, 2, 3), (3, 3, 2))],
    ids=str,
)
@pytest.mark.parametrize("outermost", STEPS)
def test_product_is_the_matrix_product_under_every_nesting_of_transforms(outermost, shapes):
    x, w = normal(0, *shapes[0]), normal(1, *shapes[1])
    inner = [(), *itertools.product(STEPS, repeat=1), *itertools.product(STEPS, repeat=2)]
    for names in inner if len(shapes[0]) == 2 else inner[:7]:
        ours, plain = products.product, torch.matmul
        for name in (*names, outermost):
            ours, plain = nest(name, ours), nest(name, plain)
        torch.testing.assert_close(
            ours(x, w),
            plain(x, w),
            rtol=1e-11,
            atol=1e-10,
            msg=lambda m, names=names: f"{names}: {m}",
        )


# Merging.


@st.composite
def parts(draw, count, T=2, Dv=3):
    """Attention over disjoint key sets for the same queries; some rows, or all, saw nothing."""
    made = []
    for _ in range(count):
        first, second = fa.split(fa.key(draw(st.integers(0, 99))))
        out, lse = (
            fa.random.normal(first, (1, T, Dv), torch.float64),
            3 * fa.random.normal(second, (1, T), torch.float64),
        )
        nothing = torch.tensor([draw(st.lists(st.booleans(), min_size=T, max_size=T))])
        made.append(
            Attended(out.masked_fill(nothing.unsqueeze(-1), 0), lse.masked_fill(nothing, -INF))
        )
    return made


NOTHING = Attended(
    torch.zeros(1, 2, 3, dtype=torch.float64), torch.full((1, 2), -INF, dtype=torch.float64)
)


@given(parts(3))
def test_merge_is_a_monoid(abc):
    a, b, c = abc
    for got, wanted in (
        (fa.merge(fa.merge(a, b), c), fa.merge(a, fa.merge(b, c))),
        (fa.merge(a, b), fa.merge(b, a)),
        (fa.merge(a, NOTHING), a),
        (fa.merge(NOTHING, a), a),
    ):
        close(got.out, wanted.out)
        close(got.lse, wanted.lse)


@given(parts(2), parts(2))
def test_merge_has_finite_derivatives_of_both_orders_everywhere(ab, tangents):
    flat = lambda x: (x[0].out, x[0].lse, x[1].out, x[1].lse)
    finite = lambda x: (
        x[0].out,
        x[0].lse.nan_to_num(neginf=0.0),
        x[1].out,
        x[1].lse.nan_to_num(neginf=0.0),
    )

    def loss(x, m, y, n):
        out, lse = fa.merge(Attended(x, m), Attended(y, n))
        return (out.sin() * torch.arange(3)).sum() + torch.where(lse > -INF, lse, 0).cos().sum()

    first = grad(loss, (0, 1, 2, 3))(*flat(ab))
    second = jvp(grad(loss, (0, 1, 2, 3)), flat(ab), finite(tangents))[1]
    forward = jvp(loss, flat(ab), finite(tangents))[1]
    for t in (*first, *second, forward):
        assert t.isfinite().all()


def test_the_identity_of_merge_has_zero_derivatives():
    a = Attended(normal(0, 1, 2, 3), normal(1, 1, 2))
    loss = lambda y, n: (fa.merge(a, Attended(y, n)).out.cos()).sum()
    ones = (torch.ones(1, 2, 3, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    zero = lambda tree: all(torch.equal(t, torch.zeros_like(t)) for t in tree)
    assert zero(grad(loss, (0, 1))(*NOTHING))
    assert zero([jvp(loss, tuple(NOTHING), ones)[1]])
    assert zero(jvp(grad(loss, (0, 1)), tuple(NOTHING), ones)[1])
    both = lambda y, n: fa.merge(NOTHING, Attended(y, n)).out.cos().sum()
    assert zero([jvp(grad(both, 1), tuple(NOTHING), ones)[1]])
    through = jvp(lambda x: fa.merge(Attended(x, a.lse), NOTHING).out, (a.out,), (a.out,))[1]
    assert torch.equal(through, a.out)


@given(st.integers(0, 99), st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_merge_of_any_split_is_the_whole(seed, owner):
    q, k, v = normal(seed, 4, 2, 2), normal(seed + 1, 2, 5, 2), normal(seed + 2, 2, 5, 3)
    mask = masks.causal(2, offset=2).dense(5)
    whole = fa.attend(q, k, v, mask)
    places = [[j for j in range(5) if owner[j] == part] for part in range(3)]
    split = [fa.attend(q, k[..., at, :], v[..., at, :], mask[:, at]) for at in places]
    joined = functools.reduce(fa.merge, split)
    close(joined.out, whole.out)
    close(joined.lse, whole.lse)


def test_merge_under_vmap_is_the_loop():
    a, b = (Attended(normal(i, 3, 1, 2, 3), normal(i + 1, 3, 1, 2)) for i in (0, 2))
    got = vmap(fa.merge)(a, b)
    for i in range(3):
        wanted = fa.merge(Attended(a.out[i], a.lse[i]), Attended(b.out[i], b.lse[i]))
        close(got.out[i], wanted.out)
        close(got.lse[i], wanted.lse)


@pytest.mark.parametrize("T", [1, 3, 16, 17, 24])
@pytest.mark.parametrize("past", ["empty", "some", "masked", "all hidden"])
def test_attention_over_parts_is_attention_over_their_concatenation(T, past):
    q, new, own = normal(0, 4, T, 2), normal(1, 2, T, 2), normal(2, 2, T, 3)
    S = 0 if past == "empty" else 6
    k, v = normal(3, 2, S, 2), normal(4, 2, S, 3)
    seen = {"masked": masks.prefix(T, 4), "all hidden": masks.prefix(T, 0)}.get(past, ())
    parts = lambda q, k, v: [KVSegment(k, v, seen), KVSegment(new, own, masks.causal(T))]
    ours = lambda q, k, v: attend_segments(q, parts(q, k, v), scale=0.6)
    left = masks.prefix(T, S) if seen == () else seen
    mask = torch.cat([left.dense(S), masks.causal(T).dense(T)], -1)
    plain = lambda q, k, v: fa.attention(
        q, torch.cat([k, new], -2), torch.cat([v, own], -2), mask, scale=0.6, kernel="reference"
    )
    close(ours(q, k, v), plain(q, k, v))
    for f in (
        lambda g: grad(lambda *x: g(*x).sin().sum(), (0, 1, 2))(q, k, v),
        lambda g: [jvp(g, (q, k, v), (q, k, v))[1]],
    ):
        for got, wanted in zip(f(ours), f(plain), strict=True):
            close(got, wanted)


def test_parts_that_show_nothing_give_zero_and_zero_derivatives():
    for T in (2, 20):
        q, k = normal(0, 2, T, 2), normal(1, 2, 3, 2)
        f = lambda q: attend_segments(
            q, [KVSegment(k, k, masks.prefix(T, 0)), KVSegment(k[:, :0], k[:, :0])], scale=1.0
        )
        assert torch.equal(f(q), torch.zeros_like(q))
        assert torch.equal(
            jvp(grad(lambda q: f(q).cos().sum()), (q,), (q,))[1], torch.zeros_like(q)
        )


# The choice.


def small():
    return tuple(torch.ones(1, 2, 4) for _ in NAMES)


def test_use_forces_a_kernel_inside_the_with_and_not_after():
    before = fa.explain(*small()).chosen
    with fa.kernels.use("reference"):
        assert fa.explain(*small()).chosen == "reference"
        with fa.kernels.use("sdpa"):
            assert fa.explain(*small()).chosen == "sdpa"
            assert fa.explain(*small(), kernel="reference").chosen == "reference"
        assert fa.explain(*small()).chosen == "reference"
    assert fa.explain(*small()).chosen == before
    with pytest.raises(KeyError), fa.kernels.use("reference"):
        raise KeyError
    assert fa.explain(*small()).chosen == before


def test_the_automatic_choice_composes_where_a_derivative_may_be_asked():
    chosen = []

    def f(q):
        chosen.append(fa.explain(q, q, q).chosen)
        return fa.attention(q, q, q).sum()

    q = small()[0]
    jvp(grad(f), (q,), (q,))
    vmap(f)(q.unsqueeze(0))
    f(q.clone().requires_grad_())
    assert "sdpa" not in chosen


def test_an_explanation_prints_each_kernel_and_marks_the_chosen_one():
    explained = fa.explain(*small())
    lines = repr(explained).splitlines()
    assert len(lines) == len(explained.verdicts) >= 2
    marked = [line for line in lines if line.startswith("-> ")]
    assert [line.split()[1] for line in marked] == [explained.chosen]
    scaled = fa.explain(*small(), scale=torch.tensor(1.0))
    assert "scale is a tensor" in next(line for line in repr(scaled).splitlines() if "sdpa" in line)


def test_an_explanation_escapes_what_it_shows_in_a_notebook():
    page = Explanation(
        (Verdict("fast<er>", "a & b", "", True), Verdict("slow", "c", "not <here>", False))
    )._repr_html_()
    assert "<b>fast&lt;er&gt;</b>" in page
    assert "a &amp; b" in page
    assert "not &lt;here&gt;" in page
    assert "<er>" not in page
    assert page.startswith("<table>")


# The door.


def shaped(*shapes, **options):
    return lambda: fa.attention(*(torch.zeros(*shape) for shape in shapes), **options)


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            shaped((3, 4), (3, 4), (3, 4)),
            ValueError,
            r"q should be \(\*lead, H, T, D\), got \(3, 4\)\. Give .* q\.unsqueeze\(-3\)",
        ),
        (
            shaped((2, 3, 4), (2, 5, 8), (2, 5, 4)),
            ValueError,
            "k should be .* D = 4 as in q.* Project k to q's head size",
        ),
        (shaped((2, 3, 4), (2, 5, 4), (2, 6, 4)), ValueError, "v should be .* K, S = 2, 5 as in k"),
        (shaped((2, 3, 4), (2, 5, 4), (1, 5, 4)), ValueError, "v should be .* K, S = 2, 5 as in k"),
        (shaped((4, 3, 4), (3, 5, 4), (3, 5, 4)), ValueError, "K dividing H = 4"),
        (shaped((4, 3, 4), (0, 5, 4), (0, 5, 4)), ValueError, "K dividing H = 4"),
        (
            shaped((2, 2, 3, 4), (3, 2, 3, 4), (3, 2, 3, 4)),
            ValueError,
            "leading axes that broadcast",
        ),
        (lambda: fa.attention(X, X.int(), X), TypeError, r"k should be floating.* k\.float\(\)"),
        (
            lambda: fa.attention(X, X, X.double()),
            TypeError,
            r"v should be torch.float32 as q is.* v\.to\(q\.dtype\)",
        ),
        (
            lambda: fa.attention(X, X, X.to("meta")),
            ValueError,
            r"v should be on \S+ as q is, got meta\. Move it",
        ),
        (lambda: fa.attention(X, X.tolist(), X), TypeError, "k should be a tensor .* got a list"),
        (
            lambda: fa.attention(X, X, X, masks.causal(2)),
            ValueError,
            "mask should be for T = 3 queries",
        ),
        (
            lambda: fa.attention(X, X, X, masks.padding(3, torch.tensor([1, 2]))),
            ValueError,
            "mask should be such that it broadcasts",
        ),
        (
            lambda: fa.attention(X, X, X, torch.ones(3, 2, dtype=torch.bool)),
            ValueError,
            "mask should be such that it broadcasts",
        ),
        (
            lambda: fa.attention(X, X, X, torch.ones(5, 2, 3, 3, dtype=torch.bool)),
            ValueError,
            "mask should be such that it broadcasts",
        ),
        (
            lambda: fa.attention(X, X, X, torch.ones(3, 3)),
            TypeError,
            "mask should be boolean.* Pass a floating one as bias=",
        ),
        (
            lambda: fa.attention(X, X, X, torch.ones(3, 3, dtype=torch.int64)),
            TypeError,
            r"mask\.bool\(\)",
        ),
        (lambda: fa.attention(X, X, X, "causal"), TypeError, "a Mask, booleans or None, got a str"),
        (
            lambda: fa.attention(X, X, X, bias=torch.ones(3, 3, dtype=torch.bool)),
            TypeError,
            "A boolean one is a mask",
        ),
        (
            lambda: fa.attention(X, X, X, bias=torch.ones(3, 4)),
            ValueError,
            "bias should be such that it broadcasts",
        ),
        (
            lambda: fa.attention(X, X, X, scale=torch.ones(2)),
            ValueError,
            "scale should be a number or a 0-d tensor",
        ),
        (
            lambda: fa.attention(X, X, X, kernel="fast"),
            ValueError,
            "kernel should be None or one of .*'reference'.* See kernels.explain",
        ),
        (
            lambda: fa.attention(X, X, X, kernel="sdpa", scale=torch.tensor(1.0)),
            ValueError,
            "'sdpa': scale is a tensor",
        ),
        (
            lambda: fa.kernels.use("fast").__enter__(),
            ValueError,
            "kernels.use: kernel should be one of",
        ),
        (
            lambda: fa.merge(Attended(X, X[..., 0]), Attended(X[..., :2], X[..., 0])),
            ValueError,
            "merge: b should be out",
        ),
        (
            lambda: attend_segments(X, [KVSegment(X.double(), X.double())], scale=1.0),
            TypeError,
            r"Make the past with model\.cache\(size, dtype=",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_the_errors_name_the_function_that_was_called():
    for function in (fa.attend, fa.attention, fa.explain):
        with pytest.raises(TypeError, match=f"^{function.__name__}: k "):
            function(X, X.int(), X)


def test_the_result_of_attend_does_no_tuple_arithmetic():
    with pytest.raises(TypeError, match="Attended: `\\+` has no meaning"):
        fa.attend(X, X, X) + fa.attend(X, X, X)


def test_jacobians_of_both_modes_agree():
    q, k, v = normal(0, 2, 2, 2), normal(1, 1, 3, 2), normal(2, 1, 3, 2)
    f = lambda q, k, v: fa.attention(q, k, v, masks.causal(2))
    for forward, reverse in zip(
        jacfwd(f, (0, 1, 2))(q, k, v), jacrev(f, (0, 1, 2))(q, k, v), strict=True
    ):
        close(forward, reverse)
