"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight  (r, in)   params.layers[3].q.a
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight  (out, r)  params.layers[3].q.b

Modules are those of the original (adapter_modules): one of them may hold several leaves, whose a is
common and whose b are rows of its B. Beside them a file may hold DoRA's magnitudes, biases, and
modules that were trained whole; saved_adapters writes such files.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import tree
from ...core.errors import fail, shape
from ...low_rank import Lora, row_norms
from ...records import ABSENT, is_absent
from ...transformer import Config, Params
from ...tree import Tree
from .. import families
from ..families import CheckpointError, Source
from ..families.tables import Json
from ..regular_files import check_regular, of_one_save, read_json
from .adapter_modules import PREFIX, Module, Original, module_of, original
from .peft_settings import PeftSettings, read_settings
from .weights import DTYPES

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")
FILES = f"{CONFIG} and {TENSORS}, as PEFT writes them"
PARTS = {  # ends of names -> what they are of a module
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias of B",
    ".lora_embedding_A": "A of rows",
    ".lora_embedding_B": "B of rows",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
}
EMBEDDINGS = ("embedding", "head")


def load_lora(
    folder: str | os.PathLike[str],
    params: Tree,
    *,
    config: Config | None = None,
    family: str | None = None,
) -> Tree:
    """params with the LoRA adapters of a folder in PEFT's layout.

    Half-precision factors become float32, as in PEFT; products are rounded to the dtype of the
    activations once the base's is added. Biases and modules that PEFT trained whole replace those
    of params. An adapter of an embedding that is tied leaves the head as it was: the head becomes a
    leaf of its own.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        params: of the base model; plain or quantized weights without adapters.
        config: of the base model. None is for Llama-like names and matrices only (Mistral, Qwen,
            SmolLM, Gemma); other families join, transpose or reorder matrices (phi3, gpt2, cohere).
        family: model_type of the original, such as "helium". None is that of the folder that the
            adapter names as its base, or else the first family that expresses config.

    Raises:
        CheckpointError: it is damaged, does not fit, or has a field that is unknown or defines
            another function than LoRA or DoRA (an initialization that changes the base as PiSSA's,
            tokens that activate it); the message names the field.
        ValueError: config is needed.

    Law: load_lora(save_lora(...)) is what was saved
        (test_adaptations.py::test_an_adaptation_comes_back_bit_for_bit); the function is PEFT's
        formula (test_adapter_modules.py::test_a_joined_module_is_adapted_by_rows).
    """
    place = Path(folder)
    return of_one_save(place, (CONFIG,), lambda: _read_lora(place, params, config, family))


def _read_lora(place: Path, params: Tree, config: Config | None, family: str | None) -> Tree:
    try:
        values = read_json(place / CONFIG, function="load_lora")
        check_regular(place / TENSORS, "load_lora")
        file = safe_open(place / TENSORS, framework="pt")
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        base, named = values.get("base_model_name_or_path"), [_split(name)[0] for name in found]
        adapted = [module for module in named if module]
        names = original("load_lora", params, config, family, base, adapted)
        settings = read_settings(values, place, list(names.modules))
        return _Reading(place, params, config, names, settings).adapted(found)
    except FileNotFoundError as error:
        pickled = any((place / name).exists() for name in PICKLED)
        remedy = (
            "A pickle runs code of its author's: save it as safetensors."
            if pickled
            else "Save it again."
        )
        _refuse(f"the files of {place}", FILES, f"{type(error).__name__} {error}", remedy)
    except (OSError, SafetensorError) as error:
        got = f"{type(error).__name__} {error}"
        _refuse(f"the files of {place}", FILES, got, "Save it again.")


class _Reading:
    """What the tensors of one adapter do to params."""

    def __init__(
        self,
        place: Path,
        params: Params,
        config: Config | None,
        names: Original,
        settings: PeftSettings,
    ) -> None:
        self.place, self.names, self.settings = place, names, settings
        self.config: Json = config  # absent where no pack reads it
        self.leaves = families.leaves(params)
        self.params, self.tied = params, is_absent(params.head)

    def refuse(
        self, what: str, wanted: str, got: object, remedy: str = "Save it again."
    ) -> NoReturn:
        """Raise CheckpointError with the place."""
        _refuse(f"{what} of {self.place}", wanted, got, remedy)

    def adapted(self, found: Mapping[str, Any]) -> Params:
        """params with all tensors of the file, each of which must be one that PEFT reads."""
        pairs: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for name, part in found.items():
            if part.get_dtype() not in DTYPES:
                wanted = f"of a type among {', '.join(DTYPES)}"
                self.refuse(name, wanted, part.get_dtype(), "Save it in float32.")
            module, end = _split(name)
            if not module:
                whole[name] = part[:].clone()
                continue
            module = module_of(module, self.names.modules)
            if module not in self.names.modules or not name.startswith(PREFIX):
                remedy = "Give the params of the model that was adapted, and its config."
                self.refuse(name, "an adaptation of a matrix of these params", "another", remedy)
            if PARTS[end] != "tokens" and not self.settings.adapts(module):
                wanted = f"of a module that {CONFIG} adapts"
                self.refuse(name, wanted, "another, which PEFT leaves out")
            pairs.setdefault(module, {})[PARTS[end]] = part[:].clone()
        left = [
            name
            for name in self.names.modules
            if self.settings.adapts(name) and "A" not in _kinds(pairs.get(name, {}))
        ]
        if not any("A" in _kinds(parts) for parts in pairs.values()) or (
            left and self.settings.targets is not None
        ):
            wanted = f"those of all modules that {CONFIG} adapts"
            self.refuse("tensors", wanted, f"none of {left[0]}" if left else "none")
        stored = [self._store(name, tensor) for name, tensor in whole.items()]
        if lost := [end for end in self.settings.saved if not any(end in name for name in stored)]:
            self.refuse("modules_to_save", "names of modules with tensors here", repr(lost[0]))
        if self.settings.tokens and not any("tokens" in parts for parts in pairs.values()):
            wanted = "absent where no rows of tokens are here"
            self.refuse("trainable_token_indices", wanted, list(self.settings.tokens.values()))
        for name, parts in pairs.items():
            self._adapt(name, self.names.modules[name], parts)
        changed = tree.map_with_path(
            lambda path, weight: self.leaves.get(path, weight), self.params, is_leaf=_is_matrix
        )
        return changed._replace(head=self.leaves.get("head", ABSENT))

    def _store(self, name: str, tensor: Tensor) -> str:
        """Replace a bias, or a leaf of a module trained whole; its name in the original."""
        bare = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        known = module_of(bare, self.names.stored)
        if known == "lm_head.weight" and self.tied and known not in self.names.stored:
            source = Source(("head",), (known,), families.PLAIN)
            shapes = {"head": tuple(self.leaves["embedding"].shape)}
        elif known in self.names.stored and name.startswith(PREFIX):
            source = self.names.stored[known]
            shapes = {path: tuple(self.leaves[path].shape) for path in source.paths}
        else:
            remedy = "Give the params of the model that was adapted, and its config."
            self.refuse(name, "an adaptation of a matrix of these params", "another", remedy)
        is_bias = known.endswith(".bias") and self.settings.bias != "none"
        stored = self.settings.stores(known.rpartition(".")[0])
        if not is_bias and not stored and source.paths[0] not in EMBEDDINGS:
            wanted = f"of a module that {CONFIG} adapts"
            self.refuse(name, wanted, "another, which PEFT leaves out")
        joined = source.pack.pack(
            self.config, [torch.empty(shapes[path], device="meta") for path in source.paths]
        )[0]
        if tensor.shape != joined.shape:
            remedy = "Give the params that were adapted."
            self.refuse(name, str(shape(joined)), str(shape(tensor)), remedy)
        if "embedding" in source.paths and self.tied:
            self.leaves.setdefault("head", self.leaves["embedding"])
        for path, leaf in zip(source.paths, source.pack.unpack(self.config, [tensor]), strict=True):
            base = self.leaves.get(path, self.leaves["embedding"])
            kind = base.dtype if isinstance(base, Tensor) else leaf.dtype
            self.leaves[path] = leaf.to(tree.leaves(base)[0].device, kind)
        return known

    def _adapt(self, name: str, module: Module, parts: dict[str, Tensor]) -> None:
        if "tokens" in parts:
            self._replace_tokens(name, module, parts.pop("tokens"))
            if not parts:
                return
        rows = module.paths[0] == "embedding"
        if rows and {"A of rows", "B of rows"} <= parts.keys():
            parts["A"], parts["B"] = parts.pop("B of rows").mT, parts.pop("A of rows").mT
        sizes = [tuple(self.leaves[path].shape) for path in module.paths]
        out, inner = sum(size[0] for size in sizes), sizes[0][1]
        rank = self.settings.ranks.get(name, self.settings.rank)
        wanted = {"A": (rank, inner), "B": (out, rank)}
        wanted |= {"magnitude": (out,)} if self.settings.dora else {}
        wanted |= {"bias of B": (out,)} if self.settings.biased else {}
        got = {kind: tuple(part.shape) for kind, part in parts.items()}
        if got != wanted:
            spelled = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}
            text = lambda found: " and ".join(
                f"{spelled.get(kind, kind)} {found[kind]}" for kind in sorted(found)
            )
            short = "one is absent" if got.keys() != wanted.keys() else text(got)
            self.refuse(name, text(wanted), short, "Give the params that were adapted.")
        if rows and self.settings.dora:
            remedy = "Merge it with PEFT, and load the whole model."
            self.refuse(name, "no embedding, whose columns DoRA scales", "one", remedy)
        if rows and self.tied and self.settings.tying:
            remedy = "Merge it with PEFT, and load the whole model."
            self.refuse("ensure_weight_tying", "false where the embedding is adapted", True, remedy)
        if rows and self.tied:  # PEFT adapts the embedding, and not the head
            self.leaves.setdefault("head", self.leaves["embedding"])
        scale = self.settings.scales.get(name, self.settings.scale)
        for path, taken in zip(module.paths, module.rows, strict=True):
            one = lambda kind, taken=taken: parts[kind] if taken is None else parts[kind][taken]
            self._adapt_leaf(path, parts["A"], one, scale, parts.keys())

    def _adapt_leaf(
        self, path: str, a: Tensor, part: Callable[[str], Tensor], scale: float, kinds: Any
    ) -> None:
        base = self.leaves[path]
        device = tree.leaves(base)[0].device
        wide = lambda x: x.to(device, torch.promote_types(torch.float32, x.dtype)).contiguous()
        one = Lora(
            base,
            wide(a),
            wide(part("B")),
            torch.full((), scale, dtype=torch.float32, device=device),
        )
        if "magnitude" in kinds:
            one = one._replace(gain=wide(part("magnitude")) / row_norms(one))
        if "bias of B" in kinds:
            if f"{path}_bias" not in self.leaves or "magnitude" in kinds:
                wanted = "a leaf with a bias, without DoRA, where lora_bias is true"
                self.refuse(path, wanted, "another", "Merge it with PEFT, and load that model.")
            bias = self.leaves[f"{path}_bias"]
            self.leaves[f"{path}_bias"] = (bias + scale * wide(part("bias of B"))).to(bias.dtype)
        self.leaves[path] = one

    def _replace_tokens(self, name: str, module: Module, rows: Tensor) -> None:
        """Rows of an embedding or head that were trained alone."""
        tables = self.settings.tokens
        whole = tables.get("", ())
        ids = next((n for end, n in tables.items() if name.endswith(end) and end), whole)
        (path,) = module.paths
        base = self.leaves[path]
        if not ids or not isinstance(base, Tensor) or path not in EMBEDDINGS:
            wanted = "rows of an embedding that trainable_token_indices counts"
            self.refuse(name, wanted, "others", "Dequantize the embedding, or save it again.")
        if rows.shape != (len(ids), base.shape[1]) or max(ids) >= len(base):
            wanted = f"({len(ids)}, {base.shape[1]}), of ids below {len(base)}"
            self.refuse(name, wanted, str(shape(rows)), "Give the params that were adapted.")
        at = torch.tensor(ids, device=base.device)
        self.leaves[path] = base.index_copy(0, at, rows.to(base.device, base.dtype))


def _split(name: str) -> tuple[str, str]:
    """The module of an adapter's tensor, and the end of its name; "" for other tensors."""
    end = next((end for end in PARTS if name.endswith(end)), "")
    return (name.removesuffix(end), end) if end else ("", "")


def _kinds(parts: Mapping[str, Tensor]) -> set[str]:
    return {kind.removesuffix(" of rows") for kind in parts}


def _refuse(what: str, wanted: str, got: object, remedy: str) -> NoReturn:
    fail("load_lora", what, wanted, got, remedy, CheckpointError)


def _is_matrix(node: object) -> bool:
    return isinstance(node, Tensor) or (
        hasattr(node, "_fields") and isinstance(getattr(node, "shape", None), tuple)
    )
