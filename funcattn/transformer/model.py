"""decoder(config): the six pure functions of a model.

    x = embed(tokens)
    x = layer(x)                  for each layer
    logits = head(norm(x))

Written for one sequence. Batches, ragged batches, forks of a cache and ensembles are `vmap`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import caches, rematerialization, taps, tree
from ..caches import Cache, Delta, KVCache
from ..core import errors
from ..core.doors import door, what_is
from ..kernels import Kernel
from ..masks import Mask
from ..models import Made, Model, Past, written
from ..records import ABSENT, is_absent
from . import lengths, parallel
from .config import Config, LayerSpec
from .forward import forward_pass, lm_head, predict, run_layers
from .layer import LayerContext, block
from .weights import Layer, Params, initialize


@door
def decoder(config: Config, kernel: str | Kernel | None = None, *, remat: bool = False) -> Model:
    """The six pure functions of a decoder.

        init(key) -> params
        cache(size, *, kind=fa.Cache, dtype=None) -> cache
        hidden(params, tokens, cache=(), *, mask=None, positions=None) -> (hidden, delta)
        logits(params, hidden) -> logits
        extend(params, tokens, cache=(), *, mask=None, positions=None) -> (logits, delta)
        apply(params, tokens, cache=()) -> (logits, cache)

    Without a cache (`cache=()`) tokens are int64 (*lead, T), leading axes free: training is
    `model.logits(params, model.hidden(params, tokens)[0])`. With a cache, tokens are one sequence
    (T,), and `vmap` makes batches. `mask` is the attention mask among the new tokens (causal by
    default; a Mask of T queries, or booleans (T, T)); all of them attend to the cache, within the
    window of a layer. `positions` (*lead, T) are those of the sequence; by default they continue
    those of the cache.

    Args:
        config: hyperparameters.
        kernel: of attention, to force: a name (see `kernels.explain`) or a `kernels.Kernel`; None
            chooses.
        remat: save only the input of each layer for the backward pass, and recompute the rest:
            less memory, more time.

    Raises:
        ValueError: tokens outside the vocabulary; a sequence longer than `config.context`
            positions; masks, positions or caches of other sizes.
        TypeError: arguments of another type.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config(layers=2))
        >>> params = model.init(fa.key(0))
        >>> logits, cache = model.apply(params, torch.tensor([1, 2, 3]), model.cache(8))
        >>> logits.shape, int(cache.length)
        (torch.Size([3, 256]), 3)

    Law: extending in any number of steps gives the logits of one
        (test_transformer.py::test_steps_equal_the_whole).
    """

    if not isinstance(config, Config):
        remedy = (
            "Make one with fa.Config(...), or take that of fa.load, which returns (config, params, "
            "tokenizer)."
        )
        errors.fail(
            "decoder", "config", "a Config", f"a {type(config).__name__}", remedy, TypeError
        )
    specs = [config.layer_spec(i) for i in range(config.layers)]

    @door
    def init(key: Tensor) -> Params:
        """Random weights.

        Args:
            key: `fa.key(seed)`; the same key gives the same weights.
        """
        return initialize(key, config)

    @door
    def cache(size: int, *, kind: Any = Cache, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache with room for `size` tokens.

        Args:
            size: tokens.
            kind: `fa.Cache`, `fa.Pages`, `fa.Ring`, `fa.QuantizedCache`, or another
                (`funcattn.caches`).
            dtype: of keys and values: that of the activations. None is torch's default.
        """
        if not errors.is_count(size, 0):
            errors.fail(
                "cache",
                "size",
                "a number of tokens, 0 or more",
                size,
                "Say how many tokens the past has room for.",
            )
        if not hasattr(kind, "empty"):
            remedy = "Pass fa.Cache, fa.Pages, fa.Ring or another kind, not its name."
            errors.fail("cache", "kind", "a kind of past", repr(kind), remedy, TypeError)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            errors.fail(
                "cache",
                "dtype",
                "a torch.dtype, or None",
                repr(dtype),
                "Pass one such as torch.bfloat16.",
                TypeError,
            )
        return kind.empty(
            lengths.cache_layers(config), parallel.heads(config)[1], size, config.head_size, dtype
        )

    @door
    def hidden(
        params: Params,
        tokens: Tensor,
        cache: Past = ABSENT,
        *,
        mask: Mask | Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Delta]:
        """The residual after the last norm, and keys and values of the new tokens.

        Args:
            params: the weights.
            tokens: int64 (*lead, T); one sequence (T,) where there is a cache.
            cache: of the tokens before, which is not modified; `()` is none.
            mask: attention mask among the new tokens: a `Mask` of T queries or booleans (T, T). All
                attend to the cache.
            positions: int64 (*lead, T); by default they continue those of the cache.

        Returns:
            hidden (*lead, T, E), the argument of `logits`, and the Delta for
            `fa.commit(cache, delta)`.
        """
        at = positions_of(config, tokens, cache, positions)
        _check_mask(mask, tokens.shape[-1])
        parallel.check(params, cache, mask)
        run = functools.partial(read, params)
        x, delta = lengths.hidden(config, run, tokens, cache, at, mask, positions is None)
        if not is_absent(cache) and errors.value(cache.length) is None:
            x = torch.where(caches.overflowed(cache), float("nan"), x)
        return taps.tap("output", x), delta

    def read(
        params: Params,
        tokens: Tensor,
        cache: Past,
        positions: Tensor,
        mask: Mask | Tensor | None,
        in_order: bool,
        length: Tensor | None,
    ) -> tuple[Tensor, Delta]:
        """`hidden` at given positions, in a text of that length (None where angles ignore it)."""

        def run(
            number: int, spec: LayerSpec, weights: Layer, x: Tensor, context: LayerContext
        ) -> tuple[Tensor, Tensor, Tensor]:
            past = (
                ()
                if is_absent(cache)
                else tuple(caches.past(cache, number, positions, spec.window))
            )
            layer = functools.partial(
                _run, number, config, spec, name=f"layers.{number}", kernel=kernel
            )
            layer = rematerialization.remat(layer) if remat and not taps.heard() else layer
            return layer(weights, x, context, past)

        options: Any = {"mask": mask, "in_order": in_order, "length": length}
        through = lambda x: run_layers(config, specs, params.layers, x, positions, run, **options)
        return forward_pass(config, params, tokens, positions, through)

    @door
    def logits(params: Params, hidden: Tensor) -> Tensor:
        """Logits (*lead, V) of hidden (*lead, E), the residual after the last norm.

        Args:
            params: the weights.
            hidden: what `hidden` returns. The residual after an inner layer must be normalized
                first, as `fa.evaluation.logit_lens` does; its logits are of no meaning otherwise.
        """
        weight = lm_head(params)
        if not isinstance(hidden, Tensor) or hidden.shape[-1:] != (config.width,):
            remedy = "Pass the first of what model.hidden returns."
            errors.fail(
                "decoder", "hidden", f"(*lead, E) with E = {config.width}", what_is(hidden), remedy
            )
        return predict(config, weight, hidden, params.head_bias)

    options = {"kernel": kernel} if kernel is not None else {}
    options |= {"remat": remat} if remat else {}
    made = Made(
        written("decoder", config, **options), lambda config: decoder(config, kernel, remat=remat)
    )
    return Model(init, cache, hidden, logits, config=config, kernel=kernel, made=made)


def _run(
    number: int, config: Config, spec: LayerSpec, weights: Layer, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer, with its weights gathered as this device needs them."""
    return block(config, spec, parallel.layer(config, number, weights), *rest, **options)


def positions_of(
    config: Config, tokens: Tensor, cache: Past, positions: Tensor | None = None
) -> Tensor:
    """Positions of new tokens: given, or continuing those of the cache; arguments are validated."""
    _check_tokens(tokens, config, has_past=not is_absent(cache))
    if not is_absent(cache):
        _check_past(cache, config)
    before = 0 if is_absent(cache) else cache.length
    if positions is None and is_absent(cache):
        positions = parallel.places(tokens.shape[-1])
    if positions is not None:
        _check_positions(positions, tokens.shape[-1])
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device) + before
    _check_reach(positions, config)
    return positions


def _check_past(cache: KVCache, config: Config) -> None:
    wanted, got = (
        (lengths.cache_layers(config), parallel.heads(config)[1], config.head_size),
        caches.sizes(cache),
    )
    if got != wanted:
        errors.fail(
            "decoder",
            "cache",
            f"of (layers, kv_heads, head_size) = {wanted}",
            got,
            "Make it with the cache function of this model.",
        )
    caches.check_whole("decoder", cache)


def _check_positions(positions: Tensor, T: int) -> None:
    if (
        not isinstance(positions, Tensor)
        or positions.dtype not in tree.INTEGERS
        or positions.shape[-1:] != (T,)
    ):
        remedy = "They say where in the sequence each new token stands; None goes on from the past."
        errors.fail(
            "decoder",
            "positions",
            f"integers (*lead, T) with T = {T}",
            what_is(positions),
            remedy,
            TypeError,
        )


def _check_reach(positions: Tensor, config: Config) -> None:
    limit = config.limit()
    if limit is None or not positions.shape[-1]:
        return
    last = errors.greatest(positions)
    # A length of OVERFLOWED or more is of a commit that did not fit: the logits are NaN.
    if last is not None and limit <= last < caches.OVERFLOWED:
        whose = (
            "of its table"
            if config.positions == "learned"
            else "that the model was trained on, config.context"
        )
        remedy = (
            "Shorten it; or where you know better, stretch it by dataclasses.replace(config, "
            "context=..., rope_scaling=...)."
        )
        errors.fail(
            "decoder", "tokens", f"within the {limit} positions {whose}", f"position {last}", remedy
        )


def _check_mask(mask: Mask | Tensor | None, T: int) -> None:
    if isinstance(mask, Mask):
        if mask.start.shape[-2] != T:
            errors.fail(
                "decoder",
                "mask",
                f"for T = {T} new tokens",
                f"one for {mask.start.shape[-2]}",
                f"Build it with T = {T}.",
            )
    elif mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        got = getattr(mask, "dtype", type(mask).__name__)
        errors.fail(
            "decoder",
            "mask",
            "a Mask, booleans or None",
            got,
            "See funcattn.masks, or convert it: mask.bool().",
            TypeError,
        )
    elif mask is not None and any(size not in (1, T) for size in mask.shape[-2:]):
        remedy = "It says which of the new tokens each sees; all see the past."
        errors.fail("decoder", "mask", f"booleans (T, T) with T = {T}", errors.shape(mask), remedy)


def _check_tokens(tokens: Tensor, config: Config, *, has_past: bool) -> None:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        got = getattr(tokens, "dtype", type(tokens).__name__)
        errors.fail(
            "decoder",
            "tokens",
            "an integer tensor",
            got,
            "Pass token ids: torch.tensor(tokenizer.encode(text)).",
            TypeError,
        )
    if has_past and tokens.dim() != 1:
        errors.fail(
            "decoder",
            "tokens",
            "one sequence (T,) where there is a past",
            errors.shape(tokens),
            "Map over sequences with torch.func.vmap.",
        )
    if not tokens.dim():
        errors.fail(
            "decoder",
            "tokens",
            "(*lead, T)",
            errors.shape(tokens),
            "Give one token an axis: tokens[None].",
        )
    if errors.is_true((tokens < 0) | (tokens >= config.vocabulary)):
        known = errors.peek(tokens)
        bad = (
            known[(known < 0) | (known >= config.vocabulary)][0].item()
            if known is not None
            else "another"
        )
        errors.fail(
            "decoder",
            "tokens",
            f"ids in 0..{config.vocabulary - 1}",
            bad,
            "Encode with the tokenizer of this model.",
        )
