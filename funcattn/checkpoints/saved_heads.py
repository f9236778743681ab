"""Writing trained heads in the layout of vLLM's speculators, which `load_head` reads back."""

import json
import os
from collections.abc import Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..core import atomic
from ..core.doors import door, what_is
from ..core.errors import fail, is_count
from ..decoding.speculative.heads import Head, HeadParams
from ..records import is_absent
from ..transformer import Params, lm_head
from .families import CheckpointError, families_for
from .families.config_json import NO_IDS
from .heads import FAMILIES, LAYER, NAMES, WEIGHTS
from .hf.saving import check_place
from .writing import written

FIRST = {"eagle3": "", "mtp": "mtp."}  # in front of the names of a head's own tensors
COMMON = ("embedding", "head")  # which have none
ARCHITECTURES = {"eagle3": "Eagle3Speculator", "mtp": "MTPSpeculator"}


@door(name="drafters.save_head")
def save_head(
    folder: str | os.PathLike[str],
    head: Head,
    params: HeadParams,
    *,
    target: Params | None = None,
    length: int = 3,
) -> None:
    """Write a trained head: config.json and model.safetensors in vLLM's layout for speculators.

    The folder is written beside its target and exchanged for it in one step, as in `fa.save`.

    Args:
        folder: a new one, or one that `save_head` wrote, which is replaced.
        head, params: from `train_head` or `load_head`; weights are floating tensors.
        target: the params of the model that it drafts for: its embedding and its matrix of logits,
            where the head's are the same tensors, are left out of the file and are the target's
            again when it is loaded. None writes all.
        length: how many tokens the file proposes to draft.

    Raises:
        CheckpointError: the folder cannot be written, or has other files; layers that no family
            of the layout has.
        TypeError: weights that are not floating tensors.

    Law: load_head(save_head(...)) is what was saved, bit for bit (test_saved_heads.py).
    """
    if not isinstance(head, Head) or not isinstance(params, HeadParams):
        got = f"a {what_is(head)} and a {what_is(params)}"
        remedy = "The order is folder, head, params."
        fail("drafters.save_head", "head, params", "a Head, HeadParams", got, remedy, TypeError)
    if not is_count(length, 1):
        fail("drafters.save_head", "length", "an int, at least 1", repr(length), "3 is usual.")
    tensors = _tensors(head, params, target)
    settings = json.dumps(_settings(head, params, length), indent=2, allow_nan=False)
    check_place(folder)
    with written("drafters.save_head", folder), atomic.folder(folder) as draft:
        (draft / "config.json").write_text(settings, encoding="utf-8")
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})


def _settings(head: Head, params: HeadParams, length: int) -> Mapping[str, object]:
    rows = head.config.vocabulary if is_absent(params.ids) else len(params.ids)
    proposal = {"proposal_type": "greedy", "speculative_tokens": length}
    dtype = params.fuse.dtype if isinstance(params.fuse, Tensor) else torch.float32
    return {
        "architectures": [ARCHITECTURES[head.kind]],
        "speculators_model_type": head.kind,
        "speculators_config": {
            "algorithm": head.kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
        },
        "transformer_layer_config": _layers(head),
        "draft_vocab_size": rows,
        "norm_before_residual": head.norm_before_residual,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    } | ({"eagle_aux_hidden_state_layer_ids": _layer_ids(head)} if head.kind == "eagle3" else {})


def _layers(head: Head) -> Mapping[str, object]:
    for family in families_for(head.config):
        if family.name in FAMILIES:
            values = {"model_type": family.name, **NO_IDS, **family.write(head.config)}
            return {name: value for name, value in values.items() if name != "architectures"}
    wanted, remedy = f"layers that one of {', '.join(FAMILIES)} has", "Keep it with torch.save."
    fail("drafters.save_head", "head", wanted, repr(head.config), remedy, CheckpointError)


def _layer_ids(head: Head) -> list[int]:
    """The layers in front of which the taps are, as numbers."""
    found = []
    for name in head.taps:
        first, _, rest = name.partition(".")
        number = rest.removesuffix(".output")
        if name == "embedding":
            found.append(0)
        elif first == "layers" and rest != number and number.isdigit():
            found.append(int(number) + 1)
        else:
            wanted = "embedding or layers.N.output"
            remedy = "Only outputs of layers have a place in the layout."
            fail("drafters.save_head", "taps", wanted, name, remedy, CheckpointError)
    return found


def _tensors(head: Head, params: HeadParams, target: Params | None) -> dict[str, Tensor]:
    theirs = {} if target is None else {"embedding": target.embedding, "head": lm_head(target)}
    if not is_absent(params.ids):
        theirs.pop("head", None)
    found: dict[str, Tensor] = {}
    # The first name of each field; more are read than are written.
    names = {field: name for name, field in reversed(NAMES[head.kind].items())}
    for field, name in names.items():
        weight = getattr(params, field)
        if theirs.get(field) is not weight or is_absent(weight):
            prefix = "" if field in COMMON else FIRST[head.kind]
            found[f"{prefix}{name}"] = _own(field, weight)
    in_layer = {field: name for name, field in LAYER.items()}
    for n, layer in enumerate(params.layers):
        for field in layer._fields:
            weight = getattr(layer, field)
            if is_absent(weight):
                continue
            if field not in in_layer:
                wanted, remedy = "layers of the layout", "Keep it with torch.save."
                got = f"one with {field}"
                fail("drafters.save_head", f"layer {n}", wanted, got, remedy, CheckpointError)
            name = f"{FIRST[head.kind]}layers.{n}.{in_layer[field]}"
            found[name] = _own(field, weight)
    if not is_absent(params.ids):
        ids = params.ids.cpu()
        found["d2t"] = ids - torch.arange(len(ids))
        known = torch.zeros(head.config.vocabulary, dtype=torch.bool)
        found["t2d"] = known.index_fill(0, ids, True)
    return found


def _own(field: str, weight: object) -> Tensor:
    """A contiguous copy on the CPU: safetensors rejects tensors with common memory."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        remedy = "Save it before it is quantized: fa.dequantize(params)."
        got = what_is(weight)
        fail("drafters.save_head", field, "a floating tensor", got, remedy, TypeError)
    return weight.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
