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
def redirected(
    function: Callable[..., Any], handler: Handler, *, compiled: bool = False
) -> Iterator[None]:
    """Let every call of a function go to a handler, in the whole process.

    One handler for each function: contexts nest with the same one. It gets a copy of the function
    that is not redirected. torch.compile breaks the graph at the call and runs the handler eagerly,
    or with compiled=True traces the function as it is.

    Raises:
        TypeError: it is no plain Python function below its decorators.
    """
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise TypeError(f"redirected: function should be a plain function, got {function!r}.")
    _enter(function, handler, compiled)
    try:
        yield
    finally:
        _leave(function)


def _enter(function: types.FunctionType, handler: Handler, compiled: bool) -> None:
    with _lock:
        contexts, code = _redirected.get(function, (0, function.__code__))
        if not contexts:
            original = types.FunctionType(
                code, function.__globals__, function.__name__, function.__defaults__
            )
            original.__kwdefaults__ = function.__kwdefaults__
            eagerly = torch.compiler.disable(
                lambda args, kwargs: handler(original, args, kwargs),
                reason=f"{function.__name__} runs eagerly inside fa.interop.closed(): compile "
                "what is around it without fullgraph=True, or enter no context",
            )
            new = {"ORIGINAL": original, "HANDLER": eagerly, "IS_COMPILING": _is_compiling}
            names = {name: f"__funcattn_{function.__name__}_{name}" for name in new}
            function.__globals__.update({names[name]: value for name, value in new.items()})
            function.__code__ = _renamed(_traced if compiled else _eager, names, code)
        _redirected[function] = contexts + 1, code


def _leave(function: types.FunctionType) -> None:
    with _lock:
        contexts, code = _redirected[function]
        if contexts > 1:
            _redirected[function] = contexts - 1, code
            return
        del _redirected[function]
        function.__code__ = code
        # the new globals stay for calls that other threads have begun


_is_compiling = torch.compiler.is_compiling

# Codes of a redirected function; the names in capitals become globals of its module.
HANDLER: Callable[[tuple[Any, ...], dict[str, Any]], Any]
ORIGINAL: Callable[..., Any]
IS_COMPILING: Callable[[], bool]


def _eager(*args: Any, **kwargs: Any) -> Any:
    return HANDLER(args, kwargs)


def _traced(*args: Any, **kwargs: Any) -> Any:
    if IS_COMPILING():
        return ORIGINAL(*args, **kwargs)
    return HANDLER(args, kwargs)


def _renamed(
    call: types.FunctionType, names: dict[str, str], like: types.CodeType
) -> types.CodeType:
    code = call.__code__
    return code.replace(
        co_names=tuple(names.get(name, name) for name in code.co_names),
        co_name=like.co_name,
        co_qualname=like.co_qualname,
    )
