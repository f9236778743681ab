"""Run the notebooks from their scripts, and hold each notebook to its script.

    python notebooks/run.py                 run all; fail if one raises, or if a committed notebook differs from its script
    python notebooks/run.py --keep 04 07    run these and write 04_*.ipynb and 07_*.ipynb with what came out

A notebook is two files: `NN_name.py`, in the percent format, is what is written, read and reviewed;
`NN_name.ipynb` is the same cells with their outputs, for people who look. Nobody edits the second
by hand, or does so with jupytext, which pairs the two.
"""

import argparse
import base64
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
# that other pages show too
PICTURES = {"02_the_past_is_a_value": FOLDER.parent / "docs" / "assets" / "futures.png"}
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def scripts() -> list[Path]:
    """The scripts of the notebooks, in their order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def cells(notebook: Any) -> list[tuple[str, str]]:
    """What a script and its notebook have in common."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def complaints(script: Path) -> list[str]:
    """What is wrong with the committed notebook of a script, without running it."""
    path = script.with_suffix(".ipynb")
    if not path.exists():
        return [f"{path.name} is not there"]
    notebook = nbformat.read(path, as_version=4)
    if cells(jupytext.read(script)) != cells(notebook):
        return [f"{path.name} is not {script.name}"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append(f"{path.name} was not run once from top to bottom")
    outputs = [output for cell in code for output in cell.outputs]
    if not outputs:
        found.append(f"{path.name} shows nothing")
    if any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs):
        found.append(f"{path.name} shows an error or a warning")
    return found


def picture(notebook: Any) -> bytes:
    """The first picture of a notebook, as a file of PNG."""
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    return base64.b64decode(
        next(
            output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
        )
    )


def executed(script: Path, limit: int) -> Any:
    """The notebook of a script, run from top to bottom in a kernel of its own."""
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random ones would change with every run
    client = NotebookClient(
        notebook, timeout=limit, kernel_name=KERNEL["name"], extra_arguments=["--log-level=ERROR"]
    )
    client.execute(cwd=str(FOLDER))
    for cell in notebook.cells:
        cell.metadata = {}  # times of execution
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in map(_settled, _joined(cell.outputs)) if output is not None
            ]
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """The outputs, with what one stream wrote in several pieces as one."""
    joined: list[Any] = []
    for output in outputs:
        if (
            joined
            and output.output_type == joined[-1].output_type == "stream"
            and output.name == joined[-1].name
        ):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _settled(output: Any) -> Any:
    """An output as it stands at the end: of a line that a progress bar wrote again and again, what
    was left.
    """
    if output.output_type == "stream":
        output.text = "\n".join(
            line.rsplit("\r", 1)[-1] for line in output.text.replace("\r\n", "\n").split("\n")
        )
        return output if output.text.strip() else None
    return output


def main() -> int:
    """Run the notebooks that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="which: 04 07; all where none is named")
    parser.add_argument(
        "--keep", action="store_true", help="write the notebooks with their outputs"
    )
    parser.add_argument("--limit", type=int, default=600, help="seconds for a cell (%(default)s)")
    options = parser.parse_args()
    wrong = []
    for script in scripts():
        if options.numbers and script.name[:2] not in options.numbers:
            continue
        started = time.perf_counter()
        try:
            notebook = executed(script, options.limit)
        except CellExecutionError as error:
            wrong.append(f"{script.name}: {error}")
            print(f"{script.stem:<40} raised", flush=True)
            continue
        print(f"{script.stem:<40} {time.perf_counter() - started:6.1f} s", flush=True)
        if options.keep:
            nbformat.write(notebook, script.with_suffix(".ipynb"))
            if script.stem in PICTURES:
                PICTURES[script.stem].write_bytes(picture(notebook))
        wrong += complaints(script)
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
