"""Adapters of modules that hold several leaves, or their transpose, or other rows: the reference is
PEFT's formula on the matrices as the original stores them, unpacked afterwards.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcattn as fa
from funcattn import families
from funcattn.checkpoints import CheckpointError
from funcattn.families import FAMILIES

PREFIX = "base_model.model."
SIZES = {
    "vocab_size": 13,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}
TOKENS = fa.random.randint(fa.key(9), (2, 6), 0, 13)


def model(name):
    """Config, family, and the tensors of a file."""
    sizes = {**(GPT2 if name == "gpt2" else SIZES), "model_type": name}
    sizes |= {"rotary_pct": 1.0} if name == "gpt_neox" else {}
    config = families.read_config(sizes)
    params = fa.tree.map(lambda x: x.double() * 5 + 0.1, fa.decoder(config).init(fa.key(len(name))))
    family = FAMILIES[name]
    stored = families.pack(config, families.locate_tensors(family, config), families.leaves(params))
    return config, family, params, stored


def unpacked(config, family, stored):
    sources = families.locate_tensors(family, config)
    return families.unpack(config, sources, stored.__getitem__)


def logits(config, params):
    one = fa.decoder(config)
    return one.logits(params, one.hidden(params, TOKENS)[0])


def draw(number, *shape):
    return fa.random.normal(fa.key(number), shape, torch.float64)


def write(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    save_file(
        {PREFIX + name: x.contiguous() for name, x in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))


CASES = {
    "llama": (["q_proj", "down_proj"], False),
    "phi3": (["qkv_proj", "gate_up_proj", "o_proj"], False),
    "gpt2": (["c_attn", "c_proj", "c_fc"], True),
    "cohere": (["q_proj", "k_proj", "v_proj"], False),
    "gpt_neox": (["query_key_value", "dense"], False),
    "helium": (["q_proj", "k_proj"], False),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_a_joined_module_is_adapted_by_rows(name, dora, tmp_path):
    config, family, params, stored = model(name)
    targets, turned = CASES[name]
    tensors, merged = {}, dict(stored)
    ranks = {targets[0]: 3}
    for number, (key, matrix) in enumerate(sorted(stored.items())):
        module = key.removesuffix(".weight")
        last = module.rpartition(".")[2]
        if last not in targets or module == key:
            continue
        weight = matrix.mT if turned else matrix  # (out, in)
        r = ranks.get(last, 2)
        a, b = draw(number, r, weight.shape[1]), draw(number + 99, weight.shape[0], r)
        changed = weight + 3 / r**0.5 * b @ a
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        if dora:
            magnitude = draw(number + 500, len(b))
            tensors[f"{module}.lora_magnitude_vector"] = magnitude
            changed = changed * (magnitude / changed.square().sum(1).sqrt()).unsqueeze(1)
        merged[key] = changed.mT if turned else changed
    settings = {
        "target_modules": targets,
        "use_dora": dora,
        "use_rslora": True,
        "rank_pattern": ranks,
        "fan_in_fan_out": turned,
    }
    write(tmp_path / "adapter", tensors, **settings)
    found = fa.load_lora(tmp_path / "adapter", params, config=config, family=name)
    want = logits(config, unpacked(config, family, merged))
    # scales and gains are of float32
    torch.testing.assert_close(logits(config, found), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(config, fa.merge_lora(found)), want, rtol=1e-5, atol=1e-5)
    assert (want - logits(config, params)).abs().max() > 1e-2

    fa.save_lora(tmp_path / "ours", found, config=config, family=name)
    again = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert again.keys() == {PREFIX + key for key in tensors}
    for key, x in tensors.items():
        torch.testing.assert_close(again[PREFIX + key], x, rtol=1e-6, atol=1e-6)
    back = fa.load_lora(tmp_path / "ours", params, config=config, family=name)
    torch.testing.assert_close(logits(config, back), want, rtol=1e-5, atol=1e-5)


def test_adaptations_of_leaves_that_are_stored_together_are_written_in_blocks(tmp_path):
    config, _, params, _ = model("phi3")
    only = fa.lora(2, r"layers\.\d+\.([qv]|gate|up)")(fa.key(3), params)
    found = fa.tree.map_with_path(
        lambda path, x: draw(len(path), *x.shape) if path.endswith(".b") else x, only
    )
    fa.save_lora(tmp_path, found, config=config, family="phi3")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored[PREFIX + "model.layers.0.self_attn.qkv_proj.lora_A.weight"].shape == (4, 8)
    back = fa.load_lora(tmp_path, params, config=config)
    torch.testing.assert_close(logits(config, back), logits(config, found), rtol=1e-6, atol=1e-6)


def test_what_is_stored_beside_an_adaptation_replaces_the_base(tmp_path):
    config, _, params, stored = model("qwen2")
    module = "model.layers.1.self_attn.q_proj"
    a, b, bias, head = draw(1, 2, 8), draw(2, 8, 2), draw(3, 8), draw(4, 13, 8)
    tensors = {
        f"{module}.lora_A.weight": a,
        f"{module}.lora_B.weight": b,
        f"{module}.base_layer.bias": bias,
        "lm_head.weight": head,
        "model.embed_tokens.token_adapter.trainable_tokens_delta": draw(5, 2, 8),
    }
    settings = {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "bias": "lora_only",
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [3, 1],
    }
    write(tmp_path, tensors, **settings)
    found = fa.load_lora(tmp_path, params, config=config)
    changed = {
        **stored,
        f"{module}.weight": stored[f"{module}.weight"] + 1.5 * b @ a,
        f"{module}.bias": bias,
        "lm_head.weight": head,
    }
    rows = changed["model.embed_tokens.weight"].clone()
    rows[torch.tensor([3, 1])] = draw(5, 2, 8)
    changed["model.embed_tokens.weight"] = rows
    want = unpacked(config, FAMILIES["qwen2"], changed)
    torch.testing.assert_close(logits(config, found), logits(config, want), rtol=1e-6, atol=1e-6)
    plain = fa.load_lora(tmp_path, params)  # of a family whose names are Llama's
    assert torch.equal(logits(config, plain), logits(config, found))


def test_a_tied_head_stays_when_the_embedding_is_adapted(tmp_path):
    config = families.read_config({**SIZES, "model_type": "llama", "tie_word_embeddings": True})
    params = fa.tree.map(torch.Tensor.double, fa.decoder(config).init(fa.key(0)))
    a, b = draw(1, 2, 13), draw(2, 8, 2)
    module = "model.embed_tokens"
    write(
        tmp_path,
        {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b},
        target_modules=["embed_tokens"],
    )
    found = fa.load_lora(tmp_path, params)
    assert found.head is params.embedding
    want = params._replace(embedding=params.embedding + 1.5 * (b @ a).mT, head=params.embedding)
    torch.testing.assert_close(logits(config, found), logits(config, want), rtol=1e-9, atol=1e-9)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**settings, "ensure_weight_tying": True})
    )
    with pytest.raises(CheckpointError, match="load_lora: ensure_weight_tying of"):
        fa.load_lora(tmp_path, params)


def test_a_bias_of_b_is_added_to_that_of_the_base(tmp_path):
    config, _, params, _ = model("qwen2")
    module = "model.layers.0.self_attn.k_proj"
    more = draw(3, 4)
    tensors = {
        f"{module}.lora_A.weight": draw(1, 2, 8),
        f"{module}.lora_B.weight": draw(2, 4, 2),
        f"{module}.lora_B.bias": more,
    }
    settings = {"target_modules": [module], "lora_bias": True}
    write(tmp_path, tensors, **settings)
    found = fa.load_lora(tmp_path, params)
    torch.testing.assert_close(
        found.layers[0].k_bias, params.layers[0].k_bias + 1.5 * more, rtol=1e-12, atol=1e-12
    )
    no_bias = families.read_config({**SIZES, "model_type": "llama"})
    with pytest.raises(CheckpointError, match="a leaf with a bias"):
        fa.load_lora(tmp_path, fa.decoder(no_bias).init(fa.key(0)))


def test_factors_of_half_precision_are_those_of_float32(tmp_path):
    """PEFT casts them: the base's product and what is added meet in float32, rounded once."""
    config, _, params, _ = model("llama")
    base = fa.cast(torch.bfloat16)(params)
    adapted = fa.lora(2)(fa.key(1), base)
    fa.save_lora(tmp_path, adapted)
    found = fa.load_lora(tmp_path, base).layers[0].q
    assert (found.base.dtype, found.a.dtype, found.b.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    found = found._replace(b=fa.random.normal(fa.key(2), (8, 2)))
    x = fa.random.normal(fa.key(3), (3, 8)).bfloat16()
    want = (x @ found.base.mT).float() + x.float() @ found.a.mT @ found.b.mT * found.scale
    assert torch.equal(fa.layers.linear(found, x), want.bfloat16())


BAD = [
    (
        {"config": None, "family": "phi3"},
        ValueError,
        "load_lora: config should be that of the model",
    ),
    ({"config": 3}, TypeError, "load_lora: config should be a Config, got a int"),
    ({"family": "phi9"}, CheckpointError, "load: family of load_lora and save_lora"),
    ({"config": None}, ValueError, "load_lora: config should be that of the model, where params"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[text for *_, text in BAD])
def test_a_mistake_is_one_clear_error(changes, kind, message, tmp_path):
    config, _, params, _ = model("gpt2")
    fa.save_lora(tmp_path, fa.lora(2)(fa.key(0), params), config=config)
    with pytest.raises(kind) as error:
        fa.load_lora(tmp_path, params, **{"config": config, **changes})
    assert message in str(error.value)


def test_an_adapter_without_its_names_is_not_written(tmp_path):
    config, _, params, _ = model("llama")
    one = fa.lora(1, r"layers\.\d+\.q")
    with pytest.raises(ValueError, match="save_lora: params should be adapted once"):
        fa.save_lora(tmp_path, one(fa.key(0), one(fa.key(1), params)), config=config)
    some = one(fa.key(0), params)
    gain = some.layers[0].q._replace(gain=torch.ones(8))
    mixed = some._replace(layers=(some.layers[0]._replace(q=gain), *some.layers[1:]))
    with pytest.raises(ValueError, match="save_lora: params should be all with a gain, or none"):
        fa.save_lora(tmp_path, mixed, config=config)
