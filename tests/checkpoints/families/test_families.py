"""Families: what a file says becomes Config and Params, or is refused by name."""

import dataclasses
import pathlib
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import CONFIG, LLAMA3, interleave, metadata, params, same
from transformers import LlamaConfig

from funcattn import layers, randomness
from funcattn.checkpoints.families.conventions import ACTIVATIONS
from funcattn.checkpoints.families.tables import NEUTRAL
from funcattn.families import (
    FAMILIES,
    LLAMA,
    CheckpointError,
    assemble,
    half_split,
    leaves,
    locate_tensors,
    match,
    pack,
    read_config,
    read_metadata,
    shapes,
    unpack,
    wanted,
    write_config,
)
from funcattn.families import interleave as rows_of_neighbours
from funcattn.layers import RopeScaling
from funcattn.transformer import Config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
MINIMAL = {"model_type": "llama", **SIZES}
SCALED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

scalings = st.one_of(
    st.none(),
    st.builds(RopeScaling, st.just("linear"), st.floats(1, 64)),
    st.builds(
        RopeScaling,
        st.just("llama3"),
        st.floats(1, 64),
        st.floats(0.5, 2),
        st.floats(3, 9),
        st.integers(1, 2**20),
    ),
    st.builds(
        RopeScaling,
        st.just("yarn"),
        st.floats(1, 64),
        context=st.integers(1, 2**20),
        fast=st.floats(8, 64),
        slow=st.floats(1, 4),
        truncate=st.booleans(),
        attention=st.floats(0.5, 2),
    ),
    st.builds(
        lambda factors, **rest: RopeScaling(
            "longrope", short=tuple(factors), long=tuple(2 * x for x in factors), **rest
        ),
        st.lists(st.floats(1, 64), min_size=1, max_size=8),
        context=st.integers(1, 2**20),
        attention=st.floats(0.5, 2),
    ),
)


def fitted(scaling, D):
    """The scaling with as many factors as planes."""
    if scaling is None or scaling.kind != "longrope":
        return scaling
    return dataclasses.replace(scaling, short=(scaling.short * D)[:D], long=(scaling.long * D)[:D])


configs = st.builds(
    lambda K, G, D, rope_scaling, **rest: Config(
        heads=K * G, kv_heads=K, head_size=2 * D, rope_scaling=fitted(rope_scaling, D), **rest
    ),
    K=st.integers(1, 8),
    G=st.integers(1, 8),
    D=st.integers(1, 64),
    vocabulary=st.integers(1, 2**20),
    width=st.integers(1, 2**14),
    layers=st.integers(1, 200),
    feed_forward=st.integers(1, 2**16),
    activation=st.sampled_from(sorted(set(ACTIVATIONS.values()))),
    norm_epsilon=st.floats(1e-9, 1e-2),
    rope_base=st.floats(1, 1e8),
    rope_scaling=scalings,
    context=st.integers(1, 2**20),
    tied=st.booleans(),
)


@given(configs)
def test_a_config_comes_back_from_its_json(config):
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), LLAMA3], ids=str)
def test_transformers_reads_what_is_written_and_back(scaling):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling, tied=False)
    theirs = LlamaConfig(**write_config(config))
    kind = scaling.kind if scaling else "default"
    assert (theirs.rope_parameters["rope_type"], theirs.rope_parameters["rope_theta"]) == (
        kind,
        CONFIG.rope_base,
    )
    assert theirs.head_dim == CONFIG.head_size
    assert read_config(theirs.to_dict()) == config


def test_what_config_json_leaves_out_is_the_default_of_transformers():
    assert read_config(MINIMAL) == read_config(
        {**LlamaConfig(**SIZES).to_dict(), "architectures": None}
    )


@pytest.mark.parametrize(
    ("old", "new", "scaling"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}, None),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0},
            ("linear", 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALED}},
            {"rope_type": "llama3", **SCALED},
            ("llama3", 8.0),
        ),
    ],
)
def test_both_spellings_of_rotary_fields_mean_the_same(old, new, scaling):
    config = read_config({**MINIMAL, **old})
    assert config == read_config({**MINIMAL, "rope_parameters": {**new, "rope_theta": 5e5}})
    assert config.rope_base == 5e5
    assert config.rope_scaling == (RopeScaling(*scaling) if scaling else None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "rwkv"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"mlp_bias": 1}, "mlp_bias"),
        ({"hidden_act": "xielu"}, "hidden_act"),
        ({"hidden_act": {"a": 1}}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta": 1.0}}, "beta"),
        ({"rope_parameters": {"rope_type": "yarn", "truncate": 1}}, "truncate"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0, 2.0],
                }
            },
            "long_factor",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": 1.0,
                    "long_factor": [1.0],
                }
            },
            "short_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        (
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"rope_type": "default", "sharpness": 3}}, "sharpness"),
        ({"attention_temperature": 2.0}, "attention_temperature"),
        ({"model_type": "starcoder2", "mlp_type": "gated"}, "mlp_type"),
        (
            {"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1, "hidden_size": 8},
            "hidden_size",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", **SCALED, "high_freq_factor": 1.0}},
            "high_freq_factor",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "rope_scaling",
        ),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]},
            "layer_types",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}},
            "full_attention",
        ),
        ({"model_type": "gpt_oss", "swiglu_alpha": 2.0}, "swiglu_alpha"),
        (
            {"model_type": "mixtral", "num_key_value_heads": 4, "num_experts_per_tok": 9},
            "experts_per_token",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ({"model_type": "phi3", "hidden_size": None}, "hidden_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"intermediate_size": 2**40}, "intermediate_size"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"head_dim": 7}, "head_size"),
    ],
    ids=str,
)
def test_what_config_cannot_express_is_refused_by_name(change, named):
    with pytest.raises(CheckpointError, match=re.escape(named)):
        read_config({**MINIMAL, **change})


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_a_neutral_field_is_ignored_only_where_it_is_neutral(field):
    for value in (None, *NEUTRAL[field]):
        assert read_config({**MINIMAL, field: value}) == read_config(MINIMAL)
    with pytest.raises(CheckpointError, match=field):
        read_config({**MINIMAL, field: "something else"})


def test_a_config_that_no_family_has_is_not_written():
    with pytest.raises(CheckpointError, match=r"one that a family among llama, .* has"):
        write_config(dataclasses.replace(CONFIG, logit_cap=3.0, sinks=True))


# GGUF metadata.


def plain(change=()):
    return {**metadata(), **dict(change)}


def test_metadata_gives_the_config_it_was_written_from():
    assert read_metadata(metadata(), CONFIG.vocabulary, True) == CONFIG
    assert read_metadata(metadata(), CONFIG.vocabulary, False).tied is False


def test_linear_scaling_is_read_from_metadata():
    config = read_metadata(
        plain({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}), 300, True
    )
    assert config.rope_scaling == RopeScaling("linear", 4.0)


def test_rotary_factors_are_read_as_the_scaling_they_follow_from():
    """The tensor as convert_hf_to_gguf.py computes it, from the wavelengths."""
    base, D = 500000.0, 64
    turn = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    factors = []
    for length in (2 * torch.pi / turn).tolist():
        smooth = (8192 / length - 1.0) / (4.0 - 1.0)
        factors.append(
            1.0
            if length < 8192 / 4
            else 8.0
            if length > 8192
            else 1 / ((1 - smooth) / 8.0 + smooth)
        )
    change = {
        "llama.rope.freq_base": base,
        "llama.rope.dimension_count": D,
        "llama.attention.key_length": D,
    }
    stretch = torch.tensor(factors)
    assert read_metadata(plain(change), 300, True, stretch).rope_scaling == LLAMA3
    with pytest.raises(CheckpointError, match="rope_freqs"):
        read_metadata(plain(change), 300, True, stretch + torch.eye(32)[9])
    with pytest.raises(CheckpointError, match="rope_freqs"):
        read_metadata(plain(), 300, True, stretch)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"general.architecture": "mamba"}, "general.architecture"),
        ({"llama.rope.scaling.type": "dynamic"}, "rope.scaling.type"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.factor"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_factors_short.weight"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.attention.value_length": 8}, "attention.value_length"),
        ({"llama.expert_count": 8}, "expert_used_count"),
        ({"llama.expert_shared_count": 1}, "expert_shared_count"),
        ({"llama.attention.scale": 0.5}, "attention.scale"),
        ({"llama.attention.head_count_kv": [2, 2]}, "attention.head_count_kv"),
        ({"llama.of_tomorrow": 1}, "llama.of_tomorrow"),
        ({"llama.block_count": None}, "block_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    ],
    ids=str,
)
def test_metadata_that_config_cannot_express_is_refused_by_name(change, named):
    values = {name: value for name, value in plain(change).items() if value is not None}
    with pytest.raises(CheckpointError, match=re.escape(named)):
        read_metadata(values, 300, True)


# Tensors.


@pytest.mark.parametrize("tied", [True, False])
def test_a_tree_is_assembled_from_its_leaves(tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    tree = params(config)
    assert same(assemble(config, leaves(tree).__getitem__), tree)
    assert {path: tuple(leaf.shape) for path, leaf in leaves(tree).items()} == shapes(config)


def test_every_difference_is_told_in_one_error():
    needed = wanted(CONFIG, locate_tensors(LLAMA, CONFIG))
    found = dict(needed)
    match(needed, found, "here")
    del found["model.norm.weight"]
    found["model.layers.1.mlp.up_proj.weight"] = (1, 2)
    found["model.layers.0.self_attn.q_proj.bias"] = (64,)
    with pytest.raises(CheckpointError) as error:
        match(needed, found, "here")
    assert "missing: model.norm.weight" in str(error.value)
    assert "unknown: model.layers.0.self_attn.q_proj.bias" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight (1, 2) instead of (96, 64)" in str(error.value)


PACKED = {  # a Config whose leaves the family holds in another form
    "phi3": dataclasses.replace(CONFIG, rotary_size=8),
    "gpt2": Config(
        4,
        8,
        2,
        2,
        2,
        4,
        16,
        positions="learned",
        norm="layer",
        norm_bias=True,
        gated=False,
        qkv_bias=True,
    ),
    "gpt_neox": Config(
        4, 8, 2, 2, 2, 4, 16, norm="layer", norm_bias=True, gated=False, qkv_bias=True, tied=False
    ),
    "cohere": Config(
        4,
        8,
        2,
        2,
        1,
        4,
        16,
        norm="layer",
        parallel=True,
        shared_norm=True,
        head_norm="layer",
        qkv_bias=True,
    ),
    "stablelm": Config(4, 8, 2, 2, 1, 4, 16, norm="layer", norm_bias=True, head_norm="layer"),
    "mixtral": Config(4, 8, 2, 2, 1, 4, 16, experts=3, experts_per_token=2, expert_size=16),
    "qwen3_moe": Config(
        4,
        8,
        2,
        2,
        1,
        4,
        6,
        experts=3,
        experts_per_token=2,
        expert_size=5,
        expert_layers=(True, False),
    ),
    "gpt_oss": Config(
        4, 8, 2, 2, 1, 4, 16, experts=3, experts_per_token=2, expert_size=16, feed_forward_bias=True
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_what_is_packed_is_unpacked_bit_for_bit(name):
    config = PACKED[name]
    tree, way = params(config), locate_tensors(FAMILIES[name], config)
    packed = pack(config, way, leaves(tree))
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == wanted(config, way)
    assert same(unpack(config, way, packed.__getitem__), tree)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 3))
def test_the_two_orders_of_rotary_rows_undo_each_other(heads, half, width):
    weight = torch.arange(heads * half * 2 * width).reshape(-1, width)
    assert torch.equal(rows_of_neighbours(half_split(weight, 2 * half), 2 * half), weight)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 3))
def test_half_split_undoes_the_order_of_gguf(heads, half, width):
    weight = torch.arange(heads * half * 2 * width).reshape(-1, width)
    assert torch.equal(
        half_split(torch.from_numpy(interleave(weight.cpu().numpy(), heads)), 2 * half),
        weight.cpu(),
    )


def test_scores_under_neighbouring_angles_are_those_of_half_split_rows():
    """What the permutation is for: q.k after rotating pairs (2i, 2i + 1) of GGUF's rows is ours
    with pairs (i, i + D / 2).
    """
    D, T, E = 16, 5, 64
    tree, x = params().layers[0], randomness.normal(randomness.key(1), (T, E), torch.float64)
    turn = layers.frequencies(D, base=CONFIG.rope_base).double()
    rotation = layers.rope(torch.arange(T), turn, torch.float64)

    def stored(weight, heads):
        return torch.from_numpy(interleave(weight.detach().double().cpu().numpy(), heads)).to(
            x.device
        )

    def neighbours(y):
        turned = torch.view_as_complex(y.reshape(*y.shape[:-1], D // 2, 2).contiguous())
        return torch.view_as_real(
            turned * torch.polar(torch.ones(()).double(), torch.arange(T)[:, None] * turn)
        ).flatten(-2)

    def score(q, k, rotate):
        return (
            rotate(q.unflatten(-1, (-1, D)).movedim(-2, 0))[:2]
            @ rotate(k.unflatten(-1, (-1, D)).movedim(-2, 0)).mT
        )

    q, k = stored(tree.q, CONFIG.heads), stored(tree.k, CONFIG.kv_heads)
    ours = score(
        x @ half_split(q, D).T, x @ half_split(k, D).T, lambda y: layers.rotate(y, rotation)
    )
    assert torch.allclose(ours, score(x @ q.T, x @ k.T, neighbours), atol=1e-12)
    assert not torch.allclose(
        ours, score(x @ q.T, x @ k.T, lambda y: layers.rotate(y, rotation)), atol=1e-3
    )


def test_longrope_beyond_a_context_of_one_says_its_factor():
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 1,
    }
    given = {**rope, "attention_factor": 1.5}
    assert (
        read_config(
            {**MINIMAL, "max_position_embeddings": 2, "rope_parameters": given}
        ).rope_scaling.attention
        == 1.5
    )
    with pytest.raises(
        CheckpointError, match=r"attention_factor of rope_parameters .* given where original_max"
    ):
        read_config({**MINIMAL, "max_position_embeddings": 2, "rope_parameters": rope})


def test_the_family_of_the_page_is_read_and_written(monkeypatch):
    page = (pathlib.Path(__file__).parents[3] / "docs" / "families.md").read_text()
    block = page.split("## Add one")[1].split("```python\n")[1].split("```")[0]
    names = {}
    with monkeypatch.context() as patched:
        patched.setitem(FAMILIES, "lantern", None)  # taken out again at the end
        exec(compile(block, "families.md", "exec"), names)
        said = {**MINIMAL, "model_type": "lantern", "damping": 2.0}
        config = read_config(said)
        assert config.residual_scale == 0.5
        assert read_config({"model_type": "lantern", **FAMILIES["lantern"].write(config)}) == config
    assert "lantern" not in FAMILIES
