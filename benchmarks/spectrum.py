"""The spectrum of the Hessian of a language model's loss, by all of its weights, at length.

    python benchmarks/spectrum.py [--tokens 4096] [--steps 8] [--layers 0] [--threads 1]
        [--state FILE] [--json FILE]

Lanczos' method on SmolLM2-135M in float32, with rematerialized layers and full reorthogonalization:
each step is one product with a matrix of 135 million rows, and keeps one vector more (0.5 GB). The
text is Python's own manual. Told after each step: its seconds, the extreme Ritz values with their
bounds, and the peak of resident memory. With --state a run that was ended goes on from its last
step; --layers takes the weights of the last few layers alone (0 takes all weights).
"""

import argparse
import json
import resource
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch

import funcattn as fa

ROWS = 128  # positions of a feed-forward, and groups of heads, at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, params, tokenizer = fa.load("smollm2-135m")
    text = tokenizer.encode("".join(topics[name] for name in sorted(topics)))
    tokens = torch.tensor(text[: options.tokens + 1])
    last = range(config.layers - options.layers, config.layers)
    chosen = lambda path, _: (
        not options.layers or path.startswith(tuple(f"layers.{n}." for n in last))
    )
    some, rest = fa.tree.partition(params, chosen)
    model = fa.decoder(config, remat=ROWS)
    loss = lambda some: fa.loss(model, fa.tree.combine(some, rest), tokens)
    size = sum(x.numel() for x in fa.tree.leaves(some))
    print(f"{size} numbers, {len(tokens) - 1} tokens", flush=True)
    product, seconds = partial(fa.curvature.hvp, loss, some), []
    run = torch.load(options.state, weights_only=False) if known(options.state) else ()
    while fa.records.is_absent(run) or run.alpha.shape[-1] < options.steps:
        begun = time.perf_counter()
        run = fa.curvature.lanczos(fa.key(0), product, some, 1, state=run)
        seconds.append(time.perf_counter() - begun)
        tell(run, seconds[-1])
        if options.state:
            torch.save(run, options.state)
        if options.json:
            options.json.write_text(json.dumps(summary(run, size, options, seconds), indent=1))


def known(path: Path | None) -> bool:
    return path is not None and path.exists()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tell(run: fa.curvature.Lanczos, seconds: float) -> None:
    ritz = fa.curvature.eigenvalues(run)
    ends = ", ".join(
        f"{float(ritz.values[n]):.5g} +- {float(ritz.bounds[n]):.1g}"
        for n in sorted({0, len(ritz.values) - 1})
    )
    steps = run.alpha.shape[-1]
    print(f"{steps} steps: {ends}; {seconds:.0f} s, peak {peak() / 2**30:.2f} GB", flush=True)


def summary(
    run: fa.curvature.Lanczos, size: int, options: argparse.Namespace, seconds: list[float]
) -> dict:
    """What pages and notebooks show of a run."""
    ritz = fa.curvature.eigenvalues(run)
    return {
        "numbers": size,
        "tokens": options.tokens,
        "values": ritz.values.tolist(),
        "bounds": ritz.bounds.tolist(),
        "weights": ritz.weights.tolist(),
        "seconds": seconds,
        "peak": peak(),
    }


if __name__ == "__main__":
    main()
