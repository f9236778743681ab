"""Softmax does not see the level of its logits: rows that are large and finite, as masks of -1e9
and finfo.min make them.
"""

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.kernels import attention_with_score
from funcattn.kernels.backends import torch_blocks

LOWEST = {
    dtype: torch.finfo(dtype).min
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
LEVELS = [
    (torch.float32, -1e9),
    (torch.float32, 1e9),
    (torch.float32, LOWEST[torch.float32]),
    (torch.float64, 1e30),
    (torch.float64, LOWEST[torch.float64]),
    (torch.bfloat16, LOWEST[torch.bfloat16]),
    (torch.float16, LOWEST[torch.float16]),
]
# a few roundings of each
ACCURACY = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 8e-3}
cases = pytest.mark.parametrize(
    ("dtype", "level"), LEVELS, ids=[f"{dtype} {level:.2g}" for dtype, level in LEVELS]
)


def inputs(T, dtype, level):
    """q, k, v, a tangent and a bias whose first row is `level`; the first query is zero, so its
    logits are equal.
    """
    q, k, v, t = (
        fa.random.normal(key, (2, T, 8), torch.float64).to(dtype) for key in fa.split(fa.key(0), 4)
    )
    q[:, 0] = 0
    bias = torch.zeros(T, T, dtype=dtype)
    bias[0] = level
    return q, k, v, t, bias


def dense(q, k, v):
    """The same at level zero."""
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def assert_near(got, wanted, dtype):
    torch.testing.assert_close(
        got.double(), wanted.double(), atol=ACCURACY[dtype], rtol=ACCURACY[dtype]
    )


@pytest.mark.parametrize("T", [8, 40])
@cases
def test_the_level_of_a_row_changes_no_value_and_no_gradient(T, dtype, level):
    q, k, v, t, bias = inputs(T, dtype, level)
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = [x.double().requires_grad_() for x in (q, k, v)]
    out, wanted = fa.attention(*mine, bias=bias), dense(*theirs)
    with torch.no_grad():
        assert_near(fa.attention(q, k, v, bias=bias), wanted.detach(), dtype)
    assert_near(out.detach(), wanted.detach(), dtype)
    grads = torch.autograd.grad(out, mine, t), torch.autograd.grad(wanted, theirs, t.double())
    for one, other in zip(*grads, strict=True):
        assert_near(one, other, dtype)


@pytest.mark.parametrize("T", [8, 40])
@cases
def test_the_level_of_a_row_changes_no_derivative_of_forward_mode_and_none_of_second_order(
    T, dtype, level
):
    q, k, v, t, bias = inputs(T, dtype, level)
    wide, moves = (q.double(), k.double(), v.double()), (t.double(),) * 3
    got = jvp(lambda *x: fa.attention(*x, bias=bias), (q, k, v), (t, t, t))
    for one, other in zip(got, jvp(dense, wide, moves), strict=True):
        assert_near(one, other, dtype)
    if dtype in (torch.bfloat16, torch.float16):
        # a second derivative is a sum of products of four roundings, for which there is no short
        # bound
        return
    slope = lambda f: grad(lambda *x: f(*x).square().sum(), (0, 1, 2))
    mine = lambda *x: fa.attention(*x, bias=bias)
    for one, other in zip(
        jvp(slope(mine), (q, k, v), (t, t, t))[1], jvp(slope(dense), wide, moves)[1], strict=True
    ):
        assert_near(one, other, dtype)
    along = lambda f, t: lambda *x: jvp(f, x, (t, t, t))[1].square().sum()
    for one, other in zip(
        grad(along(mine, t), (0, 1, 2))(q, k, v),
        grad(along(dense, t.double()), (0, 1, 2))(*wide),
        strict=True,
    ):
        assert_near(one, other, dtype)


@pytest.mark.parametrize("T", [8, 40])
@pytest.mark.parametrize("level", [1e9, -1e30])
def test_large_products_of_queries_and_keys_change_nothing_either(T, level):
    """No bias: the first query and the last feature of the keys make the level, and torch's fused
    kernel is in reach.
    """
    q, k, v, t, _ = inputs(T, torch.float32, 0.0)
    q[..., -1], k[..., -1], t[..., -1] = 0, abs(level) ** 0.5, 0
    q[:, 0, -1] = level / abs(level) ** 0.5
    some = lambda f: lambda v: f(q, k, v)
    wanted = some(lambda q, k, v: dense(q * (q.abs() < 1e3), k, v))
    for mask in (None, fa.masks.causal(T) | fa.masks.sinks(T, T)):
        got = some(lambda q, k, v, mask=mask: fa.attention(q, k, v, mask))
        for one, other in zip(jvp(got, (v,), (t,)), jvp(wanted, (v,), (t,)), strict=True):
            assert_near(one, other, torch.float32)
        slopes = [
            vmap(grad(lambda v, f=f: (f(v) * t).sum()))(torch.stack([v, -v])) for f in (got, wanted)
        ]
        assert_near(*slopes, torch.float32)
        # nothing but a first gradient, which torch's kernel would make
        leaf = v.clone().requires_grad_()
        (slope,) = torch.autograd.grad(got(leaf), leaf, t)
        assert_near(slope, slopes[1][0], torch.float32)


def test_a_row_at_the_lowest_number_is_the_mean_of_the_values_with_a_score_and_in_the_weights():
    q, k, v, _, bias = inputs(8, torch.float32, LOWEST[torch.float32])
    lowest = lambda s, b, h, i, j: torch.where(i == 0, LOWEST[torch.float32], s)
    out = attention_with_score(q, k, v, lowest).out
    torch.testing.assert_close(out[:, 0], v.mean(-2))
    slope = grad(lambda v: attention_with_score(q, k, v, lowest).out[:, 0].sum())(v)
    torch.testing.assert_close(slope, torch.full_like(v, 1 / 8))
    torch.testing.assert_close(fa.attention_weights(q, k, bias=bias).sum(-1), torch.ones(2, 8))


def test_among_the_lowest_numbers_the_greater_one_wins():
    """A multiplication by log2(e) would make both of them minus infinity."""
    q, k, v, _, bias = inputs(40, torch.float32, LOWEST[torch.float32])
    bias[0, 1] = LOWEST[torch.float32] * 0.9
    torch.testing.assert_close(fa.attend(q, k, v, bias=bias, kernel="flash").out[:, 0], v[:, 1])


def test_a_far_row_costs_another_pass_and_a_near_one_none(monkeypatch):
    seen = []
    statistics = torch_blocks._Contractor._statistics
    monkeypatch.setattr(
        torch_blocks._Contractor, "_statistics", lambda *x: seen.append(1) or statistics(*x)
    )
    for level, passes in ((torch_blocks.FAR / 2, 0), (2 * torch_blocks.FAR, 1)):
        q, k, v, _, bias = inputs(40, torch.float32, level)
        grad(lambda v, bias=bias: fa.attention(q, k, v, bias=bias, kernel="flash").sum())(v)
        assert len(seen) == passes


def test_a_module_with_a_padding_mask_of_numbers_trains_as_it_predicts():
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x, memory = fa.random.normal(fa.key(0), (2, 4, 8)), fa.random.normal(fa.key(1), (2, 5, 8))
    padding = torch.zeros(2, 5)
    padding[1] = -1e9
    call = lambda need_weights: module(
        x, memory, memory, key_padding_mask=padding, need_weights=need_weights
    )[0].detach()
    with torch.no_grad():
        wanted = call(False)
    with fa.interop.override_sdpa():
        torch.testing.assert_close(call(False), wanted)
        torch.testing.assert_close(call(True), wanted)


def test_a_model_of_transformers_with_a_mask_of_numbers_trains_as_it_predicts():
    transformers = pytest.importorskip("transformers")
    fa.interop.register_transformers()
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    }
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=32, vocab_size=50, attn_implementation="funcattn"
    )
    model = transformers.LlamaForCausalLM(config).eval()
    hidden = torch.ones(2, 1, 6, 6).triu(1).bool()
    hidden[0, ..., :2] = True  # left padding: the first rows see nothing but the lowest number
    mask = torch.zeros(hidden.shape).masked_fill(hidden, LOWEST[torch.float32])
    call = lambda: model(torch.arange(12).reshape(2, 6), attention_mask=mask).logits.detach()
    with torch.no_grad():
        wanted = call()
    torch.testing.assert_close(call(), wanted, atol=1e-5, rtol=1e-4)
