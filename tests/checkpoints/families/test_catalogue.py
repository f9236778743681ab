"""Every family of the catalogue against the class that transformers has for it."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from funcattn.checkpoints.families.bart import BARTS
from funcattn.checkpoints.families.bert import BERTS
from funcattn.checkpoints.families.catalogue import ALIASES
from funcattn.checkpoints.families.tables import Fields
from funcattn.checkpoints.families.towers import WRAPPERS
from funcattn.families import FAMILIES, read_config

# The fields that a file must have, by their names.
NEEDED = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
NEEDED += ["intermediate_size", "n_embd", "n_layer", "n_head", "d_model", "num_layers"]
NEEDED += [
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "num_heads",
    "attention_heads",
    "ffn_dim",
    "n_heads",
    "n_layers",
]
# Without them a class has no default that makes a decoder of attention.
GIVEN = {
    "granitemoehybrid": {"layer_types": ["full_attention"] * 32, "mamba_n_heads": 128},
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "cohere2_moe": {"prefix_dense_intermediate_size": 64},
    **{family.name: {"is_decoder": True} for family in BERTS},
    "electra": {"is_decoder": True, "embedding_size": 256},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    **{family.name: {"is_encoder_decoder": False} for family in BARTS},
}


def settings(name):
    """All fields of the class, at its defaults."""
    config = CONFIG_MAPPING[name](**GIVEN.get(name, {}))
    return {**config.to_dict(), "architectures": None, "quantization_config": None}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_leaves_out_is_the_default_of_the_class(name):
    whole = settings(name)
    small = {key: whole[key] for key in NEEDED if whole.get(key) is not None}
    few = {"model_type": name, **GIVEN.get(name, {}), **small}
    assert read_config(few) == read_config(whole)


def test_a_name_without_a_class_is_that_of_another_family():
    whole = settings("deepseek_v3")
    assert read_config({**whole, "model_type": "kimi_k2"}) == read_config(whole)


# What a class reads and no logits depend on, or what config_json.py checks for every family.
ELSEWHERE = {
    *("pad_token_id", "use_cache", "output_attentions", "output_hidden_states", "num_labels"),
    *(
        "initializer_range",
        "embedding_initializer_range",
        "_attn_implementation",
        "get_text_config",
        "to_dict",
        "dtype",
    ),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "return_dict"),
    *("problem_type", "max_position_embeddings", "use_bidirectional_attention", "is_decoder"),
    *("add_cross_attention", "is_encoder_decoder", "reorder_and_upcast_attn"),
    *(
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "eos_token_id",
        "sep_token_id",
        "id2label",
    ),
    *("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "init_std"),
}
OTHERS = {
    "falcon": {"head_dim"},  # a property
    "gemma3_text": {"attn_logit_softcapping"},  # kept and not applied
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_that_a_class_reads_is_read(name):
    """By the names in its source: `config.name`, and getattr."""
    family, whole = FAMILIES[name], settings(name)
    fields = Fields(whole)
    family.read(fields)
    model = getattr(transformers, family.architecture, None)
    if model is None:
        pytest.skip("its class is no name of transformers")
    source = inspect.getsource(inspect.getmodule(model))
    names = re.findall(r"config\.([a-z_]\w*)", source)
    names += re.findall(r'getattr\((?:self\.)?config, "(\w+)"', source)
    alias = getattr(CONFIG_MAPPING[name], "attribute_map", {})
    asked = {alias.get(found, found) for found in names} & whole.keys()
    known = fields.seen | family.neutral.keys() | ELSEWHERE | OTHERS.get(name, set())
    left = {x for x in asked - known if "drop" not in x and not x.endswith(("pdrop", "layerdrop"))}
    of_mamba = {x for x in left if x.startswith(("mamba_", "summary_", "time_step"))}
    assert left - of_mamba == set()


PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def test_the_page_lists_the_tables_that_there_are():
    """Each family and each wrapper once, and as equal in the run exactly those of transformers."""
    text = PAGE.read_text()
    which, rest = text.split("## Which")[1].split("Rotary scalings:")
    rows = [line.split("|")[1] for line in which.splitlines() if line.startswith("| `")]
    of_images = which.split("Of models that take images too")[1]
    listed = [name for cell in (*rows[1:], of_images) for name in re.findall(r"`([^`]+)`", cell)]
    assert len(set(listed)) == len(listed)
    assert set(listed) == FAMILIES.keys() | WRAPPERS.keys() | ALIASES.keys()
    run = rest.split("<!-- by benchmarks/families.py -->")[1].split("<!-- end -->")[0]
    equal, refused = run.split("| refused for")
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert set(re.findall(r"`([^`]+)` \d", equal)) == names & (FAMILIES.keys() | WRAPPERS.keys())
    assert set(re.findall(r"`([^`]+)`", refused)) == names - FAMILIES.keys() - WRAPPERS.keys()
    assert "Wrong:" not in run


def test_the_table_of_the_page_is_that_of_the_catalogue(monkeypatch):
    """Where it is not: python benchmarks/families.py --table."""
    monkeypatch.syspath_prepend(str(PAGE.parents[1] / "benchmarks"))
    made = importlib.import_module("family_table")
    text = PAGE.read_text()
    assert made.with_table(text, made.equal_in(text)) == text
