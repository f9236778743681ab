"""What do many futures of one past cost, in memory and in time?

    python benchmarks/futures.py [--threads 2] [--futures 32] [--past 1000] [--tokens 8]

SmolLM2-135M in float32. "Forked" maps over keys, and the past is held once; "batch" maps over keys
and over as many copies of the past, which is what a batched cache holds; the loop writes one future
after another. Memory is the rise of the process's peak of resident memory (Linux), tails and
activations with it. Each is measured once, forked first: memory is the question.
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.func import vmap

import funcattn as fa


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--futures", type=int, default=32)
    parser.add_argument("--past", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    config, params, tokenizer = fa.load("smollm2-135m")
    model = fa.decoder(config)
    text = torch.tensor(
        tokenizer.encode("The sea was calm, and the keeper wrote. " * options.past)[
            : options.past + 1
        ]
    )
    _, past = fa.generate(fa.key(0), model, params, text[:-1], steps=0)
    past = past._replace(
        k=past.k[:, :, : options.past + 1].clone(), v=past.v[:, :, : options.past + 1].clone()
    )
    keys = fa.split(fa.key(1), options.futures)
    sampler = fa.sampling.temperature(0.8)

    def go_on(key: torch.Tensor, past: fa.Cache) -> torch.Tensor:
        return fa.generate(
            key, model, params, text[-1:], past, steps=options.tokens, sampler=sampler
        )[0]

    def batch() -> torch.Tensor:
        copies = fa.tree.map(lambda leaf: leaf.expand(options.futures, *leaf.shape).clone(), past)
        return vmap(go_on)(keys, copies)

    go_on(keys[0], past)  # what torch allocates once
    size = fa.tree.nbytes(past)
    print(
        f"{options.futures} futures of {options.tokens} tokens; their past of {options.past} "
        f"tokens is {size / 1e6:.0f} MB"
    )
    forked = report("forked", lambda: vmap(go_on, (0, None))(keys, past), size, options)
    loop = report("loop", lambda: torch.stack([go_on(key, past) for key in keys]), size, options)
    batched = report("batch", batch, size, options)
    for name, tokens in (("loop", loop), ("batch", batched)):
        print(
            f"{(forked == tokens).all(-1).sum()} of {options.futures} futures are those of the "
            f"{name}, token for token"
        )
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")


def report(
    name: str, write: Callable[[], torch.Tensor], size: int, options: argparse.Namespace
) -> torch.Tensor:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident now
    before, begun = resident("VmRSS"), time.perf_counter()
    tokens = write()
    seconds, rise = time.perf_counter() - begun, resident("VmHWM") - before
    speed = options.futures * options.tokens / seconds
    print(
        f"{name:<8} {rise / 1e6:7.0f} MB more at the peak, {rise / size:5.1f} pasts; "
        f"{speed:6.1f} tokens/s"
    )
    return tokens


def resident(field: str) -> int:
    """Bytes of this process's memory now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
