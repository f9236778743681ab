"""Every family against its original: tiny random models made by transformers, read, run, decoded
step by step, saved, read back.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from samples import load
from torch.func import grad, jvp, vmap
from transformers import AutoConfig, AutoModelForCausalLM

import funcattn as fa

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
# Read since, each with its whole logits in the fast suite.
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
MORE |= {
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
MODELS |= MORE
ENDS = {name: SMALL[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
PLACES = {"max_position_embeddings": 64}
GPT = {**ENDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
OWN = {  # that take the sizes by other names
    "gpt2": {"vocab_size": V},
    "falcon": {**ENDS, **PLAIN, **PLACES},
    "gptj": GPT,
    "codegen": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {**ENDS, **PLACES, "hidden_size": 32, "num_layers": 4, "num_heads": 4},
    "opt": {**ENDS, **PLAIN, **PLACES, "ffn_dim": 48},
    "xglm": {**ENDS, **PLACES, "d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
}
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in MODELS]


def biases(model):
    """What routers add for the choice of experts, which are buffers."""
    return [x for name, x in model.named_buffers() if name.endswith("correction_bias")]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Name -> (their model, the folder it was saved in), each made once."""
    made = {}

    def make(name):
        if name not in made:
            kind, more = MODELS[name]
            own = OWN.get(kind, SMALL)
            config = AutoConfig.for_model(kind, **{**own, **more}, attn_implementation="eager")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            # as made, norms are one and biases zero, and an error in either would not show
            with torch.no_grad():
                for parameter in (*model.parameters(), *biases(model)):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make


def tokens(n=T, seed=0):
    return fa.random.randint(fa.key(seed), (n,), 0, V)


def theirs(model, ids):
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_original(originals, name):
    model, folder = originals(name)
    config, params, _ = load(folder)
    ours = fa.decoder(config)
    got = ours.logits(params, ours.hidden(params, tokens())[0])
    torch.testing.assert_close(got, theirs(model, tokens()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_decoding_step_by_step_is_that_of_the_original_beyond_window_and_scaling(originals, name):
    """Chunks of 10 and then single tokens; where angles follow the length, the original reads the
    whole text each time.
    """
    model, folder = originals(name)
    config, params, _ = load(folder)
    ours, past, mine, other, cache = (
        fa.decoder(config),
        None,
        [],
        [],
        transformers.DynamicCache(config=model.config),
    )
    past = ours.cache(T)
    for piece in tokens().split([10, 10, *([1] * (T - 20))]):
        logits, past = ours.apply(params, piece, past)
        mine.append(logits)
        if config.follows_length:
            other.append(theirs(model, tokens()[: past.length])[-len(piece) :])
            continue
        with torch.no_grad():
            other.append(model(piece[None], past_key_values=cache, use_cache=True).logits[0])
    torch.testing.assert_close(torch.cat(mine), torch.cat(other), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_a_saved_model_is_read_by_transformers_with_equal_logits(originals, name, tmp_path):
    model, folder = originals(name)
    config, params, _ = load(folder)
    fa.save(tmp_path / "ours", config, params)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    torch.testing.assert_close(theirs(read, tokens()), theirs(model, tokens()), atol=2e-5, rtol=0)
    again = load(tmp_path / "ours")
    assert again.config == config
    assert fa.tree.allclose(again.params, params, atol=0, rtol=0)


# the first that says the same
SPELLED_AS_ANOTHER = {
    "mistral-full": "llama",
    "phi3": "mistral",
    "phi3-longrope": "llama",
    **dict.fromkeys(("exaone", "internlm3", "iquestcoder", "helium", "ernie4_5"), "llama"),
    "cwm": "smollm3",
    "ministral": "smollm3",
    "seed_oss": "qwen2",
    "xglm": "biogpt",
    **dict.fromkeys(("dots1", "solar_open", "hy_v3"), "glm4_moe"),
    "granitemoehybrid-rope": "granite",
    "codegen": "gptj",
    "jais2": "starcoder2",
    "falcon-serial": "starcoder2",
    "gpt_bigcode-heads": "gpt2",
    "opt": "gpt2",
    "sarvam_mla": "deepseek_v3",
}


@pytest.mark.parametrize("name", EACH)
def test_a_model_keeps_its_family(originals, name):
    _, folder = originals(name)
    settings = json.loads((folder / "config.json").read_text())
    config = fa.families.read_config(settings)
    assert fa.families.family_for(config).name == SPELLED_AS_ANOTHER.get(
        name, settings["model_type"]
    )


@pytest.mark.parametrize("name", EACH)
def test_every_family_composes(originals, name):
    """vmap of grad is the loop, and a jvp along a direction is the gradient's product with it: in
    every family.
    """
    _, folder = originals(name)
    config, params, _ = load(folder, dtype=torch.float64)
    model = fa.decoder(config)
    batch = torch.stack([tokens(12, 1), tokens(12, 2)])

    def loss(params, ids):
        return torch.nn.functional.cross_entropy(
            model.logits(params, model.hidden(params, ids[:-1])[0]), ids[1:]
        )

    each = vmap(grad(loss), (None, 0))(params, batch)
    for row in range(2):
        one = grad(loss)(params, batch[row])
        assert fa.tree.allclose(
            fa.tree.map(lambda g, row=row: g[row], each), one, atol=1e-12, rtol=1e-9
        )
    direction = fa.tree.map(torch.ones_like, params)
    moved = jvp(lambda p: loss(p, batch[0]), (params,), (direction,))[1]
    first = grad(loss)(params, batch[0])
    wanted = sum(g.sum() for g in fa.tree.leaves(first))
    torch.testing.assert_close(moved, wanted, atol=1e-10, rtol=1e-9)


TEXT = {**SMALL, "num_hidden_layers": 2}
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
EYES |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
QWEN_EYES = {"depth": 1, "hidden_size": 16, "embed_dim": 16, "intermediate_size": 16}
QWEN_EYES |= {"num_heads": 2, "out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}
CLIP = {**EYES, "model_type": "clip_vision_model"}
MROPE = ROPE("default", mrope_section=[1, 1, 2])
SPARSE = {"num_experts": 4, "moe_intermediate_size": 24, **MOE}
TOWERS = {  # name -> text_config, vision_config, more
    "gemma3": ({"head_dim": 16, **LOCAL}, EYES, {"mm_tokens_per_image": 4}),
    "mistral3": ({"model_type": "mistral", "head_dim": 8}, {**EYES, "model_type": "pixtral"}, {}),
    "qwen2_vl": (MROPE, {**QWEN_EYES, "hidden_size": 32}, {}),
    "qwen2_5_vl": (MROPE, QWEN_EYES, {}),
    "qwen3_vl": ({"head_dim": 8, **MROPE}, {**QWEN_EYES, "deepstack_visual_indexes": [0]}, {}),
    "qwen3_vl_moe": (
        {"head_dim": 8, **MROPE, **SPARSE},
        {**QWEN_EYES, "deepstack_visual_indexes": [0]},
        {},
    ),
    "llava": ({"model_type": "llama"}, CLIP, {}),
    "llava_next": ({"model_type": "mistral", "sliding_window": None}, CLIP, {}),
    "idefics3": ({"model_type": "llama"}, EYES, {"scale_factor": 1}),
    "smolvlm": ({"model_type": "llama"}, EYES, {"scale_factor": 1}),
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


def wrapper(name, folder):
    """A model that takes images too, saved in a folder."""
    text, eyes, more = TOWERS[name]
    config = AutoConfig.for_model(name, text_config={**TEXT, **text}, vision_config=eyes, **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", TOWERS)
def test_the_text_of_a_model_of_images_is_that_of_the_original(name, tmp_path):
    """And, saved, a model of text alone with equal logits."""
    model = wrapper(name, tmp_path)
    with pytest.warns(UserWarning, match=f"is a {name}, of which the text is read"):
        config, params, _ = load(tmp_path)
    ours = fa.decoder(config)
    got = ours.logits(params, ours.hidden(params, tokens())[0])
    torch.testing.assert_close(got, theirs(model, tokens()), atol=1e-4, rtol=0)
    fa.save(tmp_path / "ours", config, params)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(
        theirs(read.eval(), tokens()), theirs(model, tokens()), atol=2e-5, rtol=0
    )


def test_what_is_neither_text_nor_known_of_images_is_refused_by_name(tmp_path):
    wrapper("llava", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "audio_tower.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="the text is read"),
        pytest.raises(fa.families.CheckpointError, match=r"unknown: audio_tower\.weight"),
    ):
        load(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(fa.families.CheckpointError, match=r"text_scale in config\.json"):
        fa.families.read_config({**settings, "text_scale": 2.0})


def test_experts_are_read_in_either_order_of_their_axes(tmp_path):
    model = wrapper("qwen3_vl_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {
        name: x.mT.contiguous() if ".mlp.experts." in name else x for name, x in tensors.items()
    }
    save_file(turned, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="the text is read"):
        config, params, _ = load(tmp_path)
    ours = fa.decoder(config)
    got = ours.logits(params, ours.hidden(params, tokens())[0])
    torch.testing.assert_close(got, theirs(model, tokens()), atol=1e-4, rtol=0)


def test_a_router_with_a_bias_for_the_choice_is_computed_in_float32(originals):
    """In bfloat16, where its rounding would choose other experts: as in the original."""
    model, folder = originals("glm4_moe")
    config, params, _ = load(folder, dtype=torch.bfloat16)
    layer = params.layers[1]
    assert (layer.choice_bias.dtype, layer.router.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(layer.choice_bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
    seen = {}

    def listen(name, x):
        seen[name] = x.dtype
        return x

    with fa.taps.listening(listen):
        fa.decoder(config).hidden(params, tokens())
    assert seen["layers.1.feed_forward.router"] == torch.float32
    assert seen["layers.1.output"] == torch.bfloat16


@pytest.mark.parametrize(("name", "layer"), [("deepseek_v3", 61), ("glm4_moe", 92)])
def test_layers_that_predict_a_second_token_are_left_out(originals, tmp_path, name, layer):
    """Those behind the last of the published models; other layers too many are an error."""
    _, folder = originals(name)
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    more = {f"model.layers.{layer}.eh_proj.weight": torch.ones(2, 2)}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    assert fa.tree.allclose(load(tmp_path).params, load(folder).params, atol=0, rtol=0)
    more = {f"model.layers.{layer - 1}.eh_proj.weight": torch.ones(2, 2)}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    with pytest.raises(fa.families.CheckpointError, match="eh_proj"):
        load(tmp_path)
