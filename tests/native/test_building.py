"""The operator in C++: built once and kept, safely by two at once; and where it cannot be, why, and
everything works without it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

import funcattn as fa
from funcattn.layers import linear
from funcattn.native import building
from funcattn.quantization import tiles
from funcattn.quantization.packed import PackedInt4

pytestmark = pytest.mark.cpu("the operators in C++ are for the CPU")

WITHOUT = """
import funcattn as fa, torch
from funcattn.quantization import tiles
weight = fa.int4.encode(fa.random.normal(fa.key(0), (32, 64)))
x = fa.random.normal(fa.key(1), (64,))
print(tiles.missing())
print(float((fa.layers.linear(weight, x) - fa.quantization.expand(weight) @ x).norm() / x.norm()) < 0.1)
"""


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


REASONS = {
    "asked": ({"FUNCATTN_NATIVE": "0"}, "FUNCATTN_NATIVE=0 asks for none"),
    "no compiler": ({"CXX": "no-such-compiler"}, "no C++ compiler"),
    "a compiler that fails": ({"CXX": "false"}, "fails"),
    "nowhere to write": ({"FUNCATTN_CACHE": "/proc/funcattn"}, "cannot be written"),
}

ABSENT = "asks for none", "no AVX2", "it is written for Linux", "no C++ compiler"


def test_the_sources_compile():
    """Or something is absent: tests of the operators are skipped where there is no library."""
    reason = building.load()
    assert not reason or any(part in reason for part in ABSENT), reason


SLOW = "a compiler that fails", "nowhere to write"  # as the two before, in a process of their own


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param(*REASONS[name], marks=[pytest.mark.slow] if name in SLOW else [])
        for name in REASONS
    ],
    ids=REASONS,
)
def test_without_it_everything_works_and_the_reason_is_told(environment, reason):
    said, near = run(WITHOUT, **environment)
    assert reason in said
    assert near == "True"


def test_a_compiler_of_another_locale_says_why(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nprintf 'error: \\344\\366\\374' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FUNCATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUNCATTN_NATIVE", raising=False)
    with pytest.raises(building.Missing, match="fails: error"):
        building.built()


def test_without_it_torchs_kernels_multiply(monkeypatch):
    monkeypatch.setattr(tiles, "missing", lambda: "as a test wants it")
    weight, x = (
        fa.int4.encode(fa.random.normal(fa.key(0), (32, 64))),
        fa.random.normal(fa.key(1), (3, 64)),
    )
    packed = fa.layers.prepare(weight, 3)
    assert isinstance(packed, PackedInt4)
    assert torch.equal(linear(packed, x), linear(weight, x))


def test_what_is_built_depends_on_sources_and_compiler(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho version 1\n")
    compiler.chmod(0o755)
    before = building.key(str(compiler))
    assert before == building.key(str(compiler))
    other = tmp_path / "products.cpp"
    other.write_text("// another")
    monkeypatch.setattr(building, "SOURCES", (other,))
    assert building.key(str(compiler)) != before
    compiler.write_text("#!/bin/sh\necho version 2\n")
    monkeypatch.undo()
    assert building.key(str(compiler)) != before


BUILD = """
import time
from funcattn.native import building
print(building.built())
"""


@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path):
    """Each with a compiler that takes its time and writes in two steps: whoever looks finds all of
    a library or none.
    """
    compiler = tmp_path / "slow-c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo slow; exit 0; fi\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'printf first > "$2"; sleep 1; printf first-and-second > "$2"\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "FUNCATTN_CACHE": str(tmp_path / "kept")}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    seen = set()
    while any(process.poll() is None for process in both):
        seen |= {path.read_text() for path in (tmp_path / "kept").glob("products-*.so")}
    paths = {process.communicate()[0].strip() for process in both}
    assert all(process.returncode == 0 for process in both)
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "first-and-second"
    assert seen <= {"first-and-second"}
    assert [path.name for path in (tmp_path / "kept").iterdir() if path.name.startswith(".")] == []
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of libraries, and a compiler that counts how often it makes one."""
    compiler, folder = tmp_path / "c++", tmp_path / "kept"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\nmade=$1\nwhile [ $1 != -o ]; do shift; done\n"
        "[ $made = -c ] && echo object > $2 && exit 0\n"
        f"echo library > $2; echo >> {tmp_path}/builds\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FUNCATTN_CACHE", str(folder))
    return folder


def test_a_build_that_was_killed_stands_in_nobodys_way(kept, monkeypatch):
    kept.mkdir(mode=0o700)
    (kept / ".products-half.so").write_text("half")  # as a killed process leaves it
    monkeypatch.setattr(building.os, "replace", lambda own, path: Path(path).write_text("built"))
    assert building.built().read_text() == "built"


def test_sources_are_compiled_apart_and_leave_nothing_but_the_library(kept):
    library = building.built()
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        [library.name, building.noted(library).name]
    )


def test_what_a_killed_build_left_is_swept(kept):
    kept.mkdir(mode=0o700)
    for name in (".products-0-abcdefgh.so", ".products-0-young.so"):
        (kept / name).write_text("")
    (kept / ".products-1-folder.so").mkdir()
    for name in (".products-0-abcdefgh.so", ".products-1-folder.so"):
        os.utime(kept / name, (1, 1))
    (kept / f".products-0.so.new-{'0' * 32}").mkdir()
    building.built()
    assert [
        path.name for path in kept.iterdir() if path.is_file() and path.name.startswith(".")
    ] == [".products-0-young.so"]
    assert (kept / ".products-1-folder.so").is_dir()  # no build makes one: left as it is


def builds(kept):
    path = kept.parent / "builds"
    return len(path.read_text().splitlines()) if path.exists() else 0


HARMS = {
    "cut off": lambda library: library.write_text("lib"),
    "emptied": lambda library: library.write_text(""),
    "another": lambda library: library.write_text("another library"),
    "a link": lambda library: (library.rename(library.parent / "x"), library.symlink_to("x")),
    "open to others": lambda library: library.chmod(0o777),
    "without a digest": lambda library: building.noted(library).unlink(),
    "a damaged digest": lambda library: building.noted(library).write_bytes(b"\xff"),
    "a folder for a library": lambda library: (library.unlink(), library.mkdir()),
    "a folder for a digest": lambda library: (
        building.noted(library).unlink(),
        building.noted(library).mkdir(),
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_library_that_is_not_as_its_build_left_it_is_built_again(kept, harm):
    library = building.built()
    assert building.built() == library
    assert builds(kept) == 1
    HARMS[harm](library)
    if harm.startswith("a folder"):  # nothing can take its place: done without
        with pytest.raises(building.Missing, match="cannot be written"):
            building.built()
        return
    assert building.built() == library
    assert builds(kept) == 2
    assert not library.is_symlink()
    assert library.read_text() == "library\n"
    building.built()
    assert builds(kept) == 2


def test_a_folder_is_closed_to_others_or_not_used(kept, monkeypatch, tmp_path):
    before = os.umask(0)
    try:
        monkeypatch.setenv("FUNCATTN_CACHE", str(tmp_path / "a" / "b"))
        building.built()
        for path in (tmp_path / "a", tmp_path / "a" / "b"):
            assert path.stat().st_mode & 0o777 == 0o700
        assert all(not path.stat().st_mode & 0o022 for path in (tmp_path / "a" / "b").iterdir())
    finally:
        os.umask(before)
    for mode in (0o777, 0o1777, 0o770, 0o702):
        (tmp_path / "a" / "b").chmod(mode)
        with pytest.raises(building.Missing, match="others may write"):
            building.built()
    (tmp_path / "a" / "b").chmod(0o755)
    building.built()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(building.Missing, match="another user's"):
        building.built()


def test_without_a_home_the_library_is_kept_among_temporary_files(kept, monkeypatch, tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("FUNCATTN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for home in ("/proc/nowhere", str(tmp_path / "file"), "relative"):
        monkeypatch.setenv("HOME", home)
        assert building.built().parent == tmp_path / "tmp" / f"funcattn-{os.getuid()}"
    # no HOME, and no entry in /etc/passwd
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert building.folder() == tmp_path / "tmp" / f"funcattn-{os.getuid()}"
    assert builds(kept) == 1

    def without():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", without)
    with pytest.raises(building.Missing, match="set FUNCATTN_CACHE"):
        building.folder()


def test_the_processor_is_in_the_key(monkeypatch, tmp_path):
    before = building.key("true")
    (tmp_path / "cpuinfo").write_text(
        "vendor_id : another\nflags : fpu\n\nvendor_id : a second core\n"
    )
    told = building.processor(str(tmp_path / "cpuinfo"))
    assert told == "vendor_id : another\nflags : fpu\n"
    assert building.processor(str(tmp_path / "none")) != told
    monkeypatch.setattr(building, "processor", lambda: told)
    assert building.key("true") != before


def test_what_is_run_once_is_waited_for_by_other_threads():
    calls, found = [], []

    @building.once
    def slow():
        calls.append(1)
        time.sleep(0.05)
        return len(calls)

    threads = [threading.Thread(target=lambda: found.append(slow())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (calls, found) == ([1], [1] * 4)


TOGETHER = """
import os, pwd, threading, warnings, torch, funcattn as fa
from funcattn import native
from funcattn.native import building

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown  # a container that is run as a user without an entry
for name in ("HOME", "FUNCATTN_CACHE", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
load, meeting, found = native.load, threading.Barrier(2), []

def together():
    try:
        meeting.wait(1)
    except threading.BrokenBarrierError:
        pass
    return load()

native.load = together
params = fa.quantize(fa.int8)(fa.decoder(fa.Config()).init(fa.key(0)))

def run():
    with torch.no_grad():
        found.append(fa.decoder(fa.Config()).extend(params, torch.tensor([1, 2, 3]), ())[0])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(len(found), torch.equal(*found), [str(one.message) for one in caught if "register" in str(one.message)])
print(load())
"""


@pytest.mark.parametrize("library", ["this one", pytest.param("another", marks=pytest.mark.slow)])
def test_two_threads_without_a_home_are_the_first_to_use_it(tmp_path, library):
    """Where the compiler makes another library the operator is done without."""
    if tiles.missing():
        pytest.skip(tiles.missing())
    environment = {"TMPDIR": str(tmp_path)}
    if library == "this one":
        (tmp_path / f"funcattn-{os.getuid()}").mkdir(mode=0o700)
        for path in (building.built(), building.noted(building.built())):
            shutil.copy2(path, tmp_path / f"funcattn-{os.getuid()}")
    else:
        compiler, other = tmp_path / "c++", Path(torch.__file__).parent / "lib" / "libshm.so"
        compiler.write_text(
            "#!/bin/sh\n[ $1 = --version ] && exit 0\nwhile [ $1 != -o ]; do "
            f"shift; done; cp {other} $2\n"
        )
        compiler.chmod(0o755)
        environment["CXX"] = str(compiler)
    said, reason = run(TOGETHER, **environment)
    assert said == "2 True []"
    assert reason == "" if library == "this one" else "none of this operator" in reason


def test_the_library_may_be_loaded_inside_of_a_trace():
    script = """
import torch
from funcattn import native
torch.jit.trace(lambda x: x.relu() if native.load() == "" else x, torch.ones(2), check_trace=False)
print(native.load())
"""
    if building.load():
        pytest.skip(building.load())
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "", done.stdout
    assert done.returncode == 0, done.stderr[-2000:]


PLUGIN = """
def pytest_configure(config):
    from pathlib import Path
    from funcattn.native import building
    building.PACKAGED = Path(__file__).with_name("operators.so")
"""
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_operators_pass_their_tests_under_sanitizers(tmp_path, monkeypatch):
    """Addresses and undefined behaviour, of the library as Python calls it: some four minutes."""
    compiler = building.found_compiler()
    preloaded = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, preloaded)):
        pytest.skip("the compiler brings no sanitizer")
    monkeypatch.setattr(building, "TIMEOUT", 1200)
    building.compile_to(compiler, tmp_path / "operators.so", *SANITIZERS)
    (tmp_path / "sanitized.py").write_text(PLUGIN)
    tests = Path(__file__).parents[1]
    names = (
        "kernels/backends/test_native.py",
        "kernels/backends/test_native_contract.py",
        "quantization/test_tiles.py",
        "compilation/test_fused.py",
    )
    report = tmp_path / "report"
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-p", "sanitized", "-m", "not slow"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(tests / name) for name in names)],
        env=os.environ
        | {
            "LD_PRELOAD": ":".join(preloaded),
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={report}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={report}",
            "OMP_NUM_THREADS": "2",
            "PYTHONPATH": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=tests.parent,
    )
    told = "".join(path.read_text()[:3000] for path in tmp_path.glob("report*"))
    assert done.returncode == 0, told or done.stdout[-3000:]
