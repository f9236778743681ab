"""The `tokenizers` library: its errors as those of checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...core.errors import form
from ..families import CheckpointError


@contextmanager
def rust_errors(where: str) -> Iterator[None]:
    """Raise errors of the `tokenizers` library as CheckpointError."""
    try:
        yield
    except (ValueError, TypeError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        wanted = "what the tokenizers library reads"
        remedy = "Fetch the file again, or update the library: pip install --upgrade tokenizers."
        got = str(error)[:300]
        raise CheckpointError(form("load", where, wanted, f"an error: {got}", remedy)) from error
