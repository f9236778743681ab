"""Options of conversations: a system message, tools, and variables of the chat template."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .sessions import message, utf8

LARGEST_TOOLS = 2**22  # bytes of a file of tools


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options to a command that writes answers."""
    add = command.add_argument
    add("--system", metavar="TEXT", help="a system message before the conversation")
    tools = "JSON schemas of functions that the model may call: a list, or one"
    add("--tool-file", metavar="FILE", type=Path, help=tools)
    add(
        "--template-arg",
        metavar="NAME=VALUE",
        type=_assignment,
        action="append",
        default=[],
        help="a variable of the chat template, JSON or text, as enable_thinking=false; may be "
        "given again",
    )


def begun(options: argparse.Namespace) -> tuple[dict[str, str], ...]:
    """The messages before the first: the system's, if there is one."""
    return () if options.system is None else (message("system", utf8(options.system)),)


def prompt(
    options: argparse.Namespace, tokenizer: Any, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """The ids of a conversation, with the tools and variables of the options."""
    return tokenizer.prompt(messages, tools=_tools(options.tool_file), **dict(options.template_arg))


def is_given(options: argparse.Namespace) -> bool:
    """True where an option is given that conversations alone read."""
    return bool(options.system or options.tool_file or options.template_arg)


def _tools(path: Path | None) -> list[dict[str, Any]] | None:
    """The tools of a file."""
    if path is None:
        return None
    wanted = f"the tools in {path} should be JSON, a list of objects or one"
    with path.open("rb") as file:
        text = file.read(LARGEST_TOOLS + 1)
    if len(text) > LARGEST_TOOLS:
        raise ValueError(f"{wanted}, is larger than {LARGEST_TOOLS >> 20} MiB. Give fewer.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}, is none: {error}. Correct it.") from error
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise ValueError(f"{wanted}, is another value. Write [{{...}}].")
    return found


RESERVED = ("messages", "tools", "template", "add_generation_prompt")
RESERVED += ("continue_final", "continue_final_message")


def _assignment(text: str) -> tuple[str, Any]:
    """An option type: a name and its value, which is JSON or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in RESERVED:
        raise argparse.ArgumentTypeError(
            f"{text!r} should be NAME=VALUE, with a name other than {', '.join(RESERVED)}"
        )
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
