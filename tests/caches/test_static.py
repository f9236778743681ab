"""The memory of another sequence: seen whole by every token, held once, never written."""

import pytest
import torch
from torch.func import grad, vmap

import funcattn as fa
from funcattn import caches
from funcattn.caches import Branch, Delta, Memory
from funcattn.kernels import attend_segments
from funcattn.testing import dense

CONFIG = fa.Config(
    layers=2, kv_heads=2, head_size=4, heads=4, width=16, feed_forward=16, vocabulary=32
)
MODEL = fa.decoder(CONFIG)
PARAMS = fa.cast(torch.float64)(MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(1), (9,), 0, 32)
K, V = fa.random.normal(fa.key(2), (2, 2, 2, 6, 4), torch.float64)
q = fa.random.normal(fa.key(3), (4, 3, 4), torch.float64)


def test_cross_attention_reads_all_of_the_memory_and_no_more():
    """Whatever the window, and per row its own length: padding of the other sequence is
    unobservable, even NaN.
    """
    spoilt = Memory(K.clone(), V.clone(), torch.tensor(4))
    spoilt.k[..., 4:, :] = spoilt.v[..., 4:, :] = torch.nan
    read = lambda memory, window=None: attend_segments(
        q, caches.past(memory, 1, torch.arange(3) + 50, window), scale=0.5
    )
    wanted = dense.attend(q, K[1, :, :4], V[1, :, :4]).out
    for window in (None, 2):
        torch.testing.assert_close(read(spoilt, window), wanted)
    rows = vmap(lambda n: read(spoilt._replace(length=n)))(torch.tensor([4, 2]))
    torch.testing.assert_close(rows[0], wanted)
    torch.testing.assert_close(rows[1], dense.attend(q, K[1, :, :2], V[1, :, :2]).out)


def test_a_text_continues_a_memory_as_it_would_a_dense_past():
    _, past = MODEL.apply(PARAMS, TOKENS[:6], MODEL.cache(6, dtype=torch.float64))
    memory = Memory(past.k[..., :6, :], past.v[..., :6, :], past.length)
    for way in (memory, Branch(memory, MODEL.cache(3, dtype=torch.float64))):
        tokens, after = fa.generate(fa.key(0), MODEL, PARAMS, TOKENS[6:], way, steps=5)
        assert torch.equal(
            tokens, fa.generate(fa.key(0), MODEL, PARAMS, TOKENS[6:], past, steps=5)[0]
        )
        assert after.prefix is memory


def test_a_learned_prefix_has_a_gradient():
    def loss(k):
        memory = Memory(k, V, torch.tensor(6))
        return (
            MODEL.extend(PARAMS, TOKENS[:2], Branch(memory, MODEL.cache(3, dtype=torch.float64)))[0]
            .square()
            .sum()
        )

    slope = grad(loss)(K)
    assert (slope != 0).any(-1).all()
    direction = fa.random.normal(fa.key(9), K.shape, torch.float64)
    step = 1e-6
    difference = (loss(K + step * direction) - loss(K - step * direction)) / (2 * step)
    # Central differences: step^2 of the third derivative, and 2e-16 / step of rounding, relative to
    # a loss of order one.
    torch.testing.assert_close((slope * direction).sum(), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda m: fa.commit(m, Delta(tuple(K), tuple(V))),
            r"commit: cache should be a past that can be written.* Branch\(memory",
        ),
        (
            lambda m: caches.grow(m, 2),
            "grow: cache should be a past that can be written, got a Memory, which is read only",
        ),
    ],
)
def test_a_memory_is_never_written(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong(Memory(K, V, torch.tensor(6)))
