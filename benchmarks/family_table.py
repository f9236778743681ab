"""The table of docs/families.md: each family, what its Config says beside the sizes, and its GGUF.

Of each family the tiny models of tests/family_models.py are read; a field of Config that one of
them sets is an idea of the family, in the words below or by its name. `benchmarks/families.py`
writes the table, with the differences of its run.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

from family_models import MODELS, of_family, settings

from funcattn.checkpoints.families.catalogue import ALIASES
from funcattn.checkpoints.families.towers import WRAPPERS
from funcattn.families import FAMILIES, GGUF, read_config
from funcattn.transformer import Config

BEGIN, END = "<!-- table by benchmarks/families.py -->", "<!-- end of the table -->"
PLAIN = Config()
SIZES = {  # and what another field says
    *("vocabulary", "width", "layers", "heads", "kv_heads", "head_size", "feed_forward"),
    *("context", "norm_epsilon", "rope_base", "rope_scaling", "tied", "experts_per_token"),
    *("expert_size", "window_layers", "state_heads", "state_key_heads", "state_key_size"),
    *("state_value_size", "mixer_norm_epsilon", "step_limit", "groups_per_token", "group_best"),
    *("query_latent_size", "local_rotary_size", "normalized_routing", "convolution_size"),
    *("convolution_bias", "gate_activation", "router_margin", "value_size", "mixer_norm"),
    *("mixer_bias", "mixer_output_bias", "mixer_norm_placement", "shared_norm"),
}
WORDS: Mapping[str, str | Mapping[object, str]] = {  # of a field, or of each of its values
    "activation": {
        "relu2": "a squared relu",
        "xielu": "xIELU, an activation with two weights a layer",
    },
    "head_bias": "a bias of the head",
    "qkv_bias": "biases of q, k and v",
    "output_bias": "a bias of attention's output",
    "head_norm": {
        "rms": "queries and keys normalized a head",
        "rms_width": "queries and keys normalized over all heads",
        "layer": "a layer norm of each head of queries and keys",
        "layer_bias": "a layer norm of queries and keys, with a bias",
        "unit": "queries and keys of length one",
    },
    "late_head_norm": "after rotation",
    "qkv_limit": "clamped queries, keys and values",
    "attention_scale": "a scale of attention of its own",
    "attention_cap": "a soft cap of attention",
    "attention_temperature": "queries that grow with the logarithm of their positions",
    "late_temperature": "only in layers that do not turn",
    "attention_gate": "a gate of attention",
    "sinks": "sinks",
    "window": "windows",
    "chunked": "chunks of the text in their place",
    "latent_size": "[latent attention](caches.md#latent-attention)",
    "negative_eigenvalues": "betas up to 2",
    "mixer_factors": "a factor for each projection",
    "attention_factors": "",
    "feed_forward_factors": "",
    "feed_forward_layers": "layers of one part",
    "positions": {
        "learned": "a table of positions",
        "alibi": "ALiBi",
        "none": "no positions",
    },
    "rotary_size": "a part of each head turns",
    "rotary_layers": "some layers do not turn",
    "local_rope_base": "a rotary base of its own in windows",
    "norm": {"layer": "layer norms", "unit": "norms without weights"},
    "norm_bias": "biases of the norms",
    "norm_offset": "norm weights around 0",
    "norm_placement": {
        "after": "norms after attention and feed-forward",
        "around": "norms before and after",
        "residual": "norms after the sum",
    },
    "first_norm": "none before the first attention",
    "parallel": "attention and feed-forward in parallel",
    "residual_scale": "a factor of what layers add",
    "gated": "a feed-forward without a gate",
    "feed_forward_bias": "biases of the feed-forward",
    "activation_limit": "clamped SwiGLU",
    "experts": "experts",
    "expert_layers": "dense layers among them",
    "router_bias": "a bias of the router",
    "router_scores": {"sigmoid": "scores that are sigmoids", "sparsemixer": "sparse mixing"},
    "choice_bias": "a bias for the choice of experts",
    "expert_groups": "groups of experts",
    "routing_scale": "a factor of their weights",
    "shared_size": "an expert that every token takes",
    "shared_gated": "behind a gate",
    "routed_inputs": "experts that read weighted inputs",
    "embedding_scale": "a factor of the embedding",
    "embedding_norm": "a norm of the embedding",
    "head_transform": "a layer before the head",
    "logit_scale": "a factor of the logits",
    "logit_cap": "a soft cap of logits",
}
MIXERS = {
    "short_convolution": "short convolutions",
    "gated_delta": "gated delta nets",
    "state_space": "Mamba-2",
    "state_space_and_attention": "Mamba-2 beside attention",
    "none": "feed-forwards alone",
}
ARCHITECTURES = {  # of GGUF, whose name is not that of the family
    "llama": ("llama", "mistral", "mixtral"),
    "command-r": ("cohere",),
    "deepseek2": ("deepseek_v2", "deepseek_v3"),
    "gemma3": ("gemma3_text",),
    "gemma3n": ("gemma3n_text",),
    "gemma4": ("gemma4_text", "gemma4_unified_text"),
    "olmo2": ("olmo2", "olmo3"),
}


@functools.cache
def configs(name: str) -> list[Config]:
    """The Configs of the tiny models of a family."""
    cases = [settings(case) for case, (kind, _) in MODELS.items() if kind == name]
    return [read_config({**case, "model_type": name}) for case in cases or [of_family(name)]]


def _words(name: str, value: object) -> str:
    """The idea of a field with this value; "" where another field says it."""
    if name == "mixers" and isinstance(value, tuple):
        kinds = sorted({MIXERS.get(kind, f"`{kind}`") for kind in value if kind != "attention"})
        return f"{' and '.join(kinds)} in layers"
    known = WORDS.get(name, f"`{name}`")
    if isinstance(known, str):
        return known
    return known.get(value, f"`{value}`")


def ideas(name: str) -> str:
    """What the tiny models of a family set in Config, in the order of its fields."""
    found: dict[str, None] = {}
    for field in dataclasses.fields(Config):
        plain = getattr(PLAIN, field.name)
        for config in configs(name) if field.name not in SIZES else []:
            value = getattr(config, field.name)
            if value != plain and (words := _words(field.name, value)):
                found[words] = None
    return "; ".join(found)


def architectures(name: str) -> str:
    """The architectures of GGUF that hold models of a family."""
    flat = lambda text: re.sub("[-_]", "", text)
    mine = lambda arch: name in ARCHITECTURES.get(arch, ()) or flat(arch) == flat(name)
    return ", ".join(f"`{arch}`" for arch in GGUF if mine(arch))


def table(equal: Mapping[str, float]) -> str:
    """The table and the list of models of images, in the order of the catalogue.

    Args:
        equal: name -> the greatest difference of its logits in the run, of names that it has.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    for name in FAMILIES:
        rows.setdefault((ideas(name), architectures(name)), []).append(name)
    lines = [
        "| `model_type` | what its `Config` may say beside sizes | GGUF | differs by |",
        "|---|---|---|---|",
    ]
    for (said, files), names in rows.items():
        others = [alias for alias, name in ALIASES.items() if name in names]
        worst = max((equal[name] for name in names if name in equal), default=None)
        shown = "" if worst is None else f"{worst:.0e}"
        listed = ", ".join(f"`{name}`" for name in (*names, *others))
        lines.append(f"| {listed} | {said or 'a plain decoder'} | {files} | {shown} |")
    images = ", ".join(f"`{name}`" for name in WRAPPERS)
    told = (
        f"Of models that take images too, the text is read, and loading says so: {images}. What "
        "encodes images is left out, and the model is written as its text alone."
    )
    return "\n".join([*lines, "", told])


def with_table(page: str, equal: Mapping[str, float]) -> str:
    """The page with its table made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(equal)}\n\n{END}{rest.split(END)[1]}"


def equal_in(page: str) -> dict[str, float]:
    """Name -> the greatest difference, as the run over all names left it on the page."""
    run = page.split("<!-- by benchmarks/families.py -->")[1].split("| refused for")[0]
    return {name: float(x) for name, x in re.findall(r"`([^`]+)` (\d\S*e-\d+)", run)}
