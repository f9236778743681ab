"""What is said of tests is true: laws and pages name tests that exist, and a test asks for what it
captured.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT, TESTS

TEXTS = [*sorted((ROOT / "funcattn").rglob("*.py")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

pytestmark = pytest.mark.skipif(
    not (ROOT / "funcattn").is_dir(), reason="the package is installed without its tests"
)


def names_in(folder: Path) -> dict[str, set[str]]:
    """File name -> names of the tests in it, or in those of that name."""
    found: dict[str, set[str]] = {}
    for file in folder.rglob("test_*.py"):
        found.setdefault(file.name, set()).update(re.findall(r"def (test_\w+)\b", file.read_text()))
    return found


def missing(text: str) -> Iterator[str]:
    """References of a text to nothing: `test_x.py::test_y`, `test_x.py`, `tests/x.py` and
    `tests/distributed: test_y`.
    """
    known, far = names_in(TESTS), names_in(TESTS / "distributed")
    for name, test in re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", text):
        if name not in known or (test and test not in known[name]):
            yield f"{name}::{test}" if test else name
    yield from (
        path for path in re.findall(r"\btests/[\w/]+\.py", text) if not (ROOT / path).exists()
    )
    for test in re.findall(r"tests/distributed: (test_\w+)", text):
        if not any(test in names for names in far.values()):
            yield f"tests/distributed: {test}"


def laws(text: str) -> list[str]:
    """Each law of a module; one ends with its paragraph, or where the next begins."""
    return [
        " ".join(law.split())
        for law in re.findall(r"Laws?: (.*?)(?=\n\s*\n|\n\s*Laws?: |\"\"\")", text, re.DOTALL)
    ]


def unused(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Arguments of lambdas that capture a name as themselves, and are read nowhere in the body."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Lambda):
            continue
        positional = [*node.args.posonlyargs, *node.args.args]
        first = len(positional) - len(node.args.defaults)
        given = [*zip(positional[first:], node.args.defaults, strict=True)]
        given += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        read = {part.id for part in ast.walk(node.body) if isinstance(part, ast.Name)}
        for argument, default in given:
            if (
                isinstance(default, ast.Name)
                and default.id == argument.arg
                and argument.arg not in read
            ):
                yield node.lineno, argument.arg


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_reference_names_a_test(file):
    assert list(missing(file.read_text())) == []


def test_every_law_says_where_it_is_held():
    found = [
        (file.name, law) for file in TEXTS if file.suffix == ".py" for law in laws(file.read_text())
    ]
    assert len(found) > 80
    assert [
        where for where, law in found if not re.search(r"test_\w+|\blaws\.\w+|_follow_", law)
    ] == []


def test_what_a_lambda_of_a_test_captures_it_uses():
    found = [
        (file.name, *what)
        for file in sorted(TESTS.rglob("*.py"))
        for what in unused(ast.parse(file.read_text()))
    ]
    assert found == []


def test_the_rules_see_what_breaks_them():
    assert list(missing("(test_nothing.py)")) == ["test_nothing.py"]
    assert list(missing("test_masks.py::test_nothing")) == ["test_masks.py::test_nothing"]
    assert list(missing("see tests/nothing.py")) == ["tests/nothing.py"]
    assert list(missing("tests/distributed: test_nothing")) == ["tests/distributed: test_nothing"]
    assert laws("Law: one (test_a.py).\n    Law: two\n    lines.\n\nand more") == [
        "one (test_a.py).",
        "two lines.",
    ]
    assert list(unused(ast.parse("f = lambda q, kernel=kernel, *, n=n: q + n"))) == [(1, "kernel")]
