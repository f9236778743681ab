"""Replacing F.scaled_dot_product_attention in existing modules inside a `with`.

Calls are intercepted by a TorchFunctionMode. Three call sites are not visible to it:

- F.multi_head_attention_forward, in nn.MultiheadAttention and nn.Transformer*, is itself
overridable:
  the mode sees that call, and is disabled inside it. So the mode runs a copy of that function whose
  globals hold `fa.attention`.
- A backward pass likewise hides the forward that torch.utils.checkpoint recomputes: the mode runs a
  copy of the call that starts the backward pass, and stays active.
- The fused inference path of nn.TransformerEncoderLayer does not call the attention function. Eager
  code avoids it while a mode is active, compiled code does not: it is disabled during the context,
  in the whole process.

The mode is per thread, and torch.compile guards on it: code compiled outside is recompiled inside.
"""

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks, randomness
from ..core import errors
from ..core.replaying import Drawing
from ..kernels import attention
from ..masks import Mask
from . import closed_forms
from .jagged import nested_attention

_sdpa = F.scaled_dot_product_attention
_multi_head = F.multi_head_attention_forward
PLAIN = {Tensor, torch.nn.Parameter}


@contextlib.contextmanager
def override_sdpa(*, key: Tensor | None = None) -> Iterator[None]:
    """Replace F.scaled_dot_product_attention by `fa.attention`, which composes with transforms.

    jvp, hvp, hessian and vmap(grad) work. It applies to any module, in train and eval, under
    torch.func, `fa.remat` and torch.compile (enter it outside of the compiled function), with the
    whole signature: boolean and floating masks, those of torch.nn.attention.bias; dropout_p,
    is_causal (with attn_mask too: a pair is hidden if either hides it, as on torch's CPU path),
    scale, enable_gqa; jagged NestedTensors (see `nested_attention`). Without derivatives torch's
    kernel is still used. Activations, losses and normalizations that torch does not differentiate
    in every nesting (F.silu, F.mse_loss, F.layer_norm and others) have closed forms under
    torch.func and in forward mode: see interop.closed_forms. Attention weights are dense: need_weights=True computes them as torch
    does, which composes; only a query whose keys are all hidden differs: its weights are zero, and
    so are its output and derivatives.

    Not replaced are flash_attn, xformers, torch's flex_attention, operators of torch.ops.aten, and
    calls from inside the handler of another TorchFunctionMode or from C++.

    Contexts nest. Other threads are not affected, except for the fused inference path of
    nn.Transformer*, which is disabled in all threads until the last context ends. With
    torch.utils.checkpoint, keep the backward pass inside and start it by Tensor.backward,
    torch.autograd.backward or torch.autograd.grad: it recomputes the forward, which composes there
    at first order only; for higher orders use `fa.remat`.

    Args:
        key: randomness of attention dropout, int64 (2,). The n-th call with dropout uses
            fold_in(key, n), counted from the start of the context; all rows under vmap drop the
            same. torch's global generator is never used.

    Raises:
        ValueError: dropout_p > 0 and no key. RuntimeError: dropout_p > 0 in a backward pass, where
            torch.utils.checkpoint would draw other dropout in the recomputation (`fa.remat` draws
            the same).

    Example:
        >>> from torch.func import jvp
        >>> attend = torch.nn.MultiheadAttention(8, 2)
        >>> f = lambda x: attend(x, x, x, need_weights=False)[0]
        >>> with override_sdpa():
        ...     jvp(f, (torch.ones(3, 8),), (torch.ones(3, 8),))[1].shape
        torch.Size([3, 8])

    Law: values equal torch's, derivatives those of torch's dense path (test_interop.py, PyTorch's
        OpInfo samples).
    """
    if key is not None and (
        not isinstance(key, Tensor) or key.shape != (2,) or key.is_floating_point()
    ):
        got = errors.shape(key) if isinstance(key, Tensor) else key
        errors.fail("override_sdpa", "key", "one key, int64 (2,)", got, "Pass funcattn.key(seed).")
    with _no_fused_inference(), Override(key):
        yield


class Override(Drawing):
    """The mode of `override_sdpa`: intercepts torch's attention, counts draws of dropout."""

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.key = key
        self.multi_head = _rebound(
            _multi_head,
            scaled_dot_product_attention=self.attend,
            _check_key_padding_mask=_check_key_padding_mask,
            softmax=_softmax,  # of the weights, if they are requested
            # a default device is a mode too, and would get torch's function
            has_torch_function=_never,
        )
        self.backward = {
            Tensor.backward: _rebound(Tensor.backward, has_torch_function_unary=_never),
            torch.autograd.backward: _rebound(torch.autograd.backward, has_torch_function=_never),
            torch.autograd.grad: _rebound(torch.autograd.grad, has_torch_function=_never),
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Called by torch for each of its functions, with this mode disabled."""
        kwargs = kwargs or {}
        if func is _sdpa:
            return self.attend(*args, **kwargs)
        if func is _multi_head and set(types) <= PLAIN:
            return self.multi_head(*args, **kwargs)
        if form := closed_forms.closed_form(func, args, kwargs):
            return form(*args, **kwargs)
        if func in self.backward and set(types) <= PLAIN:
            with self:
                return self.backward[func](*args, **kwargs)
        # the one method of Tensor with a super() call, which Dynamo cannot trace
        if func is Tensor.unflatten:
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | Mask | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`fa.attention` in the signature of F.scaled_dot_product_attention."""
        draw = self.draw(dropout_p)
        if query.is_nested or key.is_nested or value.is_nested:
            if attn_mask is not None:
                remedy = "Documents see themselves alone; is_causal is there."
                errors.fail(
                    "scaled_dot_product_attention",
                    "attn_mask",
                    "None for nested tensors",
                    "a mask",
                    remedy,
                )
            return nested_attention(
                query, key, value, causal=is_causal, scale=scale, dropout=dropout_p, key=draw
            )
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() < 2:
                errors.fail(
                    "scaled_dot_product_attention",
                    name,
                    "(*lead, L, E)",
                    errors.shape(x),
                    f"Try {name}.unsqueeze(0).",
                )
        mask, bias = _visible(attn_mask, is_causal, query, key)
        heads = [x.shape[-3:-2] for x in (query, key, value)]
        if all(heads) and (enable_gqa or heads[0] == heads[1] == heads[2]):
            if heads[1] != heads[2]:  # torch allows groups of different sizes for key and value
                key, value = (
                    x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value)
                )
            return attention(
                query, key, value, mask, scale=scale, bias=bias, dropout=dropout_p, key=draw
            )
        # Any leading axis may be missing or of size one, heads too: with one more axis all
        # broadcast.
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
        mask, bias = (
            x.unsqueeze(-3) if isinstance(x, Tensor) and x.dim() > 2 else x for x in (mask, bias)
        )
        return attention(
            query, key, value, mask, scale=scale, bias=bias, dropout=dropout_p, key=draw
        ).squeeze(-3)

    def draw(self, rate: float) -> Tensor | None:
        """The next key of dropout, or None without dropout."""
        if not rate:
            return None
        if self.key is None:
            remedy = "Say override_sdpa(key=fa.key(0)), or module.eval() for no dropout."
            errors.fail(
                "override_sdpa",
                "key",
                f"given, since attention drops weights at a rate of {rate}",
                None,
                remedy,
            )
        if (
            not self.replayed
            and not torch.compiler.is_compiling()
            and torch._C._current_graph_task_id() != -1
        ):
            remedy = (
                "torch.utils.checkpoint runs the forward again there, and would drop other "
                "weights: set dropout to zero."
            )
            errors.fail(
                "override_sdpa", "dropout_p", "0 in a backward pass", rate, remedy, RuntimeError
            )
        self.draws += 1
        return randomness.fold_in(self.key, self.draws - 1)


def dropout_key(rate: float) -> Tensor | None:
    """The next key of the innermost active `override_sdpa`, or None without dropout."""
    if not rate:
        return None
    modes = torch.overrides._get_current_function_mode_stack()
    return next(
        (mode for mode in reversed(modes) if isinstance(mode, Override)), Override(None)
    ).draw(rate)


def _visible(
    attn_mask: Tensor | Mask | None, is_causal: bool, query: Tensor, key: Tensor
) -> tuple[Any, Tensor | None]:
    """attn_mask and is_causal of torch as a mask and a bias."""
    diagonal = "upper" if is_causal else ""
    if isinstance(attn_mask, Tensor) and type(attn_mask) not in (Tensor, torch.nn.Parameter):
        # imported here since it takes a second: it imports torch.compile
        from torch.nn.attention.bias import CausalBias, CausalVariant

        if isinstance(attn_mask, CausalBias):
            if is_causal:
                errors.fail(
                    "scaled_dot_product_attention",
                    "is_causal",
                    "False with a CausalBias",
                    True,
                    "The bias says it already.",
                )
            diagonal = "lower" if attn_mask.variant == CausalVariant.LOWER_RIGHT else "upper"
            wanted, T, S = (
                (attn_mask.seq_len_q, attn_mask.seq_len_kv),
                query.shape[-2],
                key.shape[-2],
            )
            if diagonal == "lower" and wanted != (T, S):
                errors.fail(
                    "scaled_dot_product_attention",
                    "attn_mask",
                    f"causal_lower_right({T}, {S})",
                    wanted,
                    "Build it anew.",
                )
            attn_mask = None
    mask, bias = attn_mask, None
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        mask, bias = None, attn_mask
    if diagonal:
        here = torch.zeros((), dtype=torch.int64, device=query.device)
        causal = masks.causal(query.shape[-2], key.shape[-2], align=diagonal, offset=here)
        # torch's CPU path takes both; a pair is hidden if either hides it
        if isinstance(mask, Tensor):
            mask = mask & causal.dense(key.shape[-2])
        else:
            mask = causal if mask is None else mask & causal
    return mask, bias


def _rebound(function: Callable[..., Any], **others: object) -> Callable[..., Any]:
    """A copy of a torch function with some globals replaced.

    Its globals have no `__name__`, by which Dynamo would look names up in torch's module.
    """
    known = {
        name: value for name, value in function.__globals__.items() if name != "__name__"
    } | others
    copy = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(*_: object) -> bool:
    """In place of has_torch_function, since the mode has intercepted the call already."""
    return False


def _check_key_padding_mask(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """Torch's check, in a form that Dynamo can trace."""
    if key_padding_mask.shape != (bsz, src_len):
        raise AssertionError(
            f"key_padding_mask should be {(bsz, src_len)}, got {tuple(key_padding_mask.shape)}"
        )


def _softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax with zeros and zero derivatives for a row of -inf, where torch's gives NaN."""
    empty = torch.eq(x, float("-inf")).all(dim, keepdim=True)
    return torch.where(empty, 0, torch.where(empty, 0, x).softmax(dim))


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
