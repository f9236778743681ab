"""Replacing functions of torch in existing modules inside a `with`, so that they compose.

What a TorchFunctionMode sees is replaced by it: attention (`sdpa`), activations, losses and
normalizations (`closed_forms`). Other functions are redirected for the time of the `with`
(`redirecting`). Two more call sites are not visible to a mode:

- A backward pass hides the forward that is run again in it, as by a checkpoint of another library:
  the mode runs a copy of the call that starts the backward pass, and stays active.
- The fused inference path of nn.TransformerEncoderLayer does not call the attention function. Eager
  code avoids it while a mode is active, compiled code does not: it is disabled during the context,
  in the whole process.

The mode is per thread, and torch.compile guards on it: code compiled outside is recompiled inside.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from .. import randomness
from ..core import errors
from ..core.replaying import Drawing
from . import checkpointing, closed_forms, flex, mask_preparation, sdpa
from .entry_points import ENTRY_POINTS
from .redirecting import Handler, redirected

PLAIN = {Tensor, torch.nn.Parameter}


@contextlib.contextmanager
def closed(*, key: Tensor | None = None) -> Iterator[None]:
    """Replace functions of torch that do not compose with transforms, in modules of any origin.

    jvp, hvp, hessian, vmap(grad) and every other nesting work, in train and eval, under torch.func,
    in plain forward mode, under `fa.remat` and torch.compile (enter it outside of the compiled
    function). Replaced are:

    - F.scaled_dot_product_attention, also in nn.MultiheadAttention and nn.Transformer*, by
      `fa.attention`, with the whole signature: boolean and floating masks, those of
      torch.nn.attention.bias; dropout_p, is_causal (with attn_mask too: a pair is hidden if either
      hides it, as on torch's CPU path), scale, enable_gqa; jagged NestedTensors (see
      `nested_attention`). Without derivatives torch's kernel is still used. Attention weights are
      dense: need_weights=True computes them as torch does, which composes; only a query whose keys
      are all hidden differs: its weights are zero, and so are its output and derivatives.
    - Activations, losses and normalizations that torch does not differentiate in every nesting, by
      closed forms: F.silu, mish, hardsigmoid, glu, mse_loss, huber_loss, layer_norm and others (see
      interop.closed_forms), where a transform of torch.func or a tangent is active.
    - F.linear and matrix products, whose tangents torch multiplies by zeros (see core.tangents), by
      products of the tangents that exist: the same values.
    - torch.utils.checkpoint (also checkpoint_sequential, and activation checkpointing of
      transformers) by `fa.remat`. Parameters of modules and tensors of closures get their
      derivatives; torch's global generator, and dropout of attention, draw the same in a
      recomputation, which may happen after the `with`. Not replaced, and an error under torch.func,
      is one with a context_fn. The function may not set tensors as attributes of its modules.
    - torch's flex_attention, compiled or not, by `fa.attend` and `fa.kernels.attention_with_score`:
      score_mod, block_mask (of every origin), scale, enable_gqa, return_lse and
      return_aux=AuxRequest(lse=True). Tensors and parameters that the functions capture get their
      derivatives. kernel_options have no effect; torch.compile(flex_attention) runs eagerly, which
      fullgraph=True refuses.
    - Where they are installed flash_attn's flash_attn_func, its packed forms and
      flash_attn_varlen_func, and xformers.ops.memory_efficient_attention, by the same kernels;
      not flash_attn_with_kvcache.
    - Of transformers the preparation of masks: values that vmap maps are not read.

    Modules of these must have been imported before the context. Not replaced are operators of
    torch.ops.aten, and calls from inside the handler of another TorchFunctionMode or from C++.

    Contexts nest. Other threads are not affected, except for the fused inference path of
    nn.Transformer*, which is disabled in all threads until the last context ends. With recomputing
    functions of other libraries, keep the backward pass inside and start it by Tensor.backward,
    torch.autograd.backward or torch.autograd.grad.

    Args:
        key: randomness of attention dropout, int64 (2,). The n-th call with dropout uses
            fold_in(key, n), counted from the start of the context; all rows under vmap drop the
            same. For attention, torch's global generator is never used.

    Raises:
        ValueError: dropout_p > 0 and no key; a checkpoint that reads a tracked tensor which is
            neither an argument, nor in a closure, nor of a module that is found there.
        RuntimeError: dropout_p > 0 in a backward pass, where a recomputation that does not
            remember this context would draw other dropout.

    Example:
        >>> from torch.func import jvp
        >>> attend = torch.nn.MultiheadAttention(8, 2)
        >>> f = lambda x: attend(x, x, x, need_weights=False)[0]
        >>> with closed():
        ...     jvp(f, (torch.ones(3, 8),), (torch.ones(3, 8),))[1].shape
        torch.Size([3, 8])

    Law: values equal torch's, derivatives those of torch's dense path (test_interop.py, PyTorch's
        OpInfo samples), of the formulas (test_closed_forms.py, test_normalizations.py), of the
        function without a checkpoint (test_checkpointing.py), of dense attention (test_flex.py).
    """
    with _context("closed", key):
        yield


@contextlib.contextmanager
def override_sdpa(*, key: Tensor | None = None) -> Iterator[None]:
    """The first name of `closed`, from when attention alone was replaced; the same context.

    Args:
        key: see `closed`.

    Raises:
        ValueError, RuntimeError: see `closed`.
    """
    with _context("override_sdpa", key):
        yield


@contextlib.contextmanager
def _context(door: str, key: Tensor | None) -> Iterator[None]:
    if key is not None and (
        not isinstance(key, Tensor) or key.shape != (2,) or key.is_floating_point()
    ):
        got = errors.shape(key) if isinstance(key, Tensor) else key
        errors.fail(door, "key", "one key, int64 (2,)", got, "Pass funcattn.key(seed).")
    with _replaced(), Override(door, key):
        yield


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    """What no mode sees is replaced, in threads where a context is active."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_fused_inference())
        for function, handler, compiled in _redirections():
            stack.enter_context(redirected(function, _inside(handler), compiled=compiled))
        yield


class Override(Drawing):
    """The mode of `closed`: replaces what torch lets a mode replace, counts draws of dropout."""

    def __init__(self, door: str, key: Tensor | None) -> None:
        super().__init__()
        self.door, self.key = door, key
        self.attend = functools.partial(sdpa.attend, self.draw)
        self.multi_head = sdpa.multi_head(self.attend)
        self.backward = {
            Tensor.backward: sdpa.rebound(Tensor.backward, has_torch_function_unary=sdpa.never),
            torch.autograd.backward: sdpa.rebound(
                torch.autograd.backward, has_torch_function=sdpa.never
            ),
            torch.autograd.grad: sdpa.rebound(torch.autograd.grad, has_torch_function=sdpa.never),
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Called by torch for each of its functions, with this mode disabled."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and set(types) <= PLAIN:
            return self.multi_head(*args, **kwargs)
        if form := closed_forms.closed_form(func, args, kwargs):
            return form(*args, **kwargs)
        if func in self.backward and set(types) <= PLAIN:
            with self:
                return self.backward[func](*args, **kwargs)
        if func is Tensor.requires_grad_ and _is_refused(args[0]):
            return args[0]
        # the one method of Tensor with a super() call, which Dynamo cannot trace
        if func is Tensor.unflatten:
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def replay(self, draws: int, replayed: bool) -> Iterator[None]:
        """See Drawing; the context may have ended."""
        with super().replay(draws, replayed), _replaced():
            yield

    def draw(self, rate: float) -> Tensor | None:
        """The next key of dropout, or None without dropout."""
        if not rate:
            return None
        if self.key is None:
            wanted = f"given, since attention drops weights at a rate of {rate}"
            remedy = f"Say {self.door}(key=fa.key(0)), or module.eval() for no dropout."
            errors.fail(self.door, "key", wanted, None, remedy)
        if (
            not self.replayed
            and not torch.compiler.is_compiling()
            and torch._C._current_graph_task_id() != -1
        ):
            wanted = "0 in a backward pass"
            remedy = (
                "What runs the forward again there would drop other weights: recompute by fa.remat."
            )
            errors.fail(self.door, "dropout_p", wanted, rate, remedy, RuntimeError)
        self.draws += 1
        return randomness.fold_in(self.key, self.draws - 1)


def _is_refused(x: Tensor) -> bool:
    """True for requires_grad_ inside of a transform, from elsewhere than torch.func itself.

    transformers calls it for torch's reentrant checkpoints; torch.func does not need it.
    """
    if torch.compiler.is_compiling() or not _functorch.is_functorch_wrapped_tensor(x):
        return False
    return not _functorch.get_inplace_requires_grad_allowed()


def dropout_key(rate: float) -> Tensor | None:
    """The next key of the innermost active context, or None without dropout."""
    if not rate:
        return None
    return (active() or Override("override_sdpa", None)).draw(rate)


def active() -> Override | None:
    """The innermost active context of this thread."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, Override)), None)


def _redirections() -> Iterator[tuple[Callable[..., Any], Handler, bool]]:
    """Functions that no mode sees, what is called instead, and whether compiled code keeps them.

    A module that was not imported has no callers yet, and importing it takes a second.
    """
    yield torch.utils.checkpoint.checkpoint, checkpointing.checkpoint, False
    for module, name, handler, compiled in (
        ("torch.nn.attention.flex_attention", "flex_attention", flex.flex, False),
        ("transformers.utils.import_utils", "is_tracing", mask_preparation.is_tracing, True),
        ("transformers.masking_utils", "fast_all", mask_preparation.fast_all, True),
        *(
            (module, function.__name__, _drawing(function), False)
            for module, functions in ENTRY_POINTS.items()
            for function in functions
        ),
    ):
        function = getattr(sys.modules.get(module), name, None)  # other versions lack some
        if function is not None:
            yield function, handler, compiled


def _drawing(function: Callable[..., Tensor]) -> Handler:
    """The handler that calls a function of the entry points."""
    return lambda original, args, kwargs: function(dropout_key, *args, **kwargs)


def _inside(handler: Handler) -> Handler:
    """A handler in threads where a context is active; in others the original function."""

    def call(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if active() is None:
            return original(*args, **kwargs)
        return handler(original, args, kwargs)

    return call


_lock = threading.Lock()
_contexts, _fused_before = 0, True


@contextlib.contextmanager
def _no_fused_inference() -> Iterator[None]:
    """Disable the fast path, a flag of the process; the last context of all threads restores it."""
    global _contexts, _fused_before
    with _lock:
        if not _contexts:
            _fused_before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _contexts += 1
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            if not _contexts:
                torch.backends.mha.set_fastpath_enabled(_fused_before)
