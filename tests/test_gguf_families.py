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


def ours(loaded):
    model = fa.decoder(loaded.config)
    return model.logits(loaded.params, model.hidden(loaded.params, tokens())[0])


def agree(got, wanted):
    # float32, sums of 256 terms over logits of order ten
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_original(tmp_path, name):
    model = original(name)
    loaded = load(write(tmp_path / "a.gguf", name, model))
    agree(ours(loaded), theirs(model))
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
    agree(ours(load(path)), theirs(read))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_type_of_block_is_read(tmp_path, name, kind):
    model = original(name)
    # what is lost in the blocks is lost in the original too
    path = write(tmp_path / "a.gguf", name, model, kind)
    assert {entry.tensor_type.name for entry in gguf.GGUFReader(path).tensors} == {kind, "F32"}
    agree(ours(load(path)), theirs(model))


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
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
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
