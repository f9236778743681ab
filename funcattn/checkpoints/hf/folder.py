"""The Hugging Face layout: a folder of config.json, safetensors, and the tokenizer's files.

Nothing is unpickled: pytorch_model.bin and the like are refused. safetensors is read with the
library of that name, which checks the header against the file; names and shapes are checked here.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import tree
from ...core.errors import fail, printable
from ...layers import Weight
from ...transformer import Config, Params
from .. import families
from ..families import CheckpointError
from ..regular_files import (
    LARGE,
    REMEDY,
    check_regular,
    of_one_save,
    read_bytes,
    read_json,
    read_text,
)
from ..tokenizer import declared, gpt2_files, sentencepiece_model
from ..tokenizer.tokenizer import Tokenizer, from_files
from . import compressed, quantizers

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# Reading.


Cut = Callable[[str, tuple[int, ...]], tuple[slice, ...]]  # path and shape of a leaf -> its shard


def read_folder(
    folder: Path, dtype: torch.dtype | None = None, cut: Callable[[Config], Cut] | None = None
) -> tuple[Config, Params, Tokenizer | None]:
    """Config, weights and tokenizer of a folder.

    The tokenizer is None without tokenizer.json, with a warning if there is another one.

    Args:
        dtype: of the weights; None keeps those of the files.
        cut: config -> the slices of each leaf to read. Only these are read, except from tensors
            with another layout than the leaf.
    """
    read = lambda: _read_folder(folder, dtype, cut)
    return of_one_save(folder, ("config.json", "tokenizer.json"), read)


def _read_folder(
    folder: Path, dtype: torch.dtype | None, cut: Callable[[Config], Cut] | None
) -> tuple[Config, Params, Tokenizer | None]:
    found = read_json(folder / "config.json")
    tower = families.tower_settings(found)
    wrapped, settings = tower is not found, dict(tower)
    kinds = compressed.kinds_in(settings)
    families.read_config(settings)  # what it refuses comes before what the files lack
    if cut is not None and kinds:
        _refuse("the weights", "plain where they are read in parts", "compressed ones")
    files = _weight_files(folder)
    if wrapped:
        settings = dict(families.untied(settings, _names(files)))
        told = (
            f"load: {folder} is a {found['model_type']}, of which the text is read, as a "
            f"{settings['model_type']}: what encodes images is left out."
        )
        warnings.warn(printable(told), UserWarning, stacklevel=6)  # at the call of load
    config = families.read_config(settings)
    wanted = None if cut is None else cut(config)
    return (
        config,
        _read_weights(folder, files, settings, config, dtype, kinds, wanted, wrapped),
        _read_tokenizer(folder, settings),
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: one file, or the shards that the index names."""
    if _is_there(folder / WEIGHTS):
        return [folder / WEIGHTS]
    if _is_there(folder / INDEX):
        places = read_json(folder / INDEX, LARGE).get("weight_map")
        if not isinstance(places, dict):
            _refuse(f"weight_map of {INDEX}", "an object", places)
        names = list(dict.fromkeys(str(name) for name in places.values()))
        for name in names:
            # A shard must be a plain name: no path outside of the folder.
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                _refuse(
                    f"a shard in {INDEX}", "the name of a .safetensors file beside it", repr(name)
                )
            if not _is_there(folder / name):
                told = (
                    f"load: {folder / name} should be there, since {INDEX} names it. Fetch the "
                    "folder again."
                )
                raise FileNotFoundError(printable(told))
        return [folder / name for name in names]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        remedy = (
            "A pickle runs code of its author's when it is opened: convert it to safetensors where "
            "that does no harm."
        )
        fail(
            "load", f"weights of {folder}", WEIGHTS, ", ".join(pickled[:5]), remedy, CheckpointError
        )
    told = f"load: {folder} should hold {WEIGHTS} or {INDEX}, has neither. Fetch the folder again."
    raise FileNotFoundError(printable(told))


def _names(files: list[Path]) -> list[str]:
    """The names of all tensors."""
    names: list[str] = []
    for path in files:
        check_regular(path)
        with _safetensors_errors(path):
            names += safe_open(path, framework="pt").keys()
    return names


def _read_weights(
    folder: Path,
    files: list[Path],
    settings: Mapping[str, object],
    config: Config,
    dtype: torch.dtype | None,
    kinds: Mapping[str, str],
    cut: Cut | None,
    wrapped: bool,
) -> Params:
    family = families.family_of(settings.get("model_type"), "model_type in config.json")
    found: dict[str, tuple[int, ...]] = {}
    where: dict[str, Any] = {}
    parts = {
        stored for name, kind in kinds.items() for stored in compressed.fields(name, kind).values()
    }
    types: dict[str, str] = {}
    for path in files:
        check_regular(path)
        with _safetensors_errors(path):
            file = safe_open(path, framework="pt")
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                name = families.tower_name(stored) if wrapped else stored
                if name is None:
                    continue
                name = family.name_of(name)
                part = file.get_slice(stored)
                if name in found:
                    _refuse(
                        f"{name} in {path.name}",
                        f"in one file only, and is in {where[name][1].name} too",
                        "two of it",
                    )
                found[name], where[name], types[name] = (
                    tuple(part.get_shape()),
                    (file, path, stored),
                    part.get_dtype(),
                )
    ours = {name for name in parts & types.keys() if types[name] in {*compressed.CODES, *DTYPES}}
    foreign = {
        name: found[name]
        for name in found
        if name not in ours and not family.harmless.fullmatch(name)
    }
    _check_types(folder, foreign, types)
    dtypes = {DTYPES[types[name]] for name in foreign}
    dtype = dtype or _one_dtype(settings, dtypes)

    # By name: slices of tensors that have the layout of the leaf.
    plain: dict[str, tuple[slice, ...]] = {}
    precise: set[str] = set()  # what keeps its dtype where another is narrower

    def tensor(name: str, dtype: torch.dtype | None = None) -> Tensor:
        file, path, stored = where[name]
        with _safetensors_errors(path):
            mapped = (
                file.get_slice(stored)[plain[name]] if name in plain else file.get_tensor(stored)
            )
        kind = dtype or mapped.dtype
        if name in precise:
            kind = torch.promote_types(kind, mapped.dtype)
        return mapped.to(kind, copy=True)  # a copy: the mapped file may change

    def read(name: str) -> Weight:
        return records[name] if name in records else tensor(name, dtype)

    # Written as a model without a head.
    if found and not any(name.startswith(family.prefix) for name in found):
        whole = lambda name: name if name == family.tensors["head"] else family.prefix + name
        found, where = (
            {whole(name): value for name, value in table.items()} for table in (found, where)
        )
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
        if not torch.equal(read(head), read(embedding)):
            _refuse(
                f"{head} of {folder}",
                f"the same as {embedding}, since config.json ties them",
                "other numbers",
            )
        del found[head]
    stored = {name: shape for name, shape in found.items() if not family.harmless.fullmatch(name)}
    held = families.in_layout(config, families.locate_tensors(family, config), stored)
    # Rounded, it would choose other experts than the original, which keeps it in float32.
    precise |= {source.names[0] for source in held if source.paths[0].endswith(".choice_bias")}
    families.match(families.wanted(config, held), stored, str(folder))
    if cut is None:
        return families.unpack(config, held, read)
    shapes = families.shapes(config)
    plain |= {
        source.names[0]: cut(source.paths[0], shapes[source.paths[0]])
        for source in held
        if not source.is_changed
    }
    params = families.unpack(config, held, read)
    turned = {path for source in held if source.is_changed for path in source.paths}
    return tree.map_with_path(
        lambda path, x: x[cut(path, shapes[path])].clone() if path in turned else x, params
    )


def _one_dtype(settings: Mapping[str, object], dtypes: set[torch.dtype]) -> torch.dtype | None:
    """The dtype for several: that of config.json, else their promotion; None where all agree."""
    if len(dtypes) < 2:
        return None
    said = {str(kind).removeprefix("torch."): kind for kind in dtypes}.get(
        str(settings.get("dtype", settings.get("torch_dtype")))
    )
    return said or functools.reduce(torch.promote_types, dtypes)


def _read_tokenizer(folder: Path, settings: Mapping[str, object]) -> Tokenizer | None:
    names = ("tokenizer_config.json", "generation_config.json", *declared.BESIDE)
    has = _is_there(folder / "tokenizer.json")
    others = [] if has else [name for name in declared.OTHERS if (folder / name).is_file()]
    if not has and not others:
        return None
    optional = {name: read_json(folder / name) for name in names if _is_there(folder / name)}
    beside = optional.get("tokenizer_config.json", {})
    if has:
        text = read_text(folder / "tokenizer.json", LARGE)
    elif gpt2_files.is_gpt2(folder, settings.get("model_type"), beside):
        text, beside = (
            gpt2_files.as_tokenizer_json(folder, beside),
            gpt2_files.with_roles(beside, optional),
        )
    elif others[0] == sentencepiece_model.FILE and isinstance(
        made := sentencepiece_model.as_tokenizer_json(
            read_bytes(folder / others[0], LARGE), beside
        ),
        tuple,
    ):
        text, roles = made
        named = {**optional.get("special_tokens_map.json", {}), **beside}
        beside = {**{name: text for name, text in roles.items() if name not in named}, **beside}
    else:
        wanted, got = "tokenizer.json", f"{others[0]}, {declared.OTHERS[others[0]]}"
        remedy = (
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one."
        )
        text = (
            f"load: the tokenizer of {folder} should be {wanted}, got {got}, so it is None. "
            f"{remedy}"
        )
        warnings.warn(text, UserWarning, stacklevel=8)  # at the call of load
        return None
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    templates = {
        path.stem: read_text(path)
        for path in [folder / "chat_template.jinja", *more]
        if _is_there(path)
    }
    if "chat_template" in templates:
        templates["default"] = templates.pop("chat_template")
    ends = optional.get("generation_config.json", {}).get(
        "eos_token_id", settings.get("eos_token_id")
    )
    stop = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(
        isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < 2**32 for end in stop
    ):
        _refuse("eos_token_id", "a token id or a list of them", ends)
    return from_files(text, beside, templates, stop, optional)


# Validation of files.


def _is_there(path: Path) -> bool:
    """True where the folder has an entry of this name, also a broken link: then reading fails."""
    return os.path.lexists(path)


def _check_types(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]
) -> None:
    """Fail where tensors are not floating; the error names the quantization method, if known."""
    if quantized := quantizers.method_of(shapes, types):
        method, shown = quantized
        remedy = (
            "Dequantize them with the tool that made them, and save the model again; or load one "
            "that was not quantized."
        )
        got = f"those of {method}: {shown} {types[shown]} {shapes[shown]}"
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
