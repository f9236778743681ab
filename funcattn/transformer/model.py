"""decoder(config): the six pure functions of a model.

    x = embed(tokens)
    x = layer(x)                  for each layer
    logits = head(norm(x))

Written for one sequence. Many sequences, a ragged batch, a forest of futures or an ensemble of weights are `vmap`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _checks, caches, kernels, layers, masks, rematerialization, taps, tree
from .._doors import door, what_is
from ..caches import Cache, Delta
from ..collectives import bound
from ..layers import Rotation
from ..masks import Mask
from ..models import Model
from ..records import ABSENT, is_absent
from . import lengths, parallel
from .blocks import Block, block
from .config import Config, Kind
from .weights import Layer, Params, initialize


@door
def decoder(config: Config, kernel: str | None = None, *, remat: bool = False) -> Model:
    """The six pure functions of a decoder.

        init(key) -> params
        cache(size, *, kind=fa.Cache, dtype=None) -> cache
        hidden(params, tokens, cache=(), *, mask=None, positions=None) -> (hidden, delta)
        logits(params, hidden) -> logits
        extend(params, tokens, cache=(), *, mask=None, positions=None) -> (logits, delta)
        apply(params, tokens, cache) -> (logits, cache)

    With no past (`cache=()`) tokens are int64 (*lead, T), leading axes free: training is
    `model.logits(params, model.hidden(params, tokens)[0])`. With a past, tokens are one sequence (T,), and `vmap` makes batches.
    `mask` says which of the new tokens each new token sees (causal by default; a Mask of T queries, or booleans (T, T)); all see
    the past, as far as the window of a layer reaches. `positions` (*lead, T) are those of the sequence; by default they go on from
    the past.

    Args:
        config: sizes and kinds.
        kernel: a kernel of attention to force; None chooses (see `kernels.explain`).
        remat: keep of each layer only its input, and compute the rest again for its derivatives: less memory for more time.

    Raises:
        ValueError: tokens outside the vocabulary; a sequence longer than `config.context` positions; masks, positions or pasts of
            other sizes. TypeError: arguments of another kind.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config(layers=2))
        >>> params = model.init(fa.key(0))
        >>> logits, cache = model.apply(params, torch.tensor([1, 2, 3]), model.cache(8))
        >>> logits.shape, int(cache.length)
        (torch.Size([3, 256]), 3)

    Law: extending in any number of steps gives the logits of one (test_transformer.py::test_steps_equal_the_whole).
    """

    if not isinstance(config, Config):
        remedy = "Make one with fa.Config(...), or take that of fa.load, which returns (config, params, tokenizer)."
        _checks.fail("decoder", "config", "a Config", f"a {type(config).__name__}", remedy, TypeError)
    all_kinds = [config.kind(i) for i in range(config.layers)]
    kinds = list(dict.fromkeys(all_kinds))

    @door
    def init(key: Tensor) -> Params:
        """Random weights.

        Args:
            key: `fa.key(seed)`; the same key gives the same weights.
        """
        return initialize(key, config)

    @door
    def cache(size: int, *, kind: Any = Cache, dtype: torch.dtype | None = None) -> Any:
        """An empty cache with room for `size` tokens.

        Args:
            size: tokens.
            kind: `fa.Cache`, `fa.Pages`, `fa.Ring`, `fa.QuantizedCache`, or another (`funcattn.caches`).
            dtype: of keys and values: that of the activations. None is torch's default.
        """
        if not _checks.is_count(size, 0):
            _checks.fail("cache", "size", "a number of tokens, 0 or more", size, "Say how many tokens the past has room for.")
        if not hasattr(kind, "empty"):
            remedy = "Pass fa.Cache, fa.Pages, fa.Ring or another kind, not its name."
            _checks.fail("cache", "kind", "a kind of past", repr(kind), remedy, TypeError)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            _checks.fail("cache", "dtype", "a torch.dtype, or None", repr(dtype), "Pass one such as torch.bfloat16.", TypeError)
        return kind.empty(lengths.cache_layers(config), parallel.heads(config)[1], size, config.head_size, dtype)

    @door
    def hidden(
        params: Params, tokens: Tensor, cache: Any = ABSENT, *, mask: Mask | Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Delta]:
        """The residual after the last norm, of which `logits` makes logits, and the keys and values of the new tokens.

        Args:
            params: the weights.
            tokens: int64 (*lead, T); one sequence (T,) where there is a cache.
            cache: what was read before, which is only read; `()` is nothing.
            mask: which of the new tokens each sees: a `Mask` of T queries or booleans (T, T). All see the cache.
            positions: int64 (*lead, T); by default they go on from the cache.

        Returns:
            hidden (*lead, T, E), and the Delta that `fa.commit(cache, delta)` adds.
        """
        places = locate(config, tokens, cache, positions)
        _check_mask(mask, tokens.shape[-1])
        parallel.check(params, cache, mask)
        run = functools.partial(stack, params)
        x, delta = lengths.hidden(config, run, tokens, cache, places, mask, positions is None)
        if not is_absent(cache) and _checks.value(cache.length) is None:
            x = torch.where(caches.overflowed(cache), float("nan"), x)
        return taps.tap("output", x), delta

    def stack(
        params: Params,
        tokens: Tensor,
        cache: Any,
        places: Tensor,
        mask: Mask | Tensor | None,
        in_order: bool,
        length: Tensor | None,
    ) -> tuple[Tensor, Delta]:
        """Every layer, of tokens at `places` in a text of that length (None: of which no angle depends on it)."""
        x = taps.tap("embedding", begin(config, params, tokens, places))
        shared = {kind: share(config, kind, places, mask, x.dtype, in_order, length) for kind in kinds}
        keys, values = [], []
        for i, (weights, kind) in enumerate(zip(params.layers, all_kinds, strict=True)):
            past = () if is_absent(cache) else tuple(caches.past(cache, i, places, kind.window))
            layer = functools.partial(_place, i, config, kind, name=f"layers.{i}", kernel=kernel)
            x, k, v = (rematerialization.remat(layer) if remat and not taps.heard() else layer)(weights, x, shared[kind], past)
            keys.append(k)
            values.append(v)
        return finish(config, params, x), Delta(tuple(keys), tuple(values))

    @door
    def logits(params: Params, hidden: Tensor) -> Tensor:
        """The logits (*lead, V) of hidden (*lead, E), which is what `hidden` returns: the residual after the last norm."""
        weight = head(params)
        if not isinstance(hidden, Tensor) or hidden.shape[-1:] != (config.width,):
            remedy = "Pass the first of what model.hidden returns."
            _checks.fail("decoder", "hidden", f"(*lead, E) with E = {config.width}", what_is(hidden), remedy)
        return predict(config, weight, hidden)

    return Model(init, cache, hidden, logits, config=config, kernel=kernel)


def _place(number: int, config: Config, kind: Kind, weights: Layer, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A layer with its weights as this device computes with them."""
    return block(config, kind, parallel.layer(config, number, weights), *rest, **options)


def locate(config: Config, tokens: Tensor, cache: Any, positions: Tensor | None = None) -> Tensor:
    """The positions of new tokens, which go on from the past unless they are given; tokens, past and positions are checked."""
    _check_tokens(tokens, config, has_past=not is_absent(cache))
    if not is_absent(cache):
        _check_past(cache, config)
    before = 0 if is_absent(cache) else cache.length
    if positions is None and is_absent(cache):
        positions = parallel.places(tokens.shape[-1])
    if positions is not None:
        _check_positions(positions, tokens.shape[-1])
    places = torch.arange(tokens.shape[-1], device=tokens.device) + before if positions is None else positions
    _check_places(places, config)
    return places


def begin(config: Config, params: Params, tokens: Tensor, places: Tensor) -> Tensor:
    """The residual (*lead, T, E) before the first layer; params that are plainly not of this config are an error."""
    _check_params(params, config)
    x = parallel.embed(config, params.embedding, tokens)
    if config.embedding_scale != 1.0:
        x = x * torch.full((), config.embedding_scale, dtype=x.dtype, device=x.device)  # rounded as its authors do
    if config.positions != "learned":
        return x
    return x + layers.embed(parallel.vector("positions", params.positions, (config.context, config.width)), places)


def finish(config: Config, params: Params, x: Tensor) -> Tensor:
    """The residual after the last layer, normalized."""
    norm = parallel.vector("norm", params.norm, (config.width,))
    if config.norm == "rms":
        return layers.rms_norm(x, norm, epsilon=config.norm_epsilon, offset=config.norm_offset)
    bias = parallel.vector("norm_bias", params.norm_bias, (config.width,))
    return layers.layer_norm(x, norm, bias, epsilon=config.norm_epsilon)


def head(params: Params) -> Any:
    """The weight that makes logits: the embedding, where it has none of its own."""
    if not hasattr(params, "head"):
        remedy = "Make them with model.init(key), or take those of fa.load."
        _checks.fail("decoder", "params", "the weights of a decoder", what_is(params), remedy, TypeError)
    return params.embedding if is_absent(params.head) else params.head


def predict(config: Config, head: Any, hidden: Tensor) -> Tensor:
    """Logits (*lead, V), by the weight of the head (or of the embedding, where it serves)."""
    return parallel.gather_vocab(config, local_logits(config, head, hidden))


def local_logits(config: Config, head: Any, hidden: Tensor) -> Tensor:
    """The logits of the part of the vocabulary that this device's head holds: all of it, unless "tensor" is bound."""
    out = parallel.head(config, head, hidden)
    if config.logit_scale != 1.0:
        out = out * config.logit_scale
    return out if config.logit_cap is None else kernels.soft_cap(out, config.logit_cap)


def share(
    config: Config,
    kind: Kind,
    places: Tensor,
    mask: Mask | Tensor | None,
    dtype: torch.dtype,
    in_order: bool,
    length: Tensor | None = None,
) -> Block:
    """The rotation and the mask that all layers of a kind share.

    Args:
        config, kind: what they compute.
        places: int64 (*lead, T), the position of each new token.
        mask: which new tokens each sees; None is causal.
        dtype: of activations.
        in_order: whether the new tokens stand one behind the other, as they do unless positions were given.
        length: int64 (*lead) of the whole text, or (*lead, T) of that of each token, for angles that follow it; None is as far as
            places reach.
    """
    T = places.shape[-1]
    rotation: Rotation | tuple[()] = ()
    if kind.rotary:
        base = config.local_rope_base if kind.local else config.rope_base
        scaling = None if kind.local else config.rope_scaling
        assert base is not None
        if scaling is not None and scaling.follows_length:
            length = lengths.length_of(places) if length is None else length
        size = config.rotary_size or config.head_size
        turn = layers.frequencies(size, base=base, scaling=scaling, length=length, device=places.device)
        amplitude = 1.0 if scaling is None else scaling.attention
        if turn.dim() > places.dim():  # of each token
            each = layers.rope(places.unsqueeze(-1), turn, dtype, amplitude=amplitude)  # (*lead, T, 1, 1, D)
            rotation = Rotation(*(x.squeeze(-2).transpose(-2, -3) for x in each))
        else:
            rotation = layers.rope(places, turn, dtype, amplitude=amplitude)
    if mask is None and T > 1:
        mask = masks.causal(T, offset=torch.zeros((), dtype=torch.int64, device=places.device))  # a tensor, to be where it is
    if kind.window is not None and mask is not None and not (in_order and kind.window >= T):
        if in_order and isinstance(mask, Mask):
            near: Mask | Tensor = masks.window(T, kind.window, offset=torch.zeros((), dtype=torch.int64, device=places.device))
            mask = masks.intersection(mask, near)
        else:  # positions of one's own are in no order: the window is that of the positions, not of the rows
            ahead = places.unsqueeze(-1) - places.unsqueeze(-2)
            seen = mask.dense(T) if isinstance(mask, Mask) else mask
            mask = seen & (ahead < kind.window).unsqueeze(-3) if seen.dim() > 2 else seen & (ahead < kind.window)
    return Block(rotation, mask)


def _check_params(params: Params, config: Config) -> None:
    if not hasattr(params, "layers"):
        remedy = "Make them with model.init(key), or take those of fa.load; arguments come in the order params, tokens, cache."
        _checks.fail("decoder", "params", "the weights of a decoder", what_is(params), remedy, TypeError)
    count, norm = len(params.layers), params.norm
    if count == config.layers and (bound() or norm.shape[-1:] == (config.width,)):  # a device of a mesh may hold a part
        return
    got = f"{count} layers" if count != config.layers else f"a width of {_checks.shape(norm)[-1]}"
    wanted = f"those of the config: {config.layers} layers of width {config.width}"
    _checks.fail("decoder", "params", wanted, got, "Config, params and tokenizer of one fa.load belong together.")


def _check_past(cache: Any, config: Config) -> None:
    wanted, got = (lengths.cache_layers(config), parallel.heads(config)[1], config.head_size), caches.sizes(cache)
    if got != wanted:
        _checks.fail(
            "decoder",
            "cache",
            f"of (layers, kv_heads, head_size) = {wanted}",
            got,
            "Make it with the cache function of this model.",
        )
    caches.check_whole("decoder", cache)


def _check_positions(positions: Tensor, T: int) -> None:
    if not isinstance(positions, Tensor) or positions.dtype not in tree.INTEGERS or positions.shape[-1:] != (T,):
        remedy = "They say where in the sequence each new token stands; None goes on from the past."
        _checks.fail("decoder", "positions", f"integers (*lead, T) with T = {T}", what_is(positions), remedy, TypeError)


def _check_places(places: Tensor, config: Config) -> None:
    limit = config.limit()
    if limit is None or not places.shape[-1]:
        return
    last = _checks.greatest(places)
    if last is not None and limit <= last < caches.OVERFLOWED:  # beyond is what a commit that did not fit left: NaN tells of it
        whose = "of its table" if config.positions == "learned" else "that the model was trained on, config.context"
        remedy = "Shorten it; or where you know better, stretch it by dataclasses.replace(config, context=..., rope_scaling=...)."
        _checks.fail("decoder", "tokens", f"within the {limit} positions {whose}", f"position {last}", remedy)


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
