"""Layers as one operator in C++: as near to the exact decoder as that of floats is, for every past;
and what it does not know.
"""

import dataclasses
import functools
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operated import CONFIG, MARKS, MODELS, OTHERS, check, ids, quantized

import funcattn as fa
from funcattn.caches import Branch
from funcattn.compilation import fused, stack

pytestmark = MARKS


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the operator."""
    seen, run = [], fused.run
    monkeypatch.setattr(fused, "run", lambda *args: seen.append(1) or run(*args))
    return seen


@pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])
@pytest.mark.parametrize(("changes", "scheme"), MODELS.values(), ids=MODELS)
def test_it_is_as_near_as_floats_are(calls, instructions, changes, scheme):
    if torch.ops.funcattn.instructions(instructions) != instructions:
        pytest.skip("the processor has no such instructions")
    try:
        config = dataclasses.replace(CONFIG, **changes)
        params, model = quantized(config, scheme), fa.decoder(config)
        for T, past in (
            (1, model.cache(9)),
            (5, model.cache(9)),
            (1, model.apply(params, ids(40, 1), model.cache(50))[1]),
        ):
            check(config, params, ids(T, 2), past)
        assert len(calls) == 3
    finally:
        torch.ops.funcattn.instructions(-1)


@settings(max_examples=30)
@given(
    st.integers(1, 16),
    st.integers(0, 40),
    st.integers(0, 20),
    st.integers(0, 7),
    st.integers(0, 100),
)
def test_every_past_is_read_as_far_as_it_goes(T, first, second, spare, seed):
    """A prefix and what is its own, of any lengths and capacities; what lies beyond a length is NaN
    here.
    """
    params, model = quantized(CONFIG, fa.int4), fa.decoder(CONFIG)
    fill = lambda cache, n, seed: model.apply(params, ids(n, seed), cache)[1] if n else cache
    nan = lambda past: past._replace(
        **{name: spoilt(getattr(past, name), int(past.length)) for name in ("k", "v")}
    )
    spoilt = lambda rows, n: torch.where(
        (torch.arange(rows.shape[-2]) < n).unsqueeze(-1), rows, torch.nan
    )
    prefix = nan(fill(model.cache(first + spare), first, seed))
    branch = Branch(prefix, nan(fill(model.cache(second + spare + T), second, seed + 1)))
    fast = fa.compile(model, backend="eager")
    clean = lambda past: past._replace(k=past.k.nan_to_num(), v=past.v.nan_to_num())
    wanted = model.extend(params, ids(T, seed), Branch(clean(branch.prefix), clean(branch.tail)))
    got = fast.extend(params, ids(T, seed), branch)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-4)


def test_a_past_may_lie_in_memory_as_it_likes(calls):
    params, model = quantized(CONFIG, fa.int4), fa.decoder(CONFIG)
    past = model.apply(params, ids(9, 1), model.cache(12))[1]
    # a token's heads together
    by_rows = lambda rows: rows.transpose(1, 2).contiguous().transpose(1, 2)
    wider = lambda rows: torch.cat([rows, rows], -1)[..., : rows.shape[-1]]
    fast = fa.compile(model, backend="eager")
    wanted = fast.extend(params, ids(3), past)
    for k, v in ((by_rows, by_rows), (wider, by_rows), (by_rows, wider)):
        got = fast.extend(params, ids(3), past._replace(k=k(past.k), v=v(past.v)))
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert len(calls) == 4


def test_a_past_whose_features_lie_apart_runs_as_compiled_code(calls):
    params, model = quantized(CONFIG, fa.int4), fa.decoder(CONFIG)
    past = model.apply(params, ids(9, 1), model.cache(12))[1]
    apart = lambda rows: rows.mT.contiguous().mT
    fast, wanted = fa.compile(model, backend="eager"), model.extend(params, ids(3), past)[0]
    for changes in ({"k": apart(past.k)}, {"v": apart(past.v)}):
        got = fast.extend(params, ids(3), past._replace(**changes))[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not calls


def test_a_past_of_another_dtype_is_the_error_of_the_model(calls):
    params, model = quantized(CONFIG, fa.int4), fa.decoder(CONFIG)
    for m in (model, fa.compile(model, backend="eager")):
        with pytest.raises(TypeError, match=r"the past should be torch\.float32"):
            m.extend(
                params,
                ids(2),
                fa.cast(torch.bfloat16)(model.apply(params, ids(5, 1), model.cache(12))[1]),
            )
    assert not calls


def test_an_empty_past_of_another_dtype_is_no_past(calls):
    params, model = quantized(CONFIG, fa.int4), fa.decoder(CONFIG)
    run = lambda m: m.extend(params, ids(2), model.cache(9, dtype=torch.bfloat16))[0]
    torch.testing.assert_close(
        run(fa.compile(model, backend="eager")), run(model), rtol=1e-4, atol=1e-4
    )
    assert not calls


def test_no_token_sees_those_behind_it():
    params, model = quantized(CONFIG, fa.int4), fa.decoder(CONFIG)
    table = (
        params.embedding
        if isinstance(params.embedding, torch.Tensor)
        else fa.dequantize(params).embedding
    )
    spoilt = params._replace(
        embedding=table.index_fill(0, torch.tensor([7]), torch.nan),
        head=fa.dequantize(params).embedding,
    )
    fast = fa.compile(model, backend="eager")
    logits = fast.extend(spoilt, torch.tensor([1, 2, 7, 3]), model.cache(9))[0]
    assert logits[:2].isfinite().all()
    assert logits[2:].isnan().all()
    whole = spoilt._replace(embedding=table)
    torch.testing.assert_close(
        logits[:2], fast.extend(whole, torch.tensor([1, 2, 5, 3]), model.cache(9))[0][:2]
    )


def test_large_logits_are_a_choice_and_not_an_overflow():
    config = dataclasses.replace(CONFIG, attention_scale=1e4)
    params, model = quantized(config, fa.int8), fa.decoder(config)
    logits = fa.compile(model, backend="eager").extend(params, ids(6), model.cache(9))[0]
    assert logits.isfinite().all()
    torch.testing.assert_close(
        logits[:1], model.extend(params, ids(6), model.cache(9))[0][:1], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])
def test_a_gate_that_is_closed_lets_nothing_through(calls, instructions):
    """silu(-1e36) is 0, and what is 0 times 1e3 should not be 1."""
    if torch.ops.funcattn.instructions(instructions) != instructions:
        pytest.skip("the processor has no such instructions")
    try:
        model = fa.decoder(CONFIG)
        plain = model.init(fa.key(0))
        # so that no sum changes its sign
        plain = plain._replace(embedding=plain.embedding.abs() + 1)
        closed = [
            layer._replace(gate=torch.full_like(layer.gate, -1e35), up=1e3 * layer.up)
            for layer in plain.layers
        ]
        params = fa.quantize(fa.int8)(plain._replace(layers=tuple(closed)))
        wanted = fa.compile(model, backend="eager").extend(params, ids(2), model.cache(4))[0]
        torch.testing.assert_close(
            wanted, model.extend(params, ids(2), model.cache(4))[0], rtol=1e-4, atol=1e-4
        )
        assert calls
    finally:
        torch.ops.funcattn.instructions(-1)


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_what_it_does_not_know_runs_as_compiled_code(calls, changes):
    config = dataclasses.replace(CONFIG, **changes)
    params, model = quantized(config, fa.int8), fa.decoder(config)
    fast = fa.compile(model, backend="eager")
    assert "not the operator funcattn::layers: it" in fast.explain(params)
    past = model.apply(params, ids(5, 1), model.cache(12))[1]
    torch.testing.assert_close(
        fast.extend(params, ids(2), past)[0],
        model.extend(params, ids(2), past)[0],
        rtol=1e-4,
        atol=1e-4,
    )
    assert not calls


def test_what_is_one_operator_waits_for_no_compiler(calls):
    """Nor for one of the head: a model keeps no code."""

    def backend(graph, inputs):
        raise AssertionError("compiled")

    model = fa.decoder(dataclasses.replace(CONFIG, logit_cap=3.0, logit_scale=0.5))
    params, fast = quantized(CONFIG, None), fa.compile(model, backend=backend)
    assert fast.is_operator(params)
    for T in (1, 5):
        past = model.apply(params, ids(5, 1), model.cache(12))[1]
        torch.testing.assert_close(
            fast.extend(params, ids(T), past)[0], model.extend(params, ids(T), past)[0]
        )
    assert len(calls) == 2
    assert not model.code
    assert not fast.is_operator(fa.cast(torch.bfloat16)(params))
    assert not fa.compile(fa.decoder(CONFIG, kernel="sdpa")).is_operator(params)
    assert not fast._replace(hidden=model.hidden).is_operator(params)


def test_so_do_other_dtypes(calls):
    params, model = quantized(CONFIG, fa.int8), fa.decoder(CONFIG)
    fast = fa.compile(model, backend="eager")
    half = fa.cast(torch.bfloat16)(fa.dequantize(params))
    assert "layers.0.q is a matrix of torch.bfloat16" in fast.explain(half)
    wide = fa.cast(torch.float64)(params)
    assert "norms with weights of float32" in fast.explain(wide)
    # by the greatest: eight roundings of bfloat16, as the same operations are taken
    for tree, dtype, far in ((half, torch.bfloat16, 8 * 2.0**-9), (wide, torch.float64, 1e-12)):
        past = model.apply(tree, ids(5, 1), model.cache(12, dtype=dtype))[1]
        found, wanted = (m.extend(tree, ids(2), past)[0] for m in (fast, model))
        assert (found - wanted).abs().max() <= far * wanted.abs().max()
    assert not calls


def test_codes_and_floats_are_one_operator_too(calls):
    params = quantized(CONFIG, fa.int8)
    first, *others = params.layers
    mixed = first._replace(down=fa.dequantize(params).layers[0].down)
    mixed = params._replace(layers=(mixed, *others))
    check(CONFIG, mixed, ids(3, 2), fa.decoder(CONFIG).cache(9))
    assert len(calls) == 1


def test_so_do_weights_of_which_the_configuration_says_nothing(calls):
    params, model = quantized(CONFIG, fa.int8), fa.decoder(CONFIG)
    first, *others = params.layers
    narrow = fa.quantize(fa.int8)(
        fa.decoder(dataclasses.replace(CONFIG, feed_forward=32)).init(fa.key(1))
    ).layers[0]
    fast, past = (
        fa.compile(model, backend="eager"),
        model.apply(params, ids(5, 1), model.cache(12))[1],
    )
    for changed, why in (
        (
            first._replace(attention_after_norm=torch.full((64,), 2.0)),
            "layers.0.attention_after_norm",
        ),
        (
            first._replace(feed_forward_after_norm=torch.full((64,), 2.0)),
            "layers.0.feed_forward_after_norm",
        ),
        (first._replace(gate=narrow.gate, up=narrow.up, down=narrow.down), "the same sizes"),
    ):
        tree = params._replace(layers=(changed, *others))
        assert why in fast.explain(tree)
        torch.testing.assert_close(
            fast.extend(tree, ids(2), past)[0],
            model.extend(tree, ids(2), past)[0],
            rtol=1e-4,
            atol=1e-4,
        )
    assert not calls


@pytest.mark.parametrize(
    "norm", [lambda p: p.layers[1].attention_norm, lambda p: p.norm], ids=["a layer's", "the last"]
)
def test_a_norm_that_was_written_into_is_read_anew(calls, norm):
    params, model = quantized(CONFIG, fa.int4), fa.decoder(CONFIG)
    fast = fa.compile(model, backend="eager")
    fast.extend(params, ids(1), model.cache(3))
    norm(params).mul_(2.0)
    wanted = model.extend(params, ids(1), model.cache(3))[0]
    torch.testing.assert_close(
        fast.extend(params, ids(1), model.cache(3))[0], wanted, rtol=1e-4, atol=1e-4
    )
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (lambda p: {"norm": p.norm.double()}, "and norm is another"),
        (lambda p: {"embedding": p.embedding.double()}, "embedding are torch.float64"),
    ],
    ids=["the last norm", "the embedding"],
)
def test_weights_around_the_layers_of_another_dtype_are_none_of_it(changes, why):
    params = quantized(CONFIG, None)
    params = params._replace(head=params.embedding, **changes(params))
    fast = fa.compile(fa.decoder(CONFIG), backend="eager")
    assert why in fast.explain(params)
    assert not fast.is_operator(params)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_last_norm_of_another_dtype_is_computed_as_the_model_does(calls):
    params, model = quantized(CONFIG, None), fa.decoder(CONFIG)
    params = params._replace(norm=params.norm.double())
    fast, cache = fa.compile(model, backend="eager"), model.cache(4)
    got, wanted = (m.hidden(params, ids(2), cache)[0] for m in (fast, model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not calls


def test_threads_change_nothing():
    config = dataclasses.replace(CONFIG, width=256, feed_forward=512)
    params, model = quantized(config, fa.int4), fa.decoder(config)
    fast = fa.compile(model, backend="eager")
    past = model.apply(params, ids(300, 1), model.cache(400))[1]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fast.hidden(params, ids(3), past)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@functools.cache
def weights(change=lambda layers: layers):
    """Of two layers in int4, changed; kept, since a plan is valid as long as its matrices live."""
    params = quantized(CONFIG, fa.int4)
    stack = [
        layer._replace(
            **{name: fa.layers.prepare(getattr(layer, name), 1) for name in fused.MATRICES}
        )
        for layer in params.layers
    ]
    return fused.weights(params._replace(layers=tuple(change(stack))))


def plan_of(change):
    """The plan of other layers, in the place of one."""
    return lambda _: weights(change).plan


def arguments(**changes):
    past = torch.zeros(1, 2, 2, 5, 16)
    given = {"plan": weights().plan, "norms": weights().norms, "x": torch.zeros(1, 2, 64)}
    given |= {
        "cos": torch.ones(1, 2, 16),
        "sin": torch.zeros(1, 2, 16),
        "keys": [past],
        "values": [past],
        "lengths": [torch.tensor([4])],
        "among": None,
    }
    given |= {"heads": 4, "kv_heads": 2, "scale": 1.0, "epsilon": 1e-5}
    given |= {"codes": [], "coded_rows": 0, "bits": 0}
    return given | {name: change(given[name]) for name, change in changes.items()}


BAD = {
    "x of another dtype": ({"x": lambda x: x.double()}, "x should be"),
    "no tokens": (dict.fromkeys(("x", "cos", "sin"), lambda x: x[:, :0]), "x should be"),
    "x by columns": ({"x": lambda x: x.mT.contiguous().mT}, "x should be"),
    "a norm too few": ({"norms": lambda x: x[:-1]}, "two norms for each layer"),
    "short norms": ({"norms": lambda x: x[:, :5].contiguous()}, "norms should be"),
    "norms by columns": ({"norms": lambda x: x.mT.contiguous().mT}, "norms should be"),
    "norms of another dtype": ({"norms": lambda x: x.double()}, "norms should be"),
    "norms of more axes": ({"norms": lambda x: x[None]}, "two norms for each layer"),
    "another number of heads": ({"heads": lambda x: 3}, "a multiple of K"),
    "no heads": ({"heads": lambda x: 0}, "a multiple of K"),
    "heads of other sizes": ({"heads": lambda x: 6}, "H heads of one size"),
    "more heads": ({"heads": lambda x: 8}, "layers of the same sizes"),
    "a copy of a plan": ({"plan": lambda x: x.clone()}, "no copy"),
    "no plan": ({"plan": torch.zeros_like}, "from funcattn::plan"),
    "a part of a plan": ({"plan": lambda x: x[:-1]}, "seven matrices"),
    "a plan without its beginning": ({"plan": lambda x: x[1:]}, "from funcattn::plan"),
    "a plan of another dtype": ({"plan": lambda x: x.float()}, "plan should be"),
    "other rows": (
        {"plan": plan_of(lambda both: [both[0], both[1]._replace(down=both[1].q)])},
        "layers of the same sizes",
    ),
    "a matrix of other columns": (
        {"plan": plan_of(lambda both: [both[0]._replace(o=both[0].down), both[1]])},
        "layers of the same sizes",
    ),
    "a matrix that is not in tiles": (
        {"plan": plan_of(lambda both: [both[0]._replace(q=torch.zeros(64, 64)), both[1]])},
        "in tiles",
    ),
    "angles of other tokens": ({"cos": lambda x: x[:, :1]}, "cos and sin should be"),
    "a past of other heads": ({"keys": lambda x: [x[0][:, :, :1]]}, "keys and values should be"),
    "a length beyond": ({"lengths": lambda x: [x[0] + 2]}, "within the past"),
    "a negative length": ({"lengths": lambda x: [x[0] - 5]}, "within the past"),
    "codes of no blocks": ({"codes": lambda x: [torch.zeros(1)]}, "codes, scale and low"),
    "no length": ({"lengths": lambda x: []}, "lengths for each part"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_the_operator_refuses_what_does_not_fit(changes, message):
    run = lambda **given: torch.ops.funcattn.layers(*given.values())
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        assert run(**arguments())[0].shape == (1, 2, 64)
        with pytest.raises(RuntimeError, match=message):
            run(**arguments(**changes))


BLOCKS = torch.zeros(2, 2, 320, dtype=torch.uint8)
OF_ROWS = torch.zeros(2, 2, 512, dtype=torch.uint8)  # blocks that have a scale a row
BAD_MATRICES = {
    "none": (([], [torch.ones(2)], []), "one matrix at least"),
    "rows of fewer": (([BLOCKS, BLOCKS], [], [32]), "as many rows as blocks"),
    "other rows": (([BLOCKS], [], [33]), "as the tiles have"),
    "blocks of no kind": (([BLOCKS[..., 1:].contiguous()], [], [32]), "of no kind"),
    "blocks apart": (([BLOCKS.mT], [], [32]), "blocks should be"),
    "blocks of another dtype": (([BLOCKS.double()], [], [32]), "blocks should be"),
    "floats apart": (([torch.zeros(2, 16, 8).mT], [], [32]), "floats should be"),
    "no scale": (([OF_ROWS], [], [32]), "a scale for each row"),
    "a short scale": (([OF_ROWS], [torch.ones(31)], [32]), "one for each row"),
    "floats of other rows": (([torch.zeros(32, 8)], [], [31]), "float32 \\(rows, columns\\)"),
    "doubles": (([torch.zeros(32, 8).double()], [], [32]), "float32 \\(rows, columns\\)"),
    "rows and columns apart": (([torch.zeros(32, 16, 2)[..., 0]], [], [32]), "rows or columns"),
}


@pytest.mark.parametrize(("given", "message"), BAD_MATRICES.values(), ids=BAD_MATRICES)
def test_a_plan_refuses_matrices_that_are_none(given, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.funcattn.plan(*given)


@pytest.mark.parametrize("scheme", [None, fa.int4, fa.int8], ids=["float32", "int4", "int8"])
def test_weights_keep_the_memory_that_their_plan_names(scheme):
    params, model = quantized(CONFIG, scheme), fa.decoder(CONFIG)
    fast = fa.compile(model, backend="eager")
    fast.extend(params, ids(1), model.cache(3))
    found = fast.stack.held[1, id(params)].fused
    held = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in found.storages]
    addresses = [at for at in found.plan[1:, :2].flatten().tolist() if at]
    assert len(addresses) == 14 * (2 if scheme is fa.int8 else 1)
    assert all(any(first <= at < last for first, last in held) for at in addresses)


def test_forms_of_several_trees_are_kept_beside_each_other(monkeypatch):
    made, prepared = [], stack._prepared
    monkeypatch.setattr(stack, "_prepared", lambda *args: made.append(1) or prepared(*args))
    model = fa.decoder(CONFIG)
    fast, past = fa.compile(model, backend="eager"), model.cache(3)
    trees = [quantized(CONFIG, scheme) for scheme in (fa.int4, fa.int8)]
    for _ in range(3):
        for params in trees:
            torch.testing.assert_close(
                fast.extend(params, ids(1), past)[0],
                model.extend(params, ids(1), past)[0],
                rtol=1e-4,
                atol=1e-5,
            )
    assert len(made) == 2
    trees += [fa.tree.map(torch.clone, trees[n % 2]) for n in range(2 * stack.MOST_HELD)]
    for params in trees:
        fast.extend(params, ids(1), past)
    kept = [identity for _, identity in fast.stack.held]
    assert kept == list(map(id, trees[-stack.MOST_HELD :]))
    del params, trees
    gc.collect()
    assert not fast.stack.held


def test_it_has_no_derivative_and_says_so():
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.ops.funcattn.layers(*arguments().values())


def test_derivatives_of_the_compiled_model_are_those_of_the_model(calls):
    params, model = quantized(CONFIG, fa.int4), fa.decoder(CONFIG)
    fast, past = fa.compile(model, backend="eager"), model.cache(4)
    of = lambda m: torch.func.grad(
        lambda norm: m.extend(params._replace(norm=norm), ids(2), past)[0].square().sum()
    )(params.norm)
    torch.testing.assert_close(of(fast), of(model))
    assert not calls
