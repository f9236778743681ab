"""The log-sum-exp in twice the precision, as an autograd Function without derivatives."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from ...core.autograd import align
from . import operators
from .contractions import at_batch


class StatisticsFunction(Function):
    """(scale, kernel, q, k, lse, *mask) -> lse as the sum of two numbers; not differentiable."""

    @staticmethod
    def forward(scale: float, kernel: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return operators.statistics(scale, kernel, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[None, ...]:
        raise AssertionError("the statistics are of detached tensors")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], scale: float, kernel: str, *tensors: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        whole, rest = StatisticsFunction.apply(scale, kernel, *align(in_dims[2:], tensors))
        return (at_batch(whole, info), at_batch(rest, info)), (0, 0)
