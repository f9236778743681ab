"""Checks at the public door: one form of error, and one helper that knows whether values can be looked at.

Shapes and dtypes are checked always, since every transform keeps them concrete. Values (token ids, NaN, a full cache) are
checked where they are concrete; inside vmap or a compile the result is defined instead, and loud.
"""

import sys
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensor

LONGEST = 400  # letters of what was got, in a message

# Characters that steer a terminal, or show a line in another order than it has: the controls C0 and C1 (a tab and an end of line
# are left), the marks and embeddings of Unicode's bidirectional algorithm, line separators, and halves of surrogate pairs.
STEERING = {*range(32), *range(127, 160)} - {ord("\t"), ord("\n")}
STEERING |= {0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF, *range(0xE0000, 0xE0080)}
STEERING |= {*range(0xD800, 0xE000)}
WRITTEN = {code: chr(code).encode("unicode_escape").decode() for code in STEERING}


def printable(text: str) -> str:
    """The text with what could steer a terminal written out.

    Example:
        >>> print(printable("\\x1b[2J name"))
        \\x1b[2J name
    """
    return text.translate(WRITTEN)


def fail(function: str, argument: str, wanted: str, got: Any, remedy: str, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise `function: argument should be wanted, got got. remedy`, with nothing in it that could steer a terminal.

    Example:
        >>> fail("attention", "k", "(*lead, K, S, D) with D = 32 as in q", (2, 16, 48), "Project k to q's head size.")
        Traceback (most recent call last):
        ValueError: attention: k should be (*lead, K, S, D) with D = 32 as in q, got (2, 16, 48). Project k to q's head size.
    """
    raise kind(form(function, argument, wanted, got, remedy))


def form(function: str, argument: str, wanted: str, got: Any, remedy: str) -> str:
    """The text of an error."""
    shown = f"{got}"
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."  # as of a tree of parameters in the place of a number
    return printable(f"{function}: {argument} should be {wanted}, got {shown}. {remedy}")


def is_decoder(function: str, model: Any) -> None:
    """Fail where something else stands in the place of a model, such as the parameters."""
    if not hasattr(model, "hidden") or not hasattr(model, "logits"):
        remedy = "Make it with fa.decoder(config); arguments come in the order key, model, params, data."
        fail(function, "model", "from fa.decoder", f"a {type(model).__name__}", remedy, TypeError)


def is_int(value: Any) -> bool:
    """Whether a value is an integer of Python; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def stops(function: str, stop: Any) -> None:
    """Fail where stop is anything but a collection of ids."""
    if not isinstance(stop, Collection) or not all(is_int(id) and -(2**63) <= id < 2**63 for id in stop):
        fail(function, "stop", "ids as ints", repr(stop), "Stop strings belong to fa.stream, where the tokenizer is.", TypeError)


def shape(x: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(x.shape)


def is_distributed(x: Any) -> bool:
    """True for a DTensor, which is a part of a tensor: code that computes should have been given the part, or the whole."""
    module = sys.modules.get("torch.distributed.tensor")  # a third of the time of importing torch: not imported, no such tensor
    return module is not None and isinstance(x, module.DTensor)


def on_one_device(function: str, tensors: Iterable[Tensor]) -> None:
    """Fail where tensors of an operator are on several devices (a 0-d tensor of the CPU goes with any).

    An operator that is given one on "meta" runs its fake kernel: what that makes on another device
    would be memory that nobody wrote.
    """
    devices = {str(x.device) for x in tensors if x.dim() or x.device.type != "cpu"}
    if len(devices) > 1:
        fail(function, "its tensors", "on one device", " and ".join(sorted(devices)), "Move them to one.")


def whole(function: str, argument: str, leaves: Iterable[Any], remedy: str) -> None:
    """Fail where one of the leaves is a DTensor."""
    if any(is_distributed(leaf) for leaf in leaves):
        fail(function, argument, "of tensors of this process", "a DTensor", remedy, TypeError)


def peek(x: Tensor) -> Tensor | None:
    """The plain tensor under every level of torch.func, all rows of a vmap at once, or None while compiling or tracing.

    Only for what holds for all rows alike: an upper bound, a reason to raise, a reason to stop.
    """
    if torch.compiler.is_compiling():
        return None
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    if isinstance(x, FakeTensor) or x.device.type == "meta" or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY):
        return None
    return None if _functorch.is_legacy_batchedtensor(x) else x.detach()  # torch.autograd.grad(is_grads_batched=True)


def is_plain(x: Tensor) -> bool:
    """True for a tensor of numbers that no transform of torch.func has wrapped, outside of compiling and tracing."""
    return peek(x) is not None and not _functorch.is_functorch_wrapped_tensor(x)


def value(x: Tensor) -> Tensor | None:
    """The plain tensor under the derivative levels of torch.func, or None where values cannot be looked at.

    None under vmap when x is batched, while compiling or tracing, and for fake or meta tensors.
    """
    inner = x
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(inner):
        if _functorch.is_batchedtensor(inner):
            return None
        inner = _functorch.get_unwrapped(inner)
    return peek(x)


def is_count(n: Any, least: int) -> bool:
    """Whether n is an int, and not a bool, of at least so much."""
    return is_int(n) and n >= least


def integer(x: Tensor | int) -> int | None:
    """The Python int in a 0-d integer tensor, or None where it is not concrete."""
    if isinstance(x, int):
        return x
    concrete = value(x)
    return None if concrete is None else int(concrete)


def greatest(x: Tensor) -> int | None:
    """The greatest integer of any row, also under vmap, or None while compiling or tracing."""
    concrete = peek(x)
    return None if concrete is None or not concrete.numel() else int(concrete.max())


def is_true(condition: Tensor) -> bool:
    """True where the condition holds somewhere, in any row under vmap; False where it cannot be looked at."""
    concrete = peek(condition)
    return concrete is not None and bool(concrete.any())
