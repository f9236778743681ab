"""`funcattn inspect`: config, parameters, and the memory of a cache; what is read of its files; or
this machine's kernels.
"""

import argparse
import dataclasses
from collections import Counter

import torch

from .. import tree
from ..checkpoints import surveying
from ..core.errors import printable
from ..quantization import is_quantized
from ..transformer import cache_sizes
from . import machine
from .sessions import load

SHOWN = 8  # names of a list


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    help = "the same as --model"
    command.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=help)
    help = "show the processor, and the kernels and operators that it has, instead of a model"
    command.add_argument("--machine", action="store_true", help=help)
    help = "show what is read of the model's files, what not and why, without reading weights"
    command.add_argument("--files", action="store_true", help=help)


def run(options: argparse.Namespace) -> int | None:
    """Run the command; 1 where `--files` shows a model that is not read."""
    if options.machine:
        machine.show()
        return None
    if options.files:
        return _survey(options.model)
    session = load(options, needs_tokenizer=False)
    config, tokenizer, dtype = session.config, session.tokenizer, session.dtype
    print(f"{printable(options.model)}\n\nconfig")
    for field in dataclasses.fields(config):
        print(f"  {field.name:<14} {getattr(config, field.name)}")
    print("\nparams")
    for line in str(tree.summary(session.params)).splitlines():
        print(f"  {line}")
    kinds = Counter(
        type(leaf).__name__
        for leaf in tree.leaves(session.params, is_leaf=is_quantized)
        if is_quantized(leaf)
    )
    for kind, count in kinds.items():
        print(f"  in codes: {count} {'matrix' if count == 1 else 'matrices'} as {kind}")
    with torch.device("meta"):  # sizes without memory
        per_token = tree.nbytes(session.model.cache(1, dtype=dtype)) - tree.nbytes(
            session.model.cache(0, dtype=dtype)
        )
    name = str(dtype).removeprefix("torch.")
    features = lambda key, value: f"{key}" if key == value else f"{key} and {value}"
    rows = "keys and values of " + ", ".join(
        f"{count} layers x {heads} heads x {features(*sides)}"
        for count, heads, *sides in cache_sizes(config)
    )
    if config.latent_size:
        rows = f"latents of {config.layers} layers x {config.cached[1]}"
    print(f"\ncache, {name} {rows}")
    for tokens in (1000, config.context):
        print(f"  {f'{tokens} tokens':<14} {tokens * per_token / 2**20:.1f} MiB")
    if tokenizer is None:
        print("\ntokenizer\n  none")
        return None
    stops = " ".join(tokenizer.decode([stop], skip_special=False) for stop in tokenizer.stop)
    print(
        f"\ntokenizer\n  {'ids':<14} {tokenizer.vocabulary}\n  {'stops at':<14} "
        f"{printable(stops.strip()) or 'nothing'}"
    )
    print(f"  {'chat template':<14} {'no' if tokenizer.template is None else 'yes'}")
    return None


def _survey(model: str) -> int:
    """Print the survey; 0 where the model is read, 1 where it is refused."""
    found = surveying.survey(model)
    print(f"{printable(model)}\n  {printable(found.kind)}")
    print(f"  {'family':<14} {printable(found.family) or 'none'}")
    print(f"  {'read':<14} {'no' if found.why_not else 'yes'}")
    if found.why_not:
        print(f"\nwhy not\n  {printable(found.why_not)}")
    print("\ntensors")
    print(f"  {'types':<14} {', '.join(f'{n} {kind}' for kind, n in found.types) or 'none'}")
    print(f"  {'in codes':<14} {printable(found.codes) or 'none'}")
    for name, names in (
        ("read", found.read),
        ("left out", found.left_out),
        ("missing", found.missing),
        ("unknown", found.unknown),
    ):
        print(f"  {name:<14} {len(names)}{_some(names) if name != 'read' else ''}")
    print(f"\ntokenizer\n  {'files':<14} {', '.join(found.tokenizer) or 'none'}")
    if found.config is not None:
        print("\nconfig")
        for field in dataclasses.fields(found.config):
            value = getattr(found.config, field.name)
            if value != field.default:
                print(f"  {field.name:<14} {value}")
    return 1 if found.why_not else 0


def _some(names: tuple[str, ...]) -> str:
    """The first names of a list."""
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f": {', '.join(map(printable, names[:SHOWN]))}{more}"
