"""The decoder: one Config, one tree of Params, six pure functions.

    x = embed(tokens)
    x = x + o(attention(norm(x)))            for each layer: attention over the past and the new tokens,
    x = x + down(gated(norm(x)))             then the feed-forward
    logits = head(norm(x))

Written for one sequence. Many sequences, a ragged batch, a forest of futures or an ensemble of weights are `vmap`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, caches, kernels, layers, masks, randomness
from .caches import Cache, Delta
from .kernels import Part
from .layers import RopeScaling, Rotation
from .masks import Mask
from .records import ABSENT, Model, is_absent, record


@dataclass(frozen=True)
class Config:
    """What the mathematics needs to know and the weights do not say. Hashable, no tensors; the defaults make a tiny model.

    Example:
        >>> Config(layers=2).head_size
        16
    """

    vocabulary: int = 256  # V, how many token ids there are
    width: int = 64  # E
    layers: int = 2  # L
    heads: int = 4  # H, query heads
    kv_heads: int = 2  # K, key/value heads; H % K == 0
    head_size: int = 16  # D
    feed_forward: int = 128  # F
    activation: str = "silu"  # of the gated feed-forward; see layers.ACTIVATIONS
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    context: int = 2048  # positions that the model was trained on
    tied: bool = True  # the head is the embedding

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "kv_heads", "head_size", "feed_forward"):
            if getattr(self, name) < 1:
                _checks.fail("Config", name, "at least 1", getattr(self, name), "Sizes are positive.")
        if self.heads % self.kv_heads:
            _checks.fail(
                "Config", "kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads, "Each key head serves H / K query heads."
            )
        if self.head_size % 2:
            _checks.fail("Config", "head_size", "even", self.head_size, "Rotary angles turn pairs of features.")
        if self.activation not in layers.ACTIVATIONS:
            wanted = f"one of {', '.join(map(repr, layers.ACTIVATIONS))}"
            _checks.fail("Config", "activation", wanted, repr(self.activation), "Choose one of these.")


@record
class Layer(NamedTuple):
    """The weights of one layer; matrices are (out, in)."""

    attention_norm: Any  # (E,)
    q: Any  # (H D, E)
    k: Any  # (K D, E)
    v: Any  # (K D, E)
    o: Any  # (E, H D)
    feed_forward_norm: Any  # (E,)
    gate: Any  # (F, E)
    up: Any  # (F, E)
    down: Any  # (E, F)


@record
class Params(NamedTuple):
    """All weights: a weight is a tensor, a quantized record or a DTensor, and the decoder never knows which."""

    embedding: Any  # (V, E)
    layers: tuple[Layer, ...]
    norm: Any  # (E,)
    head: Any  # (V, E), or () where the embedding serves


def shapes(config: Config) -> Params:
    """The shape of every weight, as a tree of tuples of ints: what `init` makes and what a checkpoint must hold."""
    E, F, V = config.width, config.feed_forward, config.vocabulary
    Q, KV = config.heads * config.head_size, config.kv_heads * config.head_size
    layer = Layer((E,), (Q, E), (KV, E), (KV, E), (E, Q), (E,), (F, E), (F, E), (E, F))
    return Params((V, E), (layer,) * config.layers, (E,), ABSENT if config.tied else (V, E))


def decoder(config: Config, kernel: str | None = None) -> Model:
    """The six pure functions of a decoder.

        init(key) -> params
        cache(size, *, kind=fa.Cache, dtype=None) -> cache
        hidden(params, tokens, cache=(), *, mask=None, positions=None) -> (hidden, delta)
        logits(params, hidden) -> logits
        extend(params, tokens, cache, *, mask=None, positions=None) -> (logits, delta)
        apply(params, tokens, cache) -> (logits, cache)

    With no past (`cache=()`) tokens are int64 (*lead, T), leading axes free: training is
    `model.logits(params, model.hidden(params, tokens)[0])`. With a past, tokens are one sequence (T,), and `vmap` makes batches.
    `mask` says which of the new tokens each new token sees (causal by default; a Mask of T queries, or booleans (T, T)); all see
    the past. `positions` (*lead, T) are those of the rotary angles; by default they go on from the past.

    Args:
        config: sizes and kinds.
        kernel: a kernel of attention to force; None chooses (see `kernels.explain`).

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config(layers=2))
        >>> params = model.init(fa.key(0))
        >>> logits, cache = model.apply(params, torch.tensor([1, 2, 3]), model.cache(8))
        >>> logits.shape, int(cache.length)
        (torch.Size([3, 256]), 3)

    Law: extending in any number of steps gives the logits of one (test_transformer.py::test_steps_equal_the_whole).
    """

    def init(key: Tensor) -> Params:
        return initialize(key, config)

    def cache(size: int, *, kind: Any = Cache, dtype: torch.dtype | None = None) -> Any:
        if not isinstance(size, int) or size < 0:
            _checks.fail("cache", "size", "a number of tokens, 0 or more", size, "Say how many tokens the past has room for.")
        return kind.empty(config.layers, config.kv_heads, size, config.head_size, dtype)

    def hidden(
        params: Params, tokens: Tensor, cache: Any = ABSENT, *, mask: Mask | Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Delta]:
        _check_tokens(tokens, config, has_past=not is_absent(cache))
        if not is_absent(cache):
            _check_past(cache, config)
        T = tokens.shape[-1]
        _check_mask(mask, T)
        before = 0 if is_absent(cache) else cache.length
        places = torch.arange(T, device=tokens.device) + before if positions is None else positions
        x = layers.embed(params.embedding, tokens)
        turn = layers.frequencies(config.head_size, base=config.rope_base, scaling=config.rope_scaling, device=tokens.device)
        rotation = layers.rope(places, turn, x.dtype)
        if mask is None and T > 1:
            mask = masks.causal(T, offset=torch.zeros((), dtype=torch.int64, device=tokens.device))  # a tensor, to be where it is
        keys, values = [], []
        for i, layer in enumerate(params.layers):
            attended, k, v = _attend(config, kernel, layer, i, x, rotation, mask, cache, places)
            x = x + attended
            x = x + _feed_forward(config, layer, x)
            keys.append(k)
            values.append(v)
        x = layers.rms_norm(x, params.norm, epsilon=config.norm_epsilon)
        if not is_absent(cache) and _checks.value(cache.length) is None:
            x = torch.where(caches.broken(cache), float("nan"), x)
        return x, Delta(tuple(keys), tuple(values))

    def logits(params: Params, hidden: Tensor) -> Tensor:
        return layers.linear(params.embedding if is_absent(params.head) else params.head, hidden)

    def extend(
        params: Params, tokens: Tensor, cache: Any, *, mask: Mask | Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Delta]:
        x, delta = hidden(params, tokens, cache, mask=mask, positions=positions)
        return logits(params, x), delta

    def apply(params: Params, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        proposed, delta = extend(params, tokens, cache)
        after = caches.commit(cache, delta)
        if _checks.value(after.length) is None:
            proposed = torch.where(caches.broken(after), float("nan"), proposed)
        return proposed, after

    return Model(init, cache, hidden, logits, extend, apply)


def initialize(key: Tensor, config: Config) -> Params:
    """Random weights: normal of deviation 0.02, those that write into the residual divided by sqrt(2 L); norms are one.

    Source: Radford et al., Language models are unsupervised multitask learners (GPT-2), section 2.3.
    """
    residual: dict[str, float] = dict.fromkeys(("o", "down"), 0.02 / (2 * config.layers) ** 0.5)
    wanted = shapes(config)

    def draw(key: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=key.device)
        return randomness.normal(key, shape) * residual.get(name, 0.02)

    def fields(key: Tensor, record: Any) -> list[Tensor]:
        drawn = randomness.split(key, len(record))
        return [draw(drawn[i], name, shape) for i, (name, shape) in enumerate(zip(record._fields, record, strict=True))]

    of_embedding, of_head, of_layers = randomness.split(key, 3).unbind(0)
    each = randomness.split(of_layers, config.layers)
    return Params(
        embedding=draw(of_embedding, "embedding", wanted.embedding),
        layers=tuple(Layer(*fields(each[i], layer)) for i, layer in enumerate(wanted.layers)),
        norm=draw(key, "norm", wanted.norm),
        head=ABSENT if config.tied else draw(of_head, "head", wanted.head),
    )


def _attend(
    config: Config,
    kernel: str | None,
    layer: Layer,
    index: int,
    x: Tensor,
    rotation: Rotation,
    mask: Mask | Tensor | None,
    cache: Any,
    places: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention adds to the residual, and the keys and values (*lead, K, T, D) of the new tokens."""
    y = layers.rms_norm(x, layer.attention_norm, epsilon=config.norm_epsilon)
    heads: Callable[[Any, int], Tensor] = lambda weight, n: (
        layers.linear(weight, y).unflatten(-1, (n, config.head_size)).transpose(-2, -3)
    )
    q = layers.rotate(heads(layer.q, config.heads), rotation)
    k = layers.rotate(heads(layer.k, config.kv_heads), rotation)
    v = heads(layer.v, config.kv_heads)
    if is_absent(cache):
        out = kernels.attention(q, k, v, mask, kernel=kernel)
    else:
        parts = [*caches.past(cache, index, places), Part(k, v, ABSENT if mask is None else mask)]
        out = kernels.attend_parts(q, parts, scale=config.head_size**-0.5, kernel=kernel)
    return layers.linear(layer.o, out.transpose(-2, -3).flatten(-2)), k, v


def _feed_forward(config: Config, layer: Layer, x: Tensor) -> Tensor:
    y = layers.rms_norm(x, layer.feed_forward_norm, epsilon=config.norm_epsilon)
    return layers.linear(layer.down, layers.gated(layers.linear(layer.gate, y), layers.linear(layer.up, y), config.activation))


def _check_past(cache: Any, config: Config) -> None:
    wanted, got = (config.layers, config.kv_heads, config.head_size), caches.sizes(cache)
    if got != wanted:
        _checks.fail(
            "decoder",
            "cache",
            f"of (layers, kv_heads, head_size) = {wanted}",
            got,
            "Make it with the cache function of this model.",
        )
    caches.check_whole("decoder", cache)


def _check_mask(mask: Mask | Tensor | None, T: int) -> None:
    if isinstance(mask, Mask):
        if mask.start.shape[-2] != T:
            _checks.fail("decoder", "mask", f"for T = {T} new tokens", f"one for {mask.start.shape[-2]}", f"Build it with T = {T}.")
    elif mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        got = getattr(mask, "dtype", type(mask).__name__)
        _checks.fail(
            "decoder", "mask", "a Mask, booleans or None", got, "See funcattn.masks, or convert it: mask.bool().", TypeError
        )
    elif mask is not None and any(size not in (1, T) for size in mask.shape[-2:]):
        remedy = "It says which of the new tokens each sees; all see the past."
        _checks.fail("decoder", "mask", f"booleans (T, T) with T = {T}", _checks.shape(mask), remedy)


def _check_tokens(tokens: Tensor, config: Config, *, has_past: bool) -> None:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        got = getattr(tokens, "dtype", type(tokens).__name__)
        _checks.fail(
            "decoder", "tokens", "an integer tensor", got, "Pass token ids: torch.tensor(tokenizer.encode(text)).", TypeError
        )
    if has_past and tokens.dim() != 1:
        _checks.fail(
            "decoder",
            "tokens",
            "one sequence (T,) where there is a past",
            _checks.shape(tokens),
            "Map over sequences with torch.func.vmap.",
        )
    if not tokens.dim():
        _checks.fail("decoder", "tokens", "(*lead, T)", _checks.shape(tokens), "Give one token an axis: tokens[None].")
    if _checks.is_true((tokens < 0) | (tokens >= config.vocabulary)):
        known = _checks.peek(tokens)
        bad = known[(known < 0) | (known >= config.vocabulary)][0].item() if known is not None else "another"
        _checks.fail("decoder", "tokens", f"ids in 0..{config.vocabulary - 1}", bad, "Encode with the tokenizer of this model.")
