"""The rendering process: it reads a request and writes a text or an error, with resource limits.

A request is a length of eight bytes and as many bytes of `marshal`: (template, names, given,
messages, special). The parent writes it; output of a template is never read by `marshal`. An
answer is such a length and one of

    b"=", the length of the text in eight bytes, the text in UTF-8, one byte of origin for each
    character (where asked for) b"!", what went wrong, in UTF-8

Time is bounded by system timers whose signals end the process, memory by RLIMIT_AS: both hold for
every operation. The parent reports why the process ended (`templates.render`).
"""

import functools
import gc
import marshal
import os
import select
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template

from .environment import Sandbox
from .origins import Tracking
from .texts import of_messages, origins_of

# bytes of address space above what the process has when a rendering begins
MAX_MEMORY = 224 * 2**20
# of a rendering: its processor time, its time; between two
CPU_SECONDS, TIMEOUT_SECONDS, IDLE_SECONDS = 2.0, 4.0, 120.0
LONGEST = 2**23  # characters of a text: a prompt of some two million tokens
REST = 64 * 2**20  # bytes: a process with more memory after a rendering is ended


def main() -> None:
    """Serve requests until there are none."""
    _begin()
    gc.collect()
    gc.freeze()  # later collections skip the objects of the interpreter
    _write(b"ready")
    while True:
        size = int.from_bytes(_read(8), "big") if _asked() else 0
        if not size:
            return
        _alarm("ITIMER_REAL", TIMEOUT_SECONDS)
        _alarm("ITIMER_PROF", CPU_SECONDS)
        answer = _answer(marshal.loads(_read(size)))
        gc.collect()  # within the time limit of the template
        _alarm("ITIMER_PROF", 0)
        _alarm("ITIMER_REAL", 0)
        _write(answer)
        if _pages(1) > REST:
            return


Request = tuple[str, dict[str, object], dict[str, object], list[object], tuple[str, ...] | None]


def _answer(request: Request) -> bytes:
    limited = _limit(MAX_MEMORY)
    try:
        return b"=" + _rendered(*request)
    except MemoryError:
        return b"!" + f"more than {MAX_MEMORY >> 20} MiB of memory".encode()
    except (
        BaseException
    ) as error:  # of the template's making: jinja2's, or any that its operations raise
        return b"!" + f"{type(error).__name__}: {str(error)[:300]}".encode(errors="replace")
    finally:
        limited()


def _rendered(
    template: str,
    names: dict[str, object],
    given: dict[str, object],
    messages: list[object],
    special: tuple[str, ...] | None,
) -> bytes:
    now = datetime.now()
    text = _text(_compiled(Sandbox, template, ()), {**names, **given}, messages, now)
    written = text.encode("utf-8", "surrogatepass")
    origins = b""
    if special is not None:
        marked = {name: of_messages(value, False) for name, value in given.items()}
        compiled = _compiled(Tracking, template, special)
        tracked = _text(compiled, {**names, **marked}, of_messages(messages), now)
        if tracked != text:
            raise ValueError(
                "another text at the second rendering: what special tokens are the "
                "template's cannot be told"
            )
        origins = origins_of(tracked)
    return len(written).to_bytes(8, "big") + written + origins


@functools.lru_cache(maxsize=8)
def _compiled(kind: type[Sandbox], template: str, special: tuple[str, ...]) -> Template:
    environment = kind()
    environment.special = special
    return environment.from_string(template)


def _text(compiled: Any, names: dict[str, object], messages: list[object], now: datetime) -> str:
    compiled.environment.now = now
    parts, size = [], 0
    for part in compiled.generate({**names, "messages": messages}):
        size += len(part)
        if size > LONGEST:
            raise ValueError(f"a text of more than {LONGEST} characters")
        parts.append(part)
    return compiled.environment.concat(parts)


# The system's bounds; where a system has none of a kind (Windows, partly macOS), the parent's clock
# is what is left.


def _begin() -> None:
    for name in ("SIGALRM", "SIGPROF"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {getattr(signal, name)})
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass


def _alarm(timer: str, seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(getattr(signal, timer), seconds)


def _limit(more: int) -> Callable[[], None]:
    """Limit the address space; returns a function that removes the limit."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = _pages(0)
        if not used:  # then a limit is of no known effect
            return lambda: None
        most = min(
            used + more,
            *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY),
            sys.maxsize,
        )
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    except (ImportError, OSError, ValueError):
        return lambda: None
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _pages(field: int) -> int:
    """Memory of this process in bytes, on Linux: 0 the address space, 1 resident."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# Frames on the standard streams.


def _asked() -> bool:
    """Wait for a request; False where none came in time."""
    try:
        return bool(select.select([0], [], [], IDLE_SECONDS)[0])
    except OSError:  # Windows: of sockets only
        return True


def _read(size: int) -> bytes:
    """Read that many bytes of the input; empty at its end."""
    parts = []
    while size:
        part = os.read(0, min(size, 2**20))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write(answer: bytes) -> None:
    left = memoryview(len(answer).to_bytes(8, "big") + answer)
    while left:
        left = left[os.write(1, left) :]
