"""Docstrings as the reference shows them: an extension of griffe, for what it would take otherwise than it is meant.

`Example:` is how the docstrings here begin doctests; griffe knows `Examples:` as the section whose content is code.
"""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Sections named Example become Examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Each object once, after its source was read."""
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
