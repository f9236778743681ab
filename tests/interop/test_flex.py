"""torch's flex_attention inside `closed`: its own examples, against dense attention in float64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)

import funcattn as fa
from funcattn.interop import closed, flex
from funcattn.interop.block_masks import intervals

EXACT = {"atol": 1e-10, "rtol": 1e-10}
B, H, T, E = 2, 3, 40, 4


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, dtype=torch.float64)


Q, K, V = normal(1, B, H, T, E), normal(2, B, H, T, E), normal(3, B, H, T, E)
TANGENTS = normal(4, B, H, T, E), normal(5, B, H, T, E), normal(6, B, H, T, E)
SLOPES, TABLE = normal(7, H), normal(8, H, 2 * T)
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 20 + [2] * 7, [0] * 30 + [3] * 10])
LENGTHS = torch.tensor([5, 17])


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def window(b, h, q_idx, kv_idx):
    return q_idx - kv_idx <= 6


def document(b, h, q_idx, kv_idx):
    return DOCUMENTS[b, q_idx] == DOCUMENTS[b, kv_idx]


def prefix(b, h, q_idx, kv_idx):
    return kv_idx < LENGTHS[b]


def of_head(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx).abs() <= 4 * h + 2


def checkered(b, h, q_idx, kv_idx):
    return (q_idx + kv_idx) % 2 == 0


def alibi(score, b, h, q_idx, kv_idx):
    return score + SLOPES[h] * (kv_idx - q_idx)


def soft_cap(score, b, h, q_idx, kv_idx):
    return 0.7 * torch.tanh(score / 0.7)


def relative(score, b, h, q_idx, kv_idx):
    return score + TABLE[h, q_idx - kv_idx + T]


def content(score, b, h, q_idx, kv_idx):
    """Not elementwise in broadcasting tensors: a product of rows, for scalars."""
    return score + V[b, h, q_idx] @ V[b, h, kv_idx]


def noop(score, b, h, q_idx, kv_idx):
    return score


# score_mod, mask_mod, whether the block mask has axes of B and H
EXAMPLES = {
    "nothing": (None, None, (False, False)),
    "causal": (None, causal, (False, False)),
    "causal, for each head": (None, causal, (True, True)),
    "sliding window": (None, and_masks(causal, window), (False, False)),
    "document": (None, and_masks(causal, document), (True, False)),
    "prefix": (None, or_masks(causal, prefix), (True, False)),
    "of the head": (None, of_head, (False, True)),
    "checkered": (None, checkered, (False, False)),
    "alibi": (alibi, None, (False, False)),
    "alibi, causal": (alibi, causal, (False, False)),
    "soft cap": (soft_cap, causal, (False, False)),
    "soft cap, of the head": (soft_cap, of_head, (False, True)),
    "relative bias": (relative, None, (False, False)),
    "products of rows": (content, document, (True, False)),
    "causal as a score": (
        lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")),
        None,
        (False, False),
    ),
}


def blocks(mask_mod, axes=(False, False), size=16, lengths=(T, T)):
    if mask_mod is None:
        return None
    of_b, of_h = axes
    return create_block_mask(
        mask_mod, B if of_b else None, H if of_h else None, *lengths, device="cpu", BLOCK_SIZE=size
    )


INDICES = (
    torch.arange(B).reshape(B, 1, 1, 1),
    torch.arange(H).reshape(H, 1, 1),
    torch.arange(T).reshape(T, 1),
    torch.arange(T),
)


def dense(q, k, v, score_mod=None, mask_mod=None, lse=False):
    """Attention by the formula, its functions called with tensors that broadcast."""
    s = q @ k.mT / q.shape[-1] ** 0.5
    if score_mod is content:
        s = s + V @ V.mT
    elif score_mod is not None:
        s = score_mod(s, *INDICES)
    if mask_mod is not None:
        s = torch.where(mask_mod(*INDICES), s, -torch.inf)
    out = s.softmax(-1) @ v
    return (out, s.logsumexp(-1)) if lse else out


def pair(name):
    """flex_attention of an example, and the dense formula."""
    score_mod, mask_mod, axes = EXAMPLES[name]
    mask = blocks(mask_mod, axes)
    return (
        lambda q, k, v: flex_attention(q, k, v, score_mod, mask),
        lambda q, k, v: dense(q, k, v, score_mod, mask_mod),
    )


def scalar(f):
    return lambda *x: f(*x).sin().sum()


DERIVATIVES = {
    "jvp": lambda f: jvp(f, (Q, K, V), TANGENTS),
    "grad": lambda f: grad(scalar(f), (0, 1, 2))(Q, K, V),
    "jvp of grad": lambda f: jvp(grad(scalar(f), (0, 1, 2)), (Q, K, V), TANGENTS)[1],
    "vmap of grad": lambda f: vmap(grad(scalar(f)), (0, None, None))(torch.stack([Q, K]), K, V),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_derivative_is_that_of_dense_attention(name):
    ours, formula = pair(name)
    for derivative, of in DERIVATIVES.items():
        with closed():
            found = of(ours)
        torch.testing.assert_close(
            found, of(formula), msg=lambda text, d=derivative: f"{d}: {text}", **EXACT
        )


def test_plain_autograd_at_second_order():
    ours, formula = pair("alibi, causal")
    results = []
    for f in (ours, formula):
        q = Q.clone().requires_grad_()
        with closed():
            (slope,) = torch.autograd.grad(scalar(f)(q, K, V), q, create_graph=True)
        results.append(torch.autograd.grad((slope * TANGENTS[0]).sum(), q)[0])
    torch.testing.assert_close(results[0], results[1], **EXACT)


def test_what_the_score_captures_has_derivatives():
    """Slopes and tables are differentiated and mapped, though no argument."""

    def loss(attend, slopes, table):
        def score(s, b, h, i, j):
            return s + slopes[h] * (j - i) + table[h, i - j + T].tanh()

        return scalar(attend)(score)

    ours = lambda score: flex_attention(Q, K, V, score, blocks(causal))
    formula = lambda score: dense(Q, K, V, score, causal)
    t = SLOPES.cos(), TABLE.cos()
    for of in (
        lambda f: grad(f, (0, 1))(SLOPES, TABLE),
        lambda f: jvp(grad(f, (0, 1)), (SLOPES, TABLE), t)[1],
        lambda f: vmap(grad(f), (0, None))(torch.stack([SLOPES, t[0]]), TABLE),
    ):
        with closed():
            found = of(lambda *x: loss(ours, *x))
        torch.testing.assert_close(found, of(lambda *x: loss(formula, *x)), **EXACT)


class Biased(nn.Module):
    """A layer whose score reads its parameters, as models have it."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(SLOPES.clone())

    def score(self, s, b, h, i, j):
        return s + self.slopes[h] * (j - i)

    def forward(self, x):
        return flex_attention(x, x, x, self.score)


def test_parameters_of_a_module_are_captured():
    net, formula = (
        Biased(),
        lambda slopes: dense(Q, Q, Q, lambda s, b, h, i, j: s + slopes[h] * (j - i)),
    )
    apply = lambda slopes: functional_call(net, {"slopes": slopes}, Q)
    x = SLOPES + 1  # not the module's own
    hvp = lambda f: jvp(grad(scalar(f)), (x,), (SLOPES,))[1]
    with closed():
        found = hvp(apply)
        net(Q).sin().sum().backward()
    torch.testing.assert_close(found, hvp(formula), **EXACT)
    torch.testing.assert_close(net.slopes.grad, grad(scalar(formula))(SLOPES), **EXACT)


def test_documents_may_differ_for_each_row_of_a_vmap():
    documents = torch.stack([DOCUMENTS, DOCUMENTS.flip(1)])

    def of(attend):
        def loss(q, documents):
            same = lambda b, h, i, j: documents[b, i] == documents[b, j]
            return scalar(lambda q: attend(q, same))(q)

        return vmap(grad(loss), (None, 0))(Q, documents)

    def ours(q, same):
        mask = BlockMask.from_kv_blocks(
            torch.ones(B, 1, 3, dtype=torch.int32) * 3,
            torch.arange(3, dtype=torch.int32).expand(B, 1, 3, 3),
            BLOCK_SIZE=16,
            mask_mod=same,
            seq_lengths=(T, T),
        )
        return flex_attention(q, K, V, None, mask)

    with closed():
        found = of(ours)
    torch.testing.assert_close(found, of(lambda q, same: dense(q, K, V, None, same)), **EXACT)


@pytest.mark.parametrize("score_mod", [None, noop], ids=["no score", "score"])
def test_blocks_alone_hide_too(score_mod):
    """A hand-made mask: blocks that are not listed are hidden, full ones are not asked."""
    part = torch.tensor([[[1, 0, 0], [0, 0, 1], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 1]]])
    full = torch.tensor([[[0, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0], [1, 0, 0]]])

    def listed(x):
        count = x.sum(-1).int().unsqueeze(1)
        order = torch.argsort(x, dim=-1, descending=True, stable=True)
        return count, order.int().unsqueeze(1)

    mask = BlockMask.from_kv_blocks(
        *listed(part), *listed(full), BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(T, T)
    )
    wide = lambda x: x.bool().repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None, :T, :T]
    i, j = INDICES[2:]
    visible = (wide(part) & (i >= j)) | wide(full)
    f = lambda q: flex_attention(q, K, V, score_mod, mask)
    with closed():
        found = jvp(f, (Q,), (TANGENTS[0],))

    def formula(q):
        s = (q @ K.mT / E**0.5).exp() * visible
        return s @ V / s.sum(-1, keepdim=True).clamp(min=1e-300)

    torch.testing.assert_close(found, jvp(formula, (Q,), (TANGENTS[0],)), **EXACT)


def test_heads_may_differ_within_a_block():
    """The blocks have no axis of heads, the function reads them all the same."""
    mask = blocks(of_head, size=128)
    with closed():
        found = flex_attention(Q, K, V, None, mask)
    torch.testing.assert_close(found, dense(Q, K, V, None, of_head), **EXACT)


def test_a_query_that_sees_no_key_gives_zeros():
    never = lambda b, h, i, j: (i > 3) & (j >= 0)
    with closed():
        for score_mod in (None, noop):
            f = lambda q, score_mod=score_mod: flex_attention(q, K, V, score_mod, blocks(never))
            out, tangent = jvp(f, (Q,), (Q,))
            assert not torch.stack([out, tangent])[:, :, :, :4].any()
            assert out[:, :, 4:].all()


def test_statistics_grouped_heads_and_scale():
    k, v = K[:, :1], V[:, :1]
    s = Q @ k.mT * 0.3
    with closed():
        out, lse = flex_attention(Q, k, v, scale=0.3, enable_gqa=True, return_lse=True)
        again, aux = flex_attention(
            Q, k, v, noop, scale=0.3, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        of_lse = grad(lambda q: flex_attention(q, K, V, alibi, return_lse=True)[1].sin().sum())(Q)
    torch.testing.assert_close([out, lse], [s.softmax(-1) @ v, s.logsumexp(-1)], **EXACT)
    torch.testing.assert_close([again, aux.lse], [out, lse], **EXACT)
    wanted = grad(lambda q: dense(q, K, V, alibi, lse=True)[1].sin().sum())(Q)
    torch.testing.assert_close(of_lse, wanted, **EXACT)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 2),
    size=st.sampled_from([1, 2, 4, 128]),
    spans=st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 6)), min_size=1, max_size=4),
    scored=st.booleans(),
)
def test_any_union_of_windows_is_dense_attention(sizes, size, spans, scored):
    T, S = sizes
    q, k, v = normal(1, 1, 2, T, E), normal(2, 1, 2, S, E), normal(3, 1, 2, S, E)

    def seen(b, h, i, j):
        within = [(j - i >= a) & (j - i < a + n) for a, n in spans]
        return functools.reduce(torch.logical_or, within)

    i, j = torch.arange(T)[:, None], torch.arange(S)
    visible = seen(0, 0, i, j)
    mask = blocks(seen, size=size, lengths=(T, S))
    cap = soft_cap if scored else None

    def formula(q):
        s = q @ k.mT / E**0.5
        s = soft_cap(s, 0, 0, i, j) if scored else s
        p = torch.where(visible, s.exp(), 0)
        return p @ v / p.sum(-1, keepdim=True).clamp(min=1e-300)

    with closed():
        found = jvp(lambda q: flex_attention(q, k, v, cap, mask), (q,), (q.cos(),))
    torch.testing.assert_close(found, jvp(formula, (q,), (q.cos(),)), **EXACT)


def test_masks_of_few_intervals_need_no_score(monkeypatch):
    monkeypatch.setattr(flex, "attention_with_score", None)
    with closed():
        for name in ("nothing", "causal", "sliding window", "document", "prefix"):
            jvp(pair(name)[0], (Q, K, V), TANGENTS)
    mask = intervals(blocks(and_masks(causal, window)), B, H, T, T)
    assert mask.start.shape == (T, 1)
    assert intervals(blocks(of_head), B, H, T, T) is None
    assert intervals(blocks(checkered), B, H, T, T) is None


ERRORS = {
    "three axes": (lambda: flex_attention(Q[0], K, V), r"query should be \(B, H, L, E\)"),
    "other heads": (lambda: flex_attention(Q, K[:, :1], V[:, :1]), "enable_gqa=True"),
    "another length": (
        lambda: flex_attention(Q, K[:, :, :-1], V[:, :, :-1], None, blocks(causal)),
        r"block_mask should be for \(40, 39\)",
    ),
    "maxima": (
        lambda: flex_attention(Q, K, V, return_aux=AuxRequest(max_scores=True)),
        "Compute other statistics",
    ),
    "not elementwise": (
        lambda: flex_attention(Q, K, V, lambda s, b, h, i, j: torch.stack([s, s])),
        "of the shape of s",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_is_a_clear_error(call, message):
    with closed(), pytest.raises((ValueError, RuntimeError), match=message):
        call()


def test_a_sliced_mask_has_no_function():
    sliced = blocks(causal)[:, :, 1:]
    with closed(), pytest.raises((ValueError, RuntimeError), match="block_mask should be"):
        flex_attention(Q[:, :, 16:], K, V, None, sliced)


def test_a_compiled_flex_attention_runs_eagerly_inside():
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention)
    mask = blocks(causal)
    f = lambda q: compiled(q, K, V, alibi, mask)
    with closed():
        found = jvp(f, (Q,), (TANGENTS[0],))
    wanted = jvp(lambda q: dense(q, K, V, alibi, causal), (Q,), (TANGENTS[0],))
    torch.testing.assert_close(found, wanted, **EXACT)


def test_a_whole_graph_of_it_is_an_error_with_the_remedy():
    torch._dynamo.reset()
    f = torch.compile(lambda q: flex_attention(q, K, V).sin(), fullgraph=True, backend="eager")
    with closed(), pytest.raises(RuntimeError, match="without fullgraph=True"):
        f(Q)
