"""The backends of the closed family as values, and the order in which each kernel asks them.

A backend computes some of five operations on plain tensors. The family (`closed/operators`) takes
the first backend of a row of `BACKENDS` that has an operation and gives no reason against it.
`torch_blocks` ends every row: it has the operations that must exist, for every input. To add a
backend is to write its file, its value here, and its place in a row.

A `why_not_*` depends on shapes, dtypes, devices and the form of the mask, never on values, so it
may be asked inside a transform. An operation that finds values which it does not support returns
None, and the next backend runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..closed.algebra import Contraction
from . import aten, native, native_contract, torch_attend, torch_blocks

Tensors: TypeAlias = Sequence[Tensor]
Shapes: TypeAlias = Sequence[Sequence[int]]
Dtypes: TypeAlias = Sequence[torch.dtype]
Pair: TypeAlias = tuple[Tensor, Tensor]
WhyNotAttend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensors, Tensor | None], str]


def _never(*_: object) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations of the closed family; None: it lacks the operation.

    q (*lead, T, D), k (*lead, S, D), v (*lead, S, Dv); the leading axes of all tensors broadcast.
    mask: () or interval ends (start, stop), each (*lead, T, n), or (booleans (*lead, T, S),).

    Args:
        name: its name in tests and messages.
        attend: of q, k, v, mask, bias (or None) and scale, out (*lead, T, Dv) and the log-sum-exp
            lse (*lead, T, 1), which has no leading axes that only v has.
        why_not_attend: of q, k, v, mask and bias, the reason why it cannot, or "".
        contract: of a contraction, the shapes of its outputs, its tensors and the dtypes of its
            outputs, the outputs, in these dtypes or wider.
        why_not_contract: of a contraction and its tensors, the reason why it cannot, or "".
        attend_jvp: of q, k, v, their tangents (None: no tangent), mask and scale: out, lse and
            their tangents, in one pass.
        why_not_attend_jvp: of q, k, v and mask, the reason why it cannot, or why two passes are
            better, or "".
        attend_vjp: of q, k, v, mask, lse, the cotangent of out, out, scale and three shapes, the
            gradients of q, k and v in these shapes, where that is faster than the contraction.
        why_not_attend_vjp: as `why_not_attend`.
        joins_tangents: whether a contraction and its jvp are one contraction, of twice the outputs,
            where both are wanted.
        statistics: of q, k, lse, mask and scale, lse as the sum of two numbers, the second small;
            asked where `why_not_attend` of q, k, k has no reason.
    """

    name: str
    attend: (
        Callable[[Tensor, Tensor, Tensor, Tensors, Tensor | None, float], Pair | None] | None
    ) = None
    why_not_attend: WhyNotAttend = _never
    contract: Callable[[Contraction, Shapes, Tensors, Dtypes], Tensors | None] | None = None
    why_not_contract: Callable[[Contraction, Tensors], str] = _never
    attend_jvp: (
        Callable[
            [Tensor, Tensor, Tensor, Sequence[Tensor | None], Tensors, float],
            tuple[Tensor, ...] | None,
        ]
        | None
    ) = None
    why_not_attend_jvp: Callable[[Tensor, Tensor, Tensor, Tensors], str] = _never
    attend_vjp: (
        Callable[
            [Tensor, Tensor, Tensor, Tensors, Tensor, Tensor, Tensor, float, Shapes],
            list[Tensor] | None,
        ]
        | None
    ) = None
    why_not_attend_vjp: WhyNotAttend = _never
    joins_tangents: bool = False
    statistics: Callable[[Tensor, Tensor, Tensor, Tensors, float], Pair] | None = None


def _triton() -> Any:
    """The Triton backend, imported on first use."""
    from . import triton

    return triton


ATEN = Backend(
    "aten",
    attend=aten.attend,
    why_not_attend=aten.why_not_attend,
    attend_vjp=aten.attend_vjp,
    why_not_attend_vjp=aten.why_not_attend,
)

TRITON = Backend(
    "triton",
    attend=lambda q, k, v, mask, bias, scale: _triton().attend(q, k, v, mask, scale),
    why_not_attend=lambda q, k, v, mask, bias: _triton().why_not_attend(q, k, v, mask, bias),
    contract=lambda *arguments: _triton().contract(*arguments),
    why_not_contract=lambda *arguments: _triton().why_not_contract(*arguments),
    attend_jvp=lambda *arguments: _triton().attend_jvp(*arguments),
    why_not_attend_jvp=lambda *arguments: _triton().why_not_attend_jvp(*arguments),
    statistics=lambda *arguments: _triton().statistics(*arguments),
)

NATIVE = Backend(
    "native",
    attend=native.attend,
    why_not_attend=native.why_not_attend,
    contract=native_contract.contract,
    why_not_contract=native_contract.why_not_contract,
    attend_jvp=native.attend_jvp,
    why_not_attend_jvp=native.why_not_attend_jvp,
    joins_tangents=True,
)

TORCH_BLOCKS = Backend(
    "torch_blocks",
    attend=torch_attend.attend,
    contract=lambda spec, shapes, tensors, dtypes: torch_blocks.contract(spec, shapes, tensors),
    statistics=torch_blocks.statistics,
)

BACKENDS: dict[str, tuple[Backend, ...]] = {  # by kernel of the closed family, in order
    "flash": (ATEN, TORCH_BLOCKS),
    "triton": (TRITON, TORCH_BLOCKS),
    "native": (NATIVE, TORCH_BLOCKS),
}
