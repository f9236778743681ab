"""What Config must say of sizes that differ between layers, and of what layers have in common.

A config is not typed by its class here: that module imports this one.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from ..core import errors


def check_sizes(config: Any) -> None:
    """Raise unless the sizes of layers, and what layers have in common, fit each other."""

    def fail(name: str, wanted: str, remedy: str) -> NoReturn:
        errors.fail("Config", name, wanted, repr(getattr(config, name)), remedy)

    _check_counts(config, fail)
    for name in ("local_head_size", "local_kv_heads", "local_sinks"):
        if getattr(config, name) not in (None, False) and config.window is None:
            fail(name, "unset without a window", "It is of the layers with a window.")
    near = config.local_rotary_size or config.rotary_size or 0
    D = config.local_head_size
    if D is not None and config.positions == "rotary" and (D % 2 or near > D):
        wanted = "even, and at least the features that turn"
        fail("local_head_size", wanted, "Rotary angles turn pairs of features.")
    if config.local_kv_heads is not None and config.heads % config.local_kv_heads:
        wanted = f"a divisor of heads = {config.heads}"
        fail("local_kv_heads", wanted, "Each key head serves H / K query heads.")
    for name in ("feed_forward_sizes", "sparsities"):
        given = getattr(config, name)
        if not isinstance(given, tuple) or len(given) not in (0, config.layers):
            wanted = f"() or a tuple of {config.layers} numbers, one a layer"
            fail(name, wanted, "Say it for every layer.")
    if not all(errors.is_count(size, 1) for size in config.feed_forward_sizes):
        fail("feed_forward_sizes", "sizes of at least 1", "Sizes are whole numbers.")
    if not all(isinstance(x, float | int) and 0 <= x < 1 for x in config.sparsities):
        fail("sparsities", "shares from 0 to less than 1", "0 is none.")
    if any(config.sparsities) and not config.gated:
        fail("sparsities", "() without a gate", "It is the gate whose features are zero.")
    if config.streams == 1 or not 0 <= config.active_stream < max(config.streams, 1):
        wanted = "0, or at least 2, with an active_stream below it"
        fail("streams", wanted, "One residual is 0 streams.")
    if bool(config.layer_embedding_size) != bool(config.layer_vocabulary):
        fail("layer_vocabulary", "above 0 with a layer_embedding_size alone", "Set both.")
    if config.experts_apart and not (config.experts and config.shared_size and config.gated):
        fail("experts_apart", "False without gated experts and a shared_size", "Set all of them.")
    if config.shared_layers:
        _check_shared(config, fail)
    for name in ("streams", "laurel_size", "experts_apart", "layer_embedding_size"):
        if getattr(config, name) and (config.parallel or config.mixers or config.norm != "rms"):
            wanted = "0 or False with parallel blocks, recurrent layers or layer norms"
            fail(name, wanted, "No family has both.")
    for name in ("value_norm", "key_values", "local_head_size", "local_kv_heads", "local_sinks"):
        if getattr(config, name) not in (None, False) and (
            config.latent_size or config.follows_length
        ):
            wanted = "unset with latents or angles that follow the length"
            fail(name, wanted, "No family has both.")
    if config.key_values and config.value_size not in (None, config.head_size):
        fail("key_values", "False with values of another size", "They are made like keys.")
    if config.local_head_size is not None and config.value_size is not None:
        fail("local_head_size", "None with a value_size", "No family has both.")
    if config.local_sinks and not config.sinks:
        fail("local_sinks", "False without sinks", "Set both.")


def _check_counts(config: Any, fail: Callable[[str, str, str], NoReturn]) -> None:
    for name in ("local_head_size", "local_kv_heads"):
        size = getattr(config, name)
        if size is not None and not errors.is_count(size, 1):
            fail(name, "None or at least 1", "Sizes are whole numbers.")
    for name in (
        *("shared_layers", "layer_embedding_size", "layer_vocabulary", "streams", "laurel_size"),
        *("active_stream", "embedding_size"),
    ):
        if not errors.is_count(getattr(config, name), 0):
            fail(name, "0 or more", "Sizes are whole numbers.")


def _check_shared(config: Any, fail: Callable[[str, str, str], NoReturn]) -> None:
    own = config.layers - config.shared_layers
    near = config.window_layers or (config.window is not None,) * config.layers
    if own < 1 or not {*near[own:]} <= {*near[:own]}:
        wanted = "fewer than the layers, with one of each kind before them"
        fail("shared_layers", wanted, "They read the keys of a layer with the same window.")
    if config.latent_size or config.mixers or config.positions == "alibi" or config.follows_length:
        wanted = "0 with latents, recurrent layers, ALiBi or angles that follow the length"
        fail("shared_layers", wanted, "No family has both.")
