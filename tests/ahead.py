"""Compile what would be launched for a GPU that is not there: to PTX and, by Triton's own ptxas, to the machine code of a card.

    python tests/ahead.py 90 80      one line a kernel: its name, the card, registers, bytes spilled, bytes of shared memory

Launches are recorded with the arguments that the library gives them on tensors of the CPU, and specialised as Triton's launcher
does: an integer 1 is a constant, a multiple of 16 says so. Runs in a process of its own, since Triton reads TRITON_INTERPRET once.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int64": "*i64"}


class Launch(NamedTuple):
    """A kernel and what it was called with."""

    kernel: Any
    args: tuple
    options: dict


class Built(NamedTuple):
    """What a kernel needs on a card."""

    kernel: str
    card: int
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes


def recorded(run) -> list[Launch]:
    """The launches that run() makes, none of them made."""
    launches: list[Launch] = []
    before = JITFunction.run

    def record(self, *args, grid, warmup, **options):
        launches.append(Launch(self, args, options))

    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = before
    return launches


def build(launch: Launch, card: int) -> Built:
    """Compile one launch for a card: 90 is a H100 or H200, 80 an A100."""
    kernel, args, options = launch
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {name: options[name] for name in names if name in options}
    signature, constants, attributes = {}, {}, {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(x, (*path, n)) for n, x in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[str(value.dtype).removeprefix("torch.")]
        if isinstance(value, float):
            return "fp32"
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    for n, name in enumerate(names):
        if kernel.params[n].is_constexpr:
            signature[name], constants[(n,)] = "constexpr", given[name]
        else:
            signature[name] = kind(given[name], (n,))
    chosen = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    done = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", card, 32), options=chosen)
    cubin = Path(sys.argv[0]).parent / "x" if False else None
    return Built(kernel.__name__, card, *usage(done.asm["cubin"]), done.metadata.shared)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as the binary says."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])
