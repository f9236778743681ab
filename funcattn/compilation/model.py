"""Compiled models: the same pure functions, with decode steps at the speed of memory.

    model = fa.compile(fa.decoder(config))     for generate, stream, speculate, like any model

A layer is one pure function of L different trees of weights, so a few layers are compiled as one
function and called several times with different weights: compile time and code are those of a few
layers. Three things make it fast:

- The cache is read up to the next power of two of its length, not to its capacity: one graph serves
  all lengths of a bucket, and the cost of a step follows the length. A step returns a delta, and
  writes nothing; the decoding loop, which owns the cache, writes those few rows in place.
- Most models run as one C++ operator from the first layer to the last (see `fused`), for weights in
  float32, 8 and 4 bits; what follows is for the others.
- A matrix-vector product is written as products and sums, which the compiler turns into loops over
  the rows of the matrix. They read memory at the full rate of the machine, faster than the library
  routine. They need matrices stored by rows; `fa.load` stores them by columns, as the routine
  needs. So each matrix is stored by rows once, at its first use, and kept as long as that matrix.
  Products with a few vectors, as in verifying drafts, are one loop over the matrix with a sum for
  each vector; the matrix is stored once more for it (`layers.Blocks`).
- All other operations of a layer are fused around them.

Under vmap alone the operator runs too, once for all rows (see `mapped`). Under every other
transform of torch.func, and where only compiled code would run, the original model does: every
transform works and is exact. So it does where compiled code gains nothing: a given mask other than
that of a tree of drafts, a cache that is not dense, or a long prompt, which is bound by the same
matrix products; of most models it is one operator too (see `prefill`).

Source: Ansel et al., PyTorch 2, ASPLOS 2024.
"""

import functools
from dataclasses import dataclass, field
from typing import NoReturn, cast

import torch
from torch import Tensor

from .. import caches, transformer, tree
from ..caches import Branch, Cache, Delta, KVCache
from ..core import errors
from ..core.autograd import has_tangent, mapped_rows, transforming
from ..core.doors import door
from ..masks import Mask
from ..models import Made, Model, Past, at_core, told, written
from ..records import ABSENT
from ..transformer import Params
from ..tree import Tree
from .conditions import MAX_OPERATOR_TOKENS, is_dense, is_mapped, is_plain, is_plainly_mapped
from .prefill import MIN_TOKENS, Prefill, prepared
from .stack import Stack


@dataclass(frozen=True, repr=False)
class Compiled(Model):
    """A Model whose decode steps are compiled, with `step`: `apply` that donates the cache."""

    stack: Stack = field(kw_only=True, compare=False)  # the compiled layers

    @door
    def step(self, params: Params, tokens: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """`apply` with a donated cache: it writes into the cache's tensors and copies nothing.

        The given cache, and every fork that shares its tensors, must not be used afterwards.

        Args:
            params, tokens: as in apply.
            cache: a Cache, or a Branch of such.
        """
        _check_step(params, cache)
        proposed, delta = self.extend(params, tokens, cache)
        after = caches.commit_donated(cache, delta, tokens.shape[-1])
        _tail(cache).length.fill_(caches.DONATED)
        return proposed, after

    def is_operator(self, params: Params) -> bool:
        """True where a step of these weights is one operator, and nothing waits for a compiler."""
        return "hidden" not in self.replaced and self.stack.is_operator(params)

    @door
    def explain(self, params: Params) -> str:
        """How the layers of a step run with these weights, and why no faster path does."""
        if "hidden" in self.replaced:
            return (
                f"{_replacing(self, 'hidden')} in the place of hidden, which is not compiled: "
                "layers run eagerly"
            )
        how = self.stack.explain(params)
        of_prompts = prepared(self.config, params, MIN_TOKENS)
        return f"{how}; prompts: one call of the operator funcattn::prompt" if of_prompts else how


@door
def compile(model: Model, *, depth: int | None = None, backend: str = "inductor") -> Compiled:
    """The same functions, with decode steps compiled.

    On the CPU the layers of Llama and its like, in float32 or quantized, are one C++ operator, and
    nothing is compiled (`is_operator`). Of other models the first step of each form (number of new
    tokens, bucket of lengths) compiles for some ten seconds and needs a C++ compiler; another
    process finds the code in torch's cache. Compiled code is stored with the decoder: compiling the
    decoder again is free, and the code is freed with it.

    Args:
        model: from `fa.decoder`, or a wrapper of such (candidates, a replaced function, shard_map):
            then the wrapper of the compiled decoder, in which replaced functions are not compiled.
        depth: layers of one compiled function; None takes the largest divisor of their number up to
            5 for which the specs of layers repeat.
        backend: of torch.compile.

    Raises:
        TypeError: not a model of `fa.decoder`.

    Example:
        >>> import funcattn as fa
        >>> model = fa.compile(fa.decoder(fa.Config()), backend="eager")
        >>> params = model.init(fa.key(0))
        >>> fa.generate(fa.key(1), model, params, torch.tensor([1, 2, 3]), steps=4)[0].shape
        torch.Size([4])

    Law: every function equals that of the original model, under every transform
        (test_compilation.py).
    Law: compiling a wrapped model is wrapping the compiled one (test_models.py).
    """
    if not isinstance(model, Model):
        _refuse(model)
    if not isinstance(backend, str) and not callable(backend):
        errors.fail(
            "compile",
            "backend",
            "the name of one of torch.compile",
            repr(backend),
            'Such as "inductor".',
            TypeError,
        )
    return at_core(model, lambda core: _compiled(core, depth, backend))  # pyright: ignore[reportReturnType]


def _compiled(model: Model, depth: int | None, backend: str) -> Compiled:
    """`compile` of a decoder without wrappers."""
    config = model.config
    if config is None or model.made is None:
        _refuse(model)
    stack = Stack(config, model.kernel, depth, backend, model.code)
    prefill = Prefill(config, model.kernel)

    @door
    @functools.wraps(model.hidden)
    def hidden(
        params: Params,
        tokens: Tensor,
        cache: Past = ABSENT,
        *,
        mask: Mask | Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Delta]:
        # A step, or that of a tree of drafts, whose mask and positions are given.
        square = mask if isinstance(mask, Tensor) and mask.shape == tokens.shape * 2 else None
        among = square is not None and positions is not None and square.dtype == torch.bool
        plain = mask is None and positions is None
        forms = stack.forms(params, tokens, cache) if plain or among else None
        if forms is None:
            found = prefill.hidden(params, tokens, cache) if plain else None
            if found is not None:
                return found
            return model.hidden(params, tokens, cache, mask=mask, positions=positions)
        return stack.hidden(params, tokens, cache, forms, square, positions)

    @door
    @functools.wraps(model.logits)
    def logits(params: Params, hidden: Tensor) -> Tensor:
        if hidden.shape[-1:] != (config.width,):
            return model.logits(params, hidden)  # which raises
        if hidden.dim() == 2 and len(hidden) == 1:  # one vector, whose code is compiled
            return logits(params, hidden[0])[None]
        if hidden.dim() > 2 or (hidden.dim() > 1 and not 0 < len(hidden) <= MAX_OPERATOR_TOKENS):
            return model.logits(params, hidden)
        weight = transformer.lm_head(params)
        mapped = bool(mapped_rows()) and not any(map(is_mapped, tree.leaves(weight)))
        if stack.why_not or not (is_plainly_mapped if mapped else is_plain)(weight, hidden):
            return model.logits(params, hidden)
        found = stack.logits(weight, hidden)
        return model.logits(params, hidden) if found is None else found

    def again(other: Model) -> Model:
        """Compile another model alike, at most its layers deep; a compiled one is unchanged."""
        if isinstance(other, Compiled):
            return other
        return compile(other, depth=depth and min(depth, other.config.layers), backend=backend)

    options = {"depth": depth} if depth is not None else {}
    options |= {"backend": backend} if backend != "inductor" else {}
    made = Made(written("compile", **options), again, model)
    fast = Compiled(
        model.init,
        model.cache,
        hidden,
        logits,
        config=config,
        kernel=model.kernel,
        code=model.code,
        made=made,
        stack=stack,
    )
    return fast


def _replacing(model: Model, function: str) -> str:
    """The call, as it is printed, of the outermost wrapper that replaces a function."""
    how = model.made
    while how is not None and how.held is not None and function not in how.replaced:
        how = how.held.made
    return "another function" if how is None else how.name


def _refuse(model: object) -> NoReturn:
    remedy = (
        "Make it with fa.decoder(config), and wrap or replace then; torch.compile takes any other "
        "function."
    )
    errors.fail("compile", "model", "from fa.decoder", told(model), remedy, TypeError)


def _tail(cache: KVCache) -> Cache:
    """The last `Cache` of a dense cache, into which a step writes."""
    return _tail(cache.tail) if isinstance(cache, Branch) else cast(Cache, cache)


def _check_step(params: Tree, cache: KVCache) -> None:
    if not is_dense(cache):
        remedy = "Use apply, which takes every kind of past, and no cache away."
        errors.fail(
            "step",
            "cache",
            "a Cache, or a Branch of such",
            f"a {type(cache).__name__}",
            remedy,
            TypeError,
        )
    if transforming() or has_tangent(params, cache) or torch.compiler.is_compiling():
        errors.fail(
            "step",
            "the call",
            "outside of every transform",
            "one inside",
            "Use apply: a donation cannot be undone.",
        )
