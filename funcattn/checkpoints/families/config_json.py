"""config.json, as Hugging Face writes it, to Config and back."""

from collections.abc import Iterator, Mapping

from ...core.errors import fail
from ...transformer import Config
from .catalogue import FAMILIES, family_of
from .ignored import IGNORED
from .tables import NEUTRAL, CheckpointError, Family, Fields, Json, configure, refuse
from .towers import tower_settings

# Without these a reader uses the ids of another tokenizer.
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def read_config(values: Mapping[str, object]) -> Config:
    """The Config that a config.json describes; raises CheckpointError for what Config cannot
    express.

    Example:
        >>> sizes = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1,
        ...     "num_attention_heads": 2, "intermediate_size": 6}
        >>> read_config({"model_type": "llama", **sizes, "sliding_window": 4096})
        Traceback (most recent call last):
        funcattn.checkpoints.families.tables.CheckpointError: load: sliding_window in config.json
        should be absent, got 4096. ...
    """
    values = tower_settings(values)
    family = family_of(values.get("model_type"), "model_type in config.json")
    architectures = values.get("architectures")
    if architectures not in (None, [], *([name] for name in family.architectures)):
        refuse("architectures in config.json", [family.architecture], architectures)
    fields = Fields(values)
    found = family.read(fields)
    fields.check_neutral({**NEUTRAL, **family.neutral})
    fields.check_known(IGNORED | NEUTRAL.keys() | family.neutral.keys())
    # a family with a window has it whatever they say
    unread = "layer_types" not in fields.seen and found.get("window") is None
    if unread and any(kind != "full_attention" for kind in fields.items("layer_types")):
        refuse("layer_types in config.json", "full_attention throughout", values["layer_types"])
    return configure(**found)


def write_config(config: Config) -> dict[str, object]:
    """The config.json of a Config, in the first family that can express it.

    Rotary fields are written for older and newer readers.

    Law: read_config(write_config(config)) == config
        (test_families.py::test_a_config_comes_back_from_its_json).
    """
    return _written(config)[1]


def family_for(config: Config) -> Family:
    """The first family that can express a Config."""
    return _written(config)[0]


def families_for(config: Config) -> Iterator[Family]:
    """All families that can express a Config, the first first."""
    return (family for family, _ in _expressions(config))


def _written(config: Config) -> tuple[Family, dict[str, Json]]:
    for found in _expressions(config):
        return found
    remedy = (
        "Other programs would compute it wrongly: change what no published family has, or keep the "
        "tree with torch.save."
    )
    fail(
        "save",
        "config",
        f"one that a family among {', '.join(FAMILIES)} has",
        repr(config),
        remedy,
        CheckpointError,
    )


def _expressions(config: Config) -> Iterator[tuple[Family, dict[str, Json]]]:
    for family in FAMILIES.values():
        try:
            values = {
                "architectures": [family.architecture],
                "model_type": family.name,
                **NO_IDS,
                **family.write(config),
            }
            if read_config(values) == config:
                yield family, values
        except ValueError:  # CheckpointError, or of a Config that a family makes on the way
            continue
