"""Kernels of other signatures as kernel(q, k, v, mask), the form that laws of kernels take.

    mask     f(q, k, v, mask)                 leading axes *lead; a fa.Mask, booleans or None
    dense    f(q, k, v, mask)                 mask bool (B, H, T, S)
    sdpa     f(q, k, v, attn_mask=..., is_causal=..., enable_gqa=...)   as torch.nn.functional's
    flash    f(q, k, v, causal=...)           as flash_attn's: (B, T, H, D), causal or full
    causal   f(q, k, v)                       always causal
    plain    f(q, k, v)                       never masked

All but `mask` take (B, H, T, D) with one batch axis, into which the leading axes of an input are
expanded and flattened, except `flash`, whose axes are (B, T, H, D). A kernel returns out, or (out,
lse). What a signature cannot express, such as a window in `flash`, raises NotOffered.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import masks
from ..core import errors
from ..masks import Mask
from .laws.comparisons import AnyMask, Kernel, parts_of

# (q, k, v) of (B, H, T, D), and booleans (B, H, T, S) or None
Batched: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Any]


class NotOffered(Exception):
    """A law asks for what the signature of a kernel cannot express, or what it does not return."""


class Signature(NamedTuple):
    """How a kernel is called.

    name: as in the table of this module.
    masked: which masks it can express.
    square: whether it needs as many keys as queries.
    adapt: f -> kernel(q, k, v, mask)
    """

    name: str
    masked: Literal["any", "causal", "causal or none", "none"]
    square: bool
    adapt: Callable[[Callable[..., Any]], Kernel]


def adapt(f: Callable[..., Any], signature: str) -> Kernel:
    """f as kernel(q, k, v, mask).

    Args:
        f: a kernel of the given signature.
        signature: a name of `SIGNATURES`.

    Raises:
        ValueError: an unknown signature.

    Example:
        >>> kernel = adapt(torch.nn.functional.scaled_dot_product_attention, "sdpa")
        >>> q = k = v = torch.ones(2, 3, 4)
        >>> kernel(q, k, v, masks.causal(3)).shape
        torch.Size([2, 3, 4])
    """
    if signature not in SIGNATURES:
        known = f"one of {', '.join(SIGNATURES)}"
        errors.fail("adapt", "signature", known, repr(signature), "See testing.signatures.")
    return SIGNATURES[signature].adapt(f)


def is_causal(mask: AnyMask, T: int, S: int) -> bool:
    """True where the mask is concrete, and causal for each example of a vmap."""
    if mask is None or T != S:
        return False
    dense = mask.dense(S) if isinstance(mask, Mask) else mask
    wanted = masks.causal(T).dense(S).to(dense.device)
    found = errors.peek((dense == wanted).all())
    return found is not None and bool(found.all())


def _as_it_is(f: Callable[..., Any]) -> Kernel:
    return f  # with its other arguments: laws try a bias where there is one


def _as_returned(parts: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    """out alone, or out and lse."""
    return tuple(parts.values()) if len(parts) > 1 else parts["out"]


def _batched(run: Batched) -> Kernel:
    """A kernel of one batch axis as one of any leading axes."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: AnyMask) -> Any:
        H, T, S = q.shape[-3], q.shape[-2], k.shape[-2]
        seen = mask.dense(S).unsqueeze(-3) if isinstance(mask, Mask) else mask
        leads = [x.shape[:-3] for x in (q, k, v)]
        if seen is not None:
            seen = seen.expand(*seen.shape[:-3], H, T, S)
            leads.append(seen.shape[:-3])
        lead = torch.broadcast_shapes(*leads)
        flat = lambda x: x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:])
        found = parts_of(run(flat(q), flat(k), flat(v), None if seen is None else flat(seen)))
        return _as_returned({name: x.reshape(*lead, *x.shape[1:]) for name, x in found.items()})

    return kernel


def _dense(f: Callable[..., Any]) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Any:
        if seen is None:
            seen = torch.ones(*q.shape[:-1], k.shape[-2], dtype=torch.bool, device=q.device)
        return f(q, k, v, seen)

    return _batched(run)


def _sdpa(f: Callable[..., Any]) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Any:
        options: dict[str, Any] = {}
        if is_causal(seen, q.shape[-2], k.shape[-2]):
            options["is_causal"] = True
        elif seen is not None:
            options["attn_mask"] = seen
        if q.shape[-3] != k.shape[-3]:
            options["enable_gqa"] = True
        return f(q, k, v, **options)

    return _batched(run)


def _flash(f: Callable[..., Any]) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Any:
        causal = is_causal(seen, q.shape[-2], k.shape[-2])
        if seen is not None and not causal:
            raise NotOffered("masks other than causal")
        swap = lambda x: x.transpose(-3, -2)
        found = parts_of(f(swap(q), swap(k), swap(v), causal=causal))
        found["out"] = swap(found["out"])
        return _as_returned(found)

    return _batched(run)


def _causal(f: Callable[..., Any]) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Any:
        if not is_causal(seen, q.shape[-2], k.shape[-2]):
            raise NotOffered("masks other than causal")
        return f(q, k, v)

    return _batched(run)


def _plain(f: Callable[..., Any]) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Any:
        if seen is not None:
            raise NotOffered("masks")
        return f(q, k, v)

    return _batched(run)


SIGNATURES = {
    signature.name: signature
    for signature in (
        Signature("mask", "any", False, _as_it_is),
        Signature("dense", "any", False, _dense),
        Signature("sdpa", "any", False, _sdpa),
        Signature("flash", "causal or none", False, _flash),
        Signature("causal", "causal", True, _causal),
        Signature("plain", "none", False, _plain),
    )
}
