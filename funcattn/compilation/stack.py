"""The layers of a decode step as a few calls of compiled functions, or of one C++ operator."""

import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame  # pyright: ignore[reportMissingModuleSource]

from .. import caches, collectives, layers, progress, transformer, tree
from ..caches import Delta, KVCache
from ..core import errors
from ..core.autograd import has_tangent, mapped_rows
from ..core.fingerprints import Fingerprint, is_differentiated
from ..kernels import Kernel, check_remembered, dispatch
from ..layers import Weight, dense_products
from ..models import Code, Past
from ..quantization import tiles
from ..quantization.tiles import Tiles
from ..records import is_absent
from ..transformer import Config, Layer, LayerSpec, Params
from ..tree import Tree
from . import fused
from .compiled import Rows, rows, several
from .conditions import MAX_STEP_TOKENS, is_dense, is_mapped, is_plain, is_plainly_mapped, is_step
from .pasts import codes_in_common, parts_of
from .rotations import Turns

# layers of one compiled function, at most: measured in docs/decisions/a-few-layers-are-one-graph.md
MAX_COMPILED_LAYERS = 5
MOST_HELD = 16  # forms of weights: some numbers of vectors of a target and of its drafter

_number = itertools.count()  # numbers the compiled functions of this process


class Stack:
    """The layers of a decoder, called as a few compiled functions or as one operator."""

    def __init__(
        self,
        config: Config,
        kernel: str | Kernel | None,
        depth: int | None,
        backend: str,
        code: Code,
    ) -> None:
        self.config, self.kernel, self.depth, self.backend = (
            config,
            kernel,
            chosen_depth(config, depth),
            backend,
        )
        self.why_not = transformer.why_not(config)  # why nothing is compiled, or ""
        self.compiled = code  # a _Function for each form of call, common to models of one decoder
        self.turns = Turns(config)
        # T, the number of vectors, and the id of weights -> these prepared
        self.held: dict[tuple[int, int], _Prepared] = {}

    def forms(self, params: Params, tokens: Tensor, cache: Past) -> "_Prepared | None":
        """The weights prepared for this step, or None where the original model runs.

        Cached while the tensors are the same and unmodified, and no longer than these live.
        """
        if self.why_not or self._differs_by_device() or not is_step(tokens, cache):
            return None
        many = mapped_rows()
        if not (is_plainly_mapped(cache) if many else is_plain(cache)):
            return None
        if (many and self.config.follows_length) or not transformer.continues(
            self.config, cast(KVCache, cache), len(tokens)
        ):
            return None
        T, held = len(tokens) * max(many, 1), self.held
        in_codes = not is_dense(cache)
        if many and in_codes and not codes_in_common(cast(KVCache, cache)):
            return None
        alone = many or in_codes or len(tokens) > MAX_STEP_TOKENS  # the operator runs it, or none
        if alone and (T > tiles.MOST_FLOATS or not self._is_served(cast(KVCache, cache))):
            return None
        T = T if T <= MAX_STEP_TOKENS else caches.bucket(T)  # alike to the operator
        key = T, id(params)
        forms = held.get(key)
        found = None if forms is None else forms.fingerprint.leaves(params)
        leaves = tree.leaves(params) if found is None else found
        if (torch.is_grad_enabled() and is_differentiated(leaves)) or has_tangent(params):
            return None
        if forms is None or found is None:
            if many and any(map(is_mapped, leaves)):
                return None
            gone = lambda: held.pop(key, None)  # no reference to self, so that it can be freed
            forms = _prepared(self.config, params, T, Fingerprint(params, gone))
            for oldest in list(held)[: max(0, len(held) + 1 - MOST_HELD)]:
                held.pop(oldest, None)
            held[key] = forms
        return None if alone and forms.fused is None else forms

    def _is_served(self, cache: KVCache) -> bool:
        """True where the operator reads this dense cache, and no kernel is forced."""
        return dispatch.forced(self.kernel) is None and fused.serves(parts_of(cache)[0])

    def _differs_by_device(self) -> bool:
        """True where a device of "tensor" uses other weights than its shard.

        It selects key/value heads of replicated weights, or one device adds a bias for all
        (`transformer.parallel`).
        """
        n, config = collectives.axis_size(transformer.TENSOR), self.config
        return config.kv_heads < n or (n > 1 and bool(config.experts) and config.feed_forward_bias)

    def is_operator(self, params: Params) -> bool:
        """True where a step of these weights is one operator, and nothing waits for a compiler."""
        return (
            not self.why_not
            and dispatch.forced(self.kernel) is None
            and not fused.why_not(self.config, _tiled(params, 1))
        )

    def explain(self, params: Params) -> str:
        """How the layers of a step run with these weights, and why not as the C++ operator."""
        if self.why_not:
            return (
                f"{self.config.layers} layers: as the model itself runs them, nothing compiled: "
                f"{self.why_not}"
            )
        _, ready = _ready(self.config, params, 1)
        kernel = dispatch.forced(self.kernel)
        why = (
            fused.why_not(self.config, ready)
            if kernel is None
            else f"the kernel {kernel.name!r} is forced"
        )
        many = dense_products.explain()
        if not why:
            return f"{len(ready.layers)} layers: one call of the operator funcattn::layers; {many}"
        calls = f"{len(self.parts)} calls of compiled code, {self.depth} layers each"
        return (
            f"{len(ready.layers)} layers: {calls}; not the operator funcattn::layers: {why}; {many}"
        )

    def hidden(
        self,
        params: Params,
        tokens: Tensor,
        cache: Past,
        forms: "_Prepared",
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Delta]:
        """`Model.hidden` of a few tokens behind a dense cache, or one in codes."""
        config, (parts, codes) = self.config, parts_of(cast(KVCache, cache))
        positions = transformer.positions_of(config, tokens, cache, positions)
        weights = forms.fused if self._is_served(cast(KVCache, cache)) else None

        def through(x: Tensor) -> tuple[Tensor, Delta]:
            for part in () if mapped_rows() else parts:
                if int(part.length):
                    check_remembered(part.k, x.dtype)
            if weights is not None:
                turns = self.turns.of(positions)
                return fused.run(config, weights, x, turns, parts, mask, codes)
            return self._compiled(params, x, positions, rows(parts), forms, mask)

        x, delta = transformer.forward_pass(
            config, params, tokens, positions, through, normed=weights is not None
        )
        if mapped_rows():
            x = torch.where(caches.overflowed(cast(KVCache, cache)), float("nan"), x)
        return x, transformer.noted(config, delta, tokens, transformer.length_of(positions))

    def _compiled(
        self,
        params: Params,
        x: Tensor,
        positions: Tensor,
        pasts: Sequence[Rows],
        forms: "_Prepared",
        mask: Tensor | None,
    ) -> tuple[Tensor, Delta]:
        """Run the layers by compiled functions of a few layers each."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        # What is forced is part of the form: the code was traced with it, and has no guard on it.
        kernel = dispatch.forced(self.kernel)
        shapes = *(past.k.shape for past in pasts), x.dtype, kernel, mask is None
        if shapes not in forms.runs:
            forms.runs[shapes] = [
                self.function(
                    ("layers", self.specs[part], forms.kinds[part], len(x), shapes), several
                )
                for part in self.parts
            ]
        for part, run in zip(self.parts, forms.runs[shapes], strict=True):
            weights = tuple(
                layer._replace(**form)
                for layer, form in zip(params.layers[part], forms.prepared[part], strict=True)
            )
            here = tuple(past.of(part) for past in pasts)
            with torch._C._AutoDispatchBelowAutograd():
                x, k, v = run(
                    self.config, self.specs[part], self.kernel, weights, x, positions, here, mask
                )
            keys += k.unbind(0)
            values += v.unbind(0)
        return x, Delta(tuple(keys), tuple(values))

    def logits(self, weight: Weight, x: Tensor) -> Tensor | None:
        """`Model.logits` of some vectors, by the weight of the head.

        None under vmap, and for more than MAX_UNROLLED_VECTORS, where this is not in tiles.
        """
        many = mapped_rows()
        rows = max(many, 1) * (1 if x.dim() == 1 else len(x))
        prepare = fused.prepare if x.dtype == torch.float32 else layers.prepare
        weight = prepare(weight, rows)
        if isinstance(weight, Tiles):  # one call of an operator: nothing to compile
            with torch._C._AutoDispatchBelowAutograd():
                return transformer.predict(self.config, weight, x)
        if many or rows > layers.MAX_UNROLLED_VECTORS:
            return None
        run = self.function(
            ("head", _kind_of(weight), tuple(x.shape), x.dtype), transformer.predict
        )
        with torch._C._AutoDispatchBelowAutograd():
            return run(self.config, weight, x)

    @functools.cached_property
    def options(self) -> dict[str, bool]:
        """Options of the compiler: skip its test programs for vector instructions.

        torch knows the instructions of the processor; the test takes the compiler ten seconds, once
        for each empty cache.
        """
        known = self.backend == "inductor" and torch.backends.cpu.get_cpu_capability() in (
            "AVX2",
            "AVX512",
        )
        # size_asserts: Dynamo's guards have checked the sizes already.
        quick = {"size_asserts": False} if self.backend == "inductor" else {}
        return {**quick, "cpp.vec_isa_ok": True} if known else quick

    @functools.cached_property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The spec of every layer."""
        return tuple(self.config.layer_spec(i) for i in range(self.config.layers))

    @functools.cached_property
    def parts(self) -> tuple[slice, ...]:
        """The layers of each call of a compiled function."""
        return tuple(
            slice(first, first + self.depth) for first in range(0, self.config.layers, self.depth)
        )

    def function(self, form: Hashable, f: Callable[..., Tree]) -> "_Function":
        """The compiled f for one form of call, with a code object and name of its own.

        torch counts recompilations by code object, and records by name which sizes vary. Here only
        strides can, as they depend on the capacity of a cache: at the second capacity they become
        symbols.
        """
        form = self.backend, form
        if form not in self.compiled:
            name = f"{f.__name__}_{next(_number)}"
            own = FunctionType(
                f.__code__.replace(co_name=name), f.__globals__, name, f.__defaults__, f.__closure__
            )
            options = {**self.options, "guard_filter_fn": _guards}
            run = torch.compile(own, fullgraph=True, backend=self.backend, options=options)
            self.compiled[form] = _Function(run, own.__code__)
        return self.compiled[form]


class _Function:
    """A compiled function. It shows progress while compiling; Dynamo's entries go with it."""

    def __init__(self, run: Callable[..., Tree], code: CodeType) -> None:
        self.run, self.is_compiled = run, False
        weakref.finalize(self, _forget, code).atexit = False

    def __call__(self, *args: object) -> Tree:
        if self.is_compiled:
            return self.run(*args)
        with progress.waiting("compiling"):
            result = self.run(*args)
        self.is_compiled = True
        return result


def _forget(code: CodeType) -> None:
    """Free Dynamo's cache entries of a code object.

    Their guards have finalizers on functions, types and modules that live as long as the process,
    which keep the guards alive, and with them the graph and the code (torch 2.13: two megabytes for
    each compiled model).
    """
    made = {id(entry.guard_manager) for entry in eval_frame._debug_get_cache_entry_list(code)}
    registry: Any = weakref.finalize._registry  # pyright: ignore[reportAttributeAccessIssue]
    for finalizer, what in list(registry.items()):
        guards = getattr(getattr(what.func, "func", None), "__self__", None)
        if id(getattr(guards, "guard_manager", None)) in made:
            finalizer.detach()
    eval_frame.reset_code(code)


def _guards(entries: Sequence[Tree]) -> list[bool]:
    """Which of Dynamo's guards to keep: those on tensors, and unnamed ones, on torch's state.

    Functions and modules are constant, and all else (types and lengths of records, fields of
    Config) is in the form of the call. There are hundreds of these guards, a tenth of the time of a
    step of a small model; and one of them, on the cache in which `linear` stores types, fails at
    the second call and would compile everything twice.
    """
    return [
        not e.name or e.guard_type in ("TENSOR_MATCH", "SHAPE_ENV") or isinstance(e.value, Tensor)
        for e in entries
    ]


class _Prepared(NamedTuple):
    """Prepared weights of all layers, their kinds (which determine the code), and that code."""

    fingerprint: Fingerprint
    prepared: tuple[dict[str, Weight], ...]
    kinds: tuple[Hashable, ...]
    runs: dict[Hashable, list[_Function]]
    fused: fused.Weights | None  # where one operator runs all layers


def _prepared(config: Config, params: Params, T: int, fingerprint: Fingerprint) -> _Prepared:
    """Matrices in the form that products with T vectors need."""
    prepared, ready = _ready(config, params, T)
    operator = None if fused.why_not(config, ready) else fused.weights(ready)
    kinds = tuple(map(_kind_of, ready.layers))
    return _Prepared(fingerprint, tuple(prepared), kinds, {}, operator)


def _ready(config: Config, params: Params, T: int) -> tuple[list[dict[str, object]], Params]:
    """The prepared matrices of each layer, and the weights with these."""
    make = fused.prepare if not fused.why_not(config, _tiled(params, T)) else layers.prepare
    forms = [_forms(layer, T, make) for layer in params.layers]
    stack = (layer._replace(**f) for layer, f in zip(params.layers, forms, strict=True))
    return forms, params._replace(layers=tuple(stack))


def _tiled(params: Params, T: int) -> Params:
    """The weights with quantized matrices of layers prepared, and tensors as they are."""
    keep = lambda weight, T: weight if isinstance(weight, Tensor) else layers.prepare(weight, T)
    stack = (layer._replace(**_forms(layer, T, keep)) for layer in params.layers)
    return params._replace(layers=tuple(stack))


def _forms(layer: Layer, T: int, make: Callable[[Weight, int], Weight]) -> dict[str, object]:
    names = fused.MATRICES
    if not is_absent(layer.kv_down):  # k and v are matrices in one way of attention, factors in one
        names = ("q_down", "q", "kv_down", "o", "gate", "up", "down")
    forms = {name: make(getattr(layer, name), T) for name in names}
    return {name: form for name, form in forms.items() if form is not getattr(layer, name)}


def _kind_of(weight: Weight) -> Hashable:
    """The types and dtypes of a weight's leaves, by which graphs differ."""
    if isinstance(weight, Tensor):
        return weight.dtype
    if not isinstance(weight, tuple):
        layers.linear(weight, torch.empty(0))  # which raises
    return type(weight), *map(_kind_of, weight)


def chosen_depth(config: Config, depth: int | None) -> int:
    """Layers of one compiled function: as given, or the largest divisor up to 5.

    Only divisors by which the specs of layers repeat.
    """
    if depth is not None and (not isinstance(depth, int) or not 1 <= depth <= config.layers):
        errors.fail(
            "compile",
            "depth",
            f"from 1 to the {config.layers} layers",
            depth,
            "Leave it out: None chooses.",
        )
    if depth is not None:
        return depth
    specs = [config.layer_spec(i) for i in range(config.layers)]
    alike = lambda n: all(specs[i : i + n] == specs[:n] for i in range(0, config.layers, n))
    divisors = [n for n in range(1, config.layers + 1) if config.layers % n == 0 and alike(n)]
    several = [n for n in divisors if 1 < n <= MAX_COMPILED_LAYERS] or [
        n for n in divisors if n <= 2 * MAX_COMPILED_LAYERS
    ][-1:]
    return several[-1] if several else min(MAX_COMPILED_LAYERS, config.layers)
