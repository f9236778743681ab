"""Which kernel runs: each says whether it can and why not; the first that can, in order of speed, is chosen.

The automatic choice never changes what composes: a kernel that lacks a derivative is not chosen where one may be asked for.
`use("reference")` forces one inside a `with`; a kernel that cannot run is then an error with its reason.
"""

import contextlib
import functools
import html
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._autodiff import is_recorded
from .._context import ContextValue
from ..masks import Mask
from .backends import aten

_forced: ContextValue[str | None] = ContextValue("kernel", None)


@dataclass(frozen=True)
class Request:
    """What is asked of a kernel: the inputs, and whether the log-sum-exp or dropped weights are wanted beside the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | Tensor | None = None
    bias: Tensor | None = None
    scale: float | Tensor = 1.0
    dropout: float = 0.0
    key: Tensor | None = None
    wants_lse: bool = False
    lead: tuple[int, ...] = ()

    @property
    def causal(self) -> bool:
        """True where the mask is known to be the plain causal one, found by looking at its 2 T numbers: on a GPU, by waiting."""
        return not torch.compiler.is_compiling() and self._causal  # a compiler sees no numbers, nor the lock of a cached property

    @functools.cached_property
    def _causal(self) -> bool:
        if not isinstance(self.mask, Mask) or self.bias is not None:
            return False
        start, stop = _checks.value(self.mask.start), _checks.value(self.mask.stop)
        return start is not None and stop is not None and aten.is_causal((start, stop), self.k.shape[-2])


class Verdict(NamedTuple):
    """One line of an explanation: what stands against a kernel, "" where it can run."""

    kernel: str
    what: str
    obstacle: str  # "" where the kernel can run
    chosen: bool


class Explanation(NamedTuple):
    """What `explain` returns: prints as a table, shows as one in a notebook."""

    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> str:
        """The name of the kernel that runs."""
        return next(v.kernel for v in self.verdicts if v.chosen)

    def __repr__(self) -> str:
        rows = [(("-> " if v.chosen else "   ") + v.kernel, v.obstacle or "can run", v.what) for v in self.verdicts]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {what}" for name, state, what in rows)

    def _repr_html_(self) -> str:
        cell = lambda text, bold: f"<td>{'<b>' if bold else ''}{html.escape(text)}{'</b>' if bold else ''}</td>"
        rows = "".join(
            "<tr>"
            + "".join(cell(text, v.chosen) for text in (v.kernel, v.obstacle or "can run", v.what, "chosen" if v.chosen else ""))
            + "</tr>"
            for v in self.verdicts
        )
        return f"<table><tr><th>kernel</th><th>here</th><th>what it is</th><th></th></tr>{rows}</table>"


TRITON = importlib.util.find_spec("triton") is not None  # there; imported where it is used
WIDEST = 256  # features of a key or a value that its kernels take
FEW = 16  # queries up to which the dense form over all keys is linear memory enough, and the cheapest


def _sdpa_obstacle(r: Request) -> str:
    if r.wants_lse:
        return "does not return the log-sum-exp"
    if isinstance(r.scale, Tensor):
        return "scale is a tensor"
    if r.dropout:
        return "draws dropout from torch's global generator, not from a key"
    if r.bias is not None:
        wider = torch.promote_types(r.q.dtype, r.bias.dtype)
        if wider != r.q.dtype and (wider != torch.float32 or r.q.device.type != "cpu"):
            return f"would round the bias to {r.q.dtype}"
    return ""


def _sdpa_flash_obstacle(r: Request) -> str:
    if r.v.shape[-1] != r.q.shape[-1]:
        return f"values of {r.v.shape[-1]} features, keys of {r.q.shape[-1]}"
    if r.q.device.type == "cuda" and ((r.mask is not None and not r.causal) or r.bias is not None):
        return "takes no mask but the causal one"
    if r.q.device.type == "cuda" and r.q.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 and bfloat16 only, not {r.q.dtype}"
    return _sdpa_obstacle(r)


def _cuda_obstacle(r: Request) -> str:
    return f"for CUDA, not for {r.q.device.type}" if r.q.device.type != "cuda" else _sdpa_obstacle(r)


def _flex_obstacle(r: Request) -> str:
    if r.q.device.type == "cpu":
        return "forward only on CPU, and only when compiled; composes with no transform"
    return "not wired: flash has its masks, attention_with_score its scores, and both compose"


def _triton_obstacle(r: Request) -> str:
    if not TRITON:
        return "Triton is not installed: pip install funcattn[triton]"
    if r.q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"for CUDA, not for {r.q.device.type} (where TRITON_INTERPRET=1 interprets it, slowly)"
    if r.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"float32, float16 and bfloat16 only, not {r.q.dtype}"
    if max(r.q.shape[-1], r.v.shape[-1]) > WIDEST:
        return f"heads of at most {WIDEST} features, not {max(r.q.shape[-1], r.v.shape[-1])}"
    if r.bias is not None:
        return "takes no dense bias"
    if isinstance(r.mask, Tensor):
        return "takes a Mask of intervals, not booleans"
    if r.q.device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_available():
        card = torch.cuda.get_device_capability(r.q.device)
        return "" if card >= (8, 0) else f"needs compute capability 8.0 (A100 and newer), this is {card[0]}.{card[1]}"
    return ""


KERNELS = {
    "sdpa": ("torch's F.scaled_dot_product_attention, which chooses one of the four below", _sdpa_obstacle),
    "triton": ("the closed streaming family in kernels for CUDA: every transform, O(T + S) memory", _triton_obstacle),
    "flash": ("the closed streaming family: every transform, O(T + S) memory", lambda r: ""),
    "reference": ("dense, the specification: every transform, O(T S) memory", lambda r: ""),
    "sdpa:flash": ("torch's fused kernel: first gradient, no jvp, no second derivative", _sdpa_flash_obstacle),
    "sdpa:efficient": ("torch's memory-efficient kernel: first gradient", _cuda_obstacle),
    "sdpa:cudnn": ("cuDNN's kernel: first gradient", _cuda_obstacle),
    "sdpa:math": ("torch's dense route: composes, O(T S) memory", _sdpa_obstacle),
    "flex": ("torch's flex_attention", _flex_obstacle),
}


def differentiable(r: Request) -> bool:
    """True where a derivative may be asked: a transform is active, or autograd records one of the inputs."""
    return is_recorded(r.q, r.k, r.v, r.bias, r.scale if isinstance(r.scale, Tensor) else None)


def _reluctance(name: str, r: Request) -> str:
    """Why a kernel that can run is left alone where none is forced, or ""."""
    if torch._C._is_tracing() and name != "reference":
        return "torch.jit traces plain operations"
    if name in ("sdpa", "sdpa:flash") and differentiable(r):
        return "a derivative may be asked: it has no jvp and no second one"
    if name.startswith("sdpa") and r.q.device.type == "cpu" and torch._C._len_torch_dispatch_stack():
        return "a dispatch mode looks on, such as FlopCounterMode, which knows no cost of torch's kernel for the CPU"
    if name.startswith("sdpa") and isinstance(r.mask, Mask) and not _triton_obstacle(r) and r.q.device.type == "cuda":
        return "to see whether the mask is causal would be to wait for the device"
    if name.startswith("sdpa") and isinstance(r.mask, Mask) and not r.causal and r.q.shape[-2] > FEW:
        return "would hold the mask dense, T x S"
    if name == "triton" and r.q.device.type != "cuda":
        return "interpreted: for tests"
    if name in ("flash", "triton") and r.q.shape[-2] <= FEW:
        return f"for at most {FEW} queries the dense form is cheaper"
    return ""


def is_exporting_strictly() -> bool:
    """True inside torch.export with strict=True, which takes plain operations alone."""
    return torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def can_run_triton(r: Request) -> bool:
    """True on CUDA, where the kernels written in Triton can run."""
    return r.q.device.type == "cuda" and not _triton_obstacle(r)


def verdicts(r: Request, kernel: str | None = None) -> tuple[Verdict, ...]:
    """What each kernel says to a request, the chosen one marked."""
    forced = kernel if kernel is not None else _forced.get()
    if forced is not None and forced not in KERNELS:
        _checks.fail("attention", "kernel", f"None or one of {', '.join(map(repr, KERNELS))}", repr(forced), "See kernels.explain.")
    obstacles = {name: obstacle_of(r) for name, (_, obstacle_of) in KERNELS.items()}
    if forced is not None:
        if obstacles[forced]:
            wanted, got = "one that can run on these inputs", f"{forced!r}: {obstacles[forced]}"
            _checks.fail("attention", "kernel", wanted, got, "Use kernel=None to let it be chosen.")
        chosen = forced
    else:
        obstacles = {name: obstacle or _reluctance(name, r) for name, obstacle in obstacles.items()}
        chosen = next(name for name, obstacle in obstacles.items() if not obstacle)
    return tuple(Verdict(name, what, obstacles[name], name == chosen) for name, (what, _) in KERNELS.items())


def current() -> str | None:
    """The kernel that `use` forces here, if any."""
    return _forced.get()


def choose(r: Request, kernel: str | None = None) -> str:
    """The name of the kernel that runs; forced by the argument, else by `use`, else automatic."""
    if torch.compiler.is_compiling():  # transforms cannot be seen from here: what composes is taken
        forced = kernel if kernel is not None else _forced.get()
        if forced is not None:
            if forced in ("flash", "triton") and is_exporting_strictly():
                remedy = "Leave strict=True out, or use kernel=None for the dense form."
                _checks.fail("attention", "kernel", "one of plain operations in a strict export", repr(forced), remedy)
            return forced
        if is_exporting_strictly():  # Dynamo cannot write what is behind nonstrict_trace into an exported program
            return "reference"
        streaming = "triton" if r.q.device.type == "cuda" and not _triton_obstacle(r) else "flash"
        return "reference" if r.q.shape[-2] <= FEW else streaming
    if kernel is None and _forced.get() is None:
        return next(name for name, (_, obstacle_of) in KERNELS.items() if not (obstacle_of(r) or _reluctance(name, r)))
    return next(v.kernel for v in verdicts(r, kernel) if v.chosen)


@contextlib.contextmanager
def use(kernel: str) -> Iterator[None]:
    """Force a kernel for every attention inside the `with`, in this thread alone: eager, compiled and exported.

    Example:
        >>> import funcattn as fa
        >>> q = torch.ones(1, 2, 4)
        >>> with fa.kernels.use("reference"):
        ...     fa.kernels.explain(q, q, q).chosen
        'reference'
    """
    if kernel not in KERNELS:
        _checks.fail("kernels.use", "kernel", f"one of {', '.join(map(repr, KERNELS))}", repr(kernel), "See kernels.explain.")
    with _forced.holding(kernel):
        yield
