"""Reading the arguments: what each kind of option accepts, and the options that commands share."""

import argparse
import contextlib
from collections.abc import Callable
from typing import NoReturn

import torch

from .terminal import MISTAKE

TINY = 1e-6  # logits divided by less overflow float32


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        """End with the line and the exit code of a mistake."""
        self.exit(MISTAKE, f"{self.prog}: {message}. See {self.prog} --help.\n")


def number(kind: type[int] | type[float], low: float, high: float, wanted: str) -> Callable[[str], int | float]:
    """A kind of option: a number within bounds."""

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"should be {wanted}, got {text}")

    return parse


def stop(text: str) -> str:
    """A text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("should be a text, got an empty one")
    return text


def dtype(text: str) -> torch.dtype:
    """A dtype of weights."""
    if text not in ("float32", "bfloat16"):
        raise argparse.ArgumentTypeError(f"should be float32 or bfloat16, got {text}")
    return getattr(torch, text)


def device(text: str) -> torch.device:
    """A device that is here."""
    try:
        torch.zeros(1, device=text).item()  # one that is here, and holds numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise argparse.ArgumentTypeError(f"should be a device of this machine, got {text}: {reason}") from None
    return torch.device(text)
