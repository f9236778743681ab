"""Which inputs a kernel accepts: those that it refuses by an error are not drawn for its laws.

A kernel is called with small inputs, one for each property: grouped heads, leading axes, another
size of values, ... What raises is left out of the inputs and named, with the error, since a refusal
is no wrong number. What returns is drawn, whether right or wrong: the laws find that out.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import masks, randomness, tree
from ..core import errors
from .laws.comparisons import AnyMask, Kernel, parts_of
from .signatures import Signature
from .strategies import SIZES, Problem, Strategy, problems
from .subjects import in_a_line, quiet

DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # tried in this order
SIZE, LARGER = 4, (16, 64)  # head sizes: of trials, and where those of SIZES are refused
# What may be left out of inputs, and what it is called in a table.
PROPERTIES = {
    "leads": "leading axes",
    "grouped": "fewer key heads than query heads",
    "own_sizes": "values of another size than keys",
    "head_sizes": f"head sizes {SIZES[0]} to {SIZES[-1]}",
    "rectangular": "more or fewer keys than queries",
    "masks": "masks",
    "booleans": "masks of booleans",
    "empty_rows": "queries that see no key",
    "large_logits": "logits of thousands",
}


class Accepted(NamedTuple):
    """What inputs of a kernel are like.

    options: those of `strategies.problems`.
    refused: for each property that is left out, the error, or "as asked".
    returns_lse: whether the kernel returns (out, lse).
    """

    dtype: torch.dtype
    device: torch.device
    options: dict[str, Any]
    refused: dict[str, str]
    returns_lse: bool

    def problems(self) -> "Strategy[Problem]":
        """Inputs that the kernel accepts."""
        drawn = problems(dtype=self.dtype, **self.options)
        if self.device.type == "cpu":
            return drawn
        return drawn.map(tree.to(self.device))


class Trial(NamedTuple):
    """Calls of a kernel with small inputs, of which only the errors are read."""

    kernel: Kernel
    device: torch.device
    mask: AnyMask

    def __call__(
        self,
        dtype: torch.dtype,
        D: int,
        *,
        q: tuple[int, ...] = (2, 4),
        k: tuple[int, ...] = (2, 4),
        v: tuple[int, ...] = (2, 4),
        Dv: int | None = None,
        mask: AnyMask = None,
    ) -> Any:
        """The result of q (*q, D), k (*k, D), v (*v, Dv) and a mask, or the usual one."""
        mask = self.mask if mask is None else mask
        x, y, z = (
            randomness.normal(randomness.key(n), shape, dtype).to(self.device)
            for n, shape in enumerate([(*q, D), (*k, D), (*v, Dv or D)])
        )
        with torch.no_grad(), quiet():
            return self.kernel(x, y, z, mask if mask is None else tree.to(self.device)(mask))

    def simplest(
        self, dtypes: Sequence[torch.dtype], signature: Signature
    ) -> tuple[torch.dtype, int, bool, str]:
        """The first dtype and head size that run, whether lse is returned, and the first error."""
        first = ""
        for dtype, D in itertools.product(dtypes, (SIZE, *LARGER)):
            try:
                parts = parts_of(self(dtype, D))
                if not all(isinstance(x, Tensor) for x in parts.values()):
                    errors.fail("check", "what it returns", "tensors", parts, "")
                return dtype, D, "lse" in parts, first
            except Exception as error:  # whatever a kernel raises
                first = first or in_a_line(error, 120)
        form = "(H, T, D), or (B, H, T, D) where its signature has a batch axis"
        errors.fail(
            "check",
            "the kernel",
            f"callable as signature {signature.name!r} with q, k, v {form}",
            first,
            "Choose another signature or dtype.",
        )

    def refusal(self, dtype: torch.dtype, D: int, **given: Any) -> str:
        """The error of a call in one line, or nothing."""
        try:
            self(dtype, D, **given)
        except Exception as error:  # whatever a kernel raises
            return in_a_line(error, 120)
        return ""


def accepted(
    kernel: Kernel,
    signature: Signature,
    dtype: torch.dtype | None,
    device: torch.device,
    left_out: Sequence[str] = (),
) -> Accepted:
    """What a kernel accepts, by trial.

    Args:
        kernel: kernel(q, k, v, mask).
        signature: the one it was adapted from.
        dtype: of q, k and v; None is the first of `DTYPES` that is accepted.
        device: of q, k and v.
        left_out: properties of `PROPERTIES` that are not tried.

    Raises:
        ValueError: the kernel raises for the simplest inputs.
    """
    attempt = Trial(kernel, device, masks.causal(4) if signature.masked == "causal" else None)
    of, D, returns_lse, first = attempt.simplest([dtype] if dtype else DTYPES, signature)
    trials: dict[str, dict[str, Any]] = {
        "leads": {"q": (3, 2, 4), "k": (1, 2, 4)},
        "grouped": {"q": (4, 4)},
        "own_sizes": {"Dv": D - 1},
        "head_sizes": {},
    }
    if not signature.square:
        trials["rectangular"] = {"q": (2, 3), "k": (2, 5), "v": (2, 5)}
    if signature.masked == "any":
        trials["masks"] = {"mask": masks.causal(4)}
        trials["booleans"] = {"mask": torch.ones(4, 4, dtype=torch.bool)}
    refused = dict.fromkeys(left_out, "as asked")
    if of != (dtype or DTYPES[0]):
        refused[str(DTYPES[0]).removeprefix("torch.")] = first
    if D != SIZE:
        refused.setdefault("head_sizes", first)
    for name, given in trials.items():
        size = D - 1 if name == "head_sizes" else D
        if name not in refused and (error := attempt.refusal(of, size, **given)):
            refused[name] = error
    options = {
        "leads": 0 if "leads" in refused else 2,
        "grouped": "grouped" not in refused,
        "own_sizes": "own_sizes" not in refused,
        "head_sizes": (D,) if "head_sizes" in refused else SIZES,
        "square": signature.square or "rectangular" in refused,
        "booleans": "booleans" not in refused,
        "empty_rows": "empty_rows" not in refused,
        "large_logits": "large_logits" not in refused,
        "masked": "none" if "masks" in refused else signature.masked,
    }
    return Accepted(of, device, options, refused, returns_lse)
