"""The "native" backend: attention and its tangent in C++, for CPUs with AVX2 or AVX-512.

One pass over blocks of keys, with products of its own (`native/attention`). Keys are packed once
for all query heads that share them; leading axes broadcast by strides, and no input is expanded.
Blocks that an interval mask hides are skipped. Logits and sums are float32, or, with the AVX-512
instructions for bfloat16 and if all inputs have that dtype, products of bfloat16 summed in float32.

A call with a result or a logit that is not finite returns None, so the next backend computes it: a
hidden key may be NaN, which has to change nothing, and products overflow here where they do not in
its order (those of bfloat16 are scaled after they are summed).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import native
from . import torch_attend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
MOST_AXES = 24  # leading axes; AXES in native/attention/attention.h


def why_not_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor] = (), bias: Tensor | None = None
) -> str:
    """The reason why the kernel cannot run on these, or ""."""
    floats = [q, k, v] if bias is None else [q, k, v, bias]
    for x in (*floats, *mask):
        if not x.is_cpu:
            return f"on {x.device.type}, and it runs on CPU"
        if not x.numel():
            return "a size is zero"
        if x.dim() > MOST_AXES + 2:
            return f"more than {MOST_AXES} leading axes"
    for x in floats:
        if x.dtype not in FLOATS:
            return f"of dtype {x.dtype}, and it computes in float32"
    if (len(mask) == 1 and mask[0].dtype != torch.bool) or (
        len(mask) == 2 and any(x.dtype not in INTEGERS for x in mask)
    ):
        return "masks are booleans, or intervals of integers"
    return native.load()


def why_not_attend_jvp(q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor] = ()) -> str:
    """The reason why the kernel with tangents cannot run on these, or ""."""
    return why_not_attend(q, k, v, mask)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Sequence[Tensor] = (),
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor] | None:
    """Streaming softmax: out (*lead, T, Dv) in the dtype of v, and lse (*lead, T, 1) in float32.

    lse has no leading axes that only v has.
    """
    out, lse, is_finite = torch.ops.funcattn.native_attend(q, k, v, list(mask), bias, scale)
    return (out, lse) if is_finite else None


def attend_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: Sequence[Tensor | None],
    mask: Sequence[Tensor] = (),
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """out and lse, and their tangents from those of q, k and v (None: no tangent), in one pass.

    Leading axes that only tangents have are axes of the tangents of out and lse; those that only v
    and its tangent have are no axes of the tangent of lse.
    """
    dq, dk, dv = tangents
    out, lse, dout, dlse, is_finite = torch.ops.funcattn.native_attend_jvp(
        q, k, v, dq, dk, dv, list(mask), scale
    )
    return (out, lse, dout, dlse) if is_finite else None


def can_attend_rows(q: Tensor) -> bool:
    """True where `attend_rows` runs on tensors of this dtype and device that are not empty."""
    return q.dtype in FLOATS and q.device.type == "cpu" and not native.load()


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, R, Dv) and lse (B, R, 1) of q (B, R, D), k (B, S, D) and v (B, S, Dv), unmasked."""
    found = attend(q, k, v, scale=scale)
    return torch_attend.attend(q, k, v, scale=scale) if found is None else found
