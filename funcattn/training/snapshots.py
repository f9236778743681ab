"""Snapshots of a training run on disk, written atomically and verified when read.

    folder/step-00000200/tensors.safetensors      every leaf, by path
    folder/step-00000200/run.json                 all other state, and checksums of both files

A snapshot is written under a temporary name, flushed to the disk, and renamed (`atomic.folder`);
only then is the oldest one removed. So after a kill or with a full disk, at any moment, earlier
snapshots are intact. Reading verifies every byte.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save_file
from torch import Tensor

from .. import tree
from ..checkpoints.families import CheckpointError
from ..checkpoints.regular_files import check_regular, read_json
from ..checkpoints.writing import written
from ..core import atomic
from ..core.errors import fail, is_int, shape, whole
from ..tree import Tree

TENSORS, RUN = "tensors.safetensors", "run.json"
PREFIX = "step-"
LARGEST_RUN = 2**26  # bytes of run.json: the reports and losses of a run
PARTS = {"step": int, "strides": dict, "run": dict, "tensors": str}  # key of run.json -> its type


def steps_in(folder: str | os.PathLike[str]) -> list[int]:
    """The steps of the snapshots in a folder, ascending. Other names are ignored."""
    names = [path.name.removeprefix(PREFIX) for path in Path(folder).glob(f"{PREFIX}*")]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def write(
    folder: str | os.PathLike[str],
    step: int,
    values: Tree,
    run: dict[str, object],
    *,
    keep: int = 2,
) -> Path:
    """Write a snapshot, then remove all but the newest `keep`.

    Args:
        values: a tree of tensors.
        run: JSON-serializable.

    Raises:
        CheckpointError: the folder cannot be written or has no room. Earlier snapshots are kept.
    """
    target = _place(folder, step)
    leaves = dict(tree.items(values))
    whole(
        "fit",
        "params",
        leaves.values(),
        "Train the parts: fa.sharding.to_local(params), inside of fa.sharding.inside(mesh).",
    )
    layout = {path: list(x.stride()) for path, x in leaves.items() if not x.is_contiguous()}
    remedy = (
        "Snapshots of earlier steps are as they were; make room, or choose another folder, and "
        "resume."
    )
    with written("fit", target, remedy):
        atomic.sweep(target.parent, lambda name: name.startswith(PREFIX))  # of other steps too
        with atomic.folder(target) as draft:
            save_file({path: _own(leaf) for path, leaf in leaves.items()}, draft / TENSORS)
            content = {
                "step": step,
                "strides": layout,
                "run": run,
                "tensors": _digest(draft / TENSORS),
            }
            record = {"content": content, "sha256": _sum(content)}
            (draft / RUN).write_text(json.dumps(record, indent=1), encoding="utf-8")
        for old in steps_in(folder)[:-keep]:
            atomic.remove(_place(folder, old))
    return target


def read(folder: str | os.PathLike[str], step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """The values and the run of a snapshot.

    Args:
        like: a tree with the shapes and dtypes to expect; tensors are loaded to its devices.

    Raises:
        CheckpointError: it is damaged, or is of another run.
    """
    place = _place(folder, step)

    def refuse(got: str) -> NoReturn:
        damaged(folder, step, got)

    try:
        record = read_json(place / RUN, LARGEST_RUN, "fit")
        check_regular(place / TENSORS, "fit")
        data = (place / TENSORS).read_bytes()
    except (OSError, CheckpointError, MemoryError) as error:
        refuse(f"one that cannot be read: {type(error).__name__} {error}")
    content = record.get("content")
    if record.get("sha256") != _sum(content):
        refuse(f"a {RUN} that was changed after it was written")
    if not isinstance(content, dict) or content.keys() != PARTS.keys():
        refuse(
            f"a {RUN} whose content is not {', '.join(PARTS)}: it is of another release or program"
        )
    for name, kind in PARTS.items():
        if type(content[name]) is not kind:
            refuse(f"a {RUN} whose {name} is a {type(content[name]).__name__}")
    if content["tensors"] != hashlib.sha256(data).hexdigest():
        refuse(f"a {TENSORS} that was cut or changed after it was written")
    if content["step"] != step:
        refuse(f"that of step {content['step']}")
    try:
        found = read_tensors(data)
    except SafetensorError as error:
        refuse(f"a {TENSORS} that is none: {error}")
    wanted = dict(tree.items(like))
    wrong = sorted(found.keys() ^ wanted.keys()) or [
        p for p in wanted if _kind(found[p]) != _kind(wanted[p])
    ]
    if wrong:
        remedy = "Give the config and the optimizer that it was made with, or another folder."
        fail(
            "fit",
            f"{place}",
            "of this model and optimizer",
            f"another {wrong[0]}",
            remedy,
            CheckpointError,
        )
    for path, strides in content["strides"].items():
        if path not in found or not _is_order(strides, shape(found[path])):
            refuse(
                f"strides of {path} that are no order of its "
                f"{shape(found[path]) if path in found else 'absent'} numbers"
            )

    def restored(path: str, leaf: Tensor) -> Tensor:
        strides = content["strides"].get(path)
        held = found[path]
        if strides is not None:  # strides determine the order of sums, and so the last bits
            held = torch.empty_strided(held.shape, strides, dtype=held.dtype).copy_(held)
        return held.to(leaf.device)

    return tree.map_with_path(restored, like), content["run"]


def damaged(folder: str | os.PathLike[str], step: int, got: str) -> NoReturn:
    """Raise CheckpointError for a damaged snapshot; the message says what to remove."""
    others = [name for name in steps_in(folder) if name < step]
    earlier = f" to go on from step {others[-1]}" if others else " and begin again"
    place = _place(folder, step)
    fail("fit", f"{place}", "a whole snapshot", got, f"Remove {place}{earlier}.", CheckpointError)


def _is_order(strides: object, sizes: tuple[int, ...]) -> bool:
    """True where strides overlap no elements and span at most twice their memory."""
    if (
        not isinstance(strides, list)
        or len(strides) != len(sizes)
        or not all(is_int(n) and 0 <= n < 2**63 for n in strides)
    ):
        return False
    reach = 0  # offset of the last element in the axes before, in order of strides
    for n, size in sorted((n, size) for n, size in zip(strides, sizes, strict=True) if size > 1):
        if n <= reach:
            return False
        reach += n * (size - 1)
    return reach < 2 * math.prod(sizes) or 0 in sizes


def _place(folder: str | os.PathLike[str], step: int) -> Path:
    return Path(os.path.realpath(folder)) / f"{PREFIX}{step:08}"


def _kind(x: Tensor) -> tuple[object, ...]:
    return x.dtype, shape(x)


def _own(x: Tensor) -> Tensor:
    return x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def _sum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
