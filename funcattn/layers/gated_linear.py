"""Gated linear attention: a state that forgets, read by queries.

    S_t = exp(g_t) * S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

Source: Katharopoulos et al., Transformers are RNNs, arXiv:2006.16236; Yang et al., Gated linear
attention transformers, arXiv:2312.06635.
"""

from torch import Tensor

from . import scans
from .scans import CHUNK, Scanned

NEEDED = ("q", "k", "v", "log_decay")  # arguments that cannot be ()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | tuple[()] = (),
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> Scanned:
    """S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T, read as scale * S_t^T q_t, in chunks.

    Causal attention with weights q_t . k_j exp(log_decay_{j+1} + ... + log_decay_t), without a
    softmax, in time and memory linear in T; a step of one token takes constant time. Closed under
    grad, jvp and vmap at every order.

    Args:
        q, k: floating (*lead, K, T, Dk), one head of them for H / K of v; leading axes broadcast.
        v: (*lead, H, T, Dv).
        log_decay: (*lead, H, T, 1), or (*lead, H, T, Dk) for decays by feature; at most 0, and -inf
            forgets everything.
        state: (*lead, H, Dk, Dv), before the first token; () is zero.
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
        >>> q = k = v = torch.ones(1, 3, 1)
        >>> linear_attention(q, k, v, torch.full((1, 3, 1), 0.5).log()).out.flatten()
        tensor([1.0000, 1.5000, 1.7500])

    Law: equals a loop over tokens, with every derivative
        (test_scans.py::test_a_scan_is_its_loop_in_every_nesting).
    Source: Yang et al., arXiv:2312.06635, section 4.
    """
    x = scans.chunks("linear_attention", NEEDED, q, k, v, log_decay, (), state, mask, chunk)
    out, last = scans.scan(x, v.shape[-2])
    return Scanned((out * _scale(k, scale)).to(v.dtype), last)


def linear_attention_states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | tuple[()] = (),
    *,
    mask: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The states of `linear_attention` after each token, (*lead, H, T, Dk, Dv).

    For the few tokens of a draft. The state after the first n tokens alone, n a tensor or not, is
    that of `linear_attention` with the mask `arange(T) < n`.

    Args:
        k, v, log_decay, state, mask, chunk: as for `linear_attention`.

    Law: row t is the state of a scan of the first t + 1 tokens
        (test_scans.py::test_the_states_after_each_token_are_those_of_shorter_scans).
    """
    x = scans.chunks(
        "linear_attention_states", NEEDED[1:], (), k, v, log_decay, (), state, mask, chunk
    )
    return scans.states(x, v.shape[-2])


def _scale(k: Tensor, scale: float | None) -> float:
    return k.shape[-1] ** -0.5 if scale is None else scale
