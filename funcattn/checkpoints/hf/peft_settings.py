"""adapter_config.json of PEFT: which fields are plain LoRA, and which define another function.

    y = W x + (alpha / r) B A x             with use_rslora alpha / sqrt(r)

Every field of PEFT's LoraConfig is in one of the tables here. Fields of training and naming are
ignored, as PEFT ignores them in the forward pass; fields that change the function are read, or must
have a neutral value; a field in no table must be empty.

Source: PEFT 0.19, src/peft/tuners/lora/config.py and layer.py (LoraLayer.update_layer,
    LoraVariant).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json
from .patterns import PatternError, full_matches

IGNORED = {
    # of the run or the file, not of the function
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
    ),
    *("megatron_core", "runtime_config", "ensure_weight_tying"),
    # of initializations and of variants that are refused themselves
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"}
READ |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
# Initializations that change A and B only. PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and MiCA depend on
# W, which PEFT changes or needs again when it loads them.
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
EMPTY: tuple[object, ...] = (None, False, "", [], {})
ALL_LINEAR = "all-linear"
MERGE = "Merge it with PEFT, and load the whole model."
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class PeftSettings:
    """The function that adapter_config.json defines: rank, scale, and adapted modules.

    targets: names of modules, or their last components; None for all matrices of the layers.
    """

    rank: int
    scale: float
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None

    def adapts(self, module: str) -> bool:
        """True where PEFT adapts this module, such as model.layers.0.self_attn.q_proj."""
        numbered = LAYER.search(module)
        here = self.layers is None or (numbered is not None and int(numbered[1]) in self.layers)
        return (
            here
            and not _ends(module, self.excluded)
            and (self.targets is None or _ends(module, self.targets))
        )


def read_settings(
    values: Mapping[str, Json], place: object, modules: Sequence[str]
) -> PeftSettings:
    """The settings of an adapter; CheckpointError names a field that makes it another function.

    Args:
        values: adapter_config.json. place: the folder, for error messages.
        modules: the names that a pattern in target_modules is matched against, as a whole, as PEFT
            does.
    """

    def refuse(name: str, wanted: str, remedy: str = MERGE) -> NoReturn:
        fail(
            "load_lora",
            f"{name} of {place}",
            wanted,
            repr(values.get(name)),
            remedy,
            CheckpointError,
        )

    bias = values.get("bias", "none")
    if values.get("peft_type") != "LORA" or bias not in (None, "none"):
        got = f"{values.get('peft_type')!r}, bias {bias!r}"
        fail(
            "load_lora", f"the kind of {place}", "LORA without biases", got, MERGE, CheckpointError
        )
    start = values.get("init_lora_weights", True)
    if not (
        start is None
        or isinstance(start, bool)
        or (isinstance(start, str) and start.lower() in HARMLESS_STARTS)
    ):
        refuse(
            "init_lora_weights",
            f"true, false, {', '.join(HARMLESS_STARTS)}: another one "
            "changes the weights of the base",
        )
    for name, value in values.items():
        if name not in IGNORED | READ and not any(
            type(value) is type(empty) and value == empty for empty in EMPTY
        ):
            refuse(name, "absent or empty: it makes another function, or is not known")
    rank, alpha, rooted = values.get("r"), values.get("lora_alpha"), values.get("use_rslora")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < 2**31:
        refuse("r", "a rank of 1 or more", "Save it again.")
    if rooted is not None and not isinstance(rooted, bool):
        refuse("use_rslora", "true or false", "Save it again.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not _is_scale(alpha):
        refuse("lora_alpha", "a number that float32 holds", "Save it again.")
    layers = values.get("layers_to_transform")
    numbers = (
        None if layers in (None, []) else tuple(layers) if isinstance(layers, list) else (layers,)
    )
    if numbers is not None and any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        refuse("layers_to_transform", "numbers of layers", "Save it again.")
    if values.get("layers_pattern") not in (*EMPTY, "layers", ["layers"]):
        refuse(
            "layers_pattern",
            "layers, the list of a model that layers_to_transform counts",
            "Save it again.",
        )
    names = {name: values.get(name) for name in ("target_modules", "exclude_modules")}
    for name, found in names.items():
        if found is not None and not isinstance(found, str) and not _are_texts(found):
            refuse(name, "names of modules", "Save it again.")
    targets, excluded = names["target_modules"], names["exclude_modules"]
    if isinstance(excluded, str) and excluded:
        refuse("exclude_modules", "a list of names", "Name the modules in target_modules instead.")
    pattern = isinstance(targets, str) and targets.lower() != ALL_LINEAR
    if pattern and numbers is not None:
        refuse(
            "layers_to_transform",
            "absent beside a pattern in target_modules, as PEFT wants it",
            "Save it again.",
        )
    if pattern:
        try:
            targets = full_matches(str(targets), modules)
        except PatternError as error:
            got = f"{targets!r}, {error}"
            fail(
                "load_lora",
                f"target_modules of {place}",
                "a pattern that can be evaluated",
                got,
                MERGE,
                CheckpointError,
            )
        if not targets:
            refuse(
                "target_modules",
                f"a pattern that matches a module, such as {next(iter(modules), 'none')}",
            )
    return PeftSettings(
        rank=rank,
        scale=alpha / (rank**0.5 if rooted else rank),
        targets=tuple(targets) if isinstance(targets, list) else None,
        excluded=tuple(excluded) if isinstance(excluded, list) else (),
        layers=numbers,
    )


def target_names(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """target_modules for some modules and no others: last components of names where they suffice.

    Example:
        >>> target_names(["layers.0.self_attn.q_proj"], ["layers.0.self_attn.k_proj"])
        ['q_proj']
        >>> target_names(["layers.0.self_attn.q_proj"], ["layers.1.self_attn.q_proj"])
        ['layers.0.self_attn.q_proj']
    """
    taken = {other.rpartition(".")[2] for other in others}
    return sorted(
        {module if (last := module.rpartition(".")[2]) in taken else last for module in modules}
    )


def _is_scale(alpha: float) -> bool:
    try:
        return math.isfinite(alpha) and abs(float(alpha)) <= 1e30
    except OverflowError:  # an integer beyond floats
        return False


def _are_texts(values: Json) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and value for value in values)


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
