"""The gated delta rule: a state that forgets, and writes only what it does not yet predict.

    S_t = exp(g_t) * S_{t-1} + b_t k_t (v_t - (exp(g_t) * S_{t-1})^T k_t)^T
    o_t = scale * S_t^T q_t

A step of gradient descent on |S^T k_t - v_t|^2 / 2 with learning rate b_t and weight decay
exp(g_t): for keys of norm one, b_t = 1 replaces what the state holds for k_t. In the paper's
transposed layout, S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T.

Source: Yang, Kautz and Hatamizadeh, Gated delta networks, arXiv:2412.06464; with a decay for each
feature of a key, Kimi delta attention: Kimi team, Kimi linear, arXiv:2510.26692.
"""

import torch
from torch import Tensor

from ..kernels.dtypes import accurate
from . import scans
from .scans import CHUNK, Scanned

NEEDED = ("q", "k", "v", "log_decay", "beta")  # arguments that cannot be ()


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | tuple[()] = (),
    *,
    normalized: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> Scanned:
    """S_t = a_t * S_{t-1} + b_t k_t (v_t - (a_t * S_{t-1})^T k_t)^T, read as scale * S_t^T q_t.

    In chunks: the values that the tokens of a chunk write solve one triangular system, the rest are
    products. Time and memory are linear in T; a step of one token takes constant time. Closed under
    grad, jvp and vmap at every order.

    Args:
        q, k: floating (*lead, K, T, Dk), one head of them for H / K of v; leading axes broadcast.
        v: (*lead, H, T, Dv).
        log_decay: log a, (*lead, H, T, 1), or (*lead, H, T, Dk) for decays by feature; at most 0,
            and -inf forgets everything.
        beta: (*lead, H, T), in 0..1, or 0..2 for negative eigenvalues.
        state: (*lead, H, Dk, Dv), before the first token; () is zero.
        normalized: True divides q and k by sqrt(sum of their squares + 1e-6).
        mask: bool (*lead, T); a token where it is False leaves the state as it was, and reads 0.
        scale: factor of q; None is 1 / sqrt(Dk).
        chunk: tokens that are multiplied at once, a power of two; the result does not depend on it.

    Returns:
        out (*lead, H, T, Dv) in the dtype of v, and the last state, in float32 at least, in which
        all sums are.

    Raises:
        ValueError, TypeError: for shapes and dtypes other than these.

    Example:
        >>> import torch
        >>> k = torch.ones(1, 2, 1)
        >>> v = torch.tensor([[[3.0], [5.0]]])
        >>> gated_delta(k, k, v, torch.zeros(1, 2, 1), torch.ones(1, 2)).out.flatten()  # replaced
        tensor([3., 5.])

    Law: equals a loop over tokens, with every derivative
        (test_scans.py::test_a_scan_is_its_loop_in_every_nesting).
    Source: Yang et al., arXiv:2412.06464, section 3.3.
    """
    q, k = (_unit(q), _unit(k)) if normalized else (q, k)
    x = scans.chunks("gated_delta", NEEDED, q, k, v, log_decay, beta, state, mask, chunk)
    out, last = scans.scan(x, v.shape[-2])
    return Scanned((out * (k.shape[-1] ** -0.5 if scale is None else scale)).to(v.dtype), last)


def gated_delta_states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | tuple[()] = (),
    *,
    normalized: bool = False,
    mask: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The states of `gated_delta` after each token, (*lead, H, T, Dk, Dv).

    For the few tokens of a draft. The state after the first n tokens alone, n a tensor or not, is
    that of `gated_delta` with the mask `arange(T) < n`.

    Args:
        k, v, log_decay, beta, state, normalized, mask, chunk: as for `gated_delta`.

    Law: row t is the state of a scan of the first t + 1 tokens
        (test_scans.py::test_the_states_after_each_token_are_those_of_shorter_scans).
    """
    k = _unit(k) if normalized else k
    x = scans.chunks(
        "gated_delta_states", NEEDED[1:], (), k, v, log_decay, beta, state, mask, chunk
    )
    return scans.states(x, v.shape[-2])


def _unit(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        return x  # of which `chunks` says that it is none
    x = accurate(x, x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
