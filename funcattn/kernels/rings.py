"""Attention over a sequence that is sharded over a mesh axis, as a fold of attend and merge.

    ring            q, k and v are sharded: k and v go around a ring in n - 1 steps; each device
                    merges attention to each shard it receives
    merge_over      k and v are sharded, q is replicated: one merge over the axis

With a causal mask and contiguous shards, the last device would have n times the work of the first.
So the text is cut in 2 n chunks, and device i holds chunks i and 2 n - 1 - i (`zigzag`): all
devices have the same work at every step.

Derivatives are those of attend, merge and ppermute: exact at every order. Keys and values cross the
mesh once in the forward pass, and their cotangents once in the backward pass.

Source: Liu, Zaharia and Abbeel, Ring attention with blockwise transformers, arXiv:2310.01889;
Brandon et al., Striped attention, arXiv:2311.09431 (balance).
"""

import torch
from torch import Tensor

from ..collectives import axis_index, axis_size, copy_to_region, pmax, ppermute, psum
from ..core import errors
from ..masks import Mask
from ..records import Attended
from .api import attend
from .merging import Partial, join, partial
from .request import Kernel


def zigzag(x: Tensor, n: int, *, dim: int = -1) -> Tensor:
    """Reorder a sequence so that its n contiguous shards balance the work of a causal mask.

    Args:
        x: the axis `dim` is the sequence, its length a multiple of 2 n.
        n: number of devices.
        dim: the axis of the sequence.

    Example:
        >>> zigzag(torch.arange(8), 2)
        tensor([0, 1, 6, 7, 2, 3, 4, 5])

    Law: unzigzag undoes it (test_rings.py).
    """
    order = [i for device in range(n) for i in (device, 2 * n - 1 - device)]
    return _chunks("zigzag", x, n, dim, order)


def unzigzag(x: Tensor, n: int, *, dim: int = -1) -> Tensor:
    """Undo `zigzag`: the original order of the sequence."""
    order = [i for device in range(n) for i in (device, 2 * n - 1 - device)]
    return _chunks("unzigzag", x, n, dim, sorted(range(2 * n), key=order.__getitem__))


def _chunks(function: str, x: Tensor, n: int, dim: int, order: list[int]) -> Tensor:
    if x.shape[dim] % (2 * n):
        remedy = "Pad the text, and let no target be a pad."
        errors.fail(
            function,
            "x",
            f"a multiple of 2 n = {2 * n} long along axis {dim}",
            errors.shape(x),
            remedy,
        )
    parts = x.chunk(2 * n, dim)
    return torch.cat([parts[i] for i in order], dim)


def places(T: int, axis: str) -> Tensor:
    """The positions of the T tokens of this device's shard in the order of `zigzag`, int64 (T,)."""
    n, i = axis_size(axis), axis_index(axis)
    if n == 1:
        return torch.arange(T)
    if T % 2:
        remedy = "Cut a text that is a multiple of twice the devices long."
        errors.fail(
            "ring", "tokens", f"an even number on each of the {n} devices of {axis!r}", T, remedy
        )
    C = T // 2
    row = torch.arange(C, device=i.device)
    return torch.cat([row + i * C, row + (2 * n - 1 - i) * C])


def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axis: str,
    *,
    causal: bool = True,
    scale: float | Tensor | None = None,
    kernel: str | Kernel | None = None,
) -> Attended:
    """Attention of this device's queries over the keys of all devices.

    Args:
        q: (*lead, H, T, D) queries of this device's tokens, in the order of `zigzag` if causal.
        k: (*lead, K, T, D) keys of the same tokens.
        v: (*lead, K, T, Dv) values of the same tokens.
        axis: name of the mesh axis that the sequence is sharded over; if it is not bound, this is
            `attend`.
        causal: True: each token sees itself and those before it; False: all tokens.
        scale, kernel: as in `attend`.

    Returns:
        Attended, for this device's queries.

    Raises:
        ValueError: if causal, an odd number of tokens on a device, or different numbers of queries
            and keys.

    Law: equals attention of the whole, with every derivative
        (test_rings.py::test_a_ring_attends_to_the_whole).
    """
    n, T = axis_size(axis), q.shape[-2]
    if causal and k.shape[-2] != T:
        remedy = "Each device has queries, keys and values of the same tokens."
        errors.fail("ring", "k", f"of the {T} tokens of q", errors.shape(k), remedy)
    mine = places(T, axis).to(q.device) if causal else None
    mask = _seen(mine, axis_index(axis).to(q.device), T // 2, n) if mine is not None else None
    if n == 1:
        return attend(q, k, v, mask, scale=scale, kernel=kernel)
    found = partial(q, k, v, mask, scale=scale, kernel=kernel)
    pairs = [(i, (i + 1) % n) for i in range(n)]
    for step in range(1, n):
        k, v = ppermute(k, axis, pairs), ppermute(v, axis, pairs)
        whose = (axis_index(axis).to(q.device) - step) % n
        mask = _seen(mine, whose, T // 2, n) if mine is not None else None
        found = join(found, partial(q, k, v, mask, scale=scale, kernel=kernel))
    return found.attended


def _seen(places: Tensor, whose: Tensor, C: int, n: int) -> Mask:
    """The causal mask of queries at `places` over the 2 C keys of device `whose`: a prefix.

    Its keys are the chunks `whose` and 2 n - 1 - `whose`, C tokens each.
    """
    if n == 1:
        stop = places + 1
    else:
        stop = (places - whose * C + 1).clamp(0, C) + (places - (2 * n - 1 - whose) * C + 1).clamp(
            0, C
        )
    return Mask(torch.zeros_like(stop).unsqueeze(-1), stop.unsqueeze(-1))


def merge_over(attended: Attended, axis: str) -> Attended:
    """Join attention of the same queries over the keys of all devices, one shard of keys each.

    The n-ary `merge`, on every device:

        lse = log sum_i exp lse_i        out = sum_i exp(lse_i - lse) out_i

    Args:
        attended: out (*lead, H, T, Dv) and lse (*lead, H, T) over this device's keys.
        axis: name of the mesh axis.

    Law: equals attention over all keys, with every derivative
        (test_rings.py::test_a_past_in_parts_is_one_past).
    """
    return join_over(Partial(*attended), axis).attended


def join_over(one: Partial, axis: str) -> Partial:
    """`merge_over` with lse in twice the precision: exact for logits of any magnitude."""
    out, lse, rest = one
    nothing = float("-inf")
    greatest = pmax(lse.detach(), axis)  # any constant gives the same result
    greatest = torch.where(greatest == nothing, 0, greatest)
    none = lse == nothing
    normalizer = torch.where(none, 0, ((torch.where(none, 0, lse) - greatest) + rest).exp())
    total = psum(normalizer, axis)
    empty = total == 0
    share = normalizer / copy_to_region(torch.where(empty, 1, total), axis)
    weighted = psum(share.unsqueeze(-1) * out.to(share.dtype), axis)
    log = torch.where(empty, 1, total).log()
    whole = log + greatest
    return Partial(
        weighted.to(out.dtype),
        torch.where(empty, nothing, whole),
        ((greatest - whole) + log).detach(),
    )
