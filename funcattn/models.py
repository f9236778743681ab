"""`Model`: the pure functions of a decoder, as a value that records how it was made.

    extend(params, tokens, cache) = logits(params, hidden(params, tokens, cache)), and the delta
    apply(params, tokens, cache)  = the logits of extend, and commit(cache, delta)

A model is four functions, and two composed of them here. All of funcattn (generate, speculate,
beam_search, loss, ...) calls only these, so a function replaced by `model._replace(...)` is used by
all of it.

A wrapper of a model (`fa.compile`, `fa.shard_map`, `fa.sharding.candidates`, `_replace`) is a Model
with a reference to the inner one and a function that wraps another model alike: `Made`. So a
transform of the innermost decoder, such as compiling it, keeps all wrappers: `at_core`.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from . import caches
from .caches import Delta, KVCache, Past
from .core import errors
from .core.doors import door, made, what_is
from .kernels import Kernel
from .masks import Mask
from .records import ABSENT, is_absent
from .tree import Tree

Hyperparameters: TypeAlias = Any  # a transformer.Config, a module above this one
Code: TypeAlias = dict[Hashable, Any]  # compiled functions of `compilation`, by form of call


class Init(Protocol):
    """Random weights."""

    def __call__(self, key: Tensor, /) -> Tree: ...


class MakeCache(Protocol):
    """An empty cache with room for `size` tokens."""

    def __call__(
        self, size: int, *, kind: Any = ..., dtype: torch.dtype | None = None
    ) -> KVCache: ...


class Hidden(Protocol):
    """The residual (*lead, T, E) after the last norm, and the Delta of the new tokens."""

    def __call__(
        self,
        params: Tree,
        tokens: Tensor,
        cache: Past = ABSENT,
        *,
        mask: Mask | Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Delta]: ...


class Logits(Protocol):
    """Logits (*lead, V) of the residual (*lead, E) after the last norm."""

    def __call__(self, params: Tree, hidden: Tensor, /) -> Tensor: ...


class Made(NamedTuple):
    """How a model was made: of a Config, or of another model.

    name: the call, as it is printed: `candidates(k=3)`.
    again: f(config), or f(model) for a wrapper -> Model, made alike of the argument.
    held: the wrapped model; None for a model made of its config.
    replaced: names of functions that differ from those of the wrapped model.
    """

    name: str
    again: Callable[[Hyperparameters], "Model"]
    held: "Model | None" = None
    replaced: frozenset[str] = frozenset()


@made
@dataclass(frozen=True, repr=False)
class Model:
    """Pure functions of a decoder; `fa.decoder` documents their arguments, as does `help` on each.

        init, cache, hidden, logits = Model(...)'s four       extend, apply are composed of them

    `model._replace(hidden=f)` is the model with one of the four replaced.
    Not a record: it holds functions, not tensors, and is passed beside the data.

    Args:
        init: (key) -> params.
        cache: (size, *, kind, dtype) -> an empty cache.
        hidden: (params, tokens, cache=(), *, mask=None, positions=None) -> (x (*lead, T, E),
            delta).
        logits: (params, x) -> (*lead, V).
        commit: what `apply` commits the delta with; `fa.commit` unless given.
        config: the Config that the functions compute; None for a model not from `fa.decoder`.
        kernel: of attention, where one is forced.
        made: how it was made; None for a model not from `fa.decoder`.
        code: compiled code of the decoder (`fa.compile`), common to all models made of it, and
            freed with them.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config(layers=1))
        >>> params = model.init(fa.key(0))
        >>> louder = model._replace(logits=lambda params, x: 2 * model.logits(params, x))
        >>> tokens = torch.tensor([1, 2, 3])
        >>> bool((louder.extend(params, tokens)[0] == 2 * model.extend(params, tokens)[0]).all())
        True
        >>> fa.sharding.candidates(model, 3)
        Model: candidates(k=3) of decoder(Config(layers=1))

    Law: every function of the library, on a wrapped model, computes with the functions that the
        wrapper defines, also where wrappers are composed (test_models.py).
    """

    init: Init
    cache: MakeCache
    hidden: Hidden
    logits: Logits
    _: dataclasses.KW_ONLY
    commit: Callable[[KVCache, Delta], KVCache] | None = field(default=None, compare=False)
    config: Hyperparameters = field(default=None, compare=False)
    kernel: str | Kernel | None = field(default=None, compare=False)
    made: Made | None = field(default=None, compare=False)
    code: Code = field(default_factory=dict, compare=False)

    FUNCTIONS: ClassVar = ("init", "cache", "hidden", "logits")  # that define the model
    _fields: ClassVar = (*FUNCTIONS, "extend", "apply")

    def __post_init__(self) -> None:
        for name in self.FUNCTIONS:
            if not callable(f := getattr(self, name)):
                remedy = "Pass the function itself."
                errors.fail("Model", name, "a function", what_is(f), remedy, TypeError)

    @door
    def extend(
        self,
        params: Tree,
        tokens: Tensor,
        cache: Past = ABSENT,
        *,
        mask: Mask | Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Delta]:
        """The logits after each new token, and their keys and values; the cache is not modified.

        Args:
            params: the weights.
            tokens: int64 (*lead, T); one sequence (T,) where there is a cache.
            cache: of the tokens before; `()` is none: a plain forward pass.
            mask: attention mask among the new tokens: a `Mask` of T queries or booleans (T, T).
            positions: int64 (*lead, T); by default they continue those of the cache.

        Returns:
            logits (*lead, T, V), and the Delta for `fa.commit(cache, delta)`.
        """
        given = {"mask": mask, "positions": positions}
        given = {name: value for name, value in given.items() if value is not None}
        x, delta = self.hidden(params, tokens, cache, **given)
        return self.logits(params, x), delta

    @door
    def apply(self, params: Tree, tokens: Tensor, cache: Past = ABSENT) -> tuple[Tensor, KVCache]:
        """The logits after each new token, and the cache with these: extend, then commit.

        Args:
            params: the weights.
            tokens: int64 (T,).
            cache: from `model.cache(size)`, with room for T more; it is not modified. `()` is none:
                then the cache returned has these tokens and no room for more; `fa.caches.grow`
                makes room.

        Returns:
            logits (T, V), and a cache of the same kind, T tokens longer. Where a commit did not fit
            inside a transform, which cannot raise, the logits are NaN.
        """
        proposed, delta = self.extend(params, tokens, cache)
        if is_absent(cache):
            if tokens.dim() != 1:
                remedy = "Map over sequences with torch.func.vmap; extend takes leading axes."
                errors.fail("apply", "tokens", "one sequence (T,)", errors.shape(tokens), remedy)
            cache = caches.fork(cache, delta, len(tokens))
        after = (self.commit or caches.commit)(cache, delta)
        if errors.value(after.length) is None:
            proposed = torch.where(caches.overflowed(after), float("nan"), proposed)
        return proposed, after

    @property
    def replaced(self) -> frozenset[str]:
        """Names of the functions that differ from those of `fa.decoder(config, kernel)`."""
        if self.made is None:
            return frozenset(self.FUNCTIONS)
        if self.made.held is None:
            return frozenset()
        return self.made.replaced | self.made.held.replaced

    def wrap(
        self,
        name: str,
        again: Callable[["Model"], "Model"],
        fields: Mapping[str, object],
        *,
        replaced: Iterable[str] = (),
    ) -> Self:
        """A wrapper of this model, with some fields replaced.

        Args:
            name: the call, as it is printed.
            again: f(model) -> Model, the same wrapper of another model.
            fields: the replaced fields of the model, functions among them.
            replaced: names of functions that differ in what they compute.
        """
        holding = Made(name, again, self, frozenset(replaced))
        return dataclasses.replace(self, made=holding, **fields)

    def _replace(self, **functions: Callable[..., Tree]) -> Self:
        """The model with init, cache, hidden or logits replaced."""
        for name in functions:
            _check_replaceable(name)
        if not functions:
            return self
        named = ", ".join(f"{name}={_named(f)}" for name, f in functions.items())
        again = lambda model: model._replace(**functions)
        return self.wrap(f"_replace({named})", again, functions, replaced=functions)

    def __iter__(self) -> Iterator[Callable[..., Tree]]:
        """Its six functions: init, cache, hidden, logits, extend, apply."""
        return (getattr(self, name) for name in self._fields)

    def __repr__(self) -> str:
        names, model = [], self
        while model.made is not None and model.made.held is not None:
            names.append(model.made.name)
            model = model.made.held
        if model.made is not None:
            names.append(model.made.name)
        else:
            names += [f"{name}={_named(getattr(model, name))}" for name in self.FUNCTIONS]
        return f"{type(self).__name__}: {(' of ' if model.made else ', ').join(names)}"


def at_core(model: Model, f: Callable[[Model], Model]) -> Model:
    """The model with its innermost model replaced by f of it.

    Law: the wrappers around it are unchanged (test_models.py).
    """
    how = model.made
    return f(model) if how is None or how.held is None else how.again(at_core(how.held, f))


def config_of(model: object, *functions: str) -> Hyperparameters:
    """The Config that these functions of a model compute; None where one was replaced."""
    if not isinstance(model, Model) or not model.replaced.isdisjoint(functions):
        return None
    return model.config


def told(model: object) -> str:
    """A description of a value given in place of a model of `fa.decoder`, for error messages."""
    if not isinstance(model, Model) or model.config is None or not model.replaced:
        return f"a {type(model).__name__}"
    return f"a {type(model).__name__} with another {' and '.join(sorted(model.replaced))}"


def written(function: str, *args: object, **options: object) -> str:
    """A call as it is printed; of dataclasses, only fields that differ from their defaults.

    Example:
        >>> from funcattn import Config
        >>> written("decoder", Config(layers=1), kernel="flash")
        "decoder(Config(layers=1), kernel='flash')"
    """
    given = [*map(_written, args), *(f"{name}={_written(x)}" for name, x in options.items())]
    return f"{function}({', '.join(given)})"


def _written(value: object) -> str:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return _named(value) if callable(value) else repr(value)
    fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    told = {f.name: x for f, x in fields if f.default is dataclasses.MISSING or x != f.default}
    return written(type(value).__name__, **told)


def _named(f: object) -> str:
    """The name of a function, without its address."""
    return getattr(f, "__qualname__", type(f).__name__)


def _check_replaceable(name: str) -> None:
    if name in ("extend", "apply"):
        remedy = (
            "Give hidden and logits, which every verb calls; where there is no hidden state, "
            "hidden "
            "may return the logits and logits give them back: logits=lambda params, x: x."
        )
        wanted = "left to be made of hidden and logits"
        errors.fail("_replace", name, wanted, "one of its own", remedy, TypeError)
    if name not in Model.FUNCTIONS:
        wanted = f"some of {', '.join(Model.FUNCTIONS)}"
        remedy = "They say what a model computes."
        errors.fail("_replace", "functions", wanted, repr(name), remedy, TypeError)
