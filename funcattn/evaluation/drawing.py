"""Parts of pictures: tables of coloured cells, bars, and lines, as text and as HTML.

Colours are a hue with the share of a value as opacity, so they suit a light and a dark page.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core import errors

BLUE, RED = "59,110,165", "200,70,50"
SHADES = " ░▒▓█"  # of a share in 0..1
STEPS = "▁▂▃▄▅▆▇█"  # of a line
BAR = 24  # characters of the longest bar
WIDEST = 12  # characters of a cell of text

Cell = tuple[str, str]  # a text, and a style
Point = tuple[int, float]  # a step, and a loss


@dataclass(frozen=True)
class Picture:
    """What is shown: `text` where it is printed, `html` in a notebook."""

    text: str
    html: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.html


def concrete(door: str, argument: str, x: Tensor) -> Tensor:
    """The values of a tensor; raises inside of vmap and torch.compile, which have none."""
    found = errors.value(x)
    if found is None:
        remedy = "Return the tensor from the transform, and draw it then."
        errors.fail(door, argument, "outside of vmap and torch.compile", "values inside", remedy)
    return found.cpu()


def table(
    door: str, argument: str, values: Tensor, rows: Sequence[str], columns: Sequence[str]
) -> list[list[float]]:
    """The values (R, C) of R rows and C columns."""
    found = concrete(door, argument, values)
    if tuple(found.shape) != (len(rows), len(columns)):
        wanted = f"(R, C) = {(len(rows), len(columns))}, a label for each"
        errors.fail(door, argument, wanted, errors.shape(values), "Label each row and column.")
    return found.double().tolist()


def colour(hue: str, share: float) -> str:
    """The style of a background."""
    return f"background:rgba({hue},{min(1.0, max(0.0, share)) * 0.75:.2f})"


def shade(share: float) -> str:
    """A character for a share in 0..1; a question mark for NaN."""
    if share != share:
        return "?"
    return SHADES[min(len(SHADES) - 1, max(0, round(share * (len(SHADES) - 1))))]


def bar(share: float) -> str:
    """A bar for a share in 0..1."""
    return "█" * round(share * BAR)


def grid(cells: Sequence[Sequence[Cell]], rows: Sequence[str], columns: Sequence[str]) -> Picture:
    """A table with labels: cells cut to `WIDEST` characters where it is printed."""
    cut = lambda text: text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"
    lines = [["", *map(cut, columns)]]
    lines += [
        [row, *(cut(text) for text, _ in line)] for row, line in zip(rows, cells, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    body = "".join(
        f"<tr><th>{html.escape(row)}</th>"
        + "".join(
            f'<td style="text-align:center;{style}">{html.escape(text)}</td>'
            for text, style in line
        )
        + "</tr>"
        for row, line in zip(rows, cells, strict=True)
    )
    return Picture(text, f'<table style="white-space:pre"><tr>{head}</tr>{body}</table>')


def barred(rows: Sequence[tuple[str, float, str]]) -> Picture:
    """Bars of a label, a number of 0 or more, and its text."""
    largest = max((x for _, x, _ in rows), default=0.0) or 1.0
    width = max((len(label) for label, _, _ in rows), default=0)
    text = "\n".join(
        f"{label:<{width}} {shown} {bar(x / largest)}".rstrip() for label, x, shown in rows
    )
    drawn = lambda x: (
        f'<div style="width:{16 * x / largest:.2f}em;height:.8em;background:rgb({BLUE})"></div>'
    )
    body = "".join(
        f'<tr><td style="text-align:right;white-space:pre">{html.escape(label)}</td>'
        f'<td>{shown}</td><td style="text-align:left">{drawn(x)}</td></tr>'
        for label, x, shown in rows
    )
    return Picture(text, f"<table>{body}</table>")


def plot(
    lines: dict[str, list[Point]], share: Callable[[float], float], ends: tuple[float, float]
) -> str:
    """Lines over steps as SVG.

    Args:
        lines: name -> points in the order of their steps.
        share: of a loss between the least, 0, and the largest, 1.
        ends: the least and the largest loss.
    """
    first = min(line[0][0] for line in lines.values())
    last = max(line[-1][0] for line in lines.values())
    W, H, left = 420, 160, 44
    x = lambda step: left + (W - left - 6) * (step - first) / ((last - first) or 1)
    y = lambda loss: 8 + (H - 30) * (1 - share(loss))
    parts, key = [], []
    for (name, line), hue in zip(lines.items(), (BLUE, RED), strict=False):
        at = [(f"{x(step):.1f}", f"{y(loss):.1f}") for step, loss in line]
        points = " ".join(",".join(place) for place in at)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="rgb({hue})" stroke-width="2"/>'
        )
        parts += [f'<circle cx="{a}" cy="{b}" r="2" fill="rgb({hue})"/>' for a, b in at]
        key.append(f'<span style="color:rgb({hue})">{html.escape(name)} {line[-1][1]:.3f}</span>')
    for value in dict.fromkeys(ends):
        parts.append(f'<text x="2" y="{y(value) + 4:.0f}">{value:.3g}</text>')
    parts.append(f'<text x="{left}" y="{H - 4}">{first}</text>')
    parts.append(f'<text x="{W - 6}" y="{H - 4}" text-anchor="end">step {last}</text>')
    style = 'font-size="11" font-family="sans-serif" fill="currentColor"'
    return (
        f'<div><svg width="{W}" height="{H}" {style}>{"".join(parts)}</svg><br>'
        f"<small>{' '.join(key)}</small></div>"
    )
