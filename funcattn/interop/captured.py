"""Tensors that a function reads from outside its arguments, made arguments.

    f(x) = g(x, *tensors),    tensors: those of its closure, of a partial, and of modules

A rematerialized function and a score of attention run below the levels of torch.func, where a
derivative or a vmap follows arguments only. Found are tensors in closures, defaults, partials,
bound methods and globals that the function names, in lists, tuples and dicts of those, and in the
parameters, buffers and attributes of every nn.Module among them, also those that
torch.func.functional_call has put there.
"""

import contextlib
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from ..core import errors
from ..core.autograd import has_tangent, is_differentiable

Rebuild = Callable[[Sequence[Tensor]], Any]


MAX_ENTRIES = 1000  # of a list or dict that is searched; a longer one is data


class Captured:
    """What a value (a function, a module, a container of those) captures.

    Args:
        value: what is searched.
        door: the public function that calls it, for errors.

    Attributes:
        tensors: those that a transform or autograd may follow.
    """

    def __init__(self, value: object, door: str = "checkpoint") -> None:
        self.value, self.door = value, door
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}  # id of a tensor -> its place in tensors
        self._known: dict[int, tuple[object, Rebuild | None]] = {}  # by id, with what has it
        # Of modules: their dicts of tensors, and (dict, name, tensor, place or None if constant).
        self._holders: list[dict[str, Any]] = []
        self._state: list[tuple[dict[str, Any], str, Tensor, int | None]] = []
        self._rebuild = self._visit(value)

    @contextlib.contextmanager
    def placed(self, tensors: Sequence[Tensor]) -> Iterator[Any]:
        """The value with other tensors in place of `tensors`; modules have them inside the `with`.

        Modules are otherwise as they were when this was made.

        Raises:
            ValueError: the function put a floating tensor into one of its modules, which would not
                be tracked outside.
        """
        before = [(holder, name, holder.get(name)) for holder, name, *_ in self._state]
        for holder, name, tensor, number in self._state:
            holder[name] = tensor if number is None else tensors[number]
        entered = [dict(holder) for holder in self._holders]
        try:
            yield self.value if self._rebuild is None else self._rebuild(tensors)
            for holder, held in zip(self._holders, entered, strict=True):
                for name, x in holder.items():
                    if x is not held.get(name) and is_differentiable(x):
                        wanted = "one that leaves its modules as they were"
                        remedy = "Return the tensor instead."
                        errors.fail(
                            self.door, "function", wanted, f"one that sets {name!r}", remedy
                        )
        finally:
            for holder, name, tensor in before:
                if tensor is None:
                    holder.pop(name, None)
                else:
                    holder[name] = tensor

    def _visit(self, x: object) -> Rebuild | None:
        """How to make x with other tensors; None if it is x whatever they are."""
        if isinstance(x, Tensor):
            return self._tensor(x)
        if id(x) not in self._known:
            self._known[id(x)] = x, None  # for cycles
            self._known[id(x)] = x, self._search(x)
        return self._known[id(x)][1]

    def _search(self, x: Any) -> Rebuild | None:
        if isinstance(x, nn.Module):
            return self._module(x)
        if isinstance(x, functools.partial):
            make = lambda func, args, keywords: functools.partial(func, *args, **keywords)
            return self._parts([x.func, x.args, x.keywords], make)
        if isinstance(x, types.MethodType):
            return self._parts([x.__func__, x.__self__], types.MethodType)
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if type(x) in (dict, OrderedDict) and len(x) <= MAX_ENTRIES:
            make = lambda *values: type(x)(zip(x, values, strict=True))
            return self._parts(list(x.values()), make)
        if type(x) in (list, tuple) and len(x) <= MAX_ENTRIES:
            return self._parts(list(x), lambda *values: type(x)(values))
        make = getattr(x, "_make", None)
        if isinstance(x, tuple) and make is not None:  # a NamedTuple
            return self._parts(list(x), lambda *values: make(values))
        return None

    def _tensor(self, x: Tensor) -> Rebuild | None:
        if not (_functorch.is_functorch_wrapped_tensor(x) or x.requires_grad or has_tangent(x)):
            return None
        number = self._number(x)
        return lambda tensors: tensors[number]

    def _number(self, x: Tensor) -> int:
        if id(x) not in self._numbers:
            self._numbers[id(x)] = len(self.tensors)
            self.tensors.append(x)
        return self._numbers[id(x)]

    def _module(self, module: nn.Module) -> None:
        for part in module.modules():
            if part is not module and id(part) in self._known:
                continue
            self._known[id(part)] = part, None
            for holder in (part._parameters, part._buffers, vars(part)):
                self._holders.append(holder)
                for name, x in holder.items():
                    if isinstance(x, Tensor):
                        number = None if self._tensor(x) is None else self._number(x)
                        self._state.append((holder, name, x, number))

    def _parts(self, parts: list[Any], make: Callable[..., Any]) -> Rebuild | None:
        rebuilds = [self._visit(part) for part in parts]
        if all(rebuild is None for rebuild in rebuilds):
            return None
        return lambda tensors: make(
            *(
                part if rebuild is None else rebuild(tensors)
                for part, rebuild in zip(parts, rebuilds, strict=True)
            )
        )

    def _function(self, f: types.FunctionType) -> Rebuild | None:
        cells = {n: c for n, c in enumerate(f.__closure__ or ()) if _contents(c)}
        names = [n for n in sorted(_names(f.__code__)) if _is_of(f, f.__globals__.get(n))]

        def make(
            contents: list[Any], defaults: Any, keywords: Any, named: list[Any]
        ) -> types.FunctionType:
            closure = list(f.__closure__ or ())
            for n, content in zip(cells, contents, strict=True):
                if content is not cells[n].cell_contents:
                    closure[n] = types.CellType(content)
            known = f.__globals__ | dict(zip(names, named, strict=True))
            copy = types.FunctionType(f.__code__, known, f.__name__, defaults, tuple(closure))
            copy.__kwdefaults__ = keywords
            copy.__dict__.update(f.__dict__)
            return copy

        contents = [cell.cell_contents for cell in cells.values()]
        named = [f.__globals__[name] for name in names]
        return self._parts([contents, f.__defaults__, f.__kwdefaults__, named], make)


def _contents(cell: types.CellType) -> bool:
    """True where a cell is filled."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _names(code: types.CodeType) -> set[str]:
    """Names that code reads, and the code of functions inside of it."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_of(f: types.FunctionType, x: object) -> bool:
    """True for a global that f may read tensors from: a tensor, a module, a neighbour of f."""
    if isinstance(x, types.FunctionType):
        return x.__globals__ is f.__globals__
    return isinstance(x, (Tensor, nn.Module, list, tuple, dict))
