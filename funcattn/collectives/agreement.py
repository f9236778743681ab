"""Checks that values are replicated: tokens, keys and unsharded weights, compared before use.

    agree("generate", {"key": key, "prompt": prompt})   raises on every process if one differs

With values that differ, partial sums of different computations would be added: the shapes fit, and
the result is meaningless. A digest of each value crosses the mesh, once at the beginning of a verb
and never per token; sizes are in the digest, so processes whose sizes differ do not wait for each
other forever.
"""

import hashlib
from collections.abc import Mapping

import optree
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.distributed.device_mesh import DeviceMesh

from ..core import errors
from ..tree import Tree
from .bindings import Axis, bound
from .fingerprint import contents
from .groups import _group

OWN = ("data",)  # axes along which each process has different rows
SMALL = 2**14  # tensors up to this many elements are digested element by element
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def agree(
    function: str,
    values: Mapping[str, object],
    params: Tree = (),
    *,
    mesh: DeviceMesh | None = None,
) -> None:
    """Raise on every process where a value that should be replicated differs between two processes.

    Under simulated devices (vmap) too, where a value is mapped over an axis of the mesh.

    Law: every process raises the same error, and rows of "data" may differ
        (tests/distributed: test_processes_that_differ_are_told; over a Grid, test_agreement.py).

    Args:
        function: the function whose arguments they are, for the message.
        values: trees of tensors, numbers, texts and functions (samplers, drafters), by name; see
            `fingerprint`. DTensors among them are ignored, and of tensors without concrete values
            (fake, meta or traced) dtypes and sizes are compared.
        params: if no axis is bound, the mesh of its first DTensor is used.
        mesh: a DeviceMesh, to compare over all of its axes: for values that "data" does not divide.
    """
    if torch.compiler.is_compiling():
        return
    simulated = [axis for axis in bound() if axis.mapped and axis.size > 1 and axis.name not in OWN]
    if simulated and mesh is None:
        for axis in simulated:
            differ = [
                name
                for name, value in values.items()
                if any(_varies(x, axis) for x in _tensors(value))
            ]
            if differ:
                remedy = (
                    f"Give all of them the same: P() in in_specs, where {axis.name!r} should not "
                    "cut it."
                )
                errors.fail(
                    function,
                    " and ".join(differ),
                    "the same on every device of the mesh",
                    "another on some",
                    remedy,
                )
    alike, divided = _groups(params, mesh)
    if not alike:
        return
    with torch._C._DisableFuncTorch():
        digests = [digest(value) for value in values.values()]
        wrong = _differ([digest([function, *values]), digest(digests)], alike, divided)
        if any(wrong):
            found = [True] if wrong[0] else _differ(digests, alike, divided)
            names = ["the call and its values"] if wrong[0] else list(values)
            told = " and ".join(name for name, one in zip(names, found, strict=True) if one)
            remedy = (
                "Give all of them the same; what each draws, shuffles or loads of its own goes "
                "over 'data'."
            )
            errors.fail(function, told, "the same on every process", "another on some", remedy)


def _differ(
    digests: list[int], alike: list[dist.ProcessGroup], divided: list[dist.ProcessGroup]
) -> list[bool]:
    """Which digests differ between processes; every process gets the same answer."""
    device = "cuda" if dist.get_backend(alike[0]) == "nccl" else "cpu"
    limits = torch.tensor(
        [*digests, *(-digest for digest in digests)], dtype=torch.int64, device=device
    )
    for group in alike:
        dist.all_reduce(limits, dist.ReduceOp.MAX, group=group)
    differs = (limits[: len(digests)] != -limits[len(digests) :]).long()
    # processes of other "data" rows need the result too, else they would wait
    for group in divided:
        dist.all_reduce(differs, dist.ReduceOp.MAX, group=group)
    return [bool(one) for one in differs.tolist()]


def _groups(
    params: Tree, mesh: DeviceMesh | None
) -> tuple[list[dist.ProcessGroup], list[dist.ProcessGroup]]:
    """The process groups over which values are replicated, and those over which they may differ."""
    if mesh is not None:
        return [
            mesh.get_group(name) for name in mesh.mesh_dim_names or () if mesh[name].size() > 1
        ], []
    axes = bound()
    if any(axis.mapped for axis in axes):
        return [], []
    if axes:
        found = [(axis.name, _group(axis.group)) for axis in axes if axis.size > 1]
    else:
        first = next((x for x in optree.tree_iter(params) if isinstance(x, Tensor)), None)
        if first is None or not errors.is_distributed(first):
            return [], []
        held: Tree = first
        held = held.device_mesh
        found = [
            (name, held.get_group(name)) for name in held.mesh_dim_names if held[name].size() > 1
        ]
    return [group for name, group in found if name not in OWN], [
        group for name, group in found if name in OWN
    ]


def _tensors(value: object) -> list[Tensor]:
    return [piece for piece in contents(value) if isinstance(piece, Tensor)]


def _varies(x: Tensor, axis: Axis) -> bool:
    """Whether values differ between simulated devices; False where they are not concrete."""
    while _functorch.is_functorch_wrapped_tensor(x):
        inner = _functorch.get_unwrapped(x)
        if _functorch.is_batchedtensor(x) and _functorch.maybe_get_level(x) == axis.level:
            rows = inner.movedim(_functorch.maybe_get_bdim(x), 0)
            first = rows[:1]
            both_nan = (rows != rows) & (first != first)
            return errors.is_true((rows != first) & ~both_nan)
        x = inner
    return False


def digest(value: object) -> int:
    """A 62-bit hash of a tree."""
    found = hashlib.blake2b(digest_size=8)
    for piece in contents(value):
        if isinstance(piece, Tensor):
            known = errors.peek(piece)
            piece = b"" if known is None else _content(known)
        found.update(len(piece).to_bytes(8, "big") + piece)
    return int.from_bytes(found.digest(), "big") >> 2


def _content(x: Tensor) -> bytes:
    """The bytes of a small tensor; of a larger one, sums of its bits, weighted by row and by
    column.
    """
    x = torch.view_as_real(x) if x.is_complex() else x
    bits = x.view(INTEGERS[x.element_size()])
    if x.numel() <= SMALL:
        return repr(bits.tolist()).encode()
    table = bits.reshape(-1, bits.shape[-1])
    weigh = lambda x: int((x * torch.arange(1, len(x) + 1, device=x.device)).sum())
    rows, columns = (table.sum(axis, dtype=torch.int64) for axis in (1, 0))
    return repr([int(rows.sum()), weigh(rows), weigh(columns)]).encode()
