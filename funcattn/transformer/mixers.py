"""The kinds of layers by what mixes their tokens, and what Config must say for each."""

from typing import TYPE_CHECKING

from ..core import errors

if TYPE_CHECKING:
    from .config import Config

MIXERS = ("attention", "short_convolution", "gated_delta")
PLACEMENTS = ("before", "after", "around")  # of norms in a recurrent layer


def check_mixers(config: "Config") -> None:
    """Raise unless the recurrent layers are of known kinds, with the sizes they need."""
    given = config.mixers
    fail = lambda name, wanted, remedy: errors.fail(
        "Config", name, wanted, repr(getattr(config, name)), remedy
    )
    if (
        not isinstance(given, tuple)
        or len(given) != config.layers
        or any(kind not in MIXERS for kind in given)
        or "attention" not in given
    ):
        wanted = f"() or a tuple of {config.layers} of {', '.join(MIXERS)}, one a layer at least "
        fail("mixers", f"{wanted}with attention", "Say it for every layer.")
    recurrent = {kind for kind in given if kind != "attention"}
    if recurrent and config.convolution_size < 2:
        fail("convolution_size", "at least 2 in recurrent layers", "It is the width W.")
    if "gated_delta" in recurrent:
        for name in ("state_heads", "state_key_heads", "state_key_size", "state_value_size"):
            if getattr(config, name) < 1:
                fail(name, "at least 1 in layers of a scan", "Sizes are positive.")
        if config.state_heads % config.state_key_heads:
            fail(
                "state_key_heads",
                f"a divisor of state_heads = {config.state_heads}",
                "Each key head serves as many value heads.",
            )
    if config.mixer_norm_placement not in (None, *PLACEMENTS):
        wanted = f"None or one of {', '.join(PLACEMENTS)}"
        fail("mixer_norm_placement", wanted, "Choose one of these.")
    if recurrent and config.follows_length:
        fail(
            "rope_scaling",
            "one whose angles do not follow the length, beside recurrent layers",
            'No family has both; "yarn" and "linear" do not follow it.',
        )
