"""Cross-entropies of the rows of a weight, by the route that its type and its size allow.

    tensors         `functions.GradientFunction`: blocks of rows, derivatives written by hand
    records         blocks of rows through `layers.linear`, each rematerialized
    few logits      all of them at once, in plain operations

Where the vocabulary is sharded over a mesh axis, each device has the log-sum-exp of its shard, and
three numbers a row cross the mesh: a maximum, a sum, and the target's logit.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..collectives import axis_index, pmax, psum
from ..core.autograd import is_recorded
from ..kernels import arguments, soft_cap
from ..kernels.dtypes import accumulation_dtype, accurate
from ..layers import Weight, linear
from ..rematerialization import remat
from . import operators
from .functions import GradientFunction
from .passes import Spec

SMALL = 2**18  # logits, up to which plain operations are cheaper: 1 MiB in float32
NEVER = torch.iinfo(torch.int64).min  # ignore_index; torch's default of -100 would hide wrong ids


def cross_entropies(
    head: Weight,
    hidden: Tensor,
    targets: Tensor,
    *,
    cap: float | None = None,
    axis: str | None = None,
    rows: int = 0,
) -> Tensor:
    """-log softmax(logits)[target] of each row (N,), float32 at least.

    Args:
        head: (V, E), or this device's shard of it: a tensor or a record of `layers.linear`.
        hidden: (N, E). targets: int64 (N,), ids of the whole vocabulary.
        cap: soft cap of the logits.
        axis: the mesh axis that the vocabulary is sharded over, in the order of its devices.
        rows: whose logits are in memory at a time; 0 to choose.
    """
    rows = rows or Spec().count(classes(head, hidden))
    if axis is None and not _is_streamed(head, hidden):
        each = lambda head, x, t: of_logits(_logits(head, x, cap), t)
        return by_blocks(each, head, hidden, targets, rows)
    if axis is None:
        lse, target, _ = _streamed(head, hidden, targets, cap, rows)
        return lse - target
    n = classes(head, hidden)
    at = targets - axis_index(axis).to(targets.device) * n
    mine = (at >= 0) & (at < n)
    at = torch.where(mine, at, 0)
    if _is_streamed(head, hidden):
        lse, target, shift = _streamed(head, hidden, at, cap, rows)
    else:
        each = lambda head, x, t: _statistics(_logits(head, x, cap), t)
        lse, target, shift = by_blocks(each, head, hidden, at, rows).unbind(-1)
    shift = shift.detach()
    shift = shift - pmax(shift, axis)  # any constant gives the same result
    normalizer = psum((lse + shift).exp(), axis)
    return normalizer.log() - psum(torch.where(mine, target + shift, 0), axis)


def weighted_cross_entropy(
    head: Weight,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    cap: float | None = None,
    axis: str | None = None,
) -> Tensor:
    """sum_i weights_i cross_entropies_i (): its gradient is computed with its value.

    Args:
        weights: (N,), float32 at least.
        head, hidden, targets, cap, axis: see `cross_entropies`.
    """
    if axis is not None or not _is_streamed(head, hidden):
        return (weights * cross_entropies(head, hidden, targets, cap=cap, axis=axis)).sum()
    return _open(_total)(cap or 0.0, hidden, head, targets, weights)


def by_blocks(
    f: Callable[[Any, Tensor, Tensor], Tensor],
    params: Any,
    hidden: Tensor,
    targets: Tensor,
    rows: int,
) -> Tensor:
    """f(params, hidden (n, E), targets (n,)) -> (n, ...), of n = rows rows at a time.

    Derivatives compute each block again (`remat`).
    """
    if len(targets) <= rows:
        return f(params, hidden, targets)
    again = remat(f)
    blocks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([again(params, *block) for block in blocks])


def of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of logits (N, V), float32 at least."""
    return F.cross_entropy(accurate(logits), targets, reduction="none", ignore_index=NEVER)


def classes(head: Weight, hidden: Tensor) -> int:
    """V, the rows of a weight of any type; hidden is (*lead, E)."""
    shape = getattr(head, "shape", None)
    none = hidden.new_zeros(0, hidden.shape[-1])
    return linear(head, none).shape[-1] if shape is None else shape[0]


def _logits(head: Weight, hidden: Tensor, cap: float | None) -> Tensor:
    logits = accurate(linear(head, hidden))
    return logits if cap is None else soft_cap(logits, cap)


def _statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-sum-exp and the target's logit, both less the maximum, and the maximum (N, 3)."""
    shift = logits.detach().amax(-1, keepdim=True)
    logits = logits - shift
    lse, target = logits.exp().sum(-1).log(), logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.stack([lse, target, shift.squeeze(-1)], -1)


def _is_streamed(head: Weight, hidden: Tensor) -> bool:
    """True for many logits of a tensor, unless a graph of plain operations is asked."""
    if torch.compiler.is_exporting():
        return False
    if not torch.compiler.is_compiling() and torch._C._is_tracing():  # by torch.jit
        return False
    return type(head) in (Tensor, torch.nn.Parameter) and len(hidden) * len(head) > SMALL


def _open(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, which Dynamo does not trace into: it refuses autograd Functions with a jvp."""
    return torch._dynamo.nonstrict_trace(f) if torch.compiler.is_compiling() else f


def _streamed(
    head: Tensor, hidden: Tensor, targets: Tensor, cap: float | None, rows: int
) -> tuple[Tensor, ...]:
    """The log-sum-exp and the target's logit, both less the maximum, and the maximum (N,)."""
    return _open(_rows)(cap or 0.0, rows, hidden, head, targets)


def _rows(
    cap: float, rows: int, hidden: Tensor, head: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    a = hidden.new_zeros(len(hidden), dtype=accumulation_dtype(hidden))
    return _gradient(Spec(cap, rows), targets, hidden, head, a, a)[1:4]


def _total(cap: float, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    follows = lambda x: torch.is_grad_enabled() and x.requires_grad
    spec = Spec(cap, 0, follows(hidden), follows(head))
    return _gradient(spec, targets, hidden, head, weights, -weights)[0]


def _gradient(
    spec: Spec, targets: Tensor, hidden: Tensor, head: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    if arguments.is_under_autocast(hidden):  # as torch's linear does
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
    tensors = (targets, hidden, head, a, b)
    if not is_recorded(*tensors):
        return tuple(operators.run(spec, (), tensors))
    with arguments.no_autocast(hidden):
        return GradientFunction.apply(spec, *tensors)
