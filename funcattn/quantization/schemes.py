"""Schemes: frozen values that encode a matrix (N, K) as a record; int4(group=64) changes settings.

| scheme | bits a weight | source |
| --- | --- | --- |
| int8 | 8, one scale a row | Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2 (absmax) |
| int4 | 4, scale and zero for 32 columns | Frantar et al., GPTQ, arXiv:2210.17323 (min-max grid) |
| w8a8 | 8, a scale for 32 columns; activations too | Yao et al., ZeroQuant, arXiv:2206.01861 |
| nf4 | 4, a scale for 64 columns | Dettmers et al., QLoRA, arXiv:2305.14314 |
| fp8 | 8, one scale a row | Micikevicius et al., FP8 formats, arXiv:2209.05433 |
| ternary | 2, a scale for 64 columns | Ma et al., 1-bit LLMs, arXiv:2402.17764 (absmean) |
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..core import errors
from ..layers import Weight
from . import packing
from .formats import Codebook, Fp8, Int4, Int8, Int8Dynamic, Ternary

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Scheme(Protocol):
    """What `quantize` needs: `encode` of a matrix (N, K), and a scheme for embedding and head."""

    def encode(self, weight: Tensor) -> Weight:
        """The record that represents the matrix."""
        ...

    @property
    def for_head(self) -> "Scheme":
        """The scheme of embedding and head: 8 bits where the layers have fewer."""
        ...


@dataclass(frozen=True)
class _Settings:
    """Calling a scheme with settings gives the scheme with these changed."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        group, clip = settings.get("group"), settings.get("clip", 1.0)
        if group is not None and not errors.is_count(group, 1):
            kind = ValueError if isinstance(group, int) else TypeError
            errors.fail(
                self.name,
                "group",
                "a number of columns, or None for all of a row",
                repr(group),
                "32 is usual.",
                kind,
            )
        is_number = isinstance(clip, int | float) and 0 < clip <= 1
        if not is_number and not isinstance(clip, Tensor):  # a tensor has a clip for each group
            errors.fail(self.name, "clip", "in (0, 1]", repr(clip), "1 is all of the range.")
        if not isinstance(settings.get("symmetric", False), bool):
            errors.fail(
                self.name,
                "symmetric",
                "True or False",
                repr(settings["symmetric"]),
                "Choose one.",
                TypeError,
            )
        if settings.get("kind", "e4m3") not in FLOAT8:
            errors.fail(
                self.name,
                "kind",
                '"e4m3" or "e5m2"',
                repr(settings["kind"]),
                "Choose one of these.",
            )

    def __call__(self, *unnamed: object, **changes: object) -> Any:
        """The scheme with other settings.

        Raises:
            TypeError: a setting without its name, or one that the scheme does not have.

        Example:
            >>> int4(group=64).group
            64
        """
        names = [field.name for field in fields(self)]
        strange = [repr(value) for value in unnamed] or [
            name for name in changes if name not in names
        ]
        if strange:
            wanted = f"by name: {', '.join(names)}" if names else "none: it has no settings"
            remedy = (
                "A scheme is made of weights by fa.quantize(scheme)(params), and changed as in "
                "fa.int4(group=64)."
            )
            errors.fail(self.name, "settings", wanted, ", ".join(strange), remedy, TypeError)
        return replace(self, **changes)

    @property
    def for_head(self) -> Any:
        """The scheme of embedding and head."""
        return self


@dataclass(frozen=True)
class Int8Scheme(_Settings):
    """int8, symmetric.

    group: columns with a common scale, None for all of a row. clip: fraction of the range.
    """

    name: ClassVar[str] = "int8"
    group: int | None = None
    clip: float = 1.0

    def encode(self, weight: Tensor) -> Int8:
        """See Scheme."""
        size = _size("int8", self.group, weight)
        return Int8(*packing.symmetric(weight, size, 127, self.clip))


@dataclass(frozen=True)
class Int4Scheme(_Settings):
    """int4 in groups of columns; symmetric: zero is -8 scale; clip: fraction of the range."""

    name: ClassVar[str] = "int4"
    group: int = 32
    symmetric: bool = False
    clip: float = 1.0

    def encode(self, weight: Tensor) -> Int4:
        """See Scheme."""
        size = _size("int4", self.group, weight, even=True)
        if not self.symmetric:
            codes, scale, zero = packing.affine(weight, size, 16, self.clip)
            return Int4(packing.pack(codes, size, 4), scale, zero)
        signed, scale = packing.symmetric(weight, size, 7, self.clip)
        return Int4(
            packing.pack((signed + 8).to(torch.uint8), size, 4),
            scale,
            packing.narrow(-8 * scale.float()),
        )

    @property
    def for_head(self) -> Int8Scheme:
        """8 bits."""
        return int8


@dataclass(frozen=True)
class Int8DynamicScheme(_Settings):
    """int8 weights and activations, which are rounded for each token at run time.

    group: columns with a common scale, of a row of weights and of a token; None for all of them,
    which loses more where a few features are much larger than the rest. clip: fraction of the range
    of weights.
    """

    name: ClassVar[str] = "w8a8"
    group: int | None = 32
    clip: float = 1.0

    def encode(self, weight: Tensor) -> Int8Dynamic:
        """See Scheme."""
        size = _size("w8a8", self.group, weight)
        return Int8Dynamic(*packing.symmetric(weight, size, 127, self.clip))

    @property
    def for_head(self) -> Int8Scheme:
        """8 bits without rounded activations: an embedding has none."""
        return int8


@dataclass(frozen=True)
class NF4Scheme(_Settings):
    """16 levels with equal mass of a normal distribution between them, in groups of columns."""

    name: ClassVar[str] = "nf4"
    group: int = 64

    def encode(self, weight: Tensor) -> Codebook:
        """See Scheme."""
        size = _size("nf4", self.group, weight, even=True)
        levels = torch.tensor(packing.NF4, device=weight.device)
        grouped = packing.groups(weight.float(), size)
        scale = packing.narrow(grouped.abs().amax(-1))
        by = torch.where(scale == 0, 1, scale.float()).unsqueeze(-1)
        codes = packing.nearest_level(grouped / by, levels).flatten(-2)
        return Codebook(packing.pack(codes, size, 4), scale, levels)

    @property
    def for_head(self) -> Int8Scheme:
        """8 bits."""
        return int8


@dataclass(frozen=True)
class Fp8Scheme(_Settings):
    """8-bit floating point with a scale per row: "e4m3" (precision) or "e5m2" (range)."""

    name: ClassVar[str] = "fp8"
    kind: str = "e4m3"

    def encode(self, weight: Tensor) -> Fp8:
        """See Scheme."""
        largest = torch.finfo(FLOAT8[self.kind]).max
        wide = weight.float()
        scale = wide.abs().amax(-1, keepdim=True) / largest
        codes = (wide / torch.where(scale == 0, 1, scale)).clamp(-largest, largest)
        return Fp8(codes.to(FLOAT8[self.kind]), scale)


@dataclass(frozen=True)
class TernaryScheme(_Settings):
    """-1, 0 or 1 times a scale, the mean absolute value of a group."""

    name: ClassVar[str] = "ternary"
    group: int = 64

    def encode(self, weight: Tensor) -> Ternary:
        """See Scheme."""
        size = _size("ternary", self.group, weight, even=True)
        if size % 4:
            errors.fail("ternary", "group", "a multiple of 4", size, "Four codes share a byte.")
        grouped = packing.groups(weight.float(), size)
        scale = packing.narrow(grouped.abs().mean(-1))
        codes = packing.nearest(grouped, scale, 1) + 1
        return Ternary(packing.pack(codes.to(torch.uint8), size, 2), scale)

    @property
    def for_head(self) -> Int8Scheme:
        """8 bits."""
        return int8


int8 = Int8Scheme()
int4 = Int4Scheme()
w8a8 = Int8DynamicScheme()
nf4 = NF4Scheme()
fp8 = Fp8Scheme()
ternary = TernaryScheme()


def _size(scheme: str, group: int | None, weight: Tensor, *, even: bool = False) -> int:
    """The number of columns of a group, which must divide those of the matrix."""
    K = weight.shape[-1]
    size = K if group is None else group
    if not isinstance(size, int) or size < 1 or K % size or (even and size % 2):
        wanted = f"{'an even' if even else 'a'} divisor of the {K} columns"
        errors.fail(
            scheme, "group", wanted, size, "Choose another group, or leave the leaf out by where."
        )
    return size
