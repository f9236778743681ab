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

import functools
import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, caches, collectives, layers, progress, taps, transformer, tree
from ._autodiff import transforming
from .caches import Branch, Cache, Delta
from .kernels import Part, choice
from .masks import Mask
from .records import ABSENT, Model
from .transformer import Config, Kind, Layer, Params
from .watching import Watch, is_differentiated

SEVERAL = layers.SEVERAL  # vectors at once, at most, whose products are written out
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
FEW = 16  # new tokens, at most, of a step that is compiled; beyond, matrix products are the cost, and they are the library's
DEEPEST = 5  # layers of one compiled function, at most: measured in docs/decisions/a-few-layers-are-one-graph.md


_number = itertools.count()  # of the compiled functions of this process


class Compiled(Model):
    """A Model whose decoding is compiled, and `step`, which is `apply` that takes the past away from its caller.

    step(params, tokens, cache) -> (logits, cache): writes into the tensors of the given past, copying nothing. The given value,
    and every fork that shares its tensors, is gone: using one is an error.
    """

    step: Callable[[Params, Tensor, Any], tuple[Tensor, Any]]
    parts: transformer.Parts


class Rows(NamedTuple):
    """A past of some layers as compiled code reads it: the rows of a bucket, how many count, and the position of the first."""

    k: Tensor  # (layers, K, S, D)
    v: Tensor
    length: Tensor  # int64 ()
    offset: Tensor  # int64 ()

    def of(self, layers: slice) -> "Rows":
        """That of some of the layers."""
        return Rows(self.k[layers], self.v[layers], self.length, self.offset)


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
    stack = _Stack(config, parts.kernel, _depth(config, depth), backend)

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
        return stack.logits(weight, hidden) if _is_plain(weight, hidden) else model.logits(params, hidden)

    def extend(
        params: Params, tokens: Tensor, cache: Any, *, mask: Mask | Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Delta]:
        x, delta = hidden(params, tokens, cache, mask=mask, positions=positions)
        return logits(params, x) if len(x) > 1 else logits(params, x[0])[None], delta

    def apply(params: Params, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if not _is_step(tokens, cache):
            return model.apply(params, tokens, cache)
        proposed, delta = extend(params, tokens, cache)
        return proposed, caches.commit(cache, delta)

    def step(params: Params, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        _check_step(cache)
        proposed, delta = extend(params, tokens, cache)
        after = caches.commit_own(cache, delta, tokens.shape[-1])
        _tail(cache).length.fill_(caches.DONATED)
        return proposed, after

    made = Compiled(model.init, model.cache, hidden, logits, extend, apply)
    made.step, made.parts = step, parts
    return made


def _is_undisturbed() -> bool:
    """Nobody maps, traces or listens, and no kernel or other precision was asked for."""
    if transforming() or torch.compiler.is_compiling() or taps.heard() or choice.current() is not None:
        return False
    if collectives.simulated() or collectives.axis_size(transformer.DATA) > 1:
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


def _is_plain(*trees: Any) -> bool:
    """Nor does anybody differentiate these."""
    return _is_undisturbed() and not (torch.is_grad_enabled() and is_differentiated(tree.leaves(trees)))


def _is_step(tokens: Any, cache: Any) -> bool:
    """A few tokens behind a dense past."""
    return isinstance(tokens, Tensor) and tokens.dim() == 1 and 0 < len(tokens) <= FEW and _is_dense(cache)


def _is_dense(cache: Any) -> bool:
    return isinstance(cache, Cache) or (isinstance(cache, Branch) and _is_dense(cache.prefix) and _is_dense(cache.own))


def _tail(cache: Any) -> Cache:
    """The part of a dense past that is written."""
    return _tail(cache.own) if isinstance(cache, Branch) else cache


def _check_step(cache: Any) -> None:
    if not _is_dense(cache):
        remedy = "Use apply, which takes every kind of past, and no cache away."
        _checks.fail("step", "cache", "a Cache, or a Branch of such", f"a {type(cache).__name__}", remedy, TypeError)
    if transforming() or torch.compiler.is_compiling():
        _checks.fail("step", "the call", "outside of every transform", "one inside", "Use apply: a donation cannot be undone.")


def _depth(config: Config, depth: int | None) -> int:
    if depth is not None and (not isinstance(depth, int) or not 1 <= depth <= config.layers):
        _checks.fail("compile", "depth", f"from 1 to the {config.layers} layers", depth, "Leave it out: None chooses.")
    if depth is not None:
        return depth
    kinds = [config.kind(i) for i in range(config.layers)]
    alike = lambda n: all(kinds[i : i + n] == kinds[:n] for i in range(0, config.layers, n))
    divisors = [n for n in range(1, config.layers + 1) if config.layers % n == 0 and alike(n)]
    several = [n for n in divisors if 1 < n <= DEEPEST] or [n for n in divisors if n <= 2 * DEEPEST][-1:]
    return several[-1] if several else min(DEEPEST, config.layers)


class _Stack:
    """The layers of a decoder as calls of a few compiled functions."""

    def __init__(self, config: Config, kernel: str | None, depth: int, backend: str) -> None:
        self.config, self.kernel, self.depth, self.backend = config, kernel, depth, backend
        self.compiled: dict[Any, _Function] = {}
        self.held: dict[int, _Prepared] = {}  # for each number of vectors

    def forms(self, params: Params, tokens: Tensor, cache: Any) -> "_Prepared | None":
        """What was prepared of the weights for this step, or None where it runs as the model it was made of.

        Remembered as long as it meets the same tensors, unwritten; and not longer than they live.
        """
        few = self.config.kv_heads < collectives.axis_size(
            transformer.TENSOR
        )  # of heads that all hold, each device selects its own
        if few or not _is_step(tokens, cache) or not _is_plain(cache):
            return None
        T, held = len(tokens), self.held
        forms = held.get(T)
        found = None if forms is None else forms.watch.leaves(params)
        if torch.is_grad_enabled() and is_differentiated(tree.leaves(params) if found is None else found):
            return None
        if forms is None or found is None:
            gone = lambda: held.pop(T, None)  # not of self: what is held goes with the model too
            forms = held[T] = _prepared(params, T, Watch(params, gone))
        return forms

    def hidden(self, params: Params, tokens: Tensor, cache: Any, forms: "_Prepared") -> tuple[Tensor, Delta]:
        """`Model.hidden` for a few tokens behind a dense past."""
        config = self.config
        places = transformer.locate(config, tokens, cache)
        pasts = _rows(cache)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        x = transformer.begin(config, params, tokens, places)
        shapes = *(past.k.shape for past in pasts), x.dtype
        if shapes not in forms.runs:
            forms.runs[shapes] = [
                self.function(("layers", self.kinds[part], forms.kinds[part], len(tokens), shapes), _layers) for part in self.parts
            ]
        for part, run in zip(self.parts, forms.runs[shapes], strict=True):
            weights = tuple(layer._replace(**form) for layer, form in zip(params.layers[part], forms.prepared[part], strict=True))
            here = tuple(past.of(part) for past in pasts)
            with torch._C._AutoDispatchBelowAutograd():
                x, k, v = run(config, self.kinds[part], self.kernel, weights, x, places, here)
            keys += k.unbind(0)
            values += v.unbind(0)
        return transformer.finish(config, params, x), Delta(tuple(keys), tuple(values))

    def logits(self, weight: Any, x: Tensor) -> Tensor:
        """`Model.logits` of one vector, or of a few, by the weight of the head."""
        weight = layers.prepare(weight, 1 if x.dim() == 1 else len(x))
        run = self.function(("head", _kind_of(weight), tuple(x.shape), x.dtype), transformer.predict)
        with torch._C._AutoDispatchBelowAutograd():
            return run(self.config, weight, x)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Of the compiler: not to find out by compiling test programs which vector instructions there are.

        The processor has told torch, and the search takes the compiler ten seconds, once for each empty cache.
        """
        known = self.backend == "inductor" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        quick = {"size_asserts": False} if self.backend == "inductor" else {}  # of sizes that Dynamo's guards have seen already
        return {**quick, "cpp.vec_isa_ok": True} if known else quick

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Of all layers."""
        return tuple(self.config.kind(i) for i in range(self.config.layers))

    @functools.cached_property
    def parts(self) -> tuple[slice, ...]:
        """Which layers each call of a compiled function takes."""
        return tuple(slice(first, first + self.depth) for first in range(0, self.config.layers, self.depth))

    def function(self, form: Any, f: Callable[..., Any]) -> "_Function":
        """The compiled f for calls of one form, each with code and a name of its own.

        By code torch counts recompilations, and by name it remembers which sizes have differed. Here only strides may, which follow
        from the capacity of a past: after the second capacity they are symbols.
        """
        if form not in self.compiled:
            name = f"{f.__name__}_{next(_number)}"
            own = FunctionType(f.__code__.replace(co_name=name), f.__globals__, name, f.__defaults__, f.__closure__)
            options = {**self.options, "guard_filter_fn": _guards}
            self.compiled[form] = _Function(torch.compile(own, fullgraph=True, backend=self.backend, options=options))
        return self.compiled[form]


class _Function:
    """A compiled function that says so while it is compiled."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.is_compiled = run, False

    def __call__(self, *args: Any) -> Any:
        if self.is_compiled:
            return self.run(*args)
        with progress.waiting("compiling"):
            result = self.run(*args)
        self.is_compiled = True
        return result


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards are kept: tensors, and what has no name: the state of torch.

    Functions and modules stay what they are, and the rest (types and lengths of records, fields of the configuration) is in the
    form of the call. There are hundreds, which cost a tenth of a step of a small model; and one of them, on the cache in which
    `linear` remembers types, fails at the second call and has everything compiled twice.
    """
    return [not e.name or e.guard_type in ("TENSOR_MATCH", "SHAPE_ENV") or isinstance(e.value, Tensor) for e in entries]


class _Prepared(NamedTuple):
    """Of the layers of a tree: matrices in another form, what tells trees apart by the code they need, and that code."""

    watch: Watch
    prepared: tuple[dict[str, Any], ...]
    kinds: tuple[tuple[Any, ...], ...]
    runs: dict[Any, list[_Function]]


def _prepared(params: Params, T: int, watch: Watch) -> _Prepared:
    """The matrices that products with T vectors want in another form, in it."""
    prepared = []
    for layer in params.layers:
        forms = {name: layers.prepare(getattr(layer, name), T) for name in MATRICES}
        prepared.append({name: form for name, form in forms.items() if form is not getattr(layer, name)})
    kinds = tuple(_kind_of(layer._replace(**form)) for layer, form in zip(params.layers, prepared, strict=True))
    return _Prepared(watch, tuple(prepared), kinds, {})


def _kind_of(weight: Any) -> Any:
    """Of all leaves: a record is another graph than a matrix, and a bias that is there than one that is not."""
    return weight.dtype if isinstance(weight, Tensor) else (type(weight), *map(_kind_of, weight))


def _rows(cache: Any) -> list[Rows]:
    """The dense parts of a past, as far as their buckets reach."""
    flat: list[Cache] = []
    _flatten(cache, flat)
    offset, found = torch.zeros_like(flat[0].length), []
    for part in flat:
        held = int(part.length)
        if held:
            S, whole = caches.bucket(held), caches.capacity(part)
            S = whole if whole <= 2 * S else S  # all of it where that is no more than the next bucket: one graph less
            found.append(Rows(part.k[..., :S, :], part.v[..., :S, :], part.length, offset))
        offset = offset + part.length
    return found


def _flatten(cache: Any, into: list[Cache]) -> None:
    if isinstance(cache, Branch):
        _flatten(cache.prefix, into)
        _flatten(cache.own, into)
    else:
        into.append(cache)


# What is compiled.


def _layers(
    config: Config,
    kinds: Sequence[Kind],
    kernel: str | None,
    weights: Sequence[Layer],
    x: Tensor,
    places: Tensor,
    pasts: Sequence[Rows],
) -> tuple[Tensor, Tensor, Tensor]:
    """Some layers behind each other: the residual, and the keys and values of the new tokens (layers, K, T, D)."""
    keys, values = [], []
    for i, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
        shared = transformer.share(config, kind, places, None, x.dtype, True)
        parts = [_part(past, i, kind, places) for past in pasts]
        x, k, v = transformer.block(config, kind, weight, x, shared, parts, name="", kernel=kernel)
        keys.append(k)
        values.append(v)
    return x, torch.stack(keys), torch.stack(values)


def _part(past: Rows, layer: int, kind: Kind, places: Tensor) -> Part:
    k, v = past.k[layer], past.v[layer]
    remembered = (torch.arange(k.shape[-2], device=k.device) < past.length).unsqueeze(-1)
    v = torch.where(remembered, v, 0)  # 0 * NaN would be NaN
    stop = past.length.reshape(1, 1).expand(len(places), 1)
    start = torch.zeros_like(stop)
    if kind.window is not None:
        start = (places - past.offset - kind.window + 1).clamp(min=0).unsqueeze(-1)
    return Part(k, v, Mask(start, stop))
