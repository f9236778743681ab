"""Every known field of config.json, changed one by one, in every family: the logits of
transformers, or an error that names it.
"""

import contextlib
import json
import re
import warnings

import pytest
import torch
import transformers
from family_models import LATEST, settings
from samples import load

import funcattn as fa
from funcattn.checkpoints.families.tables import Fields
from funcattn.families import CheckpointError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LOCAL = {"sliding_window": 8}
FAMILIES = {
    "llama": {},
    "phi3": LOCAL,
    "gemma3_text": {"head_dim": 16, **LOCAL},
    "gpt_neox": {"hidden_size": 64},
    "qwen3_moe": {**EXPERTS, "head_dim": 12},
    "smollm3": {"num_hidden_layers": 4},
    "gpt_oss": {**EXPERTS, "head_dim": 16, **LOCAL},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": LOCAL,
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "granite": {"attention_multiplier": 0.3},
    "olmo2": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, **LOCAL},
    "cohere": {},
    "stablelm": {"hidden_size": 64},
    "starcoder2": {},
    "cohere2": LOCAL,
    "exaone4": {"num_hidden_layers": 4, **LOCAL},
    "glm4": {"head_dim": 8},
    "olmo3": {"num_hidden_layers": 4, **LOCAL},
    "ernie4_5": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "glm4_moe": {"n_routed_experts": 4, **EXPERTS, "head_dim": 8},
    "phi": {"hidden_size": 64},
    "ministral3": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "granitemoe": {**EXPERTS, "attention_multiplier": 0.3},
}
SLOW = list(FAMILIES)[2:]  # each takes some seconds
HALVES = {
    "gemma3_text": 8,
    "gpt_neox": 2,
    "qwen3_moe": 6,
    "gpt_oss": 8,
    "qwen3": 6,
    "gemma": 8,
    "gemma2": 8,
    "stablelm": 2,
}

ORIGINAL = {"original_max_position_embeddings": 16}
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 4.0, **ORIGINAL},
    "longrope": ORIGINAL,
}
NEW, OLD = ["rope_scaling", "rope_theta"], ["rope_parameters"]
MORE = [
    {"finetuned": True},
    {"attn_factor": 2.0},
    {"partial_rotary_factor": 0.5},
    {"attention_factor": 1.7},
    {"beta_fast": 0, "beta_slow": 2},
    {"mscale": 2.0, "mscale_all_dim": 0.5},
    {"mscale": 2.0},
    {"truncate": False},
    {"factor": 2},
    {"original_max_position_embeddings": 8},
    {"sharpness": 3},
]
KNOWN = {  # field -> values to try
    "hidden_act": ["silu", "gelu", "relu", "gelu_fast", "relu2"],
    "hidden_activation": ["silu", "gelu", "gelu_pytorch_tanh"],
    "activation_function": ["gelu", "relu"],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "use_bias": [True, False],
    "use_qkv_bias": [True],
    "qk_layernorm": [True],
    "use_qk_norm": [True],
    "use_parallel_residual": [True, False],
    "head_dim": [8, 16],
    "sliding_window": [4, None],
    "use_sliding_window": [True],
    "max_window_layers": [0, 1],
    "layer_types": [
        ["full_attention"] * 2,
        ["sliding_attention", "full_attention"],
        ["full_attention"] * 4,
    ],
    "sliding_window_pattern": [2],
    "_sliding_window_pattern": [2],
    "attn_logit_softcapping": [0.5, None],
    "final_logit_softcapping": [0.5, None],
    "query_pre_attn_scalar": [16],
    "attention_multiplier": [0.5],
    "embedding_multiplier": [3.0],
    "residual_multiplier": [0.5],
    "logits_scaling": [2.0],
    "logit_scale": [0.5],
    "tie_word_embeddings": [True, False],
    "rms_norm_eps": [1e-2],
    "layer_norm_eps": [1e-2],
    "norm_epsilon": [1e-2],
    "layer_norm_epsilon": [1e-2],
    "no_rope_layers": [[0, 1], [1, 0, 1, 0]],
    "no_rope_layer_interval": [2],
    "num_experts_per_tok": [1, 3],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [2],
    "mlp_only_layers": [[0]],
    "num_local_experts": [2],
    "num_experts": [2],
    "router_jitter_noise": [0.5],
    "swiglu_alpha": [1.0],
    "swiglu_limit": [1.0],
    "use_bidirectional_attention": [True],
    "is_causal": [False],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "rotary_pct": [0.5],
    "rotary_emb_base": [77],
    "rope_theta": [77.0],
    "partial_rotary_factor": [0.5, 1.0],
    "rope_local_base_freq": [33.0],
    "original_max_position_embeddings": [32],
    "scale_attn_weights": [False],
    "scale_attn_by_inverse_layer_idx": [True],
    "n_inner": [128],
    "hidden_size": [16],
    "num_hidden_layers": [1],
    "num_key_value_heads": [None, 4],
    "max_position_embeddings": [128],
    "num_labels": [3],
    "dtype": ["bfloat16"],
    "torch_dtype": ["torch.float16"],
    "pretraining_tp": [2],
    "attention_dropout": [0.3],
    "auto_map": [{"AutoConfig": "configuration.Own"}],
    "architectures": [None, ["LlamaModel"]],
    "quantization_config": [None],
    "interpolate_factor": [1],
    "attention_temperature": [2.0],
}
TOGETHER = [
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2},
    {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    {
        "use_sliding_window": False,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    {"no_rope_layers": [0, 1, 0, 1], "use_sliding_window": True, "sliding_window": 4},
    {"hidden_act": "gelu", "hidden_activation": None},
    {
        "rope_theta": 77.0,
        "rope_local_base_freq": 33.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    {
        "rope_theta": 77.0,
        "rope_local_base_freq": 33.0,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    },
    {
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", **KINDS["yarn"], "truncate": False},
            "sliding_attention": None,
        }
    },
    {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
]


def changes(family):
    """Pairs of fields that are set and fields that are taken out."""
    for name, values in KNOWN.items():
        yield {}, [name]
        for value in values:
            yield {name: value}, []
            if name in (
                "rope_theta",
                "partial_rotary_factor",
                "rope_local_base_freq",
                "rotary_emb_base",
            ):
                yield {name: value}, OLD
            if "window_pattern" in name:
                yield {name: value}, ["layer_types"]
    for fields in TOGETHER:
        yield (
            fields,
            []
            if "rope_parameters" in fields
            else [*OLD, *([] if "layer_types" in fields else ["layer_types"])],
        )
    half = HALVES.get(family, 4)
    factors = {
        "short_factor": [1.0 + i / 4 for i in range(half)],
        "long_factor": [1.0 + 1.5 * i for i in range(half)],
    }
    for kind, fields in KINDS.items():
        fields = {**fields, **(factors if kind == "longrope" else {})}
        spelled, older = {"rope_type": kind, **fields}, {"type": kind, **fields}
        yield {"rope_parameters": {**spelled, "rope_theta": 1e4}}, NEW
        yield {"rope_parameters": spelled, "rope_theta": 50.0}, []
        for scaling in (spelled, older, {**older, "rope_type": "default"}):
            yield {"rope_theta": 50.0, "rope_scaling": scaling}, OLD
        for beside in (32, None):
            yield (
                {
                    "rope_scaling": spelled,
                    **({"original_max_position_embeddings": beside} if beside else {}),
                },
                OLD,
            )
            bare = {name: value for name, value in spelled.items() if name not in ORIGINAL}
            yield (
                {
                    "rope_scaling": bare,
                    **({"original_max_position_embeddings": beside} if beside else {}),
                },
                OLD,
            )
        yield {"rope_scaling": spelled}, [*OLD, *ORIGINAL]
        for more in MORE:
            yield {"rope_theta": 1e4, "rope_scaling": {**spelled, **more}}, OLD


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Family -> a folder with a random model of it, and its config.json."""

    def make(family):
        torch.manual_seed(0)
        sizes = {
            name: value
            for name, value in SIZES.items()
            if family != "gpt2" or name in ("vocab_size", "pad_token_id")
        }
        config = transformers.AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
        model = transformers.AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            p.data.normal_(0, 0.3) if p.dim() > 1 else p.data.add_(0.1 * torch.randn_like(p))
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return folder, json.loads((folder / "config.json").read_text())

    return make


X = fa.random.randint(fa.key(1), (40,), 3, 96)


def theirs(folder):
    """Logits of transformers, or None where it does not read the file."""
    options = {"attn_implementation": "eager", "dtype": torch.float32, "trust_remote_code": False}
    try:
        with torch.no_grad():
            return (
                transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
                .eval()(X[None], use_cache=False)
                .logits[0]
            )
    except Exception:
        return None


def ours(folder):
    """Logits, or the message of the error."""
    try:
        config, params, _ = load(folder)
    except CheckpointError as error:
        return str(error)
    return fa.decoder(config).extend(params, X, ())[0].float()


@pytest.fixture
def quiet():
    """transformers tells of each odd field."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES]
)
def test_no_field_is_read_otherwise_than_transformers_reads_it(family, originals, quiet):
    folder, settings = originals(family)
    wrong, read = [], 0
    for fields, without in changes(family):
        changed = {
            name: value for name, value in {**settings, **fields}.items() if name not in without
        }
        (folder / "config.json").write_text(json.dumps(changed))
        got = ours(folder)
        if isinstance(got, str):
            continue
        want = theirs(folder)
        read += want is not None
        if want is not None and not torch.allclose(got, want, atol=1e-3, rtol=1e-3):
            wrong.append((fields, without))
    assert not wrong
    assert read > 100  # of some 250: the test looked at something


IGNORED = {
    "llama": [
        {"auto_map": {"AutoConfig": "configuration.Own"}},
        {
            "attention_multiplier": 0.5,
            "final_logit_softcapping": 30.0,
            "num_experts": 8,
            "no_rope_layers": [0, 1],
        },
        {
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 1e4,
                "attention_factor": 3.0,
                "beta_fast": 4,
            }
        },
        {
            "rope_parameters": {
                "type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "finetuned": True,
                "attn_factor": 1.0,
                **ORIGINAL,
            }
        },
        {
            "is_llama_config": True,
            "unsloth_version": "2026.1",
            "_name_or_path": "x",
            "rope_interleaved": False,
            "clip_qkv": None,
        },
    ],
    "mistral": [{"attention_bias": True, "layer_types": ["full_attention"] * 2}],
    "gemma3_text": [{"attn_logit_softcapping": 0.5, "hidden_act": "relu"}],
    "gpt_neox": [{"rope_theta": 77.0, "partial_rotary_factor": 0.75, "head_dim": None}],
    "phi3": [
        {
            "interpolate_factor": 1,
            "full_attn_mod": 1,
            "lm_head_bias": False,
            "layer_types": ["full_attention"] * 2,
        }
    ],
}


@pytest.mark.parametrize("family", IGNORED)
def test_what_transformers_ignores_is_ignored(family, originals, quiet):
    folder, settings = originals(family)
    for fields in IGNORED[family]:
        (folder / "config.json").write_text(json.dumps({**settings, **fields}))
        torch.testing.assert_close(
            ours(folder), theirs(folder), atol=1e-3, rtol=1e-3, msg=str(fields)
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_a_model_without_its_head_is_read_where_the_embedding_is_its_head(family, tmp_path):
    torch.manual_seed(0)
    own = {} if family == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(
        family, **{**own, **FAMILIES[family], "vocab_size": 96, "tie_word_embeddings": True}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.base_model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        type(model.base_model).__name__
    ]
    with torch.no_grad():
        want = model(X[None], use_cache=False).logits[0]
    torch.testing.assert_close(ours(tmp_path), want, atol=1e-3, rtol=1e-3)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    assert re.search(r"missing: (lm_head|embed_out)\.weight", ours(tmp_path))


def test_rotary_factors_of_another_head_size_are_refused_when_they_are_read(originals, quiet):
    folder, settings = originals("llama")
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 3,
        "long_factor": [2.0] * 3,
        "rope_theta": 1e4,
        **ORIGINAL,
    }
    (folder / "config.json").write_text(json.dumps({**settings, "rope_parameters": rope}))
    assert (
        "short_factor and long_factor should be 4 numbers, one for each plane that turns, got 3"
        in ours(folder)
    )


@pytest.mark.parametrize(
    "rope", [{"full_attention": 3}, {"full_attention": [1]}, 3, {"rope_type": 3}]
)
def test_rotary_parameters_of_another_kind_are_refused_by_name(rope, originals, quiet):
    folder, settings = originals("gemma3_text")
    (folder / "config.json").write_text(json.dumps({**settings, "rope_parameters": rope}))
    assert "rope_parameters" in ours(folder)


ODD = ([], [1], {}, {"a": 1}, "x", -1, 0, True, False, float("inf"), float("nan"), 3.5, 10**30)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "llama4")) for name in LATEST]
)
def test_a_field_of_another_kind_is_a_checkpoint_error_or_none(name):
    """Never an error of Python's own."""
    whole = {"model_type": LATEST[name][0], **settings(name)}
    fields = Fields(whole)
    fa.families.FAMILIES[whole["model_type"]].read(fields)
    for field in (*whole, *fields.seen):
        for value in ODD:
            with contextlib.suppress(CheckpointError):
                fa.families.read_config({**whole, field: value})
