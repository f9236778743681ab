"""What `check` found, as a table in 80 columns and as JSON."""

import html
import json
import math
import textwrap
from typing import NamedTuple

WIDTH = 80
SIGNS = {"passed": "passed", "broken": "BROKEN", "raises": "raises"}


class Finding(NamedTuple):
    """One law, or one nesting of transforms.

    law: its name.
    status: passed, broken, raises, not offered or out of time.
    worst: the greatest error seen, in units of the dtype's eps times the amplitude of the result.
    examples: inputs on which it was tried.
    told: what is broken, raised or not offered, in one line.
    code: of a broken law, code to paste that raises the AssertionError.
    """

    law: str
    status: str
    worst: float | None
    examples: int
    told: str
    code: str


class Findings(NamedTuple):
    """The findings of all laws; prints as a table, then the failing inputs as code to paste."""

    subject: str
    setting: str
    refused: dict[str, str]
    rows: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The laws that are broken."""
        return tuple(row for row in self.rows if row.status == "broken")

    @property
    def ok(self) -> bool:
        """Whether no law is broken, and at least one has passed."""
        return not self.broken and any(row.status == "passed" for row in self.rows)

    def __repr__(self) -> str:
        seen: set[str] = set()
        lines = [*self.head(), ""]
        lines += [line for row in self.rows for line in table_lines(row, seen)]
        lines.append("")
        lines += _wrapped(self.total(), "", "")
        lines += [line for row in self.told() for line in ("", *failure_lines(row))]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def head(self) -> list[str]:
        """What is checked, how, and which inputs it refuses."""
        from .accepted import PROPERTIES

        lines = [self.subject, f"  {self.setting}"]
        for name, error in self.refused.items():
            lines += _wrapped(f"refuses {PROPERTIES.get(name, name)}: {error}", "  ", "    ")
        return lines

    def total(self) -> str:
        """The last line of the table."""
        counts = {}
        for row in self.rows:
            counts[row.status] = counts.get(row.status, 0) + 1
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"{said or 'nothing to check'}. Errors in eps of the amplitude."

    def told(self) -> list[Finding]:
        """The broken laws, and of nestings of transforms the first that is broken."""
        nested = [row for row in self.broken if "(" in row.law]
        return [row for row in self.broken if row not in nested[1:]]

    def as_json(self) -> str:
        """The same for programs."""
        exact = lambda x: str(x) if x is not None and not math.isfinite(x) else x
        rows = [{**row._asdict(), "worst": exact(row.worst)} for row in self.rows]
        fields = {"subject": self.subject, "setting": self.setting, "refused": self.refused}
        return json.dumps({**fields, "ok": self.ok, "laws": rows}, indent=2)


def table_lines(row: Finding, seen: set[str]) -> list[str]:
    """A row of the table; below it what raised, where it is not among what was `seen` above."""
    worst = "" if row.worst is None else number(row.worst)
    line = f"{row.law:<58} {SIGNS.get(row.status, row.status):<11} {worst:>8}".rstrip()
    if not row.told or row.status == "broken" or row.told in seen:
        return [line]
    seen.add(row.told)
    return [line, *_wrapped(row.told, "    ", "    ")]


def failure_lines(row: Finding) -> list[str]:
    """A broken law: what is wrong, and the code."""
    return [*_wrapped(row.told, "", "  "), "", *row.code.splitlines()]


def number(x: float) -> str:
    """Three characters where they are enough."""
    return "inf" if math.isinf(x) else f"{x:.1f}" if 0.1 <= x < 1000 or x == 0 else f"{x:.0e}"


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    flat = " ".join(text.split())
    return textwrap.wrap(flat, WIDTH, initial_indent=first, subsequent_indent=rest)
