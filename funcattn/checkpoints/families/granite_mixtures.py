"""Mixtures of experts of Granite: gate over up in one tensor, the multipliers of Granite.

granitemoe granitemoeshared    with an expert that every token takes in the second
granitemoe_swa                 sinks, and windows with a rotary base a layer
granitemoehybrid               attention, with or without rotation, and Mamba-2; dense or not
"""

from dataclasses import replace

from ...transformer import Config
from .conventions import TENSORS
from .granite import granite_windows, write_granite_windows
from .layouts import fused, halves, of_experts
from .llama import read_multipliers, write_common, write_multipliers
from .llama_variants import LAYER, read_variant
from .mambas import mamba_names, mamba_packs, read_mixers, write_mixers
from .tables import Family, Fields, Json, Pack, refuse


def _read_granitemoe(fields: Fields) -> dict[str, Json]:
    common = read_variant(fields, context=2048)
    return {
        **common,
        **read_multipliers(fields),
        "experts": fields.whole("num_local_experts", 8),
        "experts_per_token": fields.whole("num_experts_per_tok", 2),
        "expert_size": common["feed_forward"],
    }


def _read_shared_size(fields: Fields, default: int) -> int:
    size = fields.get("shared_intermediate_size", default)
    return (
        0
        if size == 0 and not isinstance(size, bool)
        else fields.whole("shared_intermediate_size", default)
    )


def _read_granitemoeshared(fields: Fields) -> dict[str, Json]:
    return {**_read_granitemoe(fields), "shared_size": _read_shared_size(fields, 0)}


def _read_granitemoe_swa(fields: Fields) -> dict[str, Json]:
    found = _read_granitemoeshared(fields)
    return {**found, **granite_windows(fields, found)}


def _read_granitemoehybrid(fields: Fields) -> dict[str, Json]:
    none = fields.get("num_local_experts") == 0
    if none:
        fields.values = {**fields.values, "num_local_experts": 1, "num_experts_per_tok": 1}
    found, shared = _read_granitemoe(fields), _read_shared_size(fields, 1024)
    found |= read_mixers(fields, found["layers"])
    positions = fields.get("position_embedding_type")
    if positions not in (None, "rope", "nope"):
        refuse(fields.place("position_embedding_type"), "rope or nope", positions)
    found["positions"] = "rotary" if positions == "rope" else "none"
    if not none:
        return {**found, "shared_size": shared}
    if not shared:
        refuse(fields.place("shared_intermediate_size"), "a size, without experts", 0)
    return {
        **found,
        "experts": 0,
        "experts_per_token": 0,
        "expert_size": 0,
        "feed_forward": shared,
    }


def _write_granitemoe(config: Config) -> dict[str, object]:
    return {
        **write_common(config),
        **write_multipliers(config),
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "shared_intermediate_size": config.shared_size,
    }


def _write_granitemoe_swa(config: Config) -> dict[str, object]:
    return {**_write_granitemoe(config), **write_granite_windows(config)}


def _write_granitemoehybrid(config: Config) -> dict[str, object]:
    return {
        **_write_granitemoe(config),
        "shared_intermediate_size": config.shared_size or config.feed_forward,
        **write_mixers(config),
        "position_embedding_type": "rope" if config.positions == "rotary" else None,
    }


def _granite_packs(swa: bool) -> tuple[Pack, ...]:
    moe = LAYER + "block_sparse_moe."
    up, down = (
        ("experts.gate_up_proj", "experts.down_proj")
        if swa
        else ("input_linear.weight", "output_linear.weight")
    )
    return (
        halves(moe + up),
        of_experts("layers.{}.down", moe + down),
        fused(
            ["layers.{}.shared_gate", "layers.{}.shared_up"],
            LAYER + "shared_mlp.input_linear.weight",
            lambda config: [config.shared_size] * 2,
        ),
    )


def _granite_names(router: str) -> dict[str, str]:
    return {
        **TENSORS,
        "layers.{}.router": LAYER + f"block_sparse_moe.{router}.weight",
        "layers.{}.shared_down": LAYER + "shared_mlp.output_linear.weight",
    }


GRANITEMOE, GRANITEMOESHARED = (
    Family(
        name,
        architecture,
        read,
        _write_granitemoe,
        _granite_names("router.layer"),
        packs=_granite_packs(swa=False),
    )
    for name, architecture, read in (
        ("granitemoe", "GraniteMoeForCausalLM", _read_granitemoe),
        ("granitemoeshared", "GraniteMoeSharedForCausalLM", _read_granitemoeshared),
    )
)
GRANITEMOE_SWA = Family(
    "granitemoe_swa",
    "GraniteMoeSWAForCausalLM",
    _read_granitemoe_swa,
    _write_granitemoe_swa,
    _granite_names("router"),
    packs=_granite_packs(swa=True),
)
GRANITEMOEHYBRID = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    _read_granitemoehybrid,
    _write_granitemoehybrid,
    {
        **_granite_names("router.layer"),
        **mamba_names(LAYER + "mamba."),
        "layers.{}.down": LAYER + "shared_mlp.output_linear.weight",
    },
    packs=(
        *mamba_packs(LAYER + "mamba."),
        *_granite_packs(swa=False),
        replace(
            fused(
                ["layers.{}.gate", "layers.{}.up"],
                LAYER + "shared_mlp.input_linear.weight",
                lambda config: [config.feed_forward] * 2,
            ),
            applies=lambda config, layer: not config.experts,
        ),
    ),
)
