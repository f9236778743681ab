"""Writing the Hugging Face layout, atomically.

A folder is written under a temporary name beside its target, flushed to the disk, and exchanged for
the old one in one system call (`atomic.folder`). A process that is killed at any moment leaves the
old folder or the new one; the next save removes the temporary one.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ... import quantization, tree
from ...core import atomic
from ...core.errors import fail, whole
from ...layers import Weight
from ...transformer import Config, Params
from .. import families
from ..families import CheckpointError
from ..tokenizer.tokenizer import Tokenizer
from ..writing import written
from . import compressed, quantized
from .folder import INDEX, WEIGHTS
from .weights import DTYPES

WRITTEN = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    WEIGHTS,
    INDEX,
}


def save(
    folder: str | os.PathLike[str],
    config: Config,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    format: str | None = None,
    shard_size: int = 5 * 2**30,
) -> None:
    """Write a model in the Hugging Face layout, for transformers, vLLM and llama.cpp's converter.

    The folder is written beside its target and exchanged for it in one step: if anything fails, or
    the process is killed, the old folder is unchanged. (Without renameat2, see
    funcattn.core.atomic.)

    Args:
        folder: a new one, or one that `save` wrote, which is replaced. One with any other file is
            an error.
        config, params: of one model; weights are floating tensors, each saved in its dtype, or
            quantized records.
        tokenizer: None writes no tokenizer files.
        format: of records. None is that of this library, which has all and which only it reads
            (config.json says so, and other readers reject it); "compressed-tensors" and "gptq" are
            read by transformers and vLLM, with the same codes and scales. They have no zero points
            that are not whole numbers of scales: quantize by fa.int4(symmetric=True). Embedding
            and head are then written as floats. Rows that the family joins or orders are joined
            and ordered; what it transposes is an error.
        shard_size: bytes of weights above which they are written to several files.

    Raises:
        CheckpointError: the folder cannot be written, or has other files.
        ValueError, TypeError: params do not fit the config, are not all floating tensors or
            records, or have records that the format has not.

    Law: load(save(...)) is what was saved, bit for bit
        (test_saving.py::test_a_saved_model_comes_back_bit_for_bit).
    Law: so is a quantized tree of a family that joins, splits or transposes its leaves
        (test_compressed.py::test_leaves_that_a_family_stores_otherwise_come_back_bit_for_bit).
    Law: in the formats of others the codes are the same, as their own readers find
        (test_writing.py::test_what_is_written_is_read_with_the_same_codes).
    Law: a kill leaves the old or the new
        (test_atomic.py::test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new).
    """
    if not isinstance(config, Config) or not isinstance(params, Params):
        got = f"a {type(config).__name__} and a {type(params).__name__}"
        remedy = "The order is folder, config, params, tokenizer."
        fail("save", "config, params", "a Config and its Params", got, remedy, TypeError)
    if format is not None and format not in quantized.WRITTEN:
        wanted = f"None or one of {', '.join(map(repr, quantized.WRITTEN))}"
        fail("save", "format", wanted, repr(format), "None is this library's own.")
    settings = families.write_config(config)
    named = _named(config, params, format)
    settings["dtype"] = str(getattr(params.embedding, "dtype", params.norm.dtype)).removeprefix(
        "torch."
    )
    if format is None:
        tensors, kinds = compressed.flatten_records(named)
        settings = compressed.settings(settings, kinds)
    else:
        family = families.family_for(config)
        ends = [family.tensors[end] for end in ("embedding", "head") if end in family.tensors]
        dtype: torch.dtype = params.norm.dtype
        tensors, said = quantized.flatten_as(format, named, dict.fromkeys(ends, dtype))
        settings |= {"dtype": str(dtype).removeprefix("torch.")}
        settings |= {"quantization_config": said} if said else {}
    files = {} if tokenizer is None else tokenizer.files()
    if tokenizer is not None and tokenizer.stop:
        settings["eos_token_id"] = list(tokenizer.stop)
    files["config.json"] = json.dumps(settings, indent=2, allow_nan=False)
    check_place(folder)
    with written("save", folder), atomic.folder(folder) as draft:
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        _write_tensors(draft, tensors, shard_size)


def _named(config: Config, params: Params, format: str | None) -> dict[str, Weight]:
    """Name on disk -> tensor or record, validated against the Config."""
    whole(
        "save",
        "params",
        tree.leaves(params),
        "Gather them first: fa.gather(params); or use checkpoints.save_parts.",
    )
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
            kept = ", ".join(kind.__name__ for kind in quantization.RECORDS)
            wanted = f"a tensor, or a record among {kept}"
            remedy = "Dequantize it, fa.dequantize(params); or quantize the original after load."
            fail("save", path, wanted, f"a {type(leaf).__name__}", remedy, TypeError)
        if tuple(leaf.shape) != needed[path]:
            fail(
                "save",
                path,
                f"{needed[path]} as in the Config",
                tuple(leaf.shape),
                "Pass the Config that they belong to.",
            )
        if isinstance(leaf, Tensor) and leaf.dtype not in DTYPES.values():
            fail(
                "save",
                path,
                f"of a dtype among {', '.join(map(str, DTYPES.values()))}",
                leaf.dtype,
                "Cast it.",
                TypeError,
            )
    found: dict[str, Weight] = {}
    for source in families.locate_tensors(families.family_for(config), config):
        weights = [leaves[path] for path in source.paths]
        if not source.is_changed or all(isinstance(weight, Tensor) for weight in weights):
            found |= families.pack(config, [source], leaves)
        elif format is None:
            found |= {compressed.leaf_name(path): leaves[path] for path in source.paths}
        else:
            made = quantized.packed(config, source, weights)
            if isinstance(made, str):
                wanted = f"records whose rows {format} has as {source.names[0]}"
                kinds = ", ".join(dict.fromkeys(type(weight).__name__ for weight in weights))
                remedy = "Without format= this library's own layout has them; or fa.dequantize."
                fail("save", source.paths[0], wanted, f"{kinds}: {made}", remedy, TypeError)
            found |= dict(zip(source.names, made, strict=True))
    return found


def _write_tensors(draft: Path, tensors: Mapping[str, Tensor], shard_size: int) -> None:
    """One file, or shards of at most `shard_size` bytes (or of one larger tensor) and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if (
            shards[-1]
            and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_size
        ):
            shards.append({})
        shards[-1][name] = tensor
    count, places = len(shards), {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        save_file(
            {name: _own(tensor) for name, tensor in shard.items()},
            draft / file,
            metadata={"format": "pt"},
        )
        places |= dict.fromkeys(shard, file)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": places,
        }
        (draft / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU: safetensors rejects tensors with common memory."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def check_place(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError where `save` would fail for a folder; nothing is written."""
    with written("save", folder):
        target = Path(os.path.realpath(folder))
        if target.is_dir():
            foreign = sorted(path.name for path in target.iterdir() if not _is_written(path.name))
            if foreign:
                got = f"one that holds {', '.join(foreign[:5])}"
                fail(
                    "save",
                    f"{target}",
                    "a new folder, or one that save wrote",
                    got,
                    "Choose another folder.",
                    CheckpointError,
                )
        elif target.exists():
            fail(
                "save", f"{target}", "a folder", "a file", "Choose another place.", CheckpointError
            )
        above = next(path for path in target.parents if path.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def _is_written(name: str) -> bool:
    """True for a name that `save` writes, or that a killed save of the tokenizer may leave."""
    return (
        name in WRITTEN
        or (name.startswith("model-") and name.endswith(".safetensors"))
        or atomic.drafted(name) in WRITTEN
    )
