"""What the front page says is what happens: its example prints its output, its table is current,
its links lead somewhere.

The slow ones are run by `make site`.
"""

import base64
import contextlib
import importlib.util
import io
import re

import nbformat
import pytest
import torch
from places import ROOT

import funcattn as fa

README, INDEX = ROOT / "README.md", ROOT / "docs" / "index.md"
pytestmark = pytest.mark.skipif(
    not INDEX.exists(), reason="the pages are not part of a source distribution"
)


def blocks(path, language):
    return [block.split("```")[0] for block in path.read_text().split(f"```{language}\n")[1:]]


@pytest.mark.slow
def test_the_example_prints_what_the_page_shows_on_other_machines_too():
    (example,), (shown,) = blocks(INDEX, "python"), blocks(INDEX, "text")
    printed, names = io.StringIO(), {"__name__": "index"}
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "docs/index.md", "exec"), names)
    assert printed.getvalue() == shown
    # float32 in another order of summation moves these logits by about 1e-4
    model, params, text, tokens = (names[name] for name in ("model", "params", "text", "done"))
    read = torch.cat([text, tokens.tokens])
    best, second = (
        model.apply(params, read, model.cache(len(read)))[0][len(text) - 1 : -1]
        .topk(2)
        .values.unbind(-1)
    )
    assert float((best - second).min()) > 0.01
    # what is drawn stays where every logit is moved by up to 0.01, three ways
    keys, write = fa.split(fa.key(3), 3), names["write"]
    drawn = torch.func.vmap(write)(keys)
    for moved in fa.split(fa.key(0), 3):
        jitter = 0.02 * fa.random.uniform(moved, (names["config"].vocabulary,)) - 0.01
        names["warm"] = fa.sampling.chain(
            fa.sampling.stateless(lambda logits, by=jitter: logits + by),
            fa.sampling.temperature(0.6),
        )
        assert torch.equal(torch.func.vmap(write)(keys), drawn)


def test_readme_and_landing_page_show_the_same_example():
    for language in ("python", "text"):
        assert blocks(README, language)[0] == blocks(INDEX, language)[0]


@pytest.mark.slow
def test_the_table_of_what_composes_is_what_check_transforms_finds():
    spec = importlib.util.spec_from_file_location(
        "composition", ROOT / "benchmarks" / "composition.py"
    )
    composition = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(composition)
    found = composition.table()
    for path in composition.PAGES:
        assert composition.written(path.read_text(), found) == path.read_text()


def test_the_links_of_the_readme_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert targets
    assert [
        target for target in targets if "://" not in target and not (ROOT / target).exists()
    ] == []


def test_the_picture_is_that_of_the_notebook():
    notebook = nbformat.read(ROOT / "notebooks" / "02_the_past_is_a_value.ipynb", as_version=4)
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    pictures = [
        base64.b64decode(output.data["image/png"])
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    assert (ROOT / "docs" / "assets" / "futures.png").read_bytes() in pictures
