"""Compile what would be launched for a GPU that is not there: to PTX and, by Triton's own ptxas, to
the machine code of a card.

    python tests/ahead.py 90 80

One line a kernel: its name, the card, its blocks, registers, bytes spilled, bytes of shared memory;
of the loop over whole blocks instructions a pair of a query and a key, reloads of what was spilled,
and what multiplies matrices (HGMMA: a warp group).

Launches are recorded with the arguments that the library gives them on tensors of the CPU, and
specialised as Triton's launcher does: an integer 1 is a constant, a multiple of 16 says so. Runs in
a process of its own, since Triton reads TRITON_INTERPRET once.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from funcattn import masks
from funcattn.kernels.backends.triton import launching, tuning
from funcattn.kernels.closed.algebra import ONES, Contraction, K, LowRankFactor, Output, Q, Term

SHARED = {90: 232448, 80: 166912, 86: 101376}  # bytes a block of threads may have
# What goes before a contraction: the ends of masks, and statistics, which read keys only of rows
# whose log-sum-exp is too large for one number.
BEFORE = "bounds", "statistics"
POINTERS = {
    "float32": "*fp32",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "int32": "*i32",
    "int64": "*i64",
}


class Launch(NamedTuple):
    """A kernel and what it was called with."""

    kernel: Any
    args: tuple
    options: dict


class Built(NamedTuple):
    """What a kernel needs on a card."""

    kernel: str
    card: int
    blocks: str  # own x other, warps, stages
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes
    instructions: float  # issued for a pair of a query and a key, in the loop over whole blocks
    reloads: int  # loads and stores of local memory in that loop
    products: str  # what multiplies matrices there


def recorded(run) -> list[list[Launch]]:
    """The launches that run() would make, none of them made; for each a candidate for every size of
    blocks.
    """
    launches: list[list[Launch]] = []
    before_others: dict[str, Launch] = {}
    before = JITFunction.run, tuning.run

    def record(self, *args, grid, warmup, **options):
        if self.__name__ in BEFORE:  # one of them is enough
            before_others[self.__name__] = Launch(self, args, options)
        else:
            launches[-1].append(Launch(self, args, options))

    def each(launch, candidates, *_):
        launches.append([])
        for blocks in candidates:
            launch(blocks)

    JITFunction.run, tuning.run = record, each
    try:
        run()
    finally:
        JITFunction.run, tuning.run = before
    return [*launches, *([launch] for launch in before_others.values())]


def build(launch: Launch, card: int) -> Built:
    """Compile one launch for a card: 90 is a H100 or H200, 80 an A100."""
    kernel, args, options = launch
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {
        name: options[name] for name in names if name in options
    }
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
    chosen = {
        name: options[name]
        for name in ("num_warps", "num_stages", "enable_fp_fusion")
        if name in options
    }
    source = ASTSource(kernel, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", card, 32), options=chosen)

    sizes = [
        options.get(name, 0) for name in ("OWN", "ROWS", "OTHER", "KEYS", "num_warps", "num_stages")
    ]
    told = f"{sizes[0] + sizes[1]}x{sizes[2] + sizes[3]} {sizes[4]} {sizes[5]}"
    issued, reloads, products = loop(done.asm["cubin"])
    # of a thread
    pairs = (sizes[0] + sizes[1]) * (sizes[2] + sizes[3]) / 32 / sizes[4] if sizes[4] else 1.0
    name = kernel.__name__
    return Built(
        name,
        card,
        told,
        *usage(done.asm["cubin"]),
        done.metadata.shared,
        round(issued / pairs, 2),
        reloads,
        products,
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as the binary says."""
    told = dumped(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])


def loop(cubin: bytes) -> tuple[int, int, str]:
    """Of the shortest loop that multiplies matrices: its instructions, those that touch local
    memory, and what multiplies.
    """
    lines = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([\w.]+)([^;]*);", dumped(cubin, "-sass")
    )
    at = {int(address, 16): n for n, (address, _, _) in enumerate(lines)}
    found = []
    for n, (_, name, rest) in enumerate(lines):
        to = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if to and at.get(int(to[1], 16), n) < n:
            names = [name.split(".")[0] for _, name, _ in lines[at[int(to[1], 16)] : n + 1]]
            products = sorted({"HGMMA", "HMMA"} & {*names})
            if products:
                found.append((len(names), names.count("LDL") + names.count("STL"), products[0]))
    return min(found, default=(0, 0, ""))


def dumped(cubin: bytes, what: str) -> str:
    """What cuobjdump says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run(
            [tool, what, file.name], capture_output=True, text=True, check=True
        ).stdout


def launches(
    D: int, dtype: torch.dtype, *, causal: bool, dropout: bool = False
) -> list[list[Launch]]:
    """What value, gradient, jvp and hvp of attention launch, on 2048 tokens of 8 heads that share 2
    key heads.
    """
    T, m = 2048, ()
    q, k, v = (
        torch.empty(4, 2, T, D, dtype=dtype),
        torch.empty(4, 1, T, D, dtype=dtype),
        torch.empty(4, 1, T, D, dtype=dtype),
    )
    if causal:
        m = tuple(masks.causal(T))
    lse, column = torch.empty(4, 2, T, 1), torch.empty(4, 2, T, 1)
    at = 3 + len(m)
    x, dS = (
        (LowRankFactor(at + 1, at), LowRankFactor(at + 2, ONES)),
        (LowRankFactor(at + 3, K, 0.1), LowRankFactor(Q, at + 4, 0.1)),
    )
    tensors = [
        q,
        k,
        lse,
        *m,
        v,
        torch.empty_like(q),
        column,
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
    ]
    contractions = {
        "gradient": [
            Output("query", (Term((x,), K, 0.1),)),
            Output("key", (Term((x,), Q, 0.1),)),
            Output("key", (Term((), at + 1),)),
        ],
        "jvp": [
            Output("query", (Term((dS,), at), Term((), at + 5))),
            Output("query", (Term((dS,)),)),
        ],
        "hvp": [
            Output("query", (Term((x, dS), K, 0.1), Term((x,), at + 4, 0.1))),
            Output("key", (Term((x, dS), Q, 0.1), Term((x,), at + 3, 0.1))),
            Output("key", (Term((dS,), at + 1),)),
        ],
    }
    if dropout:
        tensors.append(torch.empty(4, 2, 1, 2, dtype=torch.int64))
        contractions = {"gradient": contractions["gradient"]}
    kind = lambda o: (
        *(q.shape if o.side == "query" else k.shape)[:-1],
        1 if o.terms[0].value == ONES else D,
    )

    def run() -> None:
        launching.attend(q, k, v, m, 0.1)
        if not dropout and tuning.of_attend_jvp(q, v):
            launching.attend_jvp(q, k, v, [torch.empty_like(x) for x in (q, k, v)], m, 0.1)
        for outputs in contractions.values():
            spec = Contraction(tuple(outputs), 0.1, tuple(range(3, at)))
            spec = spec._replace(dropout=len(tensors) - 1, rate=0.1) if dropout else spec
            launching.contract(spec, [kind(o) for o in outputs], tensors, [dtype] * len(outputs))

    return recorded(run)


def main() -> None:
    """Compile for the cards that are named."""
    for D, dtype, causal, dropout in (
        (64, torch.bfloat16, True, False),
        (128, torch.bfloat16, True, False),
        (128, torch.float16, False, False),
        (80, torch.bfloat16, False, True),
        (256, torch.bfloat16, True, False),
        (64, torch.float32, True, False),
    ):
        for card in map(int, sys.argv[1:]):
            tuning.by_groups = lambda x, card=card: card >= 90
            for number, candidates in enumerate(launches(D, dtype, causal=causal, dropout=dropout)):
                fits = (
                    built
                    for built in (build(launch, card) for launch in candidates)
                    if built.shared <= SHARED[card]
                )
                name = (
                    f"{candidates[-1].kernel.__name__} {number} {D} "
                    f"{str(dtype).removeprefix('torch.')}" + " causal" * causal
                )
                print(name, *next(fits)[1:], sep="\t", flush=True)


if __name__ == "__main__":
    main()
