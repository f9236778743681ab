"""Several processes as one command: torchrun --nproc-per-node 2 -m funcattn generate TEXT --tp 2

Every process runs the same command on its shard; only the first one prints. If a process ends or
stops responding, the others end with an error within --timeout seconds.
"""

import argparse
import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from .arguments import number
from .terminal import MISTAKE


def add_options(command: argparse.ArgumentParser, *, data: bool) -> None:
    """--tp, --timeout, and with `data` --dp."""
    count = number(int, 1, 2**20, "1 or more")
    add = command.add_argument
    add(
        "--tp",
        metavar="N",
        type=count,
        default=1,
        help="processes that share each layer; run by torchrun (%(default)s)",
    )
    if data:
        add(
            "--dp",
            metavar="N",
            type=count,
            default=1,
            help="groups of processes that share the rows of a batch (%(default)s)",
        )
    add(
        "--timeout",
        metavar="S",
        type=count,
        default=300,
        help="seconds to wait for another process (%(default)s)",
    )


@contextlib.contextmanager
def meshed(options: argparse.Namespace) -> Iterator[Any]:
    """The mesh ("data", "tensor") of this run; None for a single process."""
    tensor, data = options.tp, getattr(options, "dp", 1)
    n, world = tensor * data, _number("WORLD_SIZE", 1)
    if world != n:
        wanted = f"--tp {tensor}" + (f" --dp {data}" if data > 1 else "")
        run = (
            f"torchrun --nproc-per-node {n} -m funcattn ..."
            if n > 1
            else "it without torchrun, or with --tp"
        )
        raise ValueError(
            f"{wanted} is for {n} process{'es' if n > 1 else ''}, got {world}. Run {run}"
        )
    if n == 1:
        yield None
        return
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise ValueError(
            f"{', '.join(absent)} should be set where WORLD_SIZE is, by torchrun. Run torchrun "
            f"--nproc-per-node {n} -m funcattn ..."
        )
    rank, cuda = _number("RANK", 0), options.device.type == "cuda"
    if rank >= world:
        raise ValueError(
            f"RANK should be below WORLD_SIZE {world}, is {rank}. Let torchrun set both."
        )
    if cuda:
        options.device = torch.device("cuda", _number("LOCAL_RANK", 0))
        torch.cuda.set_device(options.device)
    with contextlib.ExitStack() as stack:
        if rank:
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
            stack.enter_context(contextlib.redirect_stderr(quiet))
        try:
            limit = datetime.timedelta(seconds=options.timeout)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
            stack.callback(dist.destroy_process_group)
            from torch.distributed.device_mesh import init_device_mesh

            yield init_device_mesh(
                "cuda" if cuda else "cpu", (data, tensor), mesh_dim_names=("data", "tensor")
            )
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(
                word in str(error) for word in ("gloo", "Gloo", "nccl", "NCCL")
            ):
                raise
            told = (
                f"another one has ended, or said nothing for {options.timeout} s. Look at its "
                "error."
            )
            raise RuntimeError(
                f"process {rank} of {n}: {told} ({' '.join(str(error).split())[:200]})"
            ) from error
        except (ValueError, OSError):
            if rank:  # the first process reports the same error
                raise SystemExit(MISTAKE) from None
            raise


def _number(name: str, default: int) -> int:
    """An environment variable that torchrun sets."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(
            f"{name} should be a number, as torchrun sets it, is {text!r}. Unset it, "
            "or let torchrun set it."
        )
    return int(text)


def leads() -> bool:
    """True for the process that prints and writes files: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agreed(steps: list[int]) -> list[int]:
    """Of the snapshots of all processes, those that every one has."""
    if not dist.is_initialized():
        return steps
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, steps)
    return sorted(set.intersection(*map(set, found)))
