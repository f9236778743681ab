"""What does attention that composes cost, beside torch's fused kernel, which does not, and beside the dense route, which does?

    python benchmarks/attention.py [--fast]

One thread, float32, 8 heads of 64 against the fused kernel, 1 head against the dense route (it would not fit otherwise);
candidates take turns, CPU time, medians. The first table is in units of the fused kernel's time for the same work (for jvp:
of its forward), the second in units of the dense route's, the third of our own full attention's.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from _timing import _time
from torch import Tensor
from torch.func import grad, jvp, vjp

import funcattn as fa


def medians(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time, candidates taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, call in candidates.items():
            spent = _time(call).cpu
            if turn:
                seconds[name].append(spent * 1e3)
    return {name: median(times) for name, times in seconds.items()}


def inputs(H: int, T: int) -> list[Tensor]:
    return [fa.random.normal(key, (1, H, T, 64)) for key in fa.split(fa.key(0), 7)]


def against_fused(T: int, repeats: int) -> None:
    q, k, v, tq, tk, tv, g = inputs(8, T)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    fused = F.scaled_dot_product_attention
    both = lambda f: lambda: torch.autograd.grad(f(*leaves), leaves, g)
    t = medians(
        {
            "fused": lambda: fused(q, k, v),
            "ours": lambda: fa.attention(q, k, v),
            "fused both": both(fused),
            "ours both": both(fa.attention),
            "ours vjp": lambda: vjp(fa.attention, q, k, v)[1](g),
            "ours jvp": lambda: jvp(fa.attention, (q, k, v), (tq, tk, tv)),
        },
        repeats,
    )
    shares = [t["ours"] / t["fused"], t["ours both"] / t["fused both"], t["ours vjp"] / t["fused both"], t["ours jvp"] / t["fused"]]
    print(f"{T:>6} {t['fused']:>10.2f} ms " + " ".join(f"{share:>16.2f}" for share in shares), flush=True)


def derivatives(kernel: str, T: int, mask: fa.Mask | None = None) -> dict[str, Callable[[], object]]:
    q, k, v, t, *_ = inputs(1, T)
    value = lambda q: fa.attention(q, k, v, mask, kernel=kernel)
    loss = lambda q: value(q).square().sum()
    return {
        "forward": lambda: value(q),
        "grad": lambda: grad(loss)(q),
        "jvp": lambda: jvp(value, (q,), (t,)),
        "jvp(grad)": lambda: jvp(grad(loss), (q,), (t,)),
        "grad(jvp)": lambda: grad(lambda q: jvp(loss, (q,), (t,))[1])(q),
        "grad(grad)": lambda: grad(lambda q: (grad(loss)(q) * t).sum())(q),
    }


def against_dense(T: int, repeats: int) -> None:
    routes = {
        "flash": derivatives("flash", T),
        "dense": derivatives("reference", T),
        "causal": derivatives("flash", T, fa.masks.causal(T)),
    }
    for name in routes["flash"]:
        t = medians({route: calls[name] for route, calls in routes.items()}, repeats)
        ratios = f"{t['flash'] / t['dense']:>12.2f} {t['causal'] / t['flash']:>12.2f}"
        print(f"{name:<11} {t['flash']:>8.0f} ms {t['dense']:>8.0f} ms {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="fewer lengths and rounds")
    fast = parser.parse_args().fast
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, CPU time, medians")
    print(f"{'T':>6} {'fused forward':>13} {'forward':>16} {'forward+backward':>16} {'vjp':>16} {'jvp / forward':>16}")
    for T in (128, 512) if fast else (128, 512, 1024, 2048):
        against_fused(T, 5 if fast else max(5, 20480 // T))
    T = 1024 if fast else 4096
    print(f"\nT = {T}     flash      dense  flash/dense  causal/full")
    against_dense(T, 3)


if __name__ == "__main__":
    main()
