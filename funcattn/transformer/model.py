"""decoder(config): the six pure functions of a model.

    x = embed(tokens)
    x = layer(x)                  for each layer
    logits = head(norm(x))

Written for one sequence. Batches, ragged batches, forks of a cache and ensembles are `vmap`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import caches, rematerialization, taps
from ..caches import Cache, Delta, KVCache
from ..core import errors
from ..core.doors import door, what_is
from ..kernels import Kernel, Part
from ..layers import State
from ..masks import Mask
from ..models import Made, Model, Past, written
from ..records import ABSENT, is_absent
from . import layer_inputs, lengths, parallel, recurrent
from .arguments import check_mask, positions_of
from .config import Config, LayerSpec
from .forward import RunLayer, forward_pass, lm_head, predict, run_layers, seen
from .layer import LayerContext, LayerDelta, block
from .layer_spec import has_sizes
from .weights import Layer, Params, initialize


@door
def decoder(
    config: Config, kernel: str | Kernel | None = None, *, remat: bool | int = False
) -> Model:
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
            less memory, more time. A number saves the inputs of some sqrt(layers) segments only,
            and computes attention by groups of heads and the feed-forward of so many positions at a
            time: the least memory, for one more forward pass.

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
    if not isinstance(remat, bool) and not errors.is_count(remat, 1):
        wanted = "True, False or a number of positions above 0"
        errors.fail("decoder", "remat", wanted, repr(remat), "True recomputes whole layers.")
    rows = 0 if isinstance(remat, bool) else remat
    specs = [config.layer_spec(i) for i in range(config.layers)]
    row_of = {number: row for row, number in enumerate(config.attention_layers)}  # of a cache

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
        rows = lengths.empty(config, kind, size, dtype, parallel.cached)
        return recurrent.with_states(config, rows, dtype)

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
        check_mask(mask, tokens.shape[-1])
        recurrent.check(config, cache, mask)
        parallel.check(config, params, cache, mask)
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

        states = recurrent.states_of(config, cache)

        def run(
            number: int, spec: LayerSpec, weights: Layer, x: Tensor, context: LayerContext
        ) -> tuple[Tensor, LayerDelta]:
            past: tuple[Part, ...] = ()
            if not is_absent(cache) and spec.attends:
                row = row_of[number if spec.keys_of is None else spec.keys_of]
                past = tuple(seen(config, spec, cache, row, positions))
            layer = functools.partial(
                _run, number, config, spec, name=f"layers.{number}", kernel=kernel, rows=rows
            )
            layer = rematerialization.remat(layer) if remat and not taps.heard() else layer
            return layer(weights, x, context, past, states.get(number, ()))

        options: Any = {"mask": mask, "in_order": in_order, "length": length}
        inputs = functools.partial(layer_inputs.of_tokens, config, params, tokens)
        # Segments hand on the residual alone.
        apart = not (config.shared_layers or config.layer_embedding_size or has_sizes(config))
        if rows and apart and is_absent(cache) and not taps.heard():
            through = lambda x: _in_segments(
                config, specs, params.layers, x, positions, run, **options
            )
        else:
            through = lambda x: run_layers(
                config, specs, params.layers, x, positions, run, inputs=inputs(x), **options
            )
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
    number: int,
    config: Config,
    spec: LayerSpec,
    weights: Layer,
    x: Tensor,
    context: LayerContext,
    past: Sequence[Part],
    state: State,
    **options: Any,
) -> tuple[Tensor, LayerDelta]:
    """A layer, with its weights gathered as this device needs them."""
    whole = parallel.layer(config, number, weights)
    return block(config, spec, whole, x, context, past, state=state, **options)


def _in_segments(
    config: Config,
    specs: Sequence[LayerSpec],
    weights: Sequence[Layer],
    x: Tensor,
    positions: Tensor,
    run: RunLayer,
    **options: Any,
) -> tuple[Tensor, Delta]:
    """`run_layers` in some sqrt(L) segments of as many layers, each rematerialized.

    Where every layer is too, what is saved is the inputs of the segments, and those of the layers
    of one: O(sqrt(L) T) instead of O(L T), for one more forward pass.

    Source: Chen et al., Training deep nets with sublinear memory cost, arXiv:1604.06174.
    """
    size, keys, values, steps = math.isqrt(max(len(specs) - 1, 0)) + 1, (), (), ()
    for first in range(0, len(specs), size):
        some, numbered = specs[first : first + size], _numbered_from(first, run)
        segment = rematerialization.remat(
            lambda weights, x, positions, options, some=some, numbered=numbered: run_layers(
                config, some, weights, x, positions, numbered, **options
            )
        )
        x, delta = segment(weights[first : first + size], x, positions, options)
        keys, values = (*keys, *delta.k), (*values, *delta.v)
        steps = (*steps, *delta.steps)
    return x, Delta(keys, values, steps)


def _numbered_from(first: int, run: RunLayer) -> RunLayer:
    return lambda number, *rest: run(first + number, *rest)
