"""The arguments of a decoder's functions, validated: tokens, cache, positions and mask."""

import torch
from torch import Tensor

from .. import caches, tree
from ..caches import KVCache
from ..core import errors
from ..core.doors import what_is
from ..masks import Mask
from ..models import Past
from ..records import is_absent
from . import lengths, parallel
from .config import Config


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
    wanted = [each[:3] for each in lengths.cache_sizes(config, parallel.cached)]
    got = [caches.sizes(group) for group in caches.groups(cache)]
    if got != wanted:
        shown = lambda found: ", ".join(map(str, found))
        errors.fail(
            "decoder",
            "cache",
            f"of (layers, kv_heads, head_size) = {shown(wanted)}",
            shown(got),
            "Make it with the cache function of this model.",
        )
    caches.check_whole("decoder", cache)
    rounded = (torch.int8, torch.uint8)
    if config.positions == "alibi" and any(
        leaf.dtype in rounded for leaf in tree.leaves(cache) if isinstance(leaf, Tensor)
    ):
        remedy = "Positions are columns of its keys: use fa.Cache or fa.Pages."
        errors.fail("decoder", "cache", "one that rounds no keys, with ALiBi", "another", remedy)


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


def check_mask(mask: Mask | Tensor | None, T: int) -> None:
    """Raise unless a mask is one among T new tokens: a Mask of T queries, or booleans (T, T)."""
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
    known = errors.peek(tokens)
    if known is None or not known.numel():
        return
    least, most = map(int, known.aminmax())
    if least < 0 or most >= config.vocabulary:
        bad = known[(known < 0) | (known >= config.vocabulary)][0].item()
        errors.fail(
            "decoder",
            "tokens",
            f"ids in 0..{config.vocabulary - 1}",
            bad,
            "Encode with the tokenizer of this model.",
        )
