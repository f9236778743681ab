"""Saving the state in which a function runs, to run it again: autocast, modes, context values.

It differs in a recomputation: torch removes modes while it calls an autograd Function under a
transform, a backward pass may run after a `with` has ended, and autograd runs CUDA backward passes
in another thread.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from .context import ContextValue

R = TypeVar("R")


class Watching(TorchFunctionMode):
    """A mode that only observes; it is not part of the state."""


class Drawing(TorchFunctionMode):
    """A mode that produces a value at each call, such as a key of dropout, and counts the calls."""

    draws: int = 0
    replayed: bool = False  # True in a recomputation, which starts from the count of the first run

    @contextlib.contextmanager
    def replay(self, draws: int, replayed: bool) -> Iterator[None]:
        """Set the count inside the `with`; afterwards it is the maximum of both counts."""
        before = self.draws, self.replayed
        self.draws, self.replayed = draws, replayed
        try:
            yield
        finally:
            self.draws, self.replayed = max(before[0], self.draws), before[1]


# not a tuple: torch searches tuples for arguments with __torch_function__, which modes have
@dataclass(frozen=True)
class State:
    """Autocast per device, active modes (innermost last), Drawing counts, context."""

    autocast: tuple[tuple[str, torch.dtype, bool, bool], ...]
    functions: tuple[TorchFunctionMode, ...]
    dispatches: tuple[TorchDispatchMode, ...]
    draws: tuple[tuple[Drawing, int, bool], ...]  # mode, count, and whether the run is a first one
    context: contextvars.Context
    values: tuple[tuple[ContextValue[Any], object], ...]

    @staticmethod
    def of_now(devices: Iterable[str]) -> "State":
        """The current state."""
        able = [d for d in devices if torch.amp.is_autocast_available(d)]
        states = [
            (
                d,
                torch.get_autocast_dtype(d),
                torch.is_autocast_enabled(d),
                torch.is_autocast_cache_enabled(),
            )
            for d in able
        ]
        modes = tuple(
            mode for mode in _get_current_function_mode_stack() if not isinstance(mode, Watching)
        )
        # not in a backward pass
        forward = torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        draws = tuple(
            (mode, mode.draws, forward or mode.replayed)
            for mode in modes
            if isinstance(mode, Drawing)
        )
        values = tuple((value, value.get()) for value in ContextValue.every)
        return State(tuple(states), modes, _dispatches(), draws, contextvars.copy_context(), values)

    def run(self, f: Callable[..., R], *x: object) -> R:
        """f(*x) in this state."""
        return self.context.copy().run(self._run, f, x)

    def _run(self, f: Callable[..., R], x: Sequence[object]) -> R:
        with contextlib.ExitStack() as stack:
            for state in self.autocast:
                stack.enter_context(torch.autocast(*state))
            # for compiled code, which reads the values of the thread
            for value, held in self.values:
                stack.enter_context(value.holding(held))
            for mode in self.dispatches:  # other modes may be active, which trace or count this run
                if not any(mode is active for active in _dispatches()):
                    dispatch._push_mode(mode)
                    stack.callback(dispatch._pop_mode)
            for mode, draws, replayed in self.draws:
                stack.enter_context(mode.replay(draws, replayed))
            stack.enter_context(_functions(self.functions))
            return f(*x)


@contextlib.contextmanager
def _functions(modes: tuple[TorchFunctionMode, ...]) -> Iterator[None]:
    """Activate exactly these modes, above the Watching ones."""
    active = _get_current_function_mode_stack()
    wanted = [*(mode for mode in active if isinstance(mode, Watching)), *modes]
    if len(active) == len(wanted) and all(a is b for a, b in zip(active, wanted, strict=True)):
        yield
        return
    _exchange(len(active), wanted)
    try:
        yield
    finally:
        _exchange(len(wanted), active)


def _exchange(count: int, modes: Iterable[TorchFunctionMode]) -> None:
    for _ in range(count):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def _dispatches() -> tuple[TorchDispatchMode, ...]:
    """The active dispatch modes of the user; torch's (fake tensors, tracers) are left out."""
    if not torch._C._len_torch_dispatch_stack():
        return ()
    return tuple(
        mode
        for mode in dispatch._get_current_dispatch_mode_stack()
        if getattr(mode, "_mode_key", None) is None
    )
