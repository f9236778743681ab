"""Reading and writing models: GGUF files, the Hugging Face layout, the hub, and the packaged model.

    config, params, tokenizer = load("smollm2-135m")
    save("folder", config, params, tokenizer)

    hf gguf         the two formats          families        how each family of models names its fields
    tokenizer       text to ids              loading parts   a whole model; the shards of a mesh

Files are untrusted. No code of a file runs outside a sandbox: no model is unpickled, and the index of
`load_parts` is read by an unpickler that knows its classes alone. Only regular files are opened; sizes,
types and offsets are checked against the file before anything is allocated; a field that `transformer`
cannot express is refused by name. Any other fault of a file is a CheckpointError with what was wanted,
what was found, and a remedy.
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
