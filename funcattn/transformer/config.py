"""Config: the hyperparameters of a decoder that its weights do not determine.

A model family is a setting of these fields, never a subclass: `checkpoints.families` reads them
from checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Any

from .. import layers
from ..core import errors
from ..core.doors import made
from ..layers import RopeScaling
from ..records import Hashed
from .layer_sizes import check_sizes
from .layer_spec import LayerSpec, far_of, groups_of, near_of, spec_of
from .mixers import check_latent, check_mixers, check_parts

NORMS = ("rms", "layer")
HEAD_NORMS = ("none", "rms", "rms_width", "layer", "layer_bias", "unit")
PLACEMENTS = ("before", "after", "around", "residual")
SCORES = ("softmax", "sigmoid", "sparsemixer")
POSITIONS = ("rotary", "learned", "alibi", "none")
GATES = ("none", "width", "head")
GATE_ACTIVATIONS = ("sigmoid", "softplus")


Kind = LayerSpec  # its deprecated name


@made
@dataclass(frozen=True)
class Config(Hashed):
    """Hyperparameters of a decoder. Hashable, without tensors; the defaults make a tiny model.

    A field that differs between layers is a tuple of one bool for each, `()` for True everywhere.

    Example:
        >>> Config(layers=2).head_size
        16
    """

    vocabulary: int = 256  # V, number of token ids
    width: int = 64  # E
    layers: int = 2  # L
    heads: int = 4  # H, query heads
    kv_heads: int = 2  # K, key/value heads; H % K == 0
    head_size: int = 16  # D
    feed_forward: int = 128  # F
    activation: str = "silu"  # of the feed-forward: one of layers.ACTIVATIONS, or "xielu"
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    context: int = 2048  # positions that the model was trained on or extended to
    tied: bool = True  # the head is the embedding
    head_bias: bool = False  # added to the logits

    # Attention.
    qkv_bias: bool = False
    output_bias: bool = False
    # Norm of queries and keys before rotation: "rms" one weight (D,) for every head, "rms_width"
    # over all heads together, "layer" a layer norm with weights (H, D), "layer_bias" one with
    # weight and bias (D,), "unit" an RMS norm without weights in the layers that turn.
    head_norm: str = "none"
    late_head_norm: bool = False  # that norm, of each head, after rotation
    qkv_limit: float | None = None  # queries, keys and values are clamped to [-limit, limit]
    attention_scale: float | None = None  # of logits; None is 1 / sqrt(D)
    attention_cap: float | None = None  # soft cap of logits
    # (b, n): queries at position t are multiplied by 1 + b log(1 + floor(t / n))
    attention_temperature: tuple[float, int] | None = None
    # True: positions count from 1, and only in layers that do not turn
    late_temperature: bool = False
    # Attention's output times an activation of its input: "width" each feature, "head" each head.
    attention_gate: str = "none"
    gate_activation: str = "sigmoid"  # or "softplus"
    sinks: bool = False  # one learned logit per head whose value is 0
    window: int | None = None  # tokens each token attends to, itself included
    window_layers: tuple[bool, ...] = ()  # layers with the window
    chunked: bool = False  # the window is a chunk of the text: tokens of a chunk see each other

    # Values of another size than keys, and multi-head latent attention (see transformer.latent).
    value_size: int | None = None  # Dv, features of a value; None is head_size
    latent_size: int = 0  # R: keys and values are made of R features a token; 0 is of the residual
    query_latent_size: int = 0  # so are queries, of so many others; 0 is of the residual

    # Layers of other sizes, or that have more than attention and a feed-forward (Gemma 3n and 4).
    local_head_size: int | None = None  # D of layers with a window, if another
    local_kv_heads: int | None = None  # K of these
    local_sinks: bool = False  # sinks in these layers alone
    shared_layers: int = 0  # so many, the last, read the keys of the last before them of their kind
    value_norm: bool = False  # an RMS norm of the values of each head, without weights
    key_values: bool = False  # in layers without a window values are made by the matrix of keys
    feed_forward_sizes: tuple[int, ...] = ()  # F of each layer; () is feed_forward
    sparsities: tuple[float, ...] = ()  # share of the gate's features that are zero; see layers
    experts_apart: bool = False  # see `apart`: experts and the shared one have norms of their own
    layer_embedding_size: int = 0  # P, features of a token that each layer reads: `layer_inputs`
    layer_vocabulary: int = 0  # rows of their table; ids beyond it read the first
    layer_scale: bool = False  # the residual after a layer, times a weight
    streams: int = 0  # A, residuals beside each other, of which layers read one: `streams`
    active_stream: int = 0
    stream_scale: bool = False  # what the others read of it is scaled, feature by feature
    laurel_size: int = 0  # features of a low-rank residual beside attention: `streams`

    # Recurrent layers, by kind: see `recurrent`. Their state is cached in the place of rows.
    mixers: tuple[str, ...] = ()  # the kind of each layer, of MIXERS; () is attention in all
    convolution_size: int = 0  # W, the width of a short convolution
    convolution_bias: bool = False
    state_heads: int = 0  # Hv, heads of the state of a scan
    state_key_heads: int = 0  # Hk, of its keys and queries; Hv % Hk == 0
    state_key_size: int = 0  # features of a key
    state_value_size: int = 0  # features of a value
    negative_eigenvalues: bool = False  # betas are from 0 to 2, not 1
    mixer_norm_epsilon: float | None = None  # of the norm of a scan's output; None is norm_epsilon
    mixer_norm_placement: str | None = None  # of recurrent layers; None is norm_placement
    mixer_bias: bool = False  # of what a state space makes of its input
    mixer_output_bias: bool = False
    mixer_norm: str = "gated"  # of a state space's gated output, or "before_gate", or "none"
    mixer_rank: int = 0  # features that a delta net's gate and rates are made of; 0 is of its input
    feature_decay: bool = False  # a delta net's memory decays by features of its keys, not by heads
    mixer_gate_activation: str = "silu"  # of a delta net's output, or "sigmoid"
    step_limit: tuple[float, float] = (0.0, math.inf)  # of the steps of a state space
    # Factors of a state space's input, gate, x, keys, queries, steps and output; of attention's
    # input, keys and output; of a feed-forward's gate and output. () is one throughout.
    mixer_factors: tuple[float, ...] = ()
    attention_factors: tuple[float, ...] = ()
    feed_forward_factors: tuple[float, ...] = ()
    feed_forward_layers: tuple[bool, ...] = ()  # layers with a feed-forward

    # Positions.
    # or "learned", a table (context, E) added to the embedding, "alibi" (layers.alibi), or "none"
    positions: str = "rotary"
    rotary_size: int | None = None  # features of a head that are rotated; None is all
    rotary_layers: tuple[bool, ...] = ()  # layers with rotary embeddings
    local_rope_base: float | None = None  # base in layers with a window, if another; never scaled
    local_rotary_size: int | None = None  # rotary_size of those layers, if another

    # Norms and the residual.
    norm: str = "rms"  # or "layer"
    norm_bias: bool = False
    norm_offset: float = 0.0  # added to the weight; 1 in Gemma
    # before attention and feed-forward; "after" them; "around": both; or "residual": before them,
    # x = norm(x), and what follows is added to that (a norm after the sum, by other names)
    norm_placement: str = "before"
    first_norm: bool = True  # False: none before the first attention
    parallel: bool = False  # attention and feed-forward read the same residual
    shared_norm: bool = False  # they also read the same norm of it; needs parallel
    residual_scale: float = 1.0  # factor of what attention and feed-forward add to the residual

    # Feed-forward.
    gated: bool = True
    feed_forward_bias: bool = False
    activation_limit: float | None = None  # clamped SwiGLU; see layers.gated
    experts: int = 0  # X, number of experts; 0 is one dense feed-forward
    experts_per_token: int = 0
    expert_size: int = 0  # F of each expert
    expert_layers: tuple[bool, ...] = ()  # layers with experts; the others are dense
    normalized_routing: bool = True  # weights of the selected experts sum to one
    router_bias: bool = False
    # or "sigmoid", of each expert alone, or "sparsemixer"; see layers.route
    router_scores: str = "softmax"
    router_margin: float = 0.0  # of "sparsemixer": experts within twice that of the best share
    choice_bias: bool = False  # added to the scores for the choice of experts, not to their weights
    expert_groups: int = 1  # experts are chosen within the groups of greatest scores
    groups_per_token: int = 1
    group_best: int = 2  # the score of a group is the sum of so many, its best
    routing_scale: float = 1.0  # factor of the weights of experts
    shared_size: int = 0  # F of an expert that every token takes; 0 is none
    shared_gated: bool = False  # its output times a sigmoid of one more row
    routed_inputs: bool = False  # weights of experts multiply what these read, not what they give

    # Embedding and head.
    embedding_size: int = 0  # features of embedding and head, if others: matrices to E and back
    embedding_scale: float = 1.0
    embedding_norm: bool = False  # after positions are added
    head_transform: bool = False  # the head reads norm(activation(W x + b)), with the last norm
    logit_scale: float = 1.0
    logit_cap: float | None = None  # soft cap

    def __post_init__(self) -> None:
        fail = lambda name, wanted, remedy: errors.fail(
            "Config", name, wanted, getattr(self, name), remedy
        )
        for name in (
            "vocabulary",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "head_size",
            "feed_forward",
            "context",
        ):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                got = getattr(self, name)
                errors.fail(
                    "Config",
                    name,
                    "an int",
                    f"{got!r}, a {type(got).__name__}",
                    "Sizes are whole numbers.",
                    TypeError,
                )
            if getattr(self, name) < 1:
                fail(name, "at least 1", "Sizes are positive.")
        if self.heads % self.kv_heads:
            fail(
                "kv_heads",
                f"a divisor of heads = {self.heads}",
                "Each key head serves H / K query heads.",
            )
        for name, choices in (
            ("activation", (*layers.ACTIVATIONS, "xielu")),
            ("norm", NORMS),
            ("head_norm", HEAD_NORMS),
            ("norm_placement", PLACEMENTS),
            ("positions", POSITIONS),
            ("router_scores", SCORES),
            ("attention_gate", GATES),
            ("gate_activation", GATE_ACTIVATIONS),
        ):
            if getattr(self, name) not in choices:
                wanted = f"one of {', '.join(map(repr, choices))}"
                errors.fail(
                    "Config", name, wanted, repr(getattr(self, name)), "Choose one of these."
                )
        for name in ("window_layers", "rotary_layers", "expert_layers", "feed_forward_layers"):
            given = getattr(self, name)
            if not isinstance(given, tuple) or len(given) not in (0, self.layers):
                fail(
                    name,
                    f"() or a tuple of {self.layers} bools, one a layer",
                    "Say it for every layer.",
                )
        if self.mixers:
            check_mixers(self)
        check_parts(self)
        if self.positions == "rotary":
            turning = self.head_size if self.rotary_size is None else self.rotary_size
            if turning % 2 or not 0 < turning <= self.head_size:
                name = "head_size" if self.rotary_size is None else "rotary_size"
                fail(
                    name,
                    f"even, and at most head_size = {self.head_size}",
                    "Rotary angles turn pairs of features.",
                )
        check_latent(self)
        check_sizes(self)
        near = self.local_rotary_size
        if near is not None and (
            self.local_rope_base is None or near % 2 or not 0 < near <= self.head_size
        ):
            wanted = f"even, at most head_size = {self.head_size}, with a local_rope_base"
            fail("local_rotary_size", wanted, "Rotary angles turn pairs of features.")
        if self.window is not None and self.window < 1:
            fail("window", "None or at least 1", "Each token sees itself.")
        if self.experts and not (
            0 < self.experts_per_token <= self.experts and self.expert_size > 0
        ):
            wanted = f"from 1 to experts = {self.experts}, with an expert_size above 0"
            fail(
                "experts_per_token",
                wanted,
                "Say how many experts a token takes and how wide they are.",
            )
        groups, kept = self.expert_groups, self.groups_per_token
        each = self.experts // groups if groups > 0 else 0
        if groups != 1 and not (
            0 < kept <= groups
            and each * groups == self.experts
            and each > 1
            and self.experts_per_token <= kept * each
        ):
            fail(
                "expert_groups",
                f"a divisor of experts = {self.experts}, with two experts a group at least, and "
                f"groups_per_token = {kept} that hold experts_per_token = {self.experts_per_token}",
                "Choose from fewer, larger groups.",
            )
        if self.group_best not in (1, 2):
            fail("group_best", "1 or 2", "Groups are ranked by their best score or their best two.")
        if self.late_head_norm and self.head_norm not in ("rms", "layer", "unit"):
            wanted = 'False without a head_norm of "rms", "layer" or "unit"'
            fail("late_head_norm", wanted, "Set both.")
        if self.activation == "xielu" and (self.gated or self.experts):
            fail("activation", "another where gated or of experts", "Set gated=False, experts=0.")
        if self.chunked and self.window is None:
            fail("chunked", "False without a window", "Say its size, window.")
        biased = self.norm_bias and self.norm_placement != "residual"
        if self.norm_placement != "before" and (self.parallel or biased):
            fail(
                "norm_placement",
                '"before" where blocks are parallel or norms have a bias, or "residual"',
                "No family has both.",
            )
        if self.shared_norm and not self.parallel:
            fail(
                "shared_norm",
                "False where blocks follow each other",
                "Set parallel=True, or let each have its norm.",
            )

    __hash__ = Hashed.__hash__  # in place of that of dataclass

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Features of a key, D, and of a value, Dv."""
        return self.head_size, self.head_size if self.value_size is None else self.value_size

    @property
    def cached(self) -> tuple[int, int, int]:
        """Heads, features of keys and features of values that a cache holds of a token in a layer.

        Of latent attention it is one row, of the latent and the rotated part of the key.

        Example:
            >>> Config(heads=4, kv_heads=4, rotary_size=8, latent_size=32).cached
            (1, 40, 0)
        """
        if self.latent_size:
            return 1, self.latent_size + (self.rotary_size or 0), 0
        D, Dv = self.head_sizes
        more = layers.ALIBI_COLUMNS if self.positions == "alibi" else 0
        return self.kv_heads, D + more, Dv

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The numbers of the layers whose keys and values are cached, in the order of its rows."""
        return tuple(i for group in self.cache_groups for i in group)

    @property
    def cache_groups(self) -> tuple[tuple[int, ...], ...]:
        """These layers, one group for each size of keys: those with a window come first.

        Example:
            >>> config = Config(window=8, window_layers=(False, True), local_head_size=8)
            >>> config.cache_groups, Config().cache_groups
            (((1,), (0,)), ((0, 1),))
        """
        return groups_of(self)

    @property
    def near(self) -> "Config":
        """The config of the layers with a window, where these have other heads, or sinks."""
        return near_of(self)

    @property
    def far(self) -> "Config":
        """The config of the others."""
        return far_of(self)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with a state: those of the states of a cache, in order."""
        return tuple(i for i in range(self.layers) if self.layer_spec(i).recurs)

    @property
    def scale(self) -> float:
        """The factor of attention logits."""
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale

    def layer_spec(self, layer: int) -> LayerSpec:
        """The spec of a layer.

        Example:
            >>> Config(window=8, window_layers=(True, False)).layer_spec(1).window is None
            True
        """
        return spec_of(self, layer)

    kind = layer_spec  # its deprecated name

    @property
    def follows_length(self) -> bool:
        """True where rotary angles of a layer change with the length of the text.

        See `RopeScaling.follows_length`.
        """
        if self.rope_scaling is None or not self.rope_scaling.follows_length:
            return False
        return any(
            spec.rotary and not spec.local for spec in map(self.layer_spec, range(self.layers))
        )

    def limit(self) -> int | None:
        """The greatest length of a text; None for dynamic angles, ALiBi or no positions at all."""
        follows: Any = self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"
        return None if follows or self.positions in ("alibi", "none") else self.context
