"""Collectives over a process group as blocking custom operators, opaque to tracing.

A process group runs CPU tensors by Gloo and CUDA tensors by NCCL, if it was created for both: one
operator serves both. torch's functional collectives are asynchronous; these wait inside the
operator, so that no transform sees an unfinished result. None of these has a derivative;
`operations` defines them.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# The names before torch 2.13, which deprecates them.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_counts: dict[str, dict[str, int]] = {}


def _group(name: str) -> dist.ProcessGroup:
    return distributed_c10d._resolve_process_group(name)  # pyright: ignore


def count(name: str, x: Tensor) -> None:
    """Add to the counts of a collective: one call, and the bytes that this device sends."""
    seen = _counts.setdefault(name, {"calls": 0, "bytes": 0})
    seen["calls"] += 1
    seen["bytes"] += x.numel() * x.element_size()


@torch.library.custom_op("funcattn::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str, kind: str) -> Tensor:
    """The "sum" or "max" over the group, on every device."""
    count("all_reduce", x)
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(
        out, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX, group=_group(group)
    )
    return out


@all_reduce.register_fake
def _(x: Tensor, group: str, kind: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("funcattn::all_gather", mutates_args=())
def all_gather(x: Tensor, group: str, size: int) -> Tensor:
    """The shards of all devices, concatenated along the first axis: (n, ...) to (size n, ...)."""
    count("all_gather", x)
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    _gather(out, x.contiguous(), group=_group(group))
    return out


@all_gather.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(size * x.shape[0], *x.shape[1:])


@torch.library.custom_op("funcattn::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, group: str, size: int) -> Tensor:
    """This device's shard, along the first axis, of the sum: (size n, ...) to (n, ...)."""
    count("reduce_scatter", x)
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    _scatter(out, x.contiguous(), group=_group(group))
    return out


@reduce_scatter.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(x.shape[0] // size, *x.shape[1:])


@torch.library.custom_op("funcattn::permute", mutates_args=())
def permute(x: Tensor, group: str, source: int, destination: int) -> Tensor:
    """Receive x of rank `source` and send x to rank `destination`; -1: none, zeros are received."""
    count("permute", x)
    rank = dist.get_rank(_group(group))
    if source == rank:
        return x.clone(memory_format=torch.contiguous_format)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    held, both = x.contiguous(), []
    if destination >= 0:
        both.append(dist.P2POp(dist.isend, held, group=_group(group), group_peer=destination))
    if source >= 0:
        both.append(dist.P2POp(dist.irecv, out, group=_group(group), group_peer=source))
    for work in dist.batch_isend_irecv(both) if both else []:
        work.wait()
    return out


@permute.register_fake
def _(x: Tensor, group: str, source: int, destination: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def counts() -> dict[str, dict[str, int]]:
    """Calls and bytes of each collective in this process since `reset`."""
    return {name: dict(seen) for name, seen in _counts.items()}


def reset() -> None:
    """Set all counts to zero."""
    _counts.clear()


def member(pairs: Sequence[tuple[int, int]], rank: int) -> tuple[int, int]:
    """The ranks that a device receives from and sends to; pairs (source, destination), -1: none."""
    source = next((a for a, b in pairs if b == rank), -1)
    return source, next((b for a, b in pairs if a == rank), -1)
