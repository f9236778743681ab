"""Decoders of models that translate or speak, on their own: without cross-attention.

bart plbart mvp trocr      norms after the sum, one of the embedding; positions from the third row
marian                     norms after the sum; a table of sines
mbart                      norms before, one of the embedding too; positions from the third row
pegasus blenderbot whisper bigbird_pegasus    norms before; biases of attention where it says so in
                           the last

What only the whole model uses, cross-attention above all, is left out.
"""

import re
from collections.abc import Callable

from torch import Tensor

from ...transformer import Config
from .bert import after_the_sum
from .conventions import read_activation, write_activation
from .gpt import LAYER_NORM, PARTS, of_layers
from .gpt_variants import DECODER_LAYER
from .layouts import implied, sliced
from .tables import Family, Fields, Json, refuse

SIZES = {
    "vocabulary": "vocab_size",
    "width": "d_model",
    "layers": "decoder_layers",
    "heads": "decoder_attention_heads",
    "feed_forward": "decoder_ffn_dim",
}
ENCODER = (
    *("encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "encoder_layerdrop"),
    *("decoder_layerdrop", "use_prompt", "prompt_length", "prompt_mid_dim", "decoder_vocab_size"),
    *(
        "share_encoder_decoder_embeddings",
        "num_mel_bins",
        "max_source_positions",
        "apply_spec_augment",
    ),
    *("mask_time_prob", "mask_time_length", "mask_time_min_masks", "mask_feature_prob"),
    *("mask_feature_length", "mask_feature_min_masks", "median_filter_width"),
    *("use_weighted_layer_sum", "classifier_proj_size", "cross_attention_hidden_size"),
)
BEHIND = 2  # rows that are not used
DECODER = "model.decoder."


def _read(
    fields: Fields,
    context: str = "max_position_embeddings",
    default: int = 1024,
    scaled: bool = False,
) -> dict[str, Json]:
    found = {ours: fields.whole(theirs) for ours, theirs in SIZES.items()}
    for name in ENCODER:
        fields.get(name)
    scales = fields.flag("scale_embedding", scaled)
    return {
        **LAYER_NORM,
        **found,
        "kv_heads": found["heads"],
        "head_size": found["width"] // found["heads"],
        "context": fields.whole(context, default),
        "positions": "learned",
        "activation": read_activation(fields, "gelu", "activation_function"),
        "norm_epsilon": 1e-5,
        "embedding_scale": found["width"] ** 0.5 if scales else 1.0,
        "qkv_bias": True,
        "output_bias": True,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _read_bart(fields: Fields) -> dict[str, Json]:
    return {**_read(fields), "norm_placement": "residual"}


def _read_plbart(fields: Fields) -> dict[str, Json]:
    return {**_read(fields, scaled=True), "norm_placement": "residual"}


def _read_trocr(fields: Fields) -> dict[str, Json]:
    for name in ("use_learned_position_embeddings", "layernorm_embedding"):
        if not fields.flag(name, True):
            refuse(fields.place(name), True, False)
    return {**_read(fields, default=512), "norm_placement": "residual"}


def _read_marian(fields: Fields) -> dict[str, Json]:
    return {**_read(fields), "norm_placement": "residual", "first_norm": False}


def _read_mbart(fields: Fields) -> dict[str, Json]:
    return {**_read(fields), "embedding_norm": True}


def _read_blenderbot(fields: Fields) -> dict[str, Json]:
    return _read(fields, default=128)


def _read_bigbird(fields: Fields) -> dict[str, Json]:
    fields.values = {"activation_function": "gelu_new", **fields.values}
    for name in ("attention_type", "block_size", "num_random_blocks"):  # of its encoder
        fields.get(name)
    biased = fields.flag("use_bias", False)
    found = _read(fields, default=4096, scaled=True)
    # its class ties nothing, whatever is said
    return {**found, "qkv_bias": biased, "output_bias": biased, "tied": False}


def _read_whisper(fields: Fields) -> dict[str, Json]:
    # its decoder does not scale, whatever is said
    return {**_read(fields, "max_target_positions", 448), "embedding_scale": 1.0}


def _zeros(config: Config, x: Tensor, path: str) -> Tensor:
    """The bias of x, where the family has none."""
    return x.new_zeros(x.shape[0])


def _writer(name: str, context: str) -> Callable[[Config], dict[str, object]]:
    def write(config: Config) -> dict[str, object]:
        own = {"use_bias": config.output_bias} if name == "bigbird_pegasus" else {}
        return {
            **own,
            **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
            context: config.context,
            "activation_function": write_activation(config),
            "scale_embedding": config.embedding_scale != 1.0,
            "tie_word_embeddings": config.tied,
            "encoder_layers": 1,
            "encoder_attention_heads": config.heads,
            "encoder_ffn_dim": config.feed_forward,
            "is_decoder": True,
            "is_encoder_decoder": False,
        }

    return write


def _of_bart(
    name: str,
    architecture: str,
    read: Callable[[Fields], dict[str, Json]],
    *,
    head: str = "lm_head.weight",
    norms: str = "",
    first: str = "",
    behind: int = 0,
    context: str = "max_position_embeddings",
) -> Family:
    """A family of the layout.

    Args:
        head: name of the head.
        norms: the name of the last norm where norms are before; "" is after the sum.
        first: the name of the norm of the embedding; "" is none.
        behind: rows of the table of positions that are not used.
    """
    tensors = {
        "embedding": f"{DECODER}embed_tokens.weight",
        "positions": f"{DECODER}embed_positions.weight",
        "head": head,
        **of_layers(DECODER_LAYER, DECODER + "layers.{}."),
    }
    packs = []
    if norms:
        for kind, bias in PARTS:
            tensors |= {f"norm{bias}": f"{DECODER}{norms}.{kind}"}
            tensors |= {f"embedding_norm{bias}": f"{DECODER}{first}.{kind}"}
    else:
        layer = DECODER + "layers.{}."
        attention, feed_forward = "self_attn_layer_norm", "final_layer_norm"
        packs += after_the_sum(DECODER + first, layer + attention, layer + feed_forward)
    if head.startswith("proj_out"):  # keys of Whisper have no bias
        key = f"{DECODER}layers.{{}}.self_attn.k_proj.weight"
        packs.append(implied(["layers.{}.k", "layers.{}.k_bias"], key, _zeros))
    if behind:
        packs.append(sliced("positions", f"{DECODER}embed_positions.weight", behind))
    return Family(
        name,
        architecture,
        read,
        _writer(name, context),
        tensors,
        packs=tuple(packs),
        harmless=re.compile(r"model\.decoder\.layers\.\d+\.encoder_attn(_layer_norm)?\..*"),
        prefix="",
    )


EMBEDDING = "layernorm_embedding"
BARTS = (
    _of_bart("bart", "BartForCausalLM", _read_bart, first=EMBEDDING, behind=BEHIND),
    _of_bart("plbart", "PLBartForCausalLM", _read_plbart, first=EMBEDDING, behind=BEHIND),
    _of_bart("mvp", "MvpForCausalLM", _read_bart, first=EMBEDDING, behind=BEHIND),
    _of_bart(
        "trocr",
        "TrOCRForCausalLM",
        _read_trocr,
        head="output_projection.weight",
        first=EMBEDDING,
        behind=BEHIND,
    ),
    _of_bart("marian", "MarianForCausalLM", _read_marian),
    _of_bart(
        "mbart", "MBartForCausalLM", _read_mbart, norms="layer_norm", first=EMBEDDING, behind=BEHIND
    ),
    _of_bart("pegasus", "PegasusForCausalLM", _read, norms="layer_norm"),
    _of_bart(
        "bigbird_pegasus",
        "BigBirdPegasusForCausalLM",
        _read_bigbird,
        norms=EMBEDDING,
    ),
    _of_bart("blenderbot", "BlenderbotForCausalLM", _read_blenderbot, norms="layer_norm"),
    _of_bart(
        "whisper",
        "WhisperForCausalLM",
        _read_whisper,
        head="proj_out.weight",
        norms="layer_norm",
        context="max_target_positions",
    ),
)
