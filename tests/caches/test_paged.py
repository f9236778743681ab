"""Blocks: what a commit does not write is shared by identity, what was never written takes no
memory.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import caches, tree
from funcattn.caches import Branch, Cache, Delta, Pages, pages

CONFIG = fa.Config(
    layers=2, kv_heads=2, head_size=4, heads=4, width=16, feed_forward=16, vocabulary=32
)
MODEL = fa.decoder(CONFIG)
PARAMS = fa.cast(torch.float64)(MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(1), (200,), 0, 32)
ROW = 2 * 2 * 2 * 4 * 8  # bytes of a token: keys and values, layers, heads, features, float64


def rows(T, key=5):
    k, v = fa.random.normal(fa.key(key), (2, 2, 2, T, 4), torch.float64)
    return Delta(tuple(k), tuple(v))


def bytes_of(*values):
    """What values take together: each storage once."""
    return sum(
        {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for v in values
            for x in tree.leaves(v)
        }.values()
    )


def empty(kind, size=40):
    return kind.empty(2, 2, size, 4, torch.float64)


def test_forks_share_their_blocks_by_identity_and_copy_the_one_they_write_in():
    past = fa.commit(empty(pages(block=4)), rows(10))
    forks = [fa.commit(past, rows(3, key=i)) for i in range(3)]
    for fork in forks:
        assert [x is y for x, y in zip(fork.k, past.k, strict=True)] == [
            True,
            True,
            False,
            False,
            *[True] * 6,
        ]
    # three blocks of four, one zero for all that is unwritten, the length
    assert bytes_of(past) <= 12 * ROW + 64
    assert bytes_of(past, *forks) <= (12 + 3 * 8) * ROW + 4 * 64


@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 12))
def test_a_commit_writes_in_no_more_blocks_than_its_rows_reach(block, before, T):
    past = fa.commit(empty(pages(block=block)), rows(20), before)
    after = fa.commit(past, rows(T)) if T else past
    changed = [i for i, (x, y) in enumerate(zip(after.v, past.v, strict=True)) if x is not y]
    assert changed == sorted({i // block for i in range(before, before + T)})


@pytest.mark.parametrize("kind", [Cache, pages(block=64)], ids=str)
@pytest.mark.parametrize("own", [Cache, pages(block=32)], ids=str)
def test_32_branches_hold_their_prefix_once_and_their_own_rows(kind, own):
    prefix = fa.commit(empty(kind, 1000), rows(1000))
    one = bytes_of(prefix)
    assert bytes_of(*[Branch(prefix, empty(pages(block=32), 64)) for _ in range(32)]) <= 1.05 * one
    branches = [fa.commit(Branch(prefix, empty(own, 64)), rows(64, key=i)) for i in range(32)]
    assert bytes_of(*branches) <= 1.1 * (one + 32 * 64 * ROW)


@pytest.mark.parametrize(("block", "spare"), [(8, 0), (40, 16), (64, 64), (1, 0)])
def test_32_forks_of_blocks_hold_what_they_share_once(block, spare):
    """A fork goes on in a copy of the block that is not full, so it holds up to two blocks more
    than its own 64 rows.
    """
    past = fa.commit(empty(pages(block=block), 1064), rows(1000))
    forks = [past] * 32  # a fork is using a value twice
    assert bytes_of(*forks) == bytes_of(past)
    forks = [fa.commit(fork, rows(64, key=i)) for i, fork in enumerate(forks)]
    # lengths, and the zero of what is unwritten
    assert bytes_of(*forks) <= (1000 + 32 * (64 + spare)) * ROW + 33 * 16


@pytest.mark.parametrize("kind", [Cache, pages(block=32), pages(block=8)])
def test_32_futures_under_vmap_hold_their_prefix_once(kind):
    _, past = MODEL.apply(
        PARAMS,
        fa.random.randint(fa.key(2), (1000,), 0, 32),
        MODEL.cache(1000, kind=kind, dtype=torch.float64),
    )
    one = bytes_of(past)
    sampler = fa.sampling.temperature(1.0)
    go_on = lambda key: fa.generate(key, MODEL, PARAMS, TOKENS[:1], past, steps=64, sampler=sampler)
    tokens, after = vmap(go_on)(fa.split(fa.key(3), 32))
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    assert isinstance(after, Branch)
    assert bytes_of(past, after) <= 1.1 * (one + 32 * 64 * ROW)


def test_rows_of_a_batch_copy_only_the_blocks_that_one_of_them_writes_in():
    lengths = torch.tensor([2, 9, 30])
    past = vmap(lambda n: fa.commit(empty(pages(block=4)), rows(30), n))(lengths)
    seen = []

    def step(past):
        after = fa.commit(past, rows(2))
        seen.append([i for i, (x, y) in enumerate(zip(after.k, past.k, strict=True)) if x is not y])
        return after

    after = vmap(step)(past)
    assert seen == [[0, 2, 7]]  # 2 and 3, 9 and 10, 30 and 31
    for b, n in enumerate(lengths.tolist()):
        alone = fa.commit(fa.commit(empty(pages(block=4)), rows(30), n), rows(2))
        mine = tree.map(lambda leaf, b=b: leaf[b], after)
        assert int(mine.length) == n + 2
        got = torch.cat(mine.k, -2)[..., : n + 2, :]
        assert torch.equal(got, torch.cat(alone.k, -2)[..., : n + 2, :])


def test_pages_in_the_decoder_are_the_dense_past():
    for block in (1, 3, 64):
        logits, past = MODEL.apply(
            PARAMS, TOKENS[:11], MODEL.cache(20, kind=pages(block=block), dtype=torch.float64)
        )
        dense, other = MODEL.apply(PARAMS, TOKENS[:11], MODEL.cache(20, dtype=torch.float64))
        for token in TOKENS[11:16]:
            more, past = MODEL.apply(PARAMS, token.reshape(1), past)
            wanted, other = MODEL.apply(PARAMS, token.reshape(1), other)
            torch.testing.assert_close(more, wanted, rtol=0, atol=1e-12)
        joined = caches.flatten(Branch(past, fa.commit(empty(pages(block=2)), rows(2))))
        assert isinstance(joined, Pages)
        assert int(joined.length) == 18


def test_a_window_reads_the_blocks_it_reaches():
    past = fa.commit(empty(pages(block=4)), rows(30))
    for window, wanted in ((5, 4), (9, 8), (100, 30), (1, 0)):
        parts = caches.past(past, 0, torch.tensor([30]), window)
        assert sum(part.k.shape[-2] for part in parts) == wanted
        assert all(type(part.mask) is tuple for part in parts)


def test_a_shortened_past_is_grown_without_what_it_no_longer_counts():
    """Blocks beyond the length belong to the longer value: whoever continues the shorter one in
    place must not write there.
    """
    long = fa.commit(empty(pages(block=4)), rows(14))
    short = caches.with_length(long, torch.tensor(3))
    before = tree.map(torch.clone, long)
    caches.commit_donated(caches.grow(short, 4), rows(9, key=6), 9)
    for now, then in zip(tree.leaves(long), tree.leaves(before), strict=True):
        assert torch.equal(now, then)


def test_derivatives_go_through_blocks():
    base = fa.commit(empty(pages(block=4)), rows(6))

    def loss(new):
        after = fa.commit(base, Delta((new, new), (new, new)), 3)
        return sum(
            (part.v.square().sum() for part in caches.past(after, 0, after.length.reshape(1))),
            torch.zeros(()),
        )

    new = rows(4).k[0]
    slope = grad(loss)(new)
    wanted = 2 * new
    wanted[..., 3:, :] = 0  # rejected
    torch.testing.assert_close(slope, wanted)
    torch.testing.assert_close(jvp(loss, (new,), (torch.ones_like(new),))[1], slope.sum())
    torch.testing.assert_close(vmap(grad(loss))(torch.stack([new, 2 * new]))[1], 2 * slope)


def test_blocks_in_compiled_code():
    f = torch.compile(
        lambda past: MODEL.apply(PARAMS, TOKENS[:2], past), fullgraph=True, backend="eager"
    )
    for n in (1, 5):
        past = MODEL.apply(
            PARAMS, TOKENS[:n], MODEL.cache(12, kind=pages(block=4), dtype=torch.float64)
        )[1]
        logits, after = f(past)
        wanted, _ = MODEL.apply(PARAMS, TOKENS[:2], past)
        torch.testing.assert_close(logits, wanted)
        assert int(after.length) == n + 2


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: pages(block=0),
            ValueError,
            "pages: block should be a number of tokens, at least 1, got 0",
        ),
        (
            lambda: fa.commit(empty(pages(block=4), 4), rows(5)),
            ValueError,
            r"room for 5 tokens \(it has 4\).*grow\(cache, 5\)",
        ),
        (
            lambda: fa.commit(
                empty(pages(block=4))._replace(k=(torch.zeros(2, 1, 4, 4),)), rows(1)
            ),
            ValueError,
            "Use the cache of the same model",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
