"""The past against a plain list of rows: random programs, every earlier value kept, nothing
observed that is not remembered.
"""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import caches
from funcattn.caches import Branch, Cache, Delta
from funcattn.kernels import KVSegment

L, K, D = 2, 2, 4


def step(ids):
    """A delta whose rows can be told apart: the row of token i holds i in every layer, head and
    feature, shifted by which.
    """
    of = torch.arange(L * K * D, dtype=torch.float64).reshape(L, K, 1, D) / 100
    rows = of + torch.tensor(ids, dtype=torch.float64).unsqueeze(-1)
    return Delta(tuple(rows), tuple(-rows))


def empty(size):
    return Cache.empty(L, K, size, D, torch.float64)


def remembered(cache):
    """The ids of the rows that a new token would attend to, in order, all layers, heads and
    features agreeing.
    """
    ids = []
    for layer in range(L):
        parts = caches.past(cache, layer, cache.length.reshape(1))
        k, v = (
            torch.cat([part[i] for part in parts], -2)
            if parts
            else torch.zeros(K, 0, D, dtype=torch.float64)
            for i in (0, 1)
        )
        ids.append(k[0, :, 0].round().int().tolist())
        assert torch.equal(k, step(ids[-1]).k[layer])
        assert torch.equal(v, step(ids[-1]).v[layer])
    assert ids[0] == ids[1]
    assert int(cache.length) == len(ids[0])
    return ids[0]


class Value(NamedTuple):
    cache: Any
    rows: list[int]
    room: int  # tokens that may still be committed


def commit_some(data, value, fresh):
    T = data.draw(st.integers(1, 4), label="T")
    ids = list(range(fresh, fresh + T))
    index = data.draw(
        st.none() | st.lists(st.integers(0, T - 1), min_size=1, max_size=4), label="index"
    )
    path = ids if index is None else [ids[i] for i in index]
    n = data.draw(st.none() | st.integers(0, len(path)), label="n")
    added = path[:n]
    n = torch.tensor(n) if n is not None and data.draw(st.booleans(), label="n is a tensor") else n
    run = lambda: fa.commit(
        value.cache, step(ids), n, index=None if index is None else torch.tensor(index)
    )
    if len(added) > value.room:
        with pytest.raises(ValueError, match=r"commit: cache should be with room .*caches\.grow"):
            run()
        return value
    return Value(run(), value.rows + added, value.room - len(added))


def flattened(value):
    branch = value.cache
    own = int(branch.tail.length)
    room = caches.capacity(branch.prefix) - int(branch.prefix.length)
    if isinstance(branch.prefix, Branch):
        room = caches.capacity(branch.prefix.tail) - int(branch.prefix.tail.length)
    if own > room:
        with pytest.raises(
            ValueError, match=r"flatten: branch\.prefix .*caches\.grow\(branch\.prefix"
        ):
            caches.flatten(branch)
        branch = branch._replace(prefix=caches.grow(branch.prefix, own))
        room += own
    return Value(caches.flatten(branch), value.rows, room - own)


@settings(max_examples=200)
@given(st.data())
def test_any_program_of_steps_remembers_what_a_list_would_and_changes_no_earlier_value(data):
    size = data.draw(st.integers(0, 5), label="size")
    values = [Value(empty(size), [], size)]
    for turn in range(data.draw(st.integers(1, 8), label="steps")):
        # an earlier one: a fork, or rewinding
        value = data.draw(st.sampled_from(values), label="value")
        verb = data.draw(
            st.sampled_from(["commit", "commit", "commit", "grow", "branch", "flatten"]),
            label="verb",
        )
        if verb == "commit":
            value = commit_some(data, value, 10 * turn)
        elif verb == "grow":
            more = data.draw(st.integers(0, 3), label="more")
            value = value._replace(cache=caches.grow(value.cache, more), room=value.room + more)
        elif verb == "branch":
            size = data.draw(st.integers(0, 3), label="tail")
            value = value._replace(cache=Branch(value.cache, empty(size)), room=size)
        elif isinstance(value.cache, Branch):
            value = flattened(value)
        values.append(value)
    for value in values:
        assert remembered(value.cache) == value.rows


@given(st.integers(0, 4), st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_committing_all_is_committing_any_split_of_it(T, cuts):
    whole = fa.commit(empty(9), step(list(range(T))))
    rows, cache = list(range(T)), empty(9)
    while rows:
        n = 1 + cuts[len(rows) % len(cuts)] % len(rows)
        cache, rows = fa.commit(cache, step(rows), n), rows[n:]
    assert remembered(cache) == remembered(whole) == list(range(T))


def stack(values):
    return Cache(*(torch.stack(leaf) for leaf in zip(*values, strict=True)))


def unstack(cache):
    return [Cache(*leaves) for leaves in zip(*cache, strict=True)]


@settings(max_examples=200)
@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 5)), min_size=1, max_size=3),
)
def test_a_count_for_each_row_loses_nothing_near_capacity(S, rows):
    """Lengths and counts differ per row; a row that has no room, or whose count is no count of the
    delta, keeps what it had.
    """
    T, held = 3, [min(before, S) for before, _ in rows]
    past = stack([fa.commit(empty(S), step(list(range(n)))) for n in held])
    counts = torch.tensor([n for _, n in rows])
    after = unstack(vmap(fa.commit, (0, None, 0))(past, step([70, 80, 90]), counts))
    for cache, before, n in zip(after, held, counts.tolist(), strict=True):
        fits = 0 <= n <= T and before + n <= S
        assert bool(caches.overflowed(cache)) == (not fits)
        visible = cache if fits else cache._replace(length=torch.tensor(before))
        assert remembered(visible) == list(range(before)) + ([70, 80, 90][:n] if fits else [])


def test_the_index_picks_a_path_through_a_tree_of_drafts():
    delta = step([10, 20, 30, 40])
    assert remembered(fa.commit(empty(4), delta, index=torch.tensor([3, 0]))) == [40, 10]
    assert remembered(fa.commit(empty(4), delta, 1, index=torch.tensor([3, 0]))) == [40]
    paths, counts = torch.tensor([[3, 0], [1, 2]]), torch.tensor([2, 1])
    f = lambda index, n: fa.commit(empty(4), delta, n, index=index)
    assert [remembered(cache) for cache in unstack(vmap(f)(paths, counts))] == [[40, 10], [20]]


def test_the_owner_of_a_past_may_commit_in_place_with_the_same_result():
    mine = fa.commit(empty(4), step([1]))
    after = caches.commit_donated(mine, step([2, 3]), 1)
    assert remembered(after) == [1, 2]
    assert after.k.data_ptr() == mine.k.data_ptr()
    assert remembered(mine) == [1]  # what was written lies beyond the older length


def test_commit_in_place_leaves_what_autograd_records_alone():
    v = torch.ones(L, K, 1, D, dtype=torch.float64, requires_grad=True)
    delta = step([1])._replace(v=tuple(v))
    loss = lambda cache: caches.past(cache, 0, cache.length.reshape(1))[0].v.square().sum()
    one = caches.commit_donated(empty(4), delta, 1)
    first = loss(one)
    (first + loss(caches.commit_donated(one, delta, 1))).backward()
    # 2 v for each row of either past
    assert torch.equal(v.grad[0], torch.full((K, 1, D), 6.0, dtype=torch.float64))


def test_a_branch_grows_at_its_own_tail_and_shares_its_prefix():
    branch = Branch(fa.commit(empty(2), step([1, 2])), empty(1))
    grown = caches.grow(branch, 3)
    assert grown.prefix is branch.prefix
    assert (caches.capacity(branch), caches.capacity(grown), caches.capacity(grown.tail)) == (
        3,
        6,
        4,
    )
    assert remembered(fa.commit(grown, step([3, 4, 5, 6]))) == [1, 2, 3, 4, 5, 6]


# A window.


def visible_rows(cache, places, window):
    """Booleans (T, length): which remembered rows each new token sees; rows that no part holds are
    seen by none.
    """
    T, seen = len(places), torch.zeros(len(places), int(cache.length), dtype=torch.bool)
    for part in caches.past(cache, 0, places, window):
        S = part.k.shape[-2]
        mask = (
            torch.ones(T, S, dtype=torch.bool) if type(part.mask) is tuple else part.mask.dense(S)
        )
        for column in range(S):
            row = part.k[0, column, 0].round().int()
            if mask[:, column].any():
                seen[:, row] |= mask[:, column]
    return seen


@settings(max_examples=200)
@given(st.integers(0, 6), st.integers(0, 4), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_a_window_hides_what_the_mask_of_a_window_hides(before, own, T, window, ahead):
    prefix = fa.commit(empty(9), step(list(range(before))))
    branch = Branch(prefix, fa.commit(empty(5), step(list(range(before, before + own)))))
    S = before + own
    places = S + torch.arange(T) // (2 if ahead else 1)  # drafts of a tree share positions
    wanted = (places.unsqueeze(-1) - torch.arange(S)) < window
    for past in (branch, fa.commit(empty(12), step(list(range(S))))):
        assert torch.equal(visible_rows(past, places, window), wanted)


def test_a_step_reads_its_window_alone_and_without_a_mask():
    past = fa.commit(empty(9), step(list(range(9))))
    for window, rows in ((1, []), (4, [6, 7, 8]), (10, list(range(9)))):
        parts = caches.past(past, 0, torch.tensor([9]), window)
        assert [part.k.shape[-2] for part in parts] == [len(rows)] * bool(rows)
        assert all(type(part.mask) is tuple for part in parts)
    branch = Branch(past, fa.commit(empty(5), step([9, 10, 11])))
    assert [part.k.shape[-2] for part in caches.past(branch, 0, torch.tensor([12]), 5)] == [1, 3]
    assert [part.k.shape[-2] for part in caches.past(branch, 0, torch.tensor([12]), 3)] == [2]


def test_each_row_of_a_batch_has_its_own_window():
    """Lengths and places differ per row: what attention reads is what each row reads alone, and no
    row below the lowest is kept.
    """
    values = [fa.commit(empty(12), step(list(range(n)))) for n in (7, 0, 12)]
    q = torch.linspace(-1, 1, 2 * K * 2 * D, dtype=torch.float64).reshape(2 * K, 2, D)
    new = KVSegment(q[:K], q[K:])

    def read(cache, window):
        places = cache.length + torch.arange(2)
        return fa.kernels.attend_segments(
            q, [*caches.past(cache, 0, places, window), new], scale=1.0
        )

    for window in (1, 3, 5, 20):
        got = vmap(lambda cache, window=window: read(cache, window))(stack(values))
        torch.testing.assert_close(got, torch.stack([read(value, window) for value in values]))
    far = stack([fa.commit(empty(12), step(list(range(n)))) for n in (11, 12)])
    rows = []
    vmap(
        lambda cache: (
            rows.append(caches.past(cache, 0, cache.length.reshape(1), 3)[0].k.shape[-2])
            or cache.length
        )
    )(far)
    assert rows == [3]


# What is not remembered.

MODEL = fa.decoder(
    fa.Config(layers=L, kv_heads=K, head_size=D, heads=4, width=16, feed_forward=16, vocabulary=32)
)
PARAMS = MODEL.init(fa.key(0))
TOKENS = torch.tensor([3, 14, 15, 9, 2, 6, 5, 31, 8])


def past_of(n, size=8):
    return MODEL.apply(PARAMS, TOKENS[:n], MODEL.cache(size))[1] if n else MODEL.cache(size)


def poisoned(cache):
    """NaN at and beyond the length of the past, its scratch row included."""
    if isinstance(cache, Branch):
        return Branch(poisoned(cache.prefix), poisoned(cache.tail))
    beyond = (torch.arange(cache.k.shape[-2]) >= cache.length).unsqueeze(-1)
    assert beyond[-1]
    return cache._replace(
        k=cache.k.masked_fill(beyond, float("nan")), v=cache.v.masked_fill(beyond, float("nan"))
    )


def branched(n):
    return Branch(past_of(n), MODEL.apply(PARAMS, TOKENS[:2], MODEL.cache(3))[1])


# T = 20 takes the fold of attend and merge, fewer the single softmax
MORE = {T: torch.arange(T) % 32 for T in (1, 3, 20)}


@pytest.mark.parametrize("T", MORE)
@pytest.mark.parametrize("make", [past_of, branched])
@pytest.mark.parametrize("n", [0, 3, 8])
def test_rows_beyond_the_length_are_never_observed_eagerly(n, make, T):
    clean = make(n)
    wanted, delta = MODEL.extend(PARAMS, MORE[T], clean)
    got, proposed = MODEL.extend(PARAMS, MORE[T], poisoned(clean))
    assert torch.equal(got, wanted)
    assert torch.equal(torch.stack(proposed.k), torch.stack(delta.k))
    grown = caches.grow(poisoned(clean), 4)
    assert torch.equal(MODEL.extend(PARAMS, MORE[T], grown)[0], wanted)


@pytest.mark.parametrize("T", MORE)
def test_rows_beyond_the_length_are_never_observed_in_a_ragged_batch(T):
    values = [past_of(n) for n in (0, 3, 8)]
    got = vmap(lambda cache: MODEL.extend(PARAMS, MORE[T], cache)[0])(
        stack([poisoned(value) for value in values])
    )
    for row, value in zip(got, values, strict=True):
        torch.testing.assert_close(row, MODEL.extend(PARAMS, MORE[T], value)[0])


@pytest.mark.parametrize("T", MORE)
def test_rows_beyond_the_length_get_no_gradient_and_give_none(T):
    def loss(floating, params, length):
        return MODEL.extend(params, MORE[T], Cache(*floating, length))[0].square().mean()

    caches_ = stack([poisoned(past_of(n)) for n in (0, 3, 8)])
    for derive in (grad, lambda f, argnums: vmap(grad(f, argnums), ((0, 0), None, 0))):
        batched = derive is not grad
        for b in range(1 if batched else 3):
            k, v, length = caches_ if batched else (leaf[b] for leaf in caches_)
            by_past, by_params = derive(loss, (0, 1))((k, v), PARAMS, length)
            beyond = (torch.arange(k.shape[-2]) >= length.reshape(-1, 1)).reshape(
                *length.shape, 1, 1, -1, 1
            )
            for g in by_past:
                assert g.isfinite().all()
                assert not g.masked_select(beyond).any()
                assert bool((g != 0).any()) == bool((length > 0).any())
            assert by_params.embedding.isfinite().all()


def test_rows_beyond_the_length_are_never_observed_in_compiled_code():
    f = torch.compile(
        lambda cache: MODEL.extend(PARAMS, MORE[3], cache)[0], fullgraph=True, backend="eager"
    )
    for n in (0, 3, 8):
        torch.testing.assert_close(
            f(poisoned(past_of(n))), MODEL.extend(PARAMS, MORE[3], past_of(n))[0]
        )


def test_rejected_rows_are_never_observed():
    past = past_of(3)
    nan = Delta(*(tuple(torch.full((K, 4, D), float("nan")) for _ in range(L)) for _ in range(2)))
    for after in (
        fa.commit(past, nan, 0),
        Cache(
            *(leaf[0] for leaf in vmap(fa.commit, (None, None, 0))(past, nan, torch.tensor([0])))
        ),
    ):
        assert torch.equal(
            MODEL.extend(PARAMS, MORE[3], after)[0], MODEL.extend(PARAMS, MORE[3], past)[0]
        )


# What does not fit.


def all_nan(x):
    return bool(x.isnan().all())


def test_an_overflow_in_a_batch_is_nan_now_and_ever_after_and_writes_nothing():
    past = stack([past_of(3, 8), past_of(7, 8)])
    logits, after = vmap(lambda cache: MODEL.apply(PARAMS, TOKENS[:2], cache))(past)
    assert not logits[0].isnan().any()
    assert all_nan(logits[1])
    fitting, lost = unstack(after)
    assert torch.equal(lost.k[..., :8, :], past.k[1, ..., :8, :])  # row 8 is scratch
    later = lambda cache: vmap(lambda cache: MODEL.extend(PARAMS, TOKENS[:1], cache)[0])(cache)
    assert all_nan(later(after)[1])
    assert not later(after)[0].isnan().any()
    logits, again = vmap(lambda cache: MODEL.apply(PARAMS, TOKENS[:1], caches.grow(cache, 100)))(
        after
    )
    assert all_nan(logits[1])
    assert all_nan(later(again)[1])
    for use in (
        lambda: MODEL.extend(PARAMS, TOKENS[:1], lost),
        lambda: fa.commit(lost, MODEL.extend(PARAMS, TOKENS[:1], fitting)[1]),
        lambda: MODEL.extend(PARAMS, TOKENS[:1], Branch(lost, MODEL.cache(2))),
        lambda: caches.flatten(Branch(fitting, lost)),
    ):
        with pytest.raises(
            ValueError,
            match=r"overflowed inside a transform\. Begin it again with model\.cache\(size\)",
        ):
            use()


def test_an_overflow_in_compiled_code_is_nan_now_and_ever_after():
    apply = torch.compile(
        lambda cache: MODEL.apply(PARAMS, TOKENS[:2], cache), fullgraph=True, backend="eager"
    )
    fits, _ = apply(past_of(3))
    assert not fits.isnan().any()
    full = past_of(7)
    logits, after = apply(full)
    assert all_nan(logits)
    assert torch.equal(after.k[..., :8, :], full.k[..., :8, :])
    assert all_nan(apply(after)[0])


def test_a_count_that_is_none_of_the_delta_is_nan_in_a_batch():
    def f(n):
        cache = fa.commit(past_of(3), MODEL.extend(PARAMS, TOKENS[3:5], past_of(3))[1], n)
        return MODEL.extend(PARAMS, TOKENS[5:6], cache)[0]

    bad = vmap(f)(torch.tensor([-1, 0, 2, 3])).isnan().flatten(1)
    assert bad.all(-1).tolist() == [True, False, False, True]
    assert bad.any(-1).tolist() == [True, False, False, True]


def test_a_tail_that_overflowed_spoils_its_branch_and_what_is_flattened_of_it():
    def f(n):
        own = fa.commit(MODEL.cache(2), MODEL.extend(PARAMS, TOKENS[:3], MODEL.cache(3))[1], n)
        branch = Branch(past_of(3), own)
        return (
            caches.overflowed(branch),
            caches.overflowed(caches.flatten(branch)),
            MODEL.extend(PARAMS, TOKENS[:1], caches.flatten(branch))[0],
        )

    overflowed, flat, logits = vmap(f)(torch.tensor([2, 3]))
    assert overflowed.tolist() == flat.tolist() == [False, True]
    assert logits.isnan().all(-1).flatten().tolist() == [False, True]


# Many futures of one past.


def test_a_shared_prefix_is_stored_once():
    prefix = past_of(5)

    def go_on(token):
        logits, branch = MODEL.apply(PARAMS, token.unsqueeze(0), Branch(prefix, MODEL.cache(2)))
        return logits, branch

    logits, branches = vmap(go_on)(TOKENS)
    assert branches.prefix.k.untyped_storage().data_ptr() == prefix.k.untyped_storage().data_ptr()
    assert branches.tail.k.shape[0] == len(TOKENS)
    for token, row in zip(TOKENS, logits, strict=True):
        torch.testing.assert_close(row, MODEL.extend(PARAMS, token.unsqueeze(0), prefix)[0])


def test_tangents_of_the_past_flow_through_a_commit():
    past, delta = past_of(3), MODEL.extend(PARAMS, TOKENS[3:5], past_of(3))[1]
    ones = torch.ones_like(past.k)
    f = lambda k, new: fa.commit(past._replace(k=k), delta._replace(k=new), 1).k
    _, tangent = jvp(f, (past.k, delta.k), (ones, tuple(2 * torch.ones_like(x) for x in delta.k)))
    wanted = ones.clone()
    wanted[..., 3, :] = 2
    assert torch.equal(tangent[..., :8, :], wanted[..., :8, :])  # row 8 is scratch


def test_a_past_does_no_tuple_arithmetic():
    for past in (past_of(1), branched(1), step([1])):
        for wrong in (
            lambda past=past: past + past,
            lambda past=past: 2 * past,
            lambda past=past: bool(past),
        ):
            with pytest.raises(TypeError, match="has no meaning for a record"):
                wrong()


DELTA = step([1, 2, 3])


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: fa.commit(empty(2), DELTA),
            ValueError,
            r"room for 3 tokens \(it has 2\), got 0 remembered and 3 more\. Use .*grow\(cache, 3\)",
        ),
        (
            lambda: fa.commit(DELTA, empty(2)),
            TypeError,
            r"delta should be what extend returned.* Pass \(cache, delta\), in this order",
        ),
        (
            lambda: fa.commit(empty(9), DELTA, 4),
            ValueError,
            "n should be between 0 and the 3 tokens of the delta, got 4",
        ),
        (
            lambda: fa.commit(empty(9), DELTA, torch.tensor(-1)),
            ValueError,
            "n should be between 0 and the 3",
        ),
        (
            lambda: fa.commit(empty(9), DELTA, torch.tensor(1.5)),
            TypeError,
            "n should be an int or an integer tensor",
        ),
        (
            lambda: fa.commit(empty(9), DELTA, torch.tensor([1, 2])),
            ValueError,
            r"one for each row is torch\.func\.vmap",
        ),
        (
            lambda: fa.commit(empty(9), DELTA, index=torch.tensor([3])),
            ValueError,
            "index should be within the 3 tokens",
        ),
        (
            lambda: vmap(lambda i: fa.commit(empty(9), DELTA, index=i))(torch.tensor([[0], [3]])),
            ValueError,
            "within the 3 tokens",
        ),
        (
            lambda: fa.commit(empty(9), DELTA, index=torch.tensor([[0]])),
            ValueError,
            "Give one path; vmap makes many",
        ),
        (
            lambda: fa.commit(empty(9), DELTA, index=torch.tensor([True])),
            ValueError,
            r"int64 \(N,\)",
        ),
        (
            lambda: fa.commit(empty(9)._replace(k=torch.zeros(L, 1, 10, D)), DELTA),
            ValueError,
            "Use the cache of the same model",
        ),
        (
            lambda: fa.commit(Cache.empty(L, K, 9, D, torch.float32), DELTA),
            TypeError,
            r"model\.cache\(size, dtype=torch\.float64\)",
        ),
        (
            lambda: fa.commit((), DELTA),
            TypeError,
            r"\(\), which is no past\. Make one with model\.cache\(size\)",
        ),
        (lambda: fa.commit("past", DELTA), TypeError, "got a str"),
        (
            lambda: caches.flatten(empty(2)),
            TypeError,
            "flatten: branch should be a Branch, got a Cache",
        ),
        (
            lambda: caches.flatten(Branch(empty(2), fa.commit(empty(3), DELTA))),
            ValueError,
            "room for the 3 tokens of its tail, got 2",
        ),
        (
            lambda: caches.grow([], 2),
            TypeError,
            "grow: cache should be a past such as Cache or Branch, got a list",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


@pytest.mark.parametrize(
    ("earlier", "name"),
    [
        ("broken", "overflowed"),
        ("join", "flatten"),
        ("follow", "fork"),
        ("commit_own", "commit_donated"),
    ],
)
def test_an_earlier_name_is_the_same_verb(earlier, name):
    assert getattr(caches, earlier) is getattr(caches, name)
