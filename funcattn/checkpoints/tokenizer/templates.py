"""Chat templates: untrusted jinja2 programs, rendered in a sandboxed process with resource limits.

They render as in transformers, in jinja2's ImmutableSandboxedEnvironment, so that no template can
access Python's internals (the hole of CVE-2024-34359), files or the network. That sandbox does not
limit time, the size of values or the depth of nesting. So rendering runs in a separate process
(`sandbox.worker`), which the operating system limits: two seconds of CPU time, four of wall time,
and on Linux 224 MiB above the memory of the process. Whatever a template does to that process is a
CheckpointError here.

The process is started by the first rendering (0.1 to 0.3 s), takes 20 MB, serves this process only,
and ends with it or after two minutes without a request.

Limits: without RLIMIT_AS (Windows, macOS) memory is bounded only by what can be allocated in two
seconds of CPU time, or four of wall time without timers (Windows). Where no process can be started
chat templates are unavailable.
"""

import atexit
import importlib.util
import marshal
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple, NoReturn

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json

TIMEOUT_SECONDS, START_SECONDS = 4.0, 60.0  # of a rendering; of starting the interpreter
LARGEST = 2**26  # bytes of an answer
ALARM, PROFILE, KILL = (int(getattr(signal, name, 0)) for name in ("SIGALRM", "SIGPROF", "SIGKILL"))
PROGRAM = "import sys; sys.path += sys.argv[1:]; from sandbox.worker import main; main()"
# of the environment
PASSED = (
    "PATH",
    "SYSTEMROOT",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "TZ",
    "LANG",
    "LC_ALL",
    "LC_TIME",
)


NOTHING: Mapping[str, Json] = MappingProxyType({})


class Rendered(NamedTuple):
    """A text and the origin of each character.

    t the template, r the role of a message, d other data of a message, ? unknown.
    """

    text: str
    origins: bytes


def render(
    template: str,
    messages: Sequence[Mapping[str, Json]],
    names: Mapping[str, Json],
    given: Mapping[str, Json] = NOTHING,
) -> str:
    """The text of a conversation.

    Args:
        template: jinja2.
        messages: the template's variable `messages`.
        names: further variables, such as eos_token and add_generation_prompt.
        given: further variables that are data as messages are: tools, documents, keywords.

    Raises:
        CheckpointError: the template fails for these messages, or exceeds a limit.
        TypeError: the messages have a value that is no text, number, None, list or mapping.
    """
    return _ask(template, messages, names, given, None).text


def render_with_origins(
    template: str,
    messages: Sequence[Mapping[str, Json]],
    names: Mapping[str, Json],
    special: Sequence[str],
    given: Mapping[str, Json] = NOTHING,
) -> Rendered:
    """`render`, and the origin of each character.

    Args:
        special: the texts whose characters matter; "d" may stand for "t" at characters that occur
            in none of them.
    """
    return _ask(template, messages, names, given, tuple(special))


def _ask(
    template: str,
    messages: Json,
    names: Mapping[str, Json],
    given: Mapping[str, Json],
    special: tuple[str, ...] | None,
) -> Rendered:
    known = {"tools": None, "documents": None, **names}
    variables = {name: plain(value, name) for name, value in given.items()}
    try:
        request = marshal.dumps(
            (template, plain(known, "names"), variables, plain(messages, "messages"), special)
        )
    except (ValueError, RecursionError):
        fail(
            "chat",
            "messages",
            "nested less than some hundred times",
            "deeper ones",
            "Are they part of themselves?",
        )
    answer = _Worker.ask(request)
    if answer[:1] != b"=":
        _refuse(answer[1:].decode(errors="replace"))
    size = int.from_bytes(answer[1:9], "big")
    text = answer[9 : 9 + size].decode("utf-8", "surrogatepass")
    return Rendered(text, answer[9 + size :])


def plain(value: object, where: str) -> Json:
    """The same value in Python's builtin types, with lists for tuples; raises for other types."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass: the text alone
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {
            _name(name, where): plain(item, f"{where}[{name!r}]") for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
    remedy = "A template reads text: write the value as one, or leave it out."
    fail(
        "chat",
        where,
        "text, a number, None, a list or a mapping",
        f"a {type(value).__name__}",
        remedy,
        TypeError,
    )


def _name(name: Json, where: str) -> Json:
    if not (name is None or isinstance(name, str | int | float)):
        fail(
            "chat",
            f"a name in {where}",
            "text",
            f"a {type(name).__name__}",
            "Write it as text.",
            TypeError,
        )
    return plain(name, where)


def _refuse(got: str) -> NoReturn:
    remedy = "Set another: dataclasses.replace(tokenizer, template=...)."
    fail(
        "chat", "the chat template", "one that renders these messages", got, remedy, CheckpointError
    )


class _Worker:
    """The rendering process and its pipes: at most one per process, one request at a time."""

    lock = threading.Lock()
    process: "subprocess.Popen[bytes] | None" = None

    @classmethod
    def ask(cls, request: bytes) -> bytes:
        with cls.lock:
            for _ in range(2):
                process = cls.process
                if process is None or process.poll() is not None:
                    cls.stop()
                    process = cls.process = _started()
                try:
                    answer, late = _exchange(process, request, TIMEOUT_SECONDS)
                except BaseException:  # an interrupt between question and answer
                    process.kill()
                    cls.stop()
                    raise
                if answer is not None:
                    return answer
                code = cls.stop()
                # it left, or was killed by another: no template can do either
                if not late and code in (0, -KILL):
                    continue
                _refuse(_end(code, late))
            _refuse("a process that renders and ends before it is asked")

    @classmethod
    def stop(cls) -> int:
        """End the process, if there is one; return its exit code."""
        process, cls.process = cls.process, None
        if process is None:
            return 0
        if process.poll() is None and not _left(process):
            process.kill()
        code = process.wait()
        _close(process)
        return code

    @classmethod
    def forget(cls) -> None:
        """In a fork: drop the process, which is the parent's."""
        process, cls.process, cls.lock = cls.process, None, threading.Lock()
        if process is not None:
            process.returncode = 0  # Popen's: not ours to wait for
            _close(process)


def _left(process: "subprocess.Popen[bytes]") -> bool:
    """True where a process whose pipe is closed exits by itself."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        return False
    return True


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _started() -> "subprocess.Popen[bytes]":
    """Start a process, and wait until it is ready."""
    executable = multiprocessing.spawn.get_executable()
    packages = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = [
        str(Path(spec.origin).parent.parent)
        for spec in packages
        if spec is not None and spec.origin
    ]
    remedy = (
        "Render the template elsewhere, and give its text to tokenizer.encode(text, special=True)."
    )
    if not executable or getattr(sys, "frozen", False):
        fail("chat", "sys.executable", "Python's", executable, remedy, CheckpointError)
    command = [
        os.fspath(executable),
        "-I",
        "-S",
        "-c",
        PROGRAM,
        str(Path(__file__).parent),
        *dict.fromkeys(folders),
    ]
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    # no window, and a group of its own; elsewhere a session: no Ctrl-C
    windows = 0x08000200 if sys.platform == "win32" else 0
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command,
            *(0, None, pipe, pipe, null),  # bufsize, executable, stdin, stdout, stderr
            env=environment,
            start_new_session=not windows,
            creationflags=windows,
        )
    except OSError as error:
        fail(
            "chat",
            "the process that renders",
            "one that can be started",
            str(error),
            remedy,
            CheckpointError,
        )
    try:
        ready, _ = _exchange(process, b"", START_SECONDS)
    except BaseException:
        process.kill()
        raise
    finally:
        if process.poll() is not None:
            _close(process)
    if ready is None:
        process.kill()
        code = process.wait()
        _close(process)
        fail(
            "chat",
            "the process that renders",
            "one that can be started",
            f"exit code {code}",
            remedy,
            CheckpointError,
        )
    return process


def _exchange(
    process: "subprocess.Popen[bytes]", request: bytes, patience: float
) -> tuple[bytes | None, bool]:
    """Send a request, unless it is empty, and read the answer.

    Returns None for the answer where the process ended, and whether it was out of time.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    clock = threading.Timer(patience, end)
    clock.daemon = True
    clock.start()
    try:
        left = memoryview(len(request).to_bytes(8, "big") + request if request else b"")
        while left:
            left = left[process.stdin.write(left) :]
        size = int.from_bytes(_read(process.stdout, 8), "big")
        if size > LARGEST:
            raise EOFError
        return _read(process.stdout, size), False
    except (OSError, EOFError):
        return None, late.is_set()
    finally:
        clock.cancel()


def _read(pipe: IO[bytes], size: int) -> bytes:
    parts = []
    while size:
        part = pipe.read(min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _end(code: int, late: bool) -> str:
    """Why the process ended during a request."""
    if late or code == -ALARM:
        return f"none after {TIMEOUT_SECONDS:g} seconds"
    if code == -PROFILE:
        return "more than two seconds of computing"
    return f"the end of the process that renders (exit code {code})"


atexit.register(_Worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Worker.forget)
