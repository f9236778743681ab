"""adapter_config.json of PEFT: which fields are LoRA or DoRA, and which define another function.

    y = W x + (alpha / r) B A x             with use_rslora alpha / sqrt(r)

rank_pattern and alpha_pattern give other r and alpha to the modules whose names they match.

Every field of PEFT's LoraConfig is in one of the tables here. Fields of training and naming are
ignored, as PEFT ignores them in the forward pass; fields that change the function are read, or must
have a neutral value; a field in no table must be empty.

Source: PEFT 0.21, src/peft/tuners/lora/config.py and layer.py (LoraLayer.update_layer,
    LoraVariant).
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json
from .patterns import PatternError, first_matches, full_matches

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
    *("megatron_core", "runtime_config"),
    # PEFT sets it by the type of the module: Conv1D stores its transpose
    "fan_in_fan_out",
    # of initializations and of variants that are refused themselves
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"}
READ |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
READ |= {"rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "trainable_token_indices"}
READ |= {"lora_bias", "ensure_weight_tying"}
BIASES = ("none", "all", "lora_only")
# Initializations that change A and B only. PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and MiCA depend on
# W, which PEFT changes or needs again when it loads them.
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
EMPTY: tuple[object, ...] = (None, False, "", [], {})
ALL_LINEAR = "all-linear"
AGAIN = "Save it again."
MERGE = "Merge it with PEFT, and load the whole model."
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class PeftSettings:
    """The function that adapter_config.json defines: ranks, scales, and adapted modules.

    rank, scale: of modules that no pattern names. ranks, scales: module -> its own.
    targets: names of modules, or their last components; None for all matrices of the layers.
    dora: True where rows are scaled to trained norms. bias: none, all or lora_only.
    biased: True where B has a bias.
    saved: ends of the names of modules that are stored whole.
    tokens: end of a module's name -> its rows that are stored; "" is the embedding.
    tying: True where a head that is tied to an embedding takes its adaptation.
    """

    rank: int
    scale: float
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    dora: bool
    bias: str
    biased: bool
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    tying: bool

    def adapts(self, module: str) -> bool:
        """True where PEFT adapts this module, such as model.layers.0.self_attn.q_proj."""
        numbered = LAYER.match(module)
        here = self.layers is None or (numbered is not None and int(numbered[1]) in self.layers)
        within = (_ends(module[:end], self.saved) for end in _ends_of_parts(module))
        return (
            here
            and not _ends(module, self.excluded)
            and not any(within)
            and (self.targets is None or _ends(module, self.targets))
        )

    def stores(self, module: str) -> bool:
        """True where a module is stored whole, as PEFT finds those of modules_to_save."""
        return any(module[:end].endswith(self.saved) for end in _ends_of_parts(module))


def read_settings(
    values: Mapping[str, Json], place: object, modules: Sequence[str]
) -> PeftSettings:
    """The settings of an adapter; CheckpointError names a field that makes it another function.

    Args:
        values: adapter_config.json. place: the folder, for error messages.
        modules: the names that patterns are matched against, as PEFT does.
    """

    def refuse(name: str, wanted: str, remedy: str = MERGE, got: object = None) -> NoReturn:
        shown = repr(values.get(name)) if got is None else f"{values.get(name)!r}, {got}"
        fail("load_lora", f"{name} of {place}", wanted, shown, remedy, CheckpointError)

    bias = "none" if values.get("bias") is None else values["bias"]
    if values.get("peft_type") != "LORA" or bias not in BIASES:
        got = f"{values.get('peft_type')!r}, bias {bias!r}"
        wanted = f"LORA, bias one of {', '.join(BIASES)}"
        fail("load_lora", f"the kind of {place}", wanted, got, MERGE, CheckpointError)
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
    for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
        if values.get(name) is not None and not isinstance(values[name], bool):
            refuse(name, "true or false", AGAIN)
    rank: Json = values.get("r")
    alpha, rooted = values.get("lora_alpha"), values.get("use_rslora")
    if not _is_rank(rank):
        refuse("r", "a rank of 1 or more", AGAIN)
    if not _is_alpha(alpha):
        refuse("lora_alpha", "a number that float32 holds", AGAIN)
    ranks, alphas = (
        _read_pattern(values.get(name), fits, modules, functools.partial(refuse, name, wanted))
        for name, fits, wanted in (
            ("rank_pattern", _is_rank, "patterns of modules with ranks of 1 or more"),
            ("alpha_pattern", _is_alpha, "patterns of modules with numbers that float32 holds"),
        )
    )
    scale = lambda name: alphas.get(name, alpha) / ranks.get(name, rank) ** (0.5 if rooted else 1)
    names = {
        name: values.get(name) for name in ("target_modules", "exclude_modules", "modules_to_save")
    }
    for name, found in names.items():
        is_text = isinstance(found, str) and name != "modules_to_save"
        if found is not None and not is_text and not _are_texts(found):
            refuse(name, "names of modules", AGAIN)
    targets, excluded, saved = names.values()
    if isinstance(excluded, str) and excluded:
        refuse("exclude_modules", "a list of names", "Name the modules in target_modules instead.")
    numbers = _read_layers(values, refuse)
    pattern = isinstance(targets, str) and targets.lower() != ALL_LINEAR
    if pattern and numbers is not None:
        wanted = "absent beside a pattern in target_modules, as PEFT wants it"
        refuse("layers_to_transform", wanted, AGAIN)
    if pattern:
        try:
            targets = full_matches(str(targets), modules)
        except PatternError as error:
            refuse("target_modules", "a pattern that can be evaluated", got=error)
        if not targets:
            refuse(
                "target_modules",
                f"a pattern that matches a module, such as {next(iter(modules), 'none')}",
            )
    return PeftSettings(
        rank=rank,
        scale=scale(""),
        targets=tuple(targets) if isinstance(targets, list) else None,
        excluded=tuple(excluded) if isinstance(excluded, list) else (),
        layers=numbers,
        ranks=ranks,
        scales={name: scale(name) for name in ranks.keys() | alphas.keys()},
        dora=bool(values.get("use_dora")),
        bias=bias,
        biased=bool(values.get("lora_bias")),
        saved=tuple(saved or ()),
        tokens=_read_tokens(values, refuse),
        tying=bool(values.get("ensure_weight_tying")),
    )


def _read_layers(values: Mapping[str, Json], refuse: Callable[..., NoReturn]) -> Json:
    """layers_to_transform, None for all."""
    layers: Json = values.get("layers_to_transform")
    numbers = (
        None if layers in (None, []) else tuple(layers) if isinstance(layers, list) else (layers,)
    )
    if numbers is not None and any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        refuse("layers_to_transform", "numbers of layers", AGAIN)
    if values.get("layers_pattern") not in (*EMPTY, "layers", ["layers"], "h", ["h"]):
        refuse(
            "layers_pattern", "layers, the list of a model that layers_to_transform counts", AGAIN
        )
    return numbers


def _read_pattern(
    values: Json,
    fits: Callable[[Json], bool],
    modules: Sequence[str],
    refuse: Callable[..., NoReturn],
) -> dict[str, Json]:
    """Module -> what the first pattern that matches it says."""
    if values in EMPTY:
        return {}
    if not isinstance(values, dict) or not all(map(fits, values.values())):
        refuse(AGAIN)
    try:
        found = first_matches(list(values), modules)
    except PatternError as error:
        refuse(got=error)
    return {name: values[pattern] for name, pattern in found.items()}


def _read_tokens(
    values: Mapping[str, Json], refuse: Callable[..., NoReturn]
) -> dict[str, tuple[int, ...]]:
    """trainable_token_indices, of the embedding or by modules."""
    found: Json = values.get("trainable_token_indices")
    if found in EMPTY:
        return {}
    tables = found if isinstance(found, dict) else {"": found}
    for ids in tables.values():
        if not isinstance(ids, list) or not all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in ids
        ):
            refuse("trainable_token_indices", "ids of tokens", AGAIN)
    return {name: tuple(ids) for name, ids in tables.items()}


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


def _is_rank(rank: Json) -> bool:
    return isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank < 2**31


def _is_alpha(alpha: Json) -> bool:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return False
    try:
        return math.isfinite(alpha) and abs(float(alpha)) <= 1e30
    except OverflowError:  # an integer beyond floats
        return False


def _are_texts(values: Json) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and value for value in values)


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _ends_of_parts(module: str) -> list[int]:
    """Where each module that a module is within ends: model, model.layers, ..., itself."""
    return [i for i, sign in enumerate(module) if sign == "."] + [len(module)]
