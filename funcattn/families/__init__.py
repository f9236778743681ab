"""Families of models: how the same Config and Params are spelled in other people's files.

A family is a table, never a subclass: which field of a file is which field of Config, which tensor is which leaf, and which fields
would change the mathematics. A field of the last kind is refused by name where it holds anything but a neutral value: a model
that would be computed wrongly is not loaded. Two spellings of each family are read, Hugging Face (config.json, safetensors)
and GGUF; one is written, Hugging Face.

A leaf goes by its path (`layers.0.q`), the same as in funcattn.tree.
"""

from .catalogue import FAMILIES, family_of
from .config_json import read_config, write_config
from .llama import LLAMA
from .metadata import STRETCH, read_metadata
from .tables import CheckpointError, Family
from .weights import assemble, half_split, leaves, match, shapes, spelling

__all__ = [
    "CheckpointError",
    "Family",
    "FAMILIES",
    "LLAMA",
    "family_of",
    "read_config",
    "write_config",
    "read_metadata",
    "STRETCH",
    "shapes",
    "match",
    "leaves",
    "assemble",
    "spelling",
    "half_split",
]
