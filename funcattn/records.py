"""Records: NamedTuples of tensors and records, and the records used throughout the library.

A record is a pytree for optree and for torch.func without registration, so it passes through grad,
jvp, vmap and compile. Three rules keep it so:

- no int, string or None inside: torch counts None as a leaf, optree does not, and transforms accept
  tensors only. Absent fields are the empty tuple, `ABSENT`; sizes are read from shapes.
- a record is a value: its tensors are not written into once it is made.
- tuple arithmetic (`+`, `*` and `bool()`) raises.
"""

import functools
import html
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # a dependency of torch; in typing from 3.13 on

Cls = TypeVar("Cls", bound=type)

# A tensor, or tuples, NamedTuples, lists and dicts of trees: weights, states, batches and results
# of functions. In place of tensors it may hold one value for each (a shape, a spec, a bool).
# Python's types cannot say that a function returns a tree of the structure of its argument.
Tree: TypeAlias = Any

R = TypeVar("R", bound=tuple[Tensor, ...])

ABSENT = ()  # the value of an absent field: a tree without leaves


def is_absent(value: object) -> "TypeIs[tuple[()]]":
    """True for the empty tuple, the value of an absent field (no cache, no bias, a tied head)."""
    return type(value) is tuple and not len(value)


def record(cls: Cls) -> Cls:
    """Mark a NamedTuple as a record: tuple arithmetic raises, and torch.load accepts it.

    Printing shows dtypes and shapes of the fields; absent fields are omitted.

    Example:
        >>> import torch
        >>> @record
        ... class Point(NamedTuple):
        ...     x: torch.Tensor
        ...     y: Any = ABSENT
        >>> Point(torch.zeros(2, 3))
        Point(x=float32[2,3])
    """
    name = cls.__name__

    def refuse(sign: str) -> Callable[..., NoReturn]:
        def method(self: object, *_: object) -> NoReturn:
            raise TypeError(
                f"{name}: `{sign}` has no meaning for a record; it would do a tuple's work. Name a "
                "field, or use funcattn.tree."
            )

        return method

    signs = {"__add__": "+", "__radd__": "+", "__mul__": "*", "__rmul__": "*", "__bool__": "bool()"}
    for method_name, sign in signs.items():
        if method_name not in vars(cls):
            setattr(cls, method_name, refuse(sign))
    if "__repr__" not in cls.__dict__ or cls.__repr__.__module__ != cls.__module__:
        setattr(cls, "__repr__", _describe)
    torch.serialization.add_safe_globals([cls])  # loading it runs no code
    if "_repr_html_" not in cls.__dict__:
        setattr(cls, "_repr_html_", lambda self: unfolded(type(self).__name__, self))
    return cls


def formerly(**names: str) -> Callable[[Cls], Cls]:
    """A NamedTuple whose fields have deprecated names too, as attributes and keyword arguments.

    Args:
        names: deprecated=current.

    Example:
        >>> from typing import NamedTuple
        >>> @formerly(width="size")
        ... class Box(NamedTuple):
        ...     size: int
        >>> Box(width=3).width, Box(1)._replace(width=2)
        (3, Box(size=2))
    """

    def apply(cls: Cls) -> Cls:
        def new(options: dict[str, object]) -> dict[str, object]:
            twice = [old for old in options if names.get(old) in options]
            if twice:
                raise TypeError(
                    f"{cls.__name__}: {twice[0]} is {names[twice[0]]}, which is given too."
                )
            return {names.get(key, key): value for key, value in options.items()}

        construct: Callable[..., object] = cls.__new__
        replace: Callable[..., object] = cls._replace  # pyright: ignore[reportAttributeAccessIssue]
        setattr(
            cls,
            "__new__",
            functools.wraps(construct)(
                lambda cls, *args, **options: construct(cls, *args, **new(options))
            ),
        )
        setattr(cls, "_replace", lambda self, **options: replace(self, **new(options)))
        for old, field in names.items():
            setattr(
                cls, old, property(operator.attrgetter(field), doc=f"The older name of `{field}`.")
            )
        return cls

    return apply


def _describe(self: Tree) -> str:
    fields = [
        f"{name}={describe(x)}"
        for name, x in zip(self._fields, self, strict=True)
        if not is_absent(x)
    ]
    return f"{type(self).__name__}({', '.join(fields)})"


def describe(value: object) -> str:
    """One line for a leaf or a subtree: `float32[2,3]` for a tensor, the element kind and count for
    a long tuple.
    """
    if isinstance(value, Tensor):
        sizes = ",".join(str(n) for n in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if type(value) is tuple and len(value) > 3:
        return f"({describe(value[0])}, ... {len(value)} in all)"
    if type(value) is tuple:
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return repr(value)


def unfolded(name: str, value: object, *, opened: bool = True) -> str:
    """A record as collapsible HTML: a line for a leaf; equal neighbours are merged.

    Example:
        >>> unfolded("w", ABSENT)
        '<div style="font-family:monospace">w: ()</div>'
    """
    line = '<div style="font-family:monospace">'
    if not isinstance(value, (tuple, dict)) or not len(value):
        return f"{line}{html.escape(f'{name}: {describe(value)}')}</div>"
    fields = getattr(value, "_fields", value if isinstance(value, dict) else range(len(value)))
    groups: list[tuple[object, object, Tree]] = []  # first name, last name, value
    for field, item in zip(
        fields, value.values() if isinstance(value, dict) else value, strict=True
    ):
        if is_absent(item) and hasattr(value, "_fields"):
            continue
        if groups and isinstance(field, int) and describe(groups[-1][2]) == describe(item):
            groups[-1] = (groups[-1][0], field, item)
        else:
            groups.append((field, field, item))
    inner = "".join(
        unfolded(str(a) if a == b else f"{a} to {b}, each", item, opened=False)
        for a, b, item in groups
    )
    kind = type(value).__name__ if type(value) is not tuple else f"{len(value)}"
    title = html.escape(name if name == kind else f"{name}: {kind}")
    opening = f"<details{' open' if opened else ''}>"
    return f"{opening}{SUMMARY}{title}</summary>{INDENT}{inner}</div></details>"


MAX_ROWS = 32  # of batched statistics that are printed


def by_rows(numbers: R, line: Callable[[R], str]) -> str:
    """A record of scalars (*lead,) as text: `line` of it, or a numbered line for each vmapped row.

    Args:
        numbers: a record whose fields have one shape and concrete values.
        line: the text of one row, whose fields are ().

    Example:
        >>> by_rows(Attended(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])),
        ...     lambda x: f"{x.out:.0f} of {x.lse:.0f}")
        '0: 1 of 3\\n1: 2 of 4'
    """
    lead = numbers[0].shape
    if not lead:
        return line(numbers)
    places = [tuple(place) for place in torch.ones(lead).nonzero()[:MAX_ROWS].tolist()]
    lines = [
        f"{', '.join(map(str, place))}: {line(type(numbers)(*(x[place] for x in numbers)))}"
        for place in places
    ]
    left = lead.numel() - len(places)
    return "\n".join([*lines, f"... {lead.numel()} in all"] if left else lines)


SUMMARY = '<summary style="font-family:monospace;cursor:pointer">'
INDENT = '<div style="margin-left:1.2em">'


@record
class Attended(NamedTuple):
    """The result of attention: the output and the log-sum-exp of its logits.

    out: (*lead, H, T, Dv), in the dtype of v.
    lse: (*lead, H, T), log of the sum of exp of the logits, float32 at least; -inf where no key is
        visible to a query.
    """

    out: Tensor
    lse: Tensor


class Hashed:
    """A dataclass whose hash is computed once, in no field: of eighty fields it takes 30 us.

    A copy in another process computes its own, since the hash of a str differs between processes.
    """

    __slots__ = ("_hash",)

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))
            return self._hash

    def __getstate__(self) -> dict[str, object]:
        return dict(vars(self))
