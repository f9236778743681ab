"""What the system says of a place that cannot be written, as a CheckpointError in one sentence."""

import contextlib
import os
from collections.abc import Iterator

from safetensors import SafetensorError

from .._checks import fail
from .families import CheckpointError

UNCHANGED = "Nothing was changed; choose a place that can be written, with room for it."


@contextlib.contextmanager
def written(function: str, place: str | os.PathLike[str], remedy: str = UNCHANGED) -> Iterator[None]:
    """Errors of the system and of safetensors inside, as that of a function which writes to a place.

    Raises:
        CheckpointError: a full disk, a quota, a folder that cannot be written, a name that is too long.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        fail(function, os.fspath(place), "a place that can be written", reason_of(error), remedy, CheckpointError)


def reason_of(error: BaseException) -> str:
    """What the system says of an error, in one line: without the name of the draft that it met it in."""
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()[:60])
