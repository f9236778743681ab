"""Text towers of models that also take images: their text_config, and their tensors by the names of
the text family.

Only text is read: such a model is its decoder, and what encodes images or projects them is left
out. For text alone the axes of positions (mrope) are equal, and no mask is two-sided.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .ignored import IGNORED
from .tables import NEUTRAL, Fields, Json, refuse

LLAMA_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
GEMMA4_SIZES = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
}
SIZES: Mapping[str, Mapping[str, int]] = {  # text family -> sizes where its config says none
    "llama": LLAMA_SIZES,
    "mistral": {**LLAMA_SIZES, "intermediate_size": 14336},
    "qwen2": {**LLAMA_SIZES, "vocab_size": 151936, "intermediate_size": 22016},
    "deepseek_v3": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
    },
    "gemma3n_text": {
        "vocab_size": 262400,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
    },
    "gemma4_text": GEMMA4_SIZES,
    "gemma4_unified_text": GEMMA4_SIZES,
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
}


@dataclass(frozen=True)
class Wrapper:
    """A model around a text family.

    text: the family where text_config names none. tied: tie_word_embeddings where nothing is said.
    also: True where that of text_config counts too. flat: True where a file may have the fields of
    text_config beside the others.
    """

    architecture: str
    text: str
    tied: bool = False
    also: bool = False
    flat: bool = False


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", "gemma3_text", tied=True),
    "gemma3n": Wrapper("Gemma3nForConditionalGeneration", "gemma3n_text", tied=True),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", "gemma4_text", tied=True),
    "gemma4_unified": Wrapper(
        "Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text", tied=True
    ),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", "mistral", tied=True),
    "qwen2_vl": Wrapper("Qwen2VLForConditionalGeneration", "qwen2_vl_text", also=True, flat=True),
    "qwen2_5_vl": Wrapper(
        "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text", also=True, flat=True
    ),
    "qwen3_vl": Wrapper("Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
    "qwen3_vl_moe": Wrapper("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text"),
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
    "llava": Wrapper("LlavaForConditionalGeneration", "llama", also=True),
    "llava_next": Wrapper("LlavaNextForConditionalGeneration", "llama"),
    "idefics3": Wrapper("Idefics3ForConditionalGeneration", "llama"),
    "smolvlm": Wrapper("SmolVLMForConditionalGeneration", "llama"),
    "got_ocr2": Wrapper("GotOcr2ForConditionalGeneration", "qwen2", tied=True),
    "llama4": Wrapper("Llama4ForConditionalGeneration", "llama4_text"),
    "internvl": Wrapper("InternVLForConditionalGeneration", "qwen2", tied=True),
    "kimi_k25": Wrapper("Kimi_K25ForConditionalGeneration", "deepseek_v3", tied=True),
    "deepseek_vl": Wrapper("DeepseekVLForConditionalGeneration", "llama", tied=True),
    "deepseek_vl_hybrid": Wrapper("DeepseekVLHybridForConditionalGeneration", "llama", tied=True),
}
OF_IMAGES = frozenset(
    [
        *("vision_config", "text_config", "image_token_id", "image_token_index", "video_token_id"),
        *("vision_start_token_id", "vision_end_token_id", "vision_token_id", "boi_token_index"),
        *("eoi_token_index", "mm_tokens_per_image", "projector_hidden_act", "vision_feature_layer"),
        *("vision_feature_select_strategy", "multimodal_projector_bias", "spatial_merge_size"),
        *("image_seq_length", "image_grid_pinpoints", "use_image_newline_parameter"),
        *("downsample_ratio", "scale_factor", "ignore_index", "high_res_vision_config"),
        *("projection_hidden_size", "projection_layer_norm_eps"),
        *("audio_config", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id"),
        *("eoa_token_index", "audio_token_id"),
        *("audio_soft_tokens_per_image", "vision_soft_tokens_per_image"),
    ]
)
TEXT = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?P<name>.+)")
IMAGES = re.compile(
    r"(?:model\.)?"
    r"(?:visual|vision_tower|vision_model|multi_modal_projector|mm_projector|connector|aligner"
    r"|image_newline|high_res_vision_\w+)(?:\..+|$)"
    r"|model\.(?:audio_tower|embed_audio|embed_vision|vision_embedder)\..+"
)


def tower_settings(values: Mapping[str, Json]) -> Mapping[str, Json]:
    """The config.json of the text tower; of a model of text alone, the values themselves.

    Raises:
        CheckpointError: the wrapper has no text_config, or a field that is not known.
    """
    name = values.get("model_type")
    wrapper = WRAPPERS.get(name) if isinstance(name, str) else None
    if wrapper is None:
        return values
    architectures = values.get("architectures")
    if architectures not in (None, [], [wrapper.architecture]):
        refuse("architectures in config.json", [wrapper.architecture], architectures)
    text = values.get("text_config")
    if text is None and wrapper.flat:
        text = {key: value for key, value in values.items() if key not in OF_IMAGES}
        text["model_type"] = wrapper.text
    else:
        fields = Fields(values)
        fields.check_neutral(NEUTRAL)
        fields.check_known(IGNORED | NEUTRAL.keys() | OF_IMAGES)
    if not isinstance(text, dict):
        refuse("text_config in config.json", "an object", text)
    kind = text.get("model_type", wrapper.text)
    if isinstance(kind, str) and kind in WRAPPERS:
        kind = wrapper.text  # of older files
    tied = values.get("tie_word_embeddings", wrapper.tied)
    tied = tied or (wrapper.also and text.get("tie_word_embeddings", False))
    types = {key: values[key] for key in ("dtype", "torch_dtype") if key in values}
    sizes = SIZES.get(kind, {}) if isinstance(kind, str) else {}
    ends = {"model_type": kind, "architectures": None, "tie_word_embeddings": tied}
    return {**sizes, **types, **text, **ends}


def tower_name(name: str) -> str | None:
    """The name in the text family of a tensor of a wrapper; None for what is not of its text.

    Example:
        >>> tower_name("language_model.model.norm.weight")
        'model.norm.weight'
    """
    if IMAGES.fullmatch(name):
        return None
    found = TEXT.fullmatch(name)
    if found is None:
        return name
    # transformers 5.24 writes the layers of kimi_k25 as blocks; the published files have layers.
    inner = re.sub(r"^blocks\.", "layers.", found["name"])
    return inner if inner.startswith("lm_head.") else f"model.{inner}"


def untied(values: Mapping[str, Json], names: Iterable[str]) -> Mapping[str, Json]:
    """Settings of a tower whose file holds a head, whatever the flag says: it is the head."""
    held = any(tower_name(name) == "lm_head.weight" for name in names)
    return {**values, "tie_word_embeddings": False} if held else values
