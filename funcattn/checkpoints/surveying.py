"""What a model's files hold, by their headers: what is read, what is left out, and why not.

No weights are read: the fields of config.json and the names, shapes and types of tensors.
"""

from collections import Counter
from collections.abc import Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..transformer import Config
from . import families
from .families import CheckpointError
from .families.tables import Json
from .gguf.file import read_layout, read_parts
from .hf import compressed, quantized
from .hf.folder import weight_files
from .hf.weights import Contents, check_types, contents, entries, names_in
from .regular_files import read_json
from .sources import locate
from .tokenizer import declared

TOKENIZERS = ("tokenizer.json", *declared.OTHERS)


class Survey(NamedTuple):
    """What is known of a checkpoint without its weights. Not a record."""

    kind: str  # what its files are
    family: str  # the name of its family or architecture, "" where it says none
    config: Config | None  # None where it is refused
    why_not: str  # why it is not read; "" where it is
    read: tuple[str, ...]  # names of tensors that leaves are made of
    left_out: tuple[str, ...]  # names of tensors that are not part of the text model
    missing: tuple[str, ...]  # names that it lacks
    unknown: tuple[str, ...]  # names that no leaf is made of
    types: tuple[tuple[str, int], ...]  # type of tensors -> how many
    tokenizer: tuple[str, ...]  # files of a tokenizer
    codes: str = ""  # the method of matrices in codes, and how many; "" where all are floats


def survey(path_or_name: str | Path) -> Survey:
    """What `load` would read of a folder or a .gguf file, and why not.

    Args:
        path_or_name: as in `load`.

    Raises:
        FileNotFoundError: nothing has this name.

    Law: a checkpoint that loads is surveyed without a reason, with the config that it loads with
        (test_surveying.py::test_what_loads_is_surveyed_with_its_config).
    """
    path = locate(path_or_name)
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf":
        return _of_gguf(path)
    why = f"a {path.suffix or 'nameless'} file is neither a folder nor a .gguf file"
    return Survey("a file", "", None, why, (), (), (), (), (), ())


def _of_folder(folder: Path) -> Survey:
    tokenizer = tuple(name for name in TOKENIZERS if (folder / name).is_file())
    seen = Survey("a folder", "", None, "", (), (), (), (), (), tokenizer)
    if tokenizer and not (folder / "config.json").exists():
        seen = seen._replace(kind="a folder of a tokenizer, without a model")
    try:
        found = read_json(folder / "config.json")
        seen = seen._replace(family=str(found.get("model_type", "")))
        kinds, codes = compressed.kinds_in(found), quantized.take_settings(found)
        tower = families.tower_settings(found)
        wrapped, settings = tower is not found, dict(tower)
        inner = quantized.take_settings(settings)
        codes = inner if codes is None else codes
        seen = seen._replace(family=str(settings.get("model_type", seen.family)))
        if wrapped:
            seen = seen._replace(kind=f"a folder of a {found['model_type']}, of which text is read")
        files = weight_files(folder)
        names = names_in(files)
        config = families.read_config(families.untied(settings, names) if wrapped else settings)
        left_out = {x for x in names if wrapped and families.tower_name(x) is None}
        with ExitStack() as stack:
            family = families.family_of(seen.family, "model_type in config.json")
            held = contents(files, family, wrapped, stack)
            types = tuple(sorted(Counter(held.types.values()).items()))
            return _matched(seen._replace(types=types), config, held, kinds, codes, left_out)
    except (CheckpointError, FileNotFoundError) as error:
        return seen._replace(why_not=str(error))


def _matched(
    seen: Survey,
    config: Config,
    held: Contents,
    kinds: Mapping[str, str],
    codes: Json,
    left_out: Set[str],
) -> Survey:
    """The survey of a folder whose config is read: its tensors against those that leaves need."""
    family = families.family_of(seen.family, "model_type in config.json")
    coded = quantized.find(codes, entries(held))
    ours = {name: set(compressed.fields(name, kind).values()) for name, kind in kinds.items()}
    of_records = {stored for fields in ours.values() for stored in fields}
    of_codes = set() if coded is None else coded.parts
    harmless = {name for name in held.shapes if family.harmless.fullmatch(name)}
    floats = {
        name: shape
        for name, shape in held.shapes.items()
        if name not in of_records | of_codes | harmless
    }
    check_types(Path(seen.kind), floats, held.types)
    matrices = {} if coded is None else {x: made.shape for x, made in coded.matrices.items()}
    found = {name: name for name in (*floats, *matrices, *kinds)}
    if found and not any(name.startswith(family.prefix) for name in found):
        head = family.tensors["head"]
        found = {x if x == head else family.prefix + x: place for x, place in found.items()}
    shapes = {
        name: (floats | matrices)[place]
        for name, place in found.items()
        if place in floats or place in matrices
    }
    sources = compressed.by_leaves(families.locate_tensors(family, config), kinds)
    sources = families.in_layout(config, sources, shapes)
    wanted = families.wanted(config, sources)
    head = family.tensors["head"]
    extra = {x for x in found if x not in wanted and not (config.tied and x == head)}
    if coded is not None:
        extra -= set(coded.spare(wanted, shapes, found))
    missing = [x for x in wanted if x not in found]
    wrong = [x for x in wanted if x in shapes and shapes[x] != wanted[x]]
    why = ""
    if missing or extra or wrong:
        lists = {"missing": missing, "unknown": extra, "of another shape": wrong}
        told = [f"{len(names)} {kind}" for kind, names in lists.items() if names]
        why = f"of the tensors that config.json asks for: {', '.join(told)}"
        why += f", such as {wrong[0]}" if wrong else ""
    count, method = (len(kinds), compressed.METHOD) if coded is None else _method(coded)
    read = {held.places[x][1] for x in (*floats, *of_records, *of_codes) if x in held.places}
    unknown = {held.places[found[x]][1] for x in extra if found[x] in held.places}
    return seen._replace(
        config=None if why else config,
        why_not=why,
        read=tuple(sorted(read - unknown)),
        left_out=tuple(sorted(left_out | {held.places[x][1] for x in harmless})),
        missing=tuple(missing),
        unknown=tuple(sorted(unknown)),
        codes=f"{method}, {count} {'matrix' if count == 1 else 'matrices'}" if count else "",
    )


def _method(coded: quantized.Quantized) -> tuple[int, str]:
    return len(coded.matrices), coded.method


def _of_gguf(path: Path) -> Survey:
    empty = Survey("a .gguf file", "", None, "", (), (), (), (), (), ())
    try:
        metadata, stored = read_parts(path)
        name = str(metadata.get("general.architecture", ""))
        kinds = Counter(entry.type for _, entry in stored.values())
        has = ("in the file",) if "tokenizer.ggml.tokens" in metadata else ()
        empty = empty._replace(family=name, types=tuple(kinds.items()), tokenizer=has)
        names = tuple(stored)
        config, _ = read_layout(path, metadata, stored)
        unused = families.GGUF[name].unused(config)
    except (CheckpointError, FileNotFoundError) as error:
        return empty._replace(why_not=str(error))
    read, left_out = (tuple(x for x in names if (x in unused) is out) for out in (False, True))
    return empty._replace(read=read, left_out=left_out, config=config)
