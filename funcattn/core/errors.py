"""Errors of public functions in one format, and access to values where they are concrete.

Shapes and dtypes are always checked, since every transform keeps them concrete. Values (token ids,
NaN, a full cache) are checked where they are concrete; under vmap and torch.compile the result is
defined instead, and visibly wrong (such as NaN).
"""

import sys
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensor

LONGEST = 400  # characters of the actual value in a message

# Characters that control a terminal, or change the displayed order of a line: the controls C0 and
# C1 (except tab and newline), the marks and embeddings of Unicode's bidirectional algorithm, line
# separators, and surrogates.
STEERING = {*range(32), *range(127, 160)} - {ord("\t"), ord("\n")}
STEERING |= {
    0x61C,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    0xFEFF,
    *range(0xE0000, 0xE0080),
}
STEERING |= {*range(0xD800, 0xE000)}
WRITTEN = {code: chr(code).encode("unicode_escape").decode() for code in STEERING}


def printable(text: str) -> str:
    """The text with terminal control characters escaped.

    Example:
        >>> print(printable("\\x1b[2J name"))
        \\x1b[2J name
    """
    return text.translate(WRITTEN)


def fail(
    function: str,
    argument: str,
    wanted: str,
    got: object,
    remedy: str,
    kind: type[Exception] = ValueError,
) -> NoReturn:
    """Raise `function: argument should be wanted, got got. remedy`, control characters escaped.

    Example:
        >>> fail("attention", "k", "(*lead, K, S, D) with D = 32 as in q", (2, 16, 48),
        ...     "Project k to q's head size.")
        Traceback (most recent call last):
        ValueError: attention: k should be (*lead, K, S, D) with D = 32 as in q, got (2, 16, 48).
            Project k to q's head size.
    """
    raise kind(form(function, argument, wanted, got, remedy))


def form(function: str, argument: str, wanted: str, got: object, remedy: str) -> str:
    """The text of an error."""
    shown = f"{got}"
    # such as a tree of parameters passed for a number
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
    return printable(f"{function}: {argument} should be {wanted}, got {shown}. {remedy}")


def is_decoder(function: str, model: object) -> None:
    """Raise TypeError if `model` is not a model, such as the parameters."""
    if not hasattr(model, "hidden") or not hasattr(model, "logits"):
        remedy = (
            "Make it with fa.decoder(config); arguments come in the order key, model, params, data."
        )
        fail(function, "model", "from fa.decoder", f"a {type(model).__name__}", remedy, TypeError)


def is_int(value: object) -> bool:
    """Whether a value is a Python int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def stops(function: str, stop: object) -> None:
    """Raise TypeError if `stop` is not a collection of token ids."""
    if not isinstance(stop, Collection) or not all(
        is_int(id) and -(2**63) <= id < 2**63 for id in stop
    ):
        fail(
            function,
            "stop",
            "ids as ints",
            repr(stop),
            "Stop strings belong to fa.stream, where the tokenizer is.",
            TypeError,
        )


def shape(x: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(x.shape)


def is_distributed(x: object) -> bool:
    """True for a DTensor, a sharded tensor: computations expect the local shard or the whole."""
    # Importing it is a third of the import time of torch; if it is not imported there are no
    # DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def on_one_device(function: str, tensors: Iterable[Tensor]) -> None:
    """Raise where the tensors of an operator are on several devices, except 0-d tensors on the CPU.

    An operator with one argument on "meta" runs its fake implementation, whose outputs on another
    device would be uninitialized memory.
    """
    devices = {str(x.device) for x in tensors if x.dim() or x.device.type != "cpu"}
    if len(devices) > 1:
        fail(
            function,
            "its tensors",
            "on one device",
            " and ".join(sorted(devices)),
            "Move them to one.",
        )


def whole(function: str, argument: str, leaves: Iterable[object], remedy: str) -> None:
    """Raise TypeError where one of the leaves is a DTensor."""
    if any(is_distributed(leaf) for leaf in leaves):
        fail(function, argument, "of tensors of this process", "a DTensor", remedy, TypeError)


def peek(x: Tensor) -> Tensor | None:
    """The concrete tensor under all levels of torch.func, with all rows of a vmap, or None.

    None in torch.compile and tracing. Only for conditions on all rows together: an upper bound, a
    reason to raise, a reason to stop.
    """
    if torch.compiler.is_compiling():
        return None
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    if (
        isinstance(x, FakeTensor)
        or x.device.type == "meta"
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    ):
        return None
    # torch.autograd.grad(is_grads_batched=True)
    return None if _functorch.is_legacy_batchedtensor(x) else x.detach()


def is_plain(x: Tensor) -> bool:
    """True for a concrete tensor outside of torch.func, torch.compile and tracing."""
    return peek(x) is not None and not _functorch.is_functorch_wrapped_tensor(x)


def value(x: Tensor) -> Tensor | None:
    """The concrete tensor under the derivative levels of torch.func, or None if it is not concrete.

    None for a tensor batched by vmap, in torch.compile and tracing, and for fake and meta tensors.
    """
    inner = x
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(inner):
        if _functorch.is_batchedtensor(inner):
            return None
        inner = _functorch.get_unwrapped(inner)
    return peek(x)


def is_count(n: Any, least: int) -> bool:
    """Whether n is an int, not a bool, and at least `least`."""
    return is_int(n) and n >= least


def integer(x: Tensor | int) -> int | None:
    """The Python int of a 0-d integer tensor, or None where it is not concrete."""
    if isinstance(x, int):
        return x
    concrete = value(x)
    return None if concrete is None else int(concrete)


def greatest(x: Tensor) -> int | None:
    """The maximum of an integer tensor, over all rows under vmap; None if not concrete."""
    concrete = peek(x)
    return None if concrete is None or not concrete.numel() else int(concrete.max())


def is_true(condition: Tensor) -> bool:
    """True if the condition holds anywhere, in any row under vmap; False if not concrete."""
    concrete = peek(condition)
    return concrete is not None and bool(concrete.any())
