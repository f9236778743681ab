"""LoRA adapters of params, written in PEFT's layout."""

import json
import os
from collections import Counter

import torch
from safetensors.torch import save_file
from torch import Tensor

from ... import tree
from ...core import atomic
from ...core.errors import fail
from ...low_rank import Lora, is_adapted, row_norms
from ...records import is_absent
from ...transformer import Config
from ...tree import Tree
from ..writing import written
from .adapter_modules import PREFIX, Module, Original, original
from .adapters import CONFIG, TENSORS
from .peft_settings import target_names


def save_lora(
    folder: str | os.PathLike[str],
    params: Tree,
    *,
    base: str = "",
    config: Config | None = None,
    family: str | None = None,
) -> None:
    """Write the LoRA factors of params, without the base weights, in PEFT's layout.

    Leaves that the original stores as one module (q, k and v of phi3) are one adapter of it: with
    their common a, or with the a of each, one under the other, and b in blocks.

    Args:
        folder: new, or with an adapter, whose two files are replaced in one step; other files are
            kept.
        params: with leaves adapted by `fa.lora` or `fa.load_lora`.
        base: the name or path of the base model, which PEFT's readers look for.
        config, family: as in `load_lora`.

    Raises:
        ValueError: no adapters, one of a weight without a name in PEFT, adapters with DoRA's gain
            beside others, or of different scales in one module.
        CheckpointError: the folder cannot be written.

    Law: load_lora(save_lora(...)) is what was saved
        (test_adaptations.py::test_an_adaptation_comes_back_bit_for_bit).
    """
    found = {
        path: weight
        for path, weight in tree.items(params, is_leaf=is_adapted)
        if is_adapted(weight)
    }
    if not found:
        fail("save_lora", "params", "adapted", "plain ones", "Adapt them with fa.lora.")
    names = original("save_lora", params, config, family, base)
    _check(found, names, is_absent(params.head))
    modules = {
        name: module for name, module in names.modules.items() if found.keys() & set(module.paths)
    }
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, tuple[int, float]] = {}
    for name, module in modules.items():
        a, b, scale, magnitude = _joined(params, found, module)
        kinds[name] = a.shape[0], scale
        if module.paths == ("embedding",):
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = _own(b.mT)
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = _own(a.mT)
            continue
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _own(a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _own(b)
        if magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = _own(magnitude)
    (rank, scale), _ = Counter(kinds.values()).most_common(1)[0]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _alpha(rank, scale),
        "rank_pattern": {name: r for name, (r, _) in kinds.items() if r != rank},
        "alpha_pattern": {
            name: _alpha(*kind) for name, kind in kinds.items() if _alpha(*kind) != scale * rank
        },
        "lora_dropout": 0.0,
        "target_modules": target_names(modules, names.modules.keys() - modules.keys()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": not is_absent(next(iter(found.values())).gain),
        "use_rslora": False,
    }
    with written("save_lora", folder), atomic.files(folder, last=CONFIG) as draft:
        save_file(tensors, draft / TENSORS, metadata={"format": "pt"})
        (draft / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _check(found: dict[str, Lora], names: Original, tied: bool) -> None:
    """Raise where an adapter has no name, or not the function that PEFT would give it."""
    named = {path for module in names.modules.values() for path in module.paths}
    for path, weight in found.items():
        if path not in named or (path == "embedding" and (tied or not is_absent(weight.gain))):
            remedy = "PEFT's layout has no name for it here."
            if path in named:
                remedy = "PEFT would leave the tied head as it is, and scale columns with DoRA."
            fail("save_lora", "params", "adapted in modules of PEFT", f"in {path}", remedy)
        if is_adapted(weight.base):
            remedy = "Merge the inner one first."
            fail("save_lora", "params", "adapted once", f"twice in {path}", remedy)
    if len({is_absent(weight.gain) for weight in found.values()}) > 1:
        remedy = "Save those with DoRA's gain on their own."
        fail("save_lora", "params", "all with a gain, or none", "some", remedy)


def _joined(
    params: Tree, found: dict[str, Lora], module: Module
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """A, B, scale and magnitude of a module, of the adapters of its leaves."""
    here = [found.get(path) for path in module.paths]
    given = [weight for weight in here if weight is not None]
    first, alone = given[0], len(module.paths) == 1
    if len({float(weight.scale) for weight in given}) > 1:
        got = f"{sorted(float(weight.scale) for weight in given)}"
        remedy = "Adapt leaves that the original stores together by one fa.lora."
        fail("save_lora", f"scales of {', '.join(module.paths)}", "one", got, remedy)
    if not is_absent(first.gain) and len(given) < len(here):
        remedy = "The original stores them as one module, which has one magnitude for each row."
        fail("save_lora", "params", f"adapted in all of {', '.join(module.paths)}", "some", remedy)
    leaves = dict(tree.items(params, is_leaf=lambda node: node is not params and _is_weight(node)))
    sizes = [leaves[path].shape[0] for path in module.paths]
    common = len(given) == len(here) and all(
        one.a.shape == first.a.shape and torch.equal(one.a, first.a) for one in given
    )
    a = first.a if common else torch.cat([one.a for one in given])
    b, at = first.b.new_zeros(sum(sizes), a.shape[0]), 0
    magnitude = None if is_absent(first.gain) else first.a.new_zeros(len(b))
    for one, taken, size, start in zip(here, module.rows, sizes, _starts(sizes), strict=True):
        rows = torch.arange(start, start + size) if taken is None else taken
        if one is None:
            continue
        columns = slice(None) if common else slice(at, at + one.a.shape[0])
        b[rows.to(b.device), columns] = one.b
        at += one.a.shape[0]
        if magnitude is not None:
            magnitude[rows.to(b.device)] = (one.gain * row_norms(one)).to(magnitude.dtype)
    return a, first.b if alone and module.rows[0] is None else b, float(first.scale), magnitude


def _is_weight(node: object) -> bool:
    return isinstance(node, Tensor) or hasattr(node, "shape")


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:n]) for n in range(len(sizes))]


def _alpha(rank: int, scale: float) -> float:
    alpha = scale * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def _own(x: Tensor) -> Tensor:
    return x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
