"""Chat templates: jinja2 programs that came with a file, run where they reach nothing and end soon.

They render in jinja2's ImmutableSandboxedEnvironment, with the names that transformers gives them, so that no template reaches
Python's internals (the hole of CVE-2024-34359), a file or the network. The sandbox alone lets a program run, or grow a value, for
as long as it likes. So one rendering has `STEPS` steps to spend: a turn of a loop or a call costs one, and so does every element
and every 256 characters of a value that an operator or a filter makes, or that is kept (`set`, `with`, `call`). What makes
something large at once (`*`, `**`, `~`, `+`, `|center(n)`) is looked at before it does; `range` gives 100 000 numbers at most.

Limits: steps are counted, not seconds; all of them take some seconds and some hundred megabytes at worst. A template that needs
a recursive loop, another file, or one of the filters in `DROPPED` is refused.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..families import CheckpointError

STEPS = 300_000  # of one rendering; a message takes some ten to fifty
LARGEST = 2**22  # characters of a text: a prompt of a million tokens
LONGEST = 2**17  # elements of a list
# Quadratic in a text or a list, or random.
DROPPED = ("wordwrap", "urlize", "striptags", "xmlattr", "pprint", "sum", "random", "center")
WIDEST = re.compile(r"[%{][^%{}a-zA-Z]*(\d{5}|\*)")  # a field of a format that asks for its own width


def render(template: str, messages: Sequence[Mapping[str, Any]], roles: Mapping[str, str], add_generation_prompt: bool) -> str:
    """The text of a conversation, or CheckpointError where the template cannot make it.

    Args:
        template: jinja2.
        messages: what the template knows as `messages`.
        roles: further names, such as eos_token.
        add_generation_prompt: what the template knows by this name.
    """
    names = {**roles, "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    parts, size = [], 0
    try:
        for part in _Sandbox().from_string(template).generate(names):
            size += len(part)
            _limit(size)
            parts.append(part)
    except Exception as error:  # of the template's making: jinja2's, or any that its arithmetic raises
        remedy = "Set another: dataclasses.replace(tokenizer, template=...)."
        got = f"{type(error).__name__}: {str(error)[:300]}"
        raise CheckpointError(f"chat: the chat template should be one that renders these messages, got {got}. {remedy}") from error
    return "".join(parts)


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the model's own words; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox for one rendering, with a purse of steps."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
        self.left = STEPS
        self.concat = _join
        self.filters = {name: self._modest(function) for name, function in self.filters.items() if name not in DROPPED}
        # Names with a space: no template can write them.
        self.filters |= {"tojson": _to_json, "each counted": self._each, "kept one": self._kept, "joined parts": _join_any}
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda layout: datetime.now().strftime(layout)}
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The tree with a filter around whatever is looped over, kept or joined."""
        tree = super()._parse(source, name, filename)
        if any(loop.recursive for loop in tree.find_all(nodes.For)):
            raise SecurityError("a recursive loop")
        if any(tree.find(kind) for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise SecurityError("another file")
        return _Rewrite().visit(tree)

    def _spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise SecurityError(f"more than {STEPS} steps")

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(1)
            yield item

    def _kept(self, value: Any) -> Any:
        """The value, paid for: its text by length, its elements one by one."""
        waiting = [value]
        while waiting:
            item, parts = waiting.pop(), ()
            if isinstance(item, str):
                self._spend(len(item) // 256)
            elif isinstance(item, Mapping) and not isinstance(item, Context):  # all names there are; the filter keeps none
                parts = (*item.keys(), *item.values())
            elif isinstance(item, list | tuple):
                parts = item
            self._spend(len(parts))
            waiting += parts
        return value

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self._spend(1)
        method = getattr(function, "__wrapped__", function)
        if isinstance(owner := getattr(method, "__self__", None), str):
            _check_arguments([owner] if method.__name__.startswith("format") else [], [*args, *kwargs.values()])
            if method.__name__ in ("join", "replace", "translate"):
                _check_made(method.__name__, owner, args)
        return self._kept(super().call(context, function, *(self._kept(value) for value in args), **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operation(operator, left, right)
        return self._kept(super().call_binop(context, operator, left, right))

    def _modest(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose numbers are no larger than a `range` may be, and whose result is paid for."""

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            texts = [value for value in args if isinstance(value, str)]
            _check_arguments(texts[:1] if function.__name__ == "do_format" else [], [*args, *kwargs.values()])
            if function.__name__ == "do_replace":
                _check_made("replace", texts[0] if texts else "", texts[1:])
            return self._kept(function(*(self._kept(value) for value in args), **kwargs))

        return filtered


class _Rewrite(NodeTransformer):
    """Put a filter around what a loop runs over, what a name keeps, and what `~` joins."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("each counted", node.iter)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = _filtered("kept one", node.node)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _filtered("kept one", node.filter)
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:
        self.generic_visit(node)
        node.values = [_filtered("kept one", value) for value in node.values]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("joined parts", nodes.List(node.nodes, lineno=node.lineno))


class _Namespace(jinja2.utils.Namespace):
    """One that prints short: nested in each other, jinja2's print as long as a power of two."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _filtered(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=getattr(node, "lineno", 1))


# What a built-in operation may make.


def _limit(size: int, most: int = LARGEST) -> None:
    if size > most:
        raise SecurityError(f"a value larger than {most}")


def _join(parts: Iterable[str]) -> str:
    parts = list(parts)
    _limit(sum(map(len, parts)))
    return "".join(parts)


def _join_any(parts: Iterable[Any]) -> str:
    return _join(map(str, parts))


def _check_operation(operator: str, left: Any, right: Any) -> None:
    sized, other = (left, right) if hasattr(left, "__len__") else (right, left)
    most = LARGEST if isinstance(sized, str) else LONGEST
    if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        _limit(len(left) + len(right), most)
    elif operator == "*" and hasattr(sized, "__len__") and isinstance(other, int):
        _limit(len(sized) * other, most)
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        _limit(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _limit(left.bit_length() * right)
    elif operator == "%" and isinstance(left, str):
        _check_arguments([left], [])


def _check_arguments(formats: Iterable[str], arguments: Iterable[Any]) -> None:
    """Refuse a width above MAX_RANGE, in a format or as a number."""
    if any(WIDEST.search(text) for text in formats) or any(isinstance(n, int) and n > MAX_RANGE for n in arguments):
        raise SecurityError(f"a width above {MAX_RANGE}")


def _check_made(method: str, text: str, arguments: Sequence[Any]) -> None:
    """Refuse what `join` or `replace` would make too large."""
    if method == "join" and arguments:
        items = list(arguments[0])
        _limit(len(text) * len(items) + sum(len(item) for item in items if isinstance(item, str)))
    elif method == "replace" and len(arguments) > 1 and all(isinstance(argument, str) for argument in arguments[:2]):
        _limit(len(text) + text.count(arguments[0]) * len(arguments[1]))


# What transformers gives to templates.


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without jinja2's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
