"""Layouts of leaves in files other than one tensor per leaf: fused, transposed, split by expert,
interleaved rotary rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...transformer import Config
from .tables import Pack


def fused(
    paths: Sequence[str],
    name: str,
    sizes: Callable[[Config], Sequence[int]],
    *,
    turned: bool = False,
) -> Pack:
    """Several leaves concatenated along rows in one tensor; `turned` where the file stores its
    transpose.
    """
    turn = lambda x: x.mT if turned and x.dim() > 1 else x
    return Pack(
        tuple(paths),
        (name,),
        lambda config, tensors: [
            part.contiguous() for part in turn(tensors[0]).split(list(sizes(config)))
        ],
        lambda config, leaves: [turn(torch.cat(leaves)).contiguous()],
    )


def transposed(path: str, name: str) -> Pack:
    """A leaf stored transposed."""
    return Pack(
        (path,), (name,), lambda _, x: [x[0].mT.contiguous()], lambda _, x: [x[0].mT.contiguous()]
    )


def stacked(path: str, name: str, *, experts: bool = True) -> Pack:
    """One leaf (X, ...) stored as one tensor per expert (or head); the name has `{expert}`. Dense
    layers are stored as they are.
    """
    applies = lambda config, layer: not experts or config.layer_spec(layer).experts
    return Pack(
        (path,), (name,), lambda _, x: [torch.stack(x)], lambda _, x: list(x[0].unbind(0)), applies
    )


def of_heads(paths: Sequence[str], name: str) -> Pack:
    """q, k and v of each head one under the other, head after head (GPT-NeoX)."""

    def unpack(config: Config, tensors: list[Tensor]) -> list[Tensor]:
        heads = tensors[0].unflatten(0, (config.heads, 3, config.head_size))
        return [heads[:, i].flatten(0, 1).contiguous() for i in range(3)]

    def pack(config: Config, leaves: list[Tensor]) -> list[Tensor]:
        heads = [leaf.unflatten(0, (config.heads, config.head_size)) for leaf in leaves]
        return [torch.stack(heads, 1).flatten(0, 2)]

    return Pack(tuple(paths), (name,), unpack, pack)


def rotated(path: str, name: str) -> Pack:
    """A leaf whose rows are ordered for rotary angles on neighbouring features, (H D, ...) or (H,
    D).
    """

    rows = lambda x: x.reshape(x.numel(), 1) if path.endswith(("norm", "bias")) else x
    return Pack(
        (path,),
        (name,),
        lambda config, x: [half_split(rows(x[0]), config.head_size).reshape(x[0].shape)],
        lambda config, x: [interleave(rows(x[0]), config.head_size).reshape(x[0].shape)],
    )


def half_split(weight: Tensor, head_size: int) -> Tensor:
    """Rows (H D, ...) ordered for rotary angles on neighbouring features -> rows for features i and
    i + D / 2.

    Example:
        >>> half_split(torch.arange(4).unsqueeze(1), 4).flatten()
        tensor([0, 2, 1, 3])
    """
    heads = weight.shape[0] // head_size
    return weight.reshape(heads, head_size // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def interleave(weight: Tensor, head_size: int) -> Tensor:
    """The other way: `interleave(half_split(w, D), D) == w`."""
    heads = weight.shape[0] // head_size
    return weight.reshape(heads, 2, head_size // 2, -1).transpose(1, 2).reshape(weight.shape)
