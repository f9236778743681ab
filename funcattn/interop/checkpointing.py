"""torch.utils.checkpoint by `fa.remat`, which nests under torch.func.

torch's checkpoints use saved-tensor hooks, which torch.func refuses, or an autograd Function that
has no forward mode. A rematerialized function has every derivative; what it reads from modules and
closures becomes an argument (see `captured`), and what it draws from torch's global generators is
drawn again in a recomputation, from the states of the first run.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as torchs

from ..core import errors
from ..core.autograd import is_recorded, transforming
from ..core.computations import exchange
from ..rematerialization import remat
from .captured import Captured


def checkpoint(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch.utils.checkpoint.checkpoint(function, *args, **kwargs) by `remat`.

    Its options of memory (early_stop, determinism_check, debug) have no effect.
    """
    options = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
    function, *args_ = args if args else (kwargs.pop("function"),)
    if options.get("context_fn", torchs.noop_context_fn) is not torchs.noop_context_fn:
        if transforming():
            remedy = "Leave it out: everything is recomputed."
            errors.fail("checkpoint", "context_fn", "absent under torch.func", "one", remedy)
        return original(function, *args_, **kwargs, **options)
    leaves, tree = pytree.tree_flatten((args_, kwargs))
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[n] for n in places]
    captured = Captured((function, [() if isinstance(x, Tensor) else x for x in leaves]))
    every = [*tensors, *captured.tensors]
    if not is_recorded(every):
        return function(*args_, **kwargs)
    if any(errors.is_distributed(x) for x in every) and not transforming():
        return original(function, *args_, **kwargs, **options)
    generators = _Generators(every)

    def rerun(tensors: list[Tensor], read: list[Tensor], _: Tensor | None) -> Any:
        with generators.of_the_first_run(), captured.placed(read) as (f, rest):
            args, kwargs = pytree.tree_unflatten(exchange(rest, places, tensors), tree)
            return f(*args, **kwargs)

    rerun.__name__ = f"function {getattr(function, '__name__', type(function).__name__)}"
    out = remat(rerun)(tensors, captured.tensors, _mapped())
    generators.go_on()
    return out


OPTIONS = {
    "use_reentrant",
    "preserve_rng_state",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
}


def _mapped() -> Tensor | None:
    """A zero mapped by every active vmap whose rows draw differently; None without one.

    With it as an argument all runs are mapped, so that the rows of a value and of its derivatives
    draw the same also where the arguments of the value are not mapped.
    """
    level = _functorch.peek_interpreter_stack()
    if level is None:
        return None
    with temporarily_pop_interpreter_stack():
        x = _mapped()
        if level.key() != _functorch.TransformType.Vmap:
            return x
        vmap = _functorch.CVmapInterpreterPtr(level)
        if vmap.randomness() != _functorch.RandomnessType.Different:
            return x
        x = torch.zeros(()) if x is None else x
        return _functorch._add_batch_dim(x.expand(vmap.batchSize()), 0, vmap.level())


class _Generators:
    """The states of torch's global generators, of the CPU and of the devices of some tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = list({x.device: x for x in tensors}.values())
        self.first = self.now()
        self.after: Any = None  # the states after the first run

    def now(self) -> Any:
        return torch.default_generator.get_state(), torchs.get_device_states(*self.tensors)

    def set(self, states: Any) -> None:
        torch.default_generator.set_state(states[0])
        torchs.set_device_states(*states[1], device_type=torchs._infer_device_type(*self.tensors))

    @contextlib.contextmanager
    def of_the_first_run(self) -> Iterator[None]:
        """Draw what the first run draws, and leave the states as they were."""
        before = self.now()
        self.set(self.first)
        try:
            yield
        finally:
            if self.after is None:
                self.after = self.now()
            self.set(before)

    def go_on(self) -> None:
        """Let what follows draw on from the end of the first run."""
        if self.after is not None:
            self.set(self.after)
