"""How much memory do derivatives of attention take, and does it grow with T or with T^2?

    python benchmarks/attention_memory.py [--lengths 4096 16384] [--dense]

Each line is a process of its own: its peak resident memory less what it held before, in MB, beside
the size of all inputs, tangents and outputs together. 8 heads of 64, float32, attention over
itself. `--dense` adds what the dense route would hold: one T x T matrix a head, which its
derivatives hold several of.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from torch.func import grad, jvp

import funcattn as fa

HEADS, WIDTH = 8, 64
MB = 2**20


def operations(T: int) -> dict:
    # made in place: a peak while making the inputs would hide one that comes later
    n = HEADS * T * WIDTH
    q, k, v, tq, tk, tv = (
        torch.arange(n, dtype=torch.float32).mul_(0.7 + i).sin_().view(HEADS, T, WIDTH)
        for i in range(6)
    )
    loss = lambda q, k, v: fa.attention(q, k, v).square().sum()
    slope = grad(loss, (0, 1, 2))
    along = lambda q, k, v: sum(
        (g * t).sum() for g, t in zip(slope(q, k, v), (tq, tk, tv), strict=True)
    )
    return {  # name: (call, tensors of the size of q that go in, that come out)
        "forward": (lambda: fa.attention(q, k, v, kernel="flash"), 3, 1),
        "grad": (lambda: slope(q, k, v), 3, 3),
        "jvp": (lambda: jvp(fa.attention, (q, k, v), (tq, tk, tv)), 6, 2),
        "jvp(grad)": (lambda: jvp(slope, (q, k, v), (tq, tk, tv)), 6, 6),
        "grad(grad)": (lambda: grad(along, (0, 1, 2))(q, k, v), 6, 3),
    }


def measure(name: str, T: int) -> None:
    """Run in a process of its own: print the extra peak and the sizes, in MB, as json."""
    torch.set_num_threads(2)
    small = operations(64)[name][0]
    small()  # what libraries allocate once
    table = operations(T)  # held, so that nothing given back can hide what a call takes
    call, inputs, outputs = table[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = call()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del result, table
    tensor = HEADS * T * WIDTH * 4
    print(
        json.dumps(
            {
                "extra": (after - before) / MB,
                "held": (inputs * tensor) / MB,
                "sizes": (inputs + outputs) * tensor / MB,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "T"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], int(options.one[1]))
        return
    print(
        f"{'':<12}{'T':>7} {'extra MB':>9} {'all MB':>8} {'in + out':>9} {'ratio':>6} "
        f"{'growth':>7}",
        flush=True,
    )
    for name in operations(8):
        last = None
        for T in options.lengths:
            run = [sys.executable, __file__, "--one", name, str(T)]
            found = json.loads(
                subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[
                    -1
                ]
            )
            total = found["extra"] + found["held"]
            growth = f"{found['extra'] / last:>6.1f}x" if last else ""
            ratio = f"{total / found['sizes']:>5.2f}x"
            print(
                f"{name:<12}{T:>7} {found['extra']:>9.0f} {total:>8.0f} {found['sizes']:>9.0f} "
                f"{ratio} {growth}",
                flush=True,
            )
            last = found["extra"]
    if options.dense:
        T = max(options.lengths)
        print(f"one dense T x T for {HEADS} heads at T = {T}: {HEADS * T * T * 4 / MB:.0f} MB")


if __name__ == "__main__":
    main()
