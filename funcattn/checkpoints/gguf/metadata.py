"""Typed fields of GGUF metadata: a bool is not an integer here, and an array is not a number.

Every function takes the metadata and a name, and raises a CheckpointError with that name.
"""

from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json

Metadata = Mapping[str, Json]


def refuse(name: str, wanted: str, got: object) -> NoReturn:
    """Raise CheckpointError for a field of the tokenizer."""
    remedy = (
        "Save the model with its tokenizer.json in the Hugging Face layout, and load that folder."
    )
    fail("load", name, wanted, repr(got)[:200], remedy, CheckpointError)


def text(metadata: Metadata, name: str) -> str:
    """A string that must be there."""
    found = optional_text(metadata, name)
    if found is None:
        refuse(name, "a string", None)
    return found


def optional_text(metadata: Metadata, name: str) -> str | None:
    """A string, or None."""
    value = metadata.get(name)
    if value is not None and not isinstance(value, str):
        refuse(name, "a string", value)
    return value


def flag(metadata: Metadata, name: str, default: bool) -> bool:
    """True or false."""
    value = metadata.get(name, default)
    if not isinstance(value, bool):
        refuse(name, "true or false", value)
    return value


def integer(metadata: Metadata, name: str, default: int | None) -> int | None:
    """An integer, or the default."""
    value = metadata.get(name, default)
    if value is not default and (isinstance(value, bool) or not isinstance(value, int)):
        refuse(name, "an integer", value)
    return value


def index(metadata: Metadata, name: str, count: int) -> int | None:
    """The id of one of `count` tokens, or None."""
    value = integer(metadata, name, None)
    if value is not None and not 0 <= value < count:
        refuse(name, f"an id below {count}", value)
    return value


def texts(metadata: Metadata, name: str) -> list[str]:
    """An array of strings that must be there."""
    value = metadata.get(name)
    if not isinstance(value, list):
        refuse(name, "an array of strings", value)
    return value


def integers(metadata: Metadata, name: str, count: int) -> np.ndarray:
    """An array of `count` integers that must be there."""
    return _numbers(metadata, name, count, np.integer, "integers")


def floats(metadata: Metadata, name: str, count: int) -> np.ndarray:
    """An array of `count` floats that must be there, none of them NaN, which has no order."""
    found = _numbers(metadata, name, count, np.floating, "floats")
    if np.isnan(found).any():
        refuse(name, "numbers", "NaN among them")
    return found


def _numbers(metadata: Metadata, name: str, count: int, kind: type, wanted: str) -> np.ndarray:
    value = metadata.get(name)
    if (
        not isinstance(value, np.ndarray)
        or value.shape != (count,)
        or not np.issubdtype(value.dtype, kind)
    ):
        got = f"{value.size} of {value.dtype}" if isinstance(value, np.ndarray) else value
        refuse(name, f"an array of {count} {wanted}", got)
    return value
