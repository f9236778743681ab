"""Adapters of PEFT: what is another function than LoRA, or no adapter at all, is refused by name
before anything is computed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcattn as fa
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.hf import patterns
from funcattn.low_rank import is_adapted

MODEL = fa.decoder(fa.Config(layers=2))
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@dataclass
class Adapter:
    """An adapter on disk that loads; `load` changes its settings and tensors for one time."""

    folder: Path
    settings: dict
    tensors: dict
    params: fa.Params

    def load(self, text=None, tensors=None, without=(), **changes):
        values = {
            name: value
            for name, value in {**self.settings, **changes}.items()
            if name not in without
        }
        (self.folder / "adapter_config.json").write_text(text or json.dumps(values))
        save_file((tensors or dict)(self.tensors), self.folder / "adapter_model.safetensors")
        return fa.load_lora(self.folder, self.params)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder, params = tmp_path_factory.mktemp("adapter"), MODEL.init(fa.key(0))
    fa.save_lora(folder, fa.lora(4, alpha=8.0)(fa.key(1), params))
    settings = json.loads((folder / "adapter_config.json").read_text())
    made = Adapter(folder, settings, load_file(folder / "adapter_model.safetensors"), params)
    made.load()
    return made


# What PEFT writes by default, and what changes nothing.

DEFAULTS = {
    **dict.fromkeys(
        [
            "auto_mapping",
            "revision",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "megatron_config",
        ]
    ),
    **dict.fromkeys(
        [
            "modules_to_save",
            "trainable_token_indices",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "arrow_config",
        ]
    ),
    **dict.fromkeys(
        [
            "alora_invocation_tokens",
            "layer_replication",
            "target_parameters",
            "use_bdlora",
            "velora_config",
            "kasa_config",
        ]
    ),
    **dict.fromkeys(
        ["inference_mode", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"], False
    ),
    **{name: {} for name in ("rank_pattern", "alpha_pattern", "loftq_config")},
    "task_type": "CAUSAL_LM",
    "peft_version": "0.19.0",
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
}
HARMLESS = [
    DEFAULTS,
    *({"init_lora_weights": start} for start in (False, None, "gaussian", "eva", "orthogonal")),
    {"eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}, "lora_dropout": 0.5},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.layers\.\d+\.self_attn\.(q|k|v|o)_proj|.*mlp.*"},
    {
        "target_modules": [f"self_attn.{x}_proj" for x in "qkvo"]
        + ["gate_proj", "up_proj", "model.layers.0.mlp.down_proj", "down_proj"]
    },
    {"layers_to_transform": [0, 1], "exclude_modules": ["lm_head"]},
    {"a_field_of_next_year": None, "another": {}, "a_third": False, "a_fourth": []},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=lambda changes: next(iter(changes)))
def test_fields_that_leave_the_function_as_it_is_are_ignored(adapter, changes):
    assert fa.tree.allclose(adapter.load(**changes), adapter.load(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "pattern", ["q_proj", r".*\.q_proj", r"model\.layers\.0\..*", ".*[qk]_proj.", "(q_proj"]
)
def test_a_pattern_of_modules_is_matched_whole_as_peft_does(adapter, pattern):
    """None of these matches all modules that have tensors; PEFT would leave tensors out."""
    with pytest.raises(CheckpointError, match=r"load_lora: (target_modules|\S+lora_A\S*) of"):
        adapter.load(target_modules=pattern)


def test_a_pattern_that_matches_a_module_without_tensors_is_refused(adapter):
    without = lambda tensors: {
        name: x for name, x in tensors.items() if "layers.0.self_attn.q_proj" not in name
    }
    with pytest.raises(CheckpointError, match=r"none of .*layers\.0\.self_attn\.q_proj"):
        adapter.load(target_modules=".*proj", tensors=without)


def test_a_pattern_without_end_is_refused_in_time(adapter, monkeypatch):
    monkeypatch.setattr(patterns.full_matches, "__defaults__", (0.5,))
    with pytest.raises(CheckpointError, match=r"more than 0\.5 seconds"):
        adapter.load(target_modules=r"(\w+|\.|_|[a-z]+)+!")


def test_rank_stabilized_scales_are_computed(adapter):
    found = [
        leaf
        for leaf in fa.tree.leaves(adapter.load(use_rslora=True), is_leaf=is_adapted)
        if is_adapted(leaf)
    ]
    assert {float(leaf.scale) for leaf in found} == {4.0}  # 8 / sqrt(4)


# What makes another function, or none.

FUNCTIONS = {
    "init_lora_weights": [
        "pissa",
        "pissa_niter_4",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "mica",
        "one of next year",
        3,
        ["pissa"],
    ],
    "alora_invocation_tokens": [[5, 6]],
    "use_dora": ["false", 1],
    "lora_bias": ["true", 1],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": 2.0}, {"q_proj": True}, [8], {"(q_proj": 8}],
    "alpha_pattern": [{"q_proj": float("nan")}, {"q_proj": "8"}, ["q_proj"], {"(q_proj": 8}],
    "modules_to_save": [["lm_head"], "lm_head", [3]],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "layer_replication": [[[0, 1]]],
    "trainable_token_indices": [[1, 2], [-1], ["1"], {"embed_tokens": 3}],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"beta": 1e-4}],
    "velora_config": [{"num_groups": 2}],
    "monteclora_config": [{"num_samples": 8}],
    "megatron_config": [{"a": 1}],
    "a_field_of_next_year": [True, 1, "x", {"a": None}],
    "lora_alpha": [float("nan"), float("inf"), 1e300, 10**400, "16", True, None],
    "r": [4.9, 4.0, 0, -4, float("inf"), 10**400, "4", True, None],
    "use_rslora": ["no", 1],
    "target_modules": [3, [3], [""], {"q_proj": 1}],
    "exclude_modules": ["(a+)+", [3]],
    "layers_to_transform": ["0", [True], 0.5],
}


@pytest.mark.parametrize("field", FUNCTIONS)
def test_a_field_that_makes_another_function_is_refused_by_name(adapter, field):
    for value in FUNCTIONS[field]:
        with pytest.raises(CheckpointError, match=f"load_lora: {field} of"):
            adapter.load(**{field: value})


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_a_field_that_is_not_there_is_named(adapter, field):
    with pytest.raises(CheckpointError, match=f"load_lora: {field} of"):
        adapter.load(without=(field,))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["k_proj"]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 1},
        {"exclude_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_tensors_of_modules_that_the_config_leaves_out_are_refused(adapter, changes):
    with pytest.raises(CheckpointError, match="which PEFT leaves out"):
        adapter.load(**changes)


TENSORS = {
    "int32": lambda tensors: {name: x.to(torch.int32) for name, x in tensors.items()},
    "complex": lambda tensors: {name: x.to(torch.complex64) for name, x in tensors.items()},
    "bool": lambda tensors: {name: x.bool() for name, x in tensors.items()},
    "fp8": lambda tensors: {name: x.to(torch.float8_e4m3fn) for name, x in tensors.items()},
    "none": lambda tensors: {},
    "one half": lambda tensors: {name: x for name, x in tensors.items() if name != Q0.format("B")},
    "a module": lambda tensors: {
        name: x for name, x in tensors.items() if name not in (Q0.format("A"), Q0.format("B"))
    },
    "a vector": lambda tensors: {**tensors, Q0.format("A"): torch.zeros(4)},
    "turned": lambda tensors: {name: x.mT.contiguous() for name, x in tensors.items()},
    "no suffix": lambda tensors: {
        **tensors,
        Q0.format("A").removesuffix(".weight"): torch.zeros(4, 32),
    },
    "DoRA's": lambda tensors: {**tensors, Q0.format("magnitude_vector"): torch.ones(32)},
    "a bias": lambda tensors: {**tensors, Q0.format("B").replace("weight", "bias"): torch.ones(32)},
    "another layer": lambda tensors: {
        **tensors,
        Q0.format("A").replace(".0.", ".7."): torch.zeros(4, 32),
    },
    "an embedding": lambda tensors: {
        **tensors,
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 32),
    },
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_adaptation_are_refused(adapter, case):
    with pytest.raises(CheckpointError, match="load_lora: "):
        adapter.load(tensors=TENSORS[case])


NO_CONFIGS = ['{"r":' * 100_000, "[]", "\x00", '{"r": 4', '{"note": "' + "x" * 2**22 + '"}']


@pytest.mark.parametrize("text", NO_CONFIGS, ids=lambda text: text[:5])
def test_a_config_that_is_no_small_object_is_refused(adapter, text):
    with pytest.raises(CheckpointError, match=r"load_lora: adapter_config\.json should be"):
        adapter.load(text=text)


def test_a_pickled_adapter_is_refused_and_not_opened(adapter, tmp_path):
    adapter.load()
    (tmp_path / "adapter_config.json").write_bytes(
        (adapter.folder / "adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(CheckpointError, match="pickle"):
        fa.load_lora(tmp_path, adapter.params)


def test_an_adaptation_of_some_layers_comes_back(adapter, tmp_path):
    adapted = fa.lora(2, lambda path, _: path in ("layers.0.q", "layers.1.q", "layers.1.down"))(
        fa.key(3), adapter.params
    )
    fa.save_lora(tmp_path, adapted)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    # PEFT adapts these and no others
    assert settings["target_modules"] == ["model.layers.1.mlp.down_proj", "q_proj"]
    assert fa.tree.allclose(fa.load_lora(tmp_path, adapter.params), adapted, rtol=0, atol=0)
