"""The families by name."""

from typing import Any

from .llama import LLAMA
from .tables import Family, refuse

FAMILIES = {family.name: family for family in (LLAMA,)}


def family_of(name: Any, where: str) -> Family:
    """The table of a family by the name that a file gives it; `where` says which field that was."""
    if not isinstance(name, str) or name not in FAMILIES:
        refuse(where, f"one of {', '.join(FAMILIES)}", name)
    return FAMILIES[name]
