"""Choosing a kernel: the first in the registry that can run the request and is not passed over.

The choice never reduces what composes: a kernel without a derivative is not chosen where one may
follow. `use("reference")` forces a kernel inside a `with`; one that cannot run then raises its
reason. A custom `Kernel` is accepted wherever a name is.
"""

import contextlib
import html
from collections.abc import Iterator
from typing import NamedTuple

from ..core import errors
from ..core.context import ContextValue
from . import reference, sdpa
from .closed import entry
from .request import Kernel, Request

_forced: ContextValue[str | Kernel | None] = ContextValue("kernel", None)

REGISTRY: tuple[Kernel, ...] = (  # in order of preference
    entry.NATIVE,
    sdpa.SDPA,
    entry.TRITON_KERNEL,
    entry.FLASH,
    reference.REFERENCE,
    sdpa.FLASH,
    sdpa.EFFICIENT,
    sdpa.CUDNN,
    sdpa.MATH,
)
_BY_NAME = {kernel.name: kernel for kernel in REGISTRY}


class Verdict(NamedTuple):
    """One row of an explanation: a kernel and the reason why it does not run."""

    kernel: str
    what: str
    why_not: str  # "" if the kernel can run
    chosen: bool

    @property
    def obstacle(self) -> str:
        """Alias of why_not, its earlier name."""
        return self.why_not


class Explanation(NamedTuple):
    """What `explain` returns: verdicts on all kernels, printed as a table."""

    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> str:
        """The name of the kernel that runs."""
        return next(v.kernel for v in self.verdicts if v.chosen)

    def __repr__(self) -> str:
        rows = [
            (("-> " if v.chosen else "   ") + v.kernel, v.why_not or "can run", v.what)
            for v in self.verdicts
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(
            f"{name:<{widths[0]}}  {state:<{widths[1]}}  {what}" for name, state, what in rows
        )

    def _repr_html_(self) -> str:
        cell = lambda text, bold: (
            f"<td>{'<b>' if bold else ''}{html.escape(text)}{'</b>' if bold else ''}</td>"
        )
        rows = "".join(
            "<tr>"
            + "".join(
                cell(text, v.chosen)
                for text in (v.kernel, v.why_not or "can run", v.what, "chosen" if v.chosen else "")
            )
            + "</tr>"
            for v in self.verdicts
        )
        return (
            "<table><tr><th>kernel</th><th>here</th><th>what it "
            f"is</th><th></th></tr>{rows}</table>"
        )


def named(function: str, kernel: str | Kernel, wanted: str = "one of") -> Kernel:
    """The kernel with this name; a `Kernel` is returned as it is."""
    if isinstance(kernel, Kernel):
        return kernel
    if kernel not in _BY_NAME:
        remedy = "See kernels.explain."
        errors.fail(
            function,
            "kernel",
            f"{wanted} {', '.join(map(repr, _BY_NAME))}, or a Kernel",
            repr(kernel),
            remedy,
        )
    return _BY_NAME[kernel]


def is_registered(kernel: Kernel) -> bool:
    """True for the kernels of this library."""
    return _BY_NAME.get(kernel.name) is kernel


def forced(kernel: str | Kernel | None = None) -> Kernel | None:
    """The kernel that is forced: by the argument, else by `use`."""
    given = kernel if kernel is not None else _forced.get()
    return None if given is None else named("attention", given, "None or one of")


def giving_lse(kernel: str | Kernel | None) -> Kernel | None:
    """The forced kernel for a segment whose lse is needed: flash in place of sdpa."""
    found = forced(kernel)
    return (
        entry.FLASH
        if found is not None and is_registered(found) and found.name.startswith("sdpa")
        else found
    )


def choose(r: Request, kernel: str | Kernel | None = None) -> Kernel:
    """The kernel that runs: the forced one, or the first of the registry that can and need not be
    passed over.
    """
    found = forced(kernel)
    if found is None:
        for one in REGISTRY:
            if not (one.passed_over(r) or one.why_not(r)):
                return one
    assert found is not None  # the reference can run every request
    reason = found.why_not(r)
    if reason:
        wanted, got = "one that can run on these inputs", f"{found.name!r}: {reason}"
        errors.fail("attention", "kernel", wanted, got, "Use kernel=None to let it be chosen.")
    return found


def verdicts(r: Request, kernel: str | Kernel | None = None) -> tuple[Verdict, ...]:
    """The verdict of each kernel on a request, the chosen one marked."""
    chosen = choose(r, kernel)
    is_forced = forced(kernel) is not None
    listed = REGISTRY if is_registered(chosen) else (chosen, *REGISTRY)
    reason = lambda one: one.why_not(r) or ("" if is_forced else one.passed_over(r))
    return tuple(Verdict(one.name, one.what, reason(one), one is chosen) for one in listed)


def unforced() -> contextlib.AbstractContextManager[None]:
    """Undo `use` inside the `with`."""
    return _forced.holding(None)


def current() -> str | Kernel | None:
    """The kernel that `use` forces in this context, or None."""
    return _forced.get()


@contextlib.contextmanager
def use(kernel: str | Kernel) -> Iterator[None]:
    """Force a kernel inside the `with`, in this thread: eager, compiled and exported.

    Args:
        kernel: a name in the registry (`explain` lists them), or a custom `Kernel`.

    Example:
        >>> import torch, funcattn as fa
        >>> q = torch.ones(1, 2, 4)
        >>> with fa.kernels.use("reference"):
        ...     fa.kernels.explain(q, q, q).chosen
        'reference'
    """
    named("kernels.use", kernel)
    with _forced.holding(kernel):
        yield
