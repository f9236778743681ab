"""What the front page says is what happens: its example prints its output, its table is current, its links lead somewhere.

The slow ones are run by `make site`.
"""

import base64
import contextlib
import importlib.util
import io
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
README, INDEX = ROOT / "README.md", ROOT / "docs" / "index.md"
pytestmark = pytest.mark.skipif(not INDEX.exists(), reason="the pages are not part of a source distribution")


def blocks(path, language):
    return [block.split("```")[0] for block in path.read_text().split(f"```{language}\n")[1:]]


@pytest.mark.slow
def test_the_example_prints_what_the_page_shows():
    (example,), (shown,) = blocks(INDEX, "python"), blocks(INDEX, "text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "docs/index.md", "exec"), {"__name__": "index"})
    assert printed.getvalue() == shown


def test_readme_and_landing_page_show_the_same_example():
    for language in ("python", "text"):
        assert blocks(README, language)[0] == blocks(INDEX, language)[0]


@pytest.mark.slow
def test_the_table_of_what_composes_is_what_check_transforms_finds():
    spec = importlib.util.spec_from_file_location("composition", ROOT / "benchmarks" / "composition.py")
    composition = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(composition)
    found = composition.table()
    for path in composition.PAGES:
        assert composition.written(path.read_text(), found) == path.read_text()


def test_the_links_of_the_readme_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def test_the_picture_is_that_of_the_notebook():
    notebook = nbformat.read(ROOT / "notebooks" / "02_the_past_is_a_value.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    assert (ROOT / "docs" / "assets" / "futures.png").read_bytes() in pictures
