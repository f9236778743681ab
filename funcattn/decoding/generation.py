"""`generate`: the continuation of one prompt, as a tensor.

A pure function of one sequence; `vmap` over keys, prompts or caches makes batches and samples. It
never writes into the cache that it is given: new tokens go into a tail of their own
(`caches.fork`), so 32 continuations of one cache store its keys and values once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import progress, sampling
from ..caches import KVCache
from ..core.doors import door
from ..models import Model, Past
from ..records import ABSENT
from ..sampling import Sampler
from ..tree import Tree
from .loop import decode, drawing, prefill
from .requests import Request


@door
def generate(
    key: Tensor,
    model: Model,
    params: Tree,
    prompt: Tensor,
    cache: Past = ABSENT,
    *,
    steps: int,
    sampler: Sampler = sampling.greedy,
    stop: Sequence[int] = (),
    prompt_length: Tensor | None = None,
    chunk: int = 512,
) -> tuple[Tensor, KVCache]:
    """Continue a prompt by `steps` tokens: prefill, then one decode step a token.

    Args:
        key: int64 (2,), randomness; token i is drawn with `split(key, steps)[i]`, so fewer steps
            give the beginning of more.
        model, params: a decoder and its weights.
        prompt: int64 (T,), T >= 1.
        cache: a cache that the prompt continues; it is not modified. `()` is none.
        steps: number of tokens to return, 0 or more.
        sampler: how a token is drawn from logits; see `funcattn.sampling`. It observes the prompt
            (`sampling.observe_prompt`); `sampling.primed` makes it observe the text of a cache too.
        stop: ids that end the text. After one, the remaining tokens are that id; the loop ends once
            every row of a vmap has ended.
        prompt_length: int64 (), 1 to T, where the prompt is padded at its end: padding (any valid
            id) is never committed to the cache.
        chunk: tokens of the prompt that are read at a time; bounds the memory of prefill.

    Returns:
        tokens: int64 (steps,).
        cache: the cache with the prompt and all new tokens but the last (which the model has not
            read yet): a `Cache` where none was given, else `caches.fork` of the given one: a
            `Branch` behind it, or a longer `Ring` or `QuantizedCache`. `caches.grow` makes room for
            more tokens, `caches.flatten` makes one cache of a branch.

    Raises:
        ValueError: an empty prompt, a prompt longer than the cache, a prompt_length outside the
            prompt, negative steps, NaN logits.
        TypeError: arguments of another type, such as a stop that is a string.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> tokens, cache = generate(fa.key(1), model, params, torch.tensor([1, 2, 3]), steps=4)
        >>> tokens.shape, int(cache.length)
        (torch.Size([4]), 6)

    Law: vmap over keys, prompts or caches equals the loop; the given cache is unchanged
        (test_generation.py).
    """
    request = Request(
        "generate", model, params, prompt, cache, steps, sampler, stop, prompt_length, chunk
    ).checked(key=key)
    start = prefill(
        model, params, prompt, cache, room=steps, prompt_length=prompt_length, chunk=chunk
    )
    tokens, after = [], start.cache
    alone = sampler is sampling.greedy and not model.replaced
    texts = decode(request, start, drawing(request, key), alone=alone)
    for text in progress.track(texts, "writing", steps):
        tokens.append(text.last)
        after = text.cache
    tokens = tokens + tokens[-1:] * (steps - len(tokens))
    return torch.stack(tokens) if tokens else prompt[:0].long(), after
