"""Compiled models: the same pure functions, where decoding runs at the speed of memory.

    model = fa.compile(fa.decoder(config))          generate, stream and speculate take it as they take any model

A layer is one pure function applied to L different trees, so what is compiled is a few layers as one function, called again and
again with other weights: a cold start costs what a few layers cost, and the code is small. Three things make it fast:

- The past is read as the rows below a power of two, not as a whole: one graph serves all lengths of a bucket, and a step costs what
  is remembered. A step returns what it would add, and writes nothing; the loop that owns the past writes those few rows in place.
- A matrix times one vector is written out as products and sums, which the compiler turns into loops over the rows of the matrix.
  They read memory as fast as the machine can, faster than the library routine. They want matrices stored by rows; `fa.load` stores
  by columns, which is what the routine wants. So each matrix is stored by rows once, when it is first seen, and kept as
  long as that matrix. A few vectors at once, as where drafts are verified, are a sum each in one loop over the matrix, which is
  stored once more for it (`layers.Blocks`).
- Everything else of a layer is fused around them.

Under torch.func the compiled model is the model it was made of, run as it is: every transform works and is exact. So is a call that
compiled code has no gain for: a long prompt (its matrix products are the cost, and they are the same), a mask of one's own, a past
of a kind that is not dense.

Source: Ansel et al., PyTorch 2, ASPLOS 2024.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import caches, layers, transformer
from ..caches import Branch, Cache, Delta
from ..core import errors
from ..core.autograd import has_tangent, transforming
from ..core.doors import door
from ..masks import Mask
from ..models import Made, Model, at_core, told, written
from ..records import ABSENT
from ..transformer import Params
from .conditions import is_dense, is_plain
from .stack import Stack


@dataclass(frozen=True, repr=False)
class Compiled(Model):
    """A Model whose decoding is compiled, and `step`, which is `apply` that takes the past away from its caller."""

    stack: Stack = field(kw_only=True, compare=False)  # of compiled functions

    @door
    def step(self, params: Params, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """`apply` that writes into the tensors of the given past, copying nothing.

        The given value, and every fork that shares its tensors, is gone: using one is an error.

        Args:
            params, tokens: as in apply.
            cache: a Cache, or a Branch of such.
        """
        _check_step(params, cache)
        proposed, delta = self.extend(params, tokens, cache)
        after = caches.commit_donated(cache, delta, tokens.shape[-1])
        _tail(cache).length.fill_(caches.DONATED)
        return proposed, after

    @door
    def explain(self, params: Params) -> str:
        """What runs the layers of a step with these weights, and why nothing faster does."""
        if "hidden" in self.replaced:
            return "a function of your own in the place of hidden, which is not compiled"
        return self.stack.explain(params)


@door
def compile(model: Model, *, depth: int | None = None, backend: str = "inductor") -> Compiled:
    """The same functions, with decoding compiled.

    The first step of each form (a number of new tokens, a bucket of lengths) waits for the compiler, some ten seconds with a C++
    compiler at hand; a second process finds its code in the cache of torch. What was compiled is kept with the decoder, so that
    compiling it again costs nothing, and goes with it.

    Args:
        model: from `fa.decoder`. One that wraps a decoder (candidates, a replaced function, shard_map)
            is the same wrapped around the compiled decoder, and a function that was replaced runs as it is.
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
    Law: compiling a wrapped model is wrapping the compiled one (test_models.py).
    """
    if not isinstance(model, Model):
        _refuse(model)
    if not isinstance(backend, str) and not callable(backend):
        errors.fail("compile", "backend", "the name of one of torch.compile", repr(backend), 'Such as "inductor".', TypeError)
    return at_core(model, lambda core: _compiled(core, depth, backend))  # pyright: ignore[reportReturnType]


def _compiled(model: Model, depth: int | None, backend: str) -> Compiled:
    """`compile` of a decoder that nothing wraps."""
    config = model.config
    if config is None or model.made is None:
        _refuse(model)
    stack = Stack(config, model.kernel, depth, backend, model.code)

    @door
    @functools.wraps(model.hidden)
    def hidden(
        params: Params, tokens: Tensor, cache: Any = ABSENT, *, mask: Mask | Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Delta]:
        forms = stack.forms(params, tokens, cache) if mask is None and positions is None else None
        if forms is None:
            return model.hidden(params, tokens, cache, mask=mask, positions=positions)
        return stack.hidden(params, tokens, cache, forms)

    @door
    @functools.wraps(model.logits)
    def logits(params: Params, hidden: Tensor) -> Tensor:
        if hidden.shape[-1:] != (config.width,):
            return model.logits(params, hidden)  # which says what it should be
        if hidden.dim() == 2 and len(hidden) == 1:  # one vector, which there is code for
            return logits(params, hidden[0])[None]
        if hidden.dim() > 2 or (hidden.dim() > 1 and not 0 < len(hidden) <= layers.MAX_UNROLLED_VECTORS):
            return model.logits(params, hidden)
        weight = transformer.lm_head(params)
        if stack.why_not or not is_plain(weight, hidden):
            return model.logits(params, hidden)
        return stack.logits(weight, hidden)

    def again(other: Model) -> Model:
        """Of a smaller model, the depth is its own; a compiled one stays as it was compiled."""
        if isinstance(other, Compiled):
            return other
        return compile(other, depth=depth and min(depth, other.config.layers), backend=backend)

    options = {"depth": depth} if depth is not None else {}
    options |= {"backend": backend} if backend != "inductor" else {}
    made = Made(written("compile", **options), again, model)
    fast = Compiled(
        model.init, model.cache, hidden, logits, config=config, kernel=model.kernel, code=model.code, made=made, stack=stack
    )
    return fast


def _refuse(model: Any) -> NoReturn:
    remedy = "Make it with fa.decoder(config), and wrap or replace then; torch.compile takes any other function."
    errors.fail("compile", "model", "from fa.decoder", told(model), remedy, TypeError)


def _tail(cache: Any) -> Cache:
    """The part of a dense past that is written."""
    return _tail(cache.tail) if isinstance(cache, Branch) else cache


def _check_step(params: Any, cache: Any) -> None:
    if not is_dense(cache):
        remedy = "Use apply, which takes every kind of past, and no cache away."
        errors.fail("step", "cache", "a Cache, or a Branch of such", f"a {type(cache).__name__}", remedy, TypeError)
    if transforming() or has_tangent(params, cache) or torch.compiler.is_compiling():
        errors.fail("step", "the call", "outside of every transform", "one inside", "Use apply: a donation cannot be undone.")
