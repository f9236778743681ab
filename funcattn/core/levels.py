"""An autograd Function at one level of torch.func, so that a level outside may choose another.

torch applies a Function at every level with one `forward`, and asks forward mode for the tangents
after that. A gradient inside a jvp would so never learn that a tangent follows. Here the Function
is applied at the innermost level, and its forward is a call at the levels outside, which may look.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd.function import Function, _SingleLevelFunction


def is_gradient_inside_jvp() -> bool:
    """True where the innermost level is a gradient of torch.func, and one outside a jvp."""
    *outside, innermost = [x.key() for x in _functorch.get_interpreter_stack() or ()] or [None]
    return innermost == _functorch.TransformType.Grad and _functorch.TransformType.Jvp in outside


def apply_at_level(
    function: type[Function], outside: Callable[..., tuple[Tensor, ...]], *operands: Any
) -> tuple[Tensor, ...]:
    """The results of `outside(*operands)`, with the derivatives of `function` at this level.

    As `function.apply(*operands)`, where the innermost level is a gradient, and `outside` computes
    at the levels outside what `function.forward` computes: torch's own rule with another callee.
    """
    interpreter: Any = retrieve_current_functorch_interpreter()
    operands, _ = interpreter.lift(unwrap_dead_wrappers(operands), {})
    level = interpreter.level()

    def forward(*operands: Any) -> tuple[Tensor, ...]:
        unwrapped = [
            _functorch._unwrap_for_grad(x, level) if isinstance(x, Tensor) else x for x in operands
        ]
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            outputs = outside(*unwrapped)
        return tuple(_functorch._wrap_for_grad(x, level) for x in outputs)

    at_level: Any = type(
        function.__name__,
        (_SingleLevelFunction,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(function.setup_context),
            "backward": staticmethod(function.backward),
        },
    )
    with enable_single_level_autograd_function():
        return at_level.apply(*operands)
