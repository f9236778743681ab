"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight  (r, in)   params.layers[3].q.a
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight  (out, r)  params.layers[3].q.b

Names are those of Llama-like families (Mistral, Qwen, SmolLM), with one matrix per projection.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import tree
from ...core import atomic
from ...core.errors import fail, shape
from ...layers import Weight
from ...low_rank import Lora, is_adapted
from ...tree import Tree
from ..families import CheckpointError
from ..regular_files import check_regular, of_one_save, read_json
from ..writing import written
from .peft_settings import read_settings, target_names
from .weights import DTYPES

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAMES = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
PICKLED = ("adapter_model.bin", "adapter_model.pt")
PREFIX = "base_model.model."  # PEFT's prefix of a model's names


def save_lora(folder: str | os.PathLike[str], params: Tree, *, base: str = "") -> None:
    """Write the LoRA factors of params, without the base weights, in PEFT's layout.

    Args:
        folder: new, or with an adapter, whose two files are replaced in one step; other files are
            kept.
        params: with leaves adapted by `fa.lora`.
        base: the name or path of the base model, which PEFT's readers look for.

    Raises:
        ValueError: no adapters, one of a weight without a name in PEFT, or adapters of different
            ranks or scales.
        CheckpointError: the folder cannot be written.

    Law: load_lora(save_lora(...)) is what was saved
        (test_low_rank.py::test_an_adaptation_comes_back_bit_for_bit).
    """
    found = {
        path: weight
        for path, weight in tree.items(params, is_leaf=is_adapted)
        if is_adapted(weight)
    }
    if not found:
        fail("save_lora", "params", "adapted", "plain ones", "Adapt them with fa.lora.")
    matrices = dict(tree.items(params, is_leaf=_is_matrix))
    tensors, kinds = {}, {(weight.a.shape[0], float(weight.scale)) for weight in found.values()}
    if len(kinds) > 1:
        fail(
            "save_lora",
            "params",
            "of one rank and scale",
            f"{sorted(kinds)}",
            "Save adaptations of each rank on their own.",
        )
    for path, weight in found.items():
        name = _name(path)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (
            _own(x) for x in (weight.a, weight.b)
        )
    rank, scale = kinds.pop()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(scale * rank) if float(scale * rank).is_integer() else scale * rank,
        "lora_dropout": 0.0,
        "target_modules": target_names(_modules(found), _modules(set(matrices) - found.keys())),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
    with written("save_lora", folder), atomic.files(folder, last=CONFIG) as draft:
        save_file(tensors, draft / TENSORS, metadata={"format": "pt"})
        (draft / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def load_lora(folder: str | os.PathLike[str], params: Tree) -> Tree:
    """params with the LoRA adapters of a folder in PEFT's layout.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        params: of the base model; plain or quantized weights without adapters.

    Raises:
        CheckpointError: it is damaged, does not fit, or has a field that is unknown or defines
            another function than LoRA (DoRA, trained biases, patterns, an initialization that
            changes the base as PiSSA's, tokens that activate it); the message names the field.
    """
    place = Path(folder)
    return of_one_save(place, (CONFIG,), lambda: _read_lora(place, params))


def _read_lora(place: Path, params: Tree) -> Tree:
    def refuse(what: str, wanted: str, got: object, remedy: str) -> NoReturn:
        fail("load_lora", f"{what} of {place}", wanted, got, remedy, CheckpointError)

    files = f"{CONFIG} and {TENSORS}, as PEFT writes them"
    weights = dict(tree.items(params, is_leaf=_is_matrix))
    paths = {_name(path): path for path in weights if _is_named(path)}
    try:
        values = read_json(place / CONFIG, function="load_lora")
        settings = read_settings(values, place, [name.removeprefix(PREFIX) for name in paths])
        check_regular(place / TENSORS, "load_lora")
    except FileNotFoundError as error:
        pickled = any((place / name).exists() for name in PICKLED)
        remedy = (
            "A pickle runs code of its author's: save it as safetensors."
            if pickled
            else "Save it again."
        )
        refuse("the files", files, f"{type(error).__name__} {error}", remedy)
    pairs: dict[str, dict[str, Any]] = {}
    rank, scale = settings.rank, settings.scale

    def adapted(path: str, weight: Weight) -> Weight:
        if path not in pairs:
            return weight
        a, b = pairs[path].get("lora_A"), pairs[path].get("lora_B")
        out, inner = shape(weight) if isinstance(weight, Tensor) else weight.shape
        sizes = None if a is None or b is None else (tuple(a.get_shape()), tuple(b.get_shape()))
        if a is None or b is None or sizes != ((rank, inner), (out, rank)):
            got = "one is absent" if sizes is None else f"{sizes[0]} and {sizes[1]}"
            refuse(
                path,
                f"lora_A {(rank, inner)} and lora_B {(out, rank)}",
                got,
                "Give the params that were adapted.",
            )
        device = tree.leaves(weight)[0].device
        # A half-precision adapter is added in the dtype of the base, as in PEFT.
        base = weight.dtype if isinstance(weight, Tensor) else torch.float32
        a, b = (x[:].clone() for x in (a, b))
        a, b = (x.to(device, torch.promote_types(base, x.dtype)) for x in (a, b))
        return Lora(weight, a, b, torch.full((), scale, dtype=torch.float32, device=device))

    try:
        file = safe_open(place / TENSORS, framework="pt")
        for name in file.keys():  # noqa: SIM118 (not a dict)
            module, _, which = name.removesuffix(".weight").rpartition(".")
            if (
                module not in paths
                or which not in ("lora_A", "lora_B")
                or not name.endswith(".weight")
            ):
                remedy = "Give the params of the model that was adapted."
                refuse(name, "an adaptation of a matrix of these params", "another", remedy)
            if not settings.adapts(module.removeprefix(PREFIX)):
                refuse(
                    name,
                    f"of a module that {CONFIG} adapts",
                    "another, which PEFT leaves out",
                    "Save it again.",
                )
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                refuse(
                    name,
                    f"of a type among {', '.join(DTYPES)}",
                    part.get_dtype(),
                    "Save it in float32.",
                )
            pairs.setdefault(paths[module], {})[which] = part
        left = [
            name
            for name, path in paths.items()
            if path not in pairs and settings.adapts(name.removeprefix(PREFIX))
        ]
        if not pairs or (left and settings.targets is not None):
            wanted = f"those of all modules that {CONFIG} adapts"
            refuse("tensors", wanted, f"none of {left[0]}" if left else "none", "Save it again.")
        return tree.map_with_path(adapted, params, is_leaf=_is_matrix)
    except (OSError, SafetensorError) as error:
        refuse("the files", files, f"{type(error).__name__} {error}", "Save it again.")


def _is_matrix(node: object) -> bool:
    return isinstance(node, Tensor) or (
        hasattr(node, "_fields") and isinstance(getattr(node, "shape", None), tuple)
    )


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
    return f"{PREFIX}model.layers.{number}.{NAMES[name]}"


def _modules(paths: Iterable[str]) -> list[str]:
    """The model's module names of those paths that have one."""
    return [_name(path).removeprefix(PREFIX) for path in paths if _is_named(path)]


def _own(x: Tensor) -> Tensor:
    return x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
