"""Draws of many numbers, against torch.randn and against writing as many to memory.

    python benchmarks/draws.py [--threads 1] [--elements 4194304]

Every word costs 20 rounds of a cipher: that is what a draw that depends on its key and nothing else
takes. Those of `fa.random` have the bits of `jax.random`.
"""

import argparse

import torch
from _timing import interleave

import funcattn as fa


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--elements", type=int, default=2**22)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    key, shape, room = fa.key(0), (options.elements,), torch.empty(options.elements)
    candidates = {
        "torch.randn": lambda: torch.randn(shape),
        "memory": lambda: room.fill_(1.0),
        "fa.random.bits": lambda: fa.random.bits(key, shape),
        "fa.random.uniform": lambda: fa.random.uniform(key, shape),
        "fa.random.normal": lambda: fa.random.normal(key, shape),
        "fa.random.gumbel": lambda: fa.random.gumbel(key, shape),
    }
    interleave(candidates)


if __name__ == "__main__":
    main()
