"""Explaining wrong arguments of public functions: of another type, missing, or too many.

When a call raises an error that is not the library's, `door` compares the arguments with the
annotations: a tensor, an int, a number, a function, a dtype, a record or a value such as a Sampler.
A call that succeeds has no overhead, and an error that the arguments do not explain is raised
unchanged. Sizes and values are checked by the function itself.
"""

import collections.abc
import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar, overload

import optree
import torch
from torch import Tensor

from .. import records
from . import errors

F = TypeVar("F", bound=Callable[..., object])
C = TypeVar("C", bound=type)


class Kind(NamedTuple):
    """The description of an expected argument, a predicate, and the remedy in the message."""

    words: str
    holds: Callable[[object], bool]
    remedy: str = "Arguments come in the order key, model, params, data; options go by name."


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_nested


def _is_sequence(x: object) -> bool:
    return (
        isinstance(x, collections.abc.Iterable)
        and not isinstance(x, str)
        and not (isinstance(x, Tensor) and not x.dim())
    )


SEQUENCE = Kind("a sequence", _is_sequence, "Put a single one into a tuple.")
PLAIN: dict[object, Kind] = {
    Tensor: Kind(
        "a tensor",
        _is_tensor,
        "Make one of numbers by torch.tensor; apply a function to a tree by fa.tree.map.",
    ),
    int: Kind(
        "an int", lambda x: isinstance(x, numbers.Integral | torch.SymInt), "Give one whole number."
    ),
    float: Kind(
        "a number",
        lambda x: isinstance(x, numbers.Real | torch.SymInt | torch.SymFloat),
        "Give one number.",
    ),
    bool: Kind(
        "True or False",
        lambda x: isinstance(x, numbers.Integral) or type(x).__name__.startswith("bool"),
    ),
    str: Kind("a str", lambda x: isinstance(x, str)),
    type(None): Kind("None", lambda x: x is None),
    torch.dtype: Kind(
        "a torch.dtype", lambda x: isinstance(x, torch.dtype), "Pass one such as torch.float32."
    ),
    torch.device: Kind(
        "a torch.device",
        lambda x: isinstance(x, torch.device),
        'Pass one such as torch.device("cpu").',
    ),
    Callable: Kind("a function", callable, "Pass the function itself."),
    collections.abc.Mapping: Kind("a mapping", lambda x: isinstance(x, collections.abc.Mapping)),
    **dict.fromkeys((collections.abc.Sequence, collections.abc.Iterable, tuple, list), SEQUENCE),
}
MIXED = "same dtype"  # part of torch's message for operands of different dtypes
TREE = Kind(
    "a tree of weights",
    lambda x: _has_tensors(x),
    "model.init(key) makes one, and fa.load reads one.",
)


def _has_tensors(x: object) -> bool:
    given: Any = x
    return isinstance(x, tuple | list | dict) and any(
        isinstance(leaf, Tensor) for leaf in optree.tree_leaves(given)
    )


def kind_of(annotation: object) -> Kind | None:
    """The Kind that an annotation requires; None if it accepts anything."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin = typing.get_origin(annotation)
    if origin in PLAIN:
        return PLAIN[origin]
    if origin in (typing.Union, types.UnionType):
        parts = [kind_of(part) for part in typing.get_args(annotation)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        words = " or ".join(dict.fromkeys(part.words for part in known))
        return Kind(words, lambda x: any(part.holds(x) for part in known), known[0].remedy)
    if getattr(annotation, "array_type", None) is Tensor:  # jaxtyping's
        return PLAIN[Tensor]
    if not isinstance(annotation, type) or not (
        hasattr(annotation, "_fields") or dataclasses.is_dataclass(annotation)
    ):
        return None
    name = annotation.__name__
    if name == "Model":
        remedy = (
            "Make it with fa.decoder(config); arguments come in the order key, model, params, data."
        )
        return Kind(
            "from fa.decoder", lambda x: hasattr(x, "hidden") and hasattr(x, "logits"), remedy
        )
    remedy = f"Call what makes one first; help(funcattn) says where a {name} comes from."
    return Kind(
        f"a{'n' * (name[0] in 'AEIOU')} {name}", lambda x: isinstance(x, annotation), remedy
    )


SHORT = 48  # characters of an argument in a printed call
LOOSE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@overload
def door(f: F) -> F: ...
@overload
def door(f: F, *, name: str) -> F: ...
@overload
def door(*, name: str) -> Callable[[F], F]: ...


def door(f: Any = None, *, name: str | None = None) -> Any:
    """A public function that explains arguments of the wrong type or number when it raises.

    In its signature, as printed by `help` and `inspect`, functions that are defaults appear by
    name.

    Args:
        name: the name in messages; f.__name__ by default.

    Example:
        >>> @door
        ... def doubled(x: Tensor, *, times: int = 1) -> Tensor:
        ...     return x.repeat(2**times)
        >>> doubled(torch.ones(2), times=0.5)
        Traceback (most recent call last):
        TypeError: doubled: times should be an int, got 0.5. Give one whole number.
    """
    if f is None:
        return lambda f: door(f, name=name or f.__name__)
    called = name or f.__name__

    @functools.wraps(f)
    def checked(*args: object, **options: object) -> object:
        if torch.compiler.is_compiling():
            return f(*args, **options)
        try:
            return f(*args, **options)
        except Exception as error:
            if "should be" not in str(error):
                _explain(called, f, args, options, error)
            raise

    checked.__signature__ = _named(inspect.signature(f))  # pyright: ignore[reportAttributeAccessIssue]
    return checked


class _Named(functools.partial[object]):
    """A function as a default in a signature, printed by name; calling it calls the function."""

    def __repr__(self) -> str:
        return shown_value(self.func)


def _named(signature: inspect.Signature) -> inspect.Signature:
    """The signature with function defaults printed by name, in place of an address."""
    parameters = signature.parameters.values()
    named = [
        p.replace(default=_Named(p.default)) if inspect.isfunction(p.default) else p
        for p in parameters
    ]
    return signature.replace(parameters=named)


def shown_value(x: object) -> str:
    """An argument in a line: functions by name, tensors by dtype and shape, long values by type.

    Example:
        >>> shown_value(shown_value), shown_value(torch.ones(2)), shown_value(0.5), shown_value(
        ...     list(range(100)))
        ('shown_value', 'float32[2]', '0.5', 'list(...)')
    """
    if isinstance(x, Tensor):
        return records.describe(x)
    # a value made by a function decorated with `printed`
    if isinstance(text := getattr(x, "text", None), str) and text:
        return text
    if not inspect.isroutine(x):
        text = repr(x)
        short = len(text) <= SHORT and " at 0x" not in text
        return text if short else f"{type(x).__name__}(...)"
    maker, _, _ = x.__qualname__.partition(".<locals>.")
    # such as a schedule
    is_made = maker != x.__qualname__ and (x.__module__ or "").startswith("funcattn.")
    return f"{maker}(...)" if is_made else x.__name__


def printed(make: F) -> F:
    """Decorate a function that returns a NamedTuple: set its field `text` to the printed call.

    Example:
        >>> class Rounded(NamedTuple):
        ...     f: Any
        ...     text: str = ""
        >>> @printed
        ... def rounded(digits: int, *, by: float = 1.0) -> Rounded:
        ...     return Rounded(lambda x: round(x * by, digits))
        >>> rounded(2, by=0.5).text
        'rounded(2, by=0.5)'
    """

    @functools.wraps(make)
    def call(*args: object, **options: object) -> Any:
        value: Any = make(*args, **options)
        if torch.compiler.is_compiling():
            return value
        shown = [
            *map(shown_value, args),
            *(f"{name}={shown_value(x)}" for name, x in options.items()),
        ]
        return value._replace(text=f"{make.__name__}({', '.join(shown)})")

    return call  # pyright: ignore[reportReturnType]


def reprinted(cls: C) -> C:
    """A NamedTuple whose `_replace` clears its field `text`, unless it replaces that field too.

    A value with another field is no longer what the printed call made.

    Example:
        >>> @reprinted
        ... class Scaled(NamedTuple):
        ...     by: float
        ...     text: str = ""
        >>> Scaled(2.0, "scaled(2.0)")._replace(by=3.0)
        Scaled(by=3.0, text='')
    """
    replace: Callable[..., object] = cls._replace  # pyright: ignore[reportAttributeAccessIssue]
    setattr(
        cls,
        "_replace",
        lambda self, **fields: replace(self, **({"text": ""} if fields else {}) | fields),
    )
    return cls


def made(cls: C) -> C:
    """A dataclass whose constructor explains wrong arguments like `door`."""
    cls.__init__ = door(cls.__init__, name=cls.__name__)
    return cls


def _explain(
    called: str,
    f: Callable[..., object],
    args: tuple[object, ...],
    options: dict[str, object],
    error: Exception,
) -> None:
    """Raise a TypeError of the library where the arguments explain the error; else return."""
    signature = inspect.signature(f)
    try:
        given = signature.bind(*args, **options).arguments
    except TypeError:
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        needed = [
            f"{p.name}=" if p.kind is p.KEYWORD_ONLY else p.name
            for p in parameters
            if p.default is p.empty
        ]
        rest = [f"{p.name}=..." for p in parameters if p.default is not p.empty]
        got = (
            ", ".join(
                [
                    *map(what_is, args["self" in signature.parameters :]),
                    *(f"{key}=" for key in options),
                ]
            )
            or "nothing"
        )
        remedy = (
            "Arguments come in this order, options go by name; what returns a function is called "
            "twice."
        )
        wanted = f"({', '.join([*needed, *rest])})"
        raise TypeError(errors.form(called, "the arguments", wanted, f"({got})", remedy)) from None
    hints = typing.get_type_hints(f)
    for key, x in given.items():
        hint = hints.get(key)
        kind = TREE if key == "params" and hint is Any else kind_of(hint)
        if signature.parameters[key].kind in LOOSE:
            continue
        if kind is not None and not kind.holds(x):
            raise TypeError(
                errors.form(called, key, kind.words, what_is(x), kind.remedy)
            ) from error
        if key == "params" and MIXED in str(error) and len(first := _dtypes(x, key)) > 1:
            got = " and ".join(f"{dtype} at {path}" for dtype, path in first.items())
            remedy = "Bring them to one: fa.cast(torch.float32)(params)."
            raise TypeError(
                errors.form(called, key, "of one floating dtype", got, remedy)
            ) from error


def _dtypes(node: object, path: str) -> dict[torch.dtype, str]:
    """The floating dtypes in a tree with their first paths, quantized records left out."""
    if isinstance(node, Tensor):
        return {node.dtype: path} if node.is_floating_point() else {}
    if not isinstance(node, tuple | list | dict) or "codes" in getattr(node, "_fields", ()):
        return {}
    names = node if isinstance(node, dict) else getattr(node, "_fields", range(len(node)))
    found: dict[torch.dtype, str] = {}
    for name, x in zip(names, node.values() if isinstance(node, dict) else node, strict=True):
        found = _dtypes(x, f"{path}.{name}") | found
    return found


def uncalled(value: object, *args: object, **options: object) -> NoReturn:
    """`__call__` that raises, for a value that is not a function, such as the sampler `greedy`."""
    wanted, got = "passed as it is", f"a call with ({', '.join(map(what_is, args))})"
    errors.fail(
        type(value).__name__,
        "the value",
        wanted,
        got,
        "It is made already: leave the brackets out.",
        TypeError,
    )


def what_is(x: object) -> str:
    """A value in a few words, for messages."""
    if isinstance(x, Tensor):
        shape = errors.shape(x) if not x.is_nested else ""
        return f"a {'nested ' * x.is_nested}tensor {x.dtype} {shape}".rstrip()
    if x is None or isinstance(x, bool | numbers.Number | str | torch.dtype | torch.device):
        return repr(x)
    if isinstance(x, type) or inspect.isroutine(x):
        return f"the {'class' if isinstance(x, type) else 'function'} {x.__name__}"
    name = type(x).__name__
    return f"a{'n' * (name[0].lower() in 'aeiou')} {name}"
