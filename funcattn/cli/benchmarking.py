"""`funcattn bench`: how fast a model decodes on this machine, against how fast the machine reads
memory.

Candidates alternate token by token, so that other load of the machine affects all alike; results
are medians. Model bandwidth utilization (MBU) is the bytes that a token needs, weights and cache,
divided by its time, as a fraction of the bandwidth of the fastest plain pass over as many bytes.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

import funcattn as fa

from .. import quantization, tree
from ..core import atomic
from ..transformer import cache_sizes
from . import memory_limit
from .sessions import load
from .terminal import say, working

SCHEMES = {"int8": quantization.int8, "int4": quantization.int4}
WARMUP = 4  # tokens


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = command.add_argument
    add(
        "--tokens",
        metavar="N",
        type=int,
        default=40,
        help="tokens that each candidate writes (%(default)s)",
    )
    add(
        "--context",
        metavar="N",
        type=int,
        default=64,
        help="tokens remembered before them (%(default)s)",
    )
    add(
        "--capacity",
        metavar="N",
        type=int,
        default=0,
        help="rows reserved for them, where it is to be more",
    )
    add(
        "--threads",
        metavar="N",
        type=int,
        default=0,
        help="of torch; 0 leaves it alone (%(default)s)",
    )
    add(
        "--schemes",
        metavar="S",
        default="int8",
        help="quantized candidates, of int8,int4; empty for none (%(default)s)",
    )
    add("--eager", action="store_true", help="leave out what waits for a compiler")
    add("--json", metavar="FILE", type=Path, help="keep the figures")
    add("--plot", metavar="FILE", type=Path, help="draw them (needs matplotlib)")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.tokens < 1 or options.context < 2:
        raise ValueError(
            "--tokens should be at least 1 and --context at least 2, are "
            f"{options.tokens} and {options.context}."
        )
    unknown = [name for name in _names(options) if name not in SCHEMES]
    if unknown:
        raise ValueError(f"--schemes should be of {', '.join(SCHEMES)}, got {', '.join(unknown)}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as files:  # unwritable files fail before the measurement
        drafts = {
            path: files.enter_context(atomic.file(path))
            for path in (options.json, options.plot)
            if path
        }
        session = load(options, needs_tokenizer=False)
        with torch.no_grad():
            figures = measure(session.model, session.params, session.config, options)
        print(table(figures))
        if options.json:
            drafts[options.json].write_text(json.dumps(figures, indent=2) + "\n")
        if options.plot:
            plot(figures, drafts[options.plot])
    if options.plot:
        say(f"drawn in {options.plot}")


def _names(options: argparse.Namespace) -> list[str]:
    return [name for name in options.schemes.split(",") if name]


def measure(
    model: fa.Model, params: fa.Params, config: fa.Config, options: argparse.Namespace
) -> dict[str, Any]:
    """The machine's bandwidth; of each candidate ms a token, tokens/s, MBU, seconds to start."""
    trees = {
        "float": params,
        **{name: fa.quantize(SCHEMES[name])(params) for name in _names(options)},
    }
    models = {"eager": model} if options.eager else {"eager": model, "compiled": fa.compile(model)}
    prompt = torch.arange(options.context, device=params.norm.device) % config.vocabulary
    candidates: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    for how, made in models.items():
        for kind, weights in trees.items():
            name = how if kind == "float" else f"{how} {kind}"
            begun = time.perf_counter()
            with working(f"Starting {name}"):
                pieces = _tokens(made, weights, prompt, options)
                next(pieces)
                next(pieces)
            first[name] = time.perf_counter() - begun
            candidates[name] = pieces.__next__
    size = tree.nbytes(params)
    calls = {**memory_limit.reads(size), **candidates}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with working("Taking turns"):
        for turn in range(WARMUP + options.tokens):
            for name, call in calls.items():
                begun = time.perf_counter()
                call()
                if turn >= WARMUP:
                    seconds[name].append(time.perf_counter() - begun)
    bandwidth = memory_limit.bandwidth(size, {name: median(s) for name, s in seconds.items()})
    rows = (layers * heads * (D + Dv) for layers, heads, D, Dv in cache_sizes(config))
    remembered = sum(rows) * params.norm.element_size()
    past = remembered * (options.context + options.tokens / 2)
    found = []
    for name in candidates:
        each, weights = median(seconds[name]), trees[name.split()[-1] if " " in name else "float"]
        needed = tree.nbytes(weights) + past
        row = {
            "name": name,
            "ms": each * 1e3,
            "tokens_per_second": 1 / each,
            "first_tokens_s": first[name],
        }
        found.append({**row, "bytes_a_token": needed, "mbu": needed / each / bandwidth})
    head = {"model": options.model, "threads": torch.get_num_threads(), "torch": torch.__version__}
    lengths = {"context": options.context, "tokens": options.tokens, "capacity": options.capacity}
    return {
        **head,
        **lengths,
        "read_bytes_per_second": bandwidth,
        "peak_memory_bytes": _peak(),
        "candidates": found,
    }


def _tokens(
    model: fa.Model, params: fa.Params, prompt: torch.Tensor, options: argparse.Namespace
) -> Iterator[int]:
    """Greedy tokens, one by one, with a cache of the given capacity."""
    past = fa.generate(fa.key(0), model, params, prompt[:-1], steps=0)[1]
    if options.capacity:
        past = fa.commit(
            model.cache(options.capacity, dtype=params.norm.dtype),
            model.extend(params, prompt[:-1], model.cache(0))[1],
        )
    steps = WARMUP + options.tokens + 3
    for piece in fa.stream(fa.key(0), model, params, prompt[-1:], past, steps=steps):
        yield piece.tokens[-1]


def _peak() -> int:
    """The peak memory of this process in bytes; 0 where it is unknown."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def table(figures: dict[str, Any]) -> str:
    """The figures as text."""
    measure = figures["candidates"][0]["ms"]
    cells = [("", "ms a token", "tokens/s", "ratio", "MBU", "first two tokens")]
    for row in figures["candidates"]:
        speed = f"{row['tokens_per_second']:.1f}", f"{measure / row['ms']:.2f}", f"{row['mbu']:.2f}"
        cells.append((row["name"], f"{row['ms']:.1f}", *speed, f"{row['first_tokens_s']:.1f} s"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    limit = (
        f"memory reads {figures['read_bytes_per_second'] / 1e9:.1f} GB/s with "
        f"{figures['threads']} thread(s)"
    )
    return "\n".join(
        [*lines, f"{limit}; peak memory {figures['peak_memory_bytes'] / 2**20:.0f} MiB"]
    )


def plot(figures: dict[str, Any], file: Path) -> None:
    """A bar chart of tokens/s, with the bandwidth limit for the same bytes."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib.") from error
    rows, bandwidth = figures["candidates"], figures["read_bytes_per_second"]
    axes = (
        figure := matplotlib.figure.Figure(figsize=(7, 0.6 * len(rows) + 1.2), layout="constrained")
    ).subplots()
    names = [row["name"] for row in rows][::-1]
    axes.barh(
        names,
        [bandwidth / row["bytes_a_token"] for row in rows][::-1],
        color="#ddd",
        label="limit of memory",
    )
    axes.barh(
        names,
        [row["tokens_per_second"] for row in rows][::-1],
        color="#3b6ea5",
        label="measured",
        height=0.5,
    )
    axes.set_xlabel("tokens/s")
    axes.set_title(f"{figures['model']}, {figures['threads']} thread(s)")
    axes.legend()
    figure.savefig(file)
