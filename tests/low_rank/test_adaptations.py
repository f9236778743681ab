"""Adaptations of low rank: the same function at first, trained alone, merged, saved as PEFT does,
over any weight.
"""

import importlib.util
import json
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.families import CheckpointError
from funcattn.low_rank import Lora, is_adapted, is_trained, lora, merge_lora, without_lora

CONFIG = fa.Config(
    vocabulary=17, width=8, layers=2, heads=2, kv_heads=1, head_size=4, feed_forward=12, context=32
)
MODEL = fa.decoder(CONFIG)
ROWS = fa.random.randint(fa.key(2), (3, 9), 0, CONFIG.vocabulary)


def weights(dtype=torch.float64):
    return fa.tree.map(lambda w: w.to(dtype) * (5 if w.dim() > 1 else 1), MODEL.init(fa.key(1)))


def trained(params, rank=2, **options):
    """Adapted, with b away from zero."""
    adapted = lora(rank, **options)(fa.key(4), params)
    return fa.tree.map_with_path(
        lambda path, x: (
            fa.random.normal(fa.fold_in(fa.key(5), len(path)), x.shape, x.dtype)
            if path.endswith(".b")
            else x
        ),
        adapted,
    )


def logits(params):
    return MODEL.logits(params, MODEL.hidden(params, ROWS)[0])


def test_an_adapted_model_is_the_same_function():
    params = weights()
    adapted = lora(2)(fa.key(0), params)
    assert torch.equal(logits(adapted), logits(params))
    names = {
        path.rpartition(".")[2]
        for path, leaf in fa.tree.items(adapted, is_leaf=is_adapted)
        if is_adapted(leaf)
    }
    assert names == {"q", "k", "v", "o", "gate", "up", "down"}
    assert fa.tree.paths(adapted, is_leaf=is_adapted) == fa.tree.paths(params)


def test_a_regex_chooses_as_a_predicate_does():
    adapted = [
        lora(2, where)(fa.key(0), weights())
        for where in (r"layers\.\d+\.[qv]", lambda path, _: path[-1] in "qv")
    ]
    assert fa.tree.paths(adapted[0]) == fa.tree.paths(adapted[1])
    assert all(torch.equal(a, b) for a, b in zip(*map(fa.tree.leaves, adapted), strict=True))
    with pytest.raises(ValueError, match=r"lora: where should be a regex of paths, got '\(q'"):
        lora(2, "(q")
    with pytest.raises(TypeError, match="lora: where should be a regex or a predicate"):
        lora(2, 3)
    with pytest.raises(ValueError, match="lora: where should be true of some weight"):
        lora(2, "q")(fa.key(0), weights())


def test_what_is_added_is_scale_b_a():
    params = weights()
    adapted = trained(params, alpha=3.0)
    layer = adapted.layers[1]
    x = fa.random.normal(fa.key(7), (5, 8), torch.float64)
    expected = x @ (params.layers[1].q + 1.5 * layer.q.b @ layer.q.a).mT
    torch.testing.assert_close(fa.layers.linear(layer.q, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "where", [None, lambda path, weight: weight.dim() == 2], ids=["the default", "embedding too"]
)
def test_a_merged_model_is_the_same_function(where):
    adapted = trained(weights(), where=where)
    merged = merge_lora(adapted)
    assert not any(is_adapted(x) for x in fa.tree.leaves(merged, is_leaf=is_adapted))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-10, atol=1e-10)
    assert (logits(merged) - logits(weights())).abs().max() > 1e-3
    assert fa.tree.allclose(without_lora(adapted), weights(), rtol=0, atol=0)
    assert fa.tree.allclose(merge_lora(weights()), weights(), rtol=0, atol=0)


def test_adaptations_stand_upon_adaptations():
    once = trained(weights())
    twice = trained(once)
    assert isinstance(twice.layers[0].q.base, Lora)
    assert torch.equal(logits(lora(2)(fa.key(0), once)), logits(once))
    torch.testing.assert_close(logits(merge_lora(twice)), logits(twice), rtol=1e-10, atol=1e-10)


def test_an_adaptation_stands_upon_any_weight():
    class Halved(NamedTuple):
        """A weight of another kind, as a quantized one is: int8 codes."""

        codes: Any

        @property
        def shape(self):
            return tuple(self.codes.shape)

    fa.layers.linear.register(Halved, lambda weight, x: x @ (weight.codes.to(x.dtype) / 2).mT)
    codes = fa.random.randint(fa.key(0), (6, 4), -9, 9).to(torch.int8)
    adapted = lora(2)(fa.key(1), {"q": Halved(codes)})
    x = fa.random.normal(fa.key(2), (3, 4))
    assert torch.equal(fa.layers.linear(adapted["q"], x), x @ (codes.float() / 2).mT)
    assert fa.tree.paths(adapted) == ["q.base.codes", "q.a", "q.b", "q.scale"]
    chosen, rest = fa.tree.partition(adapted, is_trained)
    slope = grad(lambda chosen: fa.layers.linear(fa.tree.combine(chosen, rest)["q"], x).sum())(
        chosen
    )
    assert slope["q"].b.abs().sum() > 0
    with pytest.raises(
        TypeError, match=r"merge_lora: the base at 'q' should be a tensor, got a Halved"
    ):
        merge_lora(adapted)


def test_gradients_are_those_of_the_merged_weight():
    """d/db = scale G a^T and d/da = scale b^T G, where G is the gradient of the merged matrix."""
    adapted = trained(weights())
    chosen, frozen = fa.tree.partition(adapted, is_trained)
    of = lambda chosen: fa.loss(MODEL, fa.tree.combine(chosen, frozen), ROWS)
    found = grad(of)(chosen)
    whole = grad(lambda p: fa.loss(MODEL, p, ROWS))(merge_lora(adapted))
    for i, layer in enumerate(adapted.layers):
        for name in ("q", "down"):
            record, G = getattr(layer, name), getattr(whole.layers[i], name)
            torch.testing.assert_close(
                getattr(found.layers[i], name).b,
                record.scale * G @ record.a.mT,
                rtol=1e-9,
                atol=1e-12,
            )
            torch.testing.assert_close(
                getattr(found.layers[i], name).a,
                record.scale * record.b.mT @ G,
                rtol=1e-9,
                atol=1e-12,
            )
    ones = fa.tree.map(torch.ones_like, chosen)
    _, along = jvp(of, (chosen,), (ones,))
    torch.testing.assert_close(
        along, sum(g.sum() for g in fa.tree.leaves(found)), rtol=1e-9, atol=1e-12
    )


def test_only_the_adaptation_is_trained():
    params = weights(torch.float32)
    chosen, frozen = fa.tree.partition(lora(2)(fa.key(0), params), is_trained)
    optimizer = fa.training.adamw(3e-2)
    one, state, losses = fa.training.step(MODEL, optimizer), optimizer.init(chosen), []
    with torch.no_grad():
        for _ in range(30):
            chosen, state, metrics = one(chosen, state, ROWS, frozen)
            losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]
    after = fa.tree.combine(chosen, frozen)
    assert fa.tree.allclose(without_lora(after), params, rtol=0, atol=0)
    assert fa.tree.count(state.mean) == fa.tree.count(chosen) < fa.tree.count(params)


def test_several_adaptations_of_one_model_are_a_vmap():
    adapted = [
        trained(weights()),
        fa.tree.map_with_path(lambda p, x: -x if p.endswith(".b") else x, trained(weights())),
    ]
    frozen = fa.tree.partition(adapted[0], is_trained)[1]
    stacked = fa.tree.stack([fa.tree.partition(one, is_trained)[0] for one in adapted])
    together = vmap(lambda chosen: logits(fa.tree.combine(chosen, frozen)))(stacked)
    for one, found in zip(adapted, together, strict=True):
        torch.testing.assert_close(found, logits(one), rtol=1e-10, atol=1e-10)


# PEFT's layout.


def test_an_adaptation_comes_back_bit_for_bit(tmp_path):
    adapted = trained(weights(torch.float32), alpha=7.0)
    fa.save_lora(tmp_path / "adapter", adapted)
    fa.save_lora(tmp_path / "adapter", adapted)  # again: it is replaced
    assert fa.tree.allclose(
        fa.load_lora(tmp_path / "adapter", weights(torch.float32)), adapted, rtol=0, atol=0
    )
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "of_base", [torch.float32, torch.bfloat16, torch.float16, fa.int8, fa.int4]
)
def test_an_adaptation_of_another_dtype_than_its_base_is_added_in_the_wider(
    tmp_path, of_adapter, of_base
):
    plain = isinstance(of_base, torch.dtype)
    params = (
        weights(of_base)
        if plain
        else fa.quantize(of_base(group=4) if of_base is fa.int4 else of_base)(
            weights(torch.float32)
        )
    )
    exact = fa.cast(torch.float32)(params if plain else fa.dequantize(params))
    fa.save_lora(tmp_path / "adapter", trained(fa.cast(of_adapter)(exact)))
    loaded, whole = (fa.load_lora(tmp_path / "adapter", tree) for tree in (params, exact))
    dtype = of_base if plain else torch.float32
    x = fa.random.normal(fa.key(7), (5, CONFIG.width), dtype)
    matrix = merge_lora(fa.cast(torch.float64)(whole)).layers[0].q
    got, want = fa.layers.linear(loaded.layers[0].q, x), x.double() @ matrix.mT
    # of what is rounded: the base's product, a x, b a x and their sum, in dtype at worst
    sums = x.double().abs() @ matrix.abs().mT
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= 4 * torch.finfo(dtype).eps * (sums + want.abs())).all()
    assert logits(loaded).isfinite().all()
    if plain:
        assert {leaf.dtype for leaf in fa.tree.leaves(merge_lora(loaded))} == {of_base}


def test_names_and_settings_are_those_of_peft(tmp_path):
    adapted = trained(
        weights(torch.float32),
        where=lambda path, _: path.rpartition(".")[2] in ("q", "down"),
        alpha=16,
    )
    fa.save_lora(tmp_path, adapted, base="org/model")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = [
        f"layers.{i}.{m}.lora_{x}"
        for i in range(2)
        for m in ("self_attn.q_proj", "mlp.down_proj")
        for x in "AB"
    ]
    assert tensors.keys() == {f"base_model.model.model.{name}.weight" for name in names}
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (2, 12)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (
        2,
        16,
        ["down_proj", "q_proj"],
    )
    assert (settings["peft_type"], settings["task_type"], settings["bias"]) == (
        "LORA",
        "CAUSAL_LM",
        "none",
    )


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_what_we_write_and_we_what_it_writes(tmp_path):
    import peft
    import transformers

    params = weights(torch.float32)
    adapted = trained(params)
    fa.save(tmp_path / "model", CONFIG, params)
    fa.save_lora(tmp_path / "adapter", adapted, base=str(tmp_path / "model"))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ROWS).logits, logits(adapted), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert fa.tree.allclose(fa.load_lora(tmp_path / "theirs", params), adapted, rtol=0, atol=0)


def broken(change):
    def make(folder):
        fa.save_lora(folder, trained(weights(torch.float32)))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return make


def cut(folder):
    broken({})(folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "load_lora: the files of"),
        (cut, "load_lora: the files of"),
        (
            broken({"r": 3}),
            "should be lora_A (3, 12) and lora_B (8, 3), got lora_A (2, 12) and lora_B (8, 2)",
        ),
        (broken({"use_dora": True}), "lora_magnitude_vector (8,), got one is absent"),
        (broken({"bias": "some"}), "load_lora: the kind of"),
        (broken({"peft_type": "IA3"}), "load_lora: the kind of"),
        (broken({"alpha_pattern": {"q_proj": None}}), "load_lora: alpha_pattern of"),
    ],
    ids=["nothing", "cut", "rank", "dora", "bias", "kind", "pattern"],
)
def test_what_is_no_adaptation_of_these_params_is_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(CheckpointError) as error:
        fa.load_lora(tmp_path, weights(torch.float32))
    assert message in str(error.value)


BAD = [
    (lambda: lora(0), ValueError, "lora: rank should be 1 or more, got 0"),
    (lambda: lora(2, alpha=0.0), ValueError, "lora: alpha should be above 0"),
    (
        lambda: lora(9)(fa.key(0), weights()),
        ValueError,
        "lora: rank should be at most 8, a size of 'layers.0.q', got 9",
    ),
    (
        lambda: lora(2, lambda path, _: False)(fa.key(0), weights()),
        ValueError,
        "lora: where should be true of some weight, got none",
    ),
    (
        lambda: lora(2, lambda path, _: path == "norm")(fa.key(0), weights()),
        ValueError,
        "lora: where should be true of floating matrices",
    ),
    (lambda: fa.save_lora("x", weights()), ValueError, "save_lora: params should be adapted"),
    (
        lambda: fa.save_lora("x", trained(weights(), where=lambda p, _: p == "embedding")),
        ValueError,
        "in embedding",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
