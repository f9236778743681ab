"""What does a step of MeanFlow cost, a gradient through a forward derivative of a whole model, in each kernel of attention?

    python benchmarks/meanflow.py [--tokens 256] [--layers 4]

A transformer of images (DiT) with `layers` blocks of width 256 (4 heads of 64), one thread, float32. The average velocity
u(z, r, t) should satisfy u = v - (t - r) du/dt, where du/dt is the jvp of u along (v, 0, 1); the loss is the square of the
difference, differentiated as a whole. Candidates run the same model and take turns, CPU time, medians. "before" is a
step before the library had kernels and products of its own: torch's fused kernel of attention, torch's norm (whose
gradient of a jvp is wrong, pytorch#196700, and which is the faster one), torch's products. The others are inside
`fa.interop.closed()`. "without" returns the values in place of their attention: what the rest of the model takes, below
which no kernel comes.

Source: Geng et al., Mean flows for one-step generative modeling, arXiv:2505.13447, equation 6, without its stop-gradient.
"""

import argparse
import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import interleave
from torch import Tensor
from torch.func import grad, jvp

import funcattn as fa

WIDTH, HEADS = 256, 4
Weights = dict[str, Tensor]
attention = fa.attention


def weights(layers: int) -> Weights:
    """The parameters of all blocks, stacked."""
    shapes = {
        "time": (2, WIDTH),
        "qkv": (layers, 3 * WIDTH, WIDTH),
        "out": (layers, WIDTH, WIDTH),
        "up": (layers, 4 * WIDTH, WIDTH),
        "down": (layers, WIDTH, 4 * WIDTH),
        "modulation": (layers, 2 * WIDTH, WIDTH),
    }
    keys = fa.split(fa.key(0), len(shapes))
    return {
        name: fa.random.normal(key, shape) * shape[-1] ** -0.5
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def right_norm(x: Tensor) -> Tensor:
    """Not F.layer_norm, whose gradient of a jvp is wrong in PyTorch (pytorch#196700)."""
    return fa.layers.layer_norm(x, torch.ones(WIDTH), epsilon=1e-5)


def torchs_norm(x: Tensor) -> Tensor:
    """What a step took before."""
    return F.layer_norm(x, (WIDTH,), torch.ones(WIDTH), None, 1e-5)


norm = right_norm


def velocity(params: Weights, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """u (T, WIDTH) of z (T, WIDTH) between the times r and t."""
    condition = torch.stack([r, t]) @ params["time"]
    x = z
    for layer in range(params["qkv"].shape[0]):
        shift, scale = (params["modulation"][layer] @ condition.sin()).chunk(2)
        y = norm(x) * (1 + scale) + shift
        heads = (y @ params["qkv"][layer].mT).unflatten(-1, (3 * HEADS, -1)).transpose(0, 1)
        attended = attention(*heads.chunk(3))
        x = x + attended.transpose(0, 1).flatten(-2) @ params["out"][layer].mT
        y = norm(x)
        x = x + F.gelu(y @ params["up"][layer].mT) @ params["down"][layer].mT
    return x


def loss(params: Weights, z: Tensor, v: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """The square of what is missing in the identity of the average velocity."""
    zero, one = torch.zeros_like(r), torch.ones_like(t)
    u, du = jvp(lambda z, r, t: velocity(params, z, r, t), (z, r, t), (v, zero, one))
    return (u - (v - (t - r) * du)).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = weights(options.layers)
    z, v = fa.random.normal(fa.key(1), (2, options.tokens, WIDTH))
    r, t = torch.tensor(0.2), torch.tensor(0.7)

    def step(
        kernel: str | None, closed: bool = True, by: Callable[[Tensor], Tensor] = right_norm
    ) -> Weights:
        global attention, norm
        attention, norm = (lambda q, k, v: v) if kernel == "without" else fa.attention, by
        with contextlib.ExitStack() as stack:
            if closed:
                stack.enter_context(fa.interop.closed())
            if kernel not in (None, "without"):
                stack.enter_context(fa.kernels.use(kernel))
            return grad(loss)(params, z, v, r, t)

    kernels = {"flash": "flash", "as chosen": None, "dense": "reference", "without": "without"}
    before = {"before": lambda: step("flash", closed=False, by=torchs_norm)}
    exact = step("reference", closed=False)
    for kernel in ("flash", None):
        off = max(
            float((a - b).norm() / b.norm())
            for a, b in zip(step(kernel).values(), exact.values(), strict=True)
        )
        print(
            f"{kernel or 'as chosen'}: gradients differ from the dense ones by {off:.1e} of their norm at most"
        )
    interleave(
        before | {name: lambda kernel=kernel: step(kernel) for name, kernel in kernels.items()},
        repeats=options.repeats,
    )


if __name__ == "__main__":
    main()
