"""How fast is attention that composes on a GPU, beside each of torch's kernels, flex_attention and
jax?

    python benchmarks/attention_cuda.py [--heads 16] [--tokens 32768] [--sizes 64 128] [--longest
    32768]

bfloat16, T from 512 on with as many sequences as make `tokens`, full and causal. TFLOP/s count two
products of T x S for a forward (half of them under a causal mask), five for a backward; their share
is that of a measured matrix product. A jvp is in units of our own forward; the memory of an hvp
should double when T does.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _cuda import matmul_ceiling, milliseconds, peak_bytes, require
from torch import Tensor
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcattn as fa

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
Call = Callable[[], Any]


def inputs(B: int, H: int, T: int, D: int) -> tuple[Tensor, ...]:
    """q, k, v and a direction."""
    with torch.device("cuda"):
        return tuple(
            fa.random.normal(key, (B, H, T, D), torch.bfloat16) for key in fa.split(fa.key(0), 4)
        )


def forwards(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Call]:
    """Value of each candidate that runs here."""
    ours = forwards_of(causal, q.shape[-2])

    def torchs(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    candidates: dict[str, Call] = {"funcattn": lambda: ours(q, k, v)}
    candidates |= {
        f"sdpa {name}": lambda backend=backend: torchs(backend)
        for name, backend in BACKENDS.items()
    }
    candidates["flex"] = flex(q, k, v, causal)
    return {name: call for name, call in candidates.items() if runs(name, call)}


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """torch's flex_attention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.shape[-2]
    mask = (
        create_block_mask(lambda b, h, query, key: key <= query, None, None, T, T, device="cuda")
        if causal
        else None
    )
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)


def runs(name: str, call: Call) -> bool:
    """True where a candidate gives a value here; says so where it does not."""
    try:
        call()
    except Exception as error:
        print(f"    {name} does not run here: {str(error).splitlines()[0][:100]}")
        return False
    return True


def backward(call: Call, leaves: tuple[Tensor, ...], g: Tensor) -> Call:
    """Value and gradient of all three inputs."""
    return lambda: torch.autograd.grad(call(), leaves, g)


def jax_jvp(B: int, H: int, T: int, D: int, causal: bool) -> float | None:
    """Milliseconds of jax's jvp of its attention, which holds T x T, where jax sees the GPU."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    if jax.default_backend() != "gpu" or T > 8192:
        return None
    x = jnp.ones((B, T, H, D), jnp.bfloat16)
    f = jax.jit(
        lambda x: jax.jvp(
            lambda y: jax.nn.dot_product_attention(y, x, x, is_causal=causal), (x,), (x,)
        )
    )
    return milliseconds(lambda: jax.block_until_ready(f(x)))


def table(D: int, T: int, options: argparse.Namespace, ceiling: float, causal: bool) -> None:
    """All of one length."""
    B, H = max(1, options.tokens // T), options.heads
    q, k, v, t = inputs(B, H, T, D)
    # of T x T, in the TFLOP/s of one millisecond
    product = 2 * B * H * T * T * D * (0.5 if causal else 1.0) / 1e9
    calls = forwards(q, k, v, causal)
    if T <= 4096 and not causal:
        wanted = fa.attention(*(x[:1, :1].float() for x in (q, k, v)), kernel="reference")
        print(
            "    greatest difference from float32: "
            f"{(calls['funcattn']()[:1, :1] - wanted).abs().max().item():.1e}"
        )
    values = {name: milliseconds(call) for name, call in calls.items()}
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    both = {
        name: milliseconds(backward(call, leaves, t))
        for name, call in forwards(*leaves, causal).items()
    }
    what = f"{D:>4} {T:>6} {'causal' if causal else 'full':>6}"
    for name in values:
        print(
            f"{what} {name:<14} {rates(values, name, 2 * product, ceiling)}   "
            f"{rates(both, name, 7 * product, ceiling)}",
            flush=True,
        )
    q, k, v = (x.detach() for x in leaves)
    f = forwards_of(causal, T)
    loss = lambda *x: f(*x).float().square().sum()
    pushed = milliseconds(lambda: jvp(f, (q, k, v), (t, t, t))) / values["funcattn"]
    hvp = lambda: jvp(grad(loss, (0, 1, 2)), (q, k, v), (t, t, t))
    peer = jax_jvp(B, H, T, D, causal)
    told = "" if peer is None else f", jax's {peer / values['funcattn']:.1f}"
    print(
        f"    jvp {pushed:.2f} forwards{told}; hvp {milliseconds(hvp):.2f} ms, "
        f"{peak_bytes(hvp) / 2**20:.0f} MiB",
        flush=True,
    )


def rates(times: dict[str, float], name: str, work: float, ceiling: float) -> str:
    """Milliseconds, TFLOP/s, their share of the ceiling, and the time of the best peer over this
    one.
    """
    if name not in times:
        return "-"
    best = min((x for other, x in times.items() if other != "funcattn"), default=float("nan"))
    rate = work / times[name]
    return (
        f"{times[name]:>9.3f} ms {rate:>5.0f} TFLOP/s {rate / ceiling:>4.0%} "
        f"{best / times[name]:>5.2f}"
    )


def forwards_of(causal: bool, T: int) -> Callable[..., Tensor]:
    """Our attention with its mask."""
    with torch.device("cuda"):
        mask = fa.masks.causal(T) if causal else None
    return lambda q, k, v: fa.attention(q, k, v, mask, kernel="triton")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--longest", type=int, default=32768)
    options = parser.parse_args()
    device, ceiling = require("attention_cuda"), matmul_ceiling()
    print(
        f"{device}, torch {torch.__version__}, bfloat16, a matrix product gives {ceiling:.0f} "
        "TFLOP/s"
    )
    print(
        "   D      T   mask candidate            forward                of it  best/  "
        "forward+backward              best/"
    )
    for D in options.sizes:
        for causal in (False, True):
            T = 512
            while options.longest >= T:
                table(D, T, options, ceiling, causal)
                T *= 2
    print("\nhvp of one head of 64, causal: MiB should double with T")
    for T in (16384, 32768, 65536):
        q, k, v, t = inputs(1, 1, T, 64)
        call = functools.partial(hessian_product, forwards_of(True, T), q, k, v, t)
        print(f"{T:>6} {peak_bytes(call) / 2**20:>8.0f} MiB")


def hessian_product(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Of a loss of attention, in its queries."""
    loss = lambda q: f(q, k, v).float().square().sum()
    return jvp(grad(loss), (q,), (t,))[1]


if __name__ == "__main__":
    main()
