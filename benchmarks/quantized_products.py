"""Is a matrix of 8 bits ever slower than the same one in floats, and for which numbers of rows and
dtypes?

    python benchmarks/quantized_products.py [--dtypes float32 bfloat16 float16] [--rows 1 5 16 64
    256] [--threads 1]

All matrices of some layers of SmolLM2-135M by `linear` with int8 weights against `linear` with the
weights in the dtype of the activations; eager, and for the few rows that `fa.compile` compiles also
as it does it, with the weights prepared and a layer in one graph. Candidates take turns, so that
what else the machine does meets all of them, and each finds the other in the caches; medians.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _timing import interleave

import funcattn as fa
from funcattn.compilation.conditions import MAX_STEP_TOKENS
from funcattn.layers import linear, prepare

# q, k, v, o, gate, up, down
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 5, 16, 64, 256])
    parser.add_argument("--schemes", nargs="*", choices=["int8", "int4", "w8a8"], default=["int8"])
    parser.add_argument(
        "--how", nargs="*", choices=["eager", "compiled"], default=["eager", "compiled"]
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stack = [
        [fa.random.normal(fa.key(10 * i + n), shape) for n, shape in enumerate(SHAPES)]
        for i in range(options.layers)
    ]
    for name in options.dtypes:
        dtype = getattr(torch, name)
        trees: dict[str, list[list[Any]]] = {
            name: [[weight.to(dtype) for weight in layer] for layer in stack]
        }
        trees |= {
            one: [[getattr(fa, one).encode(weight) for weight in layer] for layer in stack]
            for one in options.schemes
        }
        for rows in options.rows:
            x = {K: fa.random.normal(fa.key(9), (rows, K)).to(dtype) for K in (576, 1536)}
            for how in options.how:
                if how == "eager" or rows <= MAX_STEP_TOKENS:
                    print(f"\n{rows} rows of {name}, {how}, {options.layers} layers")
                    candidates = {one: run(tree, x, how) for one, tree in trees.items()}
                    for wanted, *others in zip(
                        *(candidate() for candidate in candidates.values()), strict=True
                    ):
                        off = max(
                            float((other - wanted).norm() / wanted.norm()) for other in others
                        )
                        assert off < 0.2, f"a product is off by {off}"
                    interleave(candidates, repeats=options.turns)


def run(
    tree: list[list[Any]], x: dict[int, torch.Tensor], how: str
) -> Callable[[], list[torch.Tensor]]:
    """All products of all layers; gives those of the last."""
    rows = len(x[576])

    def layer(weights: list[Any]) -> list[torch.Tensor]:
        return [linear(weight, x[K]) for weight, (_, K) in zip(weights, SHAPES, strict=True)]

    if how == "compiled":
        torch._dynamo.reset()
        tree = [[prepare(weight, rows) for weight in weights] for weights in tree]
        layer = torch.compile(layer, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def call() -> list[torch.Tensor]:
        return [layer(weights) for weights in tree][-1]

    return call


if __name__ == "__main__":
    main()
