"""A device that is not there: its tensors hold real numbers, and mix with those of the CPU no more
than tensors of a GPU do.

    FUNCATTN_DEVICE=far python -m pytest tests     the suite with all of its tensors there, which is torch's default device then
    ... FUNCATTN_DEFAULT=cpu ...                   and the library's default is the CPU, as where nobody sets one

far.cpp gives torch the device: plain tensors (no subclass and no mode, so that every transform, and
the engine's own thread, see what they see on CUDA) over the memory of the CPU, on which the kernels
of the CPU run. What CUDA refuses is refused: tensors of two devices in one operator (but for a
number, 0-d, where CUDA takes one), `.numpy()`, generators of the CPU, operators with a kernel for
the CPU alone, products of integer matrices. Refused too is an index on the CPU, which CUDA would
take, and copy.

What it does not say: the numbers are the CPU's, bit for bit, so nothing of CUDA's rounding, order
of sums or limits of dtypes. Nothing is asynchronous, so nothing of waiting and races. There is no
Triton and no Inductor.
"""

import contextlib
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext, _device_constructors

import funcattn
from funcattn.native import building

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARY = os.path.dirname(funcattn.__file__)
# whose frames may be between its own
BETWEEN = (LIBRARY, os.path.dirname(torch.__file__), functools.__file__, contextlib.__file__)
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w")


def settle(device: str, default: str) -> None:
    """Put the tests' tensors on a device; what the library makes without saying where follows them,
    or is on the CPU.
    """
    if device == "far":
        arrive()
    if default != "cpu":
        torch.set_default_device(device)
    else:
        torch._GLOBAL_DEVICE_CONTEXT.device_context = Apart(device)
        torch._GLOBAL_DEVICE_CONTEXT.device_context.__enter__()


def arrive() -> None:
    """Tell torch of the device, once a process; compiled when it is first wanted, and kept."""
    torch.utils.rename_privateuse1_backend("far")
    torch.ops.load_library(built())
    answers = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
    }
    module = types.ModuleType("far")
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    module.manual_seed_all = module.set_rng_state = lambda *_: None  # the CPU's generator draws
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module("far", module)


class Apart(DeviceContext):
    """A default device for everybody but the library, whose default is the CPU wherever it was
    given tensors of the device.

    So it is in a program that moves its parameters to a GPU and says nothing of defaults: what the
    library makes, and does not put beside its inputs, is on the CPU. Where it was given no tensor,
    as in `fa.key(0)`, there is only the default to follow.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        unsaid = func in _device_constructors() and kwargs.get("device") is None
        if (
            unsaid
            and not torch.compiler.is_compiling()
            and self.is_for_the_library(sys._getframe(1))
        ):
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def is_for_the_library(self, frame: Any) -> bool:
        """Whether the library asks, in a call that was given tensors of the device: by the
        outermost frame that is its own.
        """
        door = None
        while frame is not None and frame.f_code.co_filename.startswith(BETWEEN):
            door, frame = (
                frame if frame.f_code.co_filename.startswith(LIBRARY) else door,
                frame.f_back,
            )
        if door is None:
            return False
        code = door.f_code
        # *args, **kwargs
        number = (
            code.co_argcount
            + code.co_kwonlyargcount
            + bool(code.co_flags & 4)
            + bool(code.co_flags & 8)
        )
        given = pytree.tree_leaves([door.f_locals.get(name) for name in code.co_varnames[:number]])
        given += pytree.tree_leaves([vars(x) for x in given if hasattr(x, "__dict__")])
        return any(isinstance(x, torch.Tensor) and x.device.type == self.device.type for x in given)


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
            subprocess.run(
                [compiler, *FLAGS, f"-I{home / 'include'}", SOURCE, "-o", own, *libraries],
                check=True,
            )
            os.replace(own, path)  # one step for whoever builds beside
    return path
