"""Checkpoints that other tools quantized: codes and scales as they are, matrices as the format means
them, logits of the dequantized model, and clear errors.
"""

import json
import warnings

import numpy as np
import pytest
import torch
from coded import CASES, Coded, gptq, mxfp4_linear, of_gptq, of_groups, pack_quantized
from safetensors.torch import load_file, save_file
from samples import CONFIG, params
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import funcattn as fa
from funcattn import sharding
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.hf.folder import read_folder
from funcattn.checkpoints.hf.quantized import Entry, Tensors, find, matrix
from funcattn.cli import main
from funcattn.quantization import (
    Codebook,
    Int4,
    Int8,
    Int8Affine,
    OrderedInt4,
    expand,
    is_quantized,
    packing,
)

LEAVES = {
    **{leaf: f"self_attn.{leaf}_proj" for leaf in "qkvo"},
    **{leaf: f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")},
}


def module(leaf, layer=0):
    return f"model.layers.{layer}.{LEAVES[leaf]}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The tensors and config.json of a small model in bfloat16."""
    folder = tmp_path_factory.mktemp("plain") / "m"
    fa.save(folder, CONFIG, fa.cast(torch.bfloat16)(params()))
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def kinds_of(tensors, settings):
    """The metadata of a matrix: of torchao its class."""
    if settings.get("quant_method") != "torchao":
        return {}
    codes = tensors.get("_weight_qdata", torch.zeros(1))
    zeros = "_weight_zero_point" in tensors
    integers = "IntxUnpackedToInt8Tensor" if zeros else "Int8Tensor"
    kinds = {torch.float8_e4m3fn: "Float8Tensor", torch.int8: integers}
    return {"weight": json.dumps({"_type": kinds.get(codes.dtype), "_data": {}})}


def write(folder, plain, coded, settings, names=module, **changes):
    """A folder whose matrices of the first layer are in codes."""
    tensors, config = dict(plain[0]), {**plain[1], **changes}
    metadata = {"format": "pt"}
    for leaf, made in coded.items():
        del tensors[f"{names(leaf)}.weight"]
        tensors |= {f"{names(leaf)}.{end}": x.contiguous() for end, x in made.tensors.items()}
        kinds = kinds_of(made.tensors, settings)
        metadata |= {f"{names(leaf)}.{name}": kind for name, kind in kinds.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    field = "quantization" if "quant_method" not in settings else "quantization_config"
    (folder / "config.json").write_text(json.dumps({**config, field: settings}))
    return folder


def made_of(case, leaves=LEAVES, seed=0):
    make, settings = CASES[case]
    rng, sizes = np.random.default_rng(seed), params().layers[0]
    return {leaf: make(rng, *getattr(sizes, leaf).shape) for leaf in leaves}, settings


def load(folder):
    """What is loaded, and what was warned of."""
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        loaded = fa.load(folder)
    assert all(warning.filename == __file__ for warning in met)  # at the call of load
    return loaded, " ".join(str(warning.message) for warning in met)


def codes_of(record):
    """The codes of a record as numbers (N, K)."""
    if record.codes.dtype == torch.uint8 and not isinstance(record, Int8Affine):
        return packing.unpack(record.codes, record.scale.shape[-1], 4).long()
    return record.codes.double()


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_those_of_the_file(tmp_path, plain, case):
    coded, settings = made_of(case)
    (config, found, _), told = load(write(tmp_path / "m", plain, coded, settings))
    assert config == CONFIG
    for leaf, made in coded.items():
        got, want = getattr(found.layers[0], leaf), torch.from_numpy(made.matrix)
        assert (made.codes is not None) == is_quantized(got), leaf
        if made.codes is None:
            assert torch.equal(got, want.float().bfloat16())
            assert f"{module(leaf)}.weight" in told or "more" in told
            continue
        # one rounding where the format has two
        assert torch.allclose(expand(got).double(), want, rtol=2**-23, atol=2**-26)
        assert torch.equal(codes_of(got).double(), torch.from_numpy(made.codes).double())
        if made.scale is not None:
            assert torch.equal(got.scale.double(), torch.from_numpy(made.scale).double())
    assert not is_quantized(found.layers[1].q)
    if all(made.codes is not None for made in coded.values()) and "int8" not in case:
        assert not told


FOUR_BITS = ["gptq", "gptq in act-order", "awq", "pack-quantized", "nvfp4", "mxfp4", "mlx", "hqq"]


@pytest.mark.parametrize("case", [*FOUR_BITS, "bitsandbytes nf4", "fp8", "int-quantized"])
def test_codes_of_4_bits_take_no_more_memory_than_in_the_file(case):
    """At most 1.3 times, the bar of a whole folder."""
    make, settings = CASES[case]
    made = make(np.random.default_rng(0), 64, 1024)
    names = {f"m.q_proj.{end}": x.contiguous() for end, x in made.tensors.items()}
    entries = {n: Entry(tuple(x.shape), TYPES[x.dtype], n, "f") for n, x in names.items()}
    (stored,) = find(settings, Tensors(entries, {}, names.__getitem__)).matrices.values()
    record = stored.read(names.__getitem__)
    assert sum(x.nbytes for x in record) <= 1.3 * sum(x.nbytes for x in names.values())


def test_scales_of_two_levels_are_those_of_one(tmp_path, plain):
    """nvfp4 stays in float8 with a divisor, and every number is that of float32 scales."""
    coded, settings = made_of("nvfp4")
    (_, found, _), _ = load(write(tmp_path / "m", plain, coded, settings))
    weight, file = found.layers[0].down, coded["down"].tensors
    assert weight.scale.dtype == torch.float8_e4m3fn
    wide = weight.at_one_level
    by = file["weight_scale"].float() / file["weight_global_scale"]
    assert isinstance(wide, Codebook)
    assert torch.equal(wide.scale, by)
    assert torch.equal(expand(weight), expand(wide))
    x = fa.random.normal(fa.key(0), (3, weight.shape[-1]))
    f = lambda weight: lambda x: fa.layers.linear(weight, x)
    assert torch.equal(f(weight)(x), f(wide)(x))
    assert torch.equal(torch.func.vmap(f(weight))(x), torch.func.vmap(f(wide))(x))
    grad = lambda weight: torch.func.grad(lambda x: f(weight)(x).square().sum())(x)
    assert torch.equal(grad(weight), grad(wide))
    each = [fa.layers.embed(one, torch.tensor([2, 0])) for one in (weight, wide)]
    assert torch.equal(*each)
    fa.save(tmp_path / "again", CONFIG, found)
    again = fa.load(tmp_path / "again").params.layers[0].down
    assert type(again) is type(weight)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, weight, strict=True))


def test_scales_of_two_levels_run_on_a_mesh(tmp_path, plain):
    coded, settings = made_of("nvfp4")
    (config, found, _), _ = load(write(tmp_path / "m", plain, coded, settings))
    model, mesh, params = fa.decoder(config), sharding.Grid(tensor=2), fa.cast(torch.float32)(found)
    specs = sharding.specs(params, mesh, sharding.tensor_parallel(config, size=2))
    f = lambda params, tokens: model.hidden(params, tokens)[0]
    tokens = torch.arange(12) % 7
    got = sharding.shard_map(f, mesh, (specs, sharding.P()), sharding.P())(params, tokens)
    want = f(params, tokens)
    # float32 through a layer of large weights
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    "case",
    [
        *FOUR_BITS,
        *("gptq 8 bits with zeros", "pack-quantized 8 bits", "int-quantized", "float-quantized"),
        *("float-quantized by blocks", "fp8", "fbgemm", "bitsandbytes nf4", "bitsandbytes int8"),
        *("torchao", "torchao float8"),
    ],
)
def test_logits_are_those_of_the_dequantized_model(tmp_path, plain, case):
    coded, settings = made_of(case)
    (config, found, _), _ = load(write(tmp_path / "m", plain, coded, settings))
    model, tokens = fa.decoder(config), torch.arange(12) % 7
    found = fa.tree.map(lambda x: x.float() if x.is_floating_point() and x.dim() < 2 else x, found)
    wide, floats = fa.cast(torch.float32)(found), fa.dequantize(found)
    floats = fa.cast(torch.float32)(floats)
    want, got = (model.logits(p, model.hidden(p, tokens)[0]) for p in (floats, wide))
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


def test_an_order_of_inputs_is_kept_and_multiplied(tmp_path, plain):
    coded, settings = made_of("gptq in act-order")
    (_, found, _), _ = load(write(tmp_path / "m", plain, coded, settings))
    weight = found.layers[0].down
    assert isinstance(weight, OrderedInt4)
    x, matrix = fa.random.normal(fa.key(0), (3, weight.shape[-1])), expand(weight)
    f = lambda x: fa.layers.linear(weight, x)
    # sums of 96 products in float32
    near = lambda got, want: torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))
    assert near(f(x), x @ matrix.mT)
    assert near(torch.func.vmap(f)(x), x @ matrix.mT)
    grad = torch.func.grad(lambda x: f(x).square().sum())(x)
    assert near(grad, 2 * (x @ matrix.mT) @ matrix)
    assert torch.equal(fa.layers.embed(weight, torch.tensor([2, 0])), expand(weight)[[2, 0]])
    fa.save(tmp_path / "again", CONFIG, found)
    again = fa.load(tmp_path / "again").params.layers[0].down
    assert all(torch.equal(a, b) for a, b in zip(again, weight, strict=True))


def test_an_order_of_inputs_is_not_cut(tmp_path, plain):
    coded, settings = made_of("gptq in act-order")
    (_, found, _), _ = load(write(tmp_path / "m", plain, coded, settings))
    mesh, rules = sharding.Grid(tensor=2), sharding.tensor_parallel(CONFIG)
    with pytest.raises(ValueError, match="act-order"):
        sharding.specs(found, mesh, rules)
    kept = sharding.specs(found, mesh, [(r".*\.o|.*\.down", sharding.P()), *rules])
    assert kept.layers[0].q.order == sharding.P(None)


def test_a_bias_of_zeros_that_a_tool_added_is_left_out(tmp_path, plain):
    coded, settings = made_of("gptq", "q")
    coded["q"].tensors["bias"] = torch.zeros(64, dtype=torch.float16)
    load(write(tmp_path / "m", plain, coded, settings))
    coded["q"].tensors["bias"][3] = 1
    with pytest.raises(CheckpointError, match=r"unknown: .*q_proj.bias"):
        load(write(tmp_path / "m", plain, coded, settings))


def test_patterns_and_names_choose_the_settings_of_a_module(tmp_path, plain):
    rng = np.random.default_rng(0)
    q, k = gptq(rng, 64, 64), gptq(rng, 32, 64, bits=8, symmetric=True, group=64)
    rules = {"-:.*o_proj": {}, r"+:.*\.k_proj": {"bits": 8, "group_size": 64}}
    folder = write(tmp_path / "a", plain, {"q": q, "k": k}, of_gptq(dynamic=rules))
    (_, found, _), _ = load(folder)
    assert isinstance(found.layers[0].k, Int8)
    assert isinstance(found.layers[0].q, Int4)
    q, k = pack_quantized(rng, 64, 64), pack_quantized(rng, 32, 64, bits=8, group=None)
    settings = of_groups("pack-quantized", num_bits=4, group_size=32, strategy="group")
    eight = {"targets": ["re:.*k_proj"], "weights": {"num_bits": 8, "strategy": "channel"}}
    settings["config_groups"]["group_1"] = eight
    (_, found, _), _ = load(write(tmp_path / "b", plain, {"q": q, "k": k}, settings))
    assert isinstance(found.layers[0].k, Int8)
    assert isinstance(found.layers[0].q, Int4)


def test_a_keyword_says_what_config_json_does_not(tmp_path, plain):
    coded, settings = made_of("gptq", "q")
    folder = write(tmp_path / "m", plain, coded, settings)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"those of gptq: .*fa.load\(folder, quantization="):
        fa.load(folder)
    assert isinstance(fa.load(folder, quantization=settings).params.layers[0].q, Int4)
    with pytest.raises(CheckpointError, match="quant_method"):
        fa.load(folder, quantization={"quant_method": "exl2"})
    with pytest.raises(TypeError, match="load: quantization should be None or a mapping"):
        fa.load(folder, quantization="gptq")


@pytest.mark.filterwarnings("ignore:.*dequantized")
def test_inspect_shows_what_is_in_codes(tmp_path, plain, capsys):
    coded, settings = made_of("gptq", "qk")
    main(["inspect", "--model", str(write(tmp_path / "m", plain, coded, settings))])
    assert "in codes: 2 matrices as Int4" in capsys.readouterr().out


def test_rounded_activations_are_said(tmp_path, plain):
    coded, settings = made_of("int-quantized")
    settings = json.loads(json.dumps(settings))
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    _, told = load(write(tmp_path / "m", plain, coded, settings))
    assert "activations are not rounded" in told


def test_sizes_that_a_file_claims_allocate_nothing(tmp_path, plain):
    """A block that is larger than the matrix is one block."""
    coded, settings = made_of("fp8 whole", "q")
    tensors = {**coded["q"].tensors, "weight_scale_inv": torch.ones(1, 1)}
    coded, settings = (
        {"q": Coded(tensors, None)},
        {**settings, "weight_block_size": [2**31 - 1, 2**31 - 1]},
    )
    (_, found, _), _ = load(write(tmp_path / "m", plain, coded, settings))
    assert torch.equal(expand(found.layers[0].q), tensors["weight"].float())


TYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint32: "U32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float64: "F64",
}
VALUES = (None, True, -1, 0, 10**30, 0.5, "x", [], ["x"], [1, 2], {}, {"x": 1}, [{}], "re:(")


def places(value, at=()):
    """The paths of all fields in a JSON value."""
    inner = value.items() if isinstance(value, dict) else []
    return [(*at, key) for key, _ in inner] + [
        path for key, one in inner for path in places(one, (*at, key))
    ]


@pytest.mark.parametrize(
    "case", ["gptq", "awq", "nvfp4", "pack-quantized", "float-quantized by blocks", "fp8", "mlx"]
)
def test_any_value_of_a_setting_is_read_or_refused(case):
    made, settings = made_of(case, "q")
    tensors = {f"m.q_proj.{end}": x.contiguous() for end, x in made["q"].tensors.items()}
    entries = {n: Entry(tuple(x.shape), TYPES[x.dtype], n, "f") for n, x in tensors.items()}
    refused = 0
    for path in places(settings):
        for value in VALUES:
            changed = json.loads(json.dumps(settings))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            try:
                found = find(changed, Tensors(entries, {}, tensors.__getitem__))
                for stored in found.matrices.values():
                    stored.read(lambda name: tensors[name].clone())
            except CheckpointError:
                refused += 1
    assert refused > len(VALUES)


# Fused and split by expert.

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
GPT_OSS = {
    **SIZES,
    "model_type": "gpt_oss",
    "intermediate_size": 32,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention"],
    "sliding_window": 4,
    "rope_scaling": None,
}


def test_rows_of_fused_matrices_stay_in_codes(tmp_path):
    settings = {
        **SIZES,
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "intermediate_size": 96,
        "original_max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "quantization_config": of_gptq(),
    }
    rng = np.random.default_rng(1)
    sizes = {"self_attn.qkv_proj": (128, 64), "self_attn.o_proj": (64, 64)}
    sizes |= {"mlp.gate_up_proj": (192, 64), "mlp.down_proj": (64, 96)}
    coded = {
        name: gptq(rng, *size, order=name.endswith("qkv_proj")) for name, size in sizes.items()
    }
    tensors = {
        f"model.layers.0.{name}.{end}": x
        for name, made in coded.items()
        for end, x in made.tensors.items()
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"] = torch.ones(64)
    tensors["model.norm.weight"] = torch.ones(64)
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = torch.randn(300, 64)
    tensors["lm_head.weight"] = torch.randn(300, 64)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "model.safetensors")
    (config, found, _), told = load(tmp_path)
    layer = found.layers[0]
    assert not told
    assert isinstance(layer.k, OrderedInt4)
    assert isinstance(layer.up, Int4)
    qkv = torch.cat([expand(leaf) for leaf in (layer.q, layer.k, layer.v)])
    assert torch.equal(qkv.double(), torch.from_numpy(coded["self_attn.qkv_proj"].matrix))
    gate_up = torch.cat([expand(layer.gate), expand(layer.up)])
    assert torch.equal(gate_up.double(), torch.from_numpy(coded["mlp.gate_up_proj"].matrix))
    assert config.heads == 4


def test_experts_of_gpt_oss_stay_in_codes(tmp_path):
    config = fa.families.read_config(GPT_OSS)
    fa.save(tmp_path / "m", config, fa.decoder(config).init(fa.key(0)))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    rng, want = np.random.default_rng(0), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        X, K, N = tensors.pop(name).shape
        each = [mxfp4_linear(rng, N, K) for _ in range(X)]
        blocks = torch.stack([one.tensors["weight_packed"] for one in each])
        tensors[f"{name}_blocks"] = blocks.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = torch.stack([one.tensors["weight_scale"] for one in each])
        want[name] = torch.from_numpy(np.stack([one.matrix for one in each]))
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    (_, found, _), told = load(tmp_path / "m")
    layer = found.layers[0]
    assert not told
    assert is_quantized(layer.gate)
    assert is_quantized(layer.down)
    gate_up = want["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(expand(layer.gate).double(), gate_up[:, ::2])
    assert torch.equal(expand(layer.up).double(), gate_up[:, 1::2])
    assert torch.equal(expand(layer.down).double(), want["model.layers.0.mlp.experts.down_proj"])
    for name, leaf in (("gate_up_proj", layer.up), ("down_proj", layer.down)):
        parts = [
            tensors[f"model.layers.0.mlp.experts.{name}_{end}"] for end in ("blocks", "scales")
        ]
        theirs = convert_moe_packed_tensors(*parts, dtype=torch.float32).mT  # of transformers
        assert torch.equal(expand(leaf), theirs[:, 1::2] if name == "gate_up_proj" else theirs)
    model, tokens = fa.decoder(config), torch.arange(6)
    got, plain = (
        model.logits(p, model.hidden(p, tokens)[0]) for p in (found, fa.dequantize(found))
    )
    assert torch.allclose(got, plain, atol=1e-5 * float(plain.abs().max()))


# Errors.


def spoiled(case, change, leaves="q"):
    coded, settings = made_of(case, leaves)
    settings = json.loads(json.dumps(settings))
    tensors = dict(coded["q"].tensors)
    change(tensors, settings)
    return {"q": Coded(tensors, None)}, settings


def drop(name):
    return lambda tensors, settings: tensors.pop(name)


def put(name, value):
    return lambda tensors, settings: settings.update({name: value})


def add(name, x):
    return lambda tensors, settings: tensors.update({name: x})


def cut(name, axis=0):
    def change(tensors, settings):
        tensors[name] = tensors[name].narrow(axis, 0, tensors[name].shape[axis] - 1)

    return change


def weights(**values):
    def change(tensors, settings):
        settings["config_groups"]["group_0"]["weights"].update(values)

    return change


def group(**values):
    return lambda tensors, settings: settings["config_groups"]["group_0"].update(values)


def filled(name, value):
    return lambda tensors, settings: tensors[name].fill_(value)


FAULTS = {
    "unknown method": ("gptq", put("quant_method", "aqlm"), "quant_method.*gptq, awq.*'aqlm'"),
    "no method": ("hqq", put("quant_method", None), "quant_method"),
    "bits": ("gptq", put("bits", 3), r"bits .*2 or 4 or 8, got 3"),
    "rotated": ("gptq", put("rotation", "hadamard"), "rotation .*absent"),
    "group": ("gptq", put("group_size", 48), "group_size .*divisor of the 64 columns"),
    "other group": ("gptq", put("group_size", 16), r"scales in .*of shape \(4, 64\)"),
    "group of nothing": ("gptq", put("group_size", 0), "group_size"),
    "layout": ("gptq", put("checkpoint_format", "marlin"), "checkpoint_format .*'marlin'"),
    "no scales": ("gptq", drop("scales"), r"scales should be there"),
    "no zeros": ("gptq", drop("qzeros"), r"qzeros should be there"),
    "cut off": ("gptq", cut("scales"), r"scales in model.safetensors .*\(2, 64\), got \(1, 64\)"),
    "cut columns": ("gptq", cut("qweight", 1), "qweight"),
    "order": ("gptq", filled("g_idx", 9), "g_idx"),
    "no order": ("gptq in act-order", drop("g_idx"), "g_idx should be there"),
    "pattern": ("gptq", put("dynamic", {"+:(": {}}), "dynamic"),
    "rules": ("gptq", put("dynamic", {"+:a": 2}), "dynamic"),
    "layout of awq": ("awq", put("version", "gemv"), "version .*'gemm', got 'gemv'"),
    "bits of awq": ("awq", put("bits", 8), "bits"),
    "rows of awq": ("awq", cut("qzeros"), "qzeros"),
    "format": ("pack-quantized", put("format", "marlin-24"), "format .*got 'marlin-24'"),
    "dense": ("pack-quantized", put("format", None), "format"),
    "groups": ("pack-quantized", put("config_groups", None), "config_groups"),
    "targets": ("pack-quantized", group(targets=["re:.*k_proj"]), "targets .*with model.*q_proj"),
    "names": ("pack-quantized", group(targets="Linear"), "targets"),
    "ignored": ("pack-quantized", put("ignore", [module("q")]), "ignore"),
    "6 bits": ("pack-quantized", weights(num_bits=6), "num_bits"),
    "other columns": ("pack-quantized", weights(group_size=16), "weight_scale"),
    "strategy": ("pack-quantized", weights(strategy="head"), "strategy"),
    "shape": ("pack-quantized", filled("weight_shape", 9), "weight_shape"),
    "zeros": ("pack-quantized", weights(symmetric=False), "weight_zero_point"),
    "float scale": ("float-quantized", drop("weight_scale"), "weight_scale"),
    "transform": ("pack-quantized", put("transform_config", {"a": {}}), "transform_config"),
    "block": ("fp8", put("weight_block_size", [32]), "weight_block_size"),
    "other block": ("fp8", put("weight_block_size", [16, 32]), r"weight_scale_inv .*\(4, 2\)"),
    "one scale": ("fp8", add("weight_scale_inv", torch.ones(1, 1)), r"weight_scale_inv .*\(2, 2\)"),
    "no scale": ("fp8", drop("weight_scale_inv"), "weight_scale_inv should be there"),
    "no state": (
        "bitsandbytes nf4",
        drop("weight.quant_state.bitsandbytes__nf4"),
        "quant_state",
    ),
    "state": (
        "bitsandbytes nf4",
        filled("weight.quant_state.bitsandbytes__nf4", 0),
        "quant_state.* JSON",
    ),
    "absmax": ("bitsandbytes nf4", cut("weight.absmax"), "absmax"),
    "nested": ("bitsandbytes nf4", drop("weight.nested_quant_map"), "nested_quant_map"),
    "bytes": ("bitsandbytes nf4", cut("weight"), "weight in"),
    "SCB": ("bitsandbytes int8", drop("SCB"), "SCB"),
    "tiles": ("bitsandbytes int8", filled("weight_format", 1), "weight_format"),
    "biases": ("mlx", drop("biases"), "biases"),
    "mode": ("mlx", put("mode", "nvfp4"), "mode"),
    "packing": ("hqq", filled("packing", 65), "packing"),
    "axis": ("hqq", filled("axis", 2), "W_q"),
    "as floats": ("hqq", filled("view_as_float", 1), "view_as_float"),
    "groups of hqq": ("hqq", filled("group_size", 16), "group_size .*32, as"),
    "bits of hqq": ("hqq", filled("nbits", 8), "nbits .*4, as"),
    "zeros of floats": (
        "torchao float8",
        add("_weight_zero_point", torch.ones(64, 1, dtype=torch.int8)),
        "zero_point",
    ),
    "codes": ("torchao", put("quant_method", "awq"), "awq"),
    "nothing": ("gptq", put("quant_method", "hqq"), "hqq"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_the_format_says_is_refused(tmp_path, plain, fault):
    case, change, words = FAULTS[fault]
    coded, settings = spoiled(case, change)
    with pytest.raises(CheckpointError, match=rf"(?s)load: .*{words}"):
        load(write(tmp_path / "m", plain, coded, settings))


ALLOWED = {  # other files that are as right
    ("pack-quantized in act-order", "no weight_g_idx"),  # written only where an order was used
    ("fp8 cut off", "groups of 32"),  # as many blocks as of 40
}


def damaged(tensors):
    """(what was done, the tensors of a matrix): each left out, of other sizes, of another type."""
    for name, x in tensors.items():
        longer = lambda x, axis: torch.cat([x, x.narrow(axis, 0, 1)], axis)
        each = {f"shorter {i}": x.narrow(i, 0, n - 1) for i, n in enumerate(x.shape)}
        each |= {
            f"longer {i}": longer(x.view(torch.uint8), i).view(x.dtype)
            for i in range(x.dim())
            if x.element_size() == 1
        }
        each |= {f"longer {i}": longer(x, i) for i in range(x.dim()) if x.element_size() > 1}
        each |= {"deeper": x[None], "flat": x.flatten(), "turned": x.T if x.dim() == 2 else x}
        each |= {"retyped": x.int() if x.is_floating_point() else x.float(), "wide": x.double()}
        yield f"no {name}", {key: y for key, y in tensors.items() if key != name}
        for change, y in each.items():
            yield f"{name} {change}", {**tensors, name: y.contiguous()}


def other_groups(settings):
    """The settings with other sizes of groups, right ones among them."""
    for size in (8, 16, 24, 32, 48, 64, 96, 0, -1, -3, 7, "32", 1.5, True, 10**6, [32]):
        changed = json.loads(json.dumps(settings))
        if "config_groups" in changed:
            weights = changed["config_groups"]["group_0"]["weights"]
            is_block = "block_structure" in weights
            weights |= {"block_structure": [size] * 2} if is_block else {"group_size": size}
        elif settings.get("quant_method") == "fp8":
            changed["weight_block_size"] = [size] * 2
        elif "group_size" in changed:
            changed["group_size"] = size
        yield f"groups of {size}", changed


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_or_of_other_sizes_is_refused_or_changes_nothing(tmp_path, plain, case):
    """Never another matrix: of each tensor of a matrix, and of the size of its groups.

    What its reader takes, as a file with fewer rows or with one tensor more, the load refuses.
    """
    coded, settings = made_of(case, ["down"])
    tensors = coded["down"].tensors
    metadata = kinds_of(tensors, settings)

    def read(tensors, settings):
        names = {f"m.down_proj.{end}": x for end, x in tensors.items()}
        entries = {n: Entry(tuple(x.shape), TYPES[x.dtype], n, "f") for n, x in names.items()}
        file = Tensors(entries, {f"m.down_proj.{k}": x for k, x in metadata.items()}, names.get)
        found = find(settings, file).matrices.values()
        return found, [matrix(stored.read(lambda name: names[name].clone())) for stored in found]

    (_, (want,)), refused, left = read(tensors, settings), 0, {}
    given = [(what, changed, settings) for what, changed in damaged(tensors)]
    given += [(what, tensors, changed) for what, changed in other_groups(settings)]
    for what, *changed in given:
        try:
            (stored,), (got,) = read(*changed)
        except CheckpointError:
            refused += 1
            continue
        parts = {f"m.down_proj.{end}" for end in changed[0]}
        if not torch.equal(got, want) or not parts <= {*stored.parts}:
            left[what] = changed
    assert refused >= 10
    for what, changed in left.items():
        if (case, what) not in ALLOWED:
            folder = write(tmp_path / "m", plain, {"down": Coded(changed[0], None)}, changed[1])
            with pytest.raises(CheckpointError):
                load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda blocks, scales: (blocks, None), "_scales should be there"),
        (lambda blocks, scales: (blocks, scales[..., :-1]), "_scales in .*shape"),
        (lambda blocks, scales: (blocks[:, :-1], scales), "_scales in .*shape"),
        (lambda blocks, scales: (blocks[..., :8], scales), r"_blocks in .*16\)"),
        (lambda blocks, scales: (blocks.flatten(-2), scales), "_blocks in"),
        (lambda blocks, scales: (blocks.int(), scales), "_blocks in .*of type U8, got I32"),
        (lambda blocks, scales: (blocks, scales.float()), "_scales in .*of type U8, got F32"),
        (lambda blocks, scales: (blocks, scales | 255), "_scales in .*NaN"),
        (lambda blocks, scales: (blocks[:2], scales[:2]), "of another shape"),
    ],
)
def test_damaged_experts_of_gpt_oss_are_refused(tmp_path, change, words):
    config = fa.families.read_config(GPT_OSS)
    fa.save(tmp_path / "m", config, fa.decoder(config).init(fa.key(0)))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    X, K, N = tensors.pop(name).shape
    scales = torch.full((X, N, K // 32), 120, dtype=torch.uint8)
    blocks, scales = change(torch.zeros(X, N, K // 32, 16, dtype=torch.uint8), scales)
    tensors |= {f"{name}_blocks": blocks.contiguous()}
    tensors |= {} if scales is None else {f"{name}_scales": scales.contiguous()}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"(?s)load: .*{words}"):
        fa.load(tmp_path / "m")


def test_a_matrix_twice_is_refused(tmp_path, plain):
    coded, settings = made_of("gptq", "q")
    coded["q"].tensors["weight"] = torch.zeros(64, 64)
    with pytest.raises(CheckpointError, match="each matrix once"):
        load(write(tmp_path / "m", plain, coded, settings))


def test_other_sizes_than_the_config_says_are_refused(tmp_path, plain):
    rng = np.random.default_rng(0)
    with pytest.raises(CheckpointError, match=r"of another shape: .*q_proj.weight"):
        load(write(tmp_path / "m", plain, {"q": gptq(rng, 32, 64)}, of_gptq()))


def test_parts_of_quantized_weights_are_refused(tmp_path, plain):
    coded, settings = made_of("gptq")
    folder = write(tmp_path / "m", plain, coded, settings)
    with pytest.raises(CheckpointError, match=r"load_sharded: .*fa.shard"):
        read_folder(folder, None, lambda config: lambda path, shape: ())
