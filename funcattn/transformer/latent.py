"""Multi-head latent attention: keys and values of all heads are made of one vector a token.

    [c', r'] = kv_down y     c = norm(c') (R features)     r = rotate(r')
    [n_h, s'_h] = q_h norm(q_down y)                       s_h = rotate(s'_h)      h a head
    logits_h = scale (n_h . k_h c + s_h . r)               out_h = softmax(logits_h) v_h c

A cache holds the row [c, r] of each token, R + rotary_size numbers a layer, whatever the number of
heads. There are two ways to the same result:

    plain      k_h c and v_h c are computed for every token: attention with H key heads
    absorbed   n_h . k_h c = (k_h^T n_h) . c: attention with one key head, the rows, whose values
               are their first R features; v_h is applied to what is mixed

`is_absorbed` counts the multiplications of both. A few new tokens behind a past are absorbed: the
past is read as it is, and no key or value of it is made. A prompt is plain.

Law: absorbed is plain, and both are the definition (test_latent.py).
Source: DeepSeek-AI, DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels, layers, taps
from ..kernels import Kernel, Part
from ..kernels.products import product
from ..layers import Rotation, Weight
from ..masks import Mask
from ..records import is_absent
from ..taps import tap
from . import parallel
from .config import Config, LayerSpec
from .weights import Layer

EPSILON = 1e-6  # of the norms of the compressed, in every published model, whatever its other norms


def is_absorbed(config: Config, new: int, past: int) -> bool:
    """True where `new` tokens behind `past` rows take fewer multiplications absorbed than plain.

    With N = new + past keys, a head multiplies

        plain       N R (n + Dv)    + new N (n + t + Dv)        n = D - t,  t = rotary_size
        absorbed    new R (n + Dv)  + new N (2 R + t)

    Example:
        >>> v3 = Config(
        ...     heads=128, kv_heads=128, head_size=192, rotary_size=64, value_size=128,
        ...     latent_size=512,
        ... )
        >>> [is_absorbed(v3, T, 4096) for T in (1, 128, 512)], is_absorbed(v3, 1, 0)
        ([True, True, False], False)
    """
    R, (D, Dv) = config.latent_size, config.head_sizes
    made = D - (config.rotary_size or 0) + Dv
    return new * (new + past) * (2 * R - made) < past * R * made


def attend(
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    y: Tensor,
    rotation: Rotation | tuple[()],
    mask: Mask | Tensor | None,
    temperature: Tensor | tuple[()],
    past: Sequence[Part],
    *,
    name: str,
    kernel: str | Kernel | None,
) -> tuple[Tensor, Tensor]:
    """What the heads mix, (*lead, T, H Dv), and the rows (*lead, 1, T, R + t) of the new tokens.

    Args:
        config, spec, weights: of the layer.
        y: its input (*lead, T, E), normalized.
        rotation, mask, temperature: of the new tokens, as in `LayerContext`.
        past: segments of cached rows, as keys (*lead, 1, S, R + t).
        name: of the layer, for taps: with a listener the plain way is taken, whose q, k and v are
            those of the heads.
        kernel: of attention; None chooses.
    """
    H, turning = parallel.heads(config)[0], config.rotary_size or 0
    made = y
    if config.query_latent_size:
        compressed = _affine(weights.q_down, weights.q_down_bias, y)
        made = _norm(compressed, weights.q_down_norm)
        made = tap(f"{name}.attention.query_latent", made)
    q = _heads(layers.linear(weights.q, made), H)
    c, r = _affine(weights.kv_down, weights.kv_down_bias, y).tensor_split([config.latent_size], -1)
    c = tap(f"{name}.attention.latent", _norm(c, weights.kv_down_norm)).unsqueeze(-3)
    n, s = q.tensor_split([q.shape[-1] - turning], -1)
    r = r.unsqueeze(-3)
    if spec.rotary:
        assert isinstance(rotation, Rotation)
        s, r = layers.rotate(s, rotation), layers.rotate(r, rotation)
    if isinstance(temperature, Tensor):
        n, s = n * temperature, s * temperature
    row = torch.cat([c, r], -1)
    parts = [*past, Part(row, row, () if mask is None else mask)]
    for part in past:
        kernels.check_remembered(part.k, row.dtype)
    new, before = row.shape[-2], sum(part.k.shape[-2] for part in past)
    absorbed = is_absorbed(config, new, before) and not taps.heard()
    way = _absorbed if absorbed else _plain
    return way(config, spec, weights, n, s, parts, name, kernel), row


def _absorbed(
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    n: Tensor,
    s: Tensor,
    parts: Sequence[Part],
    name: str,
    kernel: str | Kernel | None,
) -> Tensor:
    """Attention with one key head, the rows of the cache."""
    H, R = n.shape[-3], config.latent_size
    up, out = (
        torch.unflatten(layers.dense(weight, R, n), 0, (H, -1)) for weight in (weights.k, weights.v)
    )
    q = torch.cat([product(n, up), s], -1)  # (*lead, H, T, R + t)
    seen = [Part(part.k, part.k[..., :R], part.mask) for part in parts]
    mixed = _over_segments(config, spec, weights, q, seen, kernel)
    return product(mixed, out.mT).transpose(-2, -3).flatten(-2)


def _plain(
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    n: Tensor,
    s: Tensor,
    parts: Sequence[Part],
    name: str,
    kernel: str | Kernel | None,
) -> Tensor:
    """Attention with the keys and values of every head."""
    H, R = n.shape[-3], config.latent_size
    q, seen = torch.cat([n, s], -1), []
    for part in parts:
        c, r = part.k.tensor_split([R], -1)
        k, v = (_heads(y, H) for y in layers.linears((weights.k, weights.v), c.squeeze(-3)))
        k = torch.cat([k, r.expand(*k.shape[:-1], -1)], -1)
        seen.append(Part(k, v, part.mask))
    k, v, mask = seen[-1]
    q = tap(f"{name}.attention.q", q)
    seen[-1] = Part(tap(f"{name}.attention.k", k), tap(f"{name}.attention.v", v), mask)
    return _over_segments(config, spec, weights, q, seen, kernel).transpose(-2, -3).flatten(-2)


def _over_segments(
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    q: Tensor,
    parts: Sequence[Part],
    kernel: str | Kernel | None,
) -> Tensor:
    """Attention (*lead, H, T, Dv) over segments, of which the last is of the new tokens."""
    *past, (k, v, given) = parts
    mask: Mask | Tensor | None = None if is_absent(given) else given
    if parallel.in_parts():
        return parallel.attend(config, spec, q, k, v, mask, past, kernel)
    if not past and config.attention_cap is None and not config.sinks:
        return kernels.attention(q, k, v, mask, scale=config.scale, kernel=kernel)
    sinks = weights.sinks if config.sinks else None
    return kernels.attend_parts(
        q, parts, scale=config.scale, cap=config.attention_cap, sinks=sinks, kernel=kernel
    )


def _heads(x: Tensor, heads: int) -> Tensor:
    """(*lead, T, H D) to (*lead, H, T, D)."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(-2, -3)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return layers.rms_norm(x, weight, epsilon=EPSILON)


def _affine(weight: Weight, bias: Weight, x: Tensor) -> Tensor:
    y = layers.linear(weight, x)
    return y if is_absent(bias) else y + bias
