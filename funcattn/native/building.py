"""An operator in C++, compiled when it is first wanted, and kept for the next process.

    the key of a build     the sources, the compiler and its version, torch's version, the processor's kind
    where it is kept       $FUNCATTN_CACHE, else $XDG_CACHE_HOME/funcattn, else ~/.cache/funcattn

Whoever builds writes to a file of his own and renames it, which is one step for everybody else: of two processes that build at once
both succeed, and one leaves a file of the same bytes. No lock is held that a process which is killed could leave behind.

Where there is no compiler, or the folder cannot be written, or the build fails, `load` says why and nothing else happens.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

SOURCES = tuple(Path(__file__).with_name(name) for name in ("products.cpp", "layers.cpp", "products.h", "floats.h", "matrices.h"))
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-w")
PATIENCE = 300  # seconds that a compiler may take


class Missing(Exception):
    """Why there is no operator, for people."""


_lock = threading.Lock()


def load() -> str:
    """Build the operator unless it is there, and tell torch of it; "" where `torch.ops.funcattn.products` runs, else why not.

    The first call of a process decides for all of them; others wait for it. FUNCATTN_NATIVE=0 in the environment is a reason.
    """
    with _lock:
        return _loaded()


@functools.cache
def _loaded() -> str:
    try:
        path = built()
        torch.ops.load_library(path)
        if torch.ops.funcattn.instructions(-1) == 0:
            raise Missing("the processor has no AVX2")
    except Missing as reason:
        return str(reason)
    except OSError as error:
        return f"the library cannot be loaded: {error}"
    return ""


def built() -> Path:
    """The library of these sources, this torch and this compiler: compiled unless it is there.

    Raises:
        Missing: it cannot be, and why.
    """
    if os.environ.get("FUNCATTN_NATIVE") == "0":
        raise Missing("FUNCATTN_NATIVE=0 asks for none")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Missing(f"it is written for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    compiler = found_compiler()
    path = folder() / f"products-{key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    return path


def folder() -> Path:
    """Where libraries are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FUNCATTN_CACHE") or f"{home}/funcattn").expanduser()


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
    parts += [*FLAGS, compiler, version, torch.__version__, str(torch.compiled_with_cxx11_abi())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    home = Path(torch.__file__).parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, own = tempfile.mkstemp(suffix=".so", prefix=f".{path.stem}-", dir=path.parent)
        os.close(number)
    except OSError as error:
        raise Missing(f"{path.parent} cannot be written ({error.strerror}); set FUNCATTN_CACHE") from error
    try:
        libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run(
            [
                compiler,
                *FLAGS,
                f"-I{home / 'include'}",
                *(str(path) for path in SOURCES if path.suffix == ".cpp"),
                "-o",
                own,
                *libraries,
            ]
        )
        os.chmod(own, 0o755)
        os.replace(own, path)
    finally:
        Path(own).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise Missing(f"{command[0]} fails: {said}")
    return done.stdout
