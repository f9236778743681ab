"""Adaptations of low rank in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   (r, in)       params.layers[3].q.a
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   (out, r)      params.layers[3].q.b

Names are those of Llama and its kin (Mistral, Qwen, SmolLM): families whose projections are matrices of their own.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import tree
from .._checks import fail, shape
from ..families import CheckpointError
from ..low_rank import Lora, is_adapted
from ..tree import Tree

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAMES = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
REFUSED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias", "use_qalora")


def save_lora(folder: str | os.PathLike[str], params: Tree, *, base: str = "") -> None:
    """Write the adaptations of params, and nothing of their bases, as PEFT writes them.

    Args:
        folder: new, or one that holds an adaptation, whose two files are replaced.
        base: the name or path of the model that was adapted, which PEFT's readers look for.

    Raises:
        ValueError: no adaptations, one of a weight that has no name there, or several of different rank or scale.
        CheckpointError: the folder cannot be written.

    Law: load_lora(save_lora(...)) is what was saved (test_low_rank.py::test_an_adaptation_comes_back_bit_for_bit).
    """
    found = {path: weight for path, weight in tree.items(params, is_leaf=is_adapted) if is_adapted(weight)}
    if not found:
        fail("save_lora", "params", "adapted", "plain ones", "Adapt them with fa.lora.")
    tensors, kinds = {}, {(weight.a.shape[0], float(weight.scale)) for weight in found.values()}
    if len(kinds) > 1:
        fail("save_lora", "params", "of one rank and scale", f"{sorted(kinds)}", "Save adaptations of each rank on their own.")
    for path, weight in found.items():
        name = _name(path)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (_own(x) for x in (weight.a, weight.b))
    rank, scale = kinds.pop()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(scale * rank) if float(scale * rank).is_integer() else scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({_name(path).rpartition(".")[2] for path in found}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
    target = Path(folder)
    drafts = {target / name: target / f".{name}.{uuid.uuid4().hex}" for name in (TENSORS, CONFIG)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, drafts[target / TENSORS], metadata={"format": "pt"})
        drafts[target / CONFIG].write_text(json.dumps(settings, indent=2), encoding="utf-8")
        for path, draft in drafts.items():
            with open(draft, "rb") as file:
                os.fsync(file.fileno())
            draft.replace(path)
    except (OSError, SafetensorError) as error:
        remedy = "Choose a place that can be written, with room for it."
        raise CheckpointError(f"save_lora: {target} should be a folder that can be written, got {error}. {remedy}") from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def load_lora(folder: str | os.PathLike[str], params: Tree) -> Tree:
    """params with the adaptations of a folder in PEFT's layout.

    Args:
        params: of the model that was adapted; plain or quantized weights, not yet adapted.

    Raises:
        CheckpointError: it is damaged, does not fit, or asks for what would be another function (DoRA, trained biases, patterns).
    """
    place = Path(folder)

    def refuse(what: str, wanted: str, got: Any, remedy: str) -> NoReturn:
        fail("load_lora", f"{what} of {place}", wanted, got, remedy, CheckpointError)

    try:
        settings = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(place / TENSORS)
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        refuse("the files", f"{CONFIG} and {TENSORS}, as PEFT writes them", f"{type(error).__name__} {error}", "Save it again.")
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        refuse(
            "the kind", "LORA without biases", f"{settings.get('peft_type')}, bias {settings.get('bias')}", "Merge it with PEFT."
        )
    for name in REFUSED:
        if settings.get(name):
            refuse(name, "absent", settings[name], "Merge it with PEFT, and load the whole model.")
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    weights = dict(tree.items(params, is_leaf=_is_matrix))
    paths = {_name(path): path for path in weights if _is_named(path)}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, which = name.removesuffix(".weight").rpartition(".")
        if module not in paths or which not in ("lora_A", "lora_B"):
            refuse(name, "an adaptation of a matrix of these params", "another", "Give the params of the model that was adapted.")
        pairs.setdefault(paths[module], {})[which] = tensor

    def adapted(path: str, weight: Any) -> Any:
        if path not in pairs:
            return weight
        a, b = pairs[path].get("lora_A"), pairs[path].get("lora_B")
        out, inner = shape(weight) if isinstance(weight, Tensor) else weight.shape
        if a is None or b is None or shape(a) != (rank, inner) or shape(b) != (out, rank):
            got = "one is absent" if a is None or b is None else f"{shape(a)} and {shape(b)}"
            refuse(path, f"lora_A {(rank, inner)} and lora_B {(out, rank)}", got, "Give the params that were adapted.")
        device = tree.leaves(weight)[0].device
        base = weight.dtype if isinstance(weight, Tensor) else torch.float32  # which a half adaptation is added in, as PEFT does
        a, b = (x.to(device, torch.promote_types(base, x.dtype)) for x in (a, b))
        return Lora(weight, a, b, torch.full((), scale, dtype=torch.float32, device=device))

    return tree.map_with_path(adapted, params, is_leaf=_is_matrix)


def _is_matrix(node: Any) -> bool:
    return isinstance(node, Tensor) or (hasattr(node, "_fields") and isinstance(getattr(node, "shape", None), tuple))


def _is_named(path: str) -> bool:
    parts = path.split(".")
    return len(parts) == 3 and parts[0] == "layers" and parts[2] in NAMES


def _name(path: str) -> str:
    if not _is_named(path):
        fail(
            "save_lora",
            "params",
            f"adapted in {', '.join(NAMES)} of layers",
            f"in {path}",
            "PEFT's layout has no name for it here.",
        )
    _, number, name = path.split(".")
    return f"base_model.model.model.layers.{number}.{NAMES[name]}"


def _own(x: Tensor) -> Tensor:
    return x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
