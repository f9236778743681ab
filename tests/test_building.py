"""The operator in C++: built once and kept, safely by two at once; and where it cannot be, why, and everything works without it."""

import subprocess
import sys
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
    import os

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


REASONS = {
    "asked": ({"FUNCATTN_NATIVE": "0"}, "FUNCATTN_NATIVE=0 asks for none"),
    "no compiler": ({"CXX": "no-such-compiler"}, "no C++ compiler"),
    "a compiler that fails": ({"CXX": "false"}, "fails"),
    "nowhere to write": ({"FUNCATTN_CACHE": "/proc/funcattn"}, "cannot be written"),
}


@pytest.mark.parametrize(("environment", "reason"), REASONS.values(), ids=REASONS)
def test_without_it_everything_works_and_the_reason_is_told(environment, reason):
    said, near = run(WITHOUT, **environment)
    assert reason in said
    assert near == "True"


def test_without_it_torchs_kernels_multiply(monkeypatch):
    monkeypatch.setattr(tiles, "missing", lambda: "as a test wants it")
    weight, x = fa.int4.encode(fa.random.normal(fa.key(0), (32, 64))), fa.random.normal(fa.key(1), (3, 64))
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


def test_two_processes_build_at_once(tmp_path):
    """Each with a compiler that takes its time and writes in two steps: whoever looks finds all of a library or none."""
    compiler = tmp_path / "slow-c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo slow; exit 0; fi\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'printf first > "$2"; sleep 1; printf first-and-second > "$2"\n'
    )
    compiler.chmod(0o755)
    import os

    environment = {**os.environ, "CXX": str(compiler), "FUNCATTN_CACHE": str(tmp_path / "kept")}
    both = [subprocess.Popen([sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    seen = set()
    while any(process.poll() is None for process in both):
        seen |= {path.read_text() for path in (tmp_path / "kept").glob("products-*.so")}
    paths = {process.communicate()[0].strip() for process in both}
    assert all(process.returncode == 0 for process in both)
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "first-and-second"
    assert seen <= {"first-and-second"}
    assert [path.name for path in (tmp_path / "kept").iterdir() if path.name.startswith(".")] == []


def test_a_build_that_was_killed_stands_in_nobodys_way(tmp_path, monkeypatch):
    if tiles.missing():
        pytest.skip(tiles.missing())
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / ".products-half.so").write_text("half")  # as a killed process leaves it
    monkeypatch.setenv("FUNCATTN_CACHE", str(kept))
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, "-fsyntax-only"))  # quick
    monkeypatch.setattr(building.os, "replace", lambda own, path: Path(path).write_text("built"))
    assert building.built().read_text() == "built"
