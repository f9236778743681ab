"""The ring: equal to dense attention under the mask of its window and sinks, at a memory and a cost
that do not grow.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import caches, masks
from funcattn.caches import Branch, Delta, Ring, ring
from funcattn.kernels import KVSegment, attend_segments
from funcattn.testing import dense

L, K, G, D = 2, 2, 2, 4
q, k, v = (
    fa.random.normal(fa.fold_in(fa.key(5), i), (L, n, 40, D), torch.float64)
    for i, n in enumerate((K * G, K, K))
)


def empty(kind):
    return kind.empty(L, K, 0, D, torch.float64)


def rows(start, stop):
    return Delta(tuple(k[..., start:stop, :]), tuple(v[..., start:stop, :]))


def seen_by(T, window, sinks):
    """The mask that a ring stands for."""
    return (
        masks.causal(T) & (masks.window(T, window) | masks.sinks(T, sinks))
        if sinks
        else masks.causal(T) & masks.window(T, window)
    )


def read(cache, start, T, mask, window=None):
    """What T new tokens get from the past and from each other, (L, H, T, D)."""
    new = mask.dense(start + T)[start:, start:]
    out = []
    for layer in range(L):
        parts = caches.past(cache, layer, torch.arange(start, start + T), window)
        here = KVSegment(k[layer, :, start : start + T], v[layer, :, start : start + T], new)
        out.append(attend_segments(q[layer, :, start : start + T], [*parts, here], scale=D**-0.5))
    return torch.stack(out)


def wanted(start, T, mask):
    seen = mask.dense(start + T)
    whole = [
        dense.attend(q[i, :, : start + T], k[i, :, : start + T], v[i, :, : start + T], seen).out
        for i in range(L)
    ]
    return torch.stack(whole)[..., start:, :]


RINGS = st.builds(ring, window=st.integers(1, 9), sinks=st.integers(0, 3), tail=st.integers(1, 5))


@settings(max_examples=100)
@given(
    RINGS,
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=8),
    st.integers(1, 12),
)
def test_a_ring_is_dense_attention_under_its_mask_in_any_chunks(kind, chunks, narrow):
    """Chunks longer than the window too; some of each is rejected; a layer's own window may be
    narrower than the ring.
    """
    past, at = empty(kind), 0
    for T, n in chunks:
        if at + T > 40:
            break
        mask = seen_by(at + T, kind.window, kind.sinks)
        torch.testing.assert_close(read(past, at, T, mask), wanted(at, T, mask), rtol=0, atol=1e-12)
        if not kind.sinks:  # sinks are seen whatever the layer's window
            mask = seen_by(at + T, min(narrow, kind.window), 0)
            torch.testing.assert_close(
                read(past, at, T, mask, narrow), wanted(at, T, mask), rtol=0, atol=1e-12
            )
        past = fa.commit(past, rows(at, at + T), min(n, T))
        at += min(n, T)
        assert int(past.length) == at


@settings(max_examples=30)
@given(RINGS, st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), min_size=2, max_size=4))
def test_rows_of_a_batch_move_on_each_at_its_own_time(kind, program):
    lengths = torch.tensor([n for n, _ in program])
    counts = torch.tensor([n for _, n in program])

    def run(first, second):
        past = empty(kind)
        for begin, n in ((0, first), (7, second), (14, first), (21, second)):
            past = fa.commit(past, rows(begin, begin + 7), n)
        return past, read_one(past)

    read_one = lambda past: torch.stack(
        [
            attend_segments(
                q[i, :, :1],
                [
                    *caches.past(past, i, past.length.reshape(1)),
                    KVSegment(k[i, :, :1], v[i, :, :1]),
                ],
                scale=0.5,
            )
            for i in range(L)
        ]
    )
    _, got = vmap(run)(lengths, counts)
    for i in range(len(program)):
        torch.testing.assert_close(
            got[i], run(int(lengths[i]), int(counts[i]))[1], rtol=0, atol=1e-12
        )


CONFIG = fa.Config(
    layers=L, kv_heads=K, head_size=D, heads=4, width=16, feed_forward=16, vocabulary=32
)
MODEL = fa.decoder(CONFIG)
PARAMS = fa.cast(torch.float64)(MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(1), (30,), 0, 32)


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_decoder_with_a_ring_is_the_decoder_with_the_mask(sinks):
    mask = seen_by(30, 6, sinks)
    whole = MODEL.logits(PARAMS, MODEL.hidden(PARAMS, TOKENS, mask=mask)[0])
    past, at = MODEL.cache(0, kind=ring(window=6, sinks=sinks, tail=4), dtype=torch.float64), 0
    for T in (9, 1, 1, 1, 1, 1, 4, 1, 11):
        here = mask.dense(30)[at : at + T, at : at + T]
        logits, delta = MODEL.extend(PARAMS, TOKENS[at : at + T], past, mask=here)
        torch.testing.assert_close(logits, whole[at : at + T], rtol=0, atol=1e-12)
        past, at = fa.commit(past, delta), at + T


def test_memory_and_what_a_step_reads_do_not_grow_with_the_text():
    kind = ring(window=8, sinks=2, tail=4)
    past, most = empty(kind), 0
    numel = lambda cache: sum(x.numel() for x in cache)
    for at in range(40):
        parts = caches.past(past, 0, torch.tensor([at]))
        most = max(most, sum(part.k.shape[-2] for part in parts))
        assert all(type(part.mask) is tuple for part in parts)
        past = fa.commit(past, rows(at, at + 1))
        assert numel(past) == numel(empty(kind))
        assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in past[:6])
    assert most == 2 + 7
    _, after = fa.generate(
        fa.key(0),
        MODEL,
        PARAMS,
        TOKENS[:3],
        MODEL.cache(0, kind=kind, dtype=torch.float64),
        steps=50,
    )
    assert isinstance(after, Ring)
    assert numel(after) == numel(empty(kind))


def test_a_fork_shares_what_is_kept_and_an_older_value_is_a_rewind():
    past = fa.commit(empty(ring(window=8, tail=4)), rows(0, 9))
    a, b = fa.commit(past, rows(9, 11)), fa.commit(past, rows(20, 21))
    assert a.k.data_ptr() == b.k.data_ptr() == past.k.data_ptr()
    far = past
    for at in range(9, 40, 3):
        far = fa.commit(far, rows(at, min(at + 3, 40)))
    mask = seen_by(10, 8, 0)
    torch.testing.assert_close(read(past, 9, 1, mask), wanted(9, 1, mask), rtol=0, atol=1e-12)


def test_a_ring_may_be_the_prefix_of_a_branch_and_its_tail():
    prefix = fa.commit(empty(ring(window=6, sinks=1, tail=2)), rows(0, 11))
    own = caches.Cache.empty(L, K, 9, D, torch.float64)
    branch, mask = fa.commit(Branch(prefix, own), rows(11, 14)), seen_by(15, 6, 1)
    torch.testing.assert_close(read(branch, 14, 1, mask), wanted(14, 1, mask), rtol=0, atol=1e-12)
    tail = Branch(fa.commit(own, rows(0, 3)), fa.commit(empty(ring(window=6, tail=2)), rows(3, 14)))
    exact = seen_by(15, 6, 3)
    assert int(tail.length) == 14
    torch.testing.assert_close(read(tail, 14, 1, exact), wanted(14, 1, exact), rtol=0, atol=1e-12)


def test_derivatives_go_through_what_a_ring_keeps():
    def loss(new, q):
        past = fa.commit(empty(ring(window=5, sinks=1, tail=2)), Delta((new, new), (new, new)))
        past = fa.commit(past, Delta((new[:, :2], new[:, :2]), (new[:, :2], new[:, :2])))
        return (
            attend_segments(q, caches.past(past, 0, past.length.reshape(1)), scale=0.5)
            .square()
            .sum()
        )

    one, new = q[0, :, :1], k[0, :, :7]
    slope = grad(loss)(new, one)
    # 0 is a sink; 5, 6, 0, 1 are kept
    assert (slope != 0).any(-1).any(0).tolist() == [True, True, False, False, False, True, True]
    torch.autograd.gradcheck(lambda x: loss(x, one), new.clone().requires_grad_())
    _, tangent = jvp(lambda x: loss(x, one), (new,), (torch.ones_like(new),))
    torch.testing.assert_close(tangent, slope.sum())
    each = vmap(grad(loss), (None, 0))(new, torch.stack([one, 2 * one]))
    torch.testing.assert_close(each[0], slope)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: ring(window=0),
            ValueError,
            "ring: window should be a number of tokens, at least 1, got 0",
        ),
        (
            lambda: ring(window=4, sinks=-1),
            ValueError,
            "sinks should be a number of tokens, at least 0, got -1",
        ),
        (
            lambda: ring(window=4, tail=0),
            ValueError,
            "tail should be a number of tokens, at least 1, got 0",
        ),
        (
            lambda: caches.with_length(empty(ring(window=4)), torch.tensor(0)),
            TypeError,
            "Keep the older value",
        ),
        (
            lambda: caches.flatten(Branch(caches.Cache.empty(L, K, 9, D), empty(ring(window=4)))),
            TypeError,
            "Keep the Branch",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
