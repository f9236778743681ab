"""Decoders of the layout of BERT: `is_decoder`, without cross-attention.

bert bert-generation ernie electra big_bird          norms after the sum
roberta camembert xlm-roberta data2vec-text          the same, positions from the third row
roberta-prelayernorm xlm-roberta-xl megatron-bert    norms before

A norm after the sum is the norm of the residual before the next part: that of the embedding is the
first of attention, and the last is the norm of the model. Rows of token types other than the first
are not used, and a text holds no padding.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...transformer import Config
from .conventions import read_activation, write_activation
from .gpt import LAYER_NORM, PARTS, of_layers
from .layouts import placed, renamed
from .tables import Family, Fields, Json, Pack, refuse

LAYER = "encoder.layer.{}."
SIZES = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
}
TYPES = (1, 2, 4)  # rows of the table of token types


def _read(
    fields: Fields, epsilon: float = 1e-12, types: int = 2, pad: int = 0, rows: int = 512
) -> dict[str, Json]:
    if not fields.flag("is_decoder", False):
        refuse(fields.place("is_decoder"), "true: an encoder sees what comes after", False)
    found = {ours: fields.whole(theirs) for ours, theirs in SIZES.items()}
    if types and fields.whole("type_vocab_size", types) not in TYPES:
        got = fields.get("type_vocab_size")
        refuse(fields.place("type_vocab_size"), " or ".join(map(str, TYPES)), got)
    padding = None if fields.says("pad_token_id") else pad
    if pad and fields.get("pad_token_id", padding) != pad:  # positions begin behind it
        refuse(fields.place("pad_token_id"), pad, fields.get("pad_token_id"))
    kind = fields.get("position_embedding_type", "absolute")
    if kind != "absolute":
        refuse(fields.place("position_embedding_type"), "absolute", kind)
    behind = pad + 1 if pad else 0
    context = fields.whole("max_position_embeddings", rows)
    if context <= behind:
        refuse(fields.place("max_position_embeddings"), f"above {behind}", context)
    return {
        **LAYER_NORM,
        **found,
        "kv_heads": found["heads"],
        "head_size": found["width"] // found["heads"],
        "context": context - behind,
        "positions": "learned",
        "activation": read_activation(fields, "gelu"),
        "norm_epsilon": fields.positive("layer_norm_eps", epsilon),
        "qkv_bias": True,
        "output_bias": True,
        "head_bias": True,
        "head_transform": True,
        "tied": fields.flag("tie_word_embeddings", True),
    }


def _read_after(fields: Fields) -> dict[str, Json]:
    return {**_read(fields), "norm_placement": "residual"}


def _read_generation(fields: Fields) -> dict[str, Json]:
    found = {**_read(fields, types=0), "norm_placement": "residual"}
    return {**found, "head_transform": False}


def _of_gelu(found: dict[str, Json], fields: Fields) -> dict[str, Json]:
    """Of families whose head has the exact gelu, whatever the layers have."""
    if found["activation"] != "gelu":
        refuse(fields.place("hidden_act"), "gelu", fields.get("hidden_act"))
    return found


def _read_ernie(fields: Fields) -> dict[str, Json]:
    fields.whole("task_type_vocab_size", 3)
    return _read_after(fields)


def _read_big_bird(fields: Fields) -> dict[str, Json]:
    fields.values = {"hidden_act": "gelu_new", **fields.values}
    if fields.get("attention_type", "block_sparse") != "original_full":
        got = fields.get("attention_type", "block_sparse")
        refuse(fields.place("attention_type"), "original_full, as in a decoder", got)
    for name in ("block_size", "num_random_blocks"):
        fields.get(name)
    return {**_read(fields, rows=4096), "norm_placement": "residual"}


def _read_electra(fields: Fields) -> dict[str, Json]:
    found = _of_gelu(_read_after(fields), fields)
    fields.get("summary_last_dropout")
    size = fields.whole("embedding_size", 128)
    if size != found["width"]:
        refuse(fields.place("embedding_size"), f"hidden_size = {found['width']}", size)
    return found


def _read_roberta(fields: Fields) -> dict[str, Json]:
    return {**_of_gelu(_read(fields, pad=1), fields), "norm_placement": "residual"}


def _read_prelayernorm(fields: Fields) -> dict[str, Json]:
    return {**_of_gelu(_read(fields, pad=1), fields), "embedding_norm": True}


def _read_xl(fields: Fields) -> dict[str, Json]:
    return _of_gelu(_read(fields, epsilon=1e-5, types=1, pad=1, rows=514), fields)


def _writer(name: str, types: bool, pad: int) -> Callable[[Config], dict[str, object]]:
    def write(config: Config) -> dict[str, object]:
        own = {"embedding_size": config.width} if name == "electra" else {}
        own |= {"attention_type": "original_full"} if name == "big_bird" else {}
        return {
            **own,
            **({"type_vocab_size": 1} if types else {}),
            **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
            "max_position_embeddings": config.context + (pad + 1 if pad else 0),
            "hidden_act": write_activation(config),
            "layer_norm_eps": config.norm_epsilon,
            "pad_token_id": pad or None,
            "is_decoder": True,
            "tie_word_embeddings": config.tied,
        }

    return write


def _positions(prefix: str, behind: int, rows: tuple[int, ...] = TYPES) -> Pack:
    """Positions with the row of the first token type added, of so many rows."""
    names = tuple(f"{prefix}embeddings.{x}_embeddings.weight" for x in ("position", "token_type"))

    def unpack(config: Config, tensors: list[Tensor]) -> list[Tensor]:
        positions, types = tensors
        return [positions[behind:] + types[0]]

    def pack(config: Config, leaves: list[Tensor]) -> list[Tensor]:
        table, width = leaves[0], leaves[0].shape[-1]
        return [
            torch.cat([table.new_zeros(behind, width), table]),
            table.new_zeros(rows[0], width),
        ]

    other = _positions(prefix, behind, rows[1:]) if len(rows) > 1 else None
    return Pack(("positions",), names, unpack, pack, other=other)


def after_the_sum(first: str, attention: str, feed_forward: str) -> tuple[Pack, ...]:
    """The norms of a family that has them after the sum.

    Args:
        first: that of the embedding; "" where there is none.
        attention, feed_forward: those after them, templates of a layer.
    """
    packs = []
    for kind, bias in PARTS:
        path = f"layers.{{}}.attention_norm{bias}"
        before = feed_forward.replace("{}", "{before}")
        last = feed_forward.replace("{}", "{last}")
        packs += [
            placed(path, f"{first}.{kind}", lambda config, layer: layer == 0),
            placed(path, f"{before}.{kind}", lambda config, layer: layer > 0),
            renamed(f"layers.{{}}.feed_forward_norm{bias}", f"{attention}.{kind}", lambda _: True),
            renamed(f"norm{bias}", f"{last}.{kind}", lambda _: True),
        ]
    return tuple(packs)


def _of_bert(
    name: str,
    architecture: str,
    read: Callable[[Fields], dict[str, Json]],
    body: str,
    head: Mapping[str, str],
    *,
    norms: Mapping[str, str] | None = None,
    types: bool = True,
    pad: int = 0,
    neutral: Mapping[str, tuple[object, ...]] | None = None,
) -> Family:
    """A family of the layout.

    Args:
        body: prefix of its tensors.
        head: leaves of the head -> names, without weight and bias.
        norms: leaves of norms before, by name; None is after the sum.
        types: whether it has token types.
        pad: the id of padding, behind which positions begin; 0 is none.
    """
    layer, packs = body + LAYER, []
    tensors = {
        "embedding": f"{body}embeddings.word_embeddings.weight",
        "positions": f"{body}embeddings.position_embeddings.weight",
        **of_layers(
            (
                *((x[0], f"attention.self.{x}") for x in ("query", "key")),
                ("v", "attention.self.value"),
                ("o", "attention.output.dense"),
                ("up", "intermediate.dense"),
                ("down", "output.dense"),
            ),
            layer,
        ),
    }
    for path, where in {**head, **(norms or {})}.items():
        at = layer + where if path.startswith("layers.") else where
        tensors |= {f"{path}{bias}": f"{at}.{kind}" for kind, bias in PARTS}
    tensors["head_bias"] = head["head_bias"]
    if norms is None:
        first, attention = f"{body}embeddings.LayerNorm", "attention.output.LayerNorm"
        packs += after_the_sum(first, layer + attention, layer + "output.LayerNorm")
    if types:
        packs.append(_positions(body, pad + 1 if pad else 0))
    return Family(
        name,
        architecture,
        read,
        _writer(name, types, pad),
        tensors,
        packs=tuple(packs),
        neutral=neutral or {},
        harmless=re.compile(
            r".*(position_ids|token_type_ids|pooler\..*|seq_relationship\..*)"
            r"|(cls\.predictions|lm_head)\.decoder\.bias"
        ),
        prefix=body,
    )


CLS, LM = "cls.predictions.", "lm_head."
BERT_HEAD = {
    "transform": CLS + "transform.dense",
    "transform_norm": CLS + "transform.LayerNorm",
    "head": CLS + "decoder",
    "head_bias": CLS + "bias",
}
ROBERTA_HEAD = {
    "transform": LM + "dense",
    "transform_norm": LM + "layer_norm",
    "head": LM + "decoder",
    "head_bias": LM + "bias",
}
BERT = _of_bert("bert", "BertLMHeadModel", _read_after, "bert.", BERT_HEAD)
BERT_GENERATION = _of_bert(
    "bert-generation",
    "BertGenerationDecoder",
    _read_generation,
    "bert.",
    {"head": LM + "decoder", "head_bias": LM + "bias"},
    types=False,
)
ERNIE = _of_bert(
    "ernie", "ErnieForCausalLM", _read_ernie, "ernie.", BERT_HEAD, neutral={"use_task_id": (False,)}
)
BIG_BIRD = _of_bert(
    "big_bird",
    "BigBirdForCausalLM",
    _read_big_bird,
    "bert.",
    BERT_HEAD,
    neutral={"use_bias": (True,), "rescale_embeddings": (False,)},
)
ELECTRA = _of_bert(
    "electra",
    "ElectraForCausalLM",
    _read_electra,
    "electra.",
    {
        "transform": "generator_predictions.dense",
        "transform_norm": "generator_predictions.LayerNorm",
        "head": "generator_lm_head",
        "head_bias": "generator_lm_head.bias",
    },
)
ROBERTA, CAMEMBERT, XLM_ROBERTA, DATA2VEC = (
    _of_bert(name, architecture, _read_roberta, body, ROBERTA_HEAD, pad=1)
    for name, architecture, body in (
        ("roberta", "RobertaForCausalLM", "roberta."),
        ("camembert", "CamembertForCausalLM", "roberta."),
        ("xlm-roberta", "XLMRobertaForCausalLM", "roberta."),
        ("data2vec-text", "Data2VecTextForCausalLM", "data2vec_text."),
    )
)
PRELAYERNORM = _of_bert(
    "roberta-prelayernorm",
    "RobertaPreLayerNormForCausalLM",
    _read_prelayernorm,
    "roberta_prelayernorm.",
    {
        **ROBERTA_HEAD,
        "embedding_norm": "roberta_prelayernorm.embeddings.LayerNorm",
        "norm": "roberta_prelayernorm.LayerNorm",
    },
    norms={
        "layers.{}.attention_norm": "attention.LayerNorm",
        "layers.{}.feed_forward_norm": "intermediate.LayerNorm",
    },
    pad=1,
)
XLM_ROBERTA_XL = _of_bert(
    "xlm-roberta-xl",
    "XLMRobertaXLForCausalLM",
    _read_xl,
    "roberta.",
    {**ROBERTA_HEAD, "norm": "roberta.encoder.LayerNorm"},
    norms={
        "layers.{}.attention_norm": "attention.self_attn_layer_norm",
        "layers.{}.feed_forward_norm": "LayerNorm",
    },
    pad=1,
)
MEGATRON_BERT = _of_bert(
    "megatron-bert",
    "MegatronBertForCausalLM",
    _read,
    "bert.",
    {**BERT_HEAD, "norm": "bert.encoder.ln"},
    norms={"layers.{}.attention_norm": "attention.ln", "layers.{}.feed_forward_norm": "ln"},
)
BERTS = (
    *(BERT, BERT_GENERATION, ERNIE, ELECTRA, BIG_BIRD, ROBERTA, CAMEMBERT, XLM_ROBERTA, DATA2VEC),
    *(PRELAYERNORM, XLM_ROBERTA_XL, MEGATRON_BERT),
)
