"""How long does the native backend take for attention and its tangent, in units of torch's fused
forward?

    python benchmarks/native_attention.py [--fast] [--threads N]

8 heads, T queries and keys; candidates take turns, CPU time of the process (wall time with several
threads), least of several. `value+jvp` has tangents of q, k and v; its unit is torch's forward too.
The last columns are GFLOP/s of products.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from funcattn import masks
from funcattn.kernels.backends import native

H = 8


def least(
    candidates: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of each candidate, the least of several; they take turns."""
    spent = {name: float("inf") for name in candidates}
    for turn in range(repeats + 1):
        for name, call in candidates.items():
            begun = clock()
            call()
            if turn:
                spent[name] = min(spent[name], clock() - begun)
    return spent


def measure(
    dtype: torch.dtype, T: int, D: int, causal: bool, repeats: int, clock: Callable[[], float]
) -> None:
    q, k, v, dq, dk, dv = (torch.randn(1, H, T, D).to(dtype) for _ in range(6))
    if reason := native.why_not_attend_jvp(q, k, v, (dq, dk, dv)):
        raise SystemExit(reason)
    mask = tuple(masks.causal(T)) if causal else ()
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    for found in (
        native.attend(q, k, v, mask, None, D**-0.5),
        native.attend_jvp(q, k, v, (dq, dk, dv), mask, D**-0.5),
    ):
        assert found is not None
        torch.testing.assert_close(
            found[0].double(), wanted, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0
        )
    times = least(
        {
            "fused": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
            "value": lambda: native.attend(q, k, v, mask, None, D**-0.5),
            "jvp": lambda: native.attend_jvp(q, k, v, (dq, dk, dv), mask, D**-0.5),
        },
        repeats,
        clock,
    )
    pairs = H * T * (T + 1) / 2 if causal else H * T * T
    rates = [
        n * pairs * D / times[name] / 1e9 for name, n in (("fused", 4), ("value", 4), ("jvp", 12))
    ]
    print(
        f"{str(dtype).removeprefix('torch.'):>9} {T:>5} {D:>4} {'causal' if causal else 'full':>7} "
        f"{times['fused'] * 1e3:>9.2f} ms"
        f" {times['value'] / times['fused']:>9.2f} {times['jvp'] / times['fused']:>10.2f}   "
        + " ".join(f"{r:>6.0f}" for r in rates),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    print(
        f"{'dtype':>9} {'T':>5} {'D':>4} {'mask':>7} {'fused':>12} {'value':>9} "
        f"{'value+jvp':>10}   GFLOP/s: fused, value, jvp"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for D in (64,) if given.fast else (64, 128):
            for T in (64, 512) if given.fast else (16, 64, 512, 2048):
                for causal in (False, True):
                    measure(dtype, T, D, causal, 12 if T >= 2048 else 40, clock)


if __name__ == "__main__":
    main()
