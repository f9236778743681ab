"""Tiny models of every family, as the fields of their config.json: what the tests of families and
the table of docs/families.md are generated from.
"""

import json

from safetensors.torch import load_file, save_file

V, T = 61, 40
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2}
ROPE = lambda kind, **rest: {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **rest}}
LOCAL = {"sliding_window": 8}
KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 16,
}

MODELS = {
    "llama": ("llama", {}),
    "llama-3": (
        "llama",
        ROPE("llama3", **LLAMA3),
    ),
    "llama-biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "tie_word_embeddings": True},
    ),
    "llama-linear": ("llama", ROPE("linear", factor=4.0)),
    "llama-dynamic": ("llama", {**ROPE("dynamic", factor=2.0), "max_position_embeddings": 24}),
    "llama-yarn": ("llama", ROPE("yarn", **YARN)),
    "smollm3": ("smollm3", {}),
    "smollm3-window": ("smollm3", {"use_sliding_window": True, **LOCAL}),
    "mistral": ("mistral", LOCAL),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, **LOCAL}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, **CAPS, **LOCAL},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 24, **LOCAL, **KINDS}),
    "gemma3-linear": (
        "gemma3_text",
        {
            "head_dim": 16,
            **LOCAL,
            **KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3-longrope": ("phi3", {**ROPE("longrope", **LONG), "original_max_position_embeddings": 16}),
    "phi3-partial": ("phi3", ROPE("default", partial_rotary_factor=0.5)),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere-norm": ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "stablelm": ("stablelm", ROPE("default", partial_rotary_factor=0.25)),
    "stablelm-parallel": (
        "stablelm",
        {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True},
    ),
    "starcoder2": ("starcoder2", LOCAL),
    "mixtral": ("mixtral", {"num_local_experts": 4, **MOE, **LOCAL}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 12, **MOE},
    ),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            **MOE,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "head_dim": 16,
            **MOE,
            **LOCAL,
            **ROPE("yarn", **YARN, truncate=False),
        },
    ),
}

SWA = {**LOCAL, "layer_types": ["full_attention", *["sliding_attention"] * 3]}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
SIZED = {"moe_intermediate_size": 24}
SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 20, **SIZED, **MOE}
LOCALS = {"num_local_experts": 4, **MOE}
HYBRID = {
    "layer_types": ["full_attention"] * 4,
    "shared_intermediate_size": 40,
    "mamba_n_heads": 8,
}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 2, "head_dim": 16, **SIZED, **MOE}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
# Each with its whole logits in the fast suite.
MORE = {
    "exaone": ("exaone", {}),
    "internlm3": ("internlm3", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("iquestcoder", {"head_dim": 12}),
    "cwm": ("cwm", {**ROPE("llama3", **LLAMA3), **SWA, "head_dim": 8}),
    "ministral": ("ministral", {**LOCAL, **KINDS, "head_dim": 12}),
    "seed_oss": ("seed_oss", {"head_dim": 12}),
    "helium": ("helium", {"head_dim": 8}),
    "ernie4_5": ("ernie4_5", {"head_dim": 12, "use_bias": True}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "exaone4": ("exaone4", {**LOCAL, **KINDS}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "olmo": ("olmo", {}),
    "olmo3": (
        "olmo3",
        {
            **SWA,
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, **YARN},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "granite_swa": ("granite_swa", {**GRANITE, **SWA, "layer_rope_theta": [0, 1e4, 1e4, 1e4]}),
    "granite_swa-bases": ("granite_swa", {**SWA, "layer_rope_theta": [1e6, 1e4, 0, 1e4]}),
    "vaultgemma": ("vaultgemma", {"head_dim": 16, "query_pre_attn_scalar": 24, **CAPS, **LOCAL}),
    "cohere2": ("cohere2", {**LOCAL, **KINDS, "logit_scale": 0.25}),
    "falcon": ("falcon", {}),
    "falcon-serial": ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_bigcode-heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neo": ("gpt_neo", {"window_size": 8, "attention_types": [[["global", "local"], 2]]}),
    "opt": ("opt", {}),
    "biogpt": ("biogpt", {}),
    "xglm": ("xglm", {}),
    "olmo-clipped": ("olmo", {"clip_qkv": 0.2}),
    "olmoe": ("olmoe", {"num_experts": 4, "clip_qkv": 0.7, **MOE}),
    "flex_olmo": ("flex_olmo", {"num_experts": 4, **MOE}),
    "mellum": (
        "mellum",
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "head_dim": 12,
            **MOE,
            **SWA,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
    ),
    "qwen2_moe": ("qwen2_moe", {**SHARED, "mlp_only_layers": [1]}),
    "qwen2_moe-window": (
        "qwen2_moe",
        {**SHARED, "norm_topk_prob": True, "use_sliding_window": True, **LOCAL},
    ),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, **SIZED}),
    "granitemoe": ("granitemoe", {**GRANITE, **LOCALS}),
    "granitemoeshared": (
        "granitemoeshared",
        {**GRANITE, **LOCALS, "shared_intermediate_size": 20},
    ),
    "granitemoe_swa": ("granitemoe_swa", {**GRANITE, **LOCALS, **SWA}),
    "granitemoe_swa-shared": (
        "granitemoe_swa",
        {**LOCALS, **SWA, "shared_intermediate_size": 20, "layer_rope_theta": [0, 1e4, 1e4, 1e4]},
    ),
    "granitemoehybrid": ("granitemoehybrid", {**GRANITE, **HYBRID, "num_local_experts": 0}),
    "granitemoehybrid-rope": (
        "granitemoehybrid",
        {**HYBRID, "num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    "granitemoehybrid-moe": ("granitemoehybrid", {**GRANITE, **HYBRID, **LOCALS}),
    "glm4_moe": ("glm4_moe", {**ROUTED, **GROUPS, "use_qk_norm": True, "attention_bias": True}),
    "dots1": ("dots1", {**ROUTED, **GROUPS, "first_k_dense_replace": 1, "sliding_window": None}),
    "solar_open": ("solar_open", {**ROUTED, **GROUPS}),
    "exaone_moe": (
        "exaone_moe",
        {"num_experts": 8, "num_shared_experts": 2, **SIZED, **GROUPS, **MOE, **LOCAL, **KINDS},
    ),
    "hy_v3": ("hy_v3", {"num_experts": 4, "head_dim": 12, **SIZED, **MOE}),
    "minimax_m2": (
        "minimax_m2",
        {"head_dim": 8, **LOCALS, **ROPE("default", partial_rotary_factor=0.5)},
    ),
    "phi": ("phi", {}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "codegen": ("codegen", {"rotary_dim": 4}),
    "nemotron": ("nemotron", {}),
    "jais2": ("jais2", {}),
    "arcee": ("arcee", {"mlp_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 12}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    "ministral3": (
        "ministral3",
        {"head_dim": 8, **ROPE("yarn", **YARN, llama_4_scaling_beta=0.5)},
    ),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
}
# One for each idea has its whole logits in the fast suite, and all have the rest in the slow one.
LATEST = {
    "afmoe": (
        "afmoe",
        {
            "num_experts": 4,
            "num_shared_experts": 1,
            "head_dim": 12,
            "mup_enabled": True,
            **SIZED,
            **MOE,
            **LOCAL,
        },
    ),
    "apertus": ("apertus", {}),
    "apertus1p5_text": ("apertus1p5_text", {}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 2.0}),
    "bloom": ("bloom", {}),
    "bloom-after": (
        "bloom",
        {"hidden_size": 24, "n_head": 6, "apply_residual_connection_post_layernorm": True},
    ),
    "mpt": ("mpt", {"attn_config": {"clip_qkv": 0.3}}),
    "dbrx": (
        "dbrx",
        {
            "attn_config": {"clip_qkv": 0.3, "kv_n_heads": 2, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
}
NETS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
LATEST |= {
    "lfm2": ("lfm2", {"full_attn_idxs": [1, 3], "conv_bias": True}),
    "lfm2_moe": (
        "lfm2_moe",
        {
            "layer_types": ["conv", "full_attention"] * 2,
            "num_experts": 4,
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.5,
            **SIZED,
            **MOE,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {**NETS, **SHARED, "head_dim": 16, "full_attention_interval": 2, "mlp_only_layers": [1]},
    ),
    "qwen3_5_text": ("qwen3_5_text", {**NETS, "head_dim": 16}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**NETS, **SHARED, "head_dim": 16}),
    "olmo_hybrid": ("olmo_hybrid", NETS),
    "olmo_hybrid-unplaced": (
        "olmo_hybrid",
        {**NETS, "linear_allow_neg_eigval": False, **ROPE("default", rope_theta=None)},
    ),
}
MAMBA = {"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_d_conv": 3}
MIXED = {"layer_types": ["mamba", "attention"] * 2}
PARTS = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 5,
    "conv_kernel": 3,
    "head_dim": 8,
}
LATEST |= {
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "bamba-biases": (
        "bamba",
        {
            **MAMBA,
            "attn_layer_indices": [1, 2],
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "attention_bias": True,
            "mlp_bias": True,
            "time_step_limit": [0.0, 1.2],
        },
    ),
    "granitemoehybrid-mamba": (
        "granitemoehybrid",
        {**GRANITE, **MAMBA, **MIXED, "num_local_experts": 0, "shared_intermediate_size": 20},
    ),
    "granitemoehybrid-mamba-moe": (
        "granitemoehybrid",
        {**GRANITE, **MAMBA, **MIXED, **LOCALS, "shared_intermediate_size": 20},
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **MAMBA,
            "mamba_d_ssm": 48,
            "head_dim": 8,
            "mlp_multipliers": [0.7, 1.2],
            "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
            "ssm_in_multiplier": 1.3,
            "ssm_out_multiplier": 0.8,
            "attention_in_multiplier": 1.1,
            "attention_out_multiplier": 0.9,
            "key_multiplier": 0.3,
            "lm_head_multiplier": 0.4,
            "embedding_multiplier": 2.5,
        },
    ),
    "falcon_h1-normed": (
        "falcon_h1",
        {**MAMBA, "mamba_d_ssm": 48, "mamba_rms_norm": True, "projectors_bias": True},
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **PARTS,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "n_routed_experts": 4,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
        },
    ),
    "nemotron_h-dense": (
        "nemotron_h",
        {**PARTS, "hybrid_override_pattern": "M-M*", "use_bias": True, "mlp_bias": True},
    ),
}
TYPED = ("bert", "ernie", "megatron-bert", "roberta", "camembert", "xlm-roberta", "data2vec-text")
SEEN = ("roberta-prelayernorm", "xlm-roberta-xl", "bert-generation")
TRANSLATORS = (
    "bart",
    "plbart",
    "mvp",
    "trocr",
    "marian",
    "mbart",
    "pegasus",
    "blenderbot",
    "whisper",
)
CHUNKED = {
    "head_dim": 8,
    "intermediate_size_mlp": 40,
    "attention_chunk_size": 8,
    "floor_scale": 6,
    "attn_scale": 0.5,
    **LOCALS,
}
COMMAND = {"num_experts": 4, "head_dim": 8, "logit_scale": 0.25, **MOE, **LOCAL}
SEES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
SEES |= {"num_attention_heads": 2, "crop_size": 28, "image_size": 28, "patch_size": 14}
HEARS = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2}
HEARS |= {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "input_size": 16}
HEARS |= {"nemo_conv_channels": 16}
LATEST |= {
    "llama4": ("llama4_text", CHUNKED),
    "llama4-dense": (
        "llama4_text",
        {
            **CHUNKED,
            "interleave_moe_layer_step": 2,
            "attention_bias": True,
            "use_qk_norm": False,
            **ROPE("llama3", **LLAMA3),
        },
    ),
    "openai-gpt": ("openai-gpt", {}),
    "aria_text": ("aria_text", {"moe_num_experts": 4, "moe_num_shared_experts": 1}),
    "phimoe": (
        "phimoe",
        {**LOCALS, "router_jitter_noise": 0.2, "lm_head_bias": True, "attention_bias": True},
    ),
    "cohere2_moe": (
        "cohere2_moe",
        {
            **COMMAND,
            "num_shared_experts": 2,
            "prefix_dense_intermediate_size": 40,
            "first_k_dense_replace": 1,
            "expert_selection_fn": "sigmoid",
        },
    ),
    "cohere2_moe-sum": (
        "cohere2_moe",
        {
            **COMMAND,
            "num_shared_experts": 1,
            "shared_expert_combination_strategy": "sum",
            "rms_norm_eps": 1e-5,
        },
    ),
    "sarvam_moe": ("sarvam_moe", {**ROUTED, **GROUPS}),
    "laguna": (
        "laguna",
        {
            **SHARED,
            **SWA,
            "head_dim": 8,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1e5,
                    "partial_rotary_factor": 0.5,
                    **YARN,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "moe_routed_scaling_factor": 1.5,
        },
    ),
    "laguna-features": ("laguna", {**SHARED, "head_dim": 8, "gating": "per-element"}),
    "persimmon": ("persimmon", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "ctrl": ("ctrl", {"dff": 48}),
    "modernbert-decoder": ("modernbert-decoder", {"local_attention": 16}),
    "gpt-sw3": ("gpt-sw3", {}),
    "phi4_multimodal": (
        "phi4_multimodal",
        {"original_max_position_embeddings": 64, "vision_config": SEES, "audio_config": HEARS},
    ),
    "electra": ("electra", {"embedding_size": 32}),
    "big_bird": ("big_bird", {"attention_type": "original_full"}),
    "bigbird_pegasus": ("bigbird_pegasus", {}),
    "bigbird_pegasus-biases": ("bigbird_pegasus", {"use_bias": True}),
    **{name: (name, {}) for name in (*TYPED, *SEEN)},
    **{name: (name, {"scale_embedding": True}) for name in TRANSLATORS},
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
DIRECT = {**LATENT, "q_lora_rank": None}
ROUTES = {"n_routed_experts": 8, "n_shared_experts": 2, **SIZED, **MOE}
LATEST |= {
    "deepseek_v2": ("deepseek_v2", {**DIRECT, **ROUTES, "first_k_dense_replace": 1}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {**LATENT, **ROUTES, **GROUPS, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **LATENT,
            **ROUTES,
            **GROUPS,
            "first_k_dense_replace": 2,
            **ROPE("yarn", **YARN, mscale=1.0, mscale_all_dim=0.7),
        },
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {**LATENT, **ROUTES, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
    ),
    "sarvam_mla": ("sarvam_mla", {**DIRECT, **ROUTES}),
    "youtu": ("youtu", {**LATENT, "attention_bias": True}),
    "minicpm3": ("minicpm3", {**LATENT, "scale_depth": 1.4, "dim_model_base": 16}),
    "minicpm3-longrope": (
        "minicpm3",
        {
            **LATENT,
            "max_position_embeddings": 64,
            **ROPE(
                "longrope",
                short_factor=[1.0, 1.5],
                long_factor=[1.0, 3.0],
                original_max_position_embeddings=16,
            ),
        },
    ),
}
WIDE = {"hidden_size_per_layer_input": 4, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
WIDE |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "head_dim": 8, **LOCAL}
FAR = {"global_head_dim": 12, "num_global_key_value_heads": 1}
LATEST |= {
    "opt-projected": (
        "opt",
        {"word_embed_proj_dim": 12, "do_layer_norm_before": False},
    ),
    "opt-untied": (
        "opt",
        {"word_embed_proj_dim": 12, "tie_word_embeddings": False, "enable_bias": False},
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            **WIDE,
            "vocab_size_per_layer_input": 55,
            "laurel_rank": 6,
            "activation_sparsity_pattern": [0.8, 0.8, 0.0, 0.0, 0.0, 0.0],
        },
    ),
    "gemma3n-sizes": (
        "gemma3n_text",
        {
            **WIDE,
            "vocab_size_per_layer_input": 61,
            "intermediate_size": [48, 48, 24, 24, 48, 48],
            "num_kv_shared_layers": 0,
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "altup_correct_scale": False,
            "attention_bias": True,
            **CAPS,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {**WIDE, **FAR, "vocab_size_per_layer_input": 64, "use_double_wide_mlp": True},
    ),
    "gemma4-experts": (
        "gemma4_text",
        {
            **WIDE,
            **FAR,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "attention_bias": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "final_logit_softcapping": 2.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            "n_routed_experts": 8,
            "head_dim": 16,
            **SIZED,
            **MOE,
            **GROUPS,
            **LOCAL,
            "num_key_value_heads": 1,
            "v_head_dim": 12,
            "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "default",
                    "rope_theta": 5e4,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.25,
                },
            },
        },
    ),
    "gemma4_unified": (
        "gemma4_unified_text",
        {**{name: WIDE[name] for name in WIDE if "input" not in name}, **FAR},
    ),
}
IDEAS = {"gemma3n", "gemma4", "gemma4-experts"}
IDEAS |= {"afmoe", "apertus", "nanochat", "bloom-after", "llama4", "bert", "phimoe"}
IDEAS |= {"deepseek_v2-groups", "deepseek_v3", "minicpm3-longrope"}
IDEAS |= {"lfm2_moe", "qwen3_next", "olmo_hybrid"}
IDEAS |= {"falcon_h1", "nemotron_h"}
MODELS |= MORE | LATEST
MODELS["kimi_linear"] = (
    "kimi_linear",
    {
        **{name: x for name, x in DIRECT.items() if name != "head_dim"},
        **SIZED,
        **MOE,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "linear_head_dim": 6,
        "linear_num_heads": 3,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
)
LATEST["kimi_linear"] = MODELS["kimi_linear"]
ENDS = {name: SMALL[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
PLACES = {"max_position_embeddings": 64}
GPT = {**ENDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MPT = {**ENDS, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}
DECODER = {**ENDS, **PLAIN, **PLACES, "intermediate_size": 48, "is_decoder": True}
TRANSLATOR = {
    **ENDS,
    **PLACES,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "d_model": 32,
    "decoder_layers": 3,
    "encoder_layers": 3,  # so many the cache of transformers takes
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "is_encoder_decoder": False,
}
OWN = {  # that take the sizes by other names
    "gpt2": {"vocab_size": V},
    "bloom": {**ENDS, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    **dict.fromkeys(("mpt", "dbrx"), MPT),
    **dict.fromkeys((*TYPED, *SEEN, "electra", "big_bird"), DECODER),
    **dict.fromkeys((*TRANSLATORS, "bigbird_pegasus"), TRANSLATOR),
    "whisper": {**TRANSLATOR, "max_target_positions": 64},
    **dict.fromkeys(("openai-gpt", "ctrl", "gpt-sw3"), GPT),
    "falcon": {**ENDS, **PLAIN, **PLACES},
    "gptj": GPT,
    "codegen": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {**ENDS, **PLACES, "hidden_size": 32, "num_layers": 4, "num_heads": 4},
    "opt": {**ENDS, **PLAIN, **PLACES, "ffn_dim": 48},
    "xglm": {**ENDS, **PLACES, "d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
}
TEXT = {**SMALL, "num_hidden_layers": 2}
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
EYES |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
QWEN_EYES = {"depth": 1, "hidden_size": 16, "embed_dim": 16, "intermediate_size": 16}
QWEN_EYES |= {"num_heads": 2, "out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}
CLIP = {**EYES, "model_type": "clip_vision_model"}
MROPE = ROPE("default", mrope_section=[1, 1, 2])
SPARSE = {"num_experts": 4, "moe_intermediate_size": 24, **MOE}
EVERY = {"full_attention_interval": 2, "head_dim": 16}
SEES_TEXT = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "mlp_dim": 16}
SEES_TEXT |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "window_size": 2}
SEES_TEXT |= {"global_attn_indexes": [0]}
TOWERS = {  # name -> text_config, vision_config, more
    "gemma3": ({"head_dim": 16, **LOCAL}, EYES, {"mm_tokens_per_image": 4}),
    "gemma4": (
        {**WIDE, **FAR, "vocab_size_per_layer_input": 61},
        {**EYES, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        {"audio_config": None},
    ),
    "gemma4_unified": (
        {**{name: WIDE[name] for name in WIDE if "input" not in name}, **FAR},
        {"patch_size": 4, "mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16},
        {"audio_config": None},
    ),
    "mistral3": ({"model_type": "mistral", "head_dim": 8}, {**EYES, "model_type": "pixtral"}, {}),
    "qwen2_vl": (MROPE, {**QWEN_EYES, "hidden_size": 32}, {}),
    "qwen2_5_vl": (MROPE, QWEN_EYES, {}),
    "qwen3_vl": ({"head_dim": 8, **MROPE}, {**QWEN_EYES, "deepstack_visual_indexes": [0]}, {}),
    "qwen3_vl_moe": (
        {"head_dim": 8, **MROPE, **SPARSE},
        {**QWEN_EYES, "deepstack_visual_indexes": [0]},
        {},
    ),
    "qwen3_5": ({**NETS, **EVERY, **MROPE}, QWEN_EYES, {}),
    "qwen3_5_moe": ({**NETS, **SHARED, **EVERY, **MROPE}, QWEN_EYES, {}),
    "llava": ({"model_type": "llama"}, CLIP, {}),
    "llava_next": ({"model_type": "mistral", "sliding_window": None}, CLIP, {}),
    "idefics3": ({"model_type": "llama"}, EYES, {"scale_factor": 1}),
    "smolvlm": ({"model_type": "llama"}, EYES, {"scale_factor": 1}),
    "got_ocr2": ({"model_type": "qwen2"}, SEES_TEXT, {"image_seq_length": 4}),
    "llama4": ({"model_type": "llama4_text", **CHUNKED}, {**EYES, "vision_output_dim": 16}, {}),
    "internvl": (
        {"model_type": "qwen2"},
        {**EYES, "image_size": [16, 16], "patch_size": [8, 8]},
        {},
    ),
    "kimi_k25": (
        {"model_type": "deepseek_v3", **LATENT, **ROUTES, **GROUPS, "first_k_dense_replace": 1},
        {**EYES, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2},
        {"projection_hidden_size": 16, "tie_word_embeddings": False},
    ),
    "deepseek_vl": ({"model_type": "llama"}, EYES, {}),
    "deepseek_vl_hybrid": (
        {"model_type": "llama"},
        EYES,
        {
            "high_res_vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "output_channels": 16,
                "mlp_dim": 16,
                "global_attn_indexes": [0],
            }
        },
    ),
}


def settings(name):
    """The fields of one of MODELS."""
    kind, more = MODELS[name]
    return {**OWN.get(kind, SMALL), **more}


def of_family(kind):
    """The fields of the first of MODELS of a family; of a text tower, those of any other."""
    for name, (other, _) in MODELS.items():
        if other == kind:
            return settings(name)
    return {**SMALL, **TOWERS.get(kind.removesuffix("_text"), ({},))[0]}


def wrap_text(folder, name, architecture):
    """Write a folder of a model of text again as that of a model of images around it, of which the
    class of transformers needs a package more (timm): config.json and the names of its tensors.
    """
    settings = json.loads((folder / "config.json").read_text())
    sees = {"vision_config": {"hidden_size": 16}, "image_token_id": 3, "audio_config": None}
    whole = {"model_type": name, "architectures": [architecture], "text_config": settings, **sees}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = load_file(folder / "model.safetensors")
    turned = {x.replace("model.", "model.language_model.", 1): y for x, y in tensors.items()}
    eyes = {"model.vision_tower.timm_model.conv.weight": next(iter(tensors.values()))[:1].clone()}
    save_file({**turned, **eyes}, folder / "model.safetensors")
