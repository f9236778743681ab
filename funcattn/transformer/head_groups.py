"""Attention of one key head and its queries at a time, each rematerialized.

    attention(y) = sum over g of o_g attend(q_g y, k_g y, v_g y) + bias of o

Query heads share a key head in groups, and no group reads another. What a derivative holds is then
the queries, keys, values and outputs of one group instead of all, at every order.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import collectives, taps
from ..records import is_absent
from ..rematerialization import remat
from .config import Config
from .weights import Layer

Attend: TypeAlias = Callable[[Config, Layer, Tensor, Any], tuple[Tensor, Tensor, Tensor]]
# (config, weights, y, context) -> what attention adds to the residual, and k, v (*lead, K, T, D)

ROWS = ("q", "k", "v", "q_bias", "k_bias", "v_bias", "sinks")  # a group's are consecutive


def can_split(config: Config, weights: Layer, past: Sequence[object]) -> bool:
    """True where heads of attention can be computed apart, by slices of tensors."""
    matrices = (weights.q, weights.k, weights.v, weights.o)
    return (
        config.kv_heads > 1
        and not config.latent_size  # heads have the latents in common
        and config.head_norm in ("none", "rms", "layer")
        and config.attention_gate == "none"
        and config.positions != "alibi"
        and not past
        and not collectives.bound()
        and not taps.heard()
        and all(isinstance(x, Tensor) for x in matrices)
    )


def by_groups(
    attend: Attend, config: Config, weights: Layer, y: Tensor, context: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """attend(config, weights, y, context), a group at a time.

    Law: test_transformer.py::test_heads_in_groups_are_heads_at_once.
    """
    K = config.kv_heads
    one = replace(config, heads=config.heads // K, kv_heads=1, output_bias=False)
    group = remat(functools.partial(attend, one))
    first, *others = _groups(config, weights)
    out, *kept = group(first, y, context)
    keys, values = ([part] for part in kept)
    for some in others:
        more, k, v = group(some, y, context)
        out = out + more
        keys.append(k)
        values.append(v)
    if not is_absent(weights.o_bias):
        out = out + weights.o_bias
    return out, torch.cat(keys, -3), torch.cat(values, -3)


def _groups(config: Config, weights: Layer) -> list[Layer]:
    """The weights of attention of each group; those of other parts are absent."""
    K = config.kv_heads
    each: list[dict[str, Tensor]] = [{} for _ in range(K)]
    split = {name: (getattr(weights, name), 0) for name in ROWS} | {"o": (weights.o, 1)}
    for name, norm in (("q_norm", weights.q_norm), ("k_norm", weights.k_norm)):
        if isinstance(norm, Tensor) and norm.dim() == 2:
            split[name] = (norm, 0)
        elif isinstance(norm, Tensor):
            for some in each:
                some[name] = norm
    for name, (x, dim) in split.items():
        if isinstance(x, Tensor):
            for some, part in zip(each, x.chunk(K, dim), strict=True):
                some[name] = part
    return [Layer(**some) for some in each]
