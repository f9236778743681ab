"""An operator in C++, compiled when it is first wanted, and kept for the next process.

    the key of a build     the sources, the compiler and its version, flags, torch's version and ABI, the processor
    where it is kept       $FUNCATTN_CACHE; else $XDG_CACHE_HOME/funcattn/native, or ~/.cache/funcattn/native; else, where there is
                           no home that can be written, funcattn-UID in the folder of temporary files

A library runs with all the rights of the process that loads it. So it is kept in a folder of this
user that no other may write to, made so whatever the umask; a folder of another user, or one that
others may write to, is not read from. A file is loaded if its SHA-256 is the one that its build
noted beside it: a library that was cut off (which would end the process with SIGBUS), emptied or
replaced is built again.

Each build writes to a draft of its own and moves the result to its place in one step (`atomic`): of
two processes that build at once both succeed. No lock is held that a process which is killed could
leave behind, and what it left is removed by the next build.

Where there is no compiler, or no such folder, or the build fails, or what was built cannot be
loaded, `load` says why, and products are those of torch. Code that a compiler made for another
processor cannot be told from the file: the processor is in the key.
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
from functools import wraps
from pathlib import Path
from typing import TypeVar

import torch

from ..core import atomic

SOURCES = tuple(Path(__file__).with_name(name) for name in ("products.cpp", "layers.cpp", "products.h", "floats.h", "matrices.h"))
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-w")
TIMEOUT = 300  # seconds that a compiler may take
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
R = TypeVar("R")


class Missing(Exception):
    """Why there is no operator, for people."""


def once(f: Callable[[], R]) -> Callable[[], R]:
    """f, run by the first thread that calls it; all others wait for its result."""
    lock, found = threading.RLock(), []

    @wraps(f)
    def run() -> R:
        if not found:
            with lock:
                if not found:
                    found.append(f())
        return found[0]

    return run


@once
def load() -> str:
    """Build the operator unless it is there, and tell torch of it; "" where `torch.ops.funcattn.products` runs, else why not.

    The first call of a process decides for all of them; others wait for it. FUNCATTN_NATIVE=0 in the environment is a reason.
    """
    try:
        torch.ops.load_library(built())
        return "" if torch.ops.funcattn.instructions(-1) else "the processor has no AVX2"
    except Missing as reason:
        return str(reason)
    except OSError as error:
        return f"the library cannot be loaded: {error}"
    except (RuntimeError, AttributeError) as error:  # from torch, for what is another library
        return f"the library is none of this operator: {' '.join(str(error).split())[:200]}"


def built() -> Path:
    """The library of these sources, this torch, this compiler and this processor: compiled unless it is there, as it was built.

    Raises:
        Missing: it cannot be, and why.
    """
    if os.environ.get("FUNCATTN_NATIVE") == "0":
        raise Missing("FUNCATTN_NATIVE=0 asks for none")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Missing(f"it is written for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    compiler = found_compiler()
    path = folder() / f"products-{key(compiler)}.so"
    if not is_whole(path):
        _compile(compiler, path)
    return path


def folder() -> Path:
    """Where libraries are kept: the first of the places above that this user alone may write to, made if it is not there.

    Raises:
        Missing: none is, and why.
    """
    named, home = os.environ.get("FUNCATTN_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    places = [named] if named else [f"{home}/funcattn/native"]
    with contextlib.suppress(OSError):  # no folder for temporary files can be written either
        places += [] if named else [f"{tempfile.gettempdir()}/funcattn-{os.geteuid()}"]
    reasons = []
    for place in map(os.path.expanduser, places):  # which leaves ~ as it is where there is no home
        try:
            _check_closed(Path(place))
            return Path(place)
        except OSError as error:
            reasons.append(f"{place} cannot be written ({error.strerror})")
        except Missing as reason:
            reasons.append(str(reason))
    raise Missing(f"{'; '.join(reasons)}; set FUNCATTN_CACHE")


def _check_closed(place: Path) -> None:
    """Make a folder that no other may write to, or raise Missing where one is there that another owns or may write to."""
    if not place.is_absolute():
        raise Missing(f"{place} is no absolute path")  # what is in the current folder may be anybody's
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
    """True for a file of this user, and no link, that is as its build left it."""
    try:
        for one in (path, noted(path)):
            found = one.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
                return False
        return noted(path).read_text() == _digest(path)
    except (OSError, UnicodeDecodeError):
        return False


def noted(path: Path) -> Path:
    """The file that holds the digest of a library."""
    return path.with_suffix(".sha256")


def found_compiler() -> str:
    """$CXX, else g++ or clang++, whichever is there.

    Raises:
        Missing: none is.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        if (path := shutil.which(name)) is not None:
            return path
    raise Missing(f"no C++ compiler ({' or '.join(wanted)}) is there")


def key(compiler: str) -> str:
    """What a library depends on, in 16 letters."""
    version = _run([compiler, "--version"])
    parts = [source.read_text() for source in SOURCES]
    parts += [*FLAGS, compiler, version, torch.__version__, str(torch.compiled_with_cxx11_abi()), processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def processor(file: str = "/proc/cpuinfo") -> str:
    """Make and instructions of the processor: a compiler may be set to use all that it finds, and a home be shared by machines."""
    told = []
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break  # the next core
                if line.split(":")[0].strip() in ("vendor_id", "cpu family", "model", "model name", "flags"):
                    told.append(line)
    except OSError:
        told.append(platform.processor())
    return "".join(told)


def _compile(compiler: str, path: Path) -> None:
    home = Path(torch.__file__).parent
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    sources = [str(source) for source in SOURCES if source.suffix == ".cpp"]
    try:
        _sweep(path.parent)
        for damaged in (path, noted(path)):
            damaged.unlink(missing_ok=True)  # or a link would be followed, and a mode kept
        with atomic.file(path) as draft:
            draft.touch(mode=0o700)  # for a compiler that says that it did its work, and wrote nothing
            _run([compiler, *FLAGS, f"-I{home / 'include'}", *sources, "-o", str(draft), *libraries])
            draft.chmod(0o700)
            digest = _digest(draft)
        with atomic.file(noted(path)) as draft:
            draft.write_text(digest)
            draft.chmod(0o600)
    except OSError as error:
        raise Missing(f"{path.parent} cannot be written ({error.strerror}); set FUNCATTN_CACHE") from error


def _sweep(place: Path) -> None:
    """Remove what builds that were killed left, of other keys and of versions before too."""
    atomic.sweep(place, lambda name: name.startswith("products-"))
    for left in place.glob(".products-*.so"):
        if not left.is_dir() and left.lstat().st_mtime < time.time() - 2 * TIMEOUT:
            left.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]} does not run: {error}") from error
    told, output = (text.decode(errors="replace") for text in (done.stderr, done.stdout))  # a compiler speaks as its locale has it
    if done.returncode:
        said = next((line for line in told.splitlines() if "error" in line), told.strip()[-200:])
        raise Missing(f"{command[0]} fails: {said}")
    return output
