"""What does a loss without its logits cost, and how much memory does the curvature of a whole model
take?

    python benchmarks/cross_entropy.py [--rows 2048] [--repeats 5] [--hvp 4096 norm] [--hvp 8192 all]

First the loss on a head of the size of SmolLM2-135M's (49152 x 576, float32), beside
F.cross_entropy of all logits, in turns. Then, for each --hvp, the Hessian of the loss of the whole
model times a direction, with rematerialized layers: by all weights, or by one norm of the first
layer. Each is a process of its own, and what is told is its peak resident memory less what it held
with the weights alone; tangents, gradients and results count. --layers shortens the model: memory
and time are a constant and a multiple of its layers.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import interleave
from torch.func import grad, jvp

import funcattn as fa
from funcattn import transformer

GB = 2**30
ROWS = 128  # positions of a feed-forward at a time
SMOLLM2 = {
    "vocabulary": 49152,
    "width": 576,
    "heads": 9,
    "kv_heads": 3,
    "head_size": 64,
    "feed_forward": 1536,
    "context": 16384,
}


def times(rows: int, repeats: int) -> None:
    V, E = SMOLLM2["vocabulary"], SMOLLM2["width"]
    x, w, dx, dw = (
        fa.random.normal(fa.key(n), shape) * size
        for n, (shape, size) in enumerate([((rows, E), 1.0), ((V, E), 0.04)] * 2)
    )
    targets = fa.random.randint(fa.key(4), (rows,), 0, V)
    losses = {
        "all logits": lambda x, w: F.cross_entropy(x @ w.mT, targets),
        "fa.cross_entropy": lambda x, w: fa.cross_entropy(x, w, targets),
    }
    passes = {
        "value": lambda f: f(x, w),
        "gradient": lambda f: grad(f, (0, 1))(x, w),
        "hvp": lambda f: jvp(grad(f, (0, 1)), (x, w), (dx, dw))[1],
        "hvp by the residual": lambda f: jvp(lambda x: grad(f)(x, w), (x,), (dx,))[1],
    }
    few = targets[:64]
    for run in (lambda f: f(x[:64], w), lambda f: grad(f, (0, 1))(x[:64], w)):
        theirs = run(lambda x, w: F.cross_entropy(x @ w.mT, few))
        torch.testing.assert_close(run(lambda x, w: fa.cross_entropy(x, w, few)), theirs)
    for name, run in passes.items():
        print(f"\n{name}, {rows} rows")
        interleave(
            {loss: (lambda f=f, run=run: run(f)) for loss, f in losses.items()},
            repeats=repeats,
            warmup=1,
        )


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def numbers(shapes: fa.tree.Tree, factor: float) -> fa.tree.Tree:
    """Weights made in place: a peak while making them would hide one that comes later."""

    def fill(shape: tuple[int, ...]) -> torch.Tensor:
        x = torch.arange(math.prod(shape), dtype=torch.float32).mul_(factor).sin_()
        return x.mul_(0.04).view(shape) if len(shape) > 1 else x.mul_(0.1).add_(1)

    return fa.tree.map(fill, shapes, is_leaf=is_shape)


def is_shape(x: object) -> bool:
    return type(x) is tuple and bool(x) and all(type(n) is int for n in x)


def curvature(config: fa.Config, T: int, which: str) -> tuple[int, int, bool]:
    """The resident memory with the weights alone, their bytes, and whether all is finite."""
    model, params = fa.decoder(config, remat=ROWS), numbers(transformer.shapes(config), 0.7)
    held = resident()
    tokens = torch.arange(T + 1) * 7919 % config.vocabulary
    chosen = lambda path, _: which == "all" or path == "layers.0.attention_norm"
    some, rest = fa.tree.partition(params, chosen)
    along = numbers(fa.tree.map(lambda x: tuple(x.shape), some), 0.9)
    slope = grad(lambda some: fa.loss(model, fa.tree.combine(some, rest), tokens))
    found = jvp(slope, (some,), (along,))[1]
    weights = sum(x.numel() * x.element_size() for x in fa.tree.leaves(params))
    return held, weights, all(bool(x.isfinite().all()) for x in fa.tree.leaves(found))


def hvp(T: int, which: str, layers: int, classes: int) -> None:
    """Run in a process of its own: print the extra peak, the bytes of weights and the seconds."""
    curvature(fa.Config(layers=1), 8, which)  # what libraries allocate once
    config = fa.Config(layers=layers, **{**SMOLLM2, "vocabulary": classes})
    begun = time.perf_counter()
    held, weights, finite = curvature(config, T, which)
    seconds = time.perf_counter() - begun
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"extra": most - held, "weights": weights, "seconds": seconds, "finite": finite}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5, help="0 leaves the times out")
    parser.add_argument("--hvp", nargs=2, action="append", metavar=("T", "WHICH"), default=[])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--classes", type=int, default=SMOLLM2["vocabulary"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.inside:
        ((T, which),) = options.hvp
        hvp(int(T), which, options.layers, options.classes)
        return
    if options.repeats:
        times(options.rows, options.repeats)
    for T, which in options.hvp:
        run = [sys.executable, __file__, "--inside", "--hvp", T, which]
        for name in ("layers", "classes", "threads"):
            run += [f"--{name}", str(getattr(options, name))]
        # glibc would keep freed blocks of up to 32 MB for later, and what is told is memory in use
        settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
        out = subprocess.run(run, check=True, capture_output=True, text=True, env=settings).stdout
        found = json.loads(out.splitlines()[-1])
        assert found["finite"]
        print(
            f"hvp by {which}, {options.layers} layers, T = {T}: {found['extra'] / GB:.2f} GB above "
            f"{found['weights'] / GB:.2f} GB of weights, {found['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
