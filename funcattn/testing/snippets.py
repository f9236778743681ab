"""Failing inputs as Python to paste, which raises an AssertionError."""

import pprint
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import masks, tree
from ..masks import Mask


class Named(NamedTuple):
    """How code finds a subject.

    name: what it is called.
    place: `module:object`, or None where it was given as a value.
    signature: of a kernel, a name of `signatures.SIGNATURES`.
    wrapped: whether laws take `subjects.as_function` of it.
    """

    name: str
    place: str | None
    signature: str | None
    wrapped: bool


def of_law(
    kind: str, law: Callable[..., None], named: Named, values: tuple[Any, ...], told: str
) -> str:
    """The law, called with these values."""
    room = law.__module__.rpartition(".")[2]
    lines, names = [], []
    fields = (
        getattr(values, "_fields", None)
        or {
            "sampler": ("logits", "key"),
            "cache": ("size", "key"),
            "transform": ("params",),
            "acceptance": ("target", "draft", "key"),
        }[kind]
    )
    for name, value in zip(fields, values, strict=True):
        lines.append(f"{name} = {literal(value)}")
        names.append(name)
    call = f"laws.{room}.{law.__name__}(\n    subject, {', '.join(names)}\n)"
    return "\n".join([*preamble(kind, named, "laws"), *lines, call])


def preamble(kind: str, named: Named, *used: str) -> list[str]:
    """Imports, and the subject by name."""
    adapted = kind == "kernel" and named.signature != "mask"
    module, _, name = (named.place or "").partition(":")
    imported = name.isidentifier() and not module.endswith(".py")
    tools = {*used}
    if adapted:
        tools.add("signatures")
    if named.wrapped or (named.place and not imported):
        tools.add("subjects")
    lines = [
        "import torch",
        "import funcattn as fa",
        f"from funcattn.testing import {', '.join(sorted(tools))}",
    ]
    if imported:
        lines += [f"from {module} import {name} as subject", ""]
    elif named.place:
        lines += ["", f"subject = subjects.locate({named.place!r})"]
    else:
        lines += ["", f"subject = ...  # {named.name}"]
    if named.wrapped:
        lines.append(f"subject = subjects.as_function({kind!r}, subject)")
    if adapted:
        lines.append(f"subject = signatures.adapt(subject, {named.signature!r})")
    return lines


def literal(value: Any) -> str:
    """A value as an expression.

    Example:
        >>> print(literal(torch.tensor([0.5, 1.0])))
        torch.tensor([0.5, 1.0], dtype=torch.float32)
    """
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, Mask):
        T = value.start.shape[-2]
        if _same(value, masks.causal(T)):
            return f"fa.masks.causal({T})"
        return f"fa.masks.Mask({_tensor(value.start)}, {_tensor(value.stop)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        open, close = "()" if isinstance(value, tuple) else "[]"
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return open + ", ".join(map(literal, value)) + comma + close
    return repr(value)


def size(values: Any) -> int:
    """The number of numbers in a tree: what shrinks."""
    return sum(leaf.numel() if isinstance(leaf, Tensor) else 1 for leaf in tree.leaves(values))


def _tensor(x: Tensor) -> str:
    where = "" if x.device.type == "cpu" else f", device={str(x.device)!r}"
    if x.dtype == torch.int64 and x.shape == (2,) and not x[0]:
        return f"fa.key({int(x[1])})"
    text = pprint.pformat(x.tolist(), width=70, compact=True)
    text = text.replace("inf", 'float("inf")').replace("nan", 'float("nan")')
    shape = "" if x.numel() else f".reshape({tuple(x.shape)})"
    kind = "" if x.dtype in (torch.bool, torch.int64) else f", dtype={x.dtype}"
    joined = textwrap.indent(text, "    ").lstrip() if "\n" in text else text
    return f"torch.tensor({joined}{kind}{where}){shape}"


def _same(a: Mask, b: Mask) -> bool:
    b = tree.to(a.start.device)(b)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))
