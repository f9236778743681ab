"""The C++ kernels of attention without torch: the exponential's bound, and every access to memory within its tensor."""

import subprocess
from pathlib import Path

import pytest

from funcattn import native
from funcattn.native import building

pytestmark = pytest.mark.skipif(bool(native.load()), reason=native.load())
DRIVER = Path(__file__).with_name("attention_driver.cpp")
EXPONENTIAL = 2e-7  # of itself; what gemm.h says
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.mark.parametrize("flags", [("-O2",), pytest.param(SANITIZED, marks=pytest.mark.slow)], ids=["plain", "sanitized"])
def test_kernels_stay_within_their_tensors_and_bounds(flags, tmp_path):
    program = tmp_path / "driver"
    command = [building.found_compiler(), "-std=c++20", "-w", *flags, str(DRIVER), "-o", str(program)]
    subprocess.run(command, check=True, timeout=600)
    done = subprocess.run([str(program), "20"], capture_output=True, text=True, timeout=600, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines[-1] == "done"
    assert not [line for line in lines if line.startswith("wrong")]
    found = {name: float(bound) for word, name, bound in (line.split() for line in lines[:-1]) if word == "bound"}
    assert {"avx2_exp", "avx2_exp2"} <= set(found)
    assert max(found.values()) <= EXPONENTIAL
