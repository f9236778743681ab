"""The weights of a folder in the Hugging Face layout: tensors of its files to Params.

The library `safetensors` checks the header of a file against its size; names and shapes are checked
here, against those of the family. Whole tensors are read, not mapped: a mapped page is resident
beside its copy, and ends the process where the file is cut meanwhile.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import tree
from ...core.errors import fail
from ...layers import Weight
from ...transformer import Config, Params
from .. import families
from ..families import CheckpointError
from ..families.tables import Json
from ..freed_memory import Reading, give_back
from ..regular_files import REMEDY, check_regular, open_regular, parse_object
from . import compressed, quantized, quantizers

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALL_TYPES = {
    **DTYPES,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}

Cut = Callable[[str, tuple[int, ...]], tuple[slice, ...]]  # path and shape of a leaf -> its shard


@dataclass
class Contents:
    """The tensors of files by name: shape, type as in safetensors, and place."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    places: dict[str, tuple["OpenFile", str]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)

    def read(self, name: str, rows: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or a slice of it, in memory of its own."""
        file, stored = self.places[name]
        if rows is None:
            self.reading.count(math.prod(self.shapes[name]) * ALL_TYPES[self.types[name]].itemsize)
            return file.read(stored, ALL_TYPES[self.types[name]], self.shapes[name])
        with _safetensors_errors(file.path):
            return file.mapped.get_slice(stored)[rows].clone()


@dataclass(frozen=True)
class OpenFile:
    """A file of safetensors: as its library opens it, its bytes, and where tensors are in it."""

    path: Path
    mapped: Any
    bytes: BufferedReader
    offsets: Mapping[str, tuple[int, int]]

    def read(self, stored: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor."""
        found = torch.empty(shape, dtype=dtype, device="cpu")
        begin, end = self.offsets[stored]
        into: Any = found.reshape(-1).view(torch.uint8).numpy() if found.numel() else b""
        if end - begin != found.nbytes:
            _refuse(f"{stored} in {self.path.name}", f"{found.nbytes} bytes", end - begin)
        self.bytes.seek(begin)
        if found.numel() and self.bytes.readinto(into) != found.nbytes:
            _refuse(f"{stored} in {self.path.name}", f"{found.nbytes} bytes", "fewer")
        return found


def _open(path: Path, stack: ExitStack) -> OpenFile:
    with _safetensors_errors(path):
        mapped = safe_open(path, framework="pt")
    file = cast(BufferedReader, stack.enter_context(open_regular(path)))
    length = int.from_bytes(file.read(8), "little")
    header = parse_object(file.read(length).decode(), path.name)
    places = {name: told["data_offsets"] for name, told in header.items() if name != "__metadata__"}
    start = 8 + length
    return OpenFile(
        path, mapped, file, {name: (start + a, start + b) for name, (a, b) in places.items()}
    )


def names_in(files: list[Path]) -> list[str]:
    """The names of all tensors of files."""
    names: list[str] = []
    for path in files:
        check_regular(path)
        with _safetensors_errors(path):
            names += safe_open(path, framework="pt").keys()
    return names


def contents(
    files: list[Path], family: families.Family, wrapped: bool, stack: ExitStack
) -> Contents:
    """The tensors of files by the names of the family; those of no text are left out."""
    held = Contents()
    for path in files:
        check_regular(path)
        file = _open(path, stack)
        with _safetensors_errors(path):
            held.metadata |= file.mapped.metadata() or {}
            for stored in file.mapped.keys():  # noqa: SIM118 (not a dict)
                name = families.tower_name(stored) if wrapped else stored
                if name is None:
                    continue
                name = family.name_of(name)
                if name in held.shapes:
                    other = held.places[name][0].path.name
                    wanted = f"in one file only, and is in {other} too"
                    _refuse(f"{name} in {path.name}", wanted, "two of it")
                part = file.mapped.get_slice(stored)
                held.shapes[name] = tuple(part.get_shape())
                held.types[name], held.places[name] = part.get_dtype(), (file, stored)
    return held


def read_weights(
    folder: Path,
    files: list[Path],
    settings: Mapping[str, object],
    config: Config,
    dtype: torch.dtype | None,
    kinds: Mapping[str, str],
    cut: Cut | None,
    wrapped: bool,
    codes: Json,
) -> tuple[Params, str]:
    """Params of a folder, and a warning or "".

    Args:
        settings: config.json of the family.
        kinds: name -> type of the records that this library wrote.
        wrapped: True where names are those of a wrapper of the family.
        codes: quantization_config of another tool, or None.
    """
    with ExitStack() as stack:
        family = families.family_of(settings.get("model_type"), "model_type in config.json")
        held = contents(files, family, wrapped, stack)
        found = _read(folder, held, settings, config, dtype, kinds, cut, codes)
    give_back()
    return found


def _read(
    folder: Path,
    held: Contents,
    settings: Mapping[str, object],
    config: Config,
    dtype: torch.dtype | None,
    kinds: Mapping[str, str],
    cut: Cut | None,
    codes: Json,
) -> tuple[Params, str]:
    family = families.family_of(settings.get("model_type"), "model_type in config.json")
    types = held.types
    coded = quantized.find(codes, entries(held))
    of_codes = set() if coded is None else coded.parts
    parts = {
        stored for name, kind in kinds.items() for stored in compressed.fields(name, kind).values()
    }
    ours = {
        name for name in parts & types.keys() if types[name] in compressed.FIELDS | DTYPES.keys()
    }
    foreign = {
        name: shape
        for name, shape in held.shapes.items()
        if name not in ours | of_codes and not family.harmless.fullmatch(name)
    }
    check_types(folder, foreign, types)
    dtypes = {DTYPES[types[name]] for name in foreign}
    of_floats = next(iter(dtypes), torch.float32)
    dtype = dtype or _one_dtype(settings, dtypes)

    found, places = dict(held.shapes), {name: name for name in held.shapes}
    for name in of_codes:
        del found[name]
    if coded is not None:
        found |= {name: stored.shape for name, stored in coded.matrices.items()}
        places |= {name: name for name in coded.matrices}
    # Written as a model without a head.
    if found and not any(name.startswith(family.prefix) for name in found):
        whole = lambda name: name if name == family.tensors["head"] else family.prefix + name
        found = {whole(name): shape for name, shape in found.items()}
        places = {whole(name): place for name, place in places.items()}

    # By name: slices of tensors that have the layout of the leaf.
    plain: dict[str, tuple[slice, ...]] = {}
    precise: set[str] = set()  # what keeps its dtype where another is narrower

    def tensor(name: str) -> Tensor:
        return held.read(places[name], plain.get(name))

    def read(name: str) -> Weight:
        if name in records:
            return records[name]
        if coded is not None and places[name] in coded.matrices:
            return coded.matrices[places[name]].read(held.read)
        floats = tensor(name)
        kind = dtype or floats.dtype
        return floats.to(torch.promote_types(kind, floats.dtype) if name in precise else kind)

    records = {}
    for name, kind in kinds.items():
        for stored in compressed.fields(name, kind).values():
            if stored not in found:
                _refuse(
                    f"tensors of {folder}",
                    f"those of config.json, {stored} among them",
                    "none of this name",
                )
        records[name] = compressed.read_record(name, kind, tensor)
        for stored in compressed.fields(name, kind).values():
            del found[stored]
        found[name] = records[name].shape
    head, embedding = family.tensors["head"], family.tensors["embedding"]
    if config.tied and found.get(head, ()) == found.get(embedding):  # some files have both
        if not torch.equal(*(quantized.matrix(read(name)) for name in (head, embedding))):
            _refuse(
                f"{head} of {folder}",
                f"the same as {embedding}, since config.json ties them",
                "other numbers",
            )
        del found[head]
    unused = family.unused(config)
    stored = {
        name: shape
        for name, shape in found.items()
        if not family.harmless.fullmatch(name) and name not in unused
    }
    sources = compressed.by_leaves(families.locate_tensors(family, config), kinds)
    sources = families.in_layout(config, sources, stored)
    # Rounded, it would choose other experts than the original, which keeps it in float32.
    precise |= {source.names[0] for source in sources if source.paths[0].endswith(".choice_bias")}
    wanted = families.wanted(config, sources)
    if coded is not None:
        for name in coded.spare(wanted, stored, places):
            if not tensor(name).any():  # a bias of zeros that a tool added
                del stored[name]
    families.match(wanted, stored, str(folder))
    if coded is not None:
        params = families.unpack(config, coded.sources(sources, places, dtype or of_floats), read)
        return params, coded.told(folder)
    if cut is None:
        return families.unpack(config, sources, read), ""
    shapes = families.shapes(config)
    plain |= {
        source.names[0]: cut(source.paths[0], shapes[source.paths[0]])
        for source in sources
        if not source.is_changed
    }
    params = families.unpack(config, sources, read)
    turned = {path for source in sources if source.is_changed for path in source.paths}
    own = lambda path, x: families.by_columns(x[cut(path, shapes[path])].clone())
    shard = lambda path, x: own(path, x) if path in turned else x
    return tree.map_with_path(shard, params), ""


def entries(held: Contents) -> quantized.Tensors:
    """The same as what methods of quantization look at."""
    entries = {
        name: quantized.Entry(held.shapes[name], held.types[name], stored, file.path.name)
        for name, (file, stored) in held.places.items()
    }
    return quantized.Tensors(entries, held.metadata, held.read)


def _one_dtype(settings: Mapping[str, object], dtypes: set[torch.dtype]) -> torch.dtype | None:
    """The dtype for several: that of config.json, else their promotion; None where all agree."""
    if len(dtypes) < 2:
        return None
    said = {str(kind).removeprefix("torch."): kind for kind in dtypes}.get(
        str(settings.get("dtype", settings.get("torch_dtype")))
    )
    return said or functools.reduce(torch.promote_types, dtypes)


def check_types(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]
) -> None:
    """Fail where tensors are not floating; the error names the quantization method, if known."""
    if shown := quantizers.method_of(shapes, types):
        method, name = shown
        remedy = (
            "Say what they are, fa.load(folder, quantization=...), as quantization_config of "
            "config.json would; or load a model that was not quantized."
        )
        got = f"those of {method}: {name} {types[name]} {shapes[name]}"
        fail(
            "load",
            f"weights of {folder}",
            "floats, as config.json says",
            got,
            remedy,
            CheckpointError,
        )
    for name in shapes:
        if types[name] not in DTYPES:
            remedy = (
                "Numbers that are no floats are codes, of a tool that config.json does not name: "
                "save the model again by it."
            )
            fail(
                "load",
                f"the type of {name} in {folder}",
                f"one of {', '.join(DTYPES)}",
                types[name],
                remedy,
                CheckpointError,
            )


@contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    """Raise errors of the `safetensors` library as CheckpointError."""
    try:
        yield
    except SafetensorError as error:
        _refuse(path.name, "safetensors", f"an error: {str(error)[:200]}")


def _refuse(what: str, wanted: str, got: object) -> NoReturn:
    fail("load", what, wanted, got, REMEDY, CheckpointError)
