"""Redirecting calls of a Python function inside a `with`, wherever it was imported to.

torch.utils.checkpoint.checkpoint, flex_attention and flash_attn_func are not overridable by a
TorchFunctionMode, and modules bind them by name (`from ... import checkpoint`), also inside of
functools.partial and torch.compile. Setting an attribute of their module would not be seen there.
So the code of the function itself is exchanged: it calls a handler, and is put back when the last
context of all threads ends.
"""

import contextlib
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# (original function, args, kwargs) -> its result
Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_lock = threading.RLock()
_redirected: dict[types.FunctionType, tuple[int, types.CodeType]] = {}  # contexts, own code


@contextlib.contextmanager
def redirected(function: Callable[..., Any], handler: Handler) -> Iterator[None]:
    """Let every call of a function go to a handler, in the whole process.

    One handler for each function: contexts nest with the same one. It gets a copy of the function
    that is not redirected.

    Raises:
        TypeError: it is no plain Python function below its decorators.
    """
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise TypeError(f"redirected: function should be a plain function, got {function!r}.")
    _enter(function, handler)
    try:
        yield
    finally:
        _leave(function)


def _enter(function: types.FunctionType, handler: Handler) -> None:
    with _lock:
        contexts, code = _redirected.get(function, (0, function.__code__))
        if not contexts:
            original = types.FunctionType(
                code, function.__globals__, function.__name__, function.__defaults__
            )
            original.__kwdefaults__ = function.__kwdefaults__
            name = f"__funcattn_{function.__name__}"
            function.__globals__[name] = torch.compiler.disable(
                lambda args, kwargs: handler(original, args, kwargs),
                reason=f"{function.__name__} runs eagerly inside fa.interop.closed(): compile "
                "what is around it without fullgraph=True, or enter no context",
            )
            function.__code__ = _call_of(name, code)
        _redirected[function] = contexts + 1, code


def _leave(function: types.FunctionType) -> None:
    with _lock:
        contexts, code = _redirected[function]
        if contexts > 1:
            _redirected[function] = contexts - 1, code
            return
        del _redirected[function]
        function.__code__ = code
        # the global stays for calls that other threads have begun


def _call_of(name: str, like: types.CodeType) -> types.CodeType:
    """The code of a function that passes its arguments to a global of the given name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return HANDLER(args, kwargs)  # pyright: ignore[reportUndefinedVariable]

    code = call.__code__
    return code.replace(
        co_names=tuple(name if n == "HANDLER" else n for n in code.co_names),
        co_name=like.co_name,
        co_qualname=like.co_qualname,
    )
