"""The notebooks and the kept measurements as pages: a hook of mkdocs, which reads what is committed
and runs nothing.

tutorials/NN_name.md    of notebooks/NN_name.ipynb, with its outputs
measured/name.md        of benchmarks/results/name.md
"""

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of other files."""
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        text, images = page(nbformat.read(path, as_version=4), path.stem)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, data in images.items():
            files.append(File.generated(config, f"tutorials/{name}", content=data))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        files.append(File.generated(config, f"measured/{path.name}", content=path.read_text()))
    return files


def page(notebook: Any, stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts, images = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\(\.\./docs/", "](../", cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "stream":
                parts.append(_text(output.text))
            elif "image/png" in data:
                name = f"{stem}_{len(images) + 1}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure {len(images)}]({name})" + "{ .figure }")
            elif "text/html" in data:
                parts.append(
                    '<div class="shown">' + re.sub(r"\s*\n\s*", " ", data["text/html"]) + "</div>"
                )
            elif "text/plain" in data:
                parts.append(_text(data["text/plain"]))
    first, *rest = parts
    title, _, lead = first.partition("\n")
    source = (
        f'<p class="source">This page is the notebook <code>notebooks/{stem}.ipynb</code>, as it '
        f"was run.</p>"
    )
    return "\n\n".join([title, source, lead.strip(), *rest]) + "\n", images


def _text(text: str) -> str:
    return f"```{{ .text .printed }}\n{text.rstrip()}\n```"
