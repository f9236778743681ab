"""`funcattn train`: a small model from a text; by default nanoGPT's, with a token per character.

Losses go to stderr, samples of the trained model to stdout. Snapshots are written beside the model,
so that a stopped run continues with --resume, with the same bits as an unbroken one.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import funcattn as fa

from .. import collectives, sampling, sharding, training, tree
from ..checkpoints.hf.saving import check_place
from ..core import atomic
from ..training.snapshots import PREFIX, steps_in
from . import ranks
from .arguments import TINY, device, number
from .terminal import say, shown, working

MODEL, SNAPSHOTS = "model", "snapshots"
HELD_OUT = 0.1  # fraction of the text, its end, that is the validation text


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    count = number(int, 1, 2**31, "1 or more")
    add = command.add_argument
    add("text", metavar="TEXT", help="a file of UTF-8, or - for stdin")
    add(
        "--tokenizer",
        metavar="MODEL",
        help="take the tokenizer of this model; without it each character is a token",
    )
    add("--layers", metavar="N", type=count, default=4, help="(%(default)s)")
    add("--width", metavar="N", type=count, default=128, help="(%(default)s)")
    add("--heads", metavar="N", type=count, default=4, help="(%(default)s)")
    add("--optimizer", choices=["adamw", "muon"], default="adamw", help="(%(default)s)")
    add_fitting(command, out="trained", steps=2000, rate=1e-3, rows=12, context=64)
    ranks.add_options(command, data=True)


def add_fitting(
    command: argparse.ArgumentParser, *, out: str, steps: int, rate: float, rows: int, context: int
) -> None:
    """The options common to `train` and `finetune`."""
    positive, share = (
        number(float, TINY, 1 / TINY, "above 0"),
        number(int, 0, 2**63 - 1, "0 or more"),
    )
    count = number(int, 1, 2**31, "1 or more")
    add = command.add_argument
    add("--context", metavar="T", type=count, default=context, help="tokens in a row (%(default)s)")
    add("--rows", metavar="N", type=count, default=rows, help="rows in a batch (%(default)s)")
    add("--steps", metavar="N", type=count, default=steps, help="(%(default)s)")
    add(
        "--rate",
        metavar="R",
        type=positive,
        default=rate,
        help="learning rate, reached by warm-up, then a cosine (%(default)s)",
    )
    add(
        "--report-every",
        metavar="N",
        type=count,
        help="steps between losses, each with a snapshot (a tenth of all)",
    )
    add("--compile", action="store_true", help="compile the step first: half a minute, then faster")
    add("--out", metavar="FOLDER", default=out, help="where the result goes (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add(
        "--sample",
        metavar="N",
        type=share,
        default=300,
        help="tokens to write at the end (%(default)s)",
    )
    add("--seed", metavar="N", type=share, default=0, help="(%(default)s)")
    add("--device", type=device, default="cpu", help="such as cpu or cuda (%(default)s)")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    with ranks.meshed(options) as mesh:
        _run(options, mesh)


def _run(options: argparse.Namespace, mesh: DeviceMesh) -> None:
    if mesh is not None and options.text == "-":
        raise ValueError(
            "the text should be a file, is to come from stdin, which processes cannot "
            "share. Write it into one."
        )
    text = read(options.text)
    if options.tokenizer is None:
        tokenizer = training.characters(text)
    else:
        tokenizer = fa.load(options.tokenizer).tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{options.tokenizer} has no tokenizer. Leave --tokenizer out, and "
                "each character is a token."
            )
    if options.width % (2 * options.heads):
        raise ValueError(
            f"--width should be a multiple of twice --heads, {2 * options.heads}, got "
            f"{options.width}. Change either."
        )
    config = fa.Config(
        vocabulary=tokenizer.vocabulary,
        width=options.width,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.heads,
        head_size=options.width // options.heads,
        feed_forward=8 * -(-options.width // 3),  # as many weights as two of 4 * width
        context=options.context,
    )
    if ranks.leads():
        check_place(Path(options.out) / MODEL)  # before the slow part
    ids = encoded(options, tokenizer, text)
    params = tree.to(options.device)(fa.decoder(config).init(fa.key(options.seed)))
    say(f"{tree.count(params):,} weights, {tokenizer.vocabulary} kinds of token")
    rate = training.cosine(
        options.rate, options.steps, warmup=min(100, options.steps // 10), floor=options.rate / 10
    )
    rules = sharding.tensor_parallel(config, size=getattr(options, "tp", 1))
    cuts = None if mesh is None else sharding.specs(params, mesh, rules)
    kinds = {"adamw": lambda: training.adamw(rate, betas=(0.9, 0.99), weight_decay=0.1)}
    kinds["muon"] = lambda: training.muon(rate, match=True, specs=cuts)
    optimizer = training.chain(training.clip(1.0, specs=cuts), kinds[options.optimizer]())
    params = (
        fitted(options, config, params, ids, optimizer)
        if mesh is None
        else _together(options, config, params, ids, optimizer, mesh, rules, cuts)
    )
    if not ranks.leads():
        return
    place = Path(options.out) / MODEL
    fa.save(place, config, tree.to("cpu")(params), tokenizer)
    write_sample(options, config, params, tokenizer, text[:1])
    say(f"The model is in {place}. Go on from a text with: funcattn generate --model {place} TEXT")


def _together(
    options: argparse.Namespace,
    config: fa.Config,
    params: fa.tree.Tree,
    ids: Tensor,
    optimizer: training.Optimizer,
    mesh: DeviceMesh,
    rules: sharding.mesh.Rules,
    cuts: fa.tree.Tree,
) -> Any:
    """The trained params, unsharded. Each process has a shard of them and of every batch."""
    if options.rows % options.dp:
        raise ValueError(
            f"--rows should be a multiple of --dp {options.dp}, got {options.rows}. Change either."
        )
    held = sharding.to_local(fa.shard(mesh, rules)(params))

    def loss(model: fa.Model, params: fa.tree.Tree, batch: Tensor) -> Tensor:
        return fa.loss(model, params, collectives.local_slice(batch, "data"))

    with sharding.inside(mesh):
        held = fitted(options, config, held, ids, optimizer, loss=loss, specs=cuts)
    return fa.gather(sharding.from_local(held, cuts, mesh))


def snapshots_of(options: argparse.Namespace) -> Path:
    """The folder of this process's snapshots; snapshots that some process lacks are removed."""
    place, n = (
        Path(options.out) / SNAPSHOTS,
        options.tp * options.dp if hasattr(options, "tp") else 1,
    )
    if n == 1:
        return place
    place = place / f"{os.environ['RANK']}-of-tp{options.tp}-dp{options.dp}"
    taken = steps_in(place)
    for step in set(taken) - set(ranks.agreed(taken)):
        atomic.remove(place / f"{PREFIX}{step:08}")
    return place


def read(path: str) -> str:
    """The text of a file or of stdin."""
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{'stdin' if path == '-' else path} is empty. Give a text to learn from.")
    return text


def fitted(
    options: argparse.Namespace,
    config: fa.Config,
    params: fa.tree.Tree,
    ids: Tensor,
    optimizer: training.Optimizer,
    frozen: fa.tree.Tree = (),
    loss: Any = fa.loss,
    specs: fa.tree.Tree = None,
) -> Any:
    """The trained part of params, after all steps."""
    folder = snapshots_of(options)
    learnt, validation = halves(ids, options.context)
    if validation is None:
        say("The text is too short to hold a part back: there is no loss of validation.")
    try:
        return training.fit(
            fa.fold_in(fa.key(options.seed), 1),
            fa.decoder(config, kernel="sdpa"),  # only first derivatives are taken
            params,
            learnt,
            frozen=frozen,
            loss=loss,
            specs=specs,
            optimizer=optimizer,
            steps=options.steps,
            rows=options.rows,
            context=options.context,
            validation=validation,
            report_every=options.report_every or max(1, options.steps // 10),
            folder=folder,
            resume=options.resume,
            compile=options.compile,
        ).params
    except KeyboardInterrupt:
        taken = steps_in(folder)
        kept = f"Step {taken[-1]} is kept; add --resume to go on from it." if taken else ""
        say(f"\nStopped. {kept or 'Nothing was kept yet.'}")
        raise


def encoded(options: argparse.Namespace, tokenizer: fa.checkpoints.Tokenizer, text: str) -> Tensor:
    """The ids of a text; raises before training where they are too few."""
    taken = steps_in(snapshots_of(options))
    if taken and not options.resume:
        raise ValueError(
            f"{options.out} holds a run of {taken[-1]} steps. Add --resume to go on "
            "with it, or choose another --out."
        )
    with working("Encoding the text"):
        ids = torch.tensor(tokenizer.encode(text), device=options.device)
    if len(ids) < options.context + 1:
        raise ValueError(
            f"the text has {len(ids)} tokens, and a row is {options.context} + 1. Give a longer "
            "text, or a smaller --context."
        )
    return ids


def halves(ids: Tensor, context: int) -> tuple[Tensor, Tensor | None]:
    """The training text, and the end of the text for validation; None if shorter than a row."""
    n = int(len(ids) * HELD_OUT)
    return (ids[:-n], ids[-n:]) if n > context and len(ids) - n > context else (ids, None)


def write_sample(
    options: argparse.Namespace,
    config: fa.Config,
    params: fa.tree.Tree,
    tokenizer: fa.checkpoints.Tokenizer,
    begin: str,
) -> None:
    """Print a beginning and the model's continuation.

    Positions beyond the context were not trained: when it is full, its later half is read again.
    """
    if not options.sample:
        return
    model, sampler = (
        fa.decoder(config),
        sampling.chain(sampling.temperature(0.8), sampling.top_k(200)),
    )
    key = tree.to(options.device)(fa.fold_in(fa.key(options.seed), 2))
    ids, left = list(tokenizer.encode(begin)), options.sample
    print(shown(begin), end="")
    while left:
        prompt = ids[-max(1, config.context // 2) :]
        steps = min(left, config.context - len(prompt) + 1)
        piece = None
        for piece in fa.stream(
            *(fa.fold_in(key, left), model, params, torch.tensor(prompt, device=options.device)),
            steps=steps,
            tokenizer=tokenizer,
            sampler=sampler,
        ):
            print(shown(piece.text), end="", flush=True)
        written = piece.tokens if piece is not None else ()
        ids, left = [*ids, *written], left - steps if len(written) == steps else 0
    print(flush=True)
