"""The checks of the arguments of attention, once for all of its public functions."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import errors
from ..masks import Mask
from .backends import layout
from .request import Request


def no_autocast(q: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast: operations keep their inputs' dtypes, statistics are float32."""
    return (
        torch.autocast(q.device.type, enabled=False)
        if is_under_autocast(q)
        else contextlib.nullcontext()
    )


def is_under_autocast(q: Tensor) -> bool:
    """True where autocast is enabled on the device of q."""
    return q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)


def request(
    door: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    scale: float | Tensor | None,
    bias: Tensor | None,
    *,
    dropout: float = 0.0,
    key: Tensor | None = None,
    wants_lse: bool = False,
) -> Request:
    """The checked arguments of a public function `door` as a Request; errors name that function."""
    if isinstance(q, Tensor) and is_under_autocast(q):  # as torch's own attention does
        narrow = torch.get_autocast_dtype(q.device.type)
        cast = lambda x: (
            x.to(narrow)
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            else x
        )
        q, k, v = cast(q), cast(k), cast(v)
    for name, x, letters in (
        ("q", q, "(*lead, H, T, D)"),
        ("k", k, "(*lead, K, S, D)"),
        ("v", v, "(*lead, K, S, Dv)"),
    ):
        if not isinstance(x, Tensor):
            errors.fail(
                door,
                name,
                f"a tensor {letters}",
                f"a {type(x).__name__}",
                "Pass torch tensors.",
                TypeError,
            )
        if x.is_nested:
            remedy = (
                "Attend over jagged ones by fa.interop.nested_attention, or pad them and mask by "
                "fa.masks.padding."
            )
            errors.fail(door, name, f"a tensor {letters}", "a nested tensor", remedy, TypeError)
        if x.dim() < 3:
            errors.fail(
                door,
                name,
                letters,
                errors.shape(x),
                f"Give a single head an axis of its own: {name}.unsqueeze(-3).",
            )
        if not x.is_floating_point():
            errors.fail(door, name, "floating", x.dtype, f"Convert it: {name}.float().", TypeError)
        if x.dtype != q.dtype:
            errors.fail(
                door,
                name,
                f"{q.dtype} as q is",
                x.dtype,
                f"Convert it: {name}.to(q.dtype).",
                TypeError,
            )
        if x.device != q.device:
            errors.fail(
                door, name, f"on {q.device} as q is", x.device, f"Move it: {name}.to(q.device)."
            )
    H, T, D = q.shape[-3:]
    K, S = k.shape[-3:-1]
    if k.shape[-1] != D:
        errors.fail(
            door,
            "k",
            f"(*lead, K, S, D) with D = {D} as in q",
            errors.shape(k),
            "Project k to q's head size.",
        )
    if v.shape[-3:-1] != (K, S):
        errors.fail(
            door,
            "v",
            f"(*lead, K, S, Dv) with K, S = {K}, {S} as in k",
            errors.shape(v),
            "Give every key a value.",
        )
    if not H == K == 0 and (not K or H % K):
        errors.fail(
            door,
            "k",
            f"(*lead, K, S, D) with K dividing H = {H}",
            errors.shape(k),
            "Each key head serves H / K query heads.",
        )
    try:
        lead = layout.broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except RuntimeError:
        wanted, got = (
            "leading axes that broadcast",
            f"{errors.shape(q)}, {errors.shape(k)} and {errors.shape(v)}",
        )
        errors.fail(door, "q, k, v", wanted, got, "Insert axes of size 1 where one is shared.")
    if not K:  # no heads at all: add one key head, which no query head reads
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    _check_mask(door, mask, lead, (H, T, S), q.device)
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            errors.fail(
                door,
                "bias",
                "a floating tensor",
                getattr(bias, "dtype", type(bias).__name__),
                "A boolean one is a mask.",
                TypeError,
            )
        _must_broadcast(door, "bias", bias.shape, (*lead, H, T, S))
        if bias.device != q.device:
            errors.fail(
                door, "bias", f"on {q.device} as q is", bias.device, "Move it: bias.to(q.device)."
            )
    _check_scale(door, scale)
    if dropout or key is not None:
        _check_dropout(door, dropout, key)
    # with D = 0 all logits are zero, whatever the scale
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale
    return Request(q, k, v, mask, bias, scale, dropout, key, wants_lse, tuple(lead))


def _check_scale(door: str, scale: float | Tensor | None) -> None:
    if scale is None or torch.compiler.is_compiling():
        return
    if isinstance(scale, Tensor):
        if scale.dim():
            errors.fail(
                door,
                "scale",
                "a number or a 0-d tensor",
                errors.shape(scale),
                "Multiply q by it instead.",
            )
    elif not hasattr(scale, "__float__"):
        got, remedy = f"a {type(scale).__name__}", "Leave it out for 1 / sqrt(D)."
        errors.fail(door, "scale", "a number or a 0-d tensor", got, remedy, TypeError)
    elif not abs(scale) < torch.finfo(torch.float32).max:
        errors.fail(
            door, "scale", "a number that float32 holds", scale, "It is 1 / sqrt(D) by default."
        )


def _check_dropout(door: str, dropout: float, key: Tensor | None) -> None:
    if not 0 <= dropout < 1:
        errors.fail(
            door, "dropout", "a rate in [0, 1)", dropout, "It is the share of weights to drop."
        )
    if not isinstance(key, Tensor):
        errors.fail(
            door,
            "key",
            "given with dropout",
            key,
            "Pass funcattn.key(seed), split for each use.",
            TypeError,
        )
    if key.shape != (2,) or key.is_floating_point():
        errors.fail(
            door,
            "key",
            "one key, int64 (2,)",
            f"{key.dtype} {errors.shape(key)}",
            "Map over a batch of keys with vmap.",
        )


def _check_mask(
    door: str,
    mask: Mask | Tensor | None,
    lead: tuple[int, ...],
    HTS: tuple[int, int, int],
    device: torch.device,
) -> None:
    H, T, S = HTS
    if mask is None:
        return
    if isinstance(mask, Mask):
        if mask.start.shape[-2] != T:
            errors.fail(
                door,
                "mask",
                f"for T = {T} queries as in q",
                f"one for {mask.start.shape[-2]}",
                f"Build it with T = {T}.",
            )
        _must_broadcast(door, "mask", mask.start.shape[:-1], (*lead, T))
        where = mask.start.device
    elif not isinstance(mask, Tensor):
        errors.fail(
            door,
            "mask",
            "a Mask, booleans or None",
            f"a {type(mask).__name__}",
            "See funcattn.masks.",
            TypeError,
        )
    elif mask.dtype != torch.bool:
        remedy = (
            "Pass a floating one as bias=."
            if mask.is_floating_point()
            else "Convert it: mask.bool()."
        )
        errors.fail(door, "mask", "boolean", mask.dtype, remedy, TypeError)
    else:
        _must_broadcast(door, "mask", mask.shape, (*lead, H, T, S))
        where = mask.device
    if where != device:
        errors.fail(
            door, "mask", f"on {device} as q is", where, "Move it: funcattn.to(device)(mask)."
        )


def _must_broadcast(door: str, name: str, shape: Sequence[int], to: tuple[int, ...]) -> None:
    if len(shape) > len(to) or any(
        a not in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)
    ):
        errors.fail(
            door,
            name,
            f"such that it broadcasts to {tuple(to)}",
            tuple(shape),
            "Its last axes are queries and keys.",
        )
