"""Checkpoints: GGUF files, the Hugging Face layout, the hub, and the packaged model.

    config, params, tokenizer = load("smollm2-135m")
    save("folder", config, params, tokenizer)

    hf gguf         the two formats          families        names of fields and tensors
    tokenizer       text to ids              loading parts   whole models; the shards of a mesh

Files are untrusted. No code of a file runs outside a sandbox: nothing is unpickled, except the
index of `load_parts`, by an unpickler restricted to its classes. Only regular files are opened;
sizes, types and offsets are checked against the file before memory is allocated; a field that
`transformer` cannot express is an error that names it. Any other defect of a file is a
CheckpointError with what was expected, what was found, and a remedy.
"""

from .families import CheckpointError
from .hf.adapters import load_lora
from .hf.saved_adapters import save_lora
from .hf.saving import save
from .loading import Loaded, load
from .parts import load_parts, load_sharded, save_parts
from .tokenizer.tokenizer import Tokenizer

__all__ = [
    "load",
    "save",
    "load_lora",
    "save_lora",
    "Loaded",
    "Tokenizer",
    "CheckpointError",
    "load_parts",
    "load_sharded",
    "save_parts",
]
