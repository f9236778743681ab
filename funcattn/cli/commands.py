"""The commands, their options, and the handling of errors.

Only the model's text is written to stdout, so that it can be piped; all else goes to stderr. An
error is one line and exit code 2. Several samples of one prompt fork one cache. A chat keeps its
cache from turn to turn: it reads only tokens that are not in it, and undoing a turn truncates it.
"""

import sys
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path

import funcattn as fa

from . import (
    benchmarking,
    chatting,
    checking,
    evaluating,
    finetuning,
    generating,
    inspecting,
    pretraining,
    quantizing,
    ranks,
    streams,
    templating,
)
from .arguments import TINY, Parser, device, dtype, number, stop
from .terminal import CUT_OFF, INTERRUPTED, complain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those of the process by default.

    Returns:
        The exit code: 0, 1 where `check` finds a law broken, 2 for a mistake, 130 after Ctrl-C, 141
            where the reader of the text went away.

    Raises:
        SystemExit: as argparse does, for --help and for options that cannot be read.
    """
    with streams.opened():
        try:
            try:
                options, left = parser().parse_known_args(arguments)
                if left:
                    options.command.refuse(left)
                code = options.run(options)
            finally:
                sys.stdout.flush()
            return code or 0
        except BrokenPipeError:
            streams.end(sys.stdout)
            return CUT_OFF
        except KeyboardInterrupt:
            return INTERRUPTED
        except UnicodeError:
            return complain("the text should be UTF-8, is not. Convert it first, as with iconv.")
        except OSError as error:
            return complain(streams.reason(error))
        except (ValueError, RuntimeError) as error:  # of funcattn, and of torch for devices
            return complain(error)


def parser() -> Parser:
    """The commands and their options."""
    weights, writing = Parser(add_help=False), Parser(add_help=False)
    positive, share = (
        number(float, TINY, 1 / TINY, "above 0"),
        number(float, TINY, 1, "above 0, at most 1"),
    )
    whole, count = number(int, 0, 2**63 - 1, "0 or more"), number(int, 1, 2**63 - 1, "1 or more")
    add = weights.add_argument
    add(
        "--model",
        default="smollm2-135m",
        help="a .gguf file, a folder, a name, or org/name of the hub (%(default)s)",
    )
    add(
        "--dtype",
        metavar="D",
        type=dtype,
        help="of the weights, float32 or bfloat16 (as a folder has them; float32 from .gguf)",
    )
    add("--device", type=device, default="cpu", help="such as cpu or cuda (%(default)s)")

    add, either = writing.add_argument, writing.add_mutually_exclusive_group().add_argument
    either(
        "--greedy", action="store_true", help="the most likely token each time; nothing is drawn"
    )
    either(
        "--temperature",
        metavar="T",
        type=positive,
        default=0.7,
        help="below 1 sharper, above 1 flatter (%(default)s)",
    )
    add("--top-k", metavar="K", type=count, help="draw from the K most likely tokens")
    add(
        "--top-p",
        metavar="P",
        type=share,
        default=0.95,
        help="from the most likely ones that reach P together (%(default)s)",
    )
    add(
        "--min-p",
        metavar="P",
        type=share,
        help="from those at least P times as likely as the likeliest",
    )
    add(
        "--compile",
        action=BooleanOptionalAction,
        help="decode at the speed of memory, where some models wait for a compiler first; "
        "by default where nothing is to be compiled",
    )
    add(
        "--steps",
        metavar="N",
        type=whole,
        default=256,
        help="tokens to write at most (%(default)s)",
    )
    add(
        "--seed",
        metavar="N",
        type=whole,
        default=0,
        help="the same seed gives the same text (%(default)s)",
    )
    add(
        "--stop",
        metavar="STRING",
        type=stop,
        action="append",
        default=[],
        help="end before this text; may be given again",
    )

    whole_parser = Parser(
        "funcattn", description="Text from a language model, in pure functions of values."
    )
    whole_parser.add_argument("--version", action="version", version=f"funcattn {fa.__version__}")
    commands = whole_parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module, parents, help in (
        ("generate", generating, [weights, writing], "continue a prompt, or answer it"),
        ("chat", chatting, [weights, writing], "talk; the past is kept from turn to turn"),
        ("inspect", inspecting, [weights], "show config, parameters, and the memory of a past"),
        ("eval", evaluating, [weights], "tell how well a model foretells a text"),
        ("bench", benchmarking, [weights], "time decoding on this machine, against its memory"),
        ("train", pretraining, [], "train a small model on a text, from nothing"),
        ("finetune", finetuning, [], "adapt a model to a text, by matrices of low rank"),
        ("quantize", quantizing, [weights], "write a model with weights of fewer bits"),
        ("check", checking, [], "try the laws of an attention kernel, sampler or cache"),
    ):
        command = commands.add_parser(
            name, parents=parents, help=help, description=f"{help.capitalize()}."
        )
        command.set_defaults(run=module.run, command=command)
        if module in (generating, chatting):
            templating.add_options(command)
        if module is generating:
            command.add_argument(
                "prompt",
                metavar="PROMPT",
                nargs="?",
                help="text to go on from; without one, or for -, stdin",
            )
            command.add_argument(
                "--chat", action="store_true", help="the prompt is a message to be answered"
            )
            trace = "write a trace for chrome://tracing, and tell the ten costliest operations"
            command.add_argument("--profile", metavar="FILE", type=Path, help=trace)
            several = "continuations of one past, written side by side (%(default)s)"
            command.add_argument("--num-samples", metavar="N", type=count, default=1, help=several)
            drafts = (
                "compile, and draft by the same weights in 8 or 4 bits, or by looking the text up; "
                "the text stays the same"
            )
            command.add_argument("--speculate", choices=("int8", "int4", "lookup"), help=drafts)
            ranks.add_options(command, data=False)
            command.add_argument(
                "--draft-length",
                metavar="N",
                type=count,
                default=3,
                help="tokens of a draft (%(default)s)",
            )
        elif module is not chatting:
            module.add_options(command)
    return whole_parser
