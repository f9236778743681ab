"""The methods that are read, the leaves that are made of a file, and what is said of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ....core.errors import printable
from ....layers import Weight
from ....quantization import expand
from ....transformer import Config
from ...families.tables import Json, Pack
from ...families.weights import Source
from . import (
    awq_files,
    bitsandbytes,
    compressed_tensors,
    float8,
    gptq_files,
    hqq,
    leaves,
    mlx,
    mxfp4,
    torchao,
)
from .stored import CONVERT, SETTINGS, Dense, Stored, Tensors, wrong

METHODS: Mapping[str, Callable[[Mapping[str, Json], Tensors], list[Stored]]] = {
    "gptq": gptq_files.find,
    "awq": awq_files.find,
    "compressed-tensors": compressed_tensors.find,
    "fp8": float8.find,
    "fbgemm_fp8": float8.find,
    "bitsandbytes": bitsandbytes.find,
    "mxfp4": mxfp4.find,
    "hqq": hqq.find,
    "torchao": torchao.find,
    "mlx": mlx.find,
}
MAX_NAMED = 5  # matrices in a warning


@dataclass
class Quantized:
    """The matrices of a file that are in codes, by name, and why some were dequantized."""

    method: str
    matrices: Mapping[str, Stored]
    rounds: bool  # True where the original rounds activations
    dense: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> set[str]:
        """The names of the tensors that stand for matrices."""
        return {part for stored in self.matrices.values() for part in stored.parts}

    def sources(
        self, held: Sequence[Source], places: Mapping[str, str], dtype: torch.dtype
    ) -> list[Source]:
        """The sources, of which those with matrices in codes make leaves of records.

        Args:
            places: name in `held` -> name in the file. dtype: of what is dequantized.
        """

        def prepared(source: Source) -> Source:
            stored = [self.matrices.get(places[name]) for name in source.names]
            if not any(stored):
                return source
            unpack = lambda config, made: self._leaves(config, source, stored, made, dtype)
            pack = Pack(source.paths, source.names, unpack, source.pack.pack)
            return replace(source, pack=pack)

        return [prepared(source) for source in held]

    def _leaves(
        self,
        config: Config,
        source: Source,
        stored: Sequence[Stored | None],
        made: Sequence[Weight | Dense],
        dtype: torch.dtype,
    ) -> list[Weight]:
        turned = any(one is not None and one.turned for one in stored)
        why = [weight.why for weight in made if isinstance(weight, Dense)]
        plain = [weight.matrix if isinstance(weight, Dense) else weight for weight in made]
        placed = why[0] if why else leaves.placed(config, source, plain, turned)
        if not isinstance(placed, str):
            return placed
        self.dense |= {one.name: placed for one in stored if one is not None}
        return source.pack.unpack(config, leaves.as_floats(plain, turned, dtype))

    def spare(
        self,
        wanted: Mapping[str, object],
        found: Mapping[str, object],
        places: Mapping[str, str],
    ) -> list[str]:
        """The biases beside matrices in codes that the model does not have."""
        matrix = lambda name: places[name].removesuffix("bias") + "weight"
        return [
            name
            for name in found
            if name not in wanted and name.endswith(".bias") and matrix(name) in self.matrices
        ]

    def told(self, folder: object) -> str:
        """What a warning should say: what was dequantized, and what is not rounded; or ""."""
        parts = []
        if self.dense:
            reasons = dict.fromkeys(self.dense.values())
            each = [
                f"{_some([name for name, why in self.dense.items() if why == reason])} ({reason})"
                for reason in reasons
            ]
            count = f"{len(self.dense)} of {len(self.matrices)} matrices are dequantized"
            parts.append(f"{count}: {'; '.join(each)}")
        if self.rounds:
            parts.append("activations are not rounded, as the original would")
        text = f"load: {folder} is of {self.method}; {'. '.join(parts)}."
        return printable(text) if parts else ""


def matrix(weight: Weight | Dense) -> Tensor:
    """The matrix of floats of what a file has."""
    if isinstance(weight, Dense):
        return weight.matrix
    return weight if isinstance(weight, Tensor) else expand(weight)


def _some(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def take_settings(values: dict[str, Json]) -> Json:
    """quantization_config of config.json, which is taken out; of MLX, `quantization`."""
    found = values.pop("quantization_config", None)
    of_mlx = values.pop("quantization", None)
    return of_mlx if found is None else found


def method_in(settings: Mapping[str, Json]) -> str:
    """The method that the settings name.

    Raises:
        CheckpointError: one that is not read.
    """
    method = settings.get("quant_method")
    if method is None and {"group_size", "bits"} <= settings.keys():
        return "mlx"  # which does not name itself
    if not isinstance(method, str) or method not in METHODS:
        wanted = f"one of {', '.join(METHODS)}"
        wrong(f"quant_method in {SETTINGS}", wanted, repr(method), CONVERT)
    return method


def find(settings: Json, tensors: Tensors) -> Quantized | None:
    """The matrices in codes of a file with these settings; None where it has none.

    Raises:
        CheckpointError: another method, or tensors that are not those of its method.
    """
    if settings is None:
        return None
    if not isinstance(settings, dict):
        wrong("quantization_config in config.json", "an object", repr(settings)[:200], CONVERT)
    method = method_in(settings)
    stored = METHODS[method](settings, tensors)
    if not stored:
        wrong(f"tensors of a file of {method}", "matrices in codes among them", "none")
    matrices = {one.name: one for one in stored}
    twice = [one.name for one in stored if one.name in tensors.found and one.name not in one.parts]
    if twice or len(matrices) < len(stored):
        wrong("tensors of the file", "each matrix once", f"{(twice or ['one'])[0]} in codes too")
    return Quantized(method, matrices, _rounds(settings, tensors))


def _rounds(settings: Mapping[str, Json], tensors: Tensors) -> bool:
    """True where the settings say that activations are rounded at run time."""
    groups = settings.get("config_groups")
    of_groups = (
        [group.get("input_activations") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    scheme = settings.get("activation_scheme")
    eight = any(name.endswith(".SCB") for name in tensors.found)
    return any(of_groups) or scheme is not None or eight
