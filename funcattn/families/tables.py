"""What a family is, the error of a file that cannot be read as one, and the checks of what a file says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .._checks import fail
from ..layers import RopeScaling
from ..transformer import Config

LARGEST = 2**31 - 1  # of a size in a file; what a tensor index of 32 bits can count
DEEPEST = 4096  # layers; a tree of names is made of them before the file is seen to hold them


class CheckpointError(ValueError):
    """What a file says cannot be read as a model, or a model cannot be written. The message names the field and the remedy."""


@dataclass(frozen=True)
class Family:
    """How one family is spelled. `{}` in a tensor's name stands for the number of the layer.

    sizes, gguf_sizes: Config field -> field of the file, all required unless `defaults` or a rule below gives them.
    neutral, gguf_neutral: fields of the file that would change the mathematics -> the values under which they do not. Absent
        and null are neutral too. What transformers' own model of the family does not read is not listed: it changes nothing there.
    tensors, gguf_tensors: path -> tensor. harmless: tensors on disk that say nothing new.
    interleaved: leaves of Layer whose rows GGUF stores for rotary angles on neighbouring features.
    """

    name: str
    architecture: str
    sizes: Mapping[str, str]
    defaults: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]]
    tensors: Mapping[str, str]
    harmless: re.Pattern[str]
    gguf_sizes: Mapping[str, str]
    gguf_neutral: Mapping[str, tuple[Any, ...]]
    gguf_tensors: Mapping[str, str]
    interleaved: tuple[str, ...] = ()


def refuse(what: str, wanted: Any, got: Any) -> NoReturn:
    """Raise CheckpointError for a field that Config cannot express, or that is not what it must be."""
    remedy = "The model would be computed wrongly; convert the file, or use a release of funcattn that expresses this."
    shown = repr(got)
    fail("load", what, str(wanted), shown if len(shown) < 200 else shown[:200] + "...", remedy, CheckpointError)


def check_neutral(values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Refuse a field of `neutral` that holds anything but null or one of the values under which it changes nothing."""
    for name, allowed in neutral.items():
        value = values.get(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in allowed):
            refuse(where.format(name), " or ".join([*map(repr, allowed[:1]), "absent"]), value)


def listed(value: Any, where: str) -> list[Any]:
    """A list, empty where the file says nothing."""
    if value is not None and not isinstance(value, list):
        refuse(where, "a list", value)
    return value or []


def whole(value: Any, where: str) -> int:
    """A size: an integer that a file can mean."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        refuse(where, f"an integer from 1 to {LARGEST}", value)
    return value


def positive(value: Any, where: str) -> float:
    """A number above 0 that a float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value <= 1e30:
        refuse(where, "a number from 1e-30 to 1e30", value)
    return float(value)


def configure(**values: Any) -> Config:
    """A Config, or CheckpointError where its fields do not go together."""
    if values["layers"] > DEEPEST:
        refuse("the number of layers", f"at most {DEEPEST}", values["layers"])
    try:
        return Config(**values)
    except ValueError as error:
        raise CheckpointError(f"load: the sizes in the file make no decoder. {error}") from error


def scaling(kind: str, factor: float = 1.0, low: float = 1.0, high: float = 4.0, context: float = 8192) -> RopeScaling | None:
    """The RopeScaling of a kind, None for "default". The defaults are those of Llama 3.1."""
    if kind == "llama3" and not low < high:
        refuse("high_freq_factor of llama3 rope scaling", f"above low_freq_factor = {low}", high)
    return None if kind == "default" else RopeScaling(kind, factor, low, high, int(context))
