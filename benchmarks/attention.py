"""What does attention that composes cost, beside torch's fused kernel, which does not, and beside
the dense route, which does?

    python benchmarks/attention.py [--fast]

One thread, 8 heads of 64 (or --size) against the fused kernel, 1 head against the dense route (it
would not fit otherwise); candidates take turns, CPU time, medians. The first table is in units of
the fused kernel's forward, beside what share of the processor's measured multiply-adds our products
are; the second in units of the fused kernel's time for the same work, the third in units of the
dense route's, and of our own full attention's.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from _peak import gigaflops
from _timing import _time
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn import native


def medians(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time, candidates taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, call in candidates.items():
            spent = _time(call).cpu
            if turn:
                seconds[name].append(spent * 1e3)
    return {name: median(times) for name, times in seconds.items()}


def inputs(H: int, T: int, D: int = 64) -> list[Tensor]:
    return [fa.random.normal(key, (1, H, T, D)) for key in fa.split(fa.key(0), 7)]


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
    shares = [
        t["ours"] / t["fused"],
        t["ours both"] / t["fused both"],
        t["ours vjp"] / t["fused both"],
        t["ours jvp"] / t["fused"],
    ]
    print(
        f"{T:>6} {t['fused']:>10.2f} ms " + " ".join(f"{share:>16.2f}" for share in shares),
        flush=True,
    )


def nestings(x: list[Tensor], mask: fa.Mask | None = None) -> dict[str, Callable[[], object]]:
    """Each nesting of derivatives, of q, k and v together."""
    q, k, v, tq, tk, tv, g = x
    primals, tangents = (q, k, v), (tq, tk, tv)
    value = lambda *x: fa.attention(*x, mask)
    gradient = lambda *x: vjp(value, *x)[1](g)
    return {
        "forward": lambda: value(*primals),
        "value and gradient": lambda: gradient(*primals),
        "value and jvp": lambda: jvp(value, primals, tangents),
        "jvp(grad)": lambda: jvp(gradient, primals, tangents),
        "grad(jvp)": lambda: vjp(lambda *x: jvp(value, x, tangents)[1], *primals)[1](g),
        "grad(grad)": lambda: vjp(gradient, *primals)[1](tangents),
    }


def products(call: Callable[[], object], x: list[Tensor]) -> float:
    """The number of products of T x S pairs with a head that torch counts in a call."""
    (_, H, T, D), S = x[0].shape, x[1].shape[-2]
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / (2 * H * T * S * D)


LEAST = {
    "forward": 2,
    "value and gradient": 7,
    "value and jvp": 6,
    "jvp(grad)": 19,
    "grad(jvp)": 16,
    "grad(grad)": 22,
}  # docs/attention.md derives them


def in_forwards(T: int, D: int, dtype: torch.dtype, repeats: int, peak: float) -> None:
    """Every nesting, full and causal, in units of torch's fused forward on the same inputs."""
    x = [y.to(dtype) for y in inputs(8, T, D)]
    q, k, v = x[:3]
    unit = lambda causal: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    calls = {"torch": unit(False), "torch causal": unit(True)}
    full, causal = nestings(x), nestings(x, fa.masks.causal(T))
    calls |= full | {f"{name} causal": call for name, call in causal.items()}
    t = medians(calls, repeats)
    name = str(dtype).removeprefix("torch.")
    print(
        f"T = {T}, D = {D}, {name}: torch's forward {t['torch']:.2f} ms, causal "
        f"{t['torch causal'] / t['torch']:.2f} of it"
    )
    for nesting, call in full.items():
        count = products(call, x)
        rate = 2 * 8 * T * T * D * count / t[nesting] / 1e6
        least = rate / peak * LEAST[nesting] / count
        share = (
            f"{rate:>6.0f} GFLOP/s {rate / peak:>5.0%} {least:>5.0%}"
            if dtype == torch.float32
            else ""
        )
        ratios = (
            f"{t[nesting] / t['torch']:>7.2f} {t[f'{nesting} causal'] / t['torch causal']:>7.2f}"
        )
        print(
            f"  {nesting:<19} {ratios} {count:>6.1f} products, least {LEAST[nesting]:>2} {share}",
            flush=True,
        )


def derivatives(
    kernel: str, T: int, mask: fa.Mask | None = None
) -> dict[str, Callable[[], object]]:
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
    parser.add_argument("--size", type=int, default=64, help="features of a head")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("nestings", "fused", "dense"), help="one table alone")
    options = parser.parse_args()
    fast = options.fast
    torch.set_num_threads(options.threads)
    print(
        f"{native.model_name()}, torch {torch.__version__}, {options.threads} thread(s), CPU "
        "time, medians"
    )
    if options.only in (None, "nestings"):
        peak = gigaflops()
        print(
            f"measured peak of one thread: {peak:.0f} GFLOP/s in float32; in units of torch's "
            "fused forward, full and causal:"
        )
        for T in (512,) if fast else (512, 2048):
            for dtype in (torch.float32, torch.bfloat16):
                in_forwards(T, options.size, dtype, 5 if fast else max(5, 4096 // T), peak)
    if options.only in (None, "fused"):
        fused_table(fast)
    if options.only in (None, "dense"):
        dense_table(fast)


def fused_table(fast: bool) -> None:
    print(
        f"{'T':>6} {'fused forward':>13} {'forward':>16} {'forward+backward':>16} {'vjp':>16} "
        f"{'jvp / forward':>16}"
    )
    for T in (128, 512) if fast else (128, 512, 1024, 2048):
        against_fused(T, 5 if fast else max(5, 20480 // T))


def dense_table(fast: bool) -> None:
    T = 1024 if fast else 4096
    print(f"\nT = {T}     flash      dense  flash/dense  causal/full")
    against_dense(T, 3)


if __name__ == "__main__":
    main()
