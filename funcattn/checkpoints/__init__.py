"""Models from files and into files: GGUF, the Hugging Face layout, the hub, and the model that a package brings.

    config, params, tokenizer = load("smollm2-135m")
    save("folder", config, params, tokenizer)

Files are untrusted. Nothing is unpickled and no code of a file runs outside a sandbox; only regular files are opened, and sizes,
kinds and offsets are held against the file before anything is allocated; what the mathematics of `transformer` does not express is
refused by name. Whatever else is wrong with a file is a CheckpointError that says what was wanted, what came, and what to do.
"""

from .families import CheckpointError
from .hf.adapters import load_lora, save_lora
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
