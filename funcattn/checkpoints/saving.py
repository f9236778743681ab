"""Writing the Hugging Face layout: the whole folder, or nothing.

A folder is written beside its place, flushed to the disk, and moved there in one rename when it is whole. What was there before is
moved aside for that moment and removed afterwards; if anything fails it is back, as it was.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import families, quantization, tree
from .._checks import fail, whole
from ..families import CheckpointError
from ..transformer import Config, Params
from . import compressed
from .folder import DTYPES, INDEX, WEIGHTS
from .tokenizer import Tokenizer

WRITTEN = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS, INDEX}


def save(
    folder: str | os.PathLike[str],
    config: Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    shard_size: int = 5 * 2**30,
) -> None:
    """Write a model in the Hugging Face layout, which transformers, vLLM and llama.cpp's converter read.

    The folder is written beside its place and moved there when it is whole: if anything fails, what was there is untouched.

    Args:
        folder: a new one, or one that `save` wrote, which is replaced. One that holds anything else is refused.
        config, params: of one another; weights are floating tensors, each saved in its own dtype, or quantized records of this
            library, which only it reads back (config.json says so, and other readers refuse it).
        tokenizer: None leaves its files out.
        shard_size: bytes of weights above which they are spread over several files.

    Raises:
        CheckpointError: the folder cannot be written, or holds something else.
        ValueError, TypeError: params are not those of the config, or not all floating tensors.

    Law: load(save(...)) is what was saved, bit for bit (test_saving.py::test_a_saved_model_comes_back_bit_for_bit).
    """
    if not isinstance(config, Config) or not isinstance(params, Params):
        got = f"a {type(config).__name__} and a {type(params).__name__}"
        remedy = "The order is folder, config, params, tokenizer."
        fail("save", "config, params", "a Config and its Params", got, remedy, TypeError)
    settings = families.write_config(config)
    tensors, kinds = compressed.apart(_named(config, params))
    settings["dtype"] = str(getattr(params.embedding, "dtype", params.norm.dtype)).removeprefix("torch.")
    settings = compressed.settings(settings, kinds)
    files = {} if tokenizer is None else tokenizer.files()
    if tokenizer is not None and tokenizer.stop:
        settings["eos_token_id"] = list(tokenizer.stop)
    files["config.json"] = json.dumps(settings, indent=2, allow_nan=False)
    with _replaced(Path(folder)) as draft:
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        _write_tensors(draft, tensors, shard_size)


def _named(config: Config, params: Params) -> dict[str, Tensor]:
    """Name on disk -> tensor, checked against the Config."""
    whole("save", "params", tree.leaves(params), "Gather them first: fa.gather(params); or use checkpoints.save_parts.")
    leaves = families.leaves(params)
    needed = families.shapes(config)
    if leaves.keys() != needed.keys():
        wrong = sorted(leaves.keys() ^ needed.keys())
        fail(
            "save",
            "params",
            f"those of {config}",
            f"leaves that differ: {', '.join(wrong[:5])}",
            "Pass the Config that they belong to.",
        )
    for path, leaf in leaves.items():
        if not isinstance(leaf, (Tensor, *quantization.RECORDS)):
            remedy = "Dequantize the weights first: fa.dequantize(params)."
            fail("save", path, "a tensor", f"a {type(leaf).__name__}", remedy, TypeError)
        if tuple(leaf.shape) != needed[path]:
            fail("save", path, f"{needed[path]} as in the Config", tuple(leaf.shape), "Pass the Config that they belong to.")
        if isinstance(leaf, Tensor) and leaf.dtype not in DTYPES.values():
            fail("save", path, f"of a dtype among {', '.join(map(str, DTYPES.values()))}", leaf.dtype, "Cast it.", TypeError)
    places = families.whereabouts(families.family_for(config), config)
    for source in places:
        if source.is_changed and not all(isinstance(leaves[path], Tensor) for path in source.paths):
            remedy = "The family stores it transposed or joined with others: dequantize it, fa.dequantize(params)."
            fail("save", source.paths[0], "a tensor", f"a {type(leaves[source.paths[0]]).__name__}", remedy, TypeError)
    return families.pack(config, places, leaves)


def _write_tensors(draft: Path, tensors: Mapping[str, Tensor], shard_size: int) -> None:
    """One file, or shards of at most `shard_size` bytes (a larger tensor has one of its own) and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_size:
            shards.append({})
        shards[-1][name] = tensor
    count, places = len(shards), {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        save_file({name: _own(tensor) for name, tensor in shard.items()}, draft / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if count > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": places}
        (draft / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory that it shares with no other, as safetensors wants it."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end, or leaves no trace if anything fails."""
    target = Path(os.path.realpath(folder))
    if target.is_dir():
        foreign = sorted(path.name for path in target.iterdir() if not _is_written(path.name))
        if foreign:
            got = f"one that holds {', '.join(foreign[:5])}"
            fail("save", f"{target}", "a new folder, or one that save wrote", got, "Choose another folder.", CheckpointError)
    elif target.exists():
        fail("save", f"{target}", "a folder", "a file", "Choose another place.", CheckpointError)
    draft, old = (target.with_name(f".{target.name}.{role}-{uuid.uuid4().hex}") for role in ("new", "old"))
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in [*draft.iterdir(), draft]:
            _flush(path)
        if target.exists():
            target.rename(old)
        draft.rename(target)
        _flush(target.parent)
    except OSError as error:
        remedy = "Nothing was changed; choose a place that can be written, with room for the weights."
        raise CheckpointError(f"save: {target} should be a folder that can be written, got {error}. {remedy}") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in (draft, old):
            shutil.rmtree(left, ignore_errors=True)


def _is_written(name: str) -> bool:
    return name in WRITTEN or (name.startswith("model-") and name.endswith(".safetensors"))


def _flush(path: Path) -> None:
    """Have the disk hold what was written, so that a rename never outlives its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
