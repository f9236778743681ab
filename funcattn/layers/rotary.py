"""Rotary position embedding: each pair of features is rotated by an angle linear in the position.

    angle_i(p) = p * base ** (-2 i / D)        x is rotated to x * cos + swap(x) * sin

Half-split, as Hugging Face: pair i is the features i and i + D / 2. Scalings change the angles
beyond the trained context.

Source: Su et al., RoFormer, arXiv:2104.09864, section 3.2.2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..kernels.products import computed

KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for positions beyond the trained context.

    kind:
        "linear" divides every frequency by factor (position interpolation, arXiv:2306.15595).
        "dynamic" raises the base as the sequence outgrows `context` (NTK-aware; Peng et al.,
            arXiv:2309.00071, appendix B.1).
        "yarn" divides the slow frequencies, keeps the fast ones and interpolates between the pairs
            that turn `fast` and `slow` times in `context` (arXiv:2309.00071, section 3.2);
            `truncate` rounds the ends of the ramp to whole pairs.
        "llama3" does so by wavelength: those above context / low are slow, those below
            context / high fast.
        "longrope" divides each frequency by a number per pair: from `short` up to `context`
            positions, from `long` beyond (Ding et al., arXiv:2402.13753).
        "proportional" turns the fastest pairs alone, `share` of all, divided by factor.
    attention: factor of cos and sin (yarn, longrope).

    The angles of "dynamic" and "longrope" depend on the length of the whole text: one token beyond
    `context` changes the angles of all tokens before it. A decoder then reads the text again, so
    that reading in steps equals reading at once (transformer.lengths); transformers, which keeps
    the cached keys, differs there from its result on the whole text.
    """

    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192  # positions of the trained context
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    attention: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    share: float = 1.0  # of the pairs that turn (proportional)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            wanted = f"one of {', '.join(map(repr, KINDS))}"
            errors.fail(
                "RopeScaling",
                "kind",
                wanted,
                repr(self.kind),
                "Another kind would change the mathematics.",
            )
        if self.kind == "longrope" and (not self.short or len(self.short) != len(self.long)):
            got = f"{len(self.short)} and {len(self.long)} numbers"
            errors.fail(
                "RopeScaling",
                "short and long",
                "one factor a plane each, for longrope",
                got,
                "Give D / 2 of each.",
            )

    @property
    def follows_length(self) -> bool:
        """Whether the angles depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


class Rotation(NamedTuple):
    """cos and signed sin of the angles, each (*lead, 1, T, D), the same in every head.

    x is rotated to x * cos + swap(x) * sin, where swap exchanges the two halves of the features.
    """

    cos: Tensor
    sin: Tensor


def frequencies(
    D: int,
    *,
    base: float,
    scaling: RopeScaling | None = None,
    length: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Angle per position of each of the D / 2 pairs, float32: base ** (-2 i / D), then scaled.

    Args:
        D: number of features that are rotated.
        base: base of the powers.
        scaling: how the frequencies are scaled; None leaves them.
        length: int64 (*lead), length of the sequence so far, for a scaling that depends on it; None
            means within the context.
        device: of the result; None is that of length, or torch's default.

    Returns:
        (D / 2,), or (*lead, D / 2) where the scaling depends on a length.
    """
    device = length.device if device is None and length is not None else device
    powers = torch.arange(0, D, 2, dtype=torch.float32, device=device) / D
    turn = 1.0 / base**powers
    if scaling is None:
        return turn
    if scaling.kind == "linear":
        return turn / scaling.factor
    if scaling.kind == "proportional":
        turning = torch.arange(len(turn), device=device) < int(scaling.share * D // 2)
        return torch.where(turning, turn / scaling.factor, 0.0)
    if scaling.kind == "dynamic":
        if length is None:
            return turn
        seen = length.clamp(min=scaling.context).to(torch.float32) / scaling.context
        stretched = base * (scaling.factor * seen - (scaling.factor - 1)) ** (D / (D - 2))
        return 1.0 / stretched.unsqueeze(-1) ** powers
    if scaling.kind == "longrope":
        if len(scaling.short) != D // 2:
            remedy = "They belong to another head size."
            errors.fail(
                "frequencies",
                "scaling.short and .long",
                f"{D // 2} numbers for D = {D}",
                len(scaling.short),
                remedy,
            )
        by = turn.new_tensor(scaling.short)
        if length is not None:
            by = torch.where(
                (length > scaling.context).unsqueeze(-1), turn.new_tensor(scaling.long), by
            )
        return 1.0 / (by * base**powers)
    if scaling.kind == "yarn":
        return _yarn(D, base, turn, scaling)
    wavelength = 2 * math.pi / turn
    blend = (scaling.context / wavelength - scaling.low) / (scaling.high - scaling.low)
    blend = blend.clamp(0, 1)  # 0 slow, 1 fast
    return blend * turn + (1 - blend) * turn / scaling.factor


def _yarn(D: int, base: float, turn: Tensor, scaling: RopeScaling) -> Tensor:
    plane = lambda turns: (
        D * math.log(scaling.context / (turns * 2 * math.pi)) / (2 * math.log(base))
    )
    low, high = plane(scaling.fast), plane(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    slow = (torch.arange(D // 2, dtype=torch.float32, device=turn.device) - low) / (
        (high - low) or 0.001
    )
    slow = slow.clamp(0, 1)
    return turn / scaling.factor * slow + turn * (1 - slow)


def rope(
    positions: Tensor, turn: Tensor, dtype: torch.dtype, *, amplitude: float = 1.0
) -> Rotation:
    """cos and sin for each position; the angles are computed in float32, the result is in dtype.

    Args:
        positions: int64 (*lead, T).
        turn: (D / 2,) or (*lead, D / 2), from `frequencies`.
        dtype: of the result.
        amplitude: factor of cos and sin, `RopeScaling.attention`.
    """
    # (*lead, 1, T, D / 2)
    angle = positions.unsqueeze(-1).unsqueeze(-3).to(turn.dtype) * turn.unsqueeze(-2).unsqueeze(-2)
    cos, sin = angle.cos(), angle.sin()
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    cos, sin = torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
    # Materialized, else recomputed for each head and layer: 3.4 of the 63 ms of a training step.
    return Rotation(computed(cos), computed(sin))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x (*lead, H, T, D) by its positions.

    R is the last size of the rotation: pair i is the features i and i + R / 2 of the first R.
    Features beyond R are unchanged (partial rotary).
    """
    R = rotation.cos.shape[-1]
    if x.shape[-1] > R:
        return torch.cat([rotate(x[..., :R], rotation), x[..., R:]], -1)
    # stays in a narrow dtype under autocast
    return torch.addcmul(x * rotation.cos, x.roll(R // 2, -1), rotation.sin).to(x.dtype)
