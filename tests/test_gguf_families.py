"""GGUF files of every family, against the originals and against transformers' own reader of such
files.

The files are written here as llama.cpp's convert_hf_to_gguf.py does it: names of tensors by the
table of the `gguf` package, 1 added to the norms of Gemma, q and k of Llama turned. None of that is
taken from the library.
"""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from samples import BYTES, KINDS, MERGES, TOKENS, load
from samples import interleave as turn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import funcattn as fa
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.surveying import survey

V, E, T = 300, 256, 40  # as many tokens as the sample tokenizer has; as wide as a K block
SMALL = {
    "vocab_size": V,
    "hidden_size": E,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 0,
}
LOCAL = {"sliding_window": 8}
WINDOW = {"attention.sliding_window": 8}
# what transformers takes Gemma's heads for
WIDE = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
KEYS = lambda D: {"attention.key_length": D, "attention.value_length": D}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
BASE = lambda theta: {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}

# name -> architecture in the file, model type and fields of the original, fields of the file
# besides the sizes
MODELS = {
    "llama": ("llama", "llama", {**BASE(5e5)}, {"rope.freq_base": 5e5, "rope.dimension_count": 64}),
    "llama-untied": (
        "llama",
        "llama",
        {"tie_word_embeddings": False},
        {"rope.dimension_count": 64},
    ),
    "qwen2": (
        "qwen2",
        "qwen2",
        {"tie_word_embeddings": True, **BASE(1e6)},
        {"rope.freq_base": 1e6},
    ),
    "qwen3": (
        "qwen3",
        "qwen3",
        {"head_dim": 128, "num_attention_heads": 4, **BASE(1e6)},
        {"rope.freq_base": 1e6, **KEYS(128)},
    ),
    "gemma": ("gemma", "gemma", {"head_dim": 32, "num_key_value_heads": 1}, KEYS(32)),
    "gemma2": ("gemma2", "gemma2", {**WIDE, **LOCAL, **CAPS}, {**KEYS(256), **WINDOW, **CAPS}),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {**WIDE, **LOCAL, "num_hidden_layers": 7},
        {**KEYS(256), **WINDOW, "rope.freq_base": 1e6},
    ),
    "gemma3-linear": (
        "gemma3",
        "gemma3_text",
        {
            **WIDE,
            **LOCAL,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            **KEYS(256),
            **WINDOW,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}
MODELS["gemma3-newer"] = (  # what later converters write besides
    "gemma3",
    "gemma3_text",
    {
        **WIDE,
        **LOCAL,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    {
        **KEYS(256),
        **WINDOW,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 500.0,
        "attention.sliding_window_pattern": 2,
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "rope.dimension_count_swa": 256,
    },
)
READ_BY_THEM = [
    name for name in MODELS if name not in ("gemma", "gemma3-linear", "gemma3-newer")
]  # they know no gemma, and drop rope.scaling

# Random blocks of the types that the gguf package reads and does not write: where in a block its
# halves are, and its size.
BLOCKS = {"Q4_K": ((0, 2), 144), "Q6_K": ((208,), 210)}
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *BLOCKS]


def original(name):
    """Their model, with nothing at its neutral value: norms not one, biases not zero."""
    _, kind, more, _ = MODELS[name]
    config = AutoConfig.for_model(kind, **{**SMALL, **more}, attn_implementation="eager")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def stored(weight, kind):
    """The bytes of a matrix in blocks of a kind, (rows, bytes)."""
    if kind not in BLOCKS:
        return quants.quantize(weight, GGMLQuantizationType[kind])
    halves, size = BLOCKS[kind]
    blocks = np.random.default_rng(weight.size).integers(
        0, 256, (weight.shape[0], weight.shape[1] // 256, size), np.uint8
    )
    # d, and dmin: products of them with scales up to 64 and quants up to 16 are weights below 0.2
    for at in halves:
        blocks[..., at : at + 2] = np.frombuffer(
            np.float16(2e-4 if kind == "Q4_K" else 2e-5).tobytes(), np.uint8
        )
    return blocks.reshape(weight.shape[0], -1)


def write(path, name, model, kind="F32", change=()):
    """The GGUF file of a model; the model's own matrices become what the blocks say."""
    architecture, _, _, fields = MODELS[name]
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        "context_length": 128,
        "embedding_length": E,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **fields,
        **dict(change),
    }
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
            type(value)
        ]
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for parameter_name, parameter in model.named_parameters():
        base, suffix = parameter_name.rsplit(".", 1)
        weight, quantized = parameter.detach().cpu().numpy(), GGMLQuantizationType.F32
        if weight.ndim == 2:
            quantized = GGMLQuantizationType[kind]
            weight = stored(weight, kind)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(quants.dequantize(weight, quantized).copy()))
        if architecture == "llama" and base.endswith(("q_proj", "k_proj")):
            weight = turn(
                weight,
                config.num_attention_heads
                if base.endswith("q_proj")
                else config.num_key_value_heads,
            )
        if architecture.startswith("gemma") and base.endswith("norm"):
            weight = weight + 1
        writer.add_tensor(
            f"{names.get_name(base)}.{suffix}", np.ascontiguousarray(weight), raw_dtype=quantized
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens():
    return fa.random.randint(fa.key(1), (T,), 0, V)


def theirs(model):
    with torch.no_grad():
        return model(tokens()[None], use_cache=False).logits[0].float()


def logits_here(loaded):
    model = fa.decoder(loaded.config)
    return model.logits(loaded.params, model.hidden(loaded.params, tokens())[0])


def agree(got, wanted):
    # float32, sums of 256 terms over logits of order ten
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_original(tmp_path, name):
    model = original(name)
    loaded = load(write(tmp_path / "a.gguf", name, model))
    agree(logits_here(loaded), theirs(model))
    assert loaded.config == fa.families.read_config(model.config.to_dict())


@pytest.mark.parametrize("name", READ_BY_THEM)
def test_logits_are_those_of_transformers_reading_the_same_file(tmp_path, name):
    path = write(tmp_path / "a.gguf", name, original(name), "Q8_0")
    # what from_pretrained(gguf_file=...) does, which also wants accelerate to be installed
    config = AutoConfig.for_model(
        **load_gguf_checkpoint(path)["config"], attn_implementation="eager"
    )
    read = AutoModelForCausalLM.from_config(config).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=read)["tensors"]
    missing, unexpected = read.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    read.tie_weights()
    agree(logits_here(load(path)), theirs(read))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_type_of_block_is_read(tmp_path, name, kind):
    model = original(name)
    # what is lost in the blocks is lost in the original too
    path = write(tmp_path / "a.gguf", name, model, kind)
    assert {entry.tensor_type.name for entry in gguf.GGUFReader(path).tensors} == {kind, "F32"}
    agree(logits_here(load(path)), theirs(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_gguf_is_saved_as_its_family_and_read_by_transformers(tmp_path, name):
    model = original(name)
    loaded = load(write(tmp_path / "a.gguf", name, model))
    fa.save(tmp_path / "folder", loaded.config, loaded.params)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", attn_implementation="eager"
    ).eval()
    agree(theirs(read), theirs(model))


@pytest.mark.parametrize(
    ("architecture", "layers", "heads", "width", "head_size", "wanted"),
    [
        ("gemma2", 26, 8, 2304, 256, 256),  # 2B
        ("gemma2", 42, 16, 3584, 256, 256),  # 9B
        ("gemma2", 46, 32, 4608, 128, 144),  # 27B
        ("gemma3", 26, 4, 1152, 256, 256),  # 1B
        ("gemma3", 62, 32, 5376, 128, 168),  # 27B
    ],
)
def test_the_largest_gemmas_have_their_own_scale(
    architecture, layers, heads, width, head_size, wanted
):
    """The numbers are query_pre_attn_scalar in the config.json of each model; the file does not say
    them.
    """
    fields = {
        "context_length": 8192,
        "embedding_length": width,
        "block_count": layers,
        "feed_forward_length": 4 * width,
        "attention.head_count": heads,
        "attention.head_count_kv": heads // 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 4096,
        **KEYS(head_size),
    }
    metadata = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in fields.items()},
    }
    config = fa.families.read_metadata(metadata, 256, True)
    assert config.scale == pytest.approx(wanted**-0.5, rel=1e-12)
    every = 2 if architecture == "gemma2" else 6
    assert [i + 1 for i, local in enumerate(config.window_layers) if not local] == list(
        range(every, layers + 1, every)
    )


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (
            "qwen2",
            {"rope.scaling.type": "dynamic", "rope.scaling.factor": 4.0},
            "qwen2.rope.scaling.type",
        ),
        ("qwen3", {"expert_count": 8}, "qwen3.expert_count"),
        ("gemma2", {"attention.sliding_window": 0}, "gemma2.attention.sliding_window"),
        ("gemma", {"final_logit_softcapping": 30.0}, "gemma.final_logit_softcapping"),
        ("gemma3", {"something.new": 1}, "gemma3.something.new"),
        ("qwen3", {"attention.value_length": 64}, "qwen3.attention.value_length"),
        ("gemma3", {"attention.key_length_swa": 64}, "gemma3.attention.key_length_swa"),
        (
            "gemma3",
            {"attention.sliding_window_pattern": 0},
            "gemma3.attention.sliding_window_pattern",
        ),
        ("qwen3", {"rope.freq_base_swa": 500.0}, "qwen3.rope.freq_base_swa"),
    ],
)
def test_a_field_that_would_change_the_mathematics_is_refused(tmp_path, name, change, named):
    with pytest.raises(CheckpointError, match=named):
        fa.load(write(tmp_path / "a.gguf", name, original(name), change=change))


# The other architectures: smaller models, and what converters do to the tensors of each.

E2, F2, H2, K2, D2 = 32, 64, 4, 2, 8
LITTLE = {
    "vocab_size": V,
    "hidden_size": E2,
    "intermediate_size": F2,
    "num_hidden_layers": 4,
    "num_attention_heads": H2,
    "num_key_value_heads": K2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LATER = {**YARN, "original_max_position_embeddings": 64}  # where rounding the ramp shows
YARN_FIELDS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
ROPE = lambda **rope: {"rope_parameters": {"rope_theta": 1e4, **rope}}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERT_FIELDS = {"expert_count": 4, "expert_used_count": 2}
KINDS_OF_LAYER = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
PATTERN = [True, True, True, False]
SCALES = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
SCALE_FIELDS = {
    "embedding_scale": 3.0,
    "logit_scale": 2.0,
    "residual_scale": 0.5,
    "attention.scale": 0.2,
}
GPT2 = {"vocab_size": V, "n_embd": E2, "n_layer": 3, "n_head": H2, "n_positions": 64}

# name -> architecture in the file, model type and fields of the original, fields of the file
LATENT = {
    "num_key_value_heads": H2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
LATENT_FIELDS = {
    "attention.kv_lora_rank": 32,
    "rope.dimension_count": 4,
    "leading_dense_block_count": 1,
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_feed_forward_length": 16,
    "expert_shared_count": 2,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
    "expert_weights_scale": 1.5,
}
OTHERS = {
    "deepseek2": (
        "deepseek2",
        "deepseek_v3",
        {**LATENT, "q_lora_rank": 32, **ROPE(**YARN, mscale=0.7, mscale_all_dim=0.7)},
        {
            **LATENT_FIELDS,
            **YARN_FIELDS,
            "rope.scaling.yarn_log_multiplier": 0.1 * 0.7,
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": 32,
            "attention.key_length": 36,
            "attention.value_length": 32,
            "attention.key_length_mla": 12,
            "attention.value_length_mla": 8,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
        },
    ),
    "deepseek2-older": (
        "deepseek2",
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
        {
            **LATENT_FIELDS,
            "attention.head_count_kv": H2,
            "attention.key_length": 12,
            "attention.value_length": 8,
        },
    ),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-yarn": ("llama", "llama", ROPE(**YARN), YARN_FIELDS),
    "mixtral": (
        "llama",
        "mixtral",
        {**EXPERTS, "sliding_window": None, **ROPE(rope_type="default")},
        EXPERT_FIELDS,
    ),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 12,
            "norm_topk_prob": True,
            **ROPE(rope_type="default"),
        },
        {**EXPERT_FIELDS, "expert_feed_forward_length": 24, **KEYS(12)},
    ),
    "qwen3moe-softmax-of-all": (
        "qwen3moe",
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 12,
            "norm_topk_prob": False,
            **ROPE(rope_type="default"),
        },
        {
            **EXPERT_FIELDS,
            "expert_feed_forward_length": 24,
            "expert_weights_norm": False,
            **KEYS(12),
        },
    ),
    "qwen2moe": (
        "qwen2moe",
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            **ROPE(rope_type="default"),
        },
        {
            **EXPERT_FIELDS,
            "expert_feed_forward_length": 24,
            "expert_shared_feed_forward_length": 40,
        },
    ),
    "glm4": (
        "glm4",
        "glm4",
        {"head_dim": 12, "attention_bias": True, **ROPE(rope_type="default")},
        {**KEYS(12), "rope.dimension_count": 6},
    ),
    "gpt-oss": (
        "gpt-oss",
        "gpt_oss",
        {**EXPERTS, "head_dim": 16, **LOCAL, **ROPE(**LATER, truncate=False)},
        {
            **EXPERT_FIELDS,
            "expert_feed_forward_length": F2,
            **KEYS(16),
            **WINDOW,
            **YARN_FIELDS,
            "rope.scaling.original_context_length": 64,
            "rope.freq_base": 1e4,
        },
    ),
    "granite": ("granite", "granite", SCALES, SCALE_FIELDS),
    "granitemoe": (
        "granitemoe",
        "granitemoe",
        {**SCALES, **EXPERTS},
        {**SCALE_FIELDS, **EXPERT_FIELDS},
    ),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "olmo3": (
        "olmo2",
        "olmo3",
        {
            **LOCAL,
            **KINDS_OF_LAYER,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e4, **YARN},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
        {**WINDOW, "attention.sliding_window_pattern": PATTERN, **YARN_FIELDS},
    ),
    "olmoe": (
        "olmoe",
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2},
        EXPERT_FIELDS,
    ),
    "seed_oss": ("seed_oss", "seed_oss", {"head_dim": 12, "attention_bias": True}, KEYS(12)),
    "smollm3": ("smollm3", "smollm3", {**ROPE(rope_type="default")}, {"rope.freq_base": 1e4}),
    "phi3": (
        "phi3",
        "phi3",
        {"sliding_window": 8, **ROPE(rope_type="default", partial_rotary_factor=0.5)},
        {**WINDOW, "rope.dimension_count": 4, "rope.scaling.original_context_length": 4096},
    ),
    "phi3-longrope": (
        "phi3",
        "phi3",
        {**ROPE(**LONG), "original_max_position_embeddings": 16},
        {
            "attention.sliding_window": 0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": (1 + np.log(4) / np.log(16)) ** 0.5,
        },
    ),
    "command-r": (
        "command-r",
        "cohere",
        {"logit_scale": 0.25},
        {"logit_scale": 0.25, "rope.scaling.type": "none"},
    ),
    "command-r-plus": (
        "command-r",
        "cohere",
        {"logit_scale": 0.25, "use_qk_norm": True, **ROPE(rope_type="default")},
        {"logit_scale": 0.25, "rope.freq_base": 1e4},
    ),
    "cohere2": (
        "cohere2",
        "cohere2",
        {"logit_scale": 0.25, **LOCAL, **KINDS_OF_LAYER},
        {"logit_scale": 0.25, **WINDOW},
    ),
    "stablelm": (
        "stablelm",
        "stablelm",
        ROPE(rope_type="default", partial_rotary_factor=0.25),
        {"rope.dimension_count": 2, "use_parallel_residual": True},
    ),
    "stablelm-2-12b": (
        "stablelm",
        "stablelm",
        {
            "use_parallel_residual": True,
            "use_qkv_bias": True,
            "qk_layernorm": True,
            **ROPE(rope_type="default", partial_rotary_factor=0.5),
        },
        {"rope.dimension_count": 4, "use_parallel_residual": True},
    ),
    "starcoder2": ("starcoder2", "starcoder2", {}, {}),
    "gpt2": ("gpt2", "gpt2", GPT2, {}),
    "gptneox": (
        "gptneox",
        "gpt_neox",
        {"num_key_value_heads": None, "rotary_pct": 0.25},
        {"rope.dimension_count": 2, "use_parallel_residual": True},
    ),
    "gptneox-serial": (
        "gptneox",
        "gpt_neox",
        {"num_key_value_heads": None, "rotary_pct": 0.5, "use_parallel_residual": False},
        {"rope.dimension_count": 4, "use_parallel_residual": False},
    ),
}
# Gemma 3n and 4: the converter says of each layer what differs, and 3n's low rank is always 64.
SIX = {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6}
SIX |= {"head_dim": D2, "num_key_value_heads": K2, **LOCAL, "num_kv_shared_layers": 2}
SIX |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": V}
SIX_FIELDS = {**WINDOW, "attention.sliding_window_pattern": [True, False] * 3}
SIX_FIELDS |= {"rope.freq_base": 1e6, "rope.freq_base_swa": 500.0}
SIX_FIELDS |= {"embedding_length_per_layer_input": 4, "attention.shared_kv_layers": 2}
BASES = lambda **full: {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6, **full},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
}
FAR = BASES(rope_type="proportional", partial_rotary_factor=0.25)
FAR |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
FAR_FIELDS = {**KEYS(16), "rope.dimension_count": 16, "rope.dimension_count_swa": D2}
FAR_FIELDS |= {"attention.key_length_swa": D2, "attention.value_length_swa": D2}
OTHERS |= {
    "gemma3n": (
        "gemma3n",
        "gemma3n_text",
        {
            **SIX,
            **BASES(),
            "laurel_rank": 64,
            "altup_active_idx": 1,
            "intermediate_size": [F2, F2, 48, 48, F2, F2],
            "activation_sparsity_pattern": [0.95, 0.8, 0.0, 0.0, 0.0, 0.0],
            "final_logit_softcapping": 2.0,
        },
        {
            **SIX_FIELDS,
            **KEYS(D2),
            "feed_forward_length": [F2, F2, 48, 48, F2, F2],
            # norm.ppf(0.95) and norm.ppf(0.8) of scipy, rounded to float32
            "activation_sparsity_scale": [1.6448536, 0.84162122, *[-np.inf] * 4],
            "altup.num_inputs": 4,
            "altup.active_idx": 1,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma4": (
        "gemma4",
        "gemma4_text",
        {**SIX, **FAR, "use_double_wide_mlp": True},
        {**SIX_FIELDS, **FAR_FIELDS, "feed_forward_length": [*[F2] * 4, *[2 * F2] * 2]},
    ),
    "gemma4-experts": (
        "gemma4",
        "gemma4_text",
        {
            **SIX,
            **FAR,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "final_logit_softcapping": 2.0,
        },
        {
            **SIX_FIELDS,
            **FAR_FIELDS,
            **EXPERT_FIELDS,
            "attention.shared_kv_layers": 0,
            "attention.head_count_kv": [K2, 1] * 3,
            "embedding_length_per_layer_input": 0,
            "expert_feed_forward_length": 24,
            "final_logit_softcapping": 2.0,
        },
    ),
}
PER_LAYER = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
OTHERS["gemma4-unified"] = (
    "gemma4",
    "gemma4_unified_text",
    {key: value for key, value in {**SIX, **FAR}.items() if key not in PER_LAYER},
    {**SIX_FIELDS, **FAR_FIELDS, "embedding_length_per_layer_input": 0},
)
TURNED = ("llama", "granite", "granitemoe", "smollm3")  # the classes after LlamaModel


def little(name):
    _, kind, more, _ = OTHERS[name]
    own = {} if kind == "gpt2" else LITTLE
    given = lambda key, value: value is not None or key == "q_lora_rank"
    fields = {key: value for key, value in {**own, **more}.items() if given(key, value)}
    config = AutoConfig.for_model(kind, **fields, attn_implementation="eager")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in (*model.parameters(), *(x for _, x in buffers(model))):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def as_converted(architecture, config, name, weight):
    """Name in the original, tensor -> those that a converter looks up in the table of names."""
    if architecture == "granitemoe":  # which has names of its own for what Mixtral has too
        name = name.replace("router.weight", "router.layer.weight")
        name = name.replace("block_sparse_moe.experts", "mlp.experts")
    if architecture in TURNED and "q_proj" in name:
        return [(name, turn(weight, H2))]
    if architecture in TURNED and "k_proj" in name:
        return [(name, turn(weight, K2))]
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return [(name, weight.T)]
    if name.endswith("kv_b_proj.weight") and config.model_type == "deepseek_v3":
        heads, block = weight.reshape(H2, 8 + 8, 32), name.split(".")[2]
        parts = {"k": heads[:, :8].swapaxes(1, 2), "v": heads[:, 8:]}
        return [(f"blk.{block}.attn_{side}_b.weight", part) for side, part in parts.items()]
    if "query_key_value" in name:  # head by head -> all of q, all of k, all of v
        heads = weight.reshape(H2, 3, D2, *weight.shape[1:])
        return [
            (name, np.concatenate([heads[:, i].reshape(E2, *weight.shape[1:]) for i in range(3)]))
        ]
    if architecture == "gpt-oss" and "gate_up_proj" in name:
        parts = [weight[..., i::2] for i in range(2)]
        kind = "bias" if name.endswith("_bias") else "weight"
        parts = parts if kind == "bias" else [part.swapaxes(1, 2) for part in parts]
        stem = name.partition("gate_up_proj")[0]
        return [
            (f"{stem}{leaf}_proj.{kind}", part)
            for leaf, part in zip(("gate", "up"), parts, strict=True)
        ]
    if architecture == "gpt-oss" and "experts.down_proj" in name:
        kind = "bias" if name.endswith("_bias") else "weight"
        stem = name.partition("down_proj")[0]
        return [(f"{stem}down_proj.{kind}", weight if kind == "bias" else weight.swapaxes(1, 2))]
    if architecture in ("gemma3n", "gemma4"):
        return as_gemma(config, name, weight)
    if name.endswith("experts.gate_up_proj"):
        parts = np.split(weight, 2, 1)
        stem = name.removesuffix("gate_up_proj")
        return [
            (f"{stem}{leaf}_proj.weight", part)
            for leaf, part in zip(("gate", "up"), parts, strict=True)
        ]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", weight)]
    if name.endswith("shared_expert_gate.weight"):
        return [(name, weight.squeeze(0))]
    if name.endswith("self_attn.sinks"):
        return [(f"{name}.weight", weight)]
    return [(name, weight)]


def as_gemma(config, name, weight):
    """Gemma3NModel and Gemma4Model of conversion/gemma.py: no tensor is changed; those of experts
    and scales have no suffix of their own in the original.
    """
    block = name.split(".")[2]
    if name.endswith("router.scale"):
        return [(f"blk.{block}.ffn_gate_inp.scale", weight)]
    if name.endswith("router.per_expert_scale"):
        return [(f"blk.{block}.ffn_down_exps.scale", weight)]
    if name.endswith(("_scale", "layer_scalar")) or ".experts." in name:
        return [(f"{name}.weight", weight)]
    return [(name, weight)]


def rope_freqs():
    """Gemma4Model.generate_extra_tensors."""
    size, share = FAR["global_head_dim"], FAR["rope_parameters"]["full_attention"]
    turning = int(size * share["partial_rotary_factor"] / 2)
    return np.array([1.0] * turning + [1e30] * (size // 2 - turning), np.float32)


def buffers(model):
    """What routers add for the choice of experts, by the names that the converter gives them, and
    what Gemma 4 multiplies layers by.
    """
    bias, known = "correction_bias", ("correction_bias", "layer_scalar")
    found = [(name, x) for name, x in model.named_buffers() if name.endswith(known)]
    return [(name.replace(bias, "correction.bias"), x) for name, x in found]


def write_other(path, name, model, kind="F32", extra=()):
    """The GGUF file of a model of OTHERS, its matrices in blocks of a kind, with no tokenizer; and
    `extra` tensors.
    """
    blocks = kind
    architecture, kind, more, fields = OTHERS[name]
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    layers = config.num_hidden_layers
    layered = kind in ("gpt2", "gpt_neox", "cohere", "cohere2", "stablelm", "starcoder2")
    epsilon = next(
        getattr(config, key)
        for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
        if hasattr(config, key)
    )
    fields = {
        "context_length": 64,
        "embedding_length": E2,
        "block_count": layers,
        "feed_forward_length": 4 * E2 if kind == "gpt2" else F2,
        "attention.head_count": H2,
        **({} if kind in ("gpt2", "gpt_neox") else {"attention.head_count_kv": K2}),
        f"attention.layer_norm_{'' if layered else 'rms_'}epsilon": epsilon,
        **fields,
    }
    for key, value in fields.items():
        key = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, float(value))
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, layers)
    heads = {}  # the layer norms of each head, which stablelm's converter joins
    streams = {}  # the projections into and out of streams, which that of Gemma 3n stacks
    for original_name, parameter in [*model.named_parameters(), *buffers(model)]:
        weight = parameter.detach().cpu().numpy()
        if ".norms." in original_name:
            heads.setdefault(original_name.partition(".norms.")[0] + ".weight", []).append(weight)
            continue
        if "altup_" in original_name:
            streams.setdefault(original_name.split(".")[1], []).append(weight)
            continue
        for changed, part in as_converted(architecture, config, original_name, weight):
            base, suffix = changed.rsplit(".", 1)
            known = changed if changed.startswith("blk.") else f"{names.get_name(base)}.{suffix}"
            assert not known.startswith("None"), changed
            part, of = np.ascontiguousarray(part), GGMLQuantizationType.F32
            if part.ndim == 2:
                of = GGMLQuantizationType[blocks]
                part = quants.quantize(part, of)
            writer.add_tensor(known, part, raw_dtype=of)
    for joined, parts in heads.items():
        writer.add_tensor(
            f"{names.get_name(joined.removesuffix('.weight'))}.weight", np.stack(parts)
        )
    for joined, parts in streams.items():
        writer.add_tensor(f"{names.get_name(f'model.{joined}')}.weight", np.stack(parts))
    for name_of_other in extra:
        writer.add_tensor(name_of_other, np.ones((2, 2), np.float32))
    if architecture == "gemma4":
        writer.add_tensor("rope_freqs.weight", rope_freqs())
    if name == "phi3-longrope":
        for kind in ("short", "long"):
            writer.add_tensor(
                f"rope_factors_{kind}.weight", np.array(LONG[f"{kind}_factor"], np.float32)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_logits_of_the_other_architectures_are_those_of_the_original(tmp_path, name):
    model = little(name)
    loaded = load(write_other(tmp_path / "a.gguf", name, model))
    assert loaded.tokenizer is None
    agree(logits_here(loaded), theirs(model))
    if name.startswith("gemma"):
        assert loaded.config == fa.families.read_config(model.config.to_dict())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize(
    "name",
    [
        *("phi3", "gpt2", "gptneox", "command-r", "mixtral", "gpt-oss", "deepseek2-older"),
        "gemma4-experts",
    ],
)
def test_blocks_that_are_kept_are_the_dequantized_weights(tmp_path, name, kind):
    """Fused, turned and stacked tensors too."""
    path = write_other(tmp_path / "a.gguf", name, little(name), kind)
    kept, plain = load(path, keep_quantized=True), load(path)
    whole = fa.dequantize(kept.params)
    assert fa.quantization.is_quantized(kept.params.layers[0].q)
    for (place, ours), (_, theirs) in zip(
        fa.tree.items(whole), fa.tree.items(plain.params), strict=True
    ):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=1e-7, msg=place)
    agree(logits_here(kept), logits_here(plain))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("deepseek2", "attention.key_length", 12),
        ("deepseek2", "attention.head_count_kv", 2),
        ("deepseek2", "expert_gating_func", 3),
        ("deepseek2-older", "rope.dimension_count", 12),
        ("deepseek2-older", "nextn_predict_layers", 1),
    ],
)
def test_sizes_of_latents_that_contradict_each_other_are_refused(name, key, value):
    architecture, _, _, fields = OTHERS[name]
    common = {"context_length": 64, "embedding_length": E2, "block_count": 4}
    common |= {"feed_forward_length": F2, "attention.head_count": H2}
    common |= {"attention.layer_norm_rms_epsilon": 1e-6}
    told = {f"{architecture}.{at}": x for at, x in {**common, **fields}.items()}
    metadata = {"general.architecture": architecture, **told}
    assert fa.families.read_metadata(metadata, V, True).latent_size == 32
    with pytest.raises(CheckpointError, match=key.replace("rope.dimension_count", "rotary_size")):
        fa.families.read_metadata({**metadata, f"{architecture}.{key}": value}, V, True)


def test_keys_of_layers_that_read_those_of_others_are_left_out(tmp_path):
    """As in files of published models, which have them; of other layers they are unknown."""
    extra = {f"blk.{i}.attn_{leaf}.weight" for i in (4, 5) for leaf in ("k", "v", "k_norm")}
    model = little("gemma3n")
    plain = load(write_other(tmp_path / "a.gguf", "gemma3n", model))
    path = write_other(tmp_path / "b.gguf", "gemma3n", model, extra=extra)
    torch.testing.assert_close(logits_here(load(path)), logits_here(plain), rtol=0, atol=0)
    found = survey(path)
    assert set(found.left_out) == extra
    assert not extra & set(found.read)
    assert found.config == plain.config
    with pytest.raises(CheckpointError, match=r"unknown: blk\.6\.attn_k\.weight"):
        fa.load(write_other(tmp_path / "c.gguf", "gemma3n", model, extra={"blk.6.attn_k.weight"}))


def told_by(name):
    """The metadata of a model of OTHERS, as a reader of the file has them."""
    architecture, _, _, fields = OTHERS[name]
    common = {"context_length": 64, "embedding_length": E2, "block_count": 6}
    common |= {"feed_forward_length": F2, "attention.head_count": H2}
    common |= {"attention.head_count_kv": K2, "attention.layer_norm_rms_epsilon": 1e-6}
    told = {
        key: np.array(x) if isinstance(x, list) else x for key, x in {**common, **fields}.items()
    }
    return architecture, told


FREQUENCIES = torch.tensor([1.0, 1.0, *[1e30] * 6])


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma3n", "activation_sparsity_scale", np.array([np.nan] * 6)),
        ("gemma3n", "activation_sparsity_scale", np.array([1.0] * 5)),
        ("gemma3n", "activation_sparsity_scale", None),
        ("gemma3n", "feed_forward_length", np.array([64] * 5)),
        ("gemma3n", "feed_forward_length", np.array([64.0] * 6)),
        ("gemma3n", "feed_forward_length", np.array([64] * 5 + [0])),
        ("gemma3n", "attention.shared_kv_layers", 1.5),
        ("gemma3n", "attention.head_count_kv", np.array([2] * 6)),
        ("gemma3n", "attention.key_length_swa", 16),
        ("gemma3n", "laurel_rank", 32),
        ("gemma4", "attention.head_count_kv", np.array([2, 1, 2, 2, 2, 1])),
        ("gemma4", "attention.sliding_window_pattern", 2),
        ("gemma4", "attention.sliding_window_pattern", None),
        ("gemma4", "attention.key_length_swa", None),
        ("gemma4", "attention.value_length_swa", 16),
        ("gemma4", "rope.dimension_count_swa", 4),
        ("gemma4", "rope.dimension_count", 8),
        ("gemma4", "rope.scaling.factor", 8.0),
        ("gemma4-experts", "expert_feed_forward_length", None),
        ("gemma4-experts", "expert_gating_func", 2),
    ],
)
def test_a_field_of_gemma_that_cannot_be_meant_is_refused(name, key, value):
    architecture, told = told_by(name)
    read = lambda fields: fa.families.read_metadata(
        {
            "general.architecture": architecture,
            **{f"{architecture}.{at}": x for at, x in fields.items() if x is not None},
        },
        V,
        True,
        FREQUENCIES if architecture == "gemma4" else None,
    )
    assert read(told).window_layers == (True, False) * 3
    place = key.replace("scaling.factor", "scaling.type")
    with pytest.raises(CheckpointError, match=f"load: .*{place} should be"):
        read({**told, key: value})


@pytest.mark.parametrize("factors", [None, [1.0] * 7, [1.0, 2.0, *[1e30] * 6], [1e30] * 8])
def test_factors_that_are_not_of_whole_planes_are_refused(factors):
    architecture, told = told_by("gemma4")
    metadata = {f"{architecture}.{at}": x for at, x in told.items()}
    table = None if factors is None else torch.tensor(factors)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight should be"):
        fa.families.read_metadata(
            {"general.architecture": architecture, **metadata}, V, True, table
        )


def test_a_number_of_layers_may_be_a_whole_float():
    """Of layers that share keys, as some files of Gemma 3n have it."""
    _, told = told_by("gemma3n")
    metadata = {f"gemma3n.{at}": x for at, x in told.items()}
    metadata |= {"general.architecture": "gemma3n", "gemma3n.attention.shared_kv_layers": 2.0}
    assert fa.families.read_metadata(metadata, V, True).shared_layers == 2


def test_every_architecture_has_an_original():
    written = {architecture for architecture, *_ in [*MODELS.values(), *OTHERS.values()]}
    assert written == set(fa.families.GGUF)


def test_a_factor_of_scaling_without_its_type_is_linear(tmp_path):
    """As llama.cpp takes it."""
    file = write(
        tmp_path / "a.gguf", "qwen2", original("qwen2"), change={"rope.scaling.factor": 4.0}
    )
    assert fa.load(file).config.rope_scaling == fa.layers.RopeScaling("linear", 4.0)


def test_the_tokenizer_comes_with_the_file(tmp_path):
    tokenizer = fa.load(write(tmp_path / "a.gguf", "qwen2", original("qwen2"))).tokenizer
    assert len(BYTES) == 256
    assert tokenizer.decode(tokenizer.encode("hello the 12")) == "hello the 12"
