"""How laws compare tensors: their tolerances and error messages.

The tolerance of a kernel is an error bound. With u the rounding of the dtype and e that of its sums
(float32 at least), L a bound on the sums of absolute values in logits, and A the amplitude of a
result (the sum of absolute values of its terms),

    |got - wanted|  <=  A (2 (L + 2) u + 4 (2 L D + S + R + Dv) e)

A logit may be rounded once to the dtype, and is a sum of D products; a weight exp(S - l) carries
the error of S and of l; a weight, an output, and two intermediate results may be rounded to the
dtype; a sum over S keys, or in a gradient over the R queries that see a key, has one e for each
term. The 4 is for the few operations (maximum, exp, rescaling) on each term.

Source: Higham, Accuracy and stability of numerical algorithms, sections 3.1 (sums) and 3.5
    (products).
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Law = TypeVar("Law", bound=Callable[..., None])

_errors: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar("errors", default=None)


@contextlib.contextmanager
def measured() -> Iterator[list[float]]:
    """The greatest error of each comparison inside, in units of the rounding of its dtype.

    A unit is eps of the dtype times the amplitude of the result, which is one where a law has no
    amplitudes (probabilities, and results that should be exact).

    Example:
        >>> with measured() as errors:
        ...     agree(agree, "x", torch.ones(()) + 2**-22, torch.ones(()), 1e-6, "")
        >>> errors
        [2.0]
    """
    errors: list[float] = []
    token = _errors.set(errors)
    try:
        yield errors
    finally:
        _errors.reset(token)


def named(law: Law) -> Law:
    """A law whose errors, and errors raised by what it tests, name it."""

    @functools.wraps(law)
    def run(*args: object, **options: object) -> None:
        try:
            law(*args, **options)
        except Exception as error:
            if law.__name__ not in str(error):
                error.add_note(f"{law.__name__}: what this law tests raised.")
            raise

    return run  # pyright: ignore[reportReturnType]


def agree(
    law: Callable[..., Any],
    what: str,
    got: Tensor,
    wanted: Tensor,
    allowed: float,
    why: "str | Amplitudes",
) -> None:
    """Raise AssertionError with the law, the worst entry, its error, and why the bound."""
    if got.shape != wanted.shape:
        raise AssertionError(
            f"{law.__name__}: {what} should be {tuple(wanted.shape)}, got {tuple(got.shape)}."
        )
    limit = torch.finfo(got.dtype).max if got.dtype.is_floating_point else math.inf
    unit = torch.finfo(got.dtype).eps if got.dtype.is_floating_point else 1.0
    if isinstance(why, Amplitudes):
        unit, why = why.eps * (allowed / why.rounding or 1.0), why.why
    got, wanted = got.detach().double(), wanted.detach().double()
    # what may be beyond the range of the dtype may be infinite
    infinite = torch.where(wanted.abs() + allowed > limit, wanted.sign() * math.inf, wanted)
    # equal infinities are equal
    equal = (got == wanted) | (got == infinite)
    off = torch.where(equal, 0, (got - wanted).abs()).nan_to_num(nan=math.inf)
    if (errors := _errors.get()) is not None and off.numel():
        errors.append(float(off.max()) / unit)
    if not off.numel() or off.max() <= allowed:
        return
    at = torch.unravel_index(off.argmax(), off.shape)
    place = f"{what}[{', '.join(str(int(i)) for i in at)}]" if at else what
    raise AssertionError(
        f"{law.__name__}: {place} is {got[at]:.6g}, should be {wanted[at]:.6g}. It is off by "
        f"{off[at]:.2g} where {allowed:.2g} is "
        f"allowed ({why}); {int((off > allowed).sum())} of {off.numel()} entries are off."
    )


class Amplitudes(NamedTuple):
    """The sizes that a tolerance is computed from: norms of q, k and v, and lengths of sums."""

    q: float  # greatest norm of a row, as k and v
    k: float
    v: float
    value: float  # the greatest entry of v
    scale: float
    leads: int  # examples over which the gradient of a broadcast input is summed
    rows: int  # queries that may see a key: terms of the sums in the gradients of k and v
    rounding: float  # bound on the error of a sum, relative to the sum of absolute values
    eps: float  # of the dtype of q
    why: str


def amplitudes(q: Tensor, k: Tensor, v: Tensor) -> Amplitudes:
    """The amplitudes of attention with these inputs."""
    H, T, D = q.shape[-3:]
    S, Dv = v.shape[-2:]
    leads = math.prod(torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]))
    rows, scale = leads * H * T, D**-0.5
    products = (
        q.detach().double().abs()
        @ k.detach().double().abs().repeat_interleave(H // k.shape[-3], -3).mT
    )
    L = scale * float(products.max()) if products.numel() else 0.0
    u, e = (
        torch.finfo(q.dtype).eps / 2,
        min(torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps) / 2,
    )
    rounding = 2 * (L + 2) * u + 4 * (2 * L * D + S + rows + Dv) * e
    sizes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
    why = f"rounding of {str(q.dtype).removeprefix('torch.')} with logits up to {L:.3g}, {sizes}"
    greatest = float(v.detach().abs().max()) if v.numel() else 0.0
    return Amplitudes(
        longest(q), longest(k), longest(v), greatest, scale, leads, rows, rounding, 2 * u, why
    )


def longest(x: Tensor) -> float:
    """The greatest Euclidean norm of a row of x (*lead, rows, features); 0 where there are none."""
    return float(x.detach().double().norm(dim=-1).max()) if x.numel() else 0.0
