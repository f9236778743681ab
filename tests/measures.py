"""Counts of what a reader of the package meets: a table, with a column for each checkout.

    python tests/measures.py [folder of a checkout ...]

These are goals and no limits; what must hold is in tests/test_architecture.py.
"""

import ast
import re
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

SOMEBODY = re.compile(r"\b(?:nobody|somebody|everybody|anybody|no one|who)\b", re.IGNORECASE)
LAW = re.compile(r"\b(test_\w+\.py)(?:::(test_\w+))?")

Sources = dict[Path, str]


def sources(checkout: Path) -> Sources:
    package = checkout / "funcattn"
    return {path.relative_to(package): path.read_text() for path in sorted(package.rglob("*.py"))}


def lines(files: Sources) -> list[str]:
    return [line for text in files.values() for line in text.splitlines()]


def trees(files: Sources) -> list[ast.Module]:
    return [ast.parse(text) for text in files.values()]


def a_thousand(count: int, files: Sources) -> str:
    return f"{1000 * count / len(lines(files)):.1f}"


def wide(files: Sources) -> str:
    return a_thousand(sum(len(line) > 100 for line in lines(files)), files)


def anything(files: Sources) -> str:
    return a_thousand(
        sum(len(re.findall(r"\bAny\b", line)) for line in lines(files) if "import" not in line),
        files,
    )


def somebody(files: Sources) -> str:
    return str(sum(bool(SOMEBODY.search(line)) for line in lines(files)))


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def strangers(files: Sources) -> str:
    """Names with an underscore that a module imports from another room; the modules of the lowest
    floor are everyone's.
    """
    found = 0
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                parents = path.parts[:-1]
                base = parents[: len(parents) - node.level + 1]
                other = (*base, *node.module.split("."))[0]
                found += other != room(path) and sum(
                    name.name.startswith("_") for name in node.names
                )
    return str(found)


def longest(files: Sources) -> str:
    return str(max(len(text.splitlines()) for text in files.values()))


def functions(files: Sources) -> list[int]:
    """Lines of each function, without its docstring."""
    found = []
    for tree in trees(files):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                found.append(body[-1].end_lineno - body[0].lineno + 1 if body else 0)  # pyright: ignore[reportOptionalOperand]
    return sorted(found)


def lengths_of_functions(files: Sources) -> str:
    found = functions(files)
    return f"{found[len(found) // 2]}, {found[len(found) * 95 // 100]}"


def laws(checkout: Path, files: Sources) -> str:
    """References to tests in docstrings that no file of tests has."""
    files_of_tests = list((checkout / "tests").rglob("test_*.py"))
    known = {path.name: path.read_text() for path in files_of_tests}
    everything = "\n".join(path.read_text() for path in files_of_tests)
    lost = 0
    for line in lines(files):
        for file, test in LAW.findall(line):
            lost += file not in known or (bool(test) and f"def {test}" not in everything)
    return str(lost)


def shared(files: Sources) -> str:
    """Runs of six equal lines, code alone, that two modules have in common."""
    runs: dict[tuple[str, ...], set[Path]] = {}
    for path, text in files.items():
        code = [
            line.strip()
            for line in text.splitlines()
            if line.strip() and not line.strip().startswith(("import", "from", "#"))
        ]
        for start in range(len(code) - 5):
            runs.setdefault(tuple(code[start : start + 6]), set()).add(path)
    return str(len({pair for found in runs.values() for pair in combinations(sorted(found), 2)}))


MEASURES: dict[str, Callable[[Path, Sources], object]] = {
    "modules": lambda _, files: len(files),
    "lines": lambda _, files: len(lines(files)),
    "lines over 100 columns, of 1,000": lambda _, files: wide(files),
    "`Any`, of 1,000 lines": lambda _, files: anything(files),
    "lines that tell of somebody": lambda _, files: somebody(files),
    "underscored names of another room": lambda _, files: strangers(files),
    "tests named in docstrings that are not there": laws,
    "pairs of modules that share six lines": lambda _, files: shared(files),
    "longest module, lines": lambda _, files: longest(files),
    "lines of a function: middle, 95 %": lambda _, files: lengths_of_functions(files),
}


def main(checkouts: list[Path]) -> None:
    found = [sources(checkout) for checkout in checkouts]
    for name, measure in MEASURES.items():
        cells = [str(measure(*each)) for each in zip(checkouts, found, strict=True)]
        print(f"{name:46}", *(f"{cell:>9}" for cell in cells))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or [Path(__file__).parent.parent])
