"""Real processes on loopback: f(rank, n, *arguments) in each of n, connected by Gloo; all have
ended when `run` returns.

They are forked from a server that has imported the library once, meet by a file, and have a
timeout, so that a test can neither hang nor leave anybody behind.
"""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback

TIMEOUT = 90  # seconds that a collective waits for the others


def _enter(f, rank, n, place, timeout, pipe, meet, arguments):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        if not meet:
            pipe.send(("done", f(rank, n, *arguments)))
            return
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group(
            "gloo", init_method=f"file://{place}", rank=rank, world_size=n, timeout=limit
        )
        try:
            pipe.send(("done", f(rank, n, *arguments)))
        finally:
            dist.destroy_process_group()
    except BaseException as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def run(f, n, *arguments, timeout=TIMEOUT, meet=True, strict=True):
    """What each rank returned, in order; failures are raised.

    Args:
        meet: connect them before f; else f does.
        strict: raise; else what a rank that failed said stands in its place.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["funcattn", "torch.distributed.tensor", "torch.distributed.checkpoint"]
    )
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(n)]
        place = os.path.join(folder, "meeting")
        workers = [
            context.Process(
                target=_enter,
                args=(f, rank, n, place, timeout, pipes[rank][1], meet, arguments),
                daemon=True,
            )
            for rank in range(n)
        ]
        for worker in workers:
            worker.start()
        for _, ours in pipes:
            ours.close()
        until, told = time.monotonic() + timeout + 30, []
        try:
            for rank, (theirs, _) in enumerate(pipes):
                if not theirs.poll(max(0.0, until - time.monotonic())):
                    raise TimeoutError(f"rank {rank} of {n} said nothing for {timeout} seconds")
                try:
                    told.append(theirs.recv())
                except EOFError:
                    told.append(("failed", f"rank {rank} ended without a word"))
        finally:
            for worker in workers:
                worker.join(5 if len(told) == n else 0)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
        failures = [value for state, value in told if state == "failed"]
        if failures and strict:
            raise AssertionError("\n".join(failures))
        return [value for _, value in told]
