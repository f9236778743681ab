"""Rows of several texts, and trees of drafts, in one call of the operator of layers.

The peer is the model itself, in float32, under the same vmap or mask.
"""

import operated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operated import CONFIG, weights
from torch.func import vmap

import funcattn as fa
from funcattn.caches import Branch
from funcattn.compilation import fused
from funcattn.quantization import tiles

pytestmark = operated.MARKS

MODEL = fa.decoder(CONFIG)
FAST = fa.compile(MODEL, backend="eager")
SCHEMES = {"float32": None, "int8": fa.int8, "int4": fa.int4}
BITS = {"float32": 32, "int8": 8, "int4": 4}


PARAMS = {} if tiles.missing() else {name: weights(CONFIG, SCHEMES[name]) for name in SCHEMES}


def ids(*shape, seed=0):
    return fa.random.randint(fa.key(seed), shape, 0, 48)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def filled(name, size, n, seed=0):
    """A cache of n tokens, with NaN behind them."""
    cache = MODEL.cache(size)
    cache = MODEL.apply(PARAMS[name], ids(n, seed=seed), cache)[1] if n else cache
    beyond = (torch.arange(size + 1) >= n).unsqueeze(-1)
    spoilt = lambda rows: torch.where(beyond, torch.nan, rows)
    return cache._replace(k=spoilt(cache.k), v=spoilt(cache.v))


def stacked(trees):
    return fa.tree.map(lambda *leaves: torch.stack(leaves), *trees)


@pytest.fixture
def calls(monkeypatch):
    """The texts and the past of each call of the operator: (B, P of each part)."""
    seen, run = [], torch.ops.funcattn.layers.default

    class Spy:
        def __call__(self, *args):
            seen.append((args[2].shape[0], [part.shape[0] for part in args[5]]))
            return run(*args)

        default = staticmethod(run)

    monkeypatch.setattr(torch.ops.funcattn, "layers", Spy())
    return seen


@pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])
@pytest.mark.parametrize("name", SCHEMES)
def test_texts_side_by_side_are_each_alone(calls, name, instructions):
    """A prefix in common and a past of each, of lengths that differ, with 1 and 3 new tokens."""
    if torch.ops.funcattn.instructions(instructions) != instructions:
        pytest.skip("the processor has no such instructions")
    try:
        params, prefix = PARAMS[name], filled(name, 40, 37)
        tails = [filled(name, 9, n, seed=n) for n in (0, 4, 2, 6, 1)]
        for T in (1, 3):
            tokens = ids(5, T)
            one = lambda m: lambda t, tail: m.extend(params, t, Branch(prefix, tail))
            got = vmap(one(FAST))(tokens, stacked(tails))
            for i, tail in enumerate(tails):
                wanted = one(MODEL)(tokens[i], tail)
                close(fa.tree.map(lambda leaf, i=i: leaf[i], got), wanted)
        if tiles.most_rows(BITS[name]) >= 15:
            assert calls == [(5, [1, 5])] * 2
    finally:
        torch.ops.funcattn.instructions(-1)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 40),
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.sampled_from(["unmapped", "mapped", "lengths mapped"]),
    st.integers(0, 100),
)
def test_every_past_of_every_text_is_read_as_far_as_it_goes(B, T, first, lengths, how, seed):
    params, prefix = PARAMS["float32"], filled("float32", 41, first, seed)
    n = torch.tensor([lengths[i % len(lengths)] for i in range(B)])
    tails = stacked([filled("float32", 24, int(each), int(each)) for each in n])
    tokens, over, dims = ids(B, T, seed=seed), prefix, None
    if how == "mapped":
        over, dims = fa.tree.map(lambda leaf: leaf.expand(B, *leaf.shape), prefix), 0
    elif how == "lengths mapped":
        over = prefix._replace(length=torch.clamp(n, max=first))
        dims = fa.Cache(None, None, 0)
    one = lambda m: lambda t, past, tail: m.extend(params, t, Branch(past, tail))
    run = lambda m: vmap(one(m), (0, dims, 0))(tokens, over, tails)
    close(run(FAST), run(MODEL))


@pytest.mark.parametrize("B", [16, 70])
def test_many_rows_are_those_of_the_model(calls, B):
    for name, params in PARAMS.items():
        past = filled(name, 60, 50)
        run = lambda m, p=params, c=past: vmap(lambda t: m.extend(p, t, c)[0])(ids(B, 1))
        close(run(FAST), run(MODEL))
    if tiles.native.instructions() == tiles.AVX512:
        assert calls == [(B, [1])] * 3


def test_more_rows_than_were_measured_run_as_the_model(calls):
    params, past = PARAMS["float32"], filled("float32", 6, 5)
    run = lambda m: vmap(lambda t: m.extend(params, t, past)[0])(ids(tiles.MOST_FLOATS + 1, 1))
    close(run(FAST), run(MODEL))
    assert not calls


def test_one_text_behind_several_pasts(calls):
    params, prefix, tokens = PARAMS["float32"], filled("float32", 20, 11), ids(2)
    tails = stacked([filled("float32", 6, n, n) for n in (0, 3, 1)])
    run = lambda m: vmap(lambda tail: m.extend(params, tokens, Branch(prefix, tail)))(tails)
    close(run(FAST), run(MODEL))
    assert calls == [(3, [1, 3])]


def test_a_past_of_some_is_read_once_for_these(calls):
    """vmap of vmap: a prefix of all, one of each inner batch, a tail of each text."""
    params = PARAMS["float32"]
    prefix = filled("float32", 30, 21)
    second = stacked([filled("float32", 12, n, n) for n in (7, 3)])
    tails = stacked([stacked([filled("float32", 6, n + i, n) for n in (0, 2, 1)]) for i in (0, 1)])
    tokens = ids(2, 3, 2)
    one = lambda m: lambda t, mid, tail: m.extend(params, t, Branch(prefix, Branch(mid, tail)))
    run = lambda m: vmap(vmap(one(m), (0, None, 0)))(tokens, second, tails)
    close(run(FAST), run(MODEL))
    assert calls[-1] == (6, [1, 2, 6])
    # mapped by the inner one alone, which no grouping of neighbours expresses
    run = lambda m: vmap(vmap(one(m), (0, 0, 0)), (0, None, 0))(
        tokens, stacked([filled("float32", 12, n, n) for n in (7, 3, 5)]), tails
    )
    close(run(FAST), run(MODEL))


def test_futures_are_those_of_the_model(calls):
    """Ids of generate, with a stop at which rows end early, greedy and drawn."""
    for name, params in PARAMS.items():
        past = filled(name, 40, 33)
        for sampler in (fa.sampling.greedy, fa.sampling.temperature(1.0)):
            one = lambda m, p=params, c=past, s=sampler: (
                lambda key, first: fa.generate(
                    key, m, p, first, c, steps=6, sampler=s, stop=(3, 7, 11, 20, 31)
                )
            )
            run = lambda m, one=one: vmap(one(m))(fa.split(fa.key(2), 6), ids(6, 1, seed=4))
            (got, after), (wanted, expected) = run(FAST), run(MODEL)
            assert torch.equal(got, wanted)
            assert torch.equal(after.length, expected.length)
    assert calls


def test_prompts_of_several_lengths_are_those_of_the_model(calls):
    prompts, lengths = ids(4, 9), torch.tensor([9, 2, 5, 7])
    for params in PARAMS.values():
        run = lambda m, p=params: vmap(
            lambda t, n: fa.generate(fa.key(0), m, p, t, steps=5, prompt_length=n)[0]
        )(prompts, lengths)
        assert torch.equal(run(FAST), run(MODEL))
    assert calls


def test_search_and_serving_run_by_it(calls):
    params, prompt = PARAMS["float32"], ids(6)
    search = lambda m: fa.beam_search(m, params, prompt, steps=5, beams=4, best=3)
    assert torch.equal(search(FAST).tokens, search(MODEL).tokens)
    assert calls[-1][0] == 4
    calls.clear()
    best = lambda m: fa.best_of(
        fa.key(1), m, params, prompt, n=5, steps=4, sampler=fa.sampling.temperature(1.0)
    )
    got, wanted = best(FAST), best(MODEL)
    assert torch.equal(got.tokens, wanted.tokens)
    close(got.scores, wanted.scores)
    assert calls[-1][0] == 5
    calls.clear()

    def serve(m):
        slots, written = (
            fa.serving.idle(m, params, m.cache(20), 3, prefix=filled("float32", 9, 8)),
            [],
        )
        slots = fa.serving.enter(fa.key(1), m, params, prompt, slots, 0, steps=4)
        slots = fa.serving.enter(fa.key(2), m, params, prompt[:2], slots, 2, steps=6)
        for _ in range(6):
            served, slots = fa.serving.step(m, params, slots)
            written.append(torch.where(served.drawn, served.token, -1))
        return torch.stack(written)

    assert torch.equal(serve(FAST), serve(MODEL))
    assert calls[-1] == (3, [1, 3])


def test_drafts_of_a_batch_are_verified_by_it(calls):
    params, prompts = PARAMS["float32"], ids(3, 7)
    drafter = lambda m: fa.drafters.model(m, PARAMS["int8"], length=3)
    run = lambda m: vmap(
        lambda key, t: fa.speculate(key, m, params, drafter(m), t, steps=6)[0].tokens
    )(fa.split(fa.key(0), 3), prompts)
    assert torch.equal(run(FAST), run(MODEL))
    assert (3, [3]) in calls


# Trees of drafts.

TREES = {
    "a chain": [-1, 0, 1, 2],
    "siblings": [-1, 0, 0, 0],
    "two branches": [-1, 0, 0, 1, 2, 3, 4],
    "many nodes": [-1, *((i - 1) // 3 for i in range(1, 40))],
}


def of_tree(parents, length):
    """bool (T, T), a node and those above it, and positions by depth."""
    above = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            above[node] |= above[parent]
    return above, length + above.sum(-1) - 1


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_tree_is_one_call(monkeypatch, name, parents):
    seen, run = [], fused.run
    monkeypatch.setattr(fused, "run", lambda *args: seen.append(args[-1]) or run(*args))
    params, tokens = PARAMS[name], ids(len(parents))
    for n in (0, 21):
        past = Branch(filled(name, 30, n), filled(name, 9, 0))
        mask, positions = of_tree(parents, past.length)
        given = {"mask": mask, "positions": positions}
        close(
            FAST.extend(params, tokens, past, **given), MODEL.extend(params, tokens, past, **given)
        )
    assert tiles.native.instructions() != tiles.AVX512 or len(seen) == 2
    assert all(mask is not None for mask in seen)


def test_a_row_of_a_mask_may_see_nothing():
    """Behind no past its attention is 0, as the model's."""
    params, mask = PARAMS["float32"], torch.eye(3, dtype=torch.bool)
    mask[1] = False
    given = {"mask": mask, "positions": torch.arange(3)}
    for past in (MODEL.cache(4), filled("float32", 9, 4)):
        close(
            FAST.extend(params, ids(3), past, **given)[0],
            MODEL.extend(params, ids(3), past, **given)[0],
        )


def test_what_a_tree_hides_is_unobservable():
    params = PARAMS["float32"]
    spoilt = params._replace(
        embedding=params.embedding.index_fill(0, torch.tensor([7]), torch.nan),
        head=params.embedding,
    )
    mask, positions = of_tree([-1, 0, 0, 1], 0)
    tokens = torch.tensor([1, 5, 7, 3])  # the third is seen by itself alone
    logits = FAST.extend(spoilt, tokens, MODEL.cache(5), mask=mask, positions=positions)[0]
    assert logits[[0, 1, 3]].isfinite().all()
    assert logits[2].isnan().all()


def test_trees_of_several_texts_are_one_call(calls):
    params, past = PARAMS["float32"], filled("float32", 30, 21)
    shapes = [of_tree(parents, 21) for parents in ([-1, 0, 0, 1], [-1, 0, 1, 2], [-1, 0, 1, 1])]
    masks, positions = (torch.stack(side) for side in zip(*shapes, strict=True))
    run = lambda m: vmap(lambda t, mask, at: m.extend(params, t, past, mask=mask, positions=at)[0])(
        ids(3, 4), masks, positions
    )
    close(run(FAST), run(MODEL))
    assert calls == [(3, [1])]
    one = lambda m: vmap(
        lambda t: m.extend(params, t, past, mask=masks[0], positions=positions[0])[0]
    )(ids(3, 4))
    close(one(FAST), one(MODEL))
    assert calls == [(3, [1])] * 2


# What it does not know.


def test_what_is_mapped_or_differentiated_besides_runs_as_the_model(calls):
    params, past, tokens = PARAMS["float32"], filled("float32", 20, 11), ids(3, 2)
    models = stacked([params, weights(), params])
    ensemble = lambda m: vmap(lambda p, t: m.extend(p, t, past)[0])(models, tokens)
    norms = torch.stack([params.norm, 2 * params.norm, params.norm])
    of_norm = lambda m: vmap(lambda n, t: m.extend(params._replace(norm=n), t, past)[0])(
        norms, tokens
    )
    clean = fa.tree.map(lambda leaf: leaf.nan_to_num() if leaf.is_floating_point() else leaf, past)
    loss = lambda m, k, t: m.extend(params, t, clean._replace(k=k))[0].square().sum()
    slope = lambda m: vmap(torch.func.grad(lambda k, t: loss(m, k, t)), (None, 0))(clean.k, tokens)
    outer = lambda m: torch.func.grad(lambda k: vmap(lambda t: loss(m, k, t))(tokens).sum())(
        clean.k
    )
    along = lambda m: torch.func.jvp(
        lambda k: vmap(lambda t: loss(m, k, t))(tokens), (clean.k,), (torch.ones_like(clean.k),)
    )[1]
    wide = fa.cast(torch.float64)
    other = lambda m: vmap(lambda t: m.extend(wide(params), t, wide(clean))[0])(tokens)
    for run in (ensemble, of_norm, slope, outer, along, other):
        torch.testing.assert_close(run(FAST), run(MODEL), rtol=1e-4, atol=1e-3)
    assert not calls


def test_a_past_that_requires_a_gradient_keeps_it(calls):
    params, past = PARAMS["float32"], MODEL.apply(PARAMS["float32"], ids(5), MODEL.cache(9))[1]
    found = []
    for m in (FAST, MODEL):
        k = past.k.clone().requires_grad_()
        vmap(lambda t, m=m, k=k: m.extend(params, t, past._replace(k=k))[0])(
            ids(3, 2)
        ).square().sum().backward()
        found.append(k.grad)
    close(*found)
    assert not calls


def test_weights_that_were_written_into_are_read_anew(calls):
    params = fa.tree.map(torch.clone, PARAMS["float32"])
    run = lambda m: vmap(lambda t: m.extend(params, t, m.cache(4))[0])(ids(3, 1))
    run(FAST)
    params.layers[1].down.mul_(2.0)
    close(run(FAST), run(MODEL))
    assert len(calls) == 2


def test_a_past_that_overflowed_is_nan(calls):
    params = PARAMS["float32"]
    past = MODEL.apply(params, ids(3), MODEL.cache(4))[1]  # numbers beyond its length
    one = lambda m: lambda t, n: m.apply(params, t, past._replace(length=n))[0]
    run = lambda m: vmap(one(m))(ids(2, 2), torch.tensor([3, 1]))
    got = run(FAST)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()

    def again(m):
        def twice(t, n):
            after = m.apply(params, t, past._replace(length=n))[1]
            return m.extend(params, t[:1], after)[0]

        return vmap(twice)(ids(2, 2), torch.tensor([3, 1]))

    close(torch.nan_to_num(again(FAST), 7.0), torch.nan_to_num(again(MODEL), 7.0))
    assert again(FAST)[0].isnan().all()
    assert calls


def test_a_past_of_another_dtype_is_the_error_of_the_model(calls):
    past = fa.cast(torch.bfloat16)(MODEL.apply(PARAMS["int4"], ids(5), MODEL.cache(9))[1])
    with pytest.raises(TypeError, match=r"the past should be torch\.float32"):
        vmap(lambda t: FAST.extend(PARAMS["int4"], t, past)[0])(ids(3, 1))
    assert not calls


def test_threads_and_company_change_nothing():
    """A row is the same number whatever other rows there are."""
    params, past = PARAMS["int4"], filled("int4", 200, 150)
    tokens, before = ids(20, 2), torch.get_num_threads()
    run = lambda tokens: vmap(lambda t: FAST.hidden(params, t, past)[0])(tokens)
    try:
        torch.set_num_threads(1)
        alone = run(tokens)
        torch.set_num_threads(2)
        assert torch.equal(run(tokens), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(run(tokens[:7]), alone[:7])
