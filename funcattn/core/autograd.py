"""What torch.func asks of an autograd Function that is to be closed under every transform.

A Function composes at every order when it has `setup_context`, saves the same tensors for backward and forward mode, has a
`vmap` staticmethod written by hand, and calls in its backward and jvp only Functions of its own family. One trap needs help:
torch runs `Function.jvp` with forward mode switched off, so every *outer* jvp level silently becomes zero
(pytorch/pytorch#197867). `closed_jvp` switches it on again, and strips this level's tangents from what was saved, so that
only the outer levels differentiate the rule. tests/test_canaries.py tells when a newer torch mends it.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import optree
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._dynamo.eval_frame import get_eval_frame_callback

if torch.__version__ >= "2.14":  # a TorchVersion, which compares as versions do
    # Imported by the first jvp of a process otherwise, where its use of torch.jit.script is a FutureWarning that users see.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import torch._decomp.decompositions_for_jvp


F = TypeVar("F", bound=Callable[..., Any])


def untraced(f: F) -> F:
    """f, into which Dynamo does not look where a compiled function has fallen back to eager code, as it does under transforms.

    Dynamo would compile the functions that f calls one by one: layouts of one rank for tensors of another, and single loops. Not
    for what a compile is to trace.
    """
    disabled = torch.compiler.disable(f)

    @functools.wraps(f)
    def call(*args: Any, **options: Any) -> Any:
        return (f if get_eval_frame_callback() is None else disabled)(*args, **options)

    return call  # pyright: ignore[reportReturnType]


def closed_jvp(rule: Callable[..., Any]) -> Any:
    """A `jvp` staticmethod from `rule(ctx, saved, *tangents)`, differentiable by the jvp levels outside."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            # Not forward_ad.unpack_dual: its Python-side level is not kept while AOTAutograd replays a graph.
            saved = [torch._VF._unpack_dual(t, level=0)[0] for t in ctx.saved_tensors]
            return rule(ctx, saved, *tangents)

    return staticmethod(jvp)


def transforming() -> bool:
    """True inside grad, vjp, jvp, vmap or functionalize of torch.func, in this thread.

    torch keeps the levels of torch.func for each thread, and one number of forward-mode levels for the whole process, which says
    nothing of this thread's tensors: see `has_tangent`.
    """
    return _functorch.peek_interpreter_stack() is not None


def has_tangent(*trees: Any) -> bool:
    """True where one of the tensors has a tangent of forward mode, at any level."""
    return forward_ad._current_level >= 0 and any(_is_dual(x) for x in _leaves(trees) if is_differentiable(x))


def _is_dual(x: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(x):
        if not _functorch.is_batchedtensor(x) and torch._VF._unpack_dual(x, level=0)[1] is not None:
            return True
        x = _functorch.get_unwrapped(x)
    return torch._VF._unpack_dual(x, level=0)[1] is not None


def is_recorded(*trees: Any) -> bool:
    """True where a transform or a derivative may follow what is computed of these tensors, in this thread.

    That is: inside a transform of torch.func, where autograd records one of them, and where one has a tangent.
    """
    if transforming() or (torch.is_grad_enabled() and any(x.requires_grad for x in _leaves(trees))):
        return True
    return has_tangent(*trees)


def in_forward_mode(*trees: Any) -> bool:
    """True inside a jvp of torch.func, in this thread, and where one of the tensors has a tangent."""
    levels = _functorch.get_interpreter_stack() or ()
    return any(level.key() == _functorch.TransformType.Jvp for level in levels) or has_tangent(*trees)


def is_differentiable(x: Any) -> bool:
    """True for a tensor of numbers that a derivative can be taken of."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _leaves(trees: Iterable[Any]) -> Iterator[Tensor]:
    for tree in trees:
        if isinstance(tree, Tensor):
            yield tree
        elif tree is not None:
            yield from (leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor))


def differentiated(x: Tensor) -> bool:
    """True where a derivative level that can be seen from here follows x: autograd, or grad, vjp, jvp of torch.func.

    False while compiling. A jvp outside another transform may stay unseen: for loud errors, never for what is computed.
    """
    while not torch.compiler.is_compiling():
        if x.requires_grad and (torch.is_grad_enabled() or _functorch.is_gradtrackingtensor(x)):
            return True
        wrapped = _functorch.is_functorch_wrapped_tensor(x)
        if not (wrapped and _functorch.is_batchedtensor(x)) and torch._VF._unpack_dual(x, level=0)[1] is not None:
            return True
        if not wrapped:
            return False
        x = _functorch.get_unwrapped(x)
    return False


def tangent(x: Tensor) -> Tensor | None:
    """The tangent of x at the innermost level of differentiation, where that is one of forward mode; else None.

    It and the primal are differentiable at every level outside. A batch of vmap in between hides it.
    """
    level = _functorch.peek_interpreter_stack()
    if level is None and forward_ad._current_level < 0:
        return None
    if level is not None and level.key() != _functorch.TransformType.Jvp:
        return None
    return torch._VF._unpack_dual(x, level=0)[1]


def primal(x: Tensor) -> Tensor:
    """x without its tangent at that level."""
    return torch._VF._unpack_dual(x, level=0)[0]


def dual(x: Tensor, tangent: Tensor) -> Tensor:
    """x with a tangent at that level."""
    return torch._VF._make_dual(x, tangent, level=0)


def add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum of two derivatives, either of which may be absent, which is zero."""
    return y if x is None else x if y is None else x + y


def sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Undo a broadcast: sum the axes that `like` lacks or has at size one."""
    return x if x.shape == like.shape else x.sum_to_size(like.shape)


def align(in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """For a vmap rule over broadcasting axes: the mapped axis first, size one where a tensor lacks it, ranks made equal."""
    rank = max(x.dim() - (d is not None) for x, d in zip(tensors, in_dims, strict=True))
    out = []
    for x, d in zip(tensors, in_dims, strict=True):
        x = x.unsqueeze(0) if d is None else x.movedim(d, 0)
        out.append(x.reshape(x.shape[0], *([1] * (rank + 1 - x.dim())), *x.shape[1:]))
    return out
