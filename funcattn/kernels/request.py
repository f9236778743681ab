"""The arguments of a kernel of attention (`Request`), and a kernel as a value (`Kernel`)."""

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

FEW = 16  # queries up to which dense logits over all keys count as linear memory, and are cheapest
# pairs of a query and a key whose dense logits cost less than a call of the closed family
SMALL = 64 * 64


@dataclass(frozen=True)
class Request:
    """The checked arguments of one call of attention, and whether it needs the log-sum-exp.

    q (*lead, H, T, D), k (*lead, K, S, D), v (*lead, K, S, Dv); mask, bias, scale, dropout and key
    as in `attention`; `lead` is the broadcast leading axes.
    """

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
    def recorded(self) -> bool:
        """True where derivatives may follow: in a transform, with a recorded input, in
        torch.compile.
        """
        # In torch.compile levels are not seen, and the lock of a cached property is not traced.
        return torch.compiler.is_compiling() or self._recorded

    @functools.cached_property
    def _recorded(self) -> bool:
        return is_recorded(
            self.q,
            self.k,
            self.v,
            self.bias,
            self.scale if isinstance(self.scale, Tensor) else None,
        )

    @property
    def small(self) -> bool:
        """True where plain dense operations are cheapest: few pairs, nothing masked or expanded."""
        q, k, v = self.q.shape, self.k.shape, self.v.shape
        masked = self.mask is not None or self.bias is not None
        return not masked and q[:-2] == k[:-2] == v[:-2] and q[-2] * k[-2] <= SMALL

    @property
    def causal(self) -> bool:
        """True where the mask is plain causal by its 2 T values; synchronizes a GPU."""
        # In torch.compile values are not concrete, and the lock of a cached property is not traced.
        return not torch.compiler.is_compiling() and self._causal

    @functools.cached_property
    def _causal(self) -> bool:
        if not isinstance(self.mask, Mask) or self.bias is not None:
            return False
        start, stop = errors.value(self.mask.start), errors.value(self.mask.stop)
        return (
            start is not None
            and stop is not None
            and aten.is_causal((start, stop), self.k.shape[-2])
        )


def _never(_: Request) -> str:
    return ""


@dataclass(frozen=True)
class Kernel:
    """An implementation of attention, accepted wherever the name of a kernel is.

    Args:
        name: its name in `explain` and in errors.
        what: a line of description.
        why_not: of a Request, the reason why this kernel cannot run it, or "". It checks whatever
            the kernel lacks: a mask, a bias, dropout (`r.dropout`), the log-sum-exp
            (`r.wants_lse`), a dtype, a derivative that may follow (`r.recorded`).
        run: of a Request, Attended(out (*r.lead, H, T, Dv), lse (*r.lead, H, T)); lse is not read
            unless `r.wants_lse`.
        passed_over: of a Request, the reason why it is not chosen automatically although it can
            run, or "". Only read for the kernels of the registry.

    Example:
        >>> import funcattn as fa
        >>> def run(r):
        ...     return fa.attend(r.q, r.k, r.v, r.mask, scale=r.scale, bias=r.bias,
        ...     kernel="reference")
        >>> mine = fa.kernels.Kernel("mine", "the reference", lambda r: "draws no dropout"
        ...     if r.dropout else "", run)
        >>> q = torch.ones(1, 2, 4)
        >>> fa.explain(q, q, q, kernel=mine).chosen
        'mine'

    Law: runs inside a decoder, eager, compiled, generating and differentiated
        (test_dispatch.py::test_a_kernel_of_ones_own_runs_inside_a_decoder).
    """

    name: str
    what: str
    why_not: Callable[[Request], str]
    run: Callable[[Request], Attended]
    passed_over: Callable[[Request], str] = _never

    def __repr__(self) -> str:
        return f"Kernel({self.name!r}, {self.what!r})"
