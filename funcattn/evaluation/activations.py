"""Activations of a model: reading them (trace), and the logits with some of them replaced (patch).

trace    the values at the taps of a forward pass
patch    the logits of a forward pass with some of them replaced
patched  the model that replaces them, for generate and all other functions
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from .. import taps
from ..caches import Delta
from ..core import errors
from ..core.doors import door
from ..masks import Mask
from ..models import Model, Past, written
from ..records import ABSENT
from ..tree import Tree, predicate

Change = Tensor | Callable[[Tensor], Tensor]  # a new activation, or a function of the old one
T = TypeVar("T")
Where = str | Callable[[str], bool] | Iterable[str] | None


@door
def trace(
    model: Model,
    params: Tree,
    tokens: Tensor,
    where: Where = None,
    *,
    cache: Past = ABSENT,
    mask: Mask | Tensor | None = None,
    positions: Tensor | None = None,
    changes: Mapping[str, Change] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a forward pass, and the values at its taps.

    The taps of a decoder are `embedding`, `output` (after the last norm) and in each layer N,
    `layers.N.` and

        attention.{input, q, k, v, mixed, output}     q, k, v after rotation (*lead, H, T, D); mixed
                                                      (*lead, T, H D) before o
        feed_forward.{input, inner, output}           inner (*lead, T, F) before down; with experts
                                                      router (*lead, T, X) in place of it
        output                                        the residual (*lead, T, E) after the layer

    Args:
        model, params: a decoder and its weights, not compiled: taps are silent in compiled code.
        tokens, cache, mask, positions: as in `model.extend`.
        where: which taps: a regular expression that the whole name matches
            (`r"layers\\.\\d+\\.output"`), a function of the name, names, or None for all.
        changes: as in `patch`, applied in the same forward pass: values downstream of a change.

    Returns:
        logits (*lead, T, V), and name -> value, in the order of the computation.

    Raises:
        ValueError: a name that no tap has, or a `where` that selects none.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> logits, seen = trace(model, model.init(fa.key(0)), torch.arange(5),
        ...     r"layers\\.\\d\\.output")
        >>> {name: tuple(value.shape) for name, value in seen.items()}
        {'layers.0.output': (5, 64), 'layers.1.output': (5, 64)}

    Law: a run that is traced is the run
        (test_evaluation.py::test_a_traced_run_has_the_logits_of_the_run).
    """
    chosen, named = _chooser(where)
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        if chosen(name):
            seen[name] = x

    run = lambda: model.extend(params, tokens, cache, mask=mask, positions=positions)[0]
    logits, names = hear("trace", run, dict(changes or {}), keep)
    for name in named:
        if name not in names:
            _unknown("trace", "where", name, names)
    if not seen:
        remedy = f"A whole name must match; there are {len(names)}, such as {', '.join(names[:4])}."
        errors.fail("trace", "where", "such that it chooses some tap", f"none by {where!r}", remedy)
    return logits, seen


@door
def patch(
    model: Model,
    params: Tree,
    tokens: Tensor,
    changes: Mapping[str, Change],
    *,
    cache: Past = ABSENT,
    mask: Mask | Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The logits of a forward pass with some activations replaced (activation patching).

    The gradient of a logit in an activation is
    `grad(lambda x: patch(model, params, tokens, {name: x})[-1, id])(x)`; many patches are vmap; an
    ablation or a steering vector is a function, `{name: lambda x: x + direction}`.

    Args:
        model, params, tokens, cache, mask, positions: as in `trace`.
        changes: name of a tap -> a tensor of the shape and dtype of the activation, or a function
            from the activation to such a tensor.

    Returns:
        logits (*lead, T, V).

    Raises:
        ValueError: a name that no tap has, or another shape. TypeError: another dtype.

    Law: patching what is there changes nothing
        (test_evaluation.py::test_patching_with_what_is_there_changes_nothing).
    Source: Vig et al., Causal mediation analysis for language models, arXiv:2004.12265; Meng et
        al., arXiv:2202.05262 (ROME).
    """
    run = lambda: model.extend(params, tokens, cache, mask=mask, positions=positions)[0]
    return hear("patch", run, dict(changes), lambda name, x: None)[0]


@door
def patched(model: Model, changes: Mapping[str, Change]) -> Model:
    """The model with some activations replaced, for generate, beam_search, the loss, ...

    Its `extend` is `patch`. A change applies to every forward pass, of any number of tokens, so use
    a function of the activation. Tensors in it are arguments like any other: `vmap` over a function
    that generates with `patched(model, {name: lambda x: x + strength * direction})` tries many
    strengths at once, and a score has a gradient in the strength.

    Args:
        model: a decoder. Taps are silent in compiled code, so of a compiled model, and of
            `fa.compile(patched(...))`, the layers run eagerly and only the logits compiled; its
            `explain` says so.
        changes: as in `patch`.

    Raises:
        ValueError, TypeError: as `patch`, when it runs.

    Example:
        >>> import funcattn as fa
        >>> model = fa.decoder(fa.Config())
        >>> params = model.init(fa.key(0))
        >>> without = patched(model, {"layers.1.attention.output": torch.zeros_like})
        >>> fa.generate(fa.key(0), without, params, torch.tensor([1, 2, 3]), steps=4)[0].shape
        torch.Size([4])

    Law: every verb of it is that of a model whose hidden has these changes (test_models.py), and
        maps over strengths (test_activations.py::test_strengths_of_a_steering_vector_are_mapped).
    """
    changes = dict(changes)

    @functools.wraps(model.hidden)
    def hidden(
        params: Tree, tokens: Tensor, cache: Past = ABSENT, **options: Any
    ) -> tuple[Tensor, Delta]:
        outer = taps.listener() or (lambda name, x: x)
        return hear(
            "patched", lambda: model.hidden(params, tokens, cache, **options), changes, outer
        )[0]

    fields = {"hidden": door(hidden)}
    return model.wrap(
        written("patched", *changes), lambda other: patched(other, changes), fields, replaced=fields
    )


def hear(
    door: str,
    run: Callable[[], T],
    changes: Mapping[str, Change],
    keep: Callable[[str, Tensor], Tensor | None],
) -> tuple[T, list[str]]:
    """The result of a run whose taps are changed, then passed to `keep`; and the taps' names."""
    if torch.compiler.is_compiling():
        remedy = (
            "Taps are silent in compiled code: compile what is around, not the model that is "
            "looked into."
        )
        errors.fail(door, "the call", "outside of torch.compile", "one inside", remedy)
    names: dict[str, None] = {}

    def listen(name: str, x: Tensor) -> Tensor:
        names[name] = None
        if name in changes:
            x = _changed(door, name, x, changes[name])
        kept = keep(name, x)
        return x if kept is None else kept

    with taps.listening(listen):
        out = run()
    if not names:
        errors.fail(
            door,
            "model",
            "one with taps",
            "one without",
            "Taps are silent in compiled code: give the model itself, outside of torch.compile.",
        )
    for name in changes:
        if name not in names:
            _unknown(door, "changes", name, list(names))
    return out, list(names)


def _changed(door: str, name: str, x: Tensor, change: Change) -> Tensor:
    other = change if isinstance(change, Tensor) else change(x)
    if not isinstance(other, Tensor) or other.dtype != x.dtype:
        got = getattr(other, "dtype", f"a {type(other).__name__}")
        errors.fail(
            door,
            f"the change of {name}",
            f"a tensor of {x.dtype}",
            got,
            "Convert it: .to(dtype).",
            TypeError,
        )
    if other.shape != x.shape:
        remedy = (
            "Take it from a trace of as many tokens, or change a part: lambda x: x.index_put(...)."
        )
        errors.fail(
            door,
            f"the change of {name}",
            f"{errors.shape(x)} as the activation",
            errors.shape(other),
            remedy,
        )
    return other


def _chooser(where: Where) -> tuple[Callable[[str], bool], tuple[str, ...]]:
    """A predicate of names, and the names that were given explicitly."""
    if where is None:
        return lambda name: True, ()
    if isinstance(where, str):
        matches = predicate("trace", where)
        return lambda name: matches(name, None), ()
    if callable(where):
        return lambda name: bool(where(name)), ()
    named = tuple(where)
    return lambda name: name in named, named


def _unknown(door: str, argument: str, name: str, names: list[str]) -> NoReturn:
    near = difflib.get_close_matches(name, names, 3, 0.6) or names[:3]
    errors.fail(
        door, argument, "names of taps", repr(name), f"Did you mean {' or '.join(map(repr, near))}?"
    )
