"""`funcattn check`: the laws of a kernel, sampler, cache, scheme or acceptance rule, tried."""

import argparse
import importlib
import sys
from typing import Any

import torch

from .arguments import device, number
from .terminal import is_coloured, shown, working

BROKEN = 1  # exit code
COLOURS = {"passed": 32, "broken": 31, "raises": 33}
DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add, count = command.add_argument, number(int, 1, 10**6, "1 or more")
    command.epilog = (
        "Exit codes: 0 where no law is broken and one has passed, 1 otherwise, 2 for a mistake."
    )
    add("object", metavar="MODULE:OBJECT", help="such as my.kernels:attend, or kernels.py:attend")
    laws = "kernel, sampler, cache, transform, acceptance; kernel,transforms (what the object is)"
    add("--laws", metavar="L,...", type=_words, default=(), help=laws)
    left = "laws, or kinds of inputs: leads, grouped, masks, empty_rows, large_logits, ..."
    add("--without", metavar="NAME,...", type=_words, default=(), help=left)
    form = "mask, dense, sdpa, flash, causal or plain: how a kernel is called (by its parameters)"
    add("--signature", metavar="S", help=form)
    add("--dtype", metavar="D", type=_dtype, help="of a kernel's inputs (the widest it takes)")
    add("--device", metavar="D", default="cpu", type=device, help="of inputs (%(default)s)")
    depth = "nested transforms of a kernel (%(default)s)"
    add("--depth", metavar="N", type=number(int, 1, 4, "1 to 4"), default=2, help=depth)
    examples = "inputs for each law (%(default)s)"
    add("--examples", metavar="N", type=count, default=25, help=examples)
    seed = number(int, 0, 2**63 - 1, "0 or more")
    same = "the same seed draws the same inputs (%(default)s)"
    add("--seed", metavar="N", type=seed, default=0, help=same)
    seconds = number(float, 1, 86400, "1 or more")
    most = "for all laws; those not reached are told (%(default)s)"
    add("--seconds", metavar="S", type=seconds, default=50.0, help=most)
    add("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 where a law is broken, or none has passed."""
    checking, findings = kit("checking"), kit("findings")
    plan = planned(options)
    seen: set[str] = set()
    rows, so_far = [], findings.Findings(*plan[:3], ())
    if not options.json:
        _print([*so_far.head(), ""])
    found_in_turn = checking.finished(plan.tasks, options.seconds)
    for n in range(1, len(plan.tasks) + 1):
        with working(f"checking, {n} of {len(plan.tasks)}"):
            row = next(found_in_turn)
        rows.append(row)
        if not options.json:
            _print(findings.table_lines(row, seen), row.status)
    found = so_far._replace(rows=tuple(rows))
    if options.json:
        print(found.as_json())
    else:
        _print(["", found.total()])
        for row in found.told():
            _print(["", *findings.failure_lines(row)])
    return 0 if found.ok else BROKEN


def planned(options: argparse.Namespace) -> Any:
    """The laws that the options ask for, before they are tried."""
    checking = kit("checking")
    given = {name: getattr(options, name) for name in checking.Options._fields}
    return checking.plan(options.object, None, checking.Options(**given))


def kit(module: str) -> Any:
    """A module of funcattn.testing, which stands apart: it is imported when it is asked for."""
    try:
        return importlib.import_module(f"funcattn.testing.{module}")
    except ImportError as error:
        raise ValueError(str(error)) from error


def _print(lines: list[str], status: str = "") -> None:
    for n, line in enumerate(lines):
        text = shown(line)
        if status in COLOURS and not n and is_coloured():
            word = f" {status.upper() if status == 'broken' else status} "
            text = text.replace(word, f"\x1b[{COLOURS[status]}m{word}\x1b[39m", 1)
        print(text)
    sys.stdout.flush()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip().replace("-", "_") for word in text.split(",") if word.strip())


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"should be one of {', '.join(DTYPES)}, got {text}")
    return getattr(torch, text)
