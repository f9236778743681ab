"""The command line: `funcattn generate`, `funcattn chat` and `funcattn inspect`.

Text of the model goes to stdout and nothing else does, so that it can be piped; what is said about it goes to stderr. A mistake is
one line and exit code 2. Several samples of one prompt fork one past, and a chat keeps its past from turn to turn: it reads only
what the past does not hold, and taking a turn back is keeping less of it.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor
from torch.func import vmap

import funcattn as fa

from . import caches, sampling, tree

MISTAKE, INTERRUPTED, CUT_OFF = 2, 128 + 2, 128 + 13  # exit codes; the last two are a shell's for SIGINT and SIGPIPE
TINY = 1e-6  # logits divided by less overflow float32
INVISIBLE = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\t"), ord("\n")})  # what could steer a terminal
HELP = "/undo takes the last turn back, /new begins again; Ctrl-C stops an answer, Ctrl-D leaves."


@dataclasses.dataclass(frozen=True)
class _Session:
    config: fa.Config
    params: fa.Params
    tokenizer: Any
    model: fa.Model

    @property
    def dtype(self) -> torch.dtype:
        return self.params.norm.dtype


@dataclasses.dataclass(frozen=True)
class _Talk:
    """What was said, and a past that holds the tokens `ids`. They may part: the past is cut back where they do."""

    past: Any
    ids: tuple[int, ...] = ()
    messages: tuple[dict[str, str], ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those of the process by default.

    Returns:
        The exit code: 0, 2 for a mistake, 130 after Ctrl-C, 141 where the reader of the text went away.

    Raises:
        SystemExit: as argparse does, for --help and for options that cannot be read.
    """
    options = _parser().parse_args(arguments)
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")  # a terminal that cannot show a letter shows that there is one
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        return CUT_OFF
    except KeyboardInterrupt:
        return INTERRUPTED
    except UnicodeError:
        return _complain("the text should be UTF-8, is not. Convert it first, as with iconv.")
    except (ValueError, OSError, RuntimeError) as error:  # ours, the system's, and torch's for a device or its memory
        return _complain(error)


# The three commands.


def _generate(options: argparse.Namespace) -> None:
    text, sampler = _prompt(options), _sampler(options)
    session = _load(options)
    ids = session.tokenizer.prompt([_message("user", text)]) if options.chat else session.tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty. Give some text, as an argument or on stdin.")
    steps = _room(session, len(ids), options.steps)
    prompt = torch.tensor(ids, device=options.device)
    keys = fa.split(_key(options), options.num_samples)
    if options.num_samples > 1:
        return _write_samples(session, prompt, keys, sampler, steps, options)
    pieces = fa.stream(
        *(keys[0], session.model, session.params, prompt),
        steps=steps,
        tokenizer=session.tokenizer,
        sampler=sampler,
        stop_strings=options.stop,
    )
    for _ in _write(pieces, f"{len(ids)} tokens"):
        pass


def _chat(options: argparse.Namespace) -> None:
    sampler = _sampler(options)
    session = _load(options)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits and remembers lines once it is there)
        _say(f"{options.model}. {HELP}")
    talk = begun = _Talk(past=tree.to(options.device)(session.model.cache(0, dtype=session.dtype)))
    while True:
        try:
            text = _utf8(input("> " if interactive else "").strip())
        except EOFError:
            return print() if interactive else None
        except KeyboardInterrupt:
            _say("\nCtrl-D leaves.")
            continue
        if text in ("/new", "/undo"):
            talk = begun if text == "/new" else dataclasses.replace(talk, messages=talk.messages[:-2])
            _say(f"turns left: {len(talk.messages) // 2}")
        elif text.startswith("/") and interactive:
            _say(HELP)
        elif text:
            try:
                talk = _answer(session, talk, text, sampler, options)
            except ValueError as error:
                if not interactive:
                    raise
                _complain(error)


def _inspect(options: argparse.Namespace) -> None:
    session = _load(options)
    config, tokenizer, dtype = session.config, session.tokenizer, session.dtype
    print(f"{options.model}\n\nconfig")
    for field in dataclasses.fields(config):
        print(f"  {field.name:<14} {getattr(config, field.name)}")
    print("\nparams")
    for line in str(tree.summary(session.params)).splitlines():
        print(f"  {line}")
    with torch.device("meta"):  # sizes without memory
        per_token = tree.nbytes(session.model.cache(1, dtype=dtype)) - tree.nbytes(session.model.cache(0, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    print(f"\ncache, {name} keys and values of {config.layers} layers x {config.kv_heads} heads x {config.head_size}")
    for tokens in (1000, config.context):
        print(f"  {f'{tokens} tokens':<14} {tokens * per_token / 2**20:.1f} MiB")
    stops = " ".join(tokenizer.decode([stop], skip_special=False) for stop in tokenizer.stop)
    print(f"\ntokenizer\n  {'ids':<14} {tokenizer.vocabulary}\n  {'stops at':<14} {stops or 'nothing'}")
    print(f"  {'chat template':<14} {'no' if tokenizer.template is None else 'yes'}")


# One prompt, several futures.


def _write_samples(
    session: _Session, prompt: Tensor, keys: Tensor, sampler: sampling.Sampler, steps: int, options: argparse.Namespace
) -> None:
    """Read the prompt once, write all samples side by side behind it, and print them with an empty line between."""
    model, params, tokenizer = session.model, session.params, session.tokenizer
    started = time.perf_counter()
    with _working("Reading the prompt"):
        past = fa.generate(keys[0], model, params, prompt[:-1], steps=0)[1] if len(prompt) > 1 else ()
    read = time.perf_counter()
    with _working(f"Writing {len(keys)} samples"):
        go_on = lambda key: fa.generate(key, model, params, prompt[-1:], past, steps=steps, sampler=sampler, stop=tokenizer.stop)[0]
        rows = vmap(go_on)(keys).tolist()
    wrote = time.perf_counter()
    written = 0
    for number, row in enumerate(rows):
        ends = [place for place, token in enumerate(row) if token in tokenizer.stop]
        written += min(ends, default=steps - 1) + 1 if row else 0
        text = tokenizer.decode(row[: min(ends, default=steps)])
        text = text[: min((text.find(stop) for stop in options.stop if stop in text), default=len(text))]
        print(_shown(text), end="\n\n" if number < len(rows) - 1 else "\n")
    _report(f"{len(prompt)} tokens", read - started, written, wrote - read)


# A conversation.


def _answer(session: _Session, talk: _Talk, text: str, sampler: sampling.Sampler, options: argparse.Namespace) -> _Talk:
    """Write the answer to a text; Ctrl-C keeps what was written so far."""
    messages = (*talk.messages, _message("user", text))
    wanted = session.tokenizer.prompt(messages)
    steps = _room(session, len(wanted), options.steps)
    alike = (a == b for a, b in zip(talk.ids, wanted[:-1], strict=False))
    known = next((place for place, same in enumerate(alike) if not same), min(len(talk.ids), len(wanted) - 1))
    past = caches.with_length(talk.past, torch.full_like(talk.past.length, known))
    past = caches.grow(past, max(0, len(wanted) + steps - caches.capacity(past)))
    pieces = fa.stream(
        *(fa.fold_in(_key(options), len(messages)), session.model, session.params),
        *(torch.tensor(wanted[known:], device=options.device), past),
        steps=steps,
        tokenizer=session.tokenizer,
        sampler=sampler,
        stop_strings=options.stop,
    )
    said, last = "", None
    with contextlib.suppress(KeyboardInterrupt):
        for last in _write(pieces, f"{len(wanted) - known} tokens behind a past of {known}"):
            said += last.text
    if last is None:
        return talk  # nothing was said yet: as if it had not been asked
    past = caches.join(last.cache)
    return _Talk(past, (*wanted, *last.tokens)[: int(past.length)], (*messages, _message("assistant", said)))


def _write(pieces: Iterator[fa.Streamed], prompt: str) -> Iterator[fa.Streamed]:
    """Print each piece as it comes and pass it on; then, also after Ctrl-C, end the line and report the speed."""
    started = time.perf_counter()
    with _working("Reading the prompt"):
        piece = next(pieces)
    read = time.perf_counter()
    try:
        while True:
            print(_shown(piece.text), end="", flush=True)
            yield piece
            if piece.ended:
                break
            piece = next(pieces)
    finally:
        if not isinstance(sys.exception(), BrokenPipeError):
            print(flush=True)
            # the first token came with the prompt
            _report(prompt, read - started, max(len(piece.tokens) - 1, 0), time.perf_counter() - read)


# What they need.


def _load(options: argparse.Namespace) -> _Session:
    with _working(f"Loading {options.model}"):
        config, params, tokenizer = fa.load(options.model, dtype=options.dtype)
        params = tree.to(options.device)(params)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.json. Put the one of this model beside its weights.")
    return _Session(config, params, tokenizer, fa.decoder(config))


def _key(options: argparse.Namespace) -> Tensor:
    return tree.to(options.device)(fa.key(options.seed))


def _room(session: _Session, read: int, steps: int) -> int:
    """How many tokens can be written behind `read`, at most `steps`."""
    context = session.config.context
    if read > context:
        raise ValueError(f"the text has {read} tokens, and the model was trained on {context}. Give it a shorter one.")
    return min(steps, context - read + 1)  # the last is written and never read


def _prompt(options: argparse.Namespace) -> str:
    text = options.prompt
    if text in (None, "-"):
        if sys.stdin.isatty():
            _say("Type the prompt; Ctrl-D on a line of its own ends it.")
        text = sys.stdin.read().removesuffix("\n")  # as the shell does in $(...)
    return _utf8(text)


def _utf8(text: str) -> str:
    """The text, unless bytes stand in it that are no text: Python then holds lone surrogates, which no tokenizer reads."""
    text.encode()
    return text


def _sampler(options: argparse.Namespace) -> sampling.Sampler:
    if options.greedy:
        return sampling.greedy
    filters = {sampling.top_k: options.top_k, sampling.top_p: options.top_p, sampling.min_p: options.min_p}
    return sampling.chain(sampling.temperature(options.temperature), *(f(x) for f, x in filters.items() if x is not None))


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _shown(text: str) -> str:
    """The text, on a terminal without what could steer it: a model is no more to be trusted than a file."""
    return text.translate(INVISIBLE) if sys.stdout.isatty() else text


def _report(prompt: str, reading: float, tokens: int, writing: float) -> None:
    speed = f", {tokens / writing:.1f} tokens/s" if tokens else ""
    _say(f"prefill: {prompt}, {reading:.2f} s; decode: {tokens} tokens, {writing:.2f} s{speed}")


def _complain(about: object) -> int:
    print(f"funcattn: {' '.join(str(about).split())}", file=sys.stderr)
    return MISTAKE


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True).print(text, style="dim")


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner on stderr, where somebody looks at it."""
    console = Console(stderr=True)
    with console.status(f"[dim]{what.replace('[', chr(92) + '[')}") if console.is_terminal else contextlib.nullcontext():
        yield


# Reading the arguments.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: {message}. See {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    positive, share = _number(float, TINY, 1 / TINY, "above 0"), _number(float, TINY, 1, "above 0, at most 1")
    whole, count = _number(int, 0, 2**63 - 1, "0 or more"), _number(int, 1, 2**63 - 1, "1 or more")
    weights = _Parser(add_help=False)
    add = weights.add_argument
    add("--model", default="smollm2-135m", help="a .gguf file, a folder, a name, or org/name of the hub (%(default)s)")
    add("--dtype", metavar="D", type=_dtype, help="of the weights, float32 or bfloat16 (as a folder has them; float32 from .gguf)")
    add("--device", type=_device, default="cpu", help="such as cpu or cuda (%(default)s)")

    writing = _Parser(add_help=False)
    add, either = writing.add_argument, writing.add_mutually_exclusive_group().add_argument
    either("--greedy", action="store_true", help="the most likely token each time; nothing is drawn")
    either("--temperature", metavar="T", type=positive, default=0.7, help="below 1 sharper, above 1 flatter (%(default)s)")
    add("--top-k", metavar="K", type=count, help="draw from the K most likely tokens")
    add("--top-p", metavar="P", type=share, default=0.95, help="from the most likely ones that reach P together (%(default)s)")
    add("--min-p", metavar="P", type=share, help="from those at least P times as likely as the likeliest")
    add("--steps", metavar="N", type=whole, default=256, help="tokens to write at most (%(default)s)")
    add("--seed", metavar="N", type=whole, default=0, help="the same seed gives the same text (%(default)s)")
    add("--stop", metavar="STRING", type=_stop, action="append", default=[], help="end before this text; may be given again")

    parser = _Parser("funcattn", description="Text from a language model, in pure functions of values.")
    parser.add_argument("--version", action="version", version=f"funcattn {fa.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for run, parents, help in (
        (_generate, [weights, writing], "continue a prompt, or answer it"),
        (_chat, [weights, writing], "talk; the past is kept from turn to turn"),
        (_inspect, [weights], "show config, parameters, and the memory of a past"),
    ):
        command = commands.add_parser(run.__name__.strip("_"), parents=parents, help=help, description=f"{help.capitalize()}.")
        command.set_defaults(run=run)
        if run is _generate:
            command.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to go on from; without one, or for -, stdin")
            command.add_argument("--chat", action="store_true", help="the prompt is a message to be answered")
            several = "continuations of one past, written side by side (%(default)s)"
            command.add_argument("--num-samples", metavar="N", type=count, default=1, help=several)
    return parser


def _number(kind: type[int] | type[float], low: float, high: float, wanted: str) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"should be {wanted}, got {text}")

    return parse


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("should be a text, got an empty one")
    return text


def _dtype(text: str) -> torch.dtype:
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"should be float32 or bfloat16, got {text}")
    return getattr(torch, text)


def _device(text: str) -> torch.device:
    try:
        torch.zeros(1, device=text).item()  # one that is here, and holds numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise argparse.ArgumentTypeError(f"should be a device of this machine, got {text}: {reason}") from None
    return torch.device(text)
