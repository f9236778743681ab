"""Family: its table and functions; CheckpointError; validated reading of fields."""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeAlias

from torch import Tensor

from ...core.errors import fail, printable
from ...transformer import Config

LARGEST = 2**31 - 1  # of a size in a file: the range of 32-bit tensor indices
DEEPEST = 4096  # layers; the tree of names is built before the tensors are checked
# A value of JSON or of GGUF metadata, whose type is known only after a check of `Fields`.
Json: TypeAlias = Any
ABSENT_FIELD: Json = object()  # the default of required fields


class CheckpointError(ValueError):
    """A file that cannot be read as a model, or a model that cannot be written. The message names
    the field and the remedy.

    Control characters from a file are escaped in the message (`errors.printable`).
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class Pack:
    """Leaves in another layout: several in one tensor, one in several, or transposed.

    paths, names: templates; `{}` is the number of the layer, `{expert}` in a name stands for one
        tensor per expert (or head).
    unpack: (config, tensors in the order of names) -> leaves in the order of paths. pack: inverse.
    applies: (config, number of the layer) -> True where the layer has this layout.
    other: the layout of the same names in files whose shapes are its, or None.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    unpack: Callable[[Config, list[Tensor]], list[Tensor]]
    pack: Callable[[Config, list[Tensor]], list[Tensor]]
    applies: Callable[[Config, int], bool] = lambda config, layer: True
    other: "Pack | None" = None


class Spelling(Protocol):
    """How the leaves of a family are named and laid out in its files."""

    @property
    def tensors(self) -> Mapping[str, str]:
        """Path -> name on disk."""
        ...

    @property
    def packs(self) -> tuple[Pack, ...]:
        """Leaves in another layout."""
        ...


@dataclass(frozen=True)
class Family:
    """The names and fields of one family in Hugging Face files.

    read: the fields of config.json -> those of Config.
    write: a Config -> the family's fields of config.json. The result is read back and compared, so
        any result is allowed for a Config that the family cannot express.
    tensors: path -> name on disk, templates with `{}` for the number of the layer; absent leaves of
        a Config need none.
    packs: leaves in another layout, which take precedence over `tensors`.
    neutral: fields that would change the mathematics -> values for which they do not, in addition
        to NEUTRAL.
    body: the class of transformers without a head, written without `prefix` in names; "" is derived
        from the architecture.
    harmless: tensors on disk that follow from the config, and are ignored.
    also: other names that files have for the architecture.
    unused: a Config -> names of tensors that files may have beside those of its leaves.
    older: parts of names on disk -> the parts of those in `tensors`.
    """

    name: str
    architecture: str
    read: Callable[["Fields"], dict[str, Json]]
    write: Callable[[Config], dict[str, object]]
    tensors: Mapping[str, str]
    packs: tuple[Pack, ...] = ()
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    # follows from rope_theta
    harmless: re.Pattern[str] = re.compile(
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    )
    body: str = ""
    prefix: str = "model."
    also: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=dict)
    unused: Callable[[Config], frozenset[str]] = lambda config: frozenset()

    def name_of(self, stored: str) -> str:
        """The name in `tensors` of one on disk."""
        for part, ours in self.older.items():
            stored = stored.replace(f".{part}.", f".{ours}.")
        return stored

    @property
    def architectures(self) -> tuple[str, ...]:
        """The class names of transformers with and without a head, then the others."""
        body = self.body or re.sub("(ForCausalLM|LMHeadModel)$", "Model", self.architecture)
        return self.architecture, body, *self.also


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # What transformers reads of every class, or when it builds its masks and caches -> where it
    # changes nothing, as null does.
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "sliding_window": (),
    "attention_chunk_size": (),
    "pruned_heads": ({},),
    "per_layer_config": (),
    "quantization_config": (),
}


class Fields:
    """The fields of a file, validated when read; unread fields must have neutral values."""

    def __init__(self, values: Mapping[str, Json], where: str = "{} in config.json") -> None:
        self.values = {name: value for name, value in values.items() if value is not None}
        self.where, self.seen, self.present = where, set[str](), frozenset(values)

    def says(self, name: str) -> bool:
        """True where the file has the field, even as null."""
        return name in self.present

    def get(self, name: str, default: Json = None) -> Json:
        """The value, unvalidated; null counts as absent."""
        self.seen.add(name)
        return self.values.get(name, default)

    def place(self, name: str) -> str:
        """The field and file, for error messages."""
        return self.where.format(name)

    def whole(self, name: str, default: Json = ABSENT_FIELD) -> Json:
        """A size: an integer from 1 to LARGEST."""
        value = self.get(name, default)
        return (
            value
            if value is default and default is not ABSENT_FIELD
            else whole(_missing(value), self.place(name))
        )

    def positive(self, name: str, default: Json = ABSENT_FIELD) -> Json:
        """A positive number that is finite in float32."""
        value = self.get(name, default)
        return (
            value
            if value is default and default is not ABSENT_FIELD
            else positive(_missing(value), self.place(name))
        )

    def flag(self, name: str, default: bool) -> bool:
        """A bool."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            refuse(self.place(name), "true or false", value)
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """A name, translated to ours."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            refuse(self.place(name), f"one of {', '.join(choices)}", value)
        return choices[value]

    def items(self, name: str) -> list[Json]:
        """A list, empty where it is absent."""
        value = self.get(name, [])
        if not isinstance(value, list):
            refuse(self.place(name), "a list", value)
        return value

    def check_neutral(self, neutral: Mapping[str, tuple[object, ...]]) -> None:
        """Fail for an unread field of `neutral` with another value than its neutral ones."""
        check_neutral(
            {name: value for name, value in self.values.items() if name not in self.seen},
            neutral,
            self.where,
        )

    def check_known(self, known: Set[str]) -> None:
        """Fail for an unread, unknown field with a value: it may be of a newer release."""
        for name in self.values.keys() - self.seen - known:
            if not name.startswith("_") and self.values[name] not in (False, "", [], {}):
                remedy = (
                    "Take it out of the file where it does not change what the model computes, or "
                    "use a release that knows it."
                )
                fail(
                    "load",
                    self.place(name),
                    "a field that is known, or absent",
                    repr(self.values[name])[:200],
                    remedy,
                    CheckpointError,
                )


def _missing(value: Json) -> Json:
    return None if value is ABSENT_FIELD else value


def refuse(what: str, wanted: object, got: object) -> NoReturn:
    """Raise CheckpointError for a field that Config cannot express, or that is invalid."""
    remedy = (
        "The model would be computed wrongly; convert the file, or use a release of funcattn that "
        "expresses this."
    )
    shown = repr(got)
    fail(
        "load",
        what,
        str(wanted),
        shown if len(shown) < 200 else shown[:200] + "...",
        remedy,
        CheckpointError,
    )


def check_neutral(
    values: Mapping[str, object], neutral: Mapping[str, tuple[object, ...]], where: str
) -> None:
    """Fail for a field of `neutral` whose value is neither null nor neutral."""
    for name, allowed in neutral.items():
        value = values.get(name)
        if value is not None and not any(
            type(value) is type(other) and value == other for other in allowed
        ):
            refuse(where.format(name), " or ".join([*map(repr, allowed[:1]), "absent"]), value)


def whole(value: object, where: str) -> int:
    """A size: an integer that a file can mean."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        refuse(where, f"an integer from 1 to {LARGEST}", value)
    return value


def positive(value: object, where: str) -> float:
    """A positive number that is finite in float32."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value <= 1e30:
        refuse(where, "a number from 1e-30 to 1e30", value)
    return float(value)


OF_EXPERTS = frozenset(
    [
        *("experts", "experts_per_token", "expert_size", "expert_layers", "normalized_routing"),
        *("router_bias", "router_scores", "choice_bias", "expert_groups", "groups_per_token"),
        *("group_best", "routing_scale", "shared_size", "shared_gated"),
    ]
)


def configure(**values: Json) -> Config:
    """A Config, or CheckpointError where its fields are inconsistent.

    Of a model without experts, what a file says of their router is left out.
    """
    if values.get("experts") == 0:
        values = {name: value for name, value in values.items() if name not in OF_EXPERTS}
    if values["layers"] > DEEPEST:
        refuse("the number of layers", f"at most {DEEPEST}", values["layers"])
    try:
        config = Config(**values)
    except ValueError as error:
        raise CheckpointError(f"load: the sizes in the file make no decoder. {error}") from error
    scaling, turning = config.rope_scaling, config.rotary_size or config.head_size
    if scaling is not None and scaling.kind == "longrope" and len(scaling.short) != turning // 2:
        refuse(
            "short_factor and long_factor",
            f"{turning // 2} numbers, one for each plane that turns",
            len(scaling.short),
        )
    return config
