"""`funcattn finetune`: LoRA of a model on a text; the base weights are not changed.

Losses go to stderr, samples of before and after to stdout. The adaptation is written in PEFT's
layout; with --merge a whole model.
"""

import argparse
from pathlib import Path

import funcattn as fa

from .. import low_rank, training, tree
from ..checkpoints.hf.saving import check_place
from .arguments import TINY, number
from .pretraining import MODEL, add_fitting, encoded, fitted, read, write_sample
from .terminal import say, working

ADAPTER = "adapter"


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    count, positive = number(int, 1, 2**31, "1 or more"), number(float, TINY, 1 / TINY, "above 0")
    add = command.add_argument
    add("text", metavar="TEXT", help="a file of UTF-8, or - for stdin")
    add(
        "--model",
        default="smollm2-135m",
        help="a .gguf file, a folder, a name, or org/name of the hub (%(default)s)",
    )
    add(
        "--rank",
        metavar="R",
        type=count,
        default=8,
        help="of what is added to each matrix (%(default)s)",
    )
    add(
        "--alpha",
        metavar="A",
        type=positive,
        help="what is added is multiplied by A / R (twice the rank)",
    )
    add("--merge", action="store_true", help="write the adapted model too, whole")
    add_fitting(command, out="finetuned", steps=100, rate=5e-4, rows=4, context=64)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    text = read(options.text)
    with working(f"Loading {options.model}"):
        config, params, tokenizer = fa.load(options.model)
    if tokenizer is None:
        raise ValueError(
            f"{options.model} has no tokenizer.json. Put the one of this model beside its weights."
        )
    if options.context > config.context:
        raise ValueError(
            f"--context should be at most {config.context}, which the model was "
            f"trained on, got {options.context}."
        )
    if options.merge:
        check_place(Path(options.out) / MODEL)  # before the slow part
    ids = encoded(options, tokenizer, text)
    params = tree.to(options.device)(params)
    adapted = low_rank.lora(options.rank, alpha=options.alpha)(fa.key(options.seed), params)
    chosen, frozen = tree.partition(adapted, low_rank.is_trained)
    say(f"{tree.count(chosen):,} of {tree.count(params):,} weights are trained")
    rate = training.cosine(options.rate, options.steps, warmup=options.steps // 10)
    optimizer = training.chain(training.clip(1.0), training.adamw(rate, weight_decay=0.0))
    chosen = fitted(options, config, chosen, ids, optimizer, frozen)
    adapted = tree.combine(chosen, frozen)
    place = Path(options.out) / ADAPTER
    fa.save_lora(place, adapted, base=options.model, config=config)
    say(f"The adaptation is in {place}, as PEFT writes it.")
    if options.merge:
        whole = Path(options.out) / MODEL
        fa.save(whole, config, tree.to("cpu")(low_rank.merge_lora(adapted)), tokenizer)
        say(
            f"The adapted model is in {whole}. Go on from a text with: funcattn generate --model "
            f"{whole} TEXT"
        )
    begin = " ".join(text.split()[:3])
    for name, weights in (
        (("Before", params), ("After", low_rank.merge_lora(adapted))) if options.sample else ()
    ):
        say(f"{name}:")
        write_sample(options, config, weights, tokenizer, begin)
