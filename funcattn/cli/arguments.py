"""Argument parsing: types of options, and options common to several commands."""

import argparse
import contextlib
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from ..core.errors import printable
from .terminal import MISTAKE

TINY = 1e-6  # logits divided by less overflow float32


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with a suggestion."""

    given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; keeps the arguments for suggestions."""
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with an error message of one line and the exit code of a mistake."""
        told = f"{self.prog}: {' '.join(message.split())}.{self._hint()} See {self.prog} --help."
        self.exit(MISTAKE, printable(told) + "\n")

    def refuse(self, left: Sequence[str]) -> NoReturn:
        """Exit because of unknown arguments."""
        quotes = (
            ""
            if any(word.startswith("-") for word in left)
            else ". A text of several words should be in quotes"
        )
        self.error(f"unrecognized arguments: {' '.join(left)}{quotes}")

    def _hint(self) -> str:
        known = self._option_string_actions
        for word in self.given:
            name = word.partition("=")[0]
            if (
                len(name) > 3
                and name.startswith("-")
                and not any(option.startswith(name) for option in known)
            ):
                near = difflib.get_close_matches(name, known, 1)
                return f" Did you mean {near[0]}?" if near else ""
        return ""


def number(
    kind: type[int] | type[float], low: float, high: float, wanted: str
) -> Callable[[str], int | float]:
    """An option type: a number within bounds."""

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"should be {wanted}, got {text}")

    return parse


def stop(text: str) -> str:
    """An option type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("should be a text, got an empty one")
    return text


def dtype(text: str) -> torch.dtype:
    """An option type: a dtype of weights."""
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"should be float32 or bfloat16, got {text}")
    return getattr(torch, text)


def device(text: str) -> torch.device:
    """An option type: an available device."""
    try:
        torch.zeros(1, device=text).item()  # fails where it is unavailable or has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise argparse.ArgumentTypeError(
            f"should be a device of this machine, got {text}: {reason}"
        ) from None
    return torch.device(text)
