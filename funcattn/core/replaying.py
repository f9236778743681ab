"""The state under which a function runs, to run it under the same once more: autocast, modes, values of the context.

torch puts modes aside while it calls an autograd Function under a transform, a backward pass may run after a `with` has ended, and
autograd runs what CUDA computed in a thread of its own.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch

from .context import ContextValue

R = TypeVar("R")


class Watching(TorchFunctionMode):
    """A mode that only looks on: it is no part of the state."""


class Drawing(TorchFunctionMode):
    """A mode that hands out something at each call, such as keys of dropout, and counts how often."""

    draws: int = 0
    replayed: bool = False  # what is drawn is counted from where it was when it was first drawn

    @contextlib.contextmanager
    def replay(self, draws: int, replayed: bool) -> Iterator[None]:
        """Count on from that many inside the `with`; behind it, from where the count was, or is, whichever is more."""
        before = self.draws, self.replayed
        self.draws, self.replayed = draws, replayed
        try:
            yield
        finally:
            self.draws, self.replayed = max(before[0], self.draws), before[1]


@dataclass(frozen=True)  # no tuple: torch looks into those for arguments with functions of their own, as modes are
class State:
    """What was active at a moment: autocast of each device, modes (the innermost last), their counts, and the context."""

    autocast: tuple[tuple[Any, ...], ...]
    functions: tuple[TorchFunctionMode, ...]
    dispatches: tuple[Any, ...]
    draws: tuple[tuple[Drawing, int, bool], ...]  # and whether the count can be that of a first time
    context: contextvars.Context
    values: tuple[tuple[ContextValue[Any], Any], ...]

    @staticmethod
    def of_now(devices: Iterable[str]) -> "State":
        """The state of this moment."""
        able = [d for d in devices if torch.amp.is_autocast_available(d)]
        states = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), torch.is_autocast_cache_enabled()) for d in able]
        modes = tuple(mode for mode in _get_current_function_mode_stack() if not isinstance(mode, Watching))
        forward = torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1  # and not a backward pass
        draws = tuple((mode, mode.draws, forward or mode.replayed) for mode in modes if isinstance(mode, Drawing))
        values = tuple((value, value.get()) for value in ContextValue.every)
        return State(tuple(states), modes, _dispatches(), draws, contextvars.copy_context(), values)

    def run(self, f: Callable[..., R], *x: Any) -> R:
        """f(*x), with all of it as it was."""
        return self.context.copy().run(self._run, f, x)

    def _run(self, f: Callable[..., R], x: Sequence[Any]) -> R:
        with contextlib.ExitStack() as stack:
            for state in self.autocast:
                stack.enter_context(torch.autocast(*state))
            for value, held in self.values:  # for compiled code, which reads those of the thread
                stack.enter_context(value.holding(held))
            for mode in self.dispatches:  # more may be active: what traces or counts this run
                if not any(mode is active for active in _dispatches()):
                    dispatch._push_mode(mode)
                    stack.callback(dispatch._pop_mode)
            for mode, draws, replayed in self.draws:
                stack.enter_context(mode.replay(draws, replayed))
            stack.enter_context(_functions(self.functions))
            return f(*x)


@contextlib.contextmanager
def _functions(modes: tuple[TorchFunctionMode, ...]) -> Iterator[None]:
    """Exactly these modes, above those that look on."""
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


def _dispatches() -> tuple[Any, ...]:
    """The modes below autograd that a user made active; torch's own (fake tensors, tracers) see to themselves."""
    if not torch._C._len_torch_dispatch_stack():
        return ()
    return tuple(mode for mode in dispatch._get_current_dispatch_mode_stack() if getattr(mode, "_mode_key", None) is None)
