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


def shapes(config: Config) -> Params:
    """The shape of every weight, as a tree of tuples of ints."""
    E, V = config.width, config.vocabulary
    return Params(
        embedding=(V, E),
        layers=tuple(_layer(config, config.layer_spec(i).experts) for i in range(config.layers)),
        norm=(E,),
        head=ABSENT if config.tied else (V, E),
        positions=(config.context, E) if config.positions == "learned" else ABSENT,
        norm_bias=(E,) if config.norm_bias else ABSENT,
        head_bias=(V,) if config.head_bias else ABSENT,
    )


def _layer(config: Config, experts: bool) -> Layer:
    E, D, H, K = config.width, config.head_size, config.heads, config.kv_heads
    F = config.expert_size if experts else config.feed_forward
    many = (config.experts,) if experts else ()
    where = lambda condition, shape: shape if condition else ABSENT
    head_norm = {
        "none": lambda n: ABSENT,
        "rms": lambda n: (D,),
        "rms_width": lambda n: (n * D,),
        "layer": lambda n: (n, D),
    }
    before, after = config.norm_placement != "after", config.norm_placement != "before"
    two, shared = not config.shared_norm, experts and config.shared_size > 0
    Dv, R, Rq = config.head_sizes[1], config.latent_size, config.query_latent_size
    turning = config.rotary_size or 0
    biased = config.qkv_bias and not R
    return Layer(
        attention_norm=where(before, (E,)),
        q=(H * D, Rq or E),
        k=(H * (D - turning), R) if R else (K * D, E),
        v=(K * Dv, R or E),
        o=(E, H * Dv),
        feed_forward_norm=where(before and two, (E,)),
        gate=where(config.gated, (*many, F, E)),
        up=(*many, F, E),
        down=(*many, E, F),
        attention_norm_bias=where(config.norm_bias, (E,)),
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
        return randomness.normal(key, shape) * residual.get(name, 0.02)

    def fields(key: Tensor, record: Layer) -> list[Weight]:
        drawn = randomness.split(key, len(record))
        return [
            draw(drawn[i], name, shape)
            for i, (name, shape) in enumerate(zip(record._fields, record, strict=True))
        ]

    of_embedding, of_head, of_layers, of_positions = randomness.split(key, 4).unbind(0)
    each = randomness.split(of_layers, config.layers)
    return Params(
        embedding=draw(of_embedding, "embedding", wanted.embedding),
        layers=tuple(Layer(*fields(each[i], layer)) for i, layer in enumerate(wanted.layers)),
        norm=draw(key, "norm", wanted.norm),
        head=draw(of_head, "head", wanted.head),
        positions=draw(of_positions, "positions", wanted.positions),
        norm_bias=draw(key, "norm_bias", wanted.norm_bias),
        head_bias=draw(key, "head_bias", wanted.head_bias),
    )
