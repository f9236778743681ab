"""`funcattn inspect`: config, parameters, and the memory of a cache; or this machine's kernels."""

import argparse
import dataclasses
from collections import Counter

import torch

from .. import tree
from ..core.errors import printable
from ..quantization import is_quantized
from . import machine
from .sessions import load


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    help = "show the processor, and the kernels and operators that it has, instead of a model"
    command.add_argument("--machine", action="store_true", help=help)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.machine:
        machine.show()
        return
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
    heads, key, value = config.cached
    rows = f"{heads} heads x {key}" if key == value else f"{heads} heads x {key} and {value}"
    rows = f"keys and values of {config.layers} layers x {rows}"
    if config.latent_size:
        rows = f"latents of {config.layers} layers x {key}"
    print(f"\ncache, {name} {rows}")
    for tokens in (1000, config.context):
        print(f"  {f'{tokens} tokens':<14} {tokens * per_token / 2**20:.1f} MiB")
    if tokenizer is None:
        print("\ntokenizer\n  none")
        return
    stops = " ".join(tokenizer.decode([stop], skip_special=False) for stop in tokenizer.stop)
    print(
        f"\ntokenizer\n  {'ids':<14} {tokenizer.vocabulary}\n  {'stops at':<14} "
        f"{printable(stops.strip()) or 'nothing'}"
    )
    print(f"  {'chat template':<14} {'no' if tokenizer.template is None else 'yes'}")
