"""What is asked of a kernel of attention, and what a kernel is: a value."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import is_recorded
from ..masks import Mask
from ..records import Attended
from .backends import aten

FEW = 16  # queries up to which the dense form over all keys is linear memory enough, and the cheapest


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

    @functools.cached_property
    def recorded(self) -> bool:
        """True where a derivative may be asked: a transform is active, or autograd records one of the inputs."""
        return is_recorded(self.q, self.k, self.v, self.bias, self.scale if isinstance(self.scale, Tensor) else None)

    @property
    def causal(self) -> bool:
        """True where the mask is known to be the plain causal one, found by looking at its 2 T numbers: on a GPU, by waiting."""
        return not torch.compiler.is_compiling() and self._causal  # a compiler sees no numbers, nor the lock of a cached property

    @functools.cached_property
    def _causal(self) -> bool:
        if not isinstance(self.mask, Mask) or self.bias is not None:
            return False
        start, stop = errors.value(self.mask.start), errors.value(self.mask.stop)
        return start is not None and stop is not None and aten.is_causal((start, stop), self.k.shape[-2])


def _never(_: Request) -> str:
    return ""


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention, accepted wherever the name of one is.

    Args:
        name: what `explain` and errors call it.
        what: a line that says what it is.
        why_not: of a Request, why this kernel cannot run it, or "". What a kernel lacks is said here: a mask, a bias, dropout
            (`r.dropout`), the log-sum-exp (`r.wants_lse`), a dtype, a derivative that may follow (`r.recorded`).
        run: of a Request, Attended(out (*r.lead, H, T, Dv), lse (*r.lead, H, T)); lse is not read unless `r.wants_lse`.
        passed_over: why it is left alone where no kernel is forced, although it can run, or "". Of no use outside the registry.

    Example:
        >>> import funcattn as fa
        >>> def run(r):
        ...     return fa.attend(r.q, r.k, r.v, r.mask, scale=r.scale, bias=r.bias, kernel="reference")
        >>> mine = Kernel("mine", "the reference", lambda r: "draws no dropout" if r.dropout else "", run)
        >>> q = torch.ones(1, 2, 4)
        >>> fa.explain(q, q, q, kernel=mine).chosen
        'mine'

    Law: runs inside a decoder, eager, compiled, generating and differentiated (test_dispatch.py::
        test_a_kernel_of_ones_own_runs_inside_a_decoder).
    """

    name: str
    what: str
    why_not: Callable[[Request], str]
    run: Callable[[Request], Attended]
    passed_over: Callable[[Request], str] = _never
