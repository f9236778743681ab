"""Rendering with the origin of each character: the template, or the messages.

Strings of messages are `_Text`: a str with one byte of origin for each character. Every operation
of a template computes what it computes on a plain str, and says beside it where the characters came
from. Joining, slicing, splitting, stripping, replacing and formatting say it exactly. For any other
operation, whatever jinja2 has, the rule is: of the template alone comes the template's; of a
message, or of a message and words that no special token shares a sign with, comes the message's; of
anything else comes what is unknown. So nothing that a message had a part in counts as the
template's.

What is not followed: numbers that come of bytes; whether a template writes something (an `if`, a
loop) rather than what; and which of its values a template takes from its lists and dicts. Which
characters it takes of a string is followed.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Cycler, Joiner, Namespace, pass_eval_context
from markupsafe import Markup

from .environment import Sandbox
from .texts import DATA, TEMPLATE, Float, Int, Safe, _Text, only, origins_in, origins_of

# Filters whose strings are those that they were given, or slices and joins by the methods of _Text.
EXACT = frozenset(
    (
        "attr",
        "d",
        "default",
        "first",
        "join",
        "last",
        "max",
        "min",
        "random",
        "replace",
        "reverse",
        "string",
        "trim",
    )
)
# their methods give what was put in
STORES = (dict, list, tuple, Namespace, LoopContext, Cycler, Joiner, Macro)
# of a layout, those whose text is str(argument): its name or number, or else the sign that is
# written twice
FIELDS = {
    "format": re.compile(r"\{(\w*)\}|(\{\{|\}\})"),
    "%": re.compile(r"%(?:\((\w+)\))?[sd]|(%)%"),
}


class Tracking(Sandbox):
    """The environment in which strings know their origin."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    class code_generator_class(CodeGenerator):
        """As jinja2's, but for `~` and slices."""

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
            self.write("environment.joined((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

        def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
            if not isinstance(node.arg, nodes.Slice):
                return super().visit_Getitem(node, frame)
            self.write("environment.sliced(")
            self.visit(node.node, frame)
            for bound in (node.arg.start, node.arg.stop, node.arg.step):
                self.write(", ")
                self.visit(bound or nodes.Const(None), frame)
            self.write(")")

    def __init__(self) -> None:
        super().__init__()
        self.concat = lambda parts: _Text("", b"").join(parts)
        self.finalize = self.shown
        self.filters["join"] = self._join
        self.filters = {
            name: self._followed(name, function) for name, function in self.filters.items()
        }

    def joined(self, parts: Iterable[Any]) -> str:
        """`~`."""
        return self.concat([self.shown(part) for part in parts])

    def shown(self, value: object) -> str:
        """str(value), with its origins."""
        if isinstance(value, str):
            return value if type(value) is _Text else _Text(str.__str__(value), origins_of(value))
        return self._made(str(value), [value])

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`."""
        return self._chosen(obj, super().getitem(obj, argument), [argument])

    def sliced(self, obj: Any, start: Any, stop: Any, step: Any) -> Any:
        """`obj[start:stop:step]`."""
        return self._chosen(obj, obj[start:stop:step], [start, stop, step])

    def _chosen(self, obj: Any, part: Any, indices: list[Any]) -> Any:
        """Characters of a string; those that a number of a message chose are not the template's
        alone.
        """
        if not (
            isinstance(obj, str)
            and isinstance(part, str)
            and any(isinstance(i, (Int, Float)) for i in indices)
        ):
            return part
        found = {DATA, *(bytes([origin]) for origin in set(origins_of(part)))}
        return _Text(str.__str__(part), only(found, self.signs.isdisjoint(part)))

    @functools.cached_property
    def signs(self) -> frozenset[str]:
        """What stands in special tokens beside letters, digits and spaces."""
        return frozenset(
            letter
            for token in self.special
            for letter in token
            if not (letter.isalnum() or letter in "_- \n")
        )

    def call(self, context: Any, function: Any, *args: object, **kwargs: object) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Any call that a template writes: a method of a string, a macro, a function of
        jinja2's.
        """
        args, kwargs = (
            tuple(map(_as_text, args)),
            {name: _as_text(value) for name, value in kwargs.items()},
        )
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if type(owner) is str and not hasattr(function, "__wrapped__"):
            owner = _Text(owner, TEMPLATE)
            function = getattr(owner, function.__name__)
        made = super().call(context, function, *args, **kwargs)
        if isinstance(owner, STORES) or isinstance(function, STORES):
            return made
        if (
            isinstance(owner, str)
            and hasattr(function, "__wrapped__")
            and function.__name__ == "format"
        ):
            return self._formatted("format", made, owner, args, kwargs)
        return self._made(made, [owner, *args, *kwargs.values()])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Any operator between two values, but for `~`."""
        left, right = _as_text(left), _as_text(right)
        made = super().call_binop(context, operator, left, right)
        if operator == "%" and isinstance(left, str):
            named = isinstance(right, Mapping)
            args = right if isinstance(right, tuple) else () if named else (right,)
            return self._formatted("%", made, left, args, right if named else {})
        return self._made(made, [left, right])

    def _followed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result knows its origin."""

        @functools.wraps(function)
        def filtered(*args: object, **kwargs: object) -> Any:
            args, kwargs = (
                tuple(map(_as_text, args)),
                {name: _as_text(value) for name, value in kwargs.items()},
            )
            made = function(*args, **kwargs)
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            if type(made) is Markup and isinstance(given[0], _Text) and str.__eq__(made, given[0]):
                made = Safe(made)
                made._origins = given[0]._origins
            if type(made) is _Text and name not in EXACT:
                made = str.__str__(made)
            return self._made(made, [*given, *kwargs.values()])

        return filtered

    @staticmethod
    @pass_eval_context
    def _join(
        context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None
    ) -> str:
        environment: Any = context.environment
        items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
        return _as_text(environment.shown(d)).join(map(environment.shown, items))

    def _made(self, made: Any, given: Iterable[Any]) -> Any:
        """What an operation made of what it was given: strings and numbers get the origin that all
        of them can have.
        """
        if type(made) is str or type(made) in (int, float):
            given = list(given)
            found, words = origins_in(given)
            if type(made) is not str:
                return (
                    made
                    if not found - {TEMPLATE}
                    else Int(made)
                    if type(made) is int
                    else Float(made)
                )
            texts = [value for value in given if isinstance(value, _Text)]
            # upper, title
            if (
                len(texts) == 1
                and len(made) == len(texts[0])
                and made.casefold() == texts[0].casefold()
            ):
                return _Text(made, texts[0]._origins)
            return _Text(made, only(found, self.signs.isdisjoint(words)))
        return made

    def _formatted(
        self, kind: str, made: str, layout: str, args: tuple[Any, ...], names: Mapping[str, object]
    ) -> str:
        """What `%` or `format` made: exactly, where each field is a plain one and all of them
        together are what was made.
        """
        layout, parts, begin, number = _as_text(layout), [], 0, 0
        try:
            for field in FIELDS[kind].finditer(layout):
                parts.append(layout[begin : field.start()])
                begin, name = field.end(), field[1]
                if field[2]:
                    parts.append(layout[field.start() : field.start() + 1])
                elif name and not name.isdigit():
                    parts.append(self.shown(names[name]))
                else:
                    parts.append(self.shown(args[int(name) if name else number]))
                    number += 1
        except LookupError:
            parts = []
        joined = self.concat([*parts, layout[begin:]])
        return joined if joined == made else self._made(str.__str__(made), [layout, args, names])


def _as_text(value: object) -> Any:
    return _Text(value, TEMPLATE) if type(value) is str else value
