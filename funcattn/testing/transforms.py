"""Every nesting of grad, jvp and vmap of a function, compared with plain operations in float64.

    check_transforms(fa.attention, depth=3)     3 + 9 + 27 nestings, also under vmap; 4 Hessians

A nesting is a function of the same arguments, so that transforms compose in any order:

    grad(f)(x) = gradient of sum_n w_n f(x)_n     jvp(f)(x) = derivative of f along a fixed tangent
    vmap(f)(x) = f over a batch of two made of x, with all arguments mapped, the first only, or all
                 but the first, by turns

The reference uses grad and jvp of torch.func, which are correct for plain operations, and loops in
place of vmap; so the test is of f and its derivative and batching rules, not of torch.
"""

import functools
import html
import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from .. import masks, randomness, tree
from ..core import errors
from ..kernels import attend, attention
from . import dense

Function = Callable[..., Tensor]  # of tensors to one vector
MODES = {"jacfwd": jacfwd, "jacrev": jacrev}
RULES = ("grad", "jvp", "vmap")


class Row(NamedTuple):
    """The error of one nesting relative to the greatest entry, alone and under one more vmap.

    None where it was not computed; `failure` is the error that was raised, after "under vmap: "
    where it was raised there alone, or "".
    """

    nesting: str
    error: float
    batched: float | None
    failure: str

    @property
    def worst(self) -> float:
        """The greater of the errors; inf where an error was raised."""
        return float("inf") if self.failure else max(self.error, self.batched or 0.0)


class Report(NamedTuple):
    """The result of `check_transforms`: prints as a table, also in a notebook."""

    rows: tuple[Row, ...]
    tolerance: float

    @property
    def worst(self) -> Row:
        """The nesting with the greatest error."""
        return max(self.rows, key=lambda row: row.worst)

    @property
    def off(self) -> tuple[Row, ...]:
        """The nestings with errors beyond the tolerance."""
        return tuple(row for row in self.rows if not row.worst <= self.tolerance)

    def __repr__(self) -> str:
        cells = [("nesting", "error", "under vmap", ""), *map(self._cells, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, self._total()])

    def _repr_html_(self) -> str:
        line = lambda cells, tag: (
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        )
        body = "".join(line(self._cells(row), "td") for row in self.rows)
        head = line(("nesting", "error", "under vmap", ""), "th")
        return f"<table>{head}{body}</table><p>{html.escape(self._total())}</p>"

    def _cells(self, row: Row) -> tuple[str, str, str, str]:
        number = lambda x: "" if x is None or row.failure else f"{x:.1e}"
        return (
            row.nesting,
            number(row.error),
            number(row.batched),
            row.failure or ("off" if row in self.off else ""),
        )

    def _total(self) -> str:
        worst = f"the worst is {self.worst.nesting}: {self.worst.worst:.1e}"
        return f"{len(self.rows)} nestings, {len(self.off)} beyond {self.tolerance:g}; {worst}"


def check_transforms(
    f: Callable[..., Any],
    *args: object,
    depth: int = 3,
    reference: Callable[..., Any] | None = None,
    vmapped: bool = True,
    hessians: bool = True,
    tolerance: float = 1e-9,
) -> Report:
    """Compare every nesting of grad, jvp and vmap of f with a reference; raise where one differs.

    Args:
        f: f(*args) -> a tree of tensors.
        args: trees; their floating tensors are differentiated and mapped, other leaves are
            constant. Without args, f is attention, f(q, k, v, mask) -> out or Attended, and is
            called with four heads of T = 5 queries, two of S = 6 keys and a causal mask (float64).
        depth: the greatest number of nested transforms.
        reference: the same function in plain torch operations, called in float64. None is the
            definition of attention, where f is `attention` or `attend` (or a functools.partial of
            one, with scale or bias), or no args are given.
        vmapped: whether each nesting is also tested under one more vmap, over all arguments.
        hessians: whether the Hessian of a weighted sum of f is computed by jacfwd and jacrev over
            each other, in all four ways.
        tolerance: of the error relative to the greatest entry; 1e-9 is for arguments in float64.

    Returns:
        A Report: one Row for each nesting.

    Raises:
        AssertionError: a nesting has a greater error, or raises; the message is the table.
        ValueError: args are given without a reference, and f is not attention of this library.

    Example:
        >>> x = torch.linspace(0, 1, 3, dtype=torch.float64)
        >>> check_transforms(torch.sigmoid, x, depth=1, reference=lambda x: 1 / (1 + (-x).exp()),
        ...     tolerance=1e-12).off
        ()
    """
    rows = nestings(f, *args, names=names_of(depth, hessians), reference=reference, vmapped=vmapped)
    report = Report(tuple(rows), tolerance)
    if report.off:
        raise AssertionError(
            f"check_transforms: {len(report.off)} of {len(report.rows)} nestings are off.\n{report}"
        )
    return report


def names_of(depth: int, hessians: bool = True) -> list[str]:
    """Every nesting of grad, jvp and vmap to a depth, and the Hessians.

    Example:
        >>> names_of(1, hessians=False)
        ['grad(f)', 'jvp(f)', 'vmap(f)']
    """
    nested = [
        names for n in range(1, depth + 1) for names in itertools.product(RULES, repeat=n)
    ] + (list(itertools.product(MODES, repeat=2)) if hessians else [])
    return ["(".join([*names, "f"]) + ")" * len(names) for names in nested]


def nestings(
    f: Callable[..., Any],
    *args: object,
    names: Sequence[str],
    reference: Callable[..., Any] | None = None,
    vmapped: bool = True,
) -> Iterator[Row]:
    """The rows of `check_transforms` of these names, whatever their errors; arguments as there."""
    if reference is None:
        reference = _definition(f, bool(args))
    if not args:
        q, k, v = (
            randomness.normal(randomness.key(i), n, torch.float64)
            for i, n in enumerate([(4, 5, 2), (2, 6, 2), (2, 6, 2)])
        )
        args = (q, k, v, masks.causal(5))
    moving = [
        place
        for place, leaf in enumerate(tree.leaves(args))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not moving:
        errors.fail(
            "check_transforms",
            "args",
            "with a floating tensor in them",
            "none",
            "Give what f is differentiated by.",
        )
    x, wide = ([leaf.to(dtype) for leaf in _at(args, moving)] for dtype in (None, torch.float64))
    ours, theirs = (
        _vector(f, args, moving),
        _vector(reference, tree.cast(torch.float64)(args), moving),
    )
    for name in names:
        *nested, _ = name.split("(")
        if nested[0] in MODES:
            outer, inner = nested
            pair = _hessian(outer, inner, ours, x), _hessian(outer, inner, theirs, x)
        else:
            pair = _nest(nested, ours, vmap=_vmap), _nest(nested, theirs, vmap=_loop)
        yield _row(name, *pair, x, wide, vmapped and nested[0] not in MODES)


def _definition(f: Callable[..., Any], given: bool) -> Callable[..., Any]:
    """The reference of functions that are attention, and of any f without args."""
    inner, options = (
        (f.func, dict(f.keywords)) if isinstance(f, functools.partial) and not f.args else (f, {})
    )
    known = inner in (attention, attend)
    options.pop("kernel", None)
    if (given and not known) or set(options) - {"scale", "bias"}:
        got, remedy = (
            f"none for {getattr(f, '__name__', f)}",
            "Pass the same function in plain torch operations: reference=...",
        )
        errors.fail("check_transforms", "reference", "given with args", got, remedy)
    definition = functools.partial(dense.attend, **options)

    def matching(*args: object) -> Any:
        return definition(*args) if wants_lse(args) else definition(*args).out

    def wants_lse(args: Any) -> bool:
        return inner is attend if known else not isinstance(f(*args), Tensor)

    return matching


def _at(args: Any, places: Sequence[int]) -> list[Tensor]:
    flat = tree.leaves(args)
    return [flat[place] for place in places]


def _vector(f: Callable[..., Any], args: tuple[Any, ...], moving: Sequence[int]) -> Function:
    """f as a function of its differentiated leaves to one vector; infinite entries become zero."""

    def vector(*x: Tensor) -> Tensor:
        given = dict(zip(moving, x, strict=True))
        count = itertools.count()
        place = lambda leaf: given.get(next(count), leaf)
        found = [
            leaf
            for leaf in tree.leaves(f(*tree.map(place, args)))
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        return _join([torch.where(leaf.isinf(), 0, leaf) for leaf in found])

    return vector


# The transforms: each maps a function of tensors to a vector to another one. Level 0 is innermost.


def _grad(f: Function, level: int) -> Function:
    total = lambda *x: _weigh(f(*x), level)
    return lambda *x: _join(grad(total, tuple(range(len(x))))(*x))


def _jvp(f: Function, level: int) -> Function:
    return lambda *x: jvp(f, x, tuple(_numbers(n + level, leaf) for n, leaf in enumerate(x)))[1]


def _vmap(f: Function, level: int) -> Function:
    def batch(*x: Tensor) -> Tensor:
        dims = _dims(len(x), level)
        return vmap(f, dims)(
            *(leaf if d is None else _pair(leaf) for leaf, d in zip(x, dims, strict=True))
        ).flatten()

    return batch


def _loop(f: Function, level: int) -> Function:
    def batch(*x: Tensor) -> Tensor:
        dims = _dims(len(x), level)
        return torch.cat(
            [
                f(*(leaf if d is None else _pair(leaf)[n] for leaf, d in zip(x, dims, strict=True)))
                for n in range(2)
            ]
        )

    return batch


def _nest(names: Sequence[str], f: Function, vmap: Callable[[Function, int], Function]) -> Function:
    rules = {"grad": _grad, "jvp": _jvp, "vmap": vmap}
    for level, name in enumerate(reversed(names)):
        f = rules[name](f, level)
    return f


def _hessian(outer: str, inner: str, f: Function, like: Sequence[Tensor]) -> Function:
    """The Hessian, in one vector of all arguments."""
    sizes, shapes = [x.numel() for x in like], [x.shape for x in like]

    def total(x: Tensor) -> Tensor:
        return _weigh(
            f(*(part.reshape(shape) for part, shape in zip(x.split(sizes), shapes, strict=True))), 0
        )

    return lambda *x: MODES[outer](MODES[inner](total))(_join(x)).flatten()


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _weigh(x: Tensor, level: int) -> Tensor:
    return (x * _numbers(7 + level, x)).sum()


def _numbers(n: int, like: Tensor) -> Tensor:
    """Fixed irregular numbers between -1 and 1, so that no derivative vanishes by symmetry."""
    return (
        (torch.arange(like.numel(), dtype=like.dtype, device=like.device) * (1.7 + n) + n)
        .cos()
        .reshape(like.shape)
    )


def _pair(x: Tensor) -> Tensor:
    """A batch of two, made of one example."""
    return torch.stack([x, x * 0.5 + _numbers(3, x) * 0.25])


def _dims(n: int, level: int) -> tuple[int | None, ...]:
    """Which of n arguments vmap maps: all, the first alone, all but the first."""
    first, others = [(0, 0), (0, None), (None, 0)][level % 3 if n > 1 else 0]
    return (first, *[others] * (n - 1))


def _row(
    name: str,
    ours: Function,
    theirs: Function,
    x: Sequence[Tensor],
    wide: Sequence[Tensor],
    vmapped: bool,
) -> Row:
    told = lambda error: textwrap.shorten(
        f"{type(error).__name__}: {error}", 100, placeholder="..."
    )
    # an error becomes a row of the table; the other nestings are still tested
    try:
        wanted = theirs(*wide)
        error = _error(ours(*x), wanted)
    except Exception as raised:
        return Row(name, float("nan"), None, told(raised))
    if not vmapped:
        return Row(name, error, None, "")
    try:
        both = vmap(ours)(*map(_pair, x))
        other = theirs(*(_pair(leaf)[1] for leaf in wide))
        return Row(name, error, max(_error(both[0], wanted), _error(both[1], other)), "")
    except Exception as raised:
        return Row(name, error, None, f"under vmap: {told(raised)}")


def _error(got: Tensor, wanted: Tensor) -> float:
    """The greatest difference relative to the greatest entry; inf for NaN or another shape."""
    if got.shape != wanted.shape:
        return float("inf")
    off = (got.double() - wanted).abs().max() if got.numel() else torch.zeros(())
    most = wanted.abs().max() if wanted.numel() else torch.ones(())
    return float((off / most if most else off).nan_to_num(nan=float("inf")))
