"""Strings that know the origin of each of their characters: the template, or the messages.

Every method of a `_Text` computes what it computes on a plain str, and the origins beside it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.runtime import Undefined
from markupsafe import Markup

TEMPLATE, DATA, ROLE, UNKNOWN = b"t", b"d", b"r", b"?"


class _Text(str):
    """A str that knows the origin of each of its characters."""

    __slots__ = ("_origins",)

    def __new__(cls, text: str = "", origins: bytes | None = None) -> "_Text":
        self = super().__new__(cls, text)
        self._origins = (
            UNKNOWN * len(self)
            if origins is None
            else origins
            if len(origins) != 1
            else origins * len(self)
        )
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        made = str.__add__(self, other)
        return made if made is NotImplemented else _Text(made, self._origins + origins_of(other))

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return _Text(str.__add__(other, self), origins_of(other) + self._origins)

    def __mul__(self, count: Any) -> Any:
        made = str.__mul__(self, count)
        return made if made is NotImplemented else _Text(made, self._origins * int(count))

    def __rmul__(self, count: Any) -> Any:
        return self * count

    def __getitem__(self, index: Any) -> "_Text":
        part = self._origins[index]
        return _Text(
            str.__getitem__(self, index), part if isinstance(part, bytes) else bytes([part])
        )

    def __iter__(self) -> Iterator["_Text"]:
        return (self[place] for place in range(len(self)))

    def join(self, parts: Iterable[str]) -> "_Text":
        parts = list(parts)
        return _Text(str.join(self, parts), self._origins.join(map(origins_of, parts)))

    def replace(self, old: str, new: str, count: int = -1) -> "_Text":
        made = str.replace(self, old, new, count)
        if not old:
            return _Text(made, mixed([self, new]))
        pieces, begin = [], 0
        while count != len(pieces) and (place := self.find(old, begin)) >= 0:
            pieces.append(self._origins[begin:place])
            begin = place + len(old)
        return _Text(made, origins_of(new).join([*pieces, self._origins[begin:]]))

    def strip(self, letters: str | None = None) -> "_Text":
        return self.lstrip(letters).rstrip(letters)

    def lstrip(self, letters: str | None = None) -> "_Text":
        return self[len(self) - len(str.lstrip(self, letters)) :]

    def rstrip(self, letters: str | None = None) -> "_Text":
        return self[: len(str.rstrip(self, letters))]

    def removeprefix(self, prefix: str) -> "_Text":
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str) -> "_Text":
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: int = -1) -> "list[_Text]":
        return self._cut(str.split(self, sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> "list[_Text]":
        return self._cut(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))

    def partition(self, sep: str) -> "tuple[_Text, ...]":
        return tuple(self._cut(str.partition(self, sep), 0))

    def rpartition(self, sep: str) -> "tuple[_Text, ...]":
        return tuple(self._cut(str.rpartition(self, sep), 0))

    def splitlines(self, keepends: bool = False) -> "list[_Text]":
        found, begin = [], 0
        for line, whole in zip(
            str.splitlines(self, keepends), str.splitlines(self, True), strict=True
        ):
            found.append(self[begin : begin + len(line)])
            begin += len(whole)
        return found

    def _cut(self, parts: Iterable[str], gap: int | None) -> "list[_Text]":
        """Parts of this text in its order, as the slices that they are: `gap` characters apart, or
        (None) white space.
        """
        found, begin = [], 0
        for part in parts:
            begin = self.index(part, begin) if gap is None else begin
            found.append(self[begin : begin + len(part)])
            begin += len(part) + (gap or 0)
        return found


class Safe(Markup):
    """Markup of a text, for `|safe`."""

    __slots__ = ("_origins",)


class Int(int):
    """A whole number of a message: its digits are the message's."""

    def __str__(self) -> str:
        return _Text(int.__repr__(self), DATA)


class Float(float):
    """A number of a message."""

    def __str__(self) -> str:
        return _Text(float.__repr__(self), DATA)


def of_messages(value: Any, role: bool = True) -> Any:
    """The same values, their strings and numbers marked as those of messages; the role of each
    message as a role.
    """
    if type(value) is str:
        return _Text(value, DATA)
    if type(value) in (int, float):
        return Int(value) if type(value) is int else Float(value)
    if isinstance(value, dict):
        here = {of_messages(name): of_messages(item, False) for name, item in value.items()}
        if role and type(value.get("role")) is str:
            here["role"] = _Text(value["role"], ROLE)
        return here
    return [of_messages(item, role) for item in value] if isinstance(value, list) else value


def origins_of(text: str) -> bytes:
    """One byte for each character. A plain str is the template's: whatever a message had a part in
    is made a _Text.
    """
    if type(text) is str:
        return TEMPLATE * len(text)
    return getattr(text, "_origins", UNKNOWN * len(text))


def only(found: set[bytes], apart: bool) -> bytes:
    """The one origin of a text that is made of these; `apart` says that the template's share has no
    sign of a special token.
    """
    if found <= {TEMPLATE}:
        return TEMPLATE
    if UNKNOWN in found or (TEMPLATE in found and not apart):
        return UNKNOWN
    return ROLE if found <= {ROLE, TEMPLATE} else DATA


def mixed(texts: Iterable[str]) -> bytes:
    """The one origin of a text that is made of all of these."""
    return only({bytes([origin]) for text in texts for origin in set(origins_of(text))}, False)


def origins_in(values: list[Any]) -> tuple[set[bytes], set[str]]:
    """The origins of all strings in some values, and the characters that are the template's."""
    found: set[bytes] = set()
    words: set[str] = set()
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            origins = origins_of(value)
            here = {bytes([origin]) for origin in set(origins)}
            found |= here
            if TEMPLATE in here:
                words.update(
                    value
                    if len(here) == 1
                    else (
                        x for x, origin in zip(value, origins, strict=True) if origin == TEMPLATE[0]
                    )
                )
        elif isinstance(value, (Int, Float)):
            found.add(DATA)
        elif isinstance(value, (dict, list, tuple)):
            if id(value) not in seen:
                seen.add(id(value))
                waiting += [*value, *value.values()] if isinstance(value, dict) else value
        elif not (
            value is None
            or isinstance(value, (bool, int, float, Undefined, range))
            or callable(value)
        ):
            # bytes, an iterator: what it holds is not looked at, since that would use it up
            found.add(UNKNOWN)
    return found, words
