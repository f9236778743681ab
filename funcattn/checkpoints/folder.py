"""The Hugging Face layout: a folder of config.json, safetensors, and the tokenizer's files.

Nothing is unpickled: pytorch_model.bin and its kin are refused. safetensors is read with the library of that name, which holds a
header against the file before it gives a tensor; what names it must hold, and in which shapes, is checked here.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import families, tree
from .._checks import fail
from ..families import CheckpointError
from ..transformer import Config, Params
from . import compressed, declared
from .tokenizer import Tokenizer, from_files

SMALL, LARGE = 2**22, 2**26  # bytes of a file of settings, of tokenizer.json or an index; Gemma's, the largest seen, has 2**25
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# Reading.


Cut = Callable[[str, tuple[int, ...]], tuple[slice, ...]]  # path and shape of a leaf -> which of it is wanted


def read_folder(
    folder: Path, dtype: torch.dtype | None = None, cut: Callable[[Config], Cut] | None = None
) -> tuple[Config, Params, Tokenizer | None]:
    """Config, weights and tokenizer of a folder; where there is no tokenizer.json that is None, with a warning if it has another.

    Args:
        cut: of the config, which part of each leaf is wanted; no more of a file is read, but where it holds a leaf in another form.
    """
    settings = read_json(folder / "config.json")
    kinds = compressed.kinds_in(settings)
    config = families.read_config(settings)
    if cut is not None and kinds:
        _refuse("the weights", "plain where they are read in parts", "compressed ones")
    files = _weight_files(folder)
    wanted = None if cut is None else cut(config)
    return config, _read_weights(folder, files, settings, config, dtype, kinds, wanted), _read_tokenizer(folder, settings)


def read_json(path: Path, largest: int = SMALL) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(read_text(path, largest))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        _refuse(path.name, "JSON", f"an error: {str(error)[:200]}")
    if not isinstance(found, dict):
        _refuse(path.name, "an object", f"a {type(found).__name__}")
    return found


def read_text(path: Path, largest: int = SMALL) -> str:
    """The text of a file of at most `largest` bytes."""
    if not path.is_file():
        raise FileNotFoundError(
            f"load: {path} should be there, and is not. Give a folder in the Hugging Face layout, or fetch it again."
        )
    if path.stat().st_size > largest:
        _refuse(path.name, f"at most {largest} bytes", path.stat().st_size)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        _refuse(path.name, "UTF-8", "other bytes")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: the one file, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX, LARGE).get("weight_map")
        if not isinstance(places, dict):
            _refuse(f"weight_map of {INDEX}", "an object", places)
        names = list(dict.fromkeys(str(name) for name in places.values()))
        for name in names:
            # A shard is a plain name: no path leads out of the folder.
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                _refuse(f"a shard in {INDEX}", "the name of a .safetensors file beside it", repr(name))
            if not (folder / name).is_file():
                raise FileNotFoundError(f"load: {folder / name} should be there, since {INDEX} names it. Fetch the folder again.")
        return [folder / name for name in names]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        remedy = "A pickle runs code of its author's when it is opened: convert it to safetensors where that does no harm."
        fail("load", f"weights of {folder}", WEIGHTS, ", ".join(pickled[:5]), remedy, CheckpointError)
    raise FileNotFoundError(f"load: {folder} should hold {WEIGHTS} or {INDEX}, has neither. Fetch the folder again.")


def _read_weights(
    folder: Path,
    files: list[Path],
    settings: Mapping[str, Any],
    config: Config,
    dtype: torch.dtype | None,
    kinds: Mapping[str, str],
    cut: Cut | None,
) -> Params:
    family = families.family_of(settings.get("model_type"), "model_type in config.json")
    found: dict[str, tuple[int, ...]] = {}
    where: dict[str, Any] = {}
    parts = {stored for name, kind in kinds.items() for stored in compressed.fields(name, kind).values()}
    for path in files:
        with _safetensors_errors(path):
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                known = part.get_dtype() in DTYPES or (name in parts and part.get_dtype() in compressed.CODES)
                if not known and not family.harmless.fullmatch(name):
                    _refuse(f"the type of {name} in {path.name}", f"one of {', '.join(DTYPES)}", part.get_dtype())
                if name in found:
                    _refuse(f"{name} in {path.name}", f"in one file only, and is in {where[name][1].name} too", "two of it")
                found[name], where[name] = tuple(part.get_shape()), (file, path, name)

    plain: dict[str, tuple[slice, ...]] = {}  # by name, where leaves are wanted in parts and a file holds them as they are

    def tensor(name: str, dtype: torch.dtype | None = None) -> Tensor:
        file, path, stored = where[name]
        with _safetensors_errors(path):
            mapped = file.get_slice(stored)[plain[name]] if name in plain else file.get_tensor(stored)
        return mapped.to(dtype or mapped.dtype, copy=True)  # out of the mapping: the file may change, the value may not

    def read(name: str) -> Any:
        return records[name] if name in records else tensor(name, dtype)

    if family.prefix and found and not any(name.startswith(family.prefix) for name in found):  # as some writers leave it out
        found, where = ({family.prefix + name: value for name, value in table.items()} for table in (found, where))
    records = {}
    for name, kind in kinds.items():
        for stored in compressed.fields(name, kind).values():
            if stored not in found:
                _refuse(f"tensors of {folder}", f"those of config.json, {stored} among them", "none of this name")
        records[name] = compressed.together(name, kind, tensor)
        for stored in compressed.fields(name, kind).values():
            del found[stored]
        found[name] = records[name].shape
    head, embedding = family.tensors["head"], family.tensors["embedding"]
    if config.tied and found.get(head, ()) == found.get(embedding):  # some writers store the one matrix twice
        if not torch.equal(read(head), read(embedding)):
            _refuse(f"{head} of {folder}", f"the same as {embedding}, since config.json ties them", "other numbers")
        del found[head]
    stored = {name: shape for name, shape in found.items() if not family.harmless.fullmatch(name)}
    held = families.whereabouts(family, config)
    families.match(families.wanted(config, held), stored, str(folder))
    if cut is None:
        return families.unpack(config, held, read)
    shapes = families.shapes(config)
    plain |= {source.names[0]: cut(source.paths[0], shapes[source.paths[0]]) for source in held if not source.is_changed}
    params = families.unpack(config, held, read)
    turned = {path for source in held if source.is_changed for path in source.paths}
    return tree.map_with_path(lambda path, x: x[cut(path, shapes[path])].clone() if path in turned else x, params)


def _read_tokenizer(folder: Path, settings: Mapping[str, Any]) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        others = [name for name in declared.OTHERS if (folder / name).is_file()]
        if others:
            wanted, got = "tokenizer.json", f"{others[0]}, {declared.OTHERS[others[0]]}"
            remedy = "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one."
            text = f"load: the tokenizer of {folder} should be {wanted}, got {got}, so it is None. {remedy}"
            warnings.warn(text, UserWarning, stacklevel=5)  # where load was called
        return None
    names = ("tokenizer_config.json", "generation_config.json", *declared.BESIDE)
    optional = {name: read_json(folder / name) for name in names if (folder / name).is_file()}
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    templates = {path.stem: read_text(path) for path in [folder / "chat_template.jinja", *more] if path.is_file()}
    if "chat_template" in templates:
        templates["default"] = templates.pop("chat_template")
    ends = optional.get("generation_config.json", {}).get("eos_token_id", settings.get("eos_token_id"))
    stop = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < 2**32 for end in stop):
        _refuse("eos_token_id", "a token id or a list of them", ends)
    text = read_text(folder / "tokenizer.json", LARGE)
    return from_files(text, optional.get("tokenizer_config.json", {}), templates, stop, optional)


# Checks of what a file says.


@contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    """What the `safetensors` library raises, as CheckpointError."""
    try:
        yield
    except SafetensorError as error:
        _refuse(path.name, "safetensors", f"an error: {str(error)[:200]}")


def _refuse(what: str, wanted: str, got: Any) -> NoReturn:
    fail("load", what, wanted, got, "The file is damaged, cut off, or not what its name says: fetch it again.", CheckpointError)
