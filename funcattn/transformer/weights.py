"""The weights of a decoder as one tree: their shapes and initialization."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import randomness
from ..layers import Weight
from ..records import ABSENT, is_absent, record
from ..tree import Tree
from .config import Config

WRITERS = ("o", "down", "shared_down")  # what writes into the residual


@record
class Layer(NamedTuple):
    """The weights of one layer; matrices are (out, in). Weights that a config lacks are `()`."""

    attention_norm: Weight = ABSENT  # (E,)
    q: Weight = ABSENT  # (H D, E)
    k: Weight = ABSENT  # (K D, E)
    v: Weight = ABSENT  # (K D, E)
    o: Weight = ABSENT  # (E, H D)
    feed_forward_norm: Weight = ABSENT  # (E,)
    gate: Weight = ABSENT  # (F, E), of experts (X, F, E)
    up: Weight = ABSENT  # (F, E)
    down: Weight = ABSENT  # (E, F)
    attention_norm_bias: Weight = ABSENT  # (E,)
    feed_forward_norm_bias: Weight = ABSENT  # (E,)
    attention_after_norm: Weight = ABSENT  # (E,), of the output of attention
    feed_forward_after_norm: Weight = ABSENT  # (E,)
    q_norm: Weight = ABSENT  # (D,), (H D,) or (H, D)
    k_norm: Weight = ABSENT  # (D,), (K D,) or (K, D)
    sinks: Weight = ABSENT  # (H,)
    q_bias: Weight = ABSENT  # (H D,)
    k_bias: Weight = ABSENT  # (K D,)
    v_bias: Weight = ABSENT  # (K D,)
    o_bias: Weight = ABSENT  # (E,)
    gate_bias: Weight = ABSENT  # (F,), of experts (X, F)
    up_bias: Weight = ABSENT  # (F,)
    down_bias: Weight = ABSENT  # (E,)
    router: Weight = ABSENT  # (X, E)
    router_bias: Weight = ABSENT  # (X,)
    choice_bias: Weight = ABSENT  # (X,)
    shared_gate: Weight = ABSENT  # (F, E), of the shared expert
    shared_up: Weight = ABSENT  # (F, E)
    shared_down: Weight = ABSENT  # (E, F)
    shared_router: Weight = ABSENT  # (1, E)
    q_down: Weight = ABSENT  # (Rq, E): q is (H D, Rq) behind it
    q_down_norm: Weight = ABSENT  # (Rq,)
    q_down_bias: Weight = ABSENT  # (Rq,)
    kv_down: Weight = ABSENT  # (R + rotary_size, E): k is (H (D - rotary_size), R), v (H Dv, R)
    kv_down_norm: Weight = ABSENT  # (R,)
    kv_down_bias: Weight = ABSENT  # (R + rotary_size,)
    attention_gate: Weight = ABSENT  # (H D, E), or (H, E)
    q_norm_bias: Weight = ABSENT  # (D,)
    k_norm_bias: Weight = ABSENT  # (D,)
    activation_weights: Weight = ABSENT  # (2,)


@record
class Params(NamedTuple):
    """All weights. Each is a tensor, a quantized record or a DTensor; the decoder accepts all."""

    embedding: Weight  # (V, E)
    layers: tuple[Layer, ...]
    norm: Weight  # (E,)
    head: Weight = ABSENT  # (V, E), or () where it is tied to the embedding
    positions: Weight = ABSENT  # (context, E), learned positions
    norm_bias: Weight = ABSENT  # (E,)
    head_bias: Weight = ABSENT  # (V,)
    embedding_norm: Weight = ABSENT  # (E,)
    embedding_norm_bias: Weight = ABSENT  # (E,)
    transform: Weight = ABSENT  # (E, E), between the last norm and the head
    transform_bias: Weight = ABSENT  # (E,)
    transform_norm: Weight = ABSENT  # (E,)
    transform_norm_bias: Weight = ABSENT  # (E,)


def shapes(config: Config) -> Params:
    """The shape of every weight, as a tree of tuples of ints."""
    E, V = config.width, config.vocabulary
    where = lambda condition, shape: shape if condition else ABSENT
    return Params(
        embedding=(V, E),
        layers=tuple(_layer(config, i) for i in range(config.layers)),
        norm=(E,),
        head=ABSENT if config.tied else (V, E),
        positions=(config.context, E) if config.positions == "learned" else ABSENT,
        norm_bias=(E,) if config.norm_bias else ABSENT,
        head_bias=(V,) if config.head_bias else ABSENT,
        embedding_norm=where(config.embedding_norm, (E,)),
        embedding_norm_bias=where(config.embedding_norm and config.norm_bias, (E,)),
        transform=where(config.head_transform, (E, E)),
        transform_bias=where(config.head_transform and config.norm_bias, (E,)),
        transform_norm=where(config.head_transform, (E,)),
        transform_norm_bias=where(config.head_transform and config.norm_bias, (E,)),
    )


def _layer(config: Config, number: int) -> Layer:
    experts = config.layer_spec(number).experts
    E, D, H, K = config.width, config.head_size, config.heads, config.kv_heads
    F = config.expert_size if experts else config.feed_forward
    many = (config.experts,) if experts else ()
    where = lambda condition, shape: shape if condition else ABSENT
    head_norm = {
        "none": lambda n: ABSENT,
        "rms": lambda n: (D,),
        "rms_width": lambda n: (n * D,),
        "layer": lambda n: (n, D),
        "layer_bias": lambda n: (D,),
        "unit": lambda n: ABSENT,
    }
    before, after = config.norm_placement != "after", config.norm_placement in ("after", "around")
    first = before and (number > 0 or config.first_norm)
    gates = {"none": 0, "head": H, "width": H * D}[config.attention_gate]
    two, shared = not config.shared_norm, experts and config.shared_size > 0
    Dv, R, Rq = config.head_sizes[1], config.latent_size, config.query_latent_size
    turning = config.rotary_size or 0
    biased = config.qkv_bias and not R
    return Layer(
        attention_norm=where(first, (E,)),
        q=(H * D, Rq or E),
        k=(H * (D - turning), R) if R else (K * D, E),
        v=(K * Dv, R or E),
        o=(E, H * Dv),
        feed_forward_norm=where(before and two, (E,)),
        gate=where(config.gated, (*many, F, E)),
        up=(*many, F, E),
        down=(*many, E, F),
        attention_norm_bias=where(first and config.norm_bias, (E,)),
        feed_forward_norm_bias=where(config.norm_bias and two, (E,)),
        attention_after_norm=where(after, (E,)),
        feed_forward_after_norm=where(after, (E,)),
        q_norm=head_norm[config.head_norm](H),
        k_norm=head_norm[config.head_norm](K),
        sinks=where(config.sinks, (H,)),
        q_bias=where(biased, (H * D,)),
        k_bias=where(biased, (K * D,)),
        v_bias=where(biased, (K * Dv,)),
        o_bias=where(config.output_bias, (E,)),
        gate_bias=where(config.feed_forward_bias and config.gated, (*many, F)),
        up_bias=where(config.feed_forward_bias, (*many, F)),
        down_bias=where(config.feed_forward_bias, (*many, E)),
        router=where(experts, (config.experts, E)),
        router_bias=where(experts and config.router_bias, (config.experts,)),
        choice_bias=where(experts and config.choice_bias, (config.experts,)),
        shared_gate=where(shared and config.gated, (config.shared_size, E)),
        shared_up=where(shared, (config.shared_size, E)),
        shared_down=where(shared, (E, config.shared_size)),
        shared_router=where(shared and config.shared_gated, (1, E)),
        q_down=where(Rq, (Rq, E)),
        q_down_norm=where(Rq, (Rq,)),
        q_down_bias=where(Rq and config.qkv_bias, (Rq,)),
        kv_down=where(R, (R + turning, E)),
        kv_down_norm=where(R, (R,)),
        kv_down_bias=where(R and config.qkv_bias, (R + turning,)),
        attention_gate=where(gates, (gates, E)),
        q_norm_bias=where(config.head_norm == "layer_bias", (D,)),
        k_norm_bias=where(config.head_norm == "layer_bias", (D,)),
        activation_weights=where(config.activation == "xielu", (2,)),
    )


def initialize(key: Tensor, config: Config) -> Params:
    """Random weights: normal with standard deviation 0.02; norms are one, biases zero.

    Matrices that write into the residual have 0.02 / sqrt(2 L).

    Source: Radford et al., Language models are unsupervised multitask learners (GPT-2), section
        2.3.
    """
    residual: dict[str, float] = dict.fromkeys(WRITERS, 0.02 / (2 * config.layers) ** 0.5)
    wanted = shapes(config)

    def draw(key: Tensor, name: str, shape: Tree) -> Weight:
        if is_absent(shape):
            return ABSENT
        if name.endswith("norm"):
            return torch.full(shape, 1.0 - config.norm_offset, device=key.device)
        if name.endswith("bias") or name == "sinks":
            return torch.zeros(shape, device=key.device)
        if name == "activation_weights":  # slopes of 0.8, as published
            return torch.tensor([0.8, 0.3], device=key.device).expm1().log()
        return randomness.normal(key, shape) * residual.get(name, 0.02)

    def fields(key: Tensor, record: Layer) -> list[Weight]:
        drawn = randomness.split(key, len(record))
        return [
            draw(drawn[i], name, shape)
            for i, (name, shape) in enumerate(zip(record._fields, record, strict=True))
        ]

    ends = zip(
        ("embedding", "head", "layers", "positions", "transform"),
        randomness.split(key, 5).unbind(0),
        strict=True,
    )
    keys: dict[str, Tensor] = dict(ends)
    each = randomness.split(keys["layers"], config.layers)
    layers = tuple(Layer(*fields(each[i], layer)) for i, layer in enumerate(wanted.layers))
    rest = {
        name: draw(keys.get(name, key), name, getattr(wanted, name))
        for name in Params._fields
        if name != "layers"
    }
    return Params(layers=layers, **rest)
