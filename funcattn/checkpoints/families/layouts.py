"""Layouts of leaves in files other than one tensor per leaf: fused, transposed, split by expert,
interleaved rotary rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core.errors import fail
from ...transformer import Config
from .tables import CheckpointError, Pack


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


def _has_experts(config: Config, layer: int) -> bool:
    return config.layer_spec(layer).experts


def of_experts(path: str, name: str, *, turned: bool = False) -> Pack:
    """A leaf (X, ...) of layers with experts by another name; `turned` where files may have its
    transpose.
    """
    other = transposed(path, name) if turned else None
    return replace(renamed(path, name, lambda _: True), applies=_has_experts, other=other)


def halves(name: str, *, turned: bool = False) -> Pack:
    """Gate over up of all experts in one tensor (X, 2 F, E), in layers with experts; `turned` where
    files may have (X, E, 2 F).
    """

    def pack(turn: Callable[[Tensor], Tensor], other: Pack | None) -> Pack:
        return Pack(
            tuple(f"layers.{{}}.{leaf}" for leaf in ("gate", "up")),
            (name,),
            lambda config, x: [part.contiguous() for part in turn(x[0]).chunk(2, -2)],
            lambda config, leaves: [turn(torch.cat(leaves, -2)).contiguous()],
            _has_experts,
            other,
        )

    return pack(lambda x: x, pack(lambda x: x.mT, None) if turned else None)


def turned(pack: Pack) -> Pack:
    """The other layout of a pack, of a family whose files have no other; in layers with experts."""
    assert pack.other is not None
    return replace(pack.other, applies=_has_experts)


def stacked(path: str, name: str, *, experts: bool = True) -> Pack:
    """One leaf (X, ...) stored as one tensor per expert (or head); the name has `{expert}`. Dense
    layers are stored as they are.
    """
    applies = lambda config, layer: not experts or config.layer_spec(layer).experts
    return Pack(
        (path,), (name,), lambda _, x: [torch.stack(x)], lambda _, x: list(x[0].unbind(0)), applies
    )


def of_groups(paths: Sequence[str], name: str) -> Pack:
    """q, k and v of each key/value head one under the other, group after group: G query heads, one
    key head, one value head (GPT-NeoX, Falcon, GPT-BigCode).
    """

    def unpack(config: Config, tensors: list[Tensor]) -> list[Tensor]:
        K, G, D = config.kv_heads, config.heads // config.kv_heads, config.head_size
        groups = tensors[0].unflatten(0, (K, G + 2, D))
        return [part.flatten(0, 2).contiguous() for part in groups.split([G, 1, 1], 1)]

    def pack(config: Config, leaves: list[Tensor]) -> list[Tensor]:
        K, D = config.kv_heads, config.head_size
        return [torch.cat([leaf.unflatten(0, (K, -1, D)) for leaf in leaves], 1).flatten(0, 2)]

    return Pack(tuple(paths), (name,), unpack, pack)


def rotated(path: str, name: str) -> Pack:
    """A leaf whose rows are ordered for rotary angles on neighbouring features, (H D, ...) or (H,
    D); of a part of each head where the config turns a part.
    """

    def reorder(
        order: Callable[[Tensor, int, int | None], Tensor], config: Config, x: Tensor
    ) -> Tensor:
        rows = x.reshape(x.numel(), 1) if path.endswith(("norm", "bias")) else x
        return order(rows, config.head_size, config.rotary_size).reshape(x.shape)

    return Pack(
        (path,),
        (name,),
        lambda config, x: [reorder(half_split, config, x[0])],
        lambda config, x: [reorder(interleave, config, x[0])],
    )


def sliced(path: str, name: str, rows: int) -> Pack:
    """A leaf behind some rows that are not used, which are written as zeros."""
    return Pack(
        (path,),
        (name,),
        lambda _, x: [x[0][rows:].contiguous()],
        lambda _, x: [torch.cat([x[0].new_zeros(rows, *x[0].shape[1:]), x[0]])],
    )


def renamed(path: str, name: str, where: Callable[[Config], bool]) -> Pack:
    """A leaf that has another name where the config is of a kind."""
    as_it_is = lambda _, x: x
    return Pack((path,), (name,), as_it_is, as_it_is, lambda config, layer: where(config))


def placed(path: str, name: str, where: Callable[[Config, int], bool]) -> Pack:
    """A leaf that has another name in some layers; in the name, `{before}` is the number of the
    layer before, `{last}` that of the last.
    """
    return replace(renamed(path, name, lambda _: True), applies=where)


def reshaped(path: str, name: str, shape: Callable[[Config], tuple[int, ...]]) -> Pack:
    """A vector that the file has with other axes."""
    return Pack(
        (path,),
        (name,),
        lambda _, x: [x[0].flatten()],
        lambda config, x: [x[0].reshape(shape(config))],
    )


def squeezed(path: str, name: str) -> Pack:
    """A leaf (C, W) that the file has as the weight (C, 1, W) of a convolution."""
    return Pack((path,), (name,), lambda _, x: [x[0].squeeze(1)], lambda _, x: [x[0].unsqueeze(1)])


def implied(paths: Sequence[str], name: str, make: Callable[[Config, Tensor, str], Tensor]) -> Pack:
    """Leaves beside the first that no file of the family holds, since they follow from its config.

    Args:
        paths: that of the tensor, then those that follow.
        name: of the tensor.
        make: (config, the tensor, path) -> the leaf, of the dtype and device of the tensor.

    Raises:
        CheckpointError: a leaf to be written is another than what follows.
    """

    def pack(config: Config, leaves: list[Tensor]) -> list[Tensor]:
        for path, leaf in zip(paths[1:], leaves[1:], strict=True):
            if leaf.device.type != "meta" and not torch.equal(leaf, make(config, leaves[0], path)):
                remedy = "No file of this family has it: keep the tree with torch.save."
                fail("save", path, "what the family implies", "others", remedy, CheckpointError)
        return leaves[:1]

    return Pack(
        tuple(paths),
        (name,),
        lambda config, x: [x[0], *(make(config, x[0], path) for path in paths[1:])],
        pack,
    )


def ones(config: Config, x: Tensor, path: str) -> Tensor:
    """The weight (E,) of a norm without weights."""
    return x.new_ones(config.width)


def half_split(weight: Tensor, head_size: int, turning: int | None = None) -> Tensor:
    """Rows (H D, ...) ordered for rotary angles on neighbouring features -> rows for features i and
    i + D / 2, of the first `turning` features of each head (all of them by default).

    Example:
        >>> half_split(torch.arange(4).unsqueeze(1), 4).flatten()
        tensor([0, 2, 1, 3])
    """
    return _reordered(weight, head_size, turning, lambda x, half: x.unflatten(1, (half, 2)))


def interleave(weight: Tensor, head_size: int, turning: int | None = None) -> Tensor:
    """The other way: `interleave(half_split(w, D), D) == w`."""
    return _reordered(weight, head_size, turning, lambda x, half: x.unflatten(1, (2, half)))


def _reordered(
    weight: Tensor, head_size: int, turning: int | None, pairs: Callable[[Tensor, int], Tensor]
) -> Tensor:
    turning = turning or head_size
    turned, rest = weight.unflatten(0, (-1, head_size)).tensor_split([turning], 1)
    turned = pairs(turned, turning // 2).transpose(1, 2).flatten(1, 2)
    return torch.cat([turned, rest], 1).flatten(0, 1)
