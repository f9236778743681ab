"""flash_attn and xformers inside `closed`: stand-ins of their functions, against dense attention."""

import sys
import types

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.interop import closed

EXACT = {
    "atol": 1e-10,
    "rtol": 1e-10,
}  # float64: second derivatives of sums of some hundred products
B, T, S, H, K, D = 2, 5, 7, 4, 2, 3


def absent(*args, **kwargs):
    raise AssertionError("the function itself was called")


def standing_in(name):
    """A function of that name, with code of its own, as `from flash_attn import ...` binds it."""
    return types.FunctionType(absent.__code__.replace(), {}, name)


@pytest.fixture
def flash(monkeypatch):
    module = types.ModuleType("flash_attn")
    for name in ("func", "kvpacked_func", "qkvpacked_func", "varlen_func"):
        setattr(module, f"flash_attn_{name}", standing_in(f"flash_attn_{name}"))
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def efficient(monkeypatch):
    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = standing_in("memory_efficient_attention")
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    return module.memory_efficient_attention


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, dtype=torch.float64)


Q, KEY, V = normal(1, B, T, H, D), normal(2, B, S, K, D), normal(3, B, S, K, D)
SLOPES, EACH = normal(4, H), normal(5, B, H)


def dense(q, k, v, seen, change=lambda s: s, scale=None):
    """By the formula, with axes (B, T, H, D); rows that see no key are zero."""
    k, v = (x.repeat_interleave(q.shape[-2] // x.shape[-2], -2) for x in (k, v))
    q, k, v = (x.movedim(-3, -2) for x in (q, k, v))
    s = change(q @ k.mT * (scale or q.shape[-1] ** -0.5))
    p = torch.where(seen, (s - s.amax(-1, keepdim=True).detach()).exp(), 0)
    return (p @ v / p.sum(-1, keepdim=True).clamp(min=1e-300)).movedim(-2, -3)


ROW, COL = torch.arange(T)[:, None] + S - T, torch.arange(S)
FAR = (ROW - COL).abs()
CASES = {  # options, the keys that a query sees, the change of the logits
    "nothing": ({}, FAR >= 0, None),
    "causal": ({"causal": True, "softmax_scale": 0.3}, COL <= ROW, None),
    "a window": ({"window_size": (1, 2)}, (COL >= ROW - 1) & (COL <= ROW + 2), None),
    "a causal window": (
        {"causal": True, "window_size": (2, 2)},
        (COL >= ROW - 2) & (COL <= ROW),
        None,
    ),
    "a soft cap": ({"softcap": 0.4, "causal": True}, COL <= ROW, lambda s: 0.4 * (s / 0.4).tanh()),
    "slopes": ({"alibi_slopes": SLOPES}, FAR >= 0, lambda s: s - SLOPES[:, None, None] * FAR),
    "slopes of each text": (
        {"alibi_slopes": EACH, "softcap": 2.0, "causal": True},
        COL <= ROW,
        lambda s: 2 * (s / 2).tanh() - EACH[..., None, None] * FAR,
    ),
}


def derivatives(f, *x):
    loss = lambda *x: f(*x).sin().sum()
    t = tuple(y.cos() for y in x)
    both = jvp(f, x, t), grad(loss, (0, 1))(*x)
    rows = vmap(grad(loss))(*(torch.stack([a, b]) for a, b in zip(x, t, strict=True)))
    return (*both, rows, jvp(grad(loss), x, t)[1])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_derivative_of_flash_attention_is_that_of_the_formula(case, flash):
    options, seen, change = case
    bound = flash.flash_attn_func
    with closed():
        found = derivatives(lambda *x: bound(*x, **options), Q, KEY, V)
    formula = lambda *x: dense(*x, seen, change or (lambda s: s), options.get("softmax_scale"))
    torch.testing.assert_close(found, derivatives(formula, Q, KEY, V), **EXACT)
    with pytest.raises(AssertionError):
        bound(Q, KEY, V)


def test_packed_forms_are_the_form_of_three(flash):
    packed = torch.stack([KEY, V, KEY.sin()], -3)
    with closed():
        torch.testing.assert_close(
            flash.flash_attn_qkvpacked_func(packed, causal=True),
            flash.flash_attn_func(*packed.unbind(-3), causal=True),
        )
        torch.testing.assert_close(
            flash.flash_attn_kvpacked_func(Q, torch.stack([KEY, V], -3), 0.0, 0.2),
            flash.flash_attn_func(Q, KEY, V, 0.0, 0.2),
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (1, 0)}, {"alibi_slopes": SLOPES, "causal": True}],
    ids=["whole", "causal", "window", "slopes"],
)
def test_texts_behind_one_another_are_texts_alone(options, flash):
    begin_q, begin_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5, 10], [0, 3, 7, 14]))
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (Q, KEY, V))

    def alone(q):
        parts = [
            flash.flash_attn_func(q[a:b][None], k[c:d][None], v[c:d][None], **options)[0]
            for a, b, c, d in zip(begin_q[:-1], begin_q[1:], begin_k[:-1], begin_k[1:], strict=True)
        ]
        return torch.cat(parts)

    together = lambda q: flash.flash_attn_varlen_func(q, k, v, begin_q, begin_k, 5, 7, **options)
    with closed():
        torch.testing.assert_close(
            jvp(together, (q,), (q.cos(),)), jvp(alone, (q,), (q.cos(),)), **EXACT
        )


class LowerTriangularMask:
    """As xformers names it."""


class LowerTriangularFromBottomRightMask:
    """As xformers names it."""


class Checkered:
    """A class of masks of its own."""

    def materialize(self, shape, dtype, device):
        seen = (torch.arange(shape[-2])[:, None] + torch.arange(shape[-1])) % 2 == 0
        return torch.zeros(shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)


BIAS = normal(6, B, H, T, S)
BIASES = {
    "none": (None, FAR >= 0, None),
    "numbers": (BIAS, FAR >= 0, lambda s: s + BIAS),
    "causal from the top": (LowerTriangularMask(), COL <= ROW - (S - T), None),
    "causal from the bottom": (LowerTriangularFromBottomRightMask(), COL <= ROW, None),
    "another class": (Checkered(), (ROW - (S - T) + COL) % 2 == 0, None),
}


@pytest.mark.parametrize("case", BIASES.values(), ids=BIASES)
def test_every_derivative_of_xformers_is_that_of_the_formula(case, efficient):
    bias, seen, change = case
    k, v = KEY.repeat_interleave(2, 2), V.repeat_interleave(2, 2)
    f = lambda *x: efficient(*x, attn_bias=bias)
    formula = lambda *x: dense(*x, seen, change or (lambda s: s))
    with closed():
        found = derivatives(f, Q, k, v)
    torch.testing.assert_close(found, derivatives(formula, Q, k, v), **EXACT)


def test_three_and_five_axes_of_xformers(efficient):
    k, v = KEY[:, :, :1].expand(-1, -1, 2, -1), V[:, :, :1].expand(-1, -1, 2, -1)
    three = dense(Q[:, :, :1], KEY[:, :, :1], V[:, :, :1], FAR >= 0)[:, :, 0]
    five = torch.stack([dense(x, k, v, FAR >= 0) for x in (Q[:, :, :2], Q[:, :, 2:])], 2)
    with closed():
        found = efficient(Q[:, :, 0], KEY[:, :, 0], V[:, :, 0], scale=None, op=(None, None))
        torch.testing.assert_close(found, three, **EXACT)
        grouped = Q.reshape(B, T, 2, 2, D)
        wide = lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1)
        found = efficient(grouped, wide(k), wide(v), output_dtype=torch.float32)
    torch.testing.assert_close(found, five.float())


def test_dropout_needs_a_key_and_draws_from_it(flash, efficient):
    k, v = KEY.repeat_interleave(2, 2), V.repeat_interleave(2, 2)
    calls = (
        lambda: flash.flash_attn_func(Q, KEY, V, dropout_p=0.5),
        lambda: efficient(Q, k, v, p=0.5),
    )
    for call in calls:
        with closed(), pytest.raises(ValueError, match=r"closed\(key=fa.key\(0\)\)"):
            call()
        draws = []
        for seed in (0, 0, 1):
            with closed(key=fa.key(seed)):
                draws.append(call())
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


def test_what_is_not_there_is_a_clear_error(flash):
    f = flash.flash_attn_func
    begin = torch.tensor([0, T * B])
    with closed(key=fa.key(0)):
        with pytest.raises(ValueError, match="return_attn_probs should be False"):
            f(Q, KEY, V, return_attn_probs=True)
        with pytest.raises(ValueError, match="dropout_p should be 0 with softcap"):
            f(Q, KEY, V, dropout_p=0.1, softcap=1.0)
        flat = Q.reshape(-1, H, D)
        with pytest.raises(ValueError, match="block_table should be None"):
            flash.flash_attn_varlen_func(flat, flat, flat, begin, begin, T, T, block_table=begin)
