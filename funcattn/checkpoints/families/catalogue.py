"""The families by name, in order: a Config is written as the first that can express it."""

from .fused import COHERE, PHI3, STABLELM, STARCODER2
from .gemma import GEMMA, GEMMA2, GEMMA3
from .gpt import GPT2, GPT_NEOX
from .llama import GRANITE, LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3, SMOLLM3
from .mixtures import GPT_OSS, MIXTRAL, QWEN3_MOE
from .tables import Family, refuse

FAMILIES = {
    family.name: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GRANITE, OLMO2),
        *(GEMMA, GEMMA2, GEMMA3),
        *(PHI3, COHERE, STABLELM, STARCODER2),
        *(GPT2, GPT_NEOX),
        *(MIXTRAL, QWEN3_MOE, GPT_OSS),
    )
}


def family_of(name: object, where: str) -> Family:
    """The family of a name in a file; `where` is the field, for the error."""
    if not isinstance(name, str) or name not in FAMILIES:
        refuse(where, f"one of {', '.join(FAMILIES)}", name)
    return FAMILIES[name]
