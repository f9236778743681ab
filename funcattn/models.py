"""`Model`: the pure functions that make a decoder, as a value that says how it was made.

    extend(params, tokens, cache) = logits(params, hidden(params, tokens, cache)), and the delta
    apply(params, tokens, cache)  = the logits of extend, and commit(cache, delta)

A model is four functions, and the two that are made of them here, once for every model. Every verb
(generate, speculate, beam_search, loss, ...) calls these and no others, so a function that
`model._replace(...)` puts in is used by all of them.

What wraps a model (`fa.compile`, `fa.shard_map`, `fa.sharding.candidates`, `_replace`) is a Model
that holds the other, and knows how to wrap another one alike: `Made`. So a transform of the decoder
at the core, such as compiling it, reaches it through whatever was put around: `at_core`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from . import caches
from .caches import Delta
from .core import errors
from .core.doors import door, made, what_is
from .kernels import Kernel
from .masks import Mask
from .records import ABSENT, is_absent
from .tree import Tree


class KVCache(Protocol):
    """What every kind of cache has; what can be done to one are the verbs of `funcattn.caches`."""

    @property
    def length(self) -> Tensor:
        """How many tokens it holds, int64 ()."""
        ...


Past: TypeAlias = KVCache | tuple[()]  # `()` holds no tokens


class Init(Protocol):
    """Random weights."""

    def __call__(self, key: Tensor, /) -> Tree: ...


class MakeCache(Protocol):
    """An empty cache with room for `size` tokens."""

    def __call__(self, size: int, *, kind: Any = ..., dtype: torch.dtype | None = None) -> KVCache: ...


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
    """Logits (*lead, V) of the residual (*lead, E)."""

    def __call__(self, params: Tree, hidden: Tensor, /) -> Tensor: ...


class Made(NamedTuple):
    """How a model was made: of a Config, or of another model, which it holds.

    name: the call, as it is printed: `candidates(k=3)`.
    again: f(config), or f(model) where one is held -> Model, the same made of another one.
    held: the model that it was made of; None for one that was made of its config.
    replaced: its functions that say something else than those of what it holds.
    """

    name: str
    again: Callable[[Any], "Model"]
    held: "Model | None" = None
    replaced: frozenset[str] = frozenset()


@made
@dataclass(frozen=True, repr=False)
class Model:
    """Pure functions that make a decoder; `fa.decoder` says what each takes, and `help` of it.

        init, cache, hidden, logits = Model(...)'s four       extend, apply are made of them

    `model._replace(hidden=f)` is the model with another function in the place of one of the four.
    Not a record: it holds functions, not tensors, and is passed beside the data.

    Args:
        init: (key) -> params.
        cache: (size, *, kind, dtype) -> an empty cache.
        hidden: (params, tokens, cache=(), *, mask=None, positions=None) -> (x (*lead, T, E),
            delta).
        logits: (params, x) -> (*lead, V).
        commit: what `apply` adds the delta with, where it is another than `fa.commit`.
        config: the Config that the functions compute; None for a model of another make.
        kernel: of attention, where one is forced.
        made: how it was made; None for a model of another make.
        code: what `fa.compile` compiled of the decoder, which all that is made of it shares, and
            which goes with it.

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

    Law: for every wrapper and every verb, the verb of a wrapped model is that of what the wrapper
        says, also where wrappers are composed (test_models.py).
    """

    init: Init
    cache: MakeCache
    hidden: Hidden
    logits: Logits
    _: dataclasses.KW_ONLY
    commit: Callable[[Any, Delta], Any] | None = field(default=None, compare=False)
    config: Any = field(default=None, compare=False)
    kernel: str | Kernel | None = field(default=None, compare=False)
    made: Made | None = field(default=None, compare=False)
    code: dict[Any, Any] = field(default_factory=dict, compare=False)

    FUNCTIONS: ClassVar = ("init", "cache", "hidden", "logits")  # that say what it computes
    _fields: ClassVar = (*FUNCTIONS, "extend", "apply")

    def __post_init__(self) -> None:
        for name in self.FUNCTIONS:
            if not callable(f := getattr(self, name)):
                remedy = "Pass the function itself."
                errors.fail("Model", name, "a function", what_is(f), remedy, TypeError)

    @door
    def extend(
        self,
        params: Any,
        tokens: Tensor,
        cache: Past = ABSENT,
        *,
        mask: Mask | Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Delta]:
        """The logits after each new token, and what they add to the cache, which is only read.

        Args:
            params: the weights.
            tokens: int64 (*lead, T); one sequence (T,) where there is a cache.
            cache: what was read before; `()` is nothing: a plain forward pass.
            mask: which of the new tokens each sees: a `Mask` of T queries or booleans (T, T).
            positions: int64 (*lead, T); by default they go on from the cache.

        Returns:
            logits (*lead, T, V), and the Delta that `fa.commit(cache, delta)` adds.
        """
        given = {"mask": mask, "positions": positions}
        given = {name: value for name, value in given.items() if value is not None}
        x, delta = self.hidden(params, tokens, cache, **given)
        return self.logits(params, x), delta

    @door
    def apply(self, params: Any, tokens: Tensor, cache: Past = ABSENT) -> tuple[Tensor, Any]:
        """The logits after each new token, and the cache with all of them: extend, then commit.

        Args:
            params: the weights.
            tokens: int64 (T,).
            cache: from `model.cache(size)`, with room for T more; it stays as it was. `()` is
                nothing: then the cache that is returned holds these tokens, and has room for no
                more (`fa.caches.grow` makes some).

        Returns:
            logits (T, V), and a cache of the same kind, T tokens longer. Where a commit did not
            fit inside a transform, which cannot raise, the logits are NaN.
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
        """Names of the functions that are not those of `fa.decoder(config, kernel)`."""
        if self.made is None:
            return frozenset(self.FUNCTIONS)
        if self.made.held is None:
            return frozenset()
        return self.made.replaced | self.made.held.replaced

    def wrap(
        self,
        name: str,
        again: Callable[["Model"], "Model"],
        fields: Mapping[str, Any],
        *,
        replaced: Iterable[str] = (),
    ) -> Self:
        """The model with other fields, which holds this one.

        Args:
            name: the call, as it is printed.
            again: f(model) -> Model, what makes of another model what this makes of this one.
            fields: of the model, functions among them.
            replaced: those that say something else than the functions of this one.
        """
        holding = Made(name, again, self, frozenset(replaced))
        return dataclasses.replace(self, made=holding, **fields)

    def _replace(self, **functions: Callable[..., Any]) -> Self:
        """The model with other functions in the place of init, cache, hidden or logits."""
        for name in functions:
            _check_replaceable(name)
        if not functions:
            return self
        named = ", ".join(f"{name}={_named(f)}" for name, f in functions.items())
        again = lambda model: model._replace(**functions)
        return self.wrap(f"_replace({named})", again, functions, replaced=functions)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
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
    """The model with f(core) in the place of the model at its core, which holds no other.

    Law: the wrappers around it say what they said (test_models.py).
    """
    how = model.made
    return f(model) if how is None or how.held is None else how.again(at_core(how.held, f))


def config_of(model: Any, *functions: str) -> Any:
    """The Config that these functions of a model compute; None where one is of another make."""
    if not isinstance(model, Model) or not model.replaced.isdisjoint(functions):
        return None
    return model.config


def told(model: Any) -> str:
    """What stands in the place of a model of `fa.decoder`, for messages."""
    if not isinstance(model, Model) or model.config is None or not model.replaced:
        return f"a {type(model).__name__}"
    return f"a {type(model).__name__} with another {' and '.join(sorted(model.replaced))}"


def written(function: str, *args: Any, **options: Any) -> str:
    """A call as it is printed, of dataclasses the fields that are not their defaults.

    Example:
        >>> from funcattn import Config
        >>> written("decoder", Config(layers=1), kernel="flash")
        "decoder(Config(layers=1), kernel='flash')"
    """
    given = [*map(_written, args), *(f"{name}={_written(x)}" for name, x in options.items())]
    return f"{function}({', '.join(given)})"


def _written(value: Any) -> str:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return _named(value) if callable(value) else repr(value)
    fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    told = {f.name: x for f, x in fields if f.default is dataclasses.MISSING or x != f.default}
    return written(type(value).__name__, **told)


def _named(f: Any) -> str:
    """A function by its name: without the number of its place in memory."""
    return getattr(f, "__qualname__", type(f).__name__)


def _check_replaceable(name: str) -> None:
    if name in ("extend", "apply"):
        remedy = (
            "Give hidden and logits, which every verb calls; where there is no hidden state, hidden "
            "may return the logits and logits give them back: logits=lambda params, x: x."
        )
        wanted = "left to be made of hidden and logits"
        errors.fail("_replace", name, wanted, "one of its own", remedy, TypeError)
    if name not in Model.FUNCTIONS:
        wanted = f"some of {', '.join(Model.FUNCTIONS)}"
        remedy = "They say what a model computes."
        errors.fail("_replace", "functions", wanted, repr(name), remedy, TypeError)
