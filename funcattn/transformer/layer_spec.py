"""What differs between the layers of a config: `LayerSpec`, and the sizes of heads.

A layer is computed by the config of its sizes, `of_layer`: what reads a config of one layer knows
of no other. A config is not typed by its class here: that module imports this one.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

from .mixers import ATTENTIVE, STATELESS

KEPT = 256  # configs whose groups of layers are remembered; not in them, where `vars` would find it
LIKE = {"local_head_size": None, "local_kv_heads": None, "local_sinks": False}  # all layers


class LayerSpec(NamedTuple):
    """The fields that differ between layers. Layers with equal specs are one pure function."""

    window: int | None  # tokens each token attends to, itself included; None is all before it
    rotary: bool
    local: bool  # True: its rotary base is Config.local_rope_base
    experts: bool
    mixer: str = "attention"  # of MIXERS
    feeds: bool = True  # False: without a feed-forward
    keys_of: int | None = None  # the layer whose keys and values it reads; None: its own
    sparsity: float = 0.0  # of the gate's features, see layers.sparse

    @property
    def caches(self) -> bool:
        """True where the layer has keys and values of its own, which are cached."""
        return self.attends and self.keys_of is None

    @property
    def attends(self) -> bool:
        """True where the layer has attention."""
        return self.mixer in ATTENTIVE

    @property
    def recurs(self) -> bool:
        """True where the layer has a recurrent state."""
        return self.mixer not in STATELESS


def spec_of(config: Any, number: int) -> LayerSpec:
    """`Config.layer_spec`."""
    has = lambda layers: not layers or layers[number]
    mixer = config.mixers[number] if config.mixers else "attention"
    attends, feeds = mixer in ATTENTIVE, has(config.feed_forward_layers)
    near = lambda i: (
        config.window is not None and (not config.window_layers or config.window_layers[i])
    )
    local, own = attends and near(number), config.layers - config.shared_layers
    alike = (i for i in reversed(range(own)) if near(i) == local)
    return LayerSpec(
        window=config.window if local else None,
        rotary=attends and config.positions == "rotary" and has(config.rotary_layers),
        local=local and config.local_rope_base is not None,
        experts=bool(config.experts) and has(config.expert_layers) and feeds,
        mixer=mixer,
        feeds=feeds,
        keys_of=next(alike) if number % config.layers >= own else None,
        sparsity=config.sparsities[number] if config.sparsities else 0.0,
    )


def of_layer(config: Any, spec: LayerSpec) -> Any:
    """The config of the sizes of a layer: that of its heads, where windows have others.

    Example:
        >>> from .config import Config
        >>> config = Config(head_size=32, window=8, window_layers=(True, False), local_head_size=8)
        >>> [of_layer(config, config.layer_spec(i)).head_size for i in range(2)]
        [8, 32]
    """
    if not has_sizes(config) and not config.local_sinks:
        return config
    return config.far if spec.window is None else config.near


def has_sizes(config: Any) -> bool:
    """True where layers with a window have other heads than those without."""
    return (config.local_head_size or config.head_size) != config.head_size or (
        config.local_kv_heads or config.kv_heads
    ) != config.kv_heads


@functools.lru_cache(maxsize=KEPT)
def near_of(config: Any) -> Any:
    """`Config.near`."""
    sizes = {
        "head_size": config.local_head_size or config.head_size,
        "kv_heads": config.local_kv_heads or config.kv_heads,
    }
    return replace(config, **{**LIKE, **sizes})


@functools.lru_cache(maxsize=KEPT)
def far_of(config: Any) -> Any:
    """`Config.far`."""
    return replace(config, **{**LIKE, "sinks": config.sinks and not config.local_sinks})


@functools.lru_cache(maxsize=KEPT)
def groups_of(config: Any) -> tuple[tuple[int, ...], ...]:
    """`Config.cache_groups`."""
    numbers = [i for i in range(config.layers) if config.layer_spec(i).caches]
    if not has_sizes(config):
        return (tuple(numbers),)
    near = tuple(i for i in numbers if config.layer_spec(i).window is not None)
    far = tuple(i for i in numbers if config.layer_spec(i).window is None)
    return tuple(group for group in (near, far) if group)
