"""Collectives of a process group as blocking operators, opaque to whoever traces them.

A process group takes CPU tensors by Gloo and CUDA tensors by NCCL, if it was made for both: the same operator serves. What is
asynchronous in torch's own functional collectives is waited for here, inside the operator, so that no transform sees it half done.
None of these has a derivative; `operations` gives them theirs.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# Their names until torch 2.13, which warns of them.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_counts: dict[str, dict[str, int]] = {}


def _group(name: str) -> dist.ProcessGroup:
    return distributed_c10d._resolve_process_group(name)  # pyright: ignore


def count(name: str, x: Tensor) -> None:
    """Count a collective and the bytes that a device gives to it."""
    seen = _counts.setdefault(name, {"calls": 0, "bytes": 0})
    seen["calls"] += 1
    seen["bytes"] += x.numel() * x.element_size()


@torch.library.custom_op("funcattn::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str, kind: str) -> Tensor:
    """The "sum" or "max" over the group, on every device."""
    count("all_reduce", x)
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX, group=_group(group))
    return out


@all_reduce.register_fake
def _(x: Tensor, group: str, kind: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("funcattn::all_gather", mutates_args=())
def all_gather(x: Tensor, group: str, size: int) -> Tensor:
    """All parts one behind the other along the first axis: (n, ...) to (size n, ...)."""
    count("all_gather", x)
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    _gather(out, x.contiguous(), group=_group(group))
    return out


@all_gather.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(size * x.shape[0], *x.shape[1:])


@torch.library.custom_op("funcattn::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, group: str, size: int) -> Tensor:
    """This device's part, along the first axis, of the sum: (size n, ...) to (n, ...)."""
    count("reduce_scatter", x)
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    _scatter(out, x.contiguous(), group=_group(group))
    return out


@reduce_scatter.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(x.shape[0] // size, *x.shape[1:])


@torch.library.custom_op("funcattn::permute", mutates_args=())
def permute(x: Tensor, group: str, source: int, destination: int) -> Tensor:
    """What the device `source` holds; this one's goes to `destination`. -1 is nobody: zeros come."""
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
    """Calls and bytes of each collective of this process since `reset`."""
    return {name: dict(seen) for name, seen in _counts.items()}


def reset() -> None:
    """Begin to count anew."""
    _counts.clear()


def member(pairs: Sequence[tuple[int, int]], rank: int) -> tuple[int, int]:
    """Whom a device receives from and sends to, by pairs (source, destination); -1 is nobody."""
    source = next((a for a, b in pairs if b == rank), -1)
    return source, next((b for a, b in pairs if a == rank), -1)
