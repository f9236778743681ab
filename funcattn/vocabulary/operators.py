"""The passes on any tensors: directly where they are plain, else as one opaque custom operation.

In torch.compile a pass is one node, never unrolled or recomputed; the autograd Functions give it
derivatives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..core import errors
from ..core.autograd import untraced
from ..kernels import arguments
from ..kernels.closed.operators import plain
from . import passes
from .passes import Spec

Given = tuple[bool, ...]  # of a Hessian: which of x, w, a, b the direction has; () for a gradient


def run(spec: Spec, given: Given, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient of F, or its Hessian times a direction, of targets, x, w, a, b, *direction."""
    if plain(tensors):
        return _run(spec, given, tensors)
    return _pass_op(list(tensors), *_packed(spec, given))


@untraced
def _run(spec: Spec, given: Given, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    with torch.no_grad(), arguments.no_autocast(tensors[1]):
        if not given:
            return passes.gradient(spec, *tensors)
        inputs, rest = tensors[:5], iter(tensors[5:])
        return passes.hessian(spec, *inputs, *[next(rest) if there else None for there in given])


def _packed(spec: Spec, given: Given) -> tuple[float, list[int]]:
    """The arguments that are no tensors, in types of custom operations."""
    return spec.cap, [spec.rows, spec.hidden, spec.head, *given]


def _unpacked(cap: float, flags: Sequence[int]) -> tuple[Spec, Given]:
    rows, hidden, head, *given = flags
    return Spec(cap, rows, bool(hidden), bool(head)), tuple(map(bool, given))


@torch.library.custom_op("funcattn::vocabulary", mutates_args=())
def _pass_op(tensors: list[Tensor], cap: float, flags: list[int]) -> list[Tensor]:
    # the strides that the fake implementation returns
    return [x.contiguous() for x in _run(*_unpacked(cap, flags), tensors)]


@_pass_op.register_fake
def _(tensors: list[Tensor], cap: float, flags: list[int]) -> list[Tensor]:
    errors.on_one_device("funcattn::vocabulary", tensors)
    spec, given = _unpacked(cap, flags)
    _, x, w, a, *_ = tensors
    row = lambda: a.new_empty(a.shape)
    wanted = [t.new_empty(t.shape) for t, there in ((x, spec.hidden), (w, spec.head)) if there]
    return [*([row(), row()] if given else [a.new_empty(()), row(), row(), row()]), *wanted]


@register_flop_formula(torch.ops.funcattn.vocabulary)
def _operations(shapes: Sequence[torch.Size], cap: float, flags: Sequence[int], **_: object) -> int:
    """Two for each multiply-add of the products of (N, E) with (E, V)."""
    spec, given = _unpacked(cap, flags)
    x, w = given[:2] or (False, False)
    products = 1 + x + w + spec.hidden * (1 + w) + spec.head * (1 + x)
    return 2 * products * shapes[1].numel() * shapes[2][0]
