"""What laws of kernels compare, bounds on rounding errors, and inputs of the same type.

A kernel is kernel(q, k, v, mask) -> out, or Attended(out, lse); the bounds follow from the sizes of
q, k and v and the rounding of their dtype (`agreement.amplitudes`).
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ... import masks, randomness
from ...masks import END, Mask
from .. import dense
from ..agreement import Amplitudes, longest

AnyMask: TypeAlias = Mask | Tensor | None
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, AnyMask], Any]
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor]

# Results.


def parts_of(result: Any) -> dict[str, Tensor]:
    """out, and lse where the kernel gives it, by name."""
    return (
        {"out": result}
        if isinstance(result, Tensor)
        else dict(zip(("out", "lse"), result, strict=True))
    )


def finite(result: Any) -> dict[str, Tensor]:
    """The same with 0 for the lse of rows without keys, which has no derivative."""
    parts = parts_of(result)
    return {
        name: torch.where(x == -torch.inf, 0, x) if name == "lse" else x
        for name, x in parts.items()
    }


def losses(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AnyMask,
    key: Tensor,
    row: int | None = None,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[float, float]]:
    """A weighted sum of out and lse (or of one row of these) for the kernel and the definition.

    Also the norms of the weights.
    """
    given, wanted = (
        parts_of(kernel(q, k, v, mask)),
        parts_of(dense.attend(q.double(), k.double(), v.double(), mask)),
    )
    T = q.shape[-2]
    kept = torch.ones(T, dtype=torch.float64, device=q.device)
    kept = kept if row is None else (torch.arange(T, device=q.device) == row).double()
    weights = {
        name: normal(randomness.fold_in(key, i), kept, wanted[name].shape)
        for i, name in enumerate(given)
    }
    weights = {
        name: w * (kept.unsqueeze(-1) if name == "out" else kept) for name, w in weights.items()
    }

    def weigh(f: Kernel) -> Callable[..., Tensor]:
        def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found = finite(f(q, k, v, mask))
            return torch.stack(
                [(found[name].double() * w).sum() for name, w in weights.items()]
            ).sum()

        return total

    most = float(weights["lse"].abs().max()) if "lse" in weights and weights["lse"].numel() else 0.0
    return weigh(kernel), weigh(dense.attend), (longest(weights["out"]), most)


def tangents(key: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """Tangents of q, k and v, drawn from the key."""
    dq, dk, dv = (normal(randomness.fold_in(key, i), x, x.shape) for i, x in enumerate((q, k, v)))
    return dq, dk, dv


def normal(key: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers of a shape, in the dtype and on the device of another tensor."""
    return randomness.normal(key, shape, like.dtype).to(like.device)


def double(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """q, k and v in float64."""
    return q.double(), k.double(), v.double()


# Bounds on rounding errors; g and h are the norms of the weights of out and lse in a loss.


def of_value(size: Amplitudes, name: str) -> float:
    """The bound for out and for lse."""
    return size.rounding * (size.value if name == "out" else 1)


def of_gradient(size: Amplitudes, g: float, h: float) -> tuple[float, float, float]:
    """dq_i = scale sum_j P_ij (g_i . (v_j - out_i) + h_i) k_j, dk_j the same summed over i, dv_j =
    sum_i P_ij g_i.
    """
    of_pair = size.rounding * size.scale * (2 * g * size.v + h)
    return (
        size.leads * of_pair * size.k,
        size.rows * of_pair * size.q,
        size.rows * size.rounding * g,
    )


def of_logits(size: Amplitudes, moved: tuple[Tensor, ...]) -> float:
    """The bound for dS_ij = scale (dq_i . k_j + q_i . dk_j); moved are the tangents of q, k, v."""
    return size.scale * (longest(moved[0]) * size.k + size.q * longest(moved[1]))


def of_hvp(
    size: Amplitudes, g: float, h: float, moved: tuple[Tensor, ...]
) -> tuple[float, float, float]:
    """The bound for the gradient with each factor replaced by its tangent in turn.

    A weight P changes by 2 dS P, and what it multiplies by as much again.
    """
    dS, (dq, dk, dv) = of_logits(size, moved), (longest(x) for x in moved)
    pair, of_values = 2 * g * size.v + h, 2 * g * dv
    of_q = size.leads * size.scale * (pair * (4 * dS * size.k + dk) + of_values * size.k)
    of_k = size.rows * size.scale * (pair * (4 * dS * size.q + dq) + of_values * size.q)
    return size.rounding * of_q, size.rounding * of_k, size.rounding * size.rows * g * 2 * dS


# Levels of logits.


def ways_to_shift(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, key: Tensor
) -> tuple[Inputs, list[tuple[str, Inputs, Callable[..., Tensor]]], tuple[int, ...]]:
    """Inputs with a row of equal logits; ways to shift its level; and features that are unchanged.

    A way is a description, inputs, and the kernel as a function to out.
    """
    row, which = (
        int(randomness.randint(of, (), 0, most))
        for of, most in zip(randomness.split(key), (q.shape[-2], 3), strict=True)
    )
    flat_q, flat_k = q.clone(), k.clone()
    flat_q[..., row, :], flat_q[..., 0], flat_k[..., 0] = 0, 0, 0
    flat, one = (flat_q, flat_k, v), torch.finfo(q.dtype)
    root = q.shape[-1] ** 0.5
    within = lambda room: max(min((1e30, -1e30, one.min)[which], one.max / room), one.min / room)
    level = within(4 * root)  # the product is finite before it is scaled; a power of two
    size = (abs(level) * root) ** 0.5
    far_q, far_k = flat_q.clone(), flat_k.clone()
    far_q[..., row, 0], far_k[..., 0] = math.copysign(size, level), size
    out = lambda *x, **options: parts_of(kernel(*x, **options))["out"]
    ways = [(f"where row {row} is at {level:.3g}", (far_q, far_k, v), out)]
    if "bias" in inspect.signature(kernel).parameters:
        bias = q.new_zeros(q.shape[-2], k.shape[-2])
        bias[row] = within(1)
        ways.append(
            (
                f"where the bias of row {row} is {within(1):.3g}",
                flat,
                functools.partial(out, bias=bias),
            )
        )
    return flat, ways, (1, 1, 0)


# Masks of the same type.


def both(mask: AnyMask, other: Mask, S: int) -> Mask | Tensor:
    """The intersection of two masks, of the type of the first."""
    return (
        other
        if mask is None
        else mask & other
        if isinstance(mask, Mask)
        else mask & other.dense(S).to(mask.device)
    )


def mask_a_row(
    q: Tensor, k: Tensor, mask: AnyMask, key: Tensor
) -> tuple[int, Tensor, Mask | Tensor]:
    """A query chosen by the key, a new key, and the mask in which that query sees no key."""
    choice, own = randomness.split(key)
    row = int(randomness.randint(choice, (), 0, q.shape[-2]))
    start = torch.where(torch.arange(q.shape[-2], device=q.device) == row, END, 0).unsqueeze(-1)
    return row, own, both(mask, Mask(start, torch.full_like(start, END)), k.shape[-2])


def take(mask: AnyMask, columns: Tensor) -> AnyMask:
    """The mask of these keys, in this order."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        return mask if mask.shape[-1] == 1 else mask[..., columns]
    visible = mask.dense(int(columns.max()) + 1 if len(columns) else 0)[..., columns]
    place = torch.arange(len(columns), device=columns.device)
    # One interval for each key.
    alone = Mask(torch.where(visible, place, END), torch.where(visible, place + 1, END))
    nothing = torch.full_like(mask.start[..., :1], END)
    return masks.union(alone, Mask(nothing, nothing))  # joins neighbours; one interval without keys
