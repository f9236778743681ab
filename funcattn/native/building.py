"""Building the C++ operator at its first use, and caching it on disk for later processes.

    key of a build   the sources, the compiler and its version, flags, torch's version and ABI, the
                     processor
    folder           $FUNCATTN_CACHE; else $XDG_CACHE_HOME/funcattn/native, or
                     ~/.cache/funcattn/native; else, without a writable home, funcattn-UID in the
                     folder of temporary files

A library runs with all permissions of the process that loads it. So the folder belongs to this user
and is writable by no other, whatever the umask; a folder of another user, or one that others may
write to, is not used. A file is loaded if its SHA-256 equals the one recorded beside it by its
build: a library that was truncated (which would end the process with SIGBUS), emptied or replaced
is built again.

Each build writes to a temporary file of its own and renames it (`atomic`): two processes that build
at once both succeed. There is no lock that a killed process could keep, and temporary files of
killed builds are removed by the next one.

A platform wheel brings the library (`packaged`), and no compiler is needed. It is built with
TORCH_TARGET_VERSION, so it uses only what torch 2.11 has; each function asks the processor at run
time.

Where there is no compiler or folder, or the build or loading fails, `load` returns the reason, and
products are those of torch. Code that was compiled for another processor cannot be recognized from
the file: the processor is in the key.
"""

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, update_wrapper
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..core import atomic

SOURCES = tuple(
    Path(__file__).parent / name
    for name in (
        "products.cpp",
        "layers.cpp",
        "decoder.cpp",
        "decoder.h",
        "coded.cpp",
        "dense.cpp",
        "prompts.cpp",
        "rounded.cpp",
        "dense.h",
        "many.h",
        "words.cpp",
        "cipher.h",
        "lanes.h",
        "products.h",
        "floats.h",
        "codes.h",
        "matrices.h",
        "targets.h",
        "attention/attention.cpp",
        "attention/attention.h",
        "attention/forward.h",
        "attention/packing.h",
        "attention/gemm.h",
        "attention/contract.cpp",
        "attention/contract.h",
        "attention/program.h",
        "attention/pairs.h",
        "attention/rows.h",
        "attention/work.h",
        "attention/threefry.h",
        "attention/vectors.h",
    )
)
OLDEST = "0x020b000000000000"  # torch 2.11, whose stable ABI the sources use
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-w", f"-DTORCH_TARGET_VERSION={OLDEST}")
PACKAGED = Path(__file__).with_name("operators.so")  # in a platform wheel alone
TIMEOUT = 300  # seconds for the compiler
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
R = TypeVar("R")


class Missing(Exception):
    """The reason why there is no operator, as a sentence."""


class once(Generic[R]):
    """f, run by the first thread that calls it; other threads wait for its result."""

    def __init__(self, f: Callable[[], R]) -> None:
        self.f, self.lock = f, threading.RLock()
        self.found: list[R] = []
        update_wrapper(self, f)

    def __call__(self) -> R:
        if not self.found:
            with self.lock:
                if not self.found:
                    self.found.append(self.f())
        return self.found[0]


@once
def load() -> str:
    """Build the operator unless it is cached, and register it with torch.

    Returns "" where `torch.ops.funcattn.products` runs, else the reason why not. The result of the
    first call of a process is kept; concurrent calls wait for it. FUNCATTN_NATIVE=0 disables it.
    """
    if os.environ.get("FUNCATTN_NATIVE") == "0":
        return "FUNCATTN_NATIVE=0 asks for none"
    try:
        torch.ops.load_library(packaged() or built())
        return "" if instructions() else "the processor has no AVX2"
    except Missing as reason:
        return str(reason)
    except OSError as error:
        return f"the library cannot be loaded: {error}"
    except (RuntimeError, AttributeError) as error:  # from torch, for another library
        return f"the library is none of this operator: {' '.join(str(error).split())[:200]}"


def is_loaded() -> bool:
    """True where `load` has run in this process, and the operators run: nothing is built."""
    return load.found == [""]


@cache
def instructions() -> int:
    """0, or what the processor's kernels use: 1 for AVX2, 2 for AVX-512. After `load`.

    Asked outside of torch.jit.trace, which refuses an operator that returns a number: the refusal
    would be kept for the process.
    """
    trace: Any = torch._C
    state = trace._get_tracing_state()
    trace._set_tracing_state(None)
    try:
        return torch.ops.funcattn.instructions(-1)
    finally:
        trace._set_tracing_state(state)


def packaged() -> Path | None:
    """The path of the library that a platform wheel has brought, or None."""
    return PACKAGED if PACKAGED.exists() else None


def built() -> Path:
    """The path of the library for these sources, torch, compiler and processor; built if missing.

    Raises:
        Missing: it cannot be built, with the reason.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Missing(
            f"it is written for Linux on x86-64, and this is {platform.system()} on "
            f"{platform.machine()}"
        )
    compiler = found_compiler()
    path = folder() / f"products-{key(compiler)}.so"
    if not is_whole(path):
        _compile(compiler, path)
    return path


def folder() -> Path:
    """The folder of libraries: the first of those above that only this user may write to.

    Created if missing.

    Raises:
        Missing: there is none, with the reason.
    """
    named, home = os.environ.get("FUNCATTN_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    places = [named] if named else [f"{home}/funcattn/native"]
    with contextlib.suppress(OSError):  # the folder of temporary files may not be writable either
        places += [] if named else [f"{tempfile.gettempdir()}/funcattn-{os.geteuid()}"]
    reasons = []
    for place in map(os.path.expanduser, places):  # ~ is kept where there is no home
        try:
            _check_closed(Path(place))
            return Path(place)
        except OSError as error:
            reasons.append(f"{place} cannot be written ({error.strerror})")
        except Missing as reason:
            reasons.append(str(reason))
    raise Missing(f"{'; '.join(reasons)}; set FUNCATTN_CACHE")


def _check_closed(place: Path) -> None:
    """Create a folder that no other user may write to; raise Missing where one is not such."""
    if not place.is_absolute():
        # Files in the current folder may be of any user.
        raise Missing(f"{place} is no absolute path")
    for path in reversed([place, *place.parents]):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)
    found = place.stat()
    if found.st_uid != os.geteuid():
        raise Missing(f"{place} is another user's")
    if found.st_mode & OTHERS_WRITE:
        raise Missing(f"{place} is a folder that others may write to (chmod go-w closes it)")
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def is_whole(path: Path) -> bool:
    """True for a regular file of this user whose digest is the one recorded by its build."""
    try:
        for one in (path, noted(path)):
            found = one.lstat()
            if (
                not stat.S_ISREG(found.st_mode)
                or found.st_uid != os.geteuid()
                or found.st_mode & OTHERS_WRITE
            ):
                return False
        return noted(path).read_text() == _digest(path)
    except (OSError, UnicodeDecodeError):
        return False


def noted(path: Path) -> Path:
    """The path of the file with the digest of a library."""
    return path.with_suffix(".sha256")


def found_compiler() -> str:
    """The compiler: $CXX, else g++ or clang++.

    Raises:
        Missing: there is none.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        if (path := shutil.which(name)) is not None:
            return path
    raise Missing(f"no C++ compiler ({' or '.join(wanted)}) is there")


def key(compiler: str) -> str:
    """The key of a build, 16 hexadecimal digits."""
    version = _run([compiler, "--version"])
    parts = [source.read_text() for source in SOURCES]
    parts += [
        *FLAGS,
        compiler,
        version,
        torch.__version__,
        str(torch.compiled_with_cxx11_abi()),
        processor(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def processor(file: str = "/proc/cpuinfo") -> str:
    """Model and instructions of the processor: flags may be native, a home common to machines."""
    told = []
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break  # only the first core
                if line.split(":")[0].strip() in (
                    "vendor_id",
                    "cpu family",
                    "model",
                    "model name",
                    "flags",
                ):
                    told.append(line)
    except OSError:
        told.append(platform.processor())
    return "".join(told)


def model_name() -> str:
    """The name of the processor, as the system gives it."""
    lines = [line.partition(":") for line in processor().splitlines()]
    names = [value.strip() for name, _, value in lines if name.strip() == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def _compile(compiler: str, path: Path) -> None:
    try:
        _sweep(path.parent)
        for damaged in (path, noted(path)):
            damaged.unlink(missing_ok=True)  # so that no link is followed and no mode kept
        with atomic.file(path) as draft:
            draft.touch(mode=0o700)  # for a compiler that reports success without output
            compile_to(compiler, draft)
            draft.chmod(0o700)
            digest = _digest(draft)
        with atomic.file(noted(path)) as draft:
            draft.write_text(digest)
            draft.chmod(0o600)
    except OSError as error:
        raise Missing(
            f"{path.parent} cannot be written ({error.strerror}); set FUNCATTN_CACHE"
        ) from error


def compile_to(compiler: str, path: Path, *flags: str) -> None:
    """Compile the sources, as many at once as there are processors, to a library at path.

    Raises:
        Missing: the compiler fails, with what it said.
    """
    home = Path(torch.__file__).parent
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    sources = [source for source in SOURCES if source.suffix == ".cpp"]
    objects = [str(path.with_name(f"{source.stem}.o")) for source in sources]
    command = [compiler, "-c", *FLAGS, *flags, f"-I{home / 'include'}"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source, to: _run([*command, str(source), "-o", to]), sources, objects))
    _run([compiler, *FLAGS, *flags, *objects, "-o", str(path), *libraries])
    for left in objects:
        Path(left).unlink(missing_ok=True)


def _sweep(place: Path) -> None:
    """Remove temporary files of killed builds, of any key or version."""
    atomic.sweep(place, lambda name: name.startswith("products-"))
    for left in place.glob(".products-*.so"):
        if not left.is_dir() and left.lstat().st_mtime < time.time() - 2 * TIMEOUT:
            left.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]} does not run: {error}") from error
    # The compiler's output is in the encoding of its locale.
    told, output = (text.decode(errors="replace") for text in (done.stderr, done.stdout))
    if done.returncode:
        said = next((line for line in told.splitlines() if "error" in line), told.strip()[-200:])
        raise Missing(f"{command[0]} fails: {said}")
    return output
