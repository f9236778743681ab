"""The "sdpa" kernels: torch's F.scaled_dot_product_attention, its speed and its limitations."""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core import errors
from ..core.autograd import transforming
from ..masks import Mask
from ..records import Attended
from . import reference, unseen
from .backends import aten, layout, masking, torch_blocks
from .closed import entry
from .request import FEW, Kernel, Request

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    *,
    scale: float,
    bias: Tensor | None = None,
    causal: bool = False,
    backend: str = "",
) -> Tensor:
    """Attention by F.scaled_dot_product_attention, with a given backend of torch if it is named.

    `causal` says that the mask is the plain causal one, which is then passed as is_causal.
    """
    if aten.is_empty(q, k, v):  # torch's kernels refuse empty inputs
        return reference.attend(q, k, v, mask, scale=scale, bias=bias).out
    seen = None if mask is None or causal else reference.visible(mask, k.shape[-2])
    if bias is not None:
        bias = bias.to(torch.promote_types(q.dtype, bias.dtype))  # added in the wider dtype
        seen = bias if seen is None else torch.where(seen, bias, float("-inf"))
    lead = layout.broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            layout.in_rows(_four(q, lead)),
            layout.in_rows(_four(k, lead)),
            layout.in_rows(_four(v, lead)),
            attn_mask=None if seen is None else _four(seen, lead),
            is_causal=causal,
            scale=scale,
            enable_gqa=bool(q.shape[-3] != k.shape[-3]),  # a tensor while torch.jit traces
        )
    return out.reshape(*lead, *out.shape[1:])


def _four(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(*lead, H, A, B) with exactly one leading axis: with others torch takes its dense path."""
    if len(lead) <= 1 and x.shape[:-3] == lead:
        return x if lead else x.unsqueeze(0)
    x = x.reshape(*[1] * (len(lead) + 3 - x.dim()), *x.shape)
    if all(n == 1 for n in x.shape[: len(lead)]):
        return x.reshape(1, *x.shape[-3:]).expand(math.prod(lead), *x.shape[-3:])
    return x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:])


def run(r: Request, backend: str = "") -> Attended:
    """Attention by torch's kernel, or flash where that loses precision or leaks hidden NaN."""
    if _may_be_far(r):
        # torch's backward reads the log-sum-exp as one number, which loses the normalizer there.
        return entry.attend(r)
    k, v = r.k, r.v
    # Off the CPU, checking the output would synchronize: hidden keys are removed beforehand.
    if r.q.device.type != "cpu" and r.mask is not None:
        _, k, v, *_ = unseen.take_out(r.q, r.k, r.v, r.mask)
    out = attention(
        r.q, k, v, r.mask, scale=float(r.scale), bias=r.bias, causal=r.causal, backend=backend
    )
    hides = (
        (r.mask is not None or r.bias is not None)
        and out.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )
    if hides and not transforming() and not masking.is_finite([out]):
        return entry.attend(r)  # torch's kernels give hidden keys weight zero, and 0 * NaN is NaN
    return Attended(out, out.new_zeros(()))


def _may_be_far(r: Request) -> bool:
    """True where derivatives may follow and logits may exceed `torch_blocks.FAR`; False if
    unknown.
    """
    if torch.compiler.is_compiling() or not r.recorded:
        return False
    found = [None if x is None else errors.peek(x) for x in (r.q, r.k, r.bias)]
    q, k, bias = (
        None if x is None or x.device.type != "cpu" or not x.numel() else x for x in found
    )
    if q is None or k is None:
        return False
    length = lambda x: (
        float(x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1).amax()) ** 0.5
    )
    reach = abs(float(r.scale)) * length(q) * length(k)
    return (
        not reach + (0 if bias is None else float(torch.where(bias.isinf(), 0, bias).abs().amax()))
        <= torch_blocks.FAR
    )


def _why_not(r: Request) -> str:
    if r.wants_lse:
        return "does not return the log-sum-exp"
    if isinstance(r.scale, Tensor):
        return "scale is a tensor"
    if r.dropout:
        return "draws dropout from torch's global generator, not from a key"
    if r.bias is not None:
        wider = torch.promote_types(r.q.dtype, r.bias.dtype)
        if wider != r.q.dtype and (wider != torch.float32 or r.q.device.type != "cpu"):
            return f"would round the bias to {r.q.dtype}"
    return ""


def _why_not_flash(r: Request) -> str:
    if r.v.shape[-1] != r.q.shape[-1]:
        return f"values of {r.v.shape[-1]} features, keys of {r.q.shape[-1]}"
    if r.q.device.type == "cuda" and ((r.mask is not None and not r.causal) or r.bias is not None):
        return "takes no mask but the causal one"
    if r.q.device.type == "cuda" and r.q.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 and bfloat16 only, not {r.q.dtype}"
    return _why_not(r)


def _why_not_cuda(r: Request) -> str:
    return f"for CUDA, not for {r.q.device.type}" if r.q.device.type != "cuda" else _why_not(r)


def _passed_over(r: Request) -> str:
    if torch.compiler.is_compiling():
        return "compiled: whether a derivative follows is unknown"
    if torch._C._is_tracing():
        return "torch.jit traces plain operations"
    if r.q.device.type == "cpu" and torch._C._len_torch_dispatch_stack():
        return (
            "a dispatch mode is active, such as FlopCounterMode, which has no formula for torch's "
            "CPU kernel"
        )
    if isinstance(r.mask, Mask) and entry.can_run_triton(r):
        return "testing whether the mask is causal would synchronize the device"
    if isinstance(r.mask, Mask) and not r.causal and r.q.shape[-2] > FEW:
        return "would materialize the mask, T x S"
    return ""


def _passed_over_where_recorded(r: Request) -> str:
    if not torch.compiler.is_compiling() and r.recorded:
        return "a derivative may follow: it has no jvp and no second derivative"
    return _passed_over(r)


SDPA = Kernel(
    "sdpa",
    "torch's F.scaled_dot_product_attention, which chooses one of the four below",
    _why_not,
    run,
    _passed_over_where_recorded,
)
FLASH = Kernel(
    "sdpa:flash",
    "torch's fused kernel: first gradient, no jvp, no second derivative",
    _why_not_flash,
    functools.partial(run, backend="flash"),
    _passed_over_where_recorded,
)
EFFICIENT = Kernel(
    "sdpa:efficient",
    "torch's memory-efficient kernel: first gradient",
    _why_not_cuda,
    functools.partial(run, backend="efficient"),
    _passed_over,
)
CUDNN = Kernel(
    "sdpa:cudnn",
    "cuDNN's kernel: first gradient",
    _why_not_cuda,
    functools.partial(run, backend="cudnn"),
    _passed_over,
)
MATH = Kernel(
    "sdpa:math",
    "torch's dense route: composes, O(T S) memory",
    _why_not,
    functools.partial(run, backend="math"),
    _passed_over,
)
