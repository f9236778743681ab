"""What a quantized file holds in the place of a matrix, checked before anything is read.

A reader of a method finds the matrices of a file: for each its name and shape in a file of floats,
the tensors that stand for it, and a function that makes the record of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from ....core.errors import fail
from ....layers import Weight
from ...families import CheckpointError
from ...families.tables import Json
from ..patterns import PatternError, full_matches

FLOATS = ("F16", "BF16", "F32")
WORDS = ("I32", "U32")
DAMAGED = "The file is damaged, or not what its quantization_config says: fetch it again."
SETTINGS = "quantization_config of config.json"
CONVERT = (
    "Dequantize the model with the tool that made it, and save it again; or load one that was not "
    "quantized."
)
MAX_PATTERNS = 64  # of one file: each is matched in a process of its own
Read = Callable[[str], Tensor]


class Entry(NamedTuple):
    """A tensor of a file: shape, type as in safetensors, its own name, and the file."""

    shape: tuple[int, ...]
    type: str
    stored: str
    file: str


class Dense(NamedTuple):
    """A matrix of floats that no record represents, and why."""

    matrix: Tensor
    why: str


@dataclass(frozen=True)
class Stored:
    """A matrix that is stored in codes.

    name, shape: of the tensor that a file of floats has instead. parts: the names of the tensors
    that stand for it. read: reads them, and gives the record, (N, K) or (X, N, K). turned: True
    where the file of floats has the transpose (of the last two axes) of what `read` gives.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    read: Callable[[Read], Weight | Dense]
    turned: bool = False


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file by name, the metadata of its header, and what reads a tensor."""

    found: Mapping[str, Entry]
    metadata: Mapping[str, str]
    read: Read

    def ending(self, end: str) -> list[str]:
        """The names that end so, without the end."""
        return [name.removesuffix(end) for name in self.found if name.endswith(end)]

    def shape(
        self, name: str, types: Sequence[str], wanted: Sequence[int | None] | None = None
    ) -> tuple[int, ...]:
        """The shape of a tensor that must be there, of one of these types and of this shape.

        Args:
            wanted: None for any; None in it for any size.

        Raises:
            CheckpointError: it is missing, or another.
        """
        entry = self.found.get(name)
        if entry is None:
            wrong(name, "there, beside the codes of its matrix", "none of this name")
        if entry.type not in types:
            self.refuse(name, f"of type {' or '.join(types)}", entry.type)
        sizes = None if wanted is None else tuple(wanted)
        if sizes is not None and (
            len(sizes) != len(entry.shape)
            or any(size not in (None, got) for size, got in zip(sizes, entry.shape, strict=True))
        ):
            letters = ", ".join("any" if size is None else str(size) for size in sizes)
            self.refuse(name, f"of shape ({letters})", entry.shape)
        if not all(entry.shape):
            self.refuse(name, "a tensor with numbers in it", entry.shape)
        return entry.shape

    def refuse(self, name: str, wanted: str, got: object) -> NoReturn:
        """Raise CheckpointError for a tensor, with its file."""
        wrong(f"{name} in {self.found[name].file}", wanted, got)


def wrong(what: str, wanted: str, got: object, remedy: str = DAMAGED) -> NoReturn:
    """Raise CheckpointError for a tensor of a quantized file, or a field of its settings."""
    fail("load", what, wanted, got, remedy, CheckpointError)


def said(settings: Mapping[str, Json], name: str, allowed: Iterable[Any], default: Any) -> Any:
    """A field of the settings, one of those allowed; null counts as absent.

    Raises:
        CheckpointError: it is another value, which would be read wrongly.
    """
    value = settings.get(name)
    value = default if value is None else value
    options = list(allowed)
    if not any(type(value) is type(option) and value == option for option in options):
        shown = " or ".join(map(repr, options))
        wrong(f"{name} in {SETTINGS}", shown, repr(value), CONVERT)
    return value


def group_of(settings: Mapping[str, Json], K: int, name: str, default: int = 128) -> int:
    """The columns of a group of a matrix (N, K): `group_size`, of which -1 is all of a row.

    Raises:
        CheckpointError: no integer, or one that does not divide the columns.
    """
    size = settings.get("group_size")
    size = default if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
        wrong(f"group_size in {SETTINGS}", "a number of columns, or -1", repr(size))
    size = K if size == -1 else size
    if K % size:
        wrong(f"group_size in {SETTINGS}", f"a divisor of the {K} columns of {name}", size)
    return size


def beginning(pattern: str, modules: Sequence[str], field: str) -> list[str]:
    """The modules that begin with a match of a pattern of the settings, as `re.match` finds it.

    Raises:
        CheckpointError: it cannot be evaluated.
    """
    try:
        return full_matches(rf"(?:{pattern})[\s\S]*", modules)
    except PatternError as error:
        got = f"{pattern!r}, {error}"
        wrong(f"{field} in {SETTINGS}", "patterns that can be evaluated", got, CONVERT)
