"""`Model`: the pure functions that make a decoder, as a value that says what they compute.

    extend(params, tokens, cache) = logits(params, hidden(params, tokens, cache)), and the delta
    apply(params, tokens, cache)  = the logits of extend, and commit(cache, the delta)

A model is four functions, and the two that are made of them here, once for every model. Every verb
(generate, speculate, beam_search, loss, ...) calls these and no others, so a function that
`model._replace(...)` puts in is used by all of them, or refused.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks, caches
from ._doors import door, what_is
from .caches import Delta
from .masks import Mask
from .records import ABSENT

Function = Callable[..., Any]
MADE: Any = None  # what stands for extend and apply until they are made


def composed(hidden: Function, logits: Function) -> tuple[Function, Function]:
    """`extend` and `apply` of hidden and logits."""

    @door
    def extend(
        params: Any,
        tokens: Tensor,
        cache: Any = ABSENT,
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
        x, delta = hidden(params, tokens, cache, **given)
        return logits(params, x), delta

    @door
    def apply(params: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The logits after each new token, and the cache with all of them: extend, then commit.

        Args:
            params: the weights.
            tokens: int64 (T,).
            cache: from `model.cache(size)`, with room for T more; it stays as it was.

        Returns:
            logits (T, V), and a cache of the same kind, T tokens longer. Where a commit did not
            fit inside a transform, which cannot raise, the logits are NaN.
        """
        proposed, delta = extend(params, tokens, cache)
        after = caches.commit(cache, delta)
        if _checks.value(after.length) is None:
            proposed = torch.where(caches.overflowed(after), float("nan"), proposed)
        return proposed, after

    return extend, apply


@dataclass(frozen=True, repr=False)
class Model:
    """Pure functions that make a decoder; what each takes is said by `fa.decoder` and by `help` of it.

        init, cache, hidden, logits = Model(...)'s four       extend, apply are made of them

    `model._replace(hidden=f)` is the model with another function in the place of one of the four.
    Not a record: it holds functions, not tensors, and is passed beside the data.

    Args:
        init: (key) -> params.
        cache: (size, *, kind, dtype) -> an empty cache.
        hidden: (params, tokens, cache=(), *, mask=None, positions=None) -> (x (*lead, T, E), delta).
        logits: (params, x) -> (*lead, V).
        config: the Config that the functions compute; None for a model of another make.
        kernel: of attention, where one is forced.
        replaced: names of the functions that are not those of `fa.decoder(config, kernel)`.
        wrap: f(model) -> model, which makes of another model what this one is (a compiled one).
        code: what `fa.compile` compiled of the decoder, which all that is made of it shares, and which goes with it.
        made: f(hidden, logits) -> (extend, apply).

    Raises:
        TypeError: extend or apply is given.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> louder = model._replace(logits=lambda params, x: 2 * model.logits(params, x))
        >>> tokens = torch.tensor([1, 2, 3])
        >>> bool((louder.extend(params, tokens)[0] == 2 * model.extend(params, tokens)[0]).all())
        True

    Law: a replaced function is used by every verb (test_models.py).
    """

    init: Function
    cache: Function
    hidden: Function
    logits: Function
    extend: Function = field(default=MADE, compare=False)
    apply: Function = field(default=MADE, compare=False)
    config: Any = field(default=None, kw_only=True, compare=False)
    kernel: str | None = field(default=None, kw_only=True, compare=False)
    replaced: frozenset[str] = field(default=frozenset(), kw_only=True, compare=False)
    wrap: Callable[["Model"], "Model"] | None = field(default=None, kw_only=True, compare=False)
    code: dict[Any, Any] = field(default_factory=dict, kw_only=True, compare=False)
    made: Callable[[Function, Function], tuple[Function, Function]] = field(default=composed, kw_only=True)

    FUNCTIONS: ClassVar = ("init", "cache", "hidden", "logits")  # that say what it computes
    _fields: ClassVar = (*FUNCTIONS, "extend", "apply")

    def __post_init__(self) -> None:
        _refuse("Model", [name for name in ("extend", "apply") if getattr(self, name) is not MADE])
        for name in self.FUNCTIONS:
            if not callable(f := getattr(self, name)):
                _checks.fail("Model", name, "a function", what_is(f), "Pass the function itself.", TypeError)
        for name, f in zip(("extend", "apply"), self.made(self.hidden, self.logits), strict=True):
            object.__setattr__(self, name, f)

    def __iter__(self) -> Iterator[Function]:
        """Its six functions: init, cache, hidden, logits, extend, apply."""
        return (getattr(self, name) for name in self._fields)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._fields)})"

    def _replace(self, **functions: Function) -> Any:
        """The model with other functions in the place of init, cache, hidden or logits."""
        _refuse("_replace", [name for name in functions if name not in self.FUNCTIONS])
        made = composed if {"hidden", "logits"} & functions.keys() else self.made
        replaced = self.replaced | functions.keys()
        return dataclasses.replace(self, **functions, extend=MADE, apply=MADE, made=made, replaced=replaced)


def config_of(model: Any, *functions: str) -> Any:
    """The Config that these functions of a model compute, or None where one of them is of another make."""
    if not isinstance(model, Model) or not model.replaced.isdisjoint(functions):
        return None
    return model.config


def told(model: Any) -> str:
    """What stands in the place of a model of `fa.decoder`, for messages."""
    if not isinstance(model, Model) or model.config is None or not model.replaced:
        return f"a {type(model).__name__}"
    return f"a {type(model).__name__} with another {' and '.join(sorted(model.replaced))}"


def _refuse(function: str, names: list[str]) -> None:
    """Fail where something else than the four functions is given."""
    for name in names:
        if name in ("extend", "apply"):
            remedy = (
                "Give hidden and logits, which every verb calls; where there is no hidden state, hidden may return the logits "
                "and logits give them back: logits=lambda params, x: x."
            )
            _checks.fail(function, name, "left to be made of hidden and logits", "one of its own", remedy, TypeError)
        wanted = f"some of {', '.join(Model.FUNCTIONS)}"
        _checks.fail(function, "functions", wanted, repr(name), "They say what a model computes.", TypeError)
