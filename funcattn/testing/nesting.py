"""Every nesting of transforms of a kernel, as rows of `check`.

In float64 a nesting may be off by 1e-9 of its greatest entry. In a dtype of fewer digits by 4
times the error of the definition in plain operations of that dtype, and of 4 eps: a kernel rounds
as often, in another order, and the error of the definition is one draw of what rounding may do.
"""

import time
from math import isnan
from typing import Any, NamedTuple

import torch

from .. import masks, randomness, tree
from . import dense, snippets, transforms
from .accepted import Accepted
from .findings import Finding
from .laws.comparisons import Kernel
from .signatures import NotOffered
from .snippets import Named
from .subjects import quiet
from .transforms import Row

EXACT = 1e-9  # relative error in float64
MORE = 4.0  # than plain operations of the same dtype
# (query heads, key heads, queries, keys): the whole, and smaller ones that code to paste may take
WHOLE = (4, 2, 5, 6)
SMALLER = [(1, 1, 1, 1), (1, 1, 2, 2), (2, 1, 2, 2)]


class Nestings(NamedTuple):
    """The nestings of a kernel that was found to accept some inputs."""

    kernel: Kernel
    given: Accepted
    named: Named

    def examine(self, name: str, deadline: float) -> Finding:
        """One nesting."""
        if time.monotonic() > deadline:
            return Finding(name, "out of time", None, 0, "", "")
        row, allowed = self._row(name, WHOLE)
        eps = torch.finfo(self.given.dtype).eps
        error = _measured(row)
        if error <= allowed or isnan(error):
            if not row.failure:
                return Finding(name, "passed", error / eps, 1, "", "")
            lacks = row.failure.removeprefix(f"{NotOffered.__name__}: ")
            status = "raises" if lacks == row.failure else "not offered"
            return Finding(name, status, None, 1, lacks, "")
        for sizes in SMALLER:
            if time.monotonic() > deadline:
                break
            small, least = self._row(name, sizes)
            if _measured(small) > least:
                return self._broken(name, sizes, small, least, error / eps)
        return self._broken(name, WHOLE, row, allowed, error / eps)

    def _broken(
        self, name: str, sizes: tuple[int, int, int, int], row: Row, allowed: float, worst: float
    ) -> Finding:
        told = (
            f"{name}: it is off by {_measured(row):.2g} of its greatest entry, "
            f"where {allowed:.2g} is allowed."
        )
        return Finding(name, "broken", worst, 1, told, self._code(name, sizes, allowed))

    def _row(self, name: str, sizes: tuple[int, int, int, int]) -> tuple[Row, float]:
        """The error of a nesting, and the error that is allowed."""
        shapes, mask = self._shapes(sizes)
        q, k, v = (
            randomness.normal(randomness.key(n), shape, self.given.dtype).to(self.given.device)
            for n, shape in enumerate(shapes)
        )
        mask = mask if mask is None else tree.to(self.given.device)(mask)

        def run(f: Kernel) -> Row:
            with quiet():
                (row,) = transforms.nestings(
                    f, q, k, v, mask, names=[name], reference=self._definition
                )
            return row

        row = run(self.kernel)
        if self.given.dtype == torch.float64:
            return row, EXACT
        return row, MORE * max(run(self._definition).worst, torch.finfo(self.given.dtype).eps)

    def _definition(self, *args: Any) -> Any:
        found = dense.attend(*args)
        return found if self.given.returns_lse else found.out

    def _shapes(self, sizes: tuple[int, int, int, int]) -> tuple[list[tuple[int, ...]], Any]:
        """Shapes of q, k and v that the kernel accepts, and a causal mask if it takes one."""
        H, K, T, S = sizes
        options = self.given.options
        K = K if options["grouped"] else H
        S = T if options["square"] or options["masked"] == "causal or none" else S
        D = 2 if 2 in options["head_sizes"] else options["head_sizes"][0]
        mask = None if options["masked"] == "none" else masks.causal(T)
        return [(H, T, D), (K, S, D), (K, S, D)], mask

    def _code(self, name: str, sizes: tuple[int, int, int, int], allowed: float) -> str:
        shapes, mask = self._shapes(sizes)
        dtype, device = self.given.dtype, self.given.device
        where = "" if device.type == "cpu" else f".to({str(device)!r})"
        reference = "dense.attend" if self.given.returns_lse else "lambda *x: dense.attend(*x).out"
        return "\n".join(
            [
                *snippets.preamble("kernel", self.named, "dense", "transforms"),
                "q, k, v = (",
                f"    fa.random.normal(fa.key(n), shape, {dtype}){where}",
                f"    for n, shape in enumerate({shapes})",
                ")",
                f"mask = {snippets.literal(mask)}",
                "(row,) = transforms.nestings(",
                f"    subject, q, k, v, mask, names=[{name!r}], reference={reference}",
                ")",
                f"assert row.worst <= {allowed:.3g}, row",
            ]
        )


def _measured(row: Row) -> float:
    """The greatest error of a nesting, alone and where it ran under vmap; NaN where it raised."""
    return max(row.error, row.batched or 0.0)
