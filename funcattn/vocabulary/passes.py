"""Passes over the rows of a vocabulary: log-sum-exp, gradient and Hessian, a block at a time.

    z_ij = x_i . w_j            s = cap tanh(z / cap), or z
    F = sum_i a_i (log sum_j exp(s_ij - c_i)) + b_i (s_{i, t_i} - c_i)          c_i = max_j s_ij

F has two weights a row, a_i and b_i: its gradient with respect to them is the log-sum-exp and the
target's logit, both relative to the constant c_i (so that neither rounds where logits are large),
and with a = 1, b = -1 it is the sum of the cross-entropies. A block holds rows of x and all rows of
w, so the normalizer of a row and what is weighted by it are computed from one product:

    gradient    D = (a p + b e_t) s'(z)                             dx = D w         dw = D^T x
    Hessian     dD = [(a (ds - p . ds) + da) p + db e_t] s'(z) + (a p + b e_t) s''(z) dz
                                                hx = dD w + D dw      hw = dD^T x + D^T dx

with p = softmax(s), e_t the indicator of the target, dz = dx w^T + x dw^T and ds = s'(z) dz. The
value is one product of (N, E) with (E, V), the gradient three, the Hessian times a direction seven.

Tensors here are plain (see `functions`), so a block is overwritten in place. Products are in the
dtype of the weights, as those of `layers.linear`; statistics and sums in float32 at least.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.dtypes import accumulation_dtype

ELEMENTS = 2**23  # logits of one block: 32 MiB in float32
ROWS = 64  # of one block, at least: with fewer a product waits for the memory of the head
LOG2E = 1.4426950408889634  # torch's exp2 is several times as fast as its exp on CPU


class Spec(NamedTuple):
    """The arguments of a pass that are no tensors.

    cap: of the logits, 0.0 for none. rows: of one block, 0 to choose. hidden, head: whether the
    derivative with respect to them is among the outputs.
    """

    cap: float = 0.0
    rows: int = 0
    hidden: bool = False
    head: bool = False

    def count(self, classes: int) -> int:
        """Rows of one block."""
        return self.rows or max(ROWS, ELEMENTS // max(1, classes))


def gradient(spec: Spec, targets: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Sequence:
    """F (), its gradient by a and by b (N,), the row max (N,), and where wanted by x and by w.

    Args:
        spec: see Spec.
        targets: int64 (N,).
        x, w: (N, E) and (V, E), of one dtype.
        a, b: (N,), float32 at least.
    """
    lse, target, shift = (torch.empty_like(a) for _ in range(3))
    dx = torch.empty_like(x) if spec.hidden else None
    dw = torch.zeros_like(w, dtype=a.dtype) if spec.head else None
    for rows in _blocks(spec, x, w):
        s, slope, _ = _logits(spec, x[rows], w)
        at, shift[rows] = targets[rows].unsqueeze(-1), s.amax(-1)
        s.sub_(shift[rows].unsqueeze(-1))
        target[rows] = s.gather(-1, at).squeeze(-1)
        p = s.mul_(LOG2E).exp2_()
        normalizer = p.sum(-1)
        lse[rows] = normalizer.log()
        if dx is None and dw is None:
            continue
        d = p.mul_((a[rows] / normalizer).unsqueeze(-1))
        d.scatter_add_(-1, at, b[rows].unsqueeze(-1))
        d = (d if slope is None else d.mul_(slope)).to(w.dtype)
        if dx is not None:
            dx[rows] = d @ w
        if dw is not None:
            _accumulate(dw, d, x[rows])
    total = (a * lse + b * target).sum()
    return total, lse, target, shift, *_present(dx, None if dw is None else dw.to(w.dtype))


def hessian(
    spec: Spec,
    targets: Tensor,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    ux: Tensor | None,
    uw: Tensor | None,
    ua: Tensor | None,
    ub: Tensor | None,
) -> Sequence[Tensor]:
    """The Hessian of F times a direction: by a and by b (N,), and where wanted by x and by w.

    Args:
        spec, targets, x, w, a, b: see `gradient`.
        ux, uw, ua, ub: the direction; None is zero.
    """
    by_a, by_b = torch.zeros_like(a), torch.zeros_like(b)
    hx = torch.empty_like(x) if spec.hidden else None
    hw = torch.zeros_like(w, dtype=a.dtype) if spec.head else None
    for rows in _blocks(spec, x, w):
        s, slope, curve = _logits(spec, x[rows], w)
        at, column = targets[rows].unsqueeze(-1), lambda v, rows=rows: v[rows].unsqueeze(-1)
        p = s.sub_(s.amax(-1, keepdim=True)).mul_(LOG2E).exp2_()
        p.div_(p.sum(-1, keepdim=True))
        dz = None if ux is None else _product(ux[rows], w)
        if uw is not None:
            dz = _product(x[rows], uw) if dz is None else dz.add_(_product(x[rows], uw))
        if dz is not None:
            ds = dz if slope is None else dz * slope
            # Pairwise: a product (1, V) by (V, 1) adds one by one, and loses the many small ones.
            mean = (p * ds).sum(-1)
            by_a[rows], by_b[rows] = mean, ds.gather(-1, at).squeeze(-1)
            dd = ds.sub_(mean.unsqueeze(-1)).mul_(column(a))
            dd = (dd if ua is None else dd.add_(column(ua))).mul_(p)
        else:
            dd = torch.zeros_like(p) if ua is None else p * column(ua)
        if hx is None and hw is None:
            continue
        if ub is not None:
            dd.scatter_add_(-1, at, column(ub))
        d = p.mul_(column(a)).scatter_add_(-1, at, column(b))
        if slope is not None and curve is not None:
            dd = dd if dz is None else dd.add_(dz.mul_(curve).mul_(d))
            dd.mul_(slope)
            d.mul_(slope)
        d, dd = d.to(w.dtype), dd.to(w.dtype)
        if hx is not None:
            hx[rows] = dd @ w if uw is None else torch.addmm(dd @ w, d, uw)
        if hw is not None:
            _accumulate(hw, dd, x[rows])
            if ux is not None:
                _accumulate(hw, d, ux[rows])
    return by_a, by_b, *_present(hx, None if hw is None else hw.to(w.dtype))


def potential(
    spec: Spec, x: Tensor, w: Tensor, a: Tensor, b: Tensor, targets: Tensor
) -> tuple[Tensor]:
    """F in plain operations: the specification, and the source of derivatives above the second."""
    s = (x @ w.mT).to(accumulation_dtype(x))
    if spec.cap:
        s = (s / spec.cap).tanh() * spec.cap
    s = s - s.detach().amax(-1, keepdim=True)
    target = s.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return ((a * s.exp().sum(-1).log() + b * target).sum(),)


def _blocks(spec: Spec, x: Tensor, w: Tensor) -> Iterator[slice]:
    N, count = len(x), spec.count(len(w))
    return (slice(i, min(i + count, N)) for i in range(0, N, count))


def _product(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w.mT).to(accumulation_dtype(x))


def _logits(spec: Spec, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """s (rows, V), and with a cap s'(z) and s''(z) / s'(z) of the same shape."""
    z = _product(x, w)
    if not spec.cap:
        return z, None, None
    u = z.div_(spec.cap).tanh_()
    return u * spec.cap, 1 - u.square(), u.mul_(-2 / spec.cap)


def _accumulate(into: Tensor, d: Tensor, x: Tensor) -> None:
    """into (V, E) += d^T x, of d (rows, V) and x (rows, E)."""
    into.addmm_(d.mT, x) if into.dtype == x.dtype else into.add_(d.mT @ x)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x for x in tensors if x is not None)
