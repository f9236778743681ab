"""The picture of the house: rooms as boxes, imports as lines. A hook of mkdocs, which reads the
imports of the package.

A room is a folder of the package or a module beside them. It stands above all that it imports.
Drawn is the transitive reduction: an import that a longer way through other rooms implies has no
line of its own.

    python pages/house.py > house.svg
"""

import ast
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parent.parent / "funcattn"
APART = {"testing", "__init__", "__main__"}  # which import all others
# of the picture, a box, between floors, at the edge: pixels
WIDTH, HEIGHT, GAP, MARGIN = 1080, 34, 46, 16
LETTER = 6.7  # pixels of one letter of 12 pixels, of the name in a box

Graph = dict[str, set[str]]


class Box(NamedTuple):
    """Where a room stands in the picture."""

    x: float
    y: float
    width: float


def room_of(path: Path) -> str:
    """`kernels/closed/algebra.py` -> kernels; `tree.py` -> tree."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterable[str]:
    """The rooms that a module imports by relative imports, which are all that the package has."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for alias in node.names:
                named = [*base, *(node.module or "").split("."), alias.name]
                yield next(part for part in named if part)


def rooms() -> tuple[Graph, dict[str, int]]:
    """Which room imports which, and the lines of each."""
    graph: Graph = {}
    lines: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
        graph.setdefault(room, set()).update(imported(path))
    kept = graph.keys() - APART
    return {room: (graph[room] & kept) - {room} for room in sorted(kept)}, lines


def below(graph: Graph, room: str) -> set[str]:
    """All that a room imports, through others too."""
    found: set[str] = set()
    waiting = list(graph[room])
    while waiting:
        if (other := waiting.pop()) not in found:
            found.add(other)
            waiting.extend(graph[other])
    return found


def reduced(graph: Graph) -> Graph:
    """The transitive reduction."""
    return {
        room: {
            other
            for other in others
            if not any(other in below(graph, third) for third in others - {other})
        }
        for room, others in graph.items()
    }


def levels(graph: Graph) -> dict[str, int]:
    """The length of the longest way down from each room."""
    found: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in found:
            found[room] = 1 + max(map(level, graph[room]), default=-1)
        return found[room]

    for room in graph:
        level(room)
    return found


def rows_of(graph: Graph) -> list[list[str]]:
    """The rooms of each floor, the highest floor first, each room near what it imports."""
    level = levels(graph)
    rows = [[room for room in graph if level[room] == n] for n in range(max(level.values()) + 1)]
    place: dict[str, float] = {}
    for row in rows:
        near = {
            room: sum(place[other] for other in graph[room]) / len(graph[room])
            if graph[room]
            else 0.5
            for room in row
        }
        row.sort(key=lambda room: (near[room], room))
        place |= {room: (i + 0.5) / len(row) for i, room in enumerate(row)}
    return rows[::-1]


def boxes(rows: list[list[str]], labels: dict[str, str]) -> dict[str, Box]:
    """Each floor spread over the width."""
    found = {}
    for number, row in enumerate(rows):
        widths = [LETTER * len(labels[room]) + 18 for room in row]
        space = (WIDTH - 2 * MARGIN - sum(widths)) / (len(row) + 1)
        x = MARGIN + space
        for room, width in zip(row, widths, strict=True):
            found[room] = Box(x, MARGIN + number * (HEIGHT + GAP), width)
            x += width + space
    return found


def line(upper: Box, lower: Box) -> str:
    x, y = upper.x + upper.width / 2, upper.y + HEIGHT
    u, v = lower.x + lower.width / 2, lower.y
    bend = min(0.5 * (v - y), 60)
    return (
        f'<path d="M{x:.0f},{y:.0f} C{x:.0f},{y + bend:.0f} {u:.0f},{v - bend:.0f} '
        f'{u:.0f},{v:.0f}"/>'
    )


def box(room: str, label: str, at: Box) -> str:
    text = (
        f'<text x="{at.x + at.width / 2:.0f}" '
        f'y="{at.y + HEIGHT / 2 + 4:.0f}">{escape(label)}</text>'
    )
    rectangle = (
        f'<rect x="{at.x:.0f}" y="{at.y:.0f}" width="{at.width:.0f}" height="{HEIGHT}" rx="6"/>'
    )
    return f"<g><title>{escape(room)}</title>{rectangle}{text}</g>"


def picture() -> str:
    """The house as SVG."""
    graph, lines = rooms()
    graph = reduced(graph)
    labels = {room: f"{room.lstrip('_')} {lines[room]}" for room in graph}
    rows = rows_of(graph)
    at = boxes(rows, labels)
    height = 2 * MARGIN + len(rows) * HEIGHT + (len(rows) - 1) * GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'role="img" aria-label="Rooms and imports">',
            "<style>",
            "text { font: 12px ui-monospace, Menlo, Consolas, monospace; text-anchor: middle; "
            "fill: #1d2430 }",
            "rect { fill: #eef3fb; stroke: #5b7db1 }",
            "path { fill: none; stroke: #8a97ab; stroke-opacity: 0.55 }",
            "</style>",
            f'<rect width="{WIDTH}" height="{height}" style="fill: #ffffff; stroke: none"/>',
            *(line(at[room], at[other]) for room in graph for other in sorted(graph[room])),
            *(box(room, labels[room], at[room]) for room in graph),
            "</svg>",
        ]
    )


def on_files(files: Any, config: Any) -> Any:
    """Add the picture to the pages, as assets/house.svg."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "assets/house.svg", content=picture()))
    return files


if __name__ == "__main__":
    print(picture())
