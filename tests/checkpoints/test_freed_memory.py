"""Memory of a process that loads a model, against what it keeps."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coded import CASES
from places import ROOT
from safetensors.torch import load_file, save_file

import funcattn as fa
from funcattn.checkpoints import freed_memory
from funcattn.checkpoints.freed_memory import INTERVAL, Reading, give_back

pytestmark = [
    pytest.mark.cpu("it is about the heap of the C library"),
    pytest.mark.skipif(freed_memory._trim() is None, reason="the C library returns no memory"),
]


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def holes(size, count=60):
    """Tensors that live above as many freed blocks of `size` bytes, in one heap."""
    torch.empty(2**25 - 4096, dtype=torch.uint8)  # freed: from here on blocks are of the heap
    freed, kept = [], []
    for _ in range(count):
        freed.append(torch.ones(size, dtype=torch.uint8))
        kept.append(torch.ones(300, dtype=torch.uint8))
    return kept


def test_freed_memory_below_what_lives_is_given_back():
    kept = holes(2**20)
    before = resident()
    give_back()
    assert before - resident() > 50 * 2**20
    assert all(bool(x.all()) for x in kept)


def test_freed_memory_is_given_back_at_intervals(monkeypatch):
    calls = []
    monkeypatch.setattr(freed_memory, "give_back", lambda: calls.append(reading.since))
    reading = Reading()
    for _ in range(9):
        reading.count(INTERVAL // 2)
    assert calls == [INTERVAL] * 4


def floats(tmp_path, layers=4):
    """A folder of a llama of floats, and its size."""
    config = fa.Config(vocabulary=64, width=512, layers=layers, heads=4, feed_forward=4096)
    params = fa.tree.cast(torch.bfloat16)(fa.decoder(config).init(fa.key(0)))
    fa.save(tmp_path / "m", config, params)
    return tmp_path / "m", (tmp_path / "m" / "model.safetensors").stat().st_size


LOADS = """
import sys
import funcattn as fa
from funcattn.checkpoints import freed_memory
freed_memory.INTERVAL = 2**22
fa.load(sys.argv[2])  # what is imported at the first
status = lambda field: open("/proc/self/status").read().split(field + ":")[1].split()[0]
open("/proc/self/clear_refs", "w").write("5")  # the greatest begins anew
before = int(status("VmRSS"))
kept = fa.load(sys.argv[1])
print(1024 * (int(status("VmHWM")) - before), 1024 * (int(status("VmRSS")) - before))
"""


def memory(path, first):
    """The greatest resident memory of a load, and that after it, less that before."""
    run = [sys.executable, "-c", LOADS, str(path), str(first)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    return map(int, done.stdout.split())


def four_bits(folder, layers):
    """A folder of AWQ, and its size."""
    config = fa.Config(vocabulary=64, width=1024, layers=layers, heads=8, feed_forward=4096)
    settings = fa.families.write_config(config)
    coded, settings["quantization_config"] = CASES["awq"][0], CASES["awq"][1]
    fa.save(folder, config, fa.tree.cast(torch.bfloat16)(fa.decoder(config).init(fa.key(0))))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        made = matrix(coded, *tensors.pop(name).shape)
        tensors |= {f"{name.removesuffix('weight')}{end}": x.clone() for end, x in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder, (folder / "model.safetensors").stat().st_size


@functools.cache
def matrix(coded, N, K):
    """The tensors of one matrix."""
    return coded(np.random.default_rng(0), N, K).tensors


@pytest.mark.slow
def test_loading_floats_keeps_one_copy(tmp_path):
    # Two copies of all matrices would be resident at once if the memory order were changed last.
    folder, size = floats(tmp_path)
    most, after = memory(folder, floats(tmp_path / "small", 1)[0])
    assert after < 1.15 * size
    assert most < after + 2**22 + 4 * 2**22  # an interval, and the buffers of a matrix of 4 MB


@pytest.mark.slow
def test_loading_stays_near_the_size_of_the_file(tmp_path):
    folder, size = four_bits(tmp_path / "m", 10)
    most, after = memory(folder, four_bits(tmp_path / "small", 1)[0])
    assert after < 1.15 * size  # scales and zeros of groups of 32, and pages begun
    assert most < 1.3 * size
