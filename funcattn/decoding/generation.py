"""`generate`: one text behind a prompt, as a tensor.

A pure function of one sequence; `vmap` over keys, prompts or caches makes batches and futures. It never writes into the cache it
was given: what it generates goes where nothing is shared (`caches.fork`), so 32 futures of one past store it once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import progress, sampling
from ..core.doors import door
from ..models import Model
from ..records import ABSENT
from ..sampling import Sampler
from .loop import decode, drawing, prefill
from .requests import Request


@door
def generate(
    key: Tensor,
    model: Model,
    params: Any,
    prompt: Tensor,
    cache: Any = ABSENT,
    *,
    steps: int,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] = (),
    prompt_length: Tensor | None = None,
    chunk: int = 512,
) -> tuple[Tensor, Any]:
    """Continue a prompt by `steps` tokens.

    Args:
        key: randomness; step i spends `split(key, steps)[i]`, so fewer steps give the beginning of more.
        model, params: a decoder and its weights.
        prompt: int64 (T,), T >= 1.
        cache: a past that the prompt continues; it stays as it was. `()` is no past.
        steps: number of tokens to return, 0 or more.
        sampler: how a token is drawn from logits; see `funcattn.sampling`. It sees the prompt (`sampling.observe_prompt`);
            for a cache whose text it should know too, `sampling.primed`.
        stop: ids that end the text. After one, the rest is filled with it; once every row of a vmap has ended, the loop ends.
        prompt_length: int64 (), 1 to T, where the prompt is padded at its end: the pads (any valid id) are never remembered.
        chunk: tokens of the prompt that are read at a time; bounds the memory of prefill.

    Returns:
        tokens: int64 (steps,).
        cache: a past that holds the prompt and all new tokens but the last (which the model has not read yet): a `Cache` where
            none was given, else what `caches.fork` makes of the given one: a `Branch` behind it, or a longer `Ring` or
            `QuantizedCache`. `caches.grow` makes room for more, `caches.flatten` makes a branch one past again.

    Raises:
        ValueError: an empty prompt, a prompt longer than the cache, a prompt_length outside the prompt, negative steps,
            NaN logits.
        TypeError: arguments of another kind, such as a stop that is a string.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> tokens, cache = generate(fa.key(1), model, params, torch.tensor([1, 2, 3]), steps=4)
        >>> tokens.shape, int(cache.length)
        (torch.Size([4]), 6)

    Law: vmap over keys, prompts or pasts equals the loop; the past is unchanged (test_generation.py).
    """
    request = Request("generate", model, params, prompt, cache, steps, sampler, stop, prompt_length, chunk).checked(key=key)
    start = prefill(model, params, prompt, cache, room=steps, prompt_length=prompt_length, chunk=chunk)
    tokens, after = [], start.cache
    for text in progress.track(decode(request, start, drawing(request, key)), "writing", steps):
        tokens.append(text.last)
        after = text.cache
    tokens = tokens + tokens[-1:] * (steps - len(tokens))
    return torch.stack(tokens) if tokens else prompt[:0], after
