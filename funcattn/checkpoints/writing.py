"""Errors of writing files, as a CheckpointError of one sentence."""

import contextlib
import os
from collections.abc import Iterator

from safetensors import SafetensorError

from ..core.errors import fail
from .families import CheckpointError

UNCHANGED = "Nothing was changed; choose a place that can be written, with room for it."


@contextlib.contextmanager
def written(
    function: str, place: str | os.PathLike[str], remedy: str = UNCHANGED
) -> Iterator[None]:
    """Raise OSError and SafetensorError of the block as CheckpointError of the function that writes
    to `place`.

    Raises:
        CheckpointError: a full disk, a quota, a folder that cannot be written, a name that is too
            long.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        fail(
            function,
            os.fspath(place),
            "a place that can be written",
            reason_of(error),
            remedy,
            CheckpointError,
        )


def reason_of(error: BaseException) -> str:
    """The system's text of an error in one line, without the name of the temporary file."""
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()[:60])
