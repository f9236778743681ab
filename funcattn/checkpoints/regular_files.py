"""Opening and reading untrusted files: regular ones only, and each up to a limit of bytes.

A path may name a pipe, a device or a socket, which block or never end; a size may be wrong, as that
of a file that still grows. So the type of a file is checked before it is opened and again
afterwards, and it is read up to its limit.
"""

import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

from ..core.errors import fail, printable
from .families import CheckpointError
from .families.tables import Json

T = TypeVar("T")
MAX_SAVES = 100  # of one folder while it is read
SMALL = 2**22  # bytes of a configuration file
LARGE = 2**26  # bytes of tokenizer.json or an index; Gemma's, the largest seen, has 2**25
REMEDY = "The file is damaged, cut off, or not what its name says: fetch it again."
NO_BLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS: dict[str, Callable[[int], bool]] = {
    "folder": stat.S_ISDIR,
    "pipe": stat.S_ISFIFO,
    "socket": stat.S_ISSOCK,
    "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def open_regular(path: Path, function: str = "load") -> BinaryIO:
    """The file at a path, opened for reading bytes.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is not a regular file, or cannot be opened.
    """
    try:
        # Before it is opened: opening alone has effects on some devices.
        _check_kind(os.stat(path).st_mode, path, function)
        file = os.fdopen(os.open(path, os.O_RDONLY | NO_BLOCK), "rb")
    except (FileNotFoundError, NotADirectoryError):
        wanted = (
            "be there, and is not. Give a folder in the Hugging Face layout, or fetch it again."
        )
        raise FileNotFoundError(printable(f"{function}: {path} should {wanted}")) from None
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        fail(
            function,
            f"{path}",
            "a file that can be read",
            f"an error: {error}",
            "Change its permissions.",
            CheckpointError,
        )
    try:
        _check_kind(os.fstat(file.fileno()).st_mode, path, function)
    except BaseException:
        file.close()
        raise
    return file


def check_regular(path: Path, function: str = "load") -> None:
    """Raise unless a path is a regular file that can be opened, for files that a library opens."""
    open_regular(path, function).close()


def of_one_save(folder: Path, last: Sequence[str], read: Callable[[], T]) -> T:
    """read(), repeated if the folder was saved meanwhile, so that all files are of one save.

    Args:
        last: the files that a save renames last (`atomic.files`).
    """
    for _ in range(MAX_SAVES):
        before = _marks(folder, last)
        try:
            found = read()
        except (CheckpointError, FileNotFoundError):
            if _marks(folder, last) == before:
                raise
            continue
        if _marks(folder, last) == before:
            return found
    fail(
        "load",
        f"{folder}",
        "as it is for a moment",
        f"{MAX_SAVES} saves meanwhile",
        "Load it later.",
        CheckpointError,
    )


def _marks(folder: Path, last: Sequence[str]) -> list[tuple[int, ...] | None]:
    """Device, inode and time of a folder and of files in it; None for what is absent."""
    marks: list[tuple[int, ...] | None] = []
    for path in (folder, *(folder / name for name in last)):
        try:
            found = os.stat(path)
            marks.append(
                (found.st_dev, found.st_ino, *([] if path == folder else [found.st_mtime_ns]))
            )
        except (OSError, ValueError):
            marks.append(None)
    return marks


def read_bytes(path: Path, largest: int, function: str = "load") -> bytes:
    """The bytes of a file of at most `largest`."""
    with open_regular(path, function) as file:
        if (size := os.fstat(file.fileno()).st_size) > largest:
            fail(function, path.name, f"at most {largest} bytes", size, REMEDY, CheckpointError)
        try:
            found = file.read(largest + 1)
        except OSError as error:
            fail(
                function,
                path.name,
                "a file that can be read",
                f"an error: {error}",
                REMEDY,
                CheckpointError,
            )
    if len(found) > largest:
        fail(function, path.name, f"at most {largest} bytes", "more", REMEDY, CheckpointError)
    return found


def read_text(path: Path, largest: int = SMALL, function: str = "load") -> str:
    """The text of a file of at most `largest` bytes."""
    try:
        return read_bytes(path, largest, function).decode()
    except UnicodeDecodeError:
        fail(function, path.name, "UTF-8", "other bytes", REMEDY, CheckpointError)


def read_json(path: Path, largest: int = SMALL, function: str = "load") -> dict[str, Json]:
    """The object in a JSON file of at most `largest` bytes."""
    return parse_object(read_text(path, largest, function), path.name, function)


def parse_object(
    text: str,
    name: str,
    function: str = "load",
    pairs: Callable[[list[tuple[str, Json]]], dict[str, Json]] | None = None,
) -> dict[str, Json]:
    """The object in a JSON text; `pairs` is object_pairs_hook of json.loads."""

    def refuse(wanted: str, got: str) -> NoReturn:
        fail(function, name, wanted, got, REMEDY, CheckpointError)

    try:
        found = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        refuse("JSON", f"an error: {str(error)[:200]}")
    if not isinstance(found, dict):
        refuse("an object", f"a {type(found).__name__}")
    return found


def _check_kind(mode: int, path: Path, function: str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for name, holds in KINDS.items() if holds(mode)), "file of another kind")
        fail(
            function,
            f"{path}",
            "a regular file",
            f"a {kind}",
            "Give the file itself.",
            CheckpointError,
        )
