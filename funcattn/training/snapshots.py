"""The state of a training run on disk: whole and verified, or not there.

    folder/step-00000200/tensors.safetensors      every leaf, by path
    folder/step-00000200/run.json                 what else a run is, and checksums of both files

A snapshot is written under a temporary name, flushed to the disk, and moved to its place in one
step (`atomic.folder`); only then is the oldest one removed. So a kill or a full disk, at any
moment, leaves the snapshots before it as they were. Reading checks every byte.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save_file
from torch import Tensor

from .. import atomic, tree
from .._checks import fail, shape, whole
from ..checkpoints.writing import written
from ..families import CheckpointError
from ..tree import Tree

TENSORS, RUN = "tensors.safetensors", "run.json"
PREFIX = "step-"


def steps_in(folder: str | os.PathLike[str]) -> list[int]:
    """The steps that a folder has snapshots of, rising. What is not a snapshot's name is not looked at."""
    names = [path.name.removeprefix(PREFIX) for path in Path(folder).glob(f"{PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())


def write(folder: str | os.PathLike[str], step: int, values: Tree, run: dict[str, Any], *, keep: int = 2) -> Path:
    """Write a snapshot, then remove all but the newest `keep`.

    Args:
        values: a tree of tensors.
        run: what JSON can hold.

    Raises:
        CheckpointError: the place cannot be written or has no room. Snapshots that were there stay.
    """
    target = _place(folder, step)
    leaves = dict(tree.items(values))
    whole("fit", "params", leaves.values(), "Train the parts: fa.sharding.parts_of(params), inside of fa.sharding.inside(mesh).")
    layout = {path: list(x.stride()) for path, x in leaves.items() if not x.is_contiguous()}
    remedy = "Snapshots of earlier steps are as they were; make room, or choose another folder, and resume."
    with written("fit", target, remedy):
        atomic.sweep(target.parent, lambda name: name.startswith(PREFIX))  # of other steps too
        with atomic.folder(target) as draft:
            save_file({path: _own(leaf) for path, leaf in leaves.items()}, draft / TENSORS)
            content = {"step": step, "strides": layout, "run": run, "tensors": _digest(draft / TENSORS)}
            record = {"content": content, "sha256": _sum(content)}
            (draft / RUN).write_text(json.dumps(record, indent=1), encoding="utf-8")
        for old in steps_in(folder)[:-keep]:
            atomic.remove(_place(folder, old))
    return target


def read(folder: str | os.PathLike[str], step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
    """The values and the run of a snapshot.

    Args:
        like: a tree of the shapes and dtypes that should be there; devices follow it.

    Raises:
        CheckpointError: it is damaged, or is of another run.
    """
    place = _place(folder, step)
    others = [name for name in steps_in(folder) if name < step]
    earlier = f" to go on from step {others[-1]}" if others else " and begin again"
    remedy = f"Remove {place}{earlier}."

    def damaged(got: str) -> NoReturn:
        fail("fit", f"{place}", "a whole snapshot", got, remedy, CheckpointError)

    try:
        record = json.loads((place / RUN).read_text(encoding="utf-8"))
        content, known = record["content"], record["sha256"]
        data = (place / TENSORS).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        damaged(f"one that cannot be read: {type(error).__name__} {error}")
    if known != _sum(content):
        damaged(f"a {RUN} that was changed after it was written")
    if content["tensors"] != hashlib.sha256(data).hexdigest():
        damaged(f"a {TENSORS} that was cut or changed after it was written")
    if content["step"] != step:
        damaged(f"that of step {content['step']}")
    found = read_tensors(data)
    wanted = dict(tree.items(like))
    wrong = sorted(found.keys() ^ wanted.keys()) or [p for p in wanted if _kind(found[p]) != _kind(wanted[p])]
    if wrong:
        remedy = "Give the config and the optimizer that it was made with, or another folder."
        fail("fit", f"{place}", "of this model and optimizer", f"another {wrong[0]}", remedy, CheckpointError)

    def restored(path: str, leaf: Tensor) -> Tensor:
        strides = content["strides"].get(path)
        held = found[path]
        if strides is not None:  # the order in memory decides the order of sums, and so the last bits
            held = torch.empty_strided(held.shape, strides, dtype=held.dtype).copy_(held)
        return held.to(leaf.device)

    return tree.map_with_path(restored, like), content["run"]


def _place(folder: str | os.PathLike[str], step: int) -> Path:
    return Path(os.path.realpath(folder)) / f"{PREFIX}{step:08}"


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, shape(x)


def _own(x: Tensor) -> Tensor:
    return x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def _sum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
