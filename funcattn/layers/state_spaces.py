"""The state space of Mamba-2: gated linear attention whose steps dt say how much each token counts.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T        y_t = S_t^T C_t + D x_t

The duality of the paper: C is the query, B the key, dt * x the value, dt * A the log of the decay.

Source: Dao and Gu, Transformers are SSMs, arXiv:2405.21060.
"""

from torch import Tensor

from ..core import errors
from ..kernels.dtypes import accurate
from .gated_linear import linear_attention
from .scans import CHUNK, Scanned


def state_space(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | tuple[()] = (),
    state: Tensor | tuple[()] = (),
    *,
    mask: Tensor | None = None,
    chunk: int = CHUNK,
) -> Scanned:
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, read as S_t^T C_t + D x_t, in chunks.

    Time and memory are linear in T; a step of one token takes constant time. Closed under grad, jvp
    and vmap at every order.

    Args:
        x: floating (*lead, H, T, P).
        dt: (*lead, H, T), the step sizes, after bias, softplus and limits.
        A: (H,), the rates, negative: -exp of what checkpoints store.
        B, C: (*lead, K, T, N), one group of them for H / K heads of x; leading axes broadcast.
        D: (H,), the skip; () is none.
        state: (*lead, H, N, P), before the first token; () is zero.
        mask: bool (*lead, T); a token where it is False leaves the state as it was.
        chunk: tokens that are multiplied at once, a power of two; the result does not depend on it.

    Returns:
        out (*lead, H, T, P) in the dtype of x, and the last state, in float32 at least, in which
        all sums are.

    Raises:
        ValueError, TypeError: for shapes and dtypes other than these.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0], [0.0]]])
        >>> ones = torch.ones(1, 2, 1)
        >>> state_space(x, ones[..., 0], torch.tensor([-1.0]), ones, ones).out.flatten()
        tensor([1.0000, 0.3679])

    Law: equals a loop over tokens, with every derivative
        (test_scans.py::test_a_scan_is_its_loop_in_every_nesting).
    Source: Dao and Gu, arXiv:2405.21060, section 6.
    """
    for name, y in (("x", x), ("dt", dt), ("A", A)):
        if not isinstance(y, Tensor) or not y.is_floating_point():
            got = f"a {type(y).__name__}" if not isinstance(y, Tensor) else y.dtype
            wanted = "a floating tensor"
            errors.fail("state_space", name, wanted, got, "Cast it, or make it one.", TypeError)
    if x.dim() < 3 or tuple(dt.shape[-2:]) != tuple(x.shape[-3:-1]):
        wanted = "(*lead, H, T) where x is (*lead, H, T, P)"
        got = f"{errors.shape(dt)} and {errors.shape(x)}"
        errors.fail("state_space", "dt", wanted, got, "One step size for each head and token.")
    for name, y in (("A", A), ("D", D)):
        if isinstance(y, Tensor) and tuple(y.shape[-1:]) != (x.shape[-3],):
            wanted = f"(H,) with H = {x.shape[-3]}"
            errors.fail("state_space", name, wanted, errors.shape(y), "One number for each head.")
    dt = accurate(dt, x).unsqueeze(-1)
    each = lambda y: y.unsqueeze(-1).unsqueeze(-1)  # one number a head, beside (T, P)
    y = linear_attention(C, B, dt * x, dt * each(A), state, mask=mask, scale=1.0, chunk=chunk)
    out = y.out + each(D) * x if isinstance(D, Tensor) else y.out
    return Scanned(out.to(x.dtype), y.state)
