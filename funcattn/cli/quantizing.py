"""`funcattn quantize`: write a model with quantized weights, as a folder that `fa.load` reads.

A report on the matrices goes to stdout, one line for those of one name in all layers; with a text,
its perplexity before and after too. With `--gptq`, `--awq` or `--smooth` another text calibrates.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from .. import checkpoints, evaluation, progress, quantization, tree
from ..checkpoints.hf.saving import check_place
from ..models import Model
from ..quantization import calibration
from .arguments import number
from .sessions import Session, load
from .terminal import working

SCHEMES = {
    name: getattr(quantization, name) for name in ("int8", "int4", "w8a8", "nf4", "fp8", "ternary")
}


def _smooth(
    model: Model, tokens: torch.Tensor, scheme: quantization.schemes.Scheme, **options: Any
) -> Callable[[Any], Any]:
    scaled, rounded = (
        calibration.smooth(model, tokens, scheme, **options),
        quantization.quantize(scheme),
    )
    return lambda params: rounded(scaled(params))


FITTED = {"gptq": calibration.gptq, "awq": calibration.awq, "smooth": _smooth}
CONTEXT = 512  # tokens read at once for the perplexity


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = command.add_argument
    add(
        "--scheme",
        choices=SCHEMES,
        default="int4",
        help="of the matrices of the layers (%(default)s)",
    )
    add(
        "--group",
        metavar="N",
        type=number(int, 1, 2**31, "1 or more"),
        help="columns that share a scale (the scheme's own)",
    )
    by = command.add_mutually_exclusive_group().add_argument
    by(
        "--gptq",
        metavar="TEXT",
        type=Path,
        help="a file of UTF-8, to which int4, int8 and w8a8 fit their codes",
    )
    by(
        "--awq",
        metavar="TEXT",
        type=Path,
        help="the same, by which features are scaled and ranges searched",
    )
    by(
        "--smooth",
        metavar="TEXT",
        type=Path,
        help="the same, by which features are scaled, for any scheme",
    )
    add(
        "--text",
        metavar="TEXT",
        type=Path,
        help="a file of UTF-8: tell its perplexity before and after",
    )
    add(
        "-o",
        "--output",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="a new folder, or one that was written before",
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    scheme = SCHEMES[options.scheme]
    if options.group is not None:
        if not hasattr(scheme, "group"):
            raise ValueError(
                f"--group is for int8, int4, w8a8, nf4 and ternary: {options.scheme} has one scale "
                "a row. Leave it out."
            )
        scheme = scheme(group=options.group)
    method, sample = next(
        ((name, getattr(options, name)) for name in FITTED if getattr(options, name) is not None),
        (None, None),
    )
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in (sample, options.text)
        if path is not None
    }
    check_place(options.output)  # before the slow part
    session = load(options, needs_tokenizer=bool(texts))
    if any(
        quantization.is_quantized(leaf)
        for leaf in tree.leaves(session.params, is_leaf=quantization.is_quantized)
    ):
        raise ValueError(
            f"{options.model} is quantized already. Give the model that it was made of."
        )
    ids = {
        path: torch.tensor(session.tokenizer.encode(text), device=options.device)
        for path, text in texts.items()
    }
    if options.text is not None and len(ids[options.text]) < 2:
        raise ValueError(
            f"{options.text} has {len(ids[options.text])} tokens, and is scored from "
            "the second. Give a longer one."
        )
    if method is None:
        with working("Quantizing"):
            params = quantization.quantize(scheme)(session.params)
    else:
        params = _fitted(method, session, ids[sample], scheme)
    print(quantization.report(session.params, params))
    if options.text is not None:
        for when, weights in (("before", session.params), ("after", params)):
            print(f"perplexity {when:<7} {_perplexity(session, weights, ids[options.text]):.4f}")
    checkpoints.save(options.output, session.config, params, session.tokenizer)


def _fitted(
    method: str, session: Session, tokens: torch.Tensor, scheme: quantization.schemes.Scheme
) -> Any:
    """The weights calibrated on a text, with a progress bar on stderr if it is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Layers", total=session.config.layers)
        show = lambda done, of: bar.update(task, completed=done, total=of)
        with progress.silence():  # the bar is on that line
            return FITTED[method](session.model, tokens, scheme, progress=show)(session.params)


def _perplexity(session: Session, params: tree.Tree, tokens: torch.Tensor) -> float:
    limit = session.config.limit()
    with torch.no_grad():
        return float(
            evaluation.perplexity(
                session.model, params, tokens, context=min(CONTEXT, limit or CONTEXT)
            )
        )
