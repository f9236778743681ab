"""Trained heads on disk: EAGLE-3 and MTP in the layout of vLLM's speculators.

A folder has config.json and model.safetensors. The layers are those of a Llama, by
`transformer_layer_config`, or by config.json itself as the first EAGLE-3 heads were published. What
a file does not have (the embedding, the matrix of the head) is the target's.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.doors import door, what_is
from ..core.errors import fail
from ..decoding.speculative.heads import Head, HeadParams
from ..models import Model
from ..records import ABSENT, is_absent
from ..transformer import Config, Layer, Params, check_one, lm_head, why_not
from .families import CheckpointError, read_config
from .families.tables import Json
from .regular_files import check_regular, of_one_save, read_json

WEIGHTS = "model.safetensors"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose layers have the names below
IGNORED = {  # which change no number
    *("architectures", "auto_map", "speculators_version", "speculators_config", "model_type"),
    *("transformers_version", "dtype", "torch_dtype", "has_no_defaults_at_init"),
    *("tie_word_embeddings", "target_hidden_size", "embed_requires_grad", "_name_or_path"),
}
OWN = ("draft_vocab_size", "norm_before_residual", "eagle_aux_hidden_state_layer_ids")
LAYER = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "post_attention_layernorm.weight": "feed_forward_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
COMMON = {
    "fc.weight": "fuse",
    "embed_tokens.weight": "embedding",
    "norm.weight": "norm",
    "lm_head.weight": "head",
}
NAMES = {
    "eagle3": COMMON
    | {
        "layers.0.input_layernorm.weight": "embedding_norm",
        "layers.0.hidden_norm.weight": "hidden_norm",
    },
    "mtp": COMMON
    | {
        "pre_fc_norm_embedding.weight": "embedding_norm",
        "pre_fc_norm_hidden.weight": "hidden_norm",
        "enorm.weight": "embedding_norm",
        "hnorm.weight": "hidden_norm",
        "eh_proj.weight": "fuse",
    },
}


@door(name="drafters.load_head")
def load_head(
    folder: str | os.PathLike[str], model: Model, params: Params
) -> tuple[Head, HeadParams]:
    """Load a trained head that drafts for a model: EAGLE-3 or MTP.

    Args:
        folder: of config.json and model.safetensors.
        model, params: the target, whose sizes the head must fit; its weights stand in for what the
            file leaves out. The head is cast to their dtype.

    Returns:
        (head, params) for `fa.drafters.head`.

    Raises:
        FileNotFoundError: a file that is not there.
        CheckpointError: fields or tensors that are not known, missing, or of another shape.

    Law: its logits are those of a plain implementation (test_checkpoints_heads.py).
    """
    config = model.config
    if not isinstance(config, Config):
        remedy = "Make it with fa.decoder(config)."
        fail("drafters.load_head", "model", "from fa.decoder", what_is(model), remedy, TypeError)
    place = Path(folder)
    return of_one_save(place, ("config.json", WEIGHTS), lambda: _load(place, config, params))


def _load(folder: Path, target: Config, params: Params) -> tuple[Head, HeadParams]:
    check_one("drafters.load_head", target)
    values = read_json(folder / "config.json")
    kind = str(values.get("speculators_model_type", "eagle3"))
    if kind not in NAMES:
        _refuse("speculators_model_type", f"one of {', '.join(NAMES)}", kind)
    inner = values.get("transformer_layer_config")
    known = {*OWN, *IGNORED, "speculators_model_type", "transformer_layer_config"}
    if isinstance(inner, dict):
        settings: Mapping[str, Json] = inner
        unknown = sorted(values.keys() - known)
        if unknown:
            _refuse("the fields of config.json", "known ones", ", ".join(unknown))
    else:
        settings = {name: value for name, value in values.items() if name not in OWN}
    if settings.get("model_type") not in FAMILIES:
        _refuse(
            "model_type of the layers", f"one of {', '.join(FAMILIES)}", settings.get("model_type")
        )
    config = read_config(settings)
    if why := why_not(config):
        _refuse("the fields of its layers", "those of a plain decoder", why)
    if config.width != target.width:
        _refuse("hidden_size", f"that of the target, {target.width}", config.width)
    layers = target.layers
    ids = values.get("eagle_aux_hidden_state_layer_ids") or [2, layers // 2, layers - 3]
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i <= layers for i in ids):
        _refuse("eagle_aux_hidden_state_layer_ids", f"ids from 0 to {layers}", ids)
    # The residual in front of layer i.
    names = [f"layers.{i - 1}.output" if i else "embedding" for i in ids if isinstance(i, int)]
    taps = tuple(names) if kind == "eagle3" else ("output",)
    config = dataclasses.replace(config, vocabulary=target.vocabulary, tied=False)
    before = values.get("norm_before_residual", False)
    if not isinstance(before, bool):
        _refuse("norm_before_residual", "true or false", before)
    head = Head(kind, config, taps, before)
    return head, _weights(folder, head, target, params)


def _weights(folder: Path, head: Head, target: Config, params: Params) -> HeadParams:
    dtype = params.norm.dtype if isinstance(params.norm, Tensor) else torch.get_default_dtype()
    tensors = _tensors(folder)
    offsets, flags = tensors.pop("d2t", None), tensors.pop("t2d", None)
    fields: dict[str, Tensor] = {}
    each: list[dict[str, Tensor]] = [{} for _ in range(head.config.layers)]
    for name, tensor in tensors.items():
        field = NAMES[head.kind].get(name)
        number, _, rest = name.removeprefix("layers.").partition(".")
        if field is not None:
            fields[field] = tensor.to(dtype)
        elif name.startswith("layers.") and number.isdigit() and rest in LAYER:
            if int(number) >= len(each):
                _refuse("num_hidden_layers", f"above {number}, as there is {name}", len(each))
            each[int(number)][LAYER[rest]] = tensor.to(dtype)
        else:
            _refuse("the tensors", f"those of a head of the kind {head.kind}", name)
    fields.setdefault("embedding", params.embedding)
    fields.setdefault("head", lm_head(params))
    ids = ABSENT if offsets is None else _ids(offsets, flags, target.vocabulary)
    found = HeadParams(
        *(fields.pop(name, ABSENT) for name in HeadParams._fields[:4]),  # pyright: ignore[reportArgumentType]
        layers=tuple(Layer(**layer) for layer in each),
        norm=fields.pop("norm", ABSENT),
        head=fields.pop("head"),
        ids=ids,
    )
    _check_shapes(head, target, found)
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a file, their names without the prefixes of a model around them."""
    path = folder / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"drafters.load_head: {path} should be there. Fetch it again.")
    check_regular(path)
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                short = name.removeprefix("model.").removeprefix("mtp.")
                short = short.replace("midlayer.", "layers.0.", 1)
                found[short] = file.get_tensor(name).clone()
    except SafetensorError as error:
        _refuse(WEIGHTS, "safetensors", f"an error: {str(error)[:200]}")
    return found


def _ids(offsets: Tensor, flags: Tensor | None, V: int) -> Tensor:
    """The target's token of each token of the head: its number and the offset."""
    if offsets.dim() != 1 or offsets.dtype not in (torch.int64, torch.int32):
        _refuse("d2t", "offsets int64 (Vd,)", what_is(offsets))
    ids = torch.arange(len(offsets)) + offsets.long()
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= V or len(ids.unique()) != len(ids)):
        _refuse("d2t", f"offsets to different tokens below {V}", "others")
    if (
        flags is not None
        and flags.bool().nonzero().squeeze(-1).tolist() != ids.sort().values.tolist()
    ):
        _refuse("t2d", "true at the tokens of d2t", "true at others")
    return ids


def _check_shapes(head: Head, target: Config, params: HeadParams) -> None:
    config = head.config
    E, D, F = config.width, config.head_size, config.feed_forward
    Q, KV = config.heads * D, config.kv_heads * D
    eagle = head.kind == "eagle3"
    wanted: dict[str, tuple[int, ...]] = {
        "fuse": (E, len(head.taps) * target.width if eagle else 2 * E)
    }
    wanted |= dict.fromkeys(("embedding_norm", "hidden_norm", "norm"), (E,))
    for name, shape in wanted.items():
        _check_shape(name, getattr(params, name), shape)
    if not is_absent(params.ids):
        _check_shape("head", params.head, (len(params.ids), E))
    for n, layer in enumerate(params.layers):
        read = 2 * E if eagle and not n else E
        needed = {"q": (Q, read), "k": (KV, read), "v": (KV, read), "o": (E, Q)}
        needed |= {"feed_forward_norm": (E,), "gate": (F, E), "up": (F, E), "down": (E, F)}
        needed |= {} if eagle and not n else {"attention_norm": (E,)}
        needed |= {"q_bias": (Q,), "k_bias": (KV,), "v_bias": (KV,)} if config.qkv_bias else {}
        needed |= {"q_norm": (D,), "k_norm": (D,)} if config.head_norm == "rms" else {}
        for name, shape in needed.items():
            _check_shape(f"layers.{n}.{name}", getattr(layer, name), shape)
        more = [
            name
            for name in layer._fields
            if name not in needed and not is_absent(getattr(layer, name))
        ]
        if more:
            _refuse(f"layers.{n}", "the tensors that its config has", ", ".join(more))


def _check_shape(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    if is_absent(tensor):
        _refuse(name, f"{shape}", "none")
    if isinstance(tensor, Tensor) and tuple(tensor.shape) != shape:
        _refuse(name, f"{shape}", tuple(tensor.shape))


def _refuse(what: str, wanted: str, got: object) -> NoReturn:
    remedy = "Take a head of this target, in the layout of vLLM's speculators."
    fail("drafters.load_head", what, wanted, got, remedy, CheckpointError)
