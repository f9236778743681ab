"""Products of float32 matrices with many vectors on the CPU, by whichever library is faster here.

    multiply    x W^T by the C++ operator funcattn::linear, or None where F.linear should compute it
    explain     which of the two this processor runs faster, as a sentence

torch's library (MKL) is tuned for processors of its maker. On others the operator, which packs a
panel of the matrix and multiplies it by all vectors, is up to twice as fast. Both are timed once,
at the first product that is large enough, and their ratio is kept in the folder of operators for
this processor and torch: the next process takes the same library, and gives the same bits.

Under autograd the gradient of x is such a product too. Transforms of torch.func, autocast,
torch.compile and dispatch modes get F.linear.
"""

import contextlib
import hashlib
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingModuleSource]

from .. import native
from ..core import atomic
from ..core.autograd import Context, has_tangent, is_jit_traced, transforming
from ..native import building

MIN_ROWS = 16  # vectors; for fewer, reading the matrix is what takes the time
MIN_PRODUCTS = 2**22  # multiplications (0.1 ms); below, the calls cost as much as is gained
MIN_GAIN = 1.1  # the operator's speed, in times torch's, from which it runs
LEVEL = 0.9  # from which an operator of all layers gains: products are four fifths of a prompt
TIMED = 512, 1536, 576  # T, N, K of the timed product: 10 ms
ROUNDS = 9


class Measured(NamedTuple):
    """The operator's speed in times torch's; 0 where there is no operator, with the reason."""

    ratio: float
    why_not: str = ""


def multiply(weight: Tensor, x: Tensor) -> Tensor | None:
    """x (*lead, K) times weight (N, K), or None where F.linear is to compute it.

    Law: the product, and its gradients of every order, in every layout of the operands
        (test_dense_products.py::test_it_is_the_product_in_every_layout,
        ::test_gradients_are_those_of_linear).
    Law: a row of the result depends on that row of x alone, bit for bit
        (test_dense_products.py::test_a_row_is_the_same_among_any_others).
    """
    if not _is_served(weight, x) or not is_faster():
        return None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    recorded = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
    y = (_Linear.apply if recorded else torch.ops.funcattn.linear)(weight, rows)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], len(weight))


def is_faster() -> bool:
    """True where the operator runs, `MIN_GAIN` times as fast as torch's library at least."""
    return measured().ratio >= MIN_GAIN


def is_level() -> bool:
    """True where it is about as fast: of use to what does more than products in the operator."""
    return measured().ratio >= LEVEL


def explain() -> str:
    """Which library multiplies matrices of float32 with many vectors, and why."""
    ratio, why_not = measured()
    if why_not:
        return f"float32 products of {MIN_ROWS} rows and more: by torch; no operator: {why_not}"
    by = "the operator funcattn::linear" if ratio >= MIN_GAIN else "torch"
    return (
        f"float32 products of {MIN_ROWS} rows and more: by {by}; on this processor the operator "
        f"is {ratio:.2f} times as fast as torch's"
    )


def _is_served(weight: Tensor, x: Tensor) -> bool:
    """True for plain float32 matrices on the CPU, large enough, outside of transforms and modes."""
    plain = (Tensor, torch.nn.Parameter)
    if type(x) not in plain or type(weight) not in plain or x.dim() < 2 or weight.dim() != 2:
        return False
    N, K = weight.shape
    if x.shape[-1] != K or x.numel() < MIN_ROWS * K or x.numel() * N < MIN_PRODUCTS:
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if x.device.type != "cpu" or weight.device.type != "cpu" or 1 not in weight.stride():
        return False
    if torch.compiler.is_compiling() or transforming() or is_jit_traced():
        return False
    if is_legacy_batchedtensor(weight) or is_legacy_batchedtensor(x):  # of is_grads_batched
        return False
    if _len_torch_dispatch_stack() or _len_torch_function_stack() or _is_any_autocast_enabled():
        return False
    return not has_tangent(weight, x)


class _Linear(torch.autograd.Function):
    """x W^T of rows x. The gradient of x is such a product; that of W sums over rows, by torch."""

    @staticmethod
    def forward(weight: Tensor, x: Tensor) -> Tensor:
        return torch.ops.funcattn.linear(weight, x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Context, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        of_weight = of_x = None
        if ctx.needs_input_grad[0]:
            of_weight = cotangent.transpose(0, 1) @ x
        if ctx.needs_input_grad[1]:
            of_x = multiply(weight.transpose(0, 1), cotangent)
            of_x = cotangent @ weight if of_x is None else of_x
        return of_weight, of_x


# The measurement.


@native.once
def measured() -> Measured:
    """The ratio kept for this processor, or timed now and kept."""
    if why_not := native.load():
        return Measured(0.0, why_not)
    with contextlib.suppress(building.Missing, OSError, ValueError):
        return Measured(float(_file().read_text()))
    ratio = _timed()
    with contextlib.suppress(building.Missing, OSError), atomic.file(_file()) as draft:
        draft.write_text(f"{ratio:.3f}")
    return Measured(ratio)


def _file() -> Any:
    """Where the ratio is kept: by processor, torch, and what the operator is."""
    sources = (building.SOURCES[0].with_name(name) for name in ("dense.cpp", "dense.h"))
    parts = [building.processor(), torch.__version__, *(source.read_text() for source in sources)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return building.folder() / f"linear-{name}.txt"


def _timed() -> float:
    """The time of torch's product over that of the operator: the least of several, in turns."""
    T, N, K = TIMED
    weight, x = (torch.ones(n, K, dtype=torch.float32, device="cpu") for n in (N, T))
    candidates = F.linear, lambda x, weight: torch.ops.funcattn.linear(weight, x)
    least = [float("inf")] * 2
    with torch.no_grad():
        for _ in range(1 + ROUNDS):
            for i, candidate in enumerate(candidates):
                begun = time.process_time()
                candidate(x, weight)
                least[i] = min(least[i], time.process_time() - begun)
    return least[0] / least[1]
