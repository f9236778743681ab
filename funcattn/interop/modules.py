"""A module as a pure function of its params."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def functional(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """Split a module into (apply, params), so that apply(params, *args) is module(*args).

    Tied weights are one entry, under the first of their names, and stay tied. Buffers are
    constants: a call's writes to them, as of batch norm in training, are discarded. apply uses the
    module as it is at the time of the call, including its mode (train or eval).

    Args:
        module: any nn.Module; it is not modified.

    Returns:
        apply: (params, *args, **kwargs) -> what the module returns.
        params: dict of names to tensors, detached, with the storage of the module.

    Example:
        >>> import torch
        >>> from torch.func import grad
        >>> apply, params = functional(torch.nn.Linear(2, 1, bias=False))
        >>> grad(lambda p: apply(p, torch.tensor([1.0, 2.0])).sum())(params)
        {'weight': tensor([[1., 2.]])}
    """
    params = {name: p.detach() for name, p in module.named_parameters()}

    def apply(params: dict[str, Tensor], *args: object, **kwargs: object) -> Any:
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        return functional_call(module, (params, buffers), args, kwargs)

    return apply, params
