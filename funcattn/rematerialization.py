"""Rematerialization (gradient checkpointing) that nests under torch.func, at every order.

    Remat[f].vjp = Remat[vjp f]      Remat[f].jvp = Remat[jvp f]      Remat[f].vmap = Remat[vmap f]

A rematerialized function saves its inputs and no intermediates; its derivatives are computed from
the inputs, by functions that are rematerialized themselves. So derivatives of any order and nesting
save only inputs. torch.utils.checkpoint uses saved-tensor hooks, which torch.func rejects; and a
backward of plain operations would be recorded by an outer grad, with its intermediates.

What is rematerialized is a `Computation`, which defines its derivatives. `Whole`, a function run at
once, is that of `remat`; kernels.score_mod has another, a function summed over blocks.

Source: Chen et al., Training deep nets with sublinear memory cost, arXiv:1604.06174;
jax.checkpoint is the model of the nesting.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch import eager_transforms
from torch._guards import TracingContext
from torch.autograd import Function
from torch.utils import _pytree as pytree

from . import collectives
from .core import errors
from .core.autograd import (
    Context,
    VmapInfo,
    closed_jvp,
    in_forward_mode,
    is_differentiable,
    is_recorded,
    untraced,
)
from .core.computations import Computation, Whole, exchange
from .core.replaying import State, Watching
from .core.tensor_cache import versions
from .records import describe

# Attributes of a tensor that no derivative depends on: f may read them of a tensor it closes over.
METADATA = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
    ]
    + [
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.stride,
        Tensor.__len__,
        Tensor.is_floating_point,
        torch.is_floating_point,
    ]
    + [Tensor.detach, torch.detach]
)


@dataclass(frozen=True)
class Under:
    """A computation that runs, as do its derivatives, under a fixed state (modes, autocast)."""

    computation: Computation
    state: State

    def __call__(self, *x: Tensor) -> tuple[Tensor, ...]:
        return self.state.run(self.computation, *x)

    def vjp(self, inputs: int, needed: Sequence[int], given: Sequence[int]) -> "Under":
        """See Computation."""
        return replace(self, computation=self.computation.vjp(inputs, needed, given))

    def jvp(self, inputs: int, moved: Sequence[int]) -> "Under":
        """See Computation."""
        return replace(self, computation=self.computation.jvp(inputs, moved))

    def vmap(self, mapped: Sequence[bool], randomness: str) -> "Under":
        """See Computation."""
        return replace(self, computation=self.computation.vmap(mapped, randomness))


@dataclass(frozen=True)
class Guard:
    """Checks in the first run that a function is pure: repeatable, reading only its arguments.

    A closed-over tensor that grad, jvp or vmap tracks would silently be a constant: the function
    runs below the levels of torch.func, which track only its arguments.
    """

    door: str  # for errors: the public function, its argument, and the remedy
    argument: str
    remedy: str
    depth: int  # levels of torch.func outside of the call

    def refuse(self, got: str, remedy: str) -> NoReturn:
        """Raise the error for a function that is not pure."""
        errors.fail(self.door, self.argument, "a pure function of its arguments", got, remedy)

    def run(self, computation: Computation, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """computation(*x), or an error where the function is not pure."""
        before = _traces(x)
        try:
            with _Watch(self, 0):
                out = computation(*x)
        except _OpensALevel:
            with _levels(self.depth), _Watch(self, self.depth):
                out = computation(*x)
        for t in out:
            if _functorch.is_functorch_wrapped_tensor(t) or t.requires_grad:
                self.refuse(f"one that returns a tracked {describe(t)} from outside", self.remedy)
        after = _traces(x)
        if before[0] != after[0]:
            self.refuse("one that writes into an argument", "Return a new tensor instead.")
        if before[1] != after[1]:
            self.refuse(
                "one that draws from torch's global generator",
                "Draw from a key with funcattn.random, and pass the key.",
            )
        return out


class _OpensALevel(Exception):
    """The function opens a level of torch.func, with the number of a level outside of the call.

    Tensors of the two levels cannot be told apart.
    """


class _Watch(Watching):
    """Inspects the arguments of every torch function called from Python.

    `below` dummy levels are open underneath.
    """

    def __init__(self, guard: Guard, below: int) -> None:
        super().__init__()
        self.guard, self.below = guard, below

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.guard.depth and not self.below and _depth():
            raise _OpensALevel
        if func not in METADATA:
            for x in _tensors((*args, *(kwargs or {}).values())):
                if self._is_tracked(x):
                    self.guard.refuse(
                        f"one that reads a tracked {describe(x)} from outside", self.guard.remedy
                    )
        return func(*args, **(kwargs or {}))

    def _is_tracked(self, x: Tensor) -> bool:
        """True for a tensor that autograd records or that is of an outer level.

        The arguments are neither.
        """
        if not _functorch.is_functorch_wrapped_tensor(x):
            return x.requires_grad
        level = _functorch.maybe_get_level(x)
        return 0 < level <= self.below or level > _depth()


class Remat(Function):
    """(computation, guard, *x) -> the outputs of the computation; a guard checks the first run."""

    @staticmethod
    @torch.compiler.disable  # else Dynamo would compile the inside after a fall-back to eager
    def forward(computation: Computation, guard: Guard | None, *x: Tensor) -> tuple[Tensor, ...]:
        x = tuple(t.detach() if t.requires_grad else t for t in x)
        out = computation(*x) if guard is None else guard.run(computation, x)
        # New tensors, also where the function returns an argument, or one tensor twice.
        return tuple(t.view_as(t) for t in out)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.computation = inputs[0]
        ctx.floating = [is_differentiable(t) for t in output]
        ctx.mark_non_differentiable(*[t for t in output if not is_differentiable(t)])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Context, *cotangents: Tensor | None) -> tuple[Any, ...]:
        x = ctx.saved_tensors
        needed = [n for n in range(len(x)) if ctx.needs_input_grad[2 + n]]
        given = [n for n, g in enumerate(cotangents) if g is not None]
        grads: list[Any] = [None] * (2 + len(x))
        if needed and given:
            pulled = Remat.apply(
                ctx.computation.vjp(len(x), needed, given),
                None,
                *x,
                *[cotangents[n] for n in given],
            )
            for n, grad in zip(needed, pulled, strict=True):
                grads[2 + n] = grad
        return tuple(grads)

    @closed_jvp
    def jvp(
        ctx: Context, saved: list[Tensor], _: Any, __: Any, *tangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        moved = [n for n, t in enumerate(tangents) if t is not None]
        pushed = iter(
            Remat.apply(
                ctx.computation.jvp(len(saved), moved), None, *saved, *[tangents[n] for n in moved]
            )
        )
        return tuple(next(pushed) if floating else None for floating in ctx.floating)

    @staticmethod
    def vmap(
        info: VmapInfo,
        in_dims: tuple[Any, ...],
        computation: Computation,
        guard: Guard | None,
        *x: Tensor,
    ) -> tuple[Any, Any]:
        mapped = [d is not None for d in in_dims[2:]]
        first = [t if d is None else t.movedim(d, 0) for t, d in zip(x, in_dims[2:], strict=True)]
        out = Remat.apply(computation.vmap(mapped, info.randomness), guard, *first)
        return out, (0,) * len(out)


def run(
    computation: Computation, x: Sequence[Tensor], *, door: str, argument: str, remedy: str
) -> tuple[Tensor, ...]:
    """Rematerialize a computation, and check that it is pure; the names are for its errors."""
    state = State.of_now({t.device.type for t in x})
    return Remat.apply(Under(computation, state), Guard(door, argument, remedy, _depth()), *x)


def remat(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, saving only its arguments for derivatives: intermediates are recomputed.

    Less memory for more time, at every order and in every nesting of torch.func. Split a long chain
    into segments and rematerialize each: the memory of a gradient is then the inputs of all
    segments and the intermediates of one.

    Args:
        f: a pure function. Arguments and results are trees with tensors of any dtype, of which
            floating ones are differentiated; other leaves are passed through. Everything that a
            derivative or a vmap should track must be an argument, and randomness must come from a
            key: f runs more than once.

    Returns:
        A function with the arguments and results of f. Every run of f is under the state of the
        call: autocast, modes of torch (TorchFunctionMode and TorchDispatchMode, such as a default
        device and `override_sdpa`), and context variables (`kernels.use`, taps, bound axes). In
        compiled code it saves memory where `remat` was called outside of the compiled function, no
        mode is active and no jvp is taken; otherwise it is f.

    Raises:
        ValueError: f reads a closed-over tensor that a derivative or a vmap tracks (it would
            silently be a constant), writes into an argument, or draws from torch's global
            generator.

    Example:
        >>> x = torch.tensor([0.0, 1.0])
        >>> torch.func.hessian(remat(lambda x: (x**3).sum()))(x)
        tensor([[0., 0.],
                [0., 6.]])

    Law: every nesting of grad, jvp and vmap gives what it gives on f
        (test_rematerialization.py::test_every_nesting_is_that_of_f), under modes too
        (test_replaying.py::test_a_mode_of_ones_own_is_active_whenever_f_runs).
    """
    if torch.compiler.is_compiling():
        return f

    def call(*args: object, **kwargs: object) -> Any:
        return _call(f, args, kwargs)

    eagerly = untraced(call)
    # Dynamo must not trace into it: it does not support such a Function.
    opaque = torch._dynamo.nonstrict_trace(call)

    @functools.wraps(f)
    def rematerialized(*args: object, **kwargs: object) -> Any:
        if torch.compiler.is_compiling():
            # A call that Dynamo does not trace would not see modes, which it writes into the graph.
            return (f if torch._C._len_torch_function_stack() else opaque)(*args, **kwargs)
        return eagerly(*args, **kwargs)

    return rematerialized


def _call(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    x = [leaves[n] for n in places]
    # Of the last run: the leaves of the result without tensors, its structure, indices of tensors.
    result: list[Any] = []

    def flat(*x: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(exchange(leaves, places, x), tree)
        returned, form = pytree.tree_flatten(f(*args, **kwargs))
        result[:] = [[() if isinstance(leaf, Tensor) else leaf for leaf in returned], form]
        result.append([n for n, leaf in enumerate(returned) if isinstance(leaf, Tensor)])
        return tuple(returned[n] for n in result[2])

    names = {
        "door": "remat",
        "argument": getattr(f, "__name__", "f"),
        "remedy": "Pass it as an argument, or detach() it before.",
    }
    followed = is_recorded(x)
    # Simulated devices are a vmap, whose level would have another number when f runs again.
    if collectives.simulated():
        return f(*args, **kwargs)
    f = collectives.carried(f)
    if not x or not followed or _forward_mode_is_taken():
        # On torch 2.11 only TracingContext shows that a call is being compiled.
        if torch.compiler.is_compiling() or TracingContext.try_get() is not None:
            # In compiled code a closed-over tensor is a constant too.
            with torch.no_grad(), _Watch(Guard(depth=0, **names), 0):
                flat(*[t.detach() for t in x])
        return f(*args, **kwargs)
    out = run(Whole(flat), x, **names)
    rest, form, where = result
    return pytree.tree_unflatten(exchange(rest, where, out), form)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _depth() -> int:
    """Number of open torch.func levels."""
    return len(_functorch.get_interpreter_stack() or ())


def _forward_mode_is_taken() -> bool:
    """True in a forward-mode level not opened by torch.func.jvp, in which it cannot open another.

    Levels of forward mode are global to the process. Those opened by torch.func.jvp, in any thread,
    are counted in JVP_NESTING and reused.
    """
    if torch.compiler.is_compiling():
        return in_forward_mode()
    return forward_ad._current_level >= 0 and not eager_transforms.JVP_NESTING


@contextlib.contextmanager
def _levels(count: int) -> Iterator[None]:
    """Open `count` dummy levels, so that inner levels have other numbers than outer ones."""
    opened = 0
    try:
        for _ in range(count):
            _functorch._vmap_increment_nesting(1, "same")
            opened += 1
        yield
    finally:
        for _ in range(opened):
            _functorch._vmap_decrement_nesting()


def _traces(x: Sequence[Tensor]) -> tuple[tuple[int, ...], list[bytes]]:
    """Traces of impurity: the versions of tensors, and the states of torch's global generators."""
    if torch.compiler.is_compiling():
        return (), []
    generators = (
        torch.default_generator,
        *(torch.cuda.default_generators if torch.cuda.is_initialized() else ()),
    )
    return versions(x), [generator.get_state().numpy().tobytes() for generator in generators]
