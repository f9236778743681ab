"""What `gallery.py` tells of PyTorch that is no kernel: what it should give, and what it gives."""

import operator
import tempfile

import torch
from torch import distributed
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.func import jacrev, jvp
from torch.nn import functional as F

PYTORCH = "https://github.com/pytorch/pytorch/issues/"


def second_derivatives() -> list[tuple[str, str, str]]:
    """jvp of a gradient, as curvlinops takes it: without a graph of autograd."""
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    found = []
    for f in (F.silu, F.mish, F.gelu, F.softplus):
        with torch.no_grad():
            try:
                jvp(jacrev(f), (x,), (x,))
                got = "right"
            except NotImplementedError as error:
                got = f"raises: {str(error).split(' that ')[0]}"
        found.append((f"`F.{f.__name__}`: `jvp(jacrev(f))` under `no_grad`", "none known", got))
    return found


def shifted_integers() -> list[tuple[str, str, str]]:
    """Shifts of a DTensor of integers, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        mesh, whole = init_device_mesh("cpu", (1,)), torch.tensor([8, 16])
        shared = distribute_tensor(whole, mesh, [Shard(0)])
        report = f"[#130671]({PYTORCH}130671), of the error before"
        found = [
            (
                f"DTensor: `[8, 16] {sign} 1`",
                report,
                f"{f(shared, 1).full_tensor().tolist()}, not {f(whole, 1).tolist()}",
            )
            for sign, f in ((">>", operator.rshift), ("<<", operator.lshift))
        ]
        distributed.destroy_process_group()
    return found


class ZeroTangent(torch.autograd.Function):
    """The sine, whose jvp says zero, so that it is seen whether it is asked."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dx):
        return torch.zeros_like(dx)


def compiled_tangents() -> list[tuple[str, str, str]]:
    """A jvp rule of one's own, inside of compiled code."""
    f = lambda x: jvp(ZeroTangent.apply, (x,), (x,))[1]
    x = torch.ones(2)
    eager, compiled = f(x), torch.compile(f, backend="eager")(x)
    got = "right" if torch.equal(eager, compiled) else "another tangent, without an error"
    what = "`torch.compile` of `jvp` of an autograd Function with a `jvp` of its own"
    return [(what, f"[#192985]({PYTORCH}192985)", got)]


def facts() -> str:
    """The second table."""
    rows = [*second_derivatives(), *shifted_integers(), *compiled_tangents()]
    head = "| what | report | on this machine |\n| --- | --- | --- |\n"
    return head + "\n".join(f"| {' | '.join((what, report, got))} |" for what, report, got in rows)
