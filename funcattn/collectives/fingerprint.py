"""The contents of a value as bytes and tensors, equal on two processes with equal values.

A sampler or a drafter is functions whose settings are in their closures. `contents` descends into
functions (code, defaults, closures), partial applications, methods, frozen dataclasses and
containers. It yields neither addresses nor file names, so that processes of one program agree.

Of any other object only the type counts. Tensors of a record in a closure, such as the weights of a
draft model, may be shards that differ between processes: of such a record with a floating tensor,
only dtypes and sizes are yielded.
"""

import dataclasses
import functools
import operator
import re
import types
from collections.abc import Iterable, Iterator
from enum import Enum

import numpy as np
import optree
import torch
from torch import Tensor

from ..core import errors
from ..tree import Tree

Piece = bytes | Tensor
PLAIN = (int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device, type(...))


def contents(value: object) -> Iterator[Piece]:
    """The contents of a value in order: bytes, and the tensors whose elements count.

    Example:
        >>> scale = lambda by: lambda x: x * by
        >>> same = lambda a, b: list(contents(a)) == list(contents(b))
        >>> same(scale(0.7), scale(0.7)), same(scale(0.7), scale(1.0))
        (True, False)

    Law: samplers with equal settings have equal contents, with other settings others
        (test_agreement.py::test_a_sampler_is_known_by_its_settings).
    """
    return _of(value, {}, held=False)


def _of(value: Tree, seen: dict[int, tuple[int, object]], *, held: bool) -> Iterator[Piece]:
    """The contents of a value; held: whether it is in the closure of a function."""
    if isinstance(value, Tensor):
        if not errors.is_distributed(value):
            yield f"{value.dtype}{tuple(value.shape)}".encode()
            yield value
        return
    if isinstance(value, PLAIN):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}".encode()
        return
    seen[id(value)] = len(seen), value  # the reference keeps the id from being reused
    yield type(value).__qualname__.encode()
    if held and optree.is_namedtuple(value) and _may_be_parts(value):
        for leaf in optree.tree_iter(value):
            if isinstance(leaf, Tensor) and not errors.is_distributed(leaf):
                yield f"{leaf.dtype}{tuple(leaf.shape)}".encode()
        return
    for inner, inside in _inner(value, held):
        yield from _of(inner, seen, held=inside)


def _may_be_parts(record: Tree) -> bool:
    """Whether a record holds floating tensors, as weights and caches do, which may be shards."""
    return any(
        isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in optree.tree_iter(record)
    )


def _inner(value: Tree, held: bool) -> Iterable[tuple[object, bool]]:
    """The components of a value, and whether each is in the closure of a function."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        return [
            (each, True)
            for each in (value.__code__, value.__defaults__, value.__kwdefaults__, *cells)
        ]
    if isinstance(value, types.CodeType):
        return [(each, True) for each in (value.co_code, value.co_names, value.co_consts)]
    if isinstance(value, types.MethodType):
        return [(value.__func__, True), (value.__self__, True)]
    if isinstance(value, functools.partial):
        return [(each, True) for each in (value.func, value.args, value.keywords)]
    if isinstance(value, np.ndarray | np.generic):
        return [(value.dtype.str, held), (value.shape, held), (value.tobytes(), held)]
    if isinstance(value, types.BuiltinFunctionType | type):
        of = getattr(value, "__self__", None)
        bound = [] if of is None or isinstance(of, types.ModuleType | type) else [(of, held)]
        return [(f"{value.__module__}.{value.__qualname__}", held), *bound]
    if isinstance(value, operator.itemgetter | operator.attrgetter | operator.methodcaller):
        return [(value.__reduce__()[1:], held)]
    if hasattr(value, "__wrapped__"):  # as functools.lru_cache makes
        return [(value.__wrapped__, True)]
    if isinstance(value, types.ModuleType):
        return [(value.__name__, held)]
    if isinstance(value, re.Pattern):
        return [(value.pattern, held), (int(value.flags), held)]
    if isinstance(value, Enum):
        return [(value.name, held)]
    if isinstance(value, dict):
        items = (
            sorted(value.items(), key=lambda item: repr(item[0]))
            if _are_plain(value)
            else value.items()
        )
        return [(each, held) for item in items for each in item]
    if isinstance(value, set | frozenset):
        return (
            [(each, held) for each in sorted(value, key=repr)]
            if _are_plain(value)
            else [(len(value), held)]
        )
    if optree.is_namedtuple(value):  # `text` is how `core.doors.printed` has it printed
        return [
            (each, held) for name, each in zip(value._fields, value, strict=True) if name != "text"
        ]
    if isinstance(value, tuple | list):
        return [(each, held) for each in value]
    if getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False):
        return [
            (getattr(value, field.name), held)
            for field in dataclasses.fields(value)
            if field.compare
        ]
    return []


def _are_plain(keys: Iterable[object]) -> bool:
    """Whether repr(key) is the same in every process for each key, to sort by it."""
    return all(_are_plain(key) if type(key) is tuple else isinstance(key, PLAIN) for key in keys)


def _is_full(cell: types.CellType) -> bool:
    """Whether a closure cell has a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
