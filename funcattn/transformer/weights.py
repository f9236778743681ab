"""The weights of a decoder as one tree: their shapes and initialization."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import randomness
from ..layers import Weight
from ..records import ABSENT, is_absent, record
from ..tree import Tree
from .config import Config, LayerSpec
from .layer_spec import of_layer

WRITERS = ("o", "down", "shared_down", "mixer_out")  # what writes into the residual
MORE = (
    "embedding_in",
    "embedding_out",
    "layer_embedding",
    "layer_projection",
    "streams_in",
    "streams_out",
)  # outside of layers


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
    attention_gate: Weight = ABSENT  # (H Dv, E), or (H, E)
    q_norm_bias: Weight = ABSENT  # (D,)
    k_norm_bias: Weight = ABSENT  # (D,)
    activation_weights: Weight = ABSENT  # (2,)
    # Of a recurrent layer; C features are convolved, Hv heads have a state.
    mixer_in: Weight = ABSENT  # (C, E), what is convolved, of short convolutions (3 C, E)
    mixer_gate: Weight = ABSENT  # (Hv Dv, E), of the output
    mixer_beta: Weight = ABSENT  # (Hv, E), how much is written
    mixer_rate: Weight = ABSENT  # (Hv, E), of the decay
    mixer_out: Weight = ABSENT  # (E, Hv Dv), of short convolutions (E, C)
    mixer_in_bias: Weight = ABSENT  # (C,), of short convolutions (3 C,)
    mixer_out_bias: Weight = ABSENT  # (E,)
    convolution: Weight = ABSENT  # (C, W), its last column for the newest token
    convolution_bias: Weight = ABSENT  # (C,)
    log_rate: Weight = ABSENT  # (Hv,), log of the rate of decay
    rate_bias: Weight = ABSENT  # (Hv,)
    mixer_norm: Weight = ABSENT  # (Dv,), of the output of a scan; of a state space (Hv Dv,)
    mixer_skip: Weight = ABSENT  # (Hv,), factor of x beside a state space
    mixer_gate_bias: Weight = ABSENT  # (Hv Dv,)
    mixer_rate_bias: Weight = ABSENT  # (Hv,), of mixer_rate
    mixer_gate_down: Weight = ABSENT  # (R, E): mixer_gate is (Hv Dv, R) behind it
    mixer_rate_down: Weight = ABSENT  # (R, E): mixer_rate is (Hv, R), or (Hv Dk, R)
    # Beside attention and the feed-forward.
    layer_scale: Weight = ABSENT  # (1,), of the residual after the layer
    input_gate: Weight = ABSENT  # (P, E), of the features that the layer reads of each token
    input_out: Weight = ABSENT  # (E, P)
    input_norm: Weight = ABSENT  # (E,)
    laurel_down: Weight = ABSENT  # (R, E)
    laurel_up: Weight = ABSENT  # (E, R)
    laurel_norm: Weight = ABSENT  # (E,)
    stream_router: Weight = ABSENT  # (A, E)
    stream_norm: Weight = ABSENT  # (E,)
    stream_predict: Weight = ABSENT  # (A A, A)
    stream_correct: Weight = ABSENT  # (A, A)
    stream_scale: Weight = ABSENT  # (E,)
    router_scale: Weight = ABSENT  # (E,), of the residual that the router reads
    expert_scale: Weight = ABSENT  # (X,), of the outputs of experts
    expert_after_norm: Weight = ABSENT  # (E,), of the sum of these
    shared_norm: Weight = ABSENT  # (E,), before the shared expert
    shared_after_norm: Weight = ABSENT  # (E,)


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
    embedding_in: Weight = ABSENT  # (E, R): embedding and head are (V, R)
    embedding_out: Weight = ABSENT  # (R, E)
    layer_embedding: Weight = ABSENT  # (layer_vocabulary, L P), features of a token for each layer
    layer_projection: Weight = ABSENT  # (L P, E)
    layer_projection_norm: Weight = ABSENT  # (P,)
    streams_in: Weight = ABSENT  # (A - 1, E, E)
    streams_out: Weight = ABSENT  # (A - 1, E, E)


def shapes(config: Config) -> Params:
    """The shape of every weight, as a tree of tuples of ints."""
    E, V, A = config.width, config.vocabulary, config.streams
    P, LP = config.layer_embedding_size, config.layers * config.layer_embedding_size
    R = config.embedding_size
    where = lambda condition, shape: shape if condition else ABSENT
    return Params(
        embedding=(V, R or E),
        layers=tuple(_layer(config, i) for i in range(config.layers)),
        norm=(E,),
        head=ABSENT if config.tied else (V, R or E),
        positions=(config.context, E) if config.positions == "learned" else ABSENT,
        norm_bias=(E,) if config.norm_bias else ABSENT,
        head_bias=(V,) if config.head_bias else ABSENT,
        embedding_norm=where(config.embedding_norm, (E,)),
        embedding_norm_bias=where(config.embedding_norm and config.norm_bias, (E,)),
        transform=where(config.head_transform, (E, E)),
        transform_bias=where(config.head_transform and config.norm_bias, (E,)),
        transform_norm=where(config.head_transform, (E,)),
        transform_norm_bias=where(config.head_transform and config.norm_bias, (E,)),
        embedding_in=where(R, (E, R)),
        embedding_out=where(R, (R, E)),
        layer_embedding=where(P, (config.layer_vocabulary, LP)),
        layer_projection=where(P, (LP, E)),
        layer_projection_norm=where(P, (P,)),
        streams_in=where(A, (A - 1, E, E)),
        streams_out=where(A, (A - 1, E, E)),
    )


def _layer(config: Config, number: int) -> Layer:
    spec = config.layer_spec(number)
    config = of_layer(config, spec)
    E, D, H, K = config.width, config.head_size, config.heads, config.kv_heads
    experts, attends = spec.experts, spec.attends
    dense = config.feed_forward_sizes[number] if config.feed_forward_sizes else config.feed_forward
    F = config.expert_size if experts else dense
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
    placement = config.norm_placement
    if spec.recurs and config.mixer_norm_placement is not None:
        placement = config.mixer_norm_placement
    before, after = placement != "after", placement in ("after", "around")
    mixes, feeds = spec.mixer != "none", spec.feeds
    first = before and (number > 0 or config.first_norm) and mixes
    two, shared = not config.shared_norm, experts and config.shared_size > 0
    S = dense if config.experts_apart and config.feed_forward_sizes else config.shared_size
    Dv = config.head_sizes[1]
    gates = {"none": 0, "head": H, "width": H * Dv}[config.attention_gate] if attends else 0
    R, Rq = (config.latent_size, config.query_latent_size) if attends else (0, 0)
    turning = config.rotary_size or 0
    biased = attends and config.qkv_bias and not R
    own = spec.caches
    valued = own and not (config.key_values and spec.window is None)
    return Layer(
        attention_norm=where(first, (E,)),
        q=where(attends, (H * D, Rq or E)),
        k=where(own, (H * (D - turning), R) if R else (K * D, E)),
        v=where(valued, (K * Dv, R or E)),
        o=where(attends, (E, H * Dv)),
        feed_forward_norm=where(before and two and feeds, (E,)),
        gate=where(config.gated and feeds, (*many, F, E)),
        up=where(feeds, (*many, F, E)),
        down=where(feeds, (*many, E, F)),
        attention_norm_bias=where(first and config.norm_bias, (E,)),
        feed_forward_norm_bias=where(config.norm_bias and two and feeds, (E,)),
        attention_after_norm=where(after and mixes, (E,)),
        feed_forward_after_norm=where(after and feeds, (E,)),
        q_norm=where(attends, head_norm[config.head_norm](H)),
        k_norm=where(own, head_norm[config.head_norm](K)),
        sinks=where(attends and config.sinks, (H,)),
        q_bias=where(biased, (H * D,)),
        k_bias=where(biased and own, (K * D,)),
        v_bias=where(biased and valued, (K * Dv,)),
        o_bias=where(attends and config.output_bias, (E,)),
        gate_bias=where(config.feed_forward_bias and config.gated and feeds, (*many, F)),
        up_bias=where(config.feed_forward_bias and feeds, (*many, F)),
        down_bias=where(config.feed_forward_bias and feeds, (*many, E)),
        router=where(experts, (config.experts, E)),
        router_bias=where(experts and config.router_bias, (config.experts,)),
        choice_bias=where(experts and config.choice_bias, (config.experts,)),
        shared_gate=where(shared and config.gated, (S, E)),
        shared_up=where(shared, (S, E)),
        shared_down=where(shared, (E, S)),
        shared_router=where(shared and config.shared_gated, (1, E)),
        q_down=where(Rq, (Rq, E)),
        q_down_norm=where(Rq, (Rq,)),
        q_down_bias=where(Rq and config.qkv_bias, (Rq,)),
        kv_down=where(R, (R + turning, E)),
        kv_down_norm=where(R, (R,)),
        kv_down_bias=where(R and config.qkv_bias, (R + turning,)),
        attention_gate=where(gates, (gates, E)),
        q_norm_bias=where(attends and config.head_norm == "layer_bias", (D,)),
        k_norm_bias=where(own and config.head_norm == "layer_bias", (D,)),
        activation_weights=where(config.activation == "xielu" and feeds, (2,)),
        **_beside(config, experts),
        **_mixer(config, spec),
    )


def _beside(config: Config, experts: bool) -> dict[str, Tree]:
    """The shapes of what a layer has beside attention and the feed-forward."""
    E, A, P = config.width, config.streams, config.layer_embedding_size
    R, apart = config.laurel_size, experts and config.experts_apart
    shapes: dict[str, Tree] = {"layer_scale": (1,)} if config.layer_scale else {}
    shapes |= {"input_gate": (P, E), "input_out": (E, P), "input_norm": (E,)} if P else {}
    shapes |= {"laurel_down": (R, E), "laurel_up": (E, R), "laurel_norm": (E,)} if R else {}
    if A:
        shapes |= {"stream_router": (A, E), "stream_norm": (E,)}
        shapes |= {"stream_predict": (A * A, A), "stream_correct": (A, A)}
        shapes |= {"stream_scale": (E,)} if config.stream_scale else {}
    names = ("router_scale", "expert_after_norm", "shared_norm", "shared_after_norm")
    shapes |= {"expert_scale": (config.experts,), **dict.fromkeys(names, (E,))} if apart else {}
    return shapes


def _mixer(config: Config, spec: LayerSpec) -> dict[str, Tree]:
    """The shapes of the weights of a recurrent layer."""
    E, W, bias = config.width, config.convolution_size, config.convolution_bias
    if spec.mixer == "short_convolution":
        shapes: dict[str, Tree] = {"mixer_in": (3 * E, E), "mixer_out": (E, E)}
        shapes["convolution"] = (E, W)
        biases = {"mixer_in_bias": (3 * E,), "mixer_out_bias": (E,), "convolution_bias": (E,)}
        return {**shapes, **(biases if bias else {})}
    if spec.mixer == "gated_delta":
        Hv, Hk = config.state_heads, config.state_key_heads
        Dk, Dv = config.state_key_size, config.state_value_size
        C = 2 * Hk * Dk + Hv * Dv
        R, rates = config.mixer_rank, Hv * (Dk if config.feature_decay else 1)
        shapes = {"mixer_in": (C, E), "mixer_gate": (Hv * Dv, R or E), "mixer_out": (E, Hv * Dv)}
        shapes |= {"mixer_beta": (Hv, E), "mixer_rate": (rates, R or E)}
        shapes |= dict.fromkeys(("mixer_gate_down", "mixer_rate_down"), (R, E)) if R else {}
        shapes |= {"log_rate": (Hv,), "rate_bias": (rates,)}
        return {**shapes, "convolution": (C, W), "mixer_norm": (Dv,)}
    return _state_space(config) if spec.mixer.startswith("state_space") else {}


def _state_space(config: Config) -> dict[str, Tree]:
    """The shapes of the weights of a layer of Mamba-2."""
    E, W, H = config.width, config.convolution_size, config.state_heads
    inner = H * config.state_value_size
    C = inner + 2 * config.state_key_heads * config.state_key_size
    shapes: dict[str, Tree] = {"mixer_in": (C, E), "mixer_gate": (inner, E), "mixer_rate": (H, E)}
    shapes |= {"mixer_out": (E, inner), "convolution": (C, W)}
    shapes |= dict.fromkeys(("log_rate", "rate_bias", "mixer_skip"), (H,))
    shapes |= {"convolution_bias": (C,)} if config.convolution_bias else {}
    shapes |= {"mixer_norm": (inner,)} if config.mixer_norm != "none" else {}
    shapes |= {"mixer_out_bias": (E,)} if config.mixer_output_bias else {}
    if config.mixer_bias:
        shapes |= {f"{name}_bias": shapes[name][:1] for name in ("mixer_in", "mixer_gate")}
        shapes |= {"mixer_rate_bias": (H,)}
    return shapes


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
        # without the offset of the others
        if name in ("mixer_norm", "mixer_skip") or name.endswith("_scale"):
            return torch.ones(shape, device=key.device)
        if name.endswith("norm"):
            return torch.full(shape, 1.0 - config.norm_offset, device=key.device)
        if name.endswith("bias") or name == "sinks":
            return torch.zeros(shape, device=key.device)
        if name == "log_rate":  # rates from 1 to 16, as in the published models
            return (1 + 15 * randomness.uniform(key, shape)).log()
        if name == "convolution":
            return randomness.normal(key, shape) * shape[-1] ** -0.5
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
        ("embedding", "head", "layers", "positions", "transform", *MORE),
        randomness.split(key, 5 + len(MORE)).unbind(0),
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
