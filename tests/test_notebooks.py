"""The notebooks that are committed: each is its script, was run from top to bottom, and shows
something; none is run here.
"""

import importlib.util
import sys

import nbformat
import pytest
from places import ROOT

FOLDER = ROOT / "notebooks"
pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="the notebooks are not part of a source distribution"
)


def _load(name):
    spec = importlib.util.spec_from_file_location(
        f"tool_{name.replace('/', '_')}", FOLDER.parent / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run():
    return _load("notebooks/run")


SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_with_outputs(run, script):
    assert run.complaints(script) == []


def test_every_notebook_has_a_script():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SCRIPTS}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda cells: cells[1].update(source="1 + 2"), "is not"),
        (lambda cells: cells.pop(), "is not"),
        (lambda cells: cells[1].update(execution_count=None), "was not run once"),
        (lambda cells: cells[1].update(outputs=[]), "shows nothing"),
    ],
)
def test_a_notebook_that_was_changed_or_not_run_is_found_out(run, tmp_path, change, complaint):
    script = tmp_path / "01_small.py"
    script.write_text("# %% [markdown]\n# # Small\n\n# %%\n1 + 1\n\n# %%\nx = 3\n")
    assert run.complaints(script) == ["01_small.ipynb is not there"]
    notebook = nbformat.v4.new_notebook(cells=run.jupytext.read(script).cells)
    for number, cell in enumerate(notebook.cells[1:], 1):
        cell.execution_count = number
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("execute_result", data={"text/plain": "2"}, execution_count=1)
    ]
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    assert run.complaints(script) == []
    change(notebook.cells)
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    assert any(complaint in found for found in run.complaints(script))


def test_what_a_progress_bar_wrote_over_itself_is_not_kept(run):
    stream = lambda text: nbformat.v4.new_output("stream", name="stderr", text=text)
    assert run._settled(stream("\rreading 1/3\r   \rreading 2/3\r   \r")) is None
    assert run._settled(stream("one\n\rtwo\rthree\n")).text == "one\nthree\n"


def test_a_page_shows_what_the_notebook_shows():
    pages = _load("pages/notebooks")
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nSee [masks](../docs/masks.md)."),
        nbformat.v4.new_code_cell(
            "1 + 1",
            outputs=[
                nbformat.v4.new_output("stream", text="said\n"),
                nbformat.v4.new_output(
                    "display_data", data={"image/png": "aGk=", "text/plain": "<Figure>"}
                ),
                nbformat.v4.new_output(
                    "execute_result", data={"text/html": "<b>\n\ntwo</b>", "text/plain": "2"}
                ),
            ],
        ),
    ]
    text, images = pages.page(nbformat.v4.new_notebook(cells=cells), "01_small")
    assert text.startswith("# Title\n")
    assert all(
        part in text for part in ("(../masks.md)", "```python\n1 + 1\n```", "said", "<b> two</b>")
    )
    assert "<Figure>" not in text
    assert images == {"01_small_1.png": b"hi"}


def test_shapes_are_escaped_where_they_are_prose_and_doctests_are_not():
    lines = [
        "k (*lead, S), v (*lead, S)",
        "",
        "    out = f(*q)",
        "",
        "Args:",
        "    q: (*lead, T), `(*lead,)`.",
        "Examples:",
        "    >>> f(*q)",
    ]
    found = _load("pages/docstrings").escaped(lines)
    assert found[0] == r"k (\*lead, S), v (\*lead, S)"
    assert found[2] == lines[2]
    assert found[5] == r"    q: (\*lead, T), `(*lead,)`."
    assert found[7] == lines[7]
