"""Attention over codes, read by the operator: as near as floats are to attention over what the
codes stand for, for every group, window and mask that it takes; the plain route for all others.
"""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcattn as fa
from funcattn import caches, native
from funcattn.caches import Delta, coded_rows, quantized
from funcattn.kernels import CodedSegment, KVSegment, attend_segments, coded
from funcattn.testing import dense

pytestmark = [
    pytest.mark.skipif(bool(native.load()), reason=native.load()),
    pytest.mark.cpu("the operator funcattn::coded_attend is for the CPU"),
]
L, K = 2, 2


def filled(kind, n, D, seed=0, dtype=torch.float32):
    k, v = fa.random.normal(fa.key(seed), (2, L, K, n, D), dtype)
    return fa.commit(kind.empty(L, K, n + 8, D, dtype), Delta(tuple(k), tuple(v)))


def wide(segment):
    return KVSegment(segment.k.double(), segment.v.double(), segment.mask)


def check(q, segments, scale):
    """Near the exact result: a logit is a sum of D products of floats, each of them rounded when it
    was decoded, rotated and multiplied; what a logit is off, its share is, of each value.
    """
    got = attend_segments(q, segments, scale=scale)
    exact = attend_segments(q.double(), [wide(segment) for segment in segments], scale=scale)
    D, S = q.shape[-1], sum(segment.k.shape[-2] for segment in segments)
    norm = lambda x: float(x.norm(dim=-1).max())
    k, v = (max(norm(getattr(s, name)) for s in segments) for name in ("k", "v"))
    off = torch.finfo(torch.float32).eps * 4 * D**0.5
    bound = off * (2 * abs(scale) * norm(q) * k + 1) * v + S**0.5 * 2**-23 * v
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=bound)


@pytest.fixture
def calls(monkeypatch):
    """The results of the operator."""
    seen, run = [], coded.attend
    monkeypatch.setattr(coded, "attend", lambda *args: seen.append(run(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])
def test_it_is_as_near_as_floats_are(instructions):
    if torch.ops.funcattn.instructions(instructions) != instructions:
        pytest.skip("the processor has no such instructions")

    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from([4, 8]),
        st.sampled_from([32, 64, 96, 128]),
        st.sampled_from([32, 64]),
        st.integers(1, 5),
        st.integers(1, 5),
        st.integers(40, 200),
        st.sampled_from([None, 3, 70]),
        st.integers(0, 9),
    )
    def run(bits, D, block, groups, T, n, window, seed):
        past = filled(quantized(bits=bits, block=block, recent=5, sinks=3), n, D, seed)
        positions = past.length + torch.arange(T)
        q = fa.random.normal(fa.key(seed), (K * groups, T, D))
        new = fa.random.normal(fa.key(seed + 1), (2, K, T, D))
        segments = caches.past(past, 1, positions, window)
        if window is None:
            assert isinstance(segments[1], CodedSegment) == (n >= block + 8)
        check(q, [*segments, KVSegment(*new, fa.masks.causal(T))], D**-0.5)

    try:
        run()
    finally:
        torch.ops.funcattn.instructions(-1)


def test_two_threads_give_what_one_does():
    past = filled(quantized(bits=4, recent=0), 1500, 64)
    q = fa.random.normal(fa.key(1), (6, 1, 64))
    read = lambda: attend_segments(q, caches.past(past, 0, past.length.reshape(1)), scale=0.1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = read()
        torch.set_num_threads(2)
        assert torch.equal(read(), one)
    finally:
        torch.set_num_threads(threads)


def test_what_a_query_does_not_see_may_be_nan(calls):
    """In rows beside the codes within the operator; in a scale by the plain route behind it."""
    past = filled(quantized(block=32, recent=0, sinks=2), 70, 32)
    q, new = fa.random.normal(fa.key(1), (2, 3, 32)), fa.random.normal(fa.key(2), (2, K, 3, 32))
    positions = past.length + torch.arange(3)
    read = lambda past, new, window=None: attend_segments(
        q,
        [*caches.past(past, 0, positions, window), KVSegment(*new, fa.masks.causal(3))],
        scale=0.2,
    )
    spoilt = new.clone()
    spoilt[:, :, 2] = torch.nan
    clean = read(past, new)
    got = read(past, spoilt)
    torch.testing.assert_close(got[:, :2], clean[:, :2], rtol=1e-5, atol=1e-6)
    assert got[:, 2].isnan().all()
    block = past.v[0]
    low = block.low.clone()
    low[..., 0] = torch.nan  # of the first token that is coded
    dirty = past._replace(v=(block._replace(low=low), *past.v[1:]))
    wanted = read(past, new, 40)
    calls.clear()
    torch.testing.assert_close(read(dirty, new, 40), wanted, rtol=1e-5, atol=1e-6)
    assert calls == [None]
    assert read(dirty, new).isnan().any()


@pytest.mark.parametrize(
    ("kind", "D", "dtype"),
    [
        (quantized(block=16, recent=0), 32, torch.float32),
        (quantized(block=32, recent=0), 16, torch.float32),
        (quantized(block=32, recent=0), 80, torch.float32),
        (quantized(block=32, recent=0), 32, torch.float64),
        (quantized(block=32, recent=0), 32, torch.bfloat16),
    ],
)
def test_other_sizes_and_dtypes_are_read_as_rows(kind, D, dtype):
    past = filled(kind, 90, D, dtype=dtype)
    segments = caches.past(past, 0, past.length.reshape(1))
    assert all(type(segment) is KVSegment for segment in segments)
    q = fa.random.normal(fa.key(1), (4, 1, D), dtype)
    got = attend_segments(q, segments, scale=0.2)
    k, v = (torch.cat([getattr(s, name) for s in segments], -2) for name in ("k", "v"))
    wanted = dense.attend(q.double(), k.double(), v.double(), scale=0.2).out
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_a_mask_of_booleans_a_cap_and_sinks_take_the_plain_route(calls):
    past = filled(quantized(block=32, recent=0), 90, 32)
    q, new = fa.random.normal(fa.key(1), (4, 2, 32)), fa.random.normal(fa.key(2), (2, K, 2, 32))
    segments = caches.past(past, 0, past.length + torch.arange(2))
    among = fa.masks.causal(2)
    tree = [*segments, KVSegment(*new, among.dense(2))]
    plain = [*[KVSegment(*segment) for segment in segments], KVSegment(*new, among)]
    wanted = attend_segments(q, plain, scale=0.2)
    torch.testing.assert_close(attend_segments(q, tree, scale=0.2), wanted, rtol=1e-5, atol=1e-6)
    assert calls == [None]
    for options in ({"cap": 2.0}, {"sinks": torch.ones(4)}, {"kernel": "flash"}):
        got = attend_segments(q, [*segments, KVSegment(*new, among)], scale=0.2, **options)
        wanted = attend_segments(q, plain, scale=0.2, **options)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert calls == [None]


def test_a_segment_in_codes_is_read_like_one_of_rows():
    past = filled(quantized(block=32, recent=0), 90, 32)
    segment = caches.past(past, 0, past.length + torch.arange(2), 40)[0]
    k, v, mask = segment
    assert segment.k is k
    assert segment.v is v
    assert segment.mask is mask
    assert k.shape == v.shape == (K, 17, 32)  # of rows 36 .. 67, a block, those from 51 on


def test_the_operators_refuse_what_they_cannot_read():
    past = filled(quantized(block=32, recent=0), 90, 32)
    table = caches.past(past, 0, past.length.reshape(1))[1].table
    codes = coded_rows.tensors(past.k[:2], past.v[:2])
    run = lambda q, table, layer, seen: torch.ops.funcattn.coded_attend(
        q, table, layer, [], seen, 1.0
    )
    q, seen = torch.ones(4, 1, 32), [0, 64]
    assert run(q, table, 0, seen).shape == q.shape
    assert torch.equal(coded.addresses(codes, 32, 8, 32), table)
    for wrong, message in (
        ((q, table, 0, [0, 65]), "within the rows"),
        ((q, table, L, seen), "layer should be one"),
        ((torch.ones(3, 1, 32), table, 0, seen), "multiple of the heads"),
        ((torch.ones(4, 1, 64), table, 0, seen), "as many features"),
        ((q, table + 1, 0, seen), "from coded_table"),
        ((q, table[:1], 0, seen), "from coded_table"),
        ((q, table.double(), 0, seen), "from coded_table"),
        ((q, table[:, :5], 0, seen), "from coded_table"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*wrong)
    for wrong, message in (
        ((codes[:5], 32, 8, 32), "codes, scale and low"),
        (([x.double() if x.is_floating_point() else x for x in codes], 32, 8, 32), "float32"),
        ((codes, 64, 8, 32), "of the same sizes"),
        ((codes, 32, 8, 48), "multiple of 32 features"),
    ):
        with pytest.raises(RuntimeError, match=message):
            coded.addresses(*wrong)


def test_addresses_are_those_of_the_blocks_that_are_read():
    """Whatever caches share with each other, whatever was written since; none keeps a block."""
    past = filled(quantized(block=32, recent=0), 90, 32)
    other = filled(quantized(block=32, recent=0), 90, 32, seed=1)
    q, place = fa.random.normal(fa.key(1), (4, 1, 32)), past.length.reshape(1)
    read = lambda past: attend_segments(q, caches.past(past, 0, place), scale=0.2)
    exact = lambda past: attend_segments(
        q, [KVSegment(*each) for each in caches.past(past, 0, place)], scale=0.2
    )
    mixed = past._replace(k=other.k)  # the tail of one, the keys of the other
    shorter = past._replace(length=torch.tensor(50))  # one block of two
    for each in (past, mixed, past, shorter, other, past):
        torch.testing.assert_close(read(each), exact(each), rtol=1e-5, atol=1e-6)
    past.k[0].low.add_(1.0)
    torch.testing.assert_close(read(past), exact(past), rtol=1e-5, atol=1e-6)
    codes, storage = other.k[0].codes, weakref.ref(other.v[0].scale)
    before = read(other)
    codes.data = torch.zeros_like(codes)  # torch does not count it: what was there is read
    assert torch.equal(read(other), before)
    del other, mixed, codes
    assert storage() is None


def test_a_table_is_made_once_a_step(monkeypatch):
    made, make = [], coded.addresses
    monkeypatch.setattr(
        coded_rows, "addresses", lambda *args: made.append(len(args[0])) or make(*args)
    )
    config = fa.Config(layers=3, heads=4, kv_heads=2, head_size=32)
    model, tokens = fa.decoder(config), torch.arange(90) % 7
    params = model.init(fa.key(0))
    past = model.cache(130, kind=quantized(block=32, recent=0))
    past = model.apply(params, tokens, past)[1]
    model.extend(params, tokens[:1], past)
    assert made == [12]
    again = fa.commit(past, model.extend(params, tokens[:2], past)[1], 1)
    assert made == [12]
    model.extend(params, tokens[:1], again)
    assert made == [12, 12]


def test_codes_that_are_moved_are_found_again():
    model = fa.decoder(fa.Config(layers=2, heads=2, kv_heads=1, head_size=64, context=500))
    params, token = model.init(fa.key(0)), torch.tensor([1])
    past = model.cache(450, kind=fa.QuantizedCache)
    past = model.apply(params, torch.arange(400) % 40, past)[1]
    wanted = model.extend(params, token, past)[0]
    for block in (*past.k, *past.v):
        for x in block:
            x.share_memory_()  # the same tensor, and its memory before is freed
    other = [torch.full((2**n,), torch.nan) for n in range(6, 17) for _ in range(40)]  # in that one
    assert torch.equal(model.extend(params, token, past)[0], wanted)
    del other
