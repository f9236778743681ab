"""Checkpoints of sharded models: each process reads and writes its local shards.

load_sharded(folder, mesh)     the Hugging Face layout: no process reads more of it than it keeps
save_parts, load_parts         torch.distributed.checkpoint: written by one mesh, read by another
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import sharding, transformer, tree
from ..core import atomic
from ..core.errors import fail
from ..sharding.mesh import Rules, axes_of, bounds
from ..tree import Tree
from .families import CheckpointError
from .hf.folder import read_folder
from .hf.weights import Cut
from .loading import Loaded, load
from .sources import locate
from .writing import UNCHANGED, reason_of

T = TypeVar("T")
METADATA = ".metadata"  # the file that torch.distributed.checkpoint writes last and reads first


def load_sharded(
    path_or_name: str | os.PathLike[str],
    mesh: DeviceMesh,
    rules: Rules | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """A model with params on a mesh: equal to `fa.shard(mesh, rules)(fa.load(...).params)`.

    From a folder each process reads only its shard of each tensor; tensors in another layout than
    the leaf (fused, or one per expert) are read whole, one at a time. A .gguf file is read whole,
    and sharded.

    Args:
        path_or_name, dtype: as `fa.load`.
        mesh: a DeviceMesh with named axes.
        rules: None is `tensor_parallel(config, size=...)` of the config that is read.

    Raises: as `fa.load`, and as `fa.shard` before anything is read.

    Law: equals loading and sharding (tests/distributed:
        test_a_process_reads_its_own_part_of_a_file).
    """
    path, sizes = locate(os.fspath(path_or_name)), axes_of(mesh)
    rules_of = lambda config: (
        sharding.tensor_parallel(config, size=sizes.get("tensor", 1)) if rules is None else rules
    )
    if not path.is_dir():
        config, params, tokenizer = load(path, dtype=dtype)
        return Loaded(config, sharding.shard(mesh, rules_of(config))(params), tokenizer)
    coordinates = {name: mesh.get_local_rank(name) for name in sizes}
    cuts: Tree = None

    def cut(config: transformer.Config) -> Cut:
        nonlocal cuts
        wanted = transformer.shapes(config)
        empty = tree.map(lambda shape: torch.empty(shape, device="meta"), wanted, is_leaf=_is_shape)
        cuts = sharding.specs(empty, mesh, rules_of(config))
        of = dict(tree.items(cuts, is_leaf=lambda node: isinstance(node, sharding.PartitionSpec)))
        return lambda path, shape: bounds(shape, of[path], coordinates, sizes)

    config, params, tokenizer = read_folder(path, dtype, cut)
    return Loaded(config, sharding.from_local(params, cuts, mesh), tokenizer)


def _is_shape(node: object) -> bool:
    return type(node) is tuple and len(node) > 0 and all(isinstance(size, int) for size in node)


def save_parts(folder: str | os.PathLike[str], params: Tree) -> None:
    """Write a tree of DTensors and tensors, each process its local shards, for `load_parts`.

    Any mesh can read it. Every process calls it with the same folder, on a common file system.
    Tensors that are not DTensors must be equal on all processes. Process 0 replaces the previous
    files in one step; other files in the folder are kept.

    Raises:
        CheckpointError: it cannot be written; the previous files are unchanged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    with contextlib.ExitStack() as stack:
        drafted = lambda: os.fspath(
            stack.enter_context(atomic.files(folder, last=METADATA, stale=_is_part))
        )
        draft = _of_first(folder, drafted)
        try:
            with _alone():
                save(_state(params), checkpoint_id=draft)
        except (OSError, CheckpointException) as error:
            _fail_to_save(folder, _first_line(error))
        _of_first(folder, stack.close)


def _of_first(folder: str | os.PathLike[str], f: Callable[[], T]) -> T:
    """f() of rank 0, broadcast to all ranks; an error there is raised on all."""
    import torch.distributed as dist

    said: list[Any] = [None, None]  # the result, and the error
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            said[0] = f()
        except OSError as error:
            said[1] = reason_of(error)
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    if said[1] is not None:
        _fail_to_save(folder, said[1])
    return said[0]


def _fail_to_save(folder: str | os.PathLike[str], got: str) -> NoReturn:
    fail(
        "save_parts",
        os.fspath(folder),
        "a place that can be written",
        got,
        UNCHANGED,
        CheckpointError,
    )


def _first_line(error: BaseException) -> str:
    """The first error of all processes, in one line."""
    failures: Any = getattr(error, "failures", {})
    return next(
        (f"process {rank}: {reason_of(met)}" for rank, (met, _) in failures.items()),
        reason_of(error),
    )


def _is_part(name: str) -> bool:
    """True for a file that `save_parts` writes."""
    return name == METADATA or name.endswith(".distcp")


def load_parts(folder: str | os.PathLike[str], like: Tree) -> Tree:
    """Read what `save_parts` wrote, sharded like another tree: each process its local shards.

    The mesh that wrote it may differ. No code of the folder runs: its index, which torch writes as
    a pickle, is read by an unpickler restricted to the classes of an index.

    Args:
        like: a tree with the shapes, dtypes and placements to load; it is not modified.

    Raises:
        CheckpointError: there is no checkpoint, it has other leaves, or its index is invalid.

    Law: equals what was saved, on meshes of other shapes (tests/distributed:
        test_what_one_mesh_saved_another_loads).
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load as read

    from .parts_index import Reader

    if not (Path(folder) / METADATA).exists():
        remedy = "Give the folder that save_parts wrote."
        fail(
            "load_parts",
            os.fspath(folder),
            "a folder with .metadata",
            "none",
            remedy,
            CheckpointError,
        )
    empty = tree.map(torch.empty_like, like)
    reader = Reader(Path(folder))
    try:
        with _alone():
            read(_state(empty), storage_reader=reader)
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        remedy = "Give a tree of the model that was saved."
        fail(
            "load_parts",
            os.fspath(folder),
            "of these leaves",
            str(error).strip()[:300],
            remedy,
            CheckpointError,
        )
    return empty


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Suppress torch's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _state(params: Tree) -> dict[str, Tensor]:
    return dict(tree.items(params))
