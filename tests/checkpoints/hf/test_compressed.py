"""Quantized weights in files: back bit for bit, the blocks of GGUF as they are, refused by name
where they are damaged.
"""

import json
from dataclasses import replace
from typing import NamedTuple

import gguf
import pytest
import torch
from family_models import MODELS, settings
from safetensors.torch import load_file, save_file
from samples import CONFIG, load, params, tokenizer, write_gguf
from transformers import AutoModelForCausalLM

import funcattn as fa
from funcattn import families
from funcattn.checkpoints import save
from funcattn.checkpoints.surveying import survey
from funcattn.families import CheckpointError
from funcattn.quantization import Int4, Int8, expand, is_multiplied, is_quantized

SCHEMES = {
    "int8": fa.int8,
    "int4": fa.int4,
    "w8a8": fa.w8a8,
    "w8a8 by rows": fa.w8a8(group=None),
    "nf4": fa.nf4(group=32),
    "fp8": fa.fp8,
    "fp8 wide": fa.fp8(kind="e5m2"),
    "ternary": fa.ternary(group=32),
}


def same(a, b):
    """The same kinds, dtypes and bits at the same paths."""
    a, b = (
        dict(fa.tree.items(a, is_leaf=is_quantized)),
        dict(fa.tree.items(b, is_leaf=is_quantized)),
    )
    kinds = all(type(a[path]) is type(b[path]) for path in a)
    flat = [zip(fa.tree.leaves(a[path]), fa.tree.leaves(b[path]), strict=True) for path in a]
    return (
        a.keys() == b.keys()
        and kinds
        and all(x.dtype == y.dtype and equal(x, y) for pairs in flat for x, y in pairs)
    )


def equal(x, y):
    return torch.equal(
        x.cpu().contiguous().view(torch.uint8), y.cpu().contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_tree_comes_back_bit_for_bit(tmp_path, scheme, tied):
    config = replace(CONFIG, tied=tied)
    quantized = fa.quantize(scheme)(params(config))
    save(tmp_path / "a", config, quantized, tokenizer(), shard_size=20_000)
    found = load(tmp_path / "a")
    assert found.config == config
    assert same(found.params, quantized)
    assert same(
        load(tmp_path / "a", dtype=torch.bfloat16).params.layers[0].q, quantized.layers[0].q
    )


def test_names_and_config_say_what_it_is(tmp_path):
    save(tmp_path / "a", CONFIG, fa.quantize(fa.int8, r".*\.q")(params()))
    names = load_file(tmp_path / "a" / "model.safetensors").keys()
    assert "model.layers.0.self_attn.q_proj.codes" in names
    assert "model.layers.0.self_attn.q_proj.weight" not in names
    said = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert said["records"] == {
        f"model.layers.{i}.self_attn.q_proj.weight": "Int8" for i in range(2)
    }
    save(tmp_path / "b", CONFIG, params())
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


@pytest.mark.filterwarnings("ignore")
def test_transformers_refuses_it(tmp_path):
    save(tmp_path / "a", CONFIG, fa.quantize(fa.int8)(params()))
    with pytest.raises(ValueError, match="funcattn"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def small(name):
    """Config and params of a small model of a family."""
    config = families.read_config({"model_type": MODELS[name][0], **settings(name)})
    return config, fa.decoder(config).init(fa.key(0))


slow = lambda *names: [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name",
    ["deepseek_v2", "gpt2", "qwen3_next", *slow("deepseek_v3", "minicpm3", "gpt_oss")],
)
def test_leaves_that_a_family_stores_otherwise_come_back_bit_for_bit(tmp_path, name):
    # Joined by heads, with rows in another order, one tensor an expert, transposed.
    config, tree = small(name)
    sources = families.locate_tensors(families.family_for(config), config)
    apart = [one for one in sources if one.is_changed and is_multiplied(one.paths[0])]
    assert apart
    for scheme, where in ((fa.int8, None), (fa.int4(group=4), rf".*\.{apart[0].paths[-1][9:]}")):
        quantized = fa.quantize(scheme, where)(tree)
        save(tmp_path / "a", config, quantized)
        found = load(tmp_path / "a")
        assert found.config == config
        assert same(found.params, quantized)
        seen = survey(tmp_path / "a")
        assert (seen.why_not, seen.config) == ("", config)


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq"])
def test_rows_of_a_family_are_those_of_the_formats_of_others(tmp_path, method):
    config, tree = small("minicpm3")
    tree = fa.tree.map(lambda x: x.half(), tree)
    quantized = fa.quantize(fa.int8)(tree)
    save(tmp_path / "a", config, quantized, format=method)
    found, floats = load(tmp_path / "a").params, fa.dequantize(quantized)
    assert sum(map(is_quantized, families.leaves(found).values())) > 30
    save(tmp_path / "b", config, fa.tree.map(lambda x: x.float(), floats))
    want = load_file(tmp_path / "b" / "model.safetensors")
    got = load_file(tmp_path / "a" / "model.safetensors")
    module = "model.layers.1.self_attn.kv_b_proj"  # keys and values by heads, in one
    if method == "gptq":
        words, scale = got[f"{module}.qweight"].mT, got[f"{module}.scales"].mT
    else:
        words, scale = got[f"{module}.weight_packed"], got[f"{module}.weight_scale"]
    codes = words.contiguous().view(torch.uint8).float() - 128
    assert torch.equal(codes * scale.float(), want[f"{module}.weight"])
    for path, leaf in families.leaves(found).items():
        whole = families.leaves(floats)[path]
        made = expand(leaf) if is_quantized(leaf) else leaf  # float16 where it is of floats
        assert torch.equal(made, whole.to(leaf.dtype if leaf is made else whole.dtype)), path


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpt2", "more than rows"), ("qwen3_next", "joined with matrices of other records")],
)
def test_what_the_formats_of_others_cannot_hold_is_refused(tmp_path, name, said):
    config, tree = small(name)
    told = (
        rf"save: layers\.0\.\w+ should be records whose rows gptq has as .*, got .*{said}.*Without"
    )
    with pytest.raises(TypeError, match=told):
        save(tmp_path / "a", config, fa.quantize(fa.int8)(tree), format="gptq")


def test_a_record_of_another_scheme_is_refused_with_what_is_kept(tmp_path):
    class Mine(NamedTuple):
        codes: torch.Tensor

    mine = params()._replace(embedding=Mine(params().embedding))
    said = r"embedding should be a tensor, or a record among Int8, .*, got a Mine\. .*after"
    with pytest.raises(TypeError, match=said):
        save(tmp_path / "a", CONFIG, mine)


def edited(change):
    def make(folder):
        save(folder, CONFIG, fa.quantize(fa.int4)(params()))
        settings = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        change(settings, tensors)
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(tensors, folder / "model.safetensors")

    return make


Q = "model.layers.0.self_attn.q_proj"


def method(settings, tensors):
    settings["quantization_config"]["quant_method"] = "gptq"


def kind(settings, tensors):
    settings["quantization_config"]["records"][f"{Q}.weight"] = "Int3"


def other_kind(settings, tensors):
    settings["quantization_config"]["records"][f"{Q}.weight"] = "Codebook"


def records(settings, tensors):
    settings["quantization_config"]["records"] = 3


def missing(settings, tensors):
    del tensors[f"{Q}.scale"]


def forgotten(settings, tensors):
    del settings["quantization_config"]["records"][f"{Q}.weight"]


def shape(settings, tensors):
    tensors[f"{Q}.codes"] = tensors[f"{Q}.codes"][:, :7].contiguous()


def rows(settings, tensors):
    for field in ("codes", "scale", "zero"):
        tensors[f"{Q}.{field}"] = tensors[f"{Q}.{field}"][:7].contiguous()


def floating(settings, tensors):
    tensors[f"{Q}.codes"] = tensors[f"{Q}.codes"].float()


@pytest.mark.parametrize(
    "change", [method, kind, other_kind, records, missing, forgotten, shape, rows, floating]
)
def test_a_damaged_file_is_one_clear_error(change, tmp_path):
    edited(change)(tmp_path / "a")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "a")
    assert "load: " in str(error.value)


# GGUF.


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_become_records_without_losing_a_bit(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", kind=kind)
    found, dense = load(path, keep_quantized=True).params, load(path).params
    record = Int8 if kind == "Q8_0" else Int4
    for name, leaf in fa.tree.items(found, is_leaf=is_quantized):
        wanted = dict(fa.tree.items(dense))[name]
        assert isinstance(leaf, record) == (wanted.dim() == 2), name
        if isinstance(leaf, record):
            assert leaf.scale.dtype == torch.float16
            # code * d + m is rounded once, or twice
            torch.testing.assert_close(expand(leaf), wanted, rtol=3e-7, atol=1e-9)
            assert kind == "Q4_1" or torch.equal(expand(leaf), wanted)
        else:
            assert torch.equal(leaf, wanted)
    model = fa.decoder(CONFIG)
    of = lambda params: model.hidden(params, torch.arange(5))[0]
    assert (of(found) - of(dense)).norm() < 0.05 * of(dense).norm()  # bfloat16 inside int4


def test_the_bits_are_those_of_the_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", kind="Q4_1")
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    down = load(path, keep_quantized=True).params.layers[0].down
    blocks = torch.from_numpy(stored.data.copy()).reshape(64, -1, 20).to(down.codes.device)
    assert torch.equal(down.codes, blocks[..., 4:].flatten(1))
    assert torch.equal(down.scale, blocks[..., :2].contiguous().view(torch.float16)[..., 0])
    assert torch.equal(down.zero, blocks[..., 2:4].contiguous().view(torch.float16)[..., 0])


def test_kept_blocks_are_saved_and_come_back(tmp_path):
    found = load(write_gguf(tmp_path / "m.gguf", kind="Q4_1"), keep_quantized=True)
    save(tmp_path / "a", *found)
    assert same(load(tmp_path / "a").params, found.params)
