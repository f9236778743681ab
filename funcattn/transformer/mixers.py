"""The kinds of layers by what mixes their tokens, and what Config must say for each.

A config is not typed here: its module imports this one.
"""

from typing import Any

from ..core import errors

MIXERS = (
    "attention",
    "short_convolution",
    "gated_delta",
    "state_space",
    "state_space_and_attention",  # both read one norm, their outputs are added
    "none",  # a feed-forward alone
)
ATTENTIVE = ("attention", "state_space_and_attention")  # whose keys and values are cached
STATELESS = ("attention", "none")
SCANS = ("gated_delta", "state_space", "state_space_and_attention")
OF_NETS = ("silu", "sigmoid")  # activations of the gate of a delta net
NORMS = ("gated", "before_gate", "none")  # of a state space
PLACEMENTS = ("before", "after", "around")  # of norms in a recurrent layer


def check_mixers(config: Any) -> None:
    """Raise unless the recurrent layers are of known kinds, with the sizes they need."""
    given = config.mixers
    fail = lambda name, wanted, remedy: errors.fail(
        "Config", name, wanted, repr(getattr(config, name)), remedy
    )
    if (
        not isinstance(given, tuple)
        or len(given) != config.layers
        or any(kind not in MIXERS for kind in given)
        or not {*given} & {*ATTENTIVE}
    ):
        wanted = f"() or a tuple of {config.layers} of {', '.join(MIXERS)}, one a layer at least "
        fail("mixers", f"{wanted}with attention", "Say it for every layer.")
    recurrent = {kind for kind in given if kind not in STATELESS}
    if recurrent and config.convolution_size < 2:
        fail("convolution_size", "at least 2 in recurrent layers", "It is the width W.")
    if recurrent & {*SCANS}:
        for name in ("state_heads", "state_key_heads", "state_key_size", "state_value_size"):
            if getattr(config, name) < 1:
                fail(name, "at least 1 in layers of a scan", "Sizes are positive.")
        if config.state_heads % config.state_key_heads:
            fail(
                "state_key_heads",
                f"a divisor of state_heads = {config.state_heads}",
                "Each key head serves as many value heads.",
            )
    if config.mixer_gate_activation not in OF_NETS:
        fail("mixer_gate_activation", f"one of {', '.join(OF_NETS)}", "Choose one of these.")
    if not errors.is_count(config.mixer_rank, 0):
        fail("mixer_rank", "0 or more", "Sizes are whole numbers.")
    if config.mixer_norm not in NORMS:
        fail("mixer_norm", f"one of {', '.join(NORMS)}", "Choose one of these.")
    if config.mixer_norm_placement not in (None, *PLACEMENTS):
        wanted = f"None or one of {', '.join(PLACEMENTS)}"
        fail("mixer_norm_placement", wanted, "Choose one of these.")
    if recurrent and config.follows_length:
        fail(
            "rope_scaling",
            "one whose angles do not follow the length, beside recurrent layers",
            'No family has both; "yarn" and "linear" do not follow it.',
        )


FACTORS = {"mixer_factors": 7, "attention_factors": 3, "feed_forward_factors": 2}


def check_parts(config: Any) -> None:
    """Raise unless each layer has a part, and factors are as many as they multiply."""
    for name, count in FACTORS.items():
        given = getattr(config, name)
        if not isinstance(given, tuple) or len(given) not in (0, count):
            wanted = f"() or a tuple of {count} numbers"
            errors.fail("Config", name, wanted, repr(given), "Say all of them.")
    feeds = config.feed_forward_layers or (True,) * config.layers
    mixers = config.mixers or ("attention",) * config.layers
    empty = [i for i in range(config.layers) if mixers[i] == "none" and not feeds[i]]
    if empty:
        wanted = "True in layers whose mixer is 'none'"
        got = f"False in layer {empty[0]}"
        errors.fail("Config", "feed_forward_layers", wanted, got, "Leave the layer out.")
    if config.parallel and ("none" in mixers or not all(feeds)):
        wanted = "False where a layer has one part"
        errors.fail("Config", "parallel", wanted, True, "No family has both.")


def check_latent(config: Any) -> None:
    """Raise unless the sizes of values and latents are such that heads can be made of them."""
    fail = lambda name, wanted, remedy: errors.fail(
        "Config", name, wanted, getattr(config, name), remedy
    )
    for name, least in (("value_size", 1), ("latent_size", 0), ("query_latent_size", 0)):
        size = getattr(config, name)
        if not (name == "value_size" and size is None) and not errors.is_count(size, least):
            fail(name, f"a number of features, {least} or more", "Sizes are whole numbers.")
    if not config.latent_size:
        if config.query_latent_size:
            fail("query_latent_size", "0 without a latent_size", "Set both.")
        return
    if config.rotary_size is None or not 0 < config.rotary_size < config.head_size:
        wanted = f"between 0 and head_size = {config.head_size} with a latent_size"
        fail("rotary_size", wanted, "So many features of a key are the same in all heads.")
    if config.kv_heads != config.heads:
        wanted = f"heads = {config.heads} with a latent_size"
        fail("kv_heads", wanted, "Each head makes its own keys and values of the latent.")
    if config.positions == "alibi":
        wanted = "other than 'alibi' with a latent_size"
        fail("positions", wanted, "The rows of a latent have no columns of positions.")
    for name, neutral in (
        ("head_norm", "none"),
        ("qkv_limit", None),
        ("attention_gate", "none"),
        ("local_rotary_size", None),
    ):
        if getattr(config, name) != neutral:
            fail(name, f"{neutral!r} with a latent_size", "No family has both.")
