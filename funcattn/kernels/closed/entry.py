"""The "flash" and "triton" kernels: public arguments to autograd Functions and back.

Query heads are unflattened to (K, H / K), where k has size 1 on the second axis; masks get axes for
the heads. In torch.compile all of it is behind `nonstrict_trace`: Dynamo would otherwise inline the
autograd Functions, which loses their memory bound, or refuse them.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import native
from ...core.autograd import is_jit_traced
from ...masks import Mask
from ...records import Attended
from .. import dropout
from ..backends import WIDEST
from ..request import FEW, SMALL, Kernel, Request
from .algebra import ONES, Contraction, Output, Term
from .contractions import run
from .functions import attend as attend_in_family
from .log_sum_exp import StatisticsFunction
from .specs import AttendSpec, tensor_spec


def attend(r: Request, kernel: str = "flash") -> Attended:
    """Attention by `AttendFunction`, on the backends of a kernel (see `backends.table`)."""
    mask = () if r.mask is None else tuple(r.mask) if isinstance(r.mask, Mask) else (r.mask,)
    optional = (*mask, *(() if r.bias is None else (r.bias,)), *(() if r.key is None else (r.key,)))
    asked = (len(mask), r.bias is not None, r.dropout if r.key is not None else 0.0, kernel)
    call = torch._dynamo.nonstrict_trace(_attend) if torch.compiler.is_compiling() else _attend
    return Attended(*call(asked, r.lead, r.scale, r.q, r.k, r.v, *optional))


def statistics(r: Request, lse: Tensor) -> tuple[Tensor, Tensor]:
    """lse (*lead, H, T) in twice the precision, as a sum of two numbers, the second small.

    Both are constant to every derivative.
    """
    mask = () if r.mask is None else tuple(r.mask) if isinstance(r.mask, Mask) else (r.mask,)
    call = (
        torch._dynamo.nonstrict_trace(_statistics) if torch.compiler.is_compiling() else _statistics
    )
    return call("triton" if can_run_triton(r) else "flash", r.scale, r.q, r.k, lse, *mask)


def _statistics(kernel: str, scale: float | Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    q, k, lse, *mask = (x.detach() for x in tensors)
    H, K = q.shape[-3], k.shape[-3]
    if isinstance(scale, Tensor):
        q, scale = q * scale.detach(), 1.0
    lse_column = lse.unsqueeze(-1)
    laid = _laid(mask, H, K)
    if H != K:
        q, k, lse_column = (
            q.unflatten(-3, (K, H // K)),
            k.unsqueeze(-3),
            lse_column.unflatten(-3, (K, H // K)),
        )
    whole, rest = StatisticsFunction.apply(scale, kernel, q, k, lse_column, *laid)
    return whole.reshape(lse.shape), rest.reshape(lse.shape)


def _laid(mask: Sequence[Tensor], H: int, K: int) -> list[Tensor]:
    """Mask tensors with head axes: interval ends (*lead, T, n), or booleans of pairs."""
    if len(mask) != 2:
        return [_pairs(x, H, K) for x in mask]
    return [x.unsqueeze(-3).unsqueeze(-3) if H != K else x.unsqueeze(-3) for x in mask]


def _attend(
    asked: tuple[int, bool, float, str],
    lead: Sequence[int],
    scale: float | Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *optional: Tensor,
) -> tuple[Tensor, Tensor]:
    """The attention of tensors q, k, v and the optional tensors that `asked` describes.

    asked: the number of mask tensors, whether a bias follows, the dropout rate (if not zero, a key
    follows), and the kernel; plain Python values.
    """
    masks, biased, rate, kernel = asked
    (H, T, _), K = q.shape[-3:], k.shape[-3]
    grouped = H != K
    mask, bias = optional[:masks], optional[masks : masks + biased]
    laid = [*_laid(mask, H, K), *(_pairs(x, H, K) for x in bias)]
    # a tensor is differentiable, so it multiplies q; a number is applied to the logits in float32
    if isinstance(scale, Tensor):
        q, scale = q * scale, 1.0
    tensors = [q, k, v]
    if grouped:
        tensors = [q.unflatten(-3, (K, H // K)), k.unsqueeze(-3), v.unsqueeze(-3)]
    # a number of Python: that of a symbolic head size goes into no text of a contraction
    spec = AttendSpec(float(scale), masks, biased, kernel)
    out, lse = attend_in_family(spec, *tensors, *laid)
    if rate:
        keys = dropout.head_keys(optional[-1], (*lead, H))
        out = _dropped(
            spec,
            rate,
            [*tensors, *laid],
            lse,
            out,
            keys.unflatten(-3, (K, H // K)) if grouped else keys,
        )
    lse = lse.squeeze(-1).expand(out.shape[:-1])
    shape = (*lead, H, T)
    return out.reshape(*shape, out.shape[-1]), lse.reshape(shape)


def _dropped(
    spec: AttendSpec,
    rate: float,
    tensors: Sequence[Tensor],
    lse: Tensor,
    whole: Tensor,
    keys: Tensor,
) -> Tensor:
    """The contraction of P with dropped weights; the log-sum-exp is that without dropout."""
    q, k, v, *extra = tensors
    at = 3 + len(extra)
    contraction = Contraction(
        (Output("query", (Term((), at),)),),
        scale=spec.scale,
        mask=tuple(range(3, 3 + spec.masks)),
        bias=3 + spec.masks if spec.biased else ONES,
        dropout=at + 1,
        rate=rate,
    )
    return run(contraction, [tensor_spec(whole)], [q, k, lse, *extra, v, keys], spec.kernel)[0]


def _pairs(x: Tensor, H: int, K: int) -> Tensor:
    """A tensor that broadcasts to (*lead, H, T, S), as (*lead, K, H / K, T, S) if grouped."""
    x = x.reshape(*[1] * (3 - x.dim()), *x.shape) if x.dim() < 3 else x
    if H == K:
        return x
    return x.unsqueeze(-3) if x.shape[-3] == 1 else x.unflatten(-3, (K, H // K))


TRITON = importlib.util.find_spec("triton") is not None  # installed; it is imported on first use


def _why_not_triton(r: Request) -> str:
    if not TRITON:
        return "Triton is not installed: pip install funcattn[triton]"
    if r.q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return (
            f"for CUDA, not for {r.q.device.type} (where TRITON_INTERPRET=1 interprets it, slowly)"
        )
    if r.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"float32, float16 and bfloat16 only, not {r.q.dtype}"
    if max(r.q.shape[-1], r.v.shape[-1]) > WIDEST:
        return f"heads of at most {WIDEST} features, not {max(r.q.shape[-1], r.v.shape[-1])}"
    if r.bias is not None:
        return "takes no dense bias"
    if isinstance(r.mask, Tensor):
        return "takes a Mask of intervals, not booleans"
    if (
        r.q.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and torch.cuda.is_available()
    ):
        card = torch.cuda.get_device_capability(r.q.device)
        return (
            ""
            if card >= (8, 0)
            else f"needs compute capability 8.0 (A100 and newer), this is {card[0]}.{card[1]}"
        )
    return ""


def can_run_triton(r: Request) -> bool:
    """True for a CUDA request that the Triton kernels can run."""
    return r.q.device.type == "cuda" and not _why_not_triton(r)


def is_exporting_strictly() -> bool:
    """True inside torch.export with strict=True, where Dynamo refuses nonstrict_trace."""
    return torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def _why_not_flash(r: Request) -> str:
    return (
        "torch.export with strict=True takes plain operations alone"
        if is_exporting_strictly()
        else ""
    )


def _why_not_traced() -> str:
    return "torch.jit traces plain operations" if is_jit_traced() else ""


def _passed_over(r: Request) -> str:
    if traced := _why_not_traced():
        return traced
    if r.small and not torch.compiler.is_compiling():
        return f"for at most {SMALL} pairs of a query and a key the dense form is cheaper"
    return f"for at most {FEW} queries the dense form is cheaper" if r.q.shape[-2] <= FEW else ""


def _passed_over_triton(r: Request) -> str:
    return "interpreted: for tests" if r.q.device.type != "cuda" else _passed_over(r)


FLASH = Kernel(
    "flash",
    "the closed streaming family: every transform, O(T + S) memory",
    _why_not_flash,
    attend,
    _passed_over,
)
TRITON_KERNEL = Kernel(
    "triton",
    "the closed streaming family in kernels for CUDA: every transform, O(T + S) memory",
    lambda r: _why_not_flash(r) or _why_not_triton(r),
    functools.partial(attend, kernel="triton"),
    _passed_over_triton,
)


@torch.compiler.assume_constant_result
def _why_no_library() -> str:
    return native.load()


def _passed_over_native(r: Request) -> str:
    if traced := _why_not_traced():
        return traced
    (H, T), (K, S) = r.q.shape[-3:-1], r.k.shape[-3:-1]
    # Values alone: one call, where dense ones are several. A long past that one query reads is read
    # faster by a product of torch's.
    if not r.recorded and (T * S <= SMALL or T * H > K):
        return ""
    many = 4 <= T <= FEW and T * S >= MANY
    return "" if many and not torch.compiler.is_compiling() else _passed_over(r)


def _why_not_native(r: Request) -> str:
    if r.q.device.type != "cpu":
        return f"for the CPU, not for {r.q.device.type}"
    if r.q.dtype not in NATIVE_DTYPES or (r.bias is not None and r.bias.dtype == torch.float64):
        return "float32, bfloat16 and float16 only"
    return _why_not_flash(r) or _why_not_traced() or _why_no_library()


MANY = 2**13  # pairs of a few queries and their keys, from which the native kernel is cheaper
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = Kernel(
    "native",
    "the closed streaming family in C++ for the CPU: every transform, O(T + S) memory",
    _why_not_native,
    functools.partial(attend, kernel="native"),
    _passed_over_native,
)
