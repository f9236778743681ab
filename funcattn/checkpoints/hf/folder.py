"""The Hugging Face layout: a folder of config.json, safetensors, and the tokenizer's files.

Nothing is unpickled: pytorch_model.bin and the like are refused. safetensors is read with the
library of that name, which checks the header against the file; names and shapes are checked here.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch

from ...core.errors import fail, printable
from ...transformer import Config, Params
from .. import families
from ..families import CheckpointError
from ..regular_files import (
    LARGE,
    REMEDY,
    of_one_save,
    read_json,
    read_text,
)
from ..tokenizer import declared, other_files
from ..tokenizer.tokenizer import Tokenizer, from_files
from . import compressed, quantized
from .weights import Cut, names_in, read_weights

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Reading.


def read_folder(
    folder: Path,
    dtype: torch.dtype | None = None,
    cut: Callable[[Config], Cut] | None = None,
    *,
    quantization: Mapping[str, object] | None = None,
) -> tuple[Config, Params, Tokenizer | None]:
    """Config, weights and tokenizer of a folder.

    The tokenizer is None without tokenizer.json, with a warning if there is another one.

    Args:
        dtype: of the weights; None keeps those of the files.
        cut: config -> the slices of each leaf to read. Only these are read, except from tensors
            with another layout than the leaf.
        quantization: quantization_config in the place of that of config.json.
    """
    read = lambda: _read_folder(folder, dtype, cut, quantization)
    return of_one_save(folder, ("config.json", "tokenizer.json"), read)


def _read_folder(
    folder: Path,
    dtype: torch.dtype | None,
    cut: Callable[[Config], Cut] | None,
    quantization: Mapping[str, object] | None,
) -> tuple[Config, Params, Tokenizer | None]:
    found = read_json(folder / "config.json")
    kinds = compressed.kinds_in(found)
    codes = quantized.take_settings(found)
    tower = families.tower_settings(found)
    wrapped, settings = tower is not found, dict(tower)
    inner = quantized.take_settings(settings)
    codes = inner if codes is None else codes
    codes = codes if quantization is None else dict(quantization)
    families.read_config(settings)  # what it refuses comes before what the files lack
    if cut is not None and (kinds or codes):
        remedy = "Load it whole, and shard it: fa.shard(mesh)(fa.load(folder).params)."
        fail(
            "load_sharded",
            f"weights of {folder}",
            "floats, of which each process reads its own",
            "quantized ones",
            remedy,
            CheckpointError,
        )
    files = weight_files(folder)
    if wrapped:
        settings = dict(families.untied(settings, names_in(files)))
        told = (
            f"load: {folder} is a {found['model_type']}, of which the text is read, as a "
            f"{settings['model_type']}: what encodes images is left out."
        )
        warnings.warn(printable(told), UserWarning, stacklevel=7)  # at the call of load
    config = families.read_config(settings)
    wanted = None if cut is None else cut(config)
    params, told = read_weights(
        folder, files, settings, config, dtype, kinds, wanted, wrapped, codes
    )
    if told:
        warnings.warn(told, UserWarning, stacklevel=7)  # at the call of load
    return config, params, _read_tokenizer(folder, settings)


def weight_files(folder: Path) -> list[Path]:
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
    elif made := other_files.as_tokenizer_json(
        folder, settings.get("model_type"), beside, optional
    ):
        text, beside = made
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


def _refuse(what: str, wanted: str, got: object) -> NoReturn:
    fail("load", what, wanted, got, REMEDY, CheckpointError)
