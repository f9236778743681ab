"""Prompts as one operator in C++: as near to the exact decoder as that of floats is, whatever the
past; and what it does not compute.
"""

import dataclasses

import pytest
import torch
from operated import CONFIG, MARKS, MODELS, OTHERS, check, ids, quantized

import funcattn as fa
from funcattn import native
from funcattn.caches import Branch
from funcattn.compilation import prefill
from funcattn.layers import dense_products
from funcattn.layers.dense_products import Measured
from funcattn.quantization import tiles

pytestmark = MARKS
T = 37  # more than the tokens of a step, and no multiple of a tile


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """float32 matrices go through the operator, as where it was measured to be faster."""
    monkeypatch.setattr(dense_products, "measured", lambda: Measured(2.0, native.load()))


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the operator."""
    seen, run = [], prefill.run
    monkeypatch.setattr(prefill, "run", lambda *args: seen.append(1) or run(*args))
    return seen


def both(params, tokens, cache=(), config=CONFIG, **options):
    """Logits of the compiled model and of the model."""
    model = fa.decoder(config)
    fast = fa.compile(model, backend="eager")
    return [m.extend(params, tokens, cache, **options)[0] for m in (fast, model)]


@pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])
@pytest.mark.parametrize(("changes", "scheme"), MODELS.values(), ids=MODELS)
def test_it_is_as_near_as_floats_are(calls, instructions, changes, scheme):
    if torch.ops.funcattn.instructions(instructions) != instructions:
        pytest.skip("the processor has no such instructions")
    if scheme is not None and native.instructions() != tiles.AVX512:
        pytest.skip("without VNNI many rows are multiplied by the expanded matrix")
    try:
        config = dataclasses.replace(CONFIG, **changes)
        params, model = quantized(config, scheme), fa.decoder(config)
        past = model.apply(params, ids(40, 1), model.cache(90))[1]
        for before in (model.cache(99), past, Branch(past, past)):
            check(config, params, ids(70, 2), before)
        assert len(calls) == 3
    finally:
        torch.ops.funcattn.instructions(-1)


def test_a_prompt_without_a_past_is_one_too(calls):
    for params in (quantized(CONFIG, None), quantized(CONFIG, fa.int4)):
        model = fa.decoder(CONFIG)
        fast = fa.compile(model, backend="eager")
        got, wanted = fast.extend(params, ids(T)), model.extend(params, ids(T))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_activations_may_be_rounded(calls):
    params = quantized(CONFIG, fa.int8)
    near = fa.quantization.round_activations()(params)
    got, wanted = both(near, ids(T))
    exact = both(params, ids(T))[1]
    # rounded numbers differ by a step where sums differ by a rounding
    assert (got - wanted).norm() <= (wanted - exact).norm()
    assert len(calls) == 2


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    "scheme",
    [fa.int8, fa.int8(group=32), fa.int4, fa.int4(symmetric=True)],
    ids=["int8", "int8 in groups", "int4", "int4, symmetric"],
)
def test_products_with_rounded_activations_are_those_of_a_few_vectors(calls, scheme, heads):
    """Values of the first layer, of vectors whose norm is the same number in every arithmetic."""
    config = dataclasses.replace(CONFIG, kv_heads=heads, layers=1, width=96, tied=False)
    params = fa.decoder(config).init(fa.key(0))
    signs = fa.random.normal(fa.key(1), (48, 96)).sign()
    first = params.layers[0]._replace(attention_norm=fa.random.normal(fa.key(2), (96,)))
    params = fa.quantize(scheme)(params._replace(layers=(first,), embedding=signs.clone()))
    near = fa.quantization.round_activations()(params)._replace(embedding=signs)
    model = fa.decoder(config)
    fast = fa.compile(model, backend="eager")
    for n in (16, 23, T, 60):
        got, wanted = (m.extend(near, ids(n))[1].v[0] for m in (fast, model))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert len(calls) == 4


def test_codes_and_floats_are_one_operator_too(calls):
    params, floats = quantized(CONFIG, fa.int8), fa.dequantize(quantized(CONFIG, fa.int8))
    first, *others = params.layers
    for name in ("k", "o", "gate", "up", "down"):
        mixed = first._replace(**{name: getattr(floats.layers[0], name)})
        check(
            CONFIG, params._replace(layers=(mixed, *others)), ids(70), fa.decoder(CONFIG).cache(99)
        )
    assert len(calls) == 5


def test_the_numbers_are_those_of_any_number_of_threads(calls):
    fast = fa.compile(fa.decoder(CONFIG), backend="eager")
    threads = torch.get_num_threads()
    try:
        for params in (quantized(CONFIG, None), quantized(CONFIG, fa.int4)):
            found = []
            for some in (1, 2):
                torch.set_num_threads(some)
                found.append(fast.extend(params, ids(200)))
            torch.testing.assert_close(*found, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 4


def test_a_past_may_lie_in_memory_as_it_likes_and_holds_what_counts(calls):
    params, model = quantized(CONFIG, None), fa.decoder(CONFIG)
    past = model.apply(params, ids(9, 1), model.cache(120))[1]
    by_rows = lambda rows: rows.transpose(1, 2).contiguous().transpose(1, 2)
    beyond = (torch.arange(past.k.shape[-2]) >= 9).unsqueeze(-1)
    fast = fa.compile(model, backend="eager")
    wanted = fast.extend(params, ids(70), past)
    for change in (by_rows, lambda rows: rows.masked_fill(beyond, torch.nan)):
        got = fast.extend(params, ids(70), past._replace(k=change(past.k), v=change(past.v)))
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert len(calls) == 3


def test_no_token_sees_those_behind_it():
    params = quantized(CONFIG, None)
    table = params.embedding
    spoilt = params._replace(
        embedding=table.index_fill(0, torch.tensor([7]), torch.nan), head=table.clone()
    )
    tokens = ids(T) % 7
    whole = both(spoilt, tokens)[0]
    logits = both(spoilt, torch.where(torch.arange(T) < 30, tokens, 7))[0]
    assert logits[30:].isnan().all()
    torch.testing.assert_close(logits[:30], whole[:30], rtol=1e-4, atol=1e-4)


def test_weights_written_in_place_are_read_anew(calls):
    params, model = quantized(CONFIG, fa.int8), fa.decoder(CONFIG)
    params = params._replace(layers=fa.dequantize(params).layers)
    fast = fa.compile(model, backend="eager")
    before = fast.extend(params, ids(T))[0]
    params.layers[0].attention_norm.mul_(2)
    params.layers[1].down.mul_(-1)
    after = fast.extend(params, ids(T))[0]
    torch.testing.assert_close(after, model.extend(params, ids(T))[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(after, before)
    assert len(calls) == 2


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_other_layers_run_as_the_model(calls, changes):
    config = dataclasses.replace(CONFIG, **changes)
    got, wanted = both(quantized(config, None), ids(T), config=config)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not calls


def test_other_calls_run_as_the_model(calls, monkeypatch):
    params, model = quantized(CONFIG, None), fa.decoder(CONFIG)
    fast = fa.compile(model, backend="eager")
    cases = {
        "too few": lambda m: m.extend(params, ids(15)),
        "a mask": lambda m: m.extend(params, ids(T), mask=fa.masks.window(T, 3)),
        "positions": lambda m: m.extend(params, ids(T), positions=torch.arange(T) + 3),
        "a batch": lambda m: m.extend(params, ids(2 * T).view(2, T)),
        "float64": lambda m: m.extend(fa.cast(torch.float64)(params), ids(T)),
        "vmap": lambda m: torch.func.vmap(lambda t: m.extend(params, t))(ids(2 * T).view(2, T)),
        "codes": lambda m: m.extend(params, ids(T), m.cache(T, kind=fa.QuantizedCache)),
    }
    for run in cases.values():
        torch.testing.assert_close(run(fast)[0], run(model)[0], rtol=1e-4, atol=1e-4)
    recorded = params._replace(norm=params.norm.clone().requires_grad_())
    grads = [
        torch.autograd.grad(m.extend(recorded, ids(T))[0].sum(), recorded.norm)[0]
        for m in (fast, model)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
    with fa.kernels.use("reference"):
        fast.extend(params, ids(T))
    fa.compile(fa.decoder(CONFIG, kernel="sdpa"), backend="eager").extend(params, ids(T))
    assert "prompts: one call" in fast.explain(params)
    monkeypatch.setattr(dense_products, "measured", lambda: Measured(0.85))
    slow = fa.compile(fa.decoder(CONFIG), backend="eager")
    slow.extend(params, ids(T))
    assert "prompts" not in slow.explain(params)
    assert not calls


def test_a_token_outside_of_the_vocabulary_is_the_error_of_the_model():
    fast = fa.compile(fa.decoder(CONFIG), backend="eager")
    with pytest.raises(ValueError, match="ids in 0"):
        fast.extend(quantized(CONFIG, None), ids(T) + 48)


def test_weights_that_are_moved_are_found_again(calls):
    params, tokens = quantized(dataclasses.replace(CONFIG, width=256), None), ids(T)
    model = fa.decoder(dataclasses.replace(CONFIG, width=256))
    fast, wanted = fa.compile(model, backend="eager"), model.extend(params, tokens)[0]
    fast.extend(params, tokens)
    for weight in fa.tree.leaves(params):
        weight.share_memory_()  # the same tensor, and its memory before is freed
    other = [torch.full((n, 256), 7.0) for n in (32, 64, 96, 256) * 9]  # in that memory, perhaps
    got = fast.extend(params, tokens)[0]
    del other
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_a_prompt_of_other_weights_between_looking_and_taking(monkeypatch):
    """As of another thread."""
    model, params, others = fa.decoder(CONFIG), quantized(CONFIG, None), quantized(CONFIG, None, 1)
    fast, look, between = fa.compile(model, backend="eager"), prefill.has_tangent, []
    fast.extend(params, ids(T))

    def looked(*tensors):
        while between:
            fast.extend(between.pop(), ids(T))
        return look(*tensors)

    monkeypatch.setattr(prefill, "has_tangent", looked)
    between.append(others)
    got, wanted = (m.extend(params, ids(T))[0] for m in (fast, model))
    assert not between
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
