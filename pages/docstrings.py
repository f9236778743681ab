"""Docstrings as the reference shows them: an extension of griffe, for what it would take otherwise
than it is meant.

`Example:` is how the docstrings here begin doctests; griffe knows `Examples:` as the section whose
content is code. And a shape such
as (*lead, H, T, D) is prose to Markdown, in which two of them make what stands between italic.
"""

import re
from typing import Any

import griffe

SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")


class Doctests(griffe.Extension):
    """Sections named Example become Examples, stars of shapes are escaped."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Each object once, after its source was read."""
        if obj.docstring is not None and not obj.is_alias:
            text = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
            obj.docstring.value = "\n".join(escaped(text.split("\n")))


def escaped(lines: list[str]) -> list[str]:
    """The lines of a docstring with a backslash before the star of a shape, where they are prose
    and not code.
    """
    found, section = [], False
    for line in lines:
        if line and not line.startswith(" "):
            section = line in SECTIONS
        prose = section or not line.startswith(" ")
        parts = line.split("`") if prose else [line]
        found.append(
            "`".join(
                re.sub(r"\(\*(?=\w)", r"(\\*", p) if prose and not n % 2 else p
                for n, p in enumerate(parts)
            )
        )
    return found
