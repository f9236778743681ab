"""Compiled models: the same pure functions, where decoding runs at the speed of memory.

    model = fa.compile(fa.decoder(config))          generate, stream and speculate take it as they take any model

A layer is one pure function applied to L different trees, so what is compiled is a few layers as one function, called again and
again with other weights: a cold start costs what a few layers cost, and the code is small. Three things make it fast:

- The past is read as the rows below a power of two, not as a whole: one graph serves all lengths of a bucket, and a step costs what
  is remembered. A step returns what it would add, and writes nothing; the loop that owns the past writes those few rows in place.
- A matrix times one vector is written out as products and sums, which the compiler turns into loops over the rows of the matrix.
  They read memory as fast as the machine can, faster than the library routine. They want matrices stored by rows; `fa.load` stores
  by columns, which is what the routine wants. So each matrix is stored by rows once, when it is first seen, and kept while the
  caller keeps his own. A few vectors at once, as where drafts are verified, are a sum each in one loop over the matrix, which is
  stored once more for it (`layers.Blocks`).
- Everything else of a layer is fused around them.

Under torch.func the compiled model is the model it was made of, run as it is: every transform works and is exact. So is a call that
compiled code has no gain for: a long prompt (its matrix products are the cost, and they are the same), a mask of one's own, a past
of a kind that is not dense.

Source: Ansel et al., PyTorch 2, ASPLOS 2024.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks, caches, layers, transformer
from .._autodiff import transforming
from .._doors import door
from ..caches import Branch, Cache, Delta
from ..masks import Mask
from ..records import ABSENT, Model
from ..transformer import Params
from .conditions import is_dense, is_plain
from .stack import Stack

SEVERAL = layers.SEVERAL  # vectors at once, at most, whose products are written out


class Compiled(Model):
    """A Model whose decoding is compiled, and `step`, which is `apply` that takes the past away from its caller.

    step(params, tokens, cache) -> (logits, cache): writes into the tensors of the given past, copying nothing. The given value,
    and every fork that shares its tensors, is gone: using one is an error.

    explain(params) says what runs the layers of a step with these weights, and why nothing faster does.
    """

    step: Callable[[Params, Tensor, Any], tuple[Tensor, Any]]
    parts: transformer.Parts
    explain: Callable[[Params], str]


@door
def compile(model: Model, *, depth: int | None = None, backend: str = "inductor") -> Compiled:
    """The same functions, with decoding compiled.

    The first step of each form (a number of new tokens, a bucket of lengths) waits for the compiler, some ten seconds with a C++
    compiler at hand; a second process finds its code in the cache of torch.

    Args:
        model: from `fa.decoder`.
        depth: layers of one compiled function; None takes the largest divisor of their number up to 5 (of one kind of sequence).
        backend: of torch.compile.

    Raises:
        TypeError: not a model of `fa.decoder`.

    Example:
        >>> import funcattn as fa
        >>> model = fa.compile(fa.decoder(fa.Config()), backend="eager")
        >>> params = model.init(fa.key(0))
        >>> fa.generate(fa.key(1), model, params, torch.tensor([1, 2, 3]), steps=4)[0].shape
        torch.Size([4])

    Law: every function equals that of the model it was made of, under every transform (test_compilation.py).
    """
    parts = transformer.parts_of(model) if isinstance(model, Model) else None
    if parts is None:
        remedy = "Make it with fa.decoder(config); torch.compile takes any other function."
        _checks.fail("compile", "model", "from fa.decoder", f"a {type(model).__name__}", remedy, TypeError)
    config = parts.config
    stack = Stack(config, parts.kernel, depth, backend)

    def hidden(
        params: Params, tokens: Tensor, cache: Any = ABSENT, *, mask: Mask | Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Delta]:
        forms = stack.forms(params, tokens, cache) if mask is None and positions is None else None
        if forms is None:
            return model.hidden(params, tokens, cache, mask=mask, positions=positions)
        return stack.hidden(params, tokens, cache, forms)

    def logits(params: Params, hidden: Tensor) -> Tensor:
        if hidden.dim() > 2 or (hidden.dim() > 1 and not 0 < len(hidden) <= SEVERAL):
            return model.logits(params, hidden)
        weight = transformer.head(params)
        return stack.logits(weight, hidden) if is_plain(weight, hidden) else model.logits(params, hidden)

    def extend(
        params: Params, tokens: Tensor, cache: Any, *, mask: Mask | Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Delta]:
        x, delta = hidden(params, tokens, cache, mask=mask, positions=positions)
        return predict(params, x), delta

    def predict(params: Params, x: Tensor) -> Tensor:
        return logits(params, x) if len(x) > 1 else logits(params, x[0])[None]

    def apply(params: Params, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        forms = stack.forms(params, tokens, cache)
        if forms is None:  # the model marks logits behind a past that overflowed under a transform
            return model.apply(params, tokens, cache)
        x, delta = stack.hidden(params, tokens, cache, forms)
        return predict(params, x), caches.commit(cache, delta)

    def step(params: Params, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        _check_step(cache)
        proposed, delta = extend(params, tokens, cache)
        after = caches.commit_own(cache, delta, tokens.shape[-1])
        _tail(cache).length.fill_(caches.DONATED)
        return proposed, after

    made = Compiled(model.init, model.cache, hidden, logits, extend, apply)
    made.step, made.parts, made.explain = step, parts, stack.explain
    return made


def _tail(cache: Any) -> Cache:
    """The part of a dense past that is written."""
    return _tail(cache.own) if isinstance(cache, Branch) else cache


def _check_step(cache: Any) -> None:
    if not is_dense(cache):
        remedy = "Use apply, which takes every kind of past, and no cache away."
        _checks.fail("step", "cache", "a Cache, or a Branch of such", f"a {type(cache).__name__}", remedy, TypeError)
    if transforming() or torch.compiler.is_compiling():
        _checks.fail("step", "the call", "outside of every transform", "one inside", "Use apply: a donation cannot be undone.")
