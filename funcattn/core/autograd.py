"""Helpers for autograd Functions that are closed under every transform of torch.func.

A Function composes at every order when it has `setup_context`, saves the same tensors for backward
and forward mode, has a hand-written `vmap` staticmethod, and its backward and jvp call only
Functions with these properties. One defect of torch needs a workaround: it runs `Function.jvp` with
forward mode disabled, so every *outer* jvp level silently becomes zero (pytorch/pytorch#197867).
`closed_jvp` enables it again, and removes this level's tangents from the saved tensors, so that
only the outer levels differentiate the rule. tests/test_canaries.py detects when a newer torch
fixes it.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, Protocol, TypeGuard, TypeVar

import optree
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from ..records import Tree

if torch.__version__ >= "2.14":  # a TorchVersion, which compares as versions do
    # Otherwise the first jvp of a process imports it, and users see the FutureWarning of its
    # torch.jit.script.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import torch._decomp.decompositions_for_jvp


A = ParamSpec("A")
R = TypeVar("R")


class Context(Protocol):
    """`ctx` of an autograd Function: what torch gives it, and attributes that its rules set."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors as `saved_tensors` of backward."""

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        """Keep tensors as `saved_tensors` of jvp."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Declare results that have no derivative."""

    def set_materialize_grads(self, value: bool) -> None:
        """False: absent derivatives are None instead of zeros."""

    def __getattr__(self, name: str, /) -> Any: ...
    def __setattr__(self, name: str, value: object, /) -> None: ...


class VmapInfo(Protocol):
    """The first argument of the `vmap` of an autograd Function."""

    @property
    def batch_size(self) -> int:
        """Size of the mapped axis."""
        ...

    @property
    def randomness(self) -> str:
        """The argument `randomness` of vmap: "error", "different" or "same"."""
        ...


def untraced(f: Callable[A, R]) -> Callable[A, R]:
    """f, skipped by Dynamo where a compiled function has fallen back to eager, as under transforms.

    Dynamo would compile the functions that f calls one by one: layouts of one rank for tensors of
    another, and single loops. Not for functions that torch.compile should trace.
    """
    disabled: Any = torch.compiler.disable(f)

    @functools.wraps(f)
    def call(*args: A.args, **options: A.kwargs) -> R:
        return (f if get_eval_frame_callback() is None else disabled)(*args, **options)

    return call


def closed_jvp(rule: Callable[..., object]) -> "staticmethod[..., object]":
    """A `jvp` staticmethod from `rule(ctx, saved, *tangents)`, differentiable at outer levels."""

    def jvp(ctx: Context, *tangents: object) -> object:
        with forward_ad._set_fwd_grad_enabled(True):
            # Not forward_ad.unpack_dual: its Python-side level is not kept while AOTAutograd
            # replays a graph.
            saved = [torch._VF._unpack_dual(t, level=0)[0] for t in ctx.saved_tensors]
            return rule(ctx, saved, *tangents)

    return staticmethod(jvp)


def transforming() -> bool:
    """True inside grad, vjp, jvp, vmap or functionalize of torch.func, in this thread.

    torch keeps the levels of torch.func per thread, but one count of forward-mode levels for the
    whole process, which says nothing about the tensors of this thread: see `has_tangent`.
    """
    return _functorch.peek_interpreter_stack() is not None


def mapped_rows() -> int:
    """How many rows vmap maps over, at all levels together, in this thread; 0 in other transforms.

    0 too outside of torch.func, and in torch.compile.
    """
    levels = _functorch.get_interpreter_stack() or ()
    if torch.compiler.is_compiling() or not levels:
        return 0
    is_vmap = [level.key() == _functorch.TransformType.Vmap for level in levels]
    if not all(is_vmap):
        return 0
    return math.prod(_functorch.CVmapInterpreterPtr(level).batchSize() for level in levels)


def is_jit_traced() -> bool:
    """True inside torch.jit.trace, where sizes are tensors and values become constants."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def has_tangent(*trees: object) -> bool:
    """True where one of the tensors has a forward-mode tangent, at any level."""
    return forward_ad._current_level >= 0 and any(
        _is_dual(x) for x in _leaves(trees) if is_differentiable(x)
    )


def _is_dual(x: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(x):
        if not _functorch.is_batchedtensor(x) and torch._VF._unpack_dual(x, level=0)[1] is not None:
            return True
        x = _functorch.get_unwrapped(x)
    return torch._VF._unpack_dual(x, level=0)[1] is not None


def is_recorded(*trees: object) -> bool:
    """True where transforms or derivatives may apply to results of these tensors, in this thread.

    That is: inside a transform of torch.func, or autograd records one of them, or one has a
    tangent.
    """
    if transforming() or (torch.is_grad_enabled() and any(x.requires_grad for x in _leaves(trees))):
        return True
    return has_tangent(*trees)


def in_forward_mode(*trees: object) -> bool:
    """True inside a jvp of torch.func in this thread, or where one of the tensors has a tangent."""
    levels = _functorch.get_interpreter_stack() or ()
    return any(level.key() == _functorch.TransformType.Jvp for level in levels) or has_tangent(
        *trees
    )


def is_differentiable(x: object) -> "TypeGuard[Tensor]":
    """True for floating and complex tensors."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _leaves(trees: Iterable[Tree]) -> Iterator[Tensor]:
    for tree in trees:
        if isinstance(tree, Tensor):
            yield tree
        elif tree is not None:
            yield from (leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor))


def differentiated(x: Tensor) -> bool:
    """True where x is differentiated at a visible level: autograd, or grad, vjp, jvp of torch.func.

    False in torch.compile. A jvp outside another transform may be invisible: use it to raise
    errors, never to choose what is computed.
    """
    while not torch.compiler.is_compiling():
        if x.requires_grad and (torch.is_grad_enabled() or _functorch.is_gradtrackingtensor(x)):
            return True
        wrapped = _functorch.is_functorch_wrapped_tensor(x)
        if (
            not (wrapped and _functorch.is_batchedtensor(x))
            and torch._VF._unpack_dual(x, level=0)[1] is not None
        ):
            return True
        if not wrapped:
            return False
        x = _functorch.get_unwrapped(x)
    return False


def tangent(x: Tensor) -> Tensor | None:
    """The tangent of x at the innermost level, if that is forward mode; else None.

    It and the primal are differentiable at every outer level. A vmap level in between hides it.
    """
    level = _functorch.peek_interpreter_stack()
    if level is None and forward_ad._current_level < 0:
        return None
    if level is not None and level.key() != _functorch.TransformType.Jvp:
        return None
    return torch._VF._unpack_dual(x, level=0)[1]


def primal(x: Tensor) -> Tensor:
    """x without its tangent at the innermost level."""
    return torch._VF._unpack_dual(x, level=0)[0]


def dual(x: Tensor, tangent: Tensor) -> Tensor:
    """x with a tangent at the innermost level."""
    return torch._VF._make_dual(x, tangent, level=0)


def add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum of two derivatives, where None is zero."""
    return y if x is None else x if y is None else x + y


def sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Undo a broadcast: sum the axes that `like` lacks or has at size one."""
    return x if x.shape == like.shape else x.sum_to_size(like.shape)


def align(in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """For batching rules of broadcasting functions: mapped axes first, ranks made equal.

    Tensors that are not mapped get size one there.
    """
    rank = max(x.dim() - (d is not None) for x, d in zip(tensors, in_dims, strict=True))
    out = []
    for x, d in zip(tensors, in_dims, strict=True):
        x = x.unsqueeze(0) if d is None else x.movedim(d, 0)
        out.append(x.reshape(x.shape[0], *([1] * (rank + 1 - x.dim())), *x.shape[1:]))
    return out
