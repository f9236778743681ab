"""Model families: how their files name the fields of Config and the leaves of Params.

A family is a table and two functions, not a subclass: which field of a file is which field of
Config, which tensors are which leaves, and which fields would change the mathematics. Fields of the
last kind must have a neutral value, else loading fails with the name of the field: no model is
loaded that would be computed wrongly. Two formats are read, Hugging Face (config.json, safetensors)
and GGUF; one is written, Hugging Face.

    tables        Family, Pack, validated reading of fields           positions    rotary fields
    llama llama_variants granite olmo gemma fused falcon gpt gpt_variants mixtures
                  the families, by similarity
    conventions layouts                                               common to several families
    config_json towers weights metadata architectures gguf_tensors    reading and writing

Leaves are named by path (`layers.0.q`), as in funcattn.tree.
"""

from .catalogue import FAMILIES, family_of
from .config_json import families_for, family_for, read_config, write_config
from .gguf_tensors import TENSORS as GGUF_TENSORS
from .latent_gguf import ARCHITECTURES as GGUF
from .layouts import half_split, interleave
from .llama import LLAMA
from .metadata import LONG, SHORT, STRETCH, read_metadata
from .tables import CheckpointError, Family
from .towers import tower_name, tower_settings, untied
from .weights import (
    PLAIN,
    Source,
    assemble,
    by_columns,
    in_layout,
    leaves,
    locate_tensors,
    match,
    pack,
    shapes,
    spelling,
    unpack,
    wanted,
)

__all__ = [
    "CheckpointError",
    "FAMILIES",
    "Family",
    "GGUF",
    "GGUF_TENSORS",
    "LLAMA",
    "LONG",
    "PLAIN",
    "SHORT",
    "STRETCH",
    "Source",
    "assemble",
    "by_columns",
    "families_for",
    "family_for",
    "family_of",
    "half_split",
    "in_layout",
    "interleave",
    "leaves",
    "match",
    "pack",
    "read_config",
    "read_metadata",
    "shapes",
    "locate_tensors",
    "spelling",
    "tower_name",
    "tower_settings",
    "unpack",
    "untied",
    "wanted",
    "write_config",
]
