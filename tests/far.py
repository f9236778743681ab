"""A device that is not there: its tensors hold real numbers, and mix with those of the CPU no more than tensors of a GPU do.

    FUNCATTN_DEVICE=far python -m pytest tests     the suite with all of its tensors there: what is made elsewhere by mistake raises

far.cpp gives torch the device: plain tensors (no subclass and no mode, so that every transform, and the engine's own thread, see
what they see on CUDA) over the memory of the CPU, on which the kernels of the CPU run. What CUDA refuses is refused: tensors of
two devices in one operator (but for a number, 0-d, where CUDA takes one), `.numpy()`, generators of the CPU, operators with a
kernel for the CPU alone, products of integer matrices. Refused too is an index on the CPU, which CUDA would take, and copy.

What it does not say: the numbers are the CPU's, bit for bit, so nothing of CUDA's rounding, order of sums or limits of dtypes.
Nothing is asynchronous, so nothing of waiting and races. There is no Triton and no Inductor.
"""

import hashlib
import os
import subprocess
import tempfile
import types
from pathlib import Path

import torch

from funcattn.native import building

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w")


def arrive() -> None:
    """Tell torch of the device, once a process; compiled when it is first wanted, and kept."""
    torch.utils.rename_privateuse1_backend("far")
    torch.ops.load_library(built())
    answers = {"is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "device_count": 1, "current_device": 0}
    module = types.ModuleType("far")
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    module.manual_seed_all = module.set_rng_state = lambda *_: None  # the CPU's generator draws
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module("far", module)


def built() -> Path:
    """The library of this source, this torch and this compiler."""
    compiler, home = building.found_compiler(), Path(torch.__file__).parent
    parts = "\0".join((SOURCE.read_text(), *FLAGS, compiler, torch.__version__))
    path = building.folder() / f"far-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            own = Path(folder) / path.name
            libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
            subprocess.run([compiler, *FLAGS, f"-I{home / 'include'}", SOURCE, "-o", own, *libraries], check=True)
            os.replace(own, path)  # one step for whoever builds beside
    return path
