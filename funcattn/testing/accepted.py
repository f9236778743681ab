"""Which inputs a kernel accepts: those that it refuses by an error are not drawn for its laws.

A kernel is called with small inputs, one for each property: grouped heads, leading axes, another
size of values, ... What raises is left out of the inputs and named, with the error, since a refusal
is no wrong number. What returns is drawn, whether right or wrong: the laws find that out.
"""

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
LARGER = (16, 64)  # head sizes, where those of SIZES are refused
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
    always_causal = signature.masked == "causal"
    base = masks.causal(4) if always_causal else None

    def attempt(
        of: torch.dtype = torch.float64,
        D: int = 4,
        mask: AnyMask = base,
        *,
        q: tuple[int, ...] = (2, 4),
        k: tuple[int, ...] = (2, 4),
        v: tuple[int, ...] = (2, 4),
        Dv: int | None = None,
    ) -> Any:
        with torch.no_grad(), quiet():
            shapes = ((*q, D), (*k, D), (*v, Dv or D))
            x, y, z = (
                randomness.normal(randomness.key(n), shape, of).to(device)
                for n, shape in enumerate(shapes)
            )
            return kernel(x, y, z, mask if mask is None else tree.to(device)(mask))

    first: Exception | None = None
    for of, D in [(of, D) for of in ([dtype] if dtype else DTYPES) for D in (4, *LARGER)]:
        try:
            result = attempt(of, D)
            returns_lse = "lse" in parts_of(result)
            if not all(isinstance(x, Tensor) for x in parts_of(result).values()):
                raise TypeError(f"it returned a {type(result).__name__}")
            break
        except Exception as error:  # whatever a kernel raises
            first = first or error
    else:
        form = "(H, T, D), or (B, H, T, D) where its signature has a batch axis"
        errors.fail(
            "check",
            "the kernel",
            f"callable as signature {signature.name!r} with q, k, v {form}",
            in_a_line(first or ValueError()),
            "Choose another signature or dtype.",
        )

    two = (3, 2, 4)
    boolean = torch.ones(4, 4, dtype=torch.bool)
    trials: dict[str, dict[str, Any]] = {
        "leads": {"q": two, "k": (1, 2, 4)},
        "grouped": {"q": (4, 4)},
        "own_sizes": {"Dv": D - 1 if D == 4 else D // 2},
        "rectangular": {"q": (2, 3), "k": (2, 5), "v": (2, 5)},
    }
    if signature.masked == "any":
        trials["masks"] = {"mask": masks.causal(4)}
        trials["booleans"] = {"mask": boolean}
    if signature.square:
        del trials["rectangular"]
    refused = dict.fromkeys(left_out, "as asked")
    if dtype is None and of != DTYPES[0]:
        refused[str(DTYPES[0]).removeprefix("torch.")] = in_a_line(first or ValueError(), 120)
    for name, given in trials.items():
        if name not in refused:
            try:
                attempt(of, D, **given)
            except Exception as error:  # whatever a kernel raises
                refused[name] = in_a_line(error, 120)
    head_sizes: Sequence[int] = SIZES if D == 4 else (D,)
    try:
        if "head_sizes" not in refused and D == 4:
            attempt(of, 3)
    except Exception as error:  # whatever a kernel raises
        refused["head_sizes"] = in_a_line(error, 120)
    if D != 4:
        refused["head_sizes"] = in_a_line(first or ValueError(), 120)
    if "head_sizes" in refused:
        head_sizes = (D,)
    return Accepted(
        of,
        device,
        {
            "leads": 0 if "leads" in refused else 2,
            "grouped": "grouped" not in refused,
            "own_sizes": "own_sizes" not in refused,
            "head_sizes": tuple(head_sizes),
            "square": signature.square or "rectangular" in refused,
            "booleans": "booleans" not in refused,
            "empty_rows": "empty_rows" not in refused,
            "large_logits": "large_logits" not in refused,
            "masked": "none" if "masks" in refused else signature.masked,
        },
        refused,
        returns_lse,
    )
