"""Tensors by their names in a file to Params and back. A leaf goes by its path (`layers.0.q`), as in funcattn.tree."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import transformer
from .._checks import fail
from ..records import ABSENT, is_absent
from ..transformer import Config, Layer, Params
from .tables import CheckpointError


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Path -> the shape that the leaf must have."""
    return leaves(transformer.shapes(config))


def spelling(tensors: Mapping[str, str], path: str) -> str:
    """The name on disk of the leaf at a path.

    Example:
        >>> spelling({"layers.{}.q": "blk.{}.attn_q.weight"}, "layers.3.q")
        'blk.3.attn_q.weight'
    """
    number = re.sub(r"^layers\.(\d+)\..*", r"\1", path)
    return tensors[re.sub(r"^layers\.\d+\.", "layers.{}.", path)].format(number)


def match(config: Config, tensors: Mapping[str, str], found: Mapping[str, tuple[int, ...]], where: str) -> dict[str, str]:
    """Path -> name on disk, where what a file holds is what the Config needs; else one error that tells every difference.

    Args:
        config: what is needed.
        tensors: how the family spells it.
        found: name -> shape of what is there, less what is harmless.
        where: the file, for the message.
    """
    needed = shapes(config)
    names = {path: spelling(tensors, path) for path in needed}
    missing = [name for name in names.values() if name not in found]
    extra = sorted(found.keys() - names.values())
    wrong = [
        f"{name} {tuple(found[name])} instead of {needed[path]}"
        for path, name in names.items()
        if name in found and tuple(found[name]) != needed[path]
    ]
    told = [
        f"{kind}: {_some(items)}"
        for kind, items in (("missing", missing), ("unknown", extra), ("of another shape", wrong))
        if items
    ]
    if told:
        remedy = "The file is incomplete, or its configuration is that of another model."
        fail("load", f"tensors of {where}", "those of its configuration", "; ".join(told), remedy, CheckpointError)
    return names


def _some(items: list[str], shown: int = 20) -> str:
    """A list for a message, its end left out where it is long."""
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")


def leaves(params: Params) -> dict[str, Any]:
    """Path -> leaf, in the order of the computation. What is absent is left out."""
    found = {"embedding": params.embedding}
    for number, layer in enumerate(params.layers):
        found |= {f"layers.{number}.{name}": leaf for name, leaf in zip(Layer._fields, layer, strict=True)}
    found |= {"norm": params.norm, "head": params.head}
    return {path: leaf for path, leaf in found.items() if not is_absent(leaf)}


def assemble(config: Config, leaf: Callable[[str], Any]) -> Params:
    """The tree whose leaf at each path is `leaf(path)`: `leaves(assemble(config, leaves(params).get)) == leaves(params)`."""
    rows = (Layer(*(leaf(f"layers.{number}.{name}") for name in Layer._fields)) for number in range(config.layers))
    return Params(leaf("embedding"), tuple(rows), leaf("norm"), ABSENT if config.tied else leaf("head"))


def half_split(weight: Tensor, head_size: int) -> Tensor:
    """Rows (H D, E) ordered for rotary angles on neighbouring features -> rows for features i and i + D / 2.

    Example:
        >>> import torch
        >>> half_split(torch.arange(4).unsqueeze(1), 4).flatten()
        tensor([0, 2, 1, 3])
    """
    heads = weight.shape[0] // head_size
    return weight.reshape(heads, head_size // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
