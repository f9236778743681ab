"""Attention of modules that their user did not write, closed for as long as a `with` lasts.

A call of F.scaled_dot_product_attention is found where torch lets one ask: by a TorchFunctionMode. Three places hide from it.

- F.multi_head_attention_forward, inside nn.MultiheadAttention and so inside nn.Transformer*, may itself be overridden: the mode is
  told of that call, and is switched off inside it. So it runs a copy of that function whose globals hold our attention.
- A backward pass hides the forward that torch.utils.checkpoint runs again in it, in the same way: the mode runs a copy of the call
  that began the pass, and stays on.
- The fused inference path of nn.TransformerEncoderLayer never calls attention by name. Eager code leaves it alone while a mode is
  active, compiled code does not: it is switched off for the context, in the whole process.

The mode itself belongs to one thread, and torch.compile guards on it: what was compiled outside is compiled anew inside.
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
from .jagged import nested_attention

_sdpa = F.scaled_dot_product_attention
_multi_head = F.multi_head_attention_forward
PLAIN = {Tensor, torch.nn.Parameter}


@contextlib.contextmanager
def override_sdpa(*, key: Tensor | None = None) -> Iterator[None]:
    """Make the calls of F.scaled_dot_product_attention inside the `with` `fa.attention`: jvp, hvp, hessian, vmap(grad) go through.

    It holds in any module, in train and eval, under torch.func, `fa.remat` and torch.compile (enter it outside of what is
    compiled), for the whole signature: masks of booleans, of numbers, the causal ones of torch.nn.attention.bias; dropout_p,
    is_causal (together with attn_mask too: what either hides is hidden, as on torch's CPU route), scale, enable_gqa; jagged
    NestedTensors (see `nested_attention`). Where no derivative is asked, torch's own kernel still does the work. Attention weights
    are dense by nature: need_weights=True computes them as torch does, which composes already, but for a query whose keys are all
    hidden: its weights are zeros, as its output and its derivatives are.

    What is not a call of that function is left as it is: flash_attn, xformers, torch's flex_attention, operators of
    torch.ops.aten, and a call from inside another TorchFunctionMode's own handler or from C++.

    Contexts nest. Other threads are left as they were, but for the fused inference path of nn.Transformer*, which no thread takes
    before the last context ends. With torch.utils.checkpoint, keep the backward pass inside and begin it by Tensor.backward,
    torch.autograd.backward or torch.autograd.grad: it runs the forward again, which is closed there at first order only; for
    higher orders take `fa.remat`.

    Args:
        key: randomness of attention dropout, int64 (2,). The n-th call that drops weights spends fold_in(key, n), counted from the
            start of the context, and every row of a vmap drops the same. Torch's global generator is never used.

    Raises:
        ValueError: dropout_p > 0 and no key. RuntimeError: dropout_p > 0 in a backward pass, where torch.utils.checkpoint computes
            again what it should not draw again (`fa.remat` draws the same again).

    Example:
        >>> from torch.func import jvp
        >>> attend = torch.nn.MultiheadAttention(8, 2)
        >>> f = lambda x: attend(x, x, x, need_weights=False)[0]
        >>> with override_sdpa():
        ...     jvp(f, (torch.ones(3, 8),), (torch.ones(3, 8),))[1].shape
        torch.Size([3, 8])

    Law: inside, what torch computes and torch's dense route differentiates (test_interop.py, PyTorch's own OpInfo samples).
    """
    if key is not None and (not isinstance(key, Tensor) or key.shape != (2,) or key.is_floating_point()):
        got = errors.shape(key) if isinstance(key, Tensor) else key
        errors.fail("override_sdpa", "key", "one key, int64 (2,)", got, "Pass funcattn.key(seed).")
    with _no_fused_inference(), Override(key):
        yield


class Override(Drawing):
    """The mode of `override_sdpa`: it knows torch's attention when it sees it, and counts how often weights were dropped."""

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.key = key
        self.multi_head = _rebound(
            _multi_head,
            scaled_dot_product_attention=self.attend,
            _check_key_padding_mask=_check_key_padding_mask,
            softmax=_softmax,  # of the weights, where they are asked for
            has_torch_function=_never,  # a default device is a mode too, and would be handed torch's own function
        )
        self.backward = {
            Tensor.backward: _rebound(Tensor.backward, has_torch_function_unary=_never),
            torch.autograd.backward: _rebound(torch.autograd.backward, has_torch_function=_never),
            torch.autograd.grad: _rebound(torch.autograd.grad, has_torch_function=_never),
        }

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch calls this for each of its functions, with the mode itself switched off."""
        kwargs = kwargs or {}
        if func is _sdpa:
            return self.attend(*args, **kwargs)
        if func is _multi_head and set(types) <= PLAIN:
            return self.multi_head(*args, **kwargs)
        if func in self.backward and set(types) <= PLAIN:
            with self:
                return self.backward[func](*args, **kwargs)
        if func is Tensor.unflatten:  # the one method of Tensor with a super() that Dynamo cannot follow
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
                errors.fail("scaled_dot_product_attention", "attn_mask", "None for nested tensors", "a mask", remedy)
            return nested_attention(query, key, value, causal=is_causal, scale=scale, dropout=dropout_p, key=draw)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() < 2:
                errors.fail("scaled_dot_product_attention", name, "(*lead, L, E)", errors.shape(x), f"Try {name}.unsqueeze(0).")
        mask, bias = _visible(attn_mask, is_causal, query, key)
        heads = [x.shape[-3:-2] for x in (query, key, value)]
        if all(heads) and (enable_gqa or heads[0] == heads[1] == heads[2]):
            if heads[1] != heads[2]:  # torch lets key and value share the query heads in groups of different sizes
                key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
            return attention(query, key, value, mask, scale=scale, bias=bias, dropout=dropout_p, key=draw)
        # Any leading axis may be lacking or of size one, that of the heads too: with one more axis they all broadcast.
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
        mask, bias = (x.unsqueeze(-3) if isinstance(x, Tensor) and x.dim() > 2 else x for x in (mask, bias))
        return attention(query, key, value, mask, scale=scale, bias=bias, dropout=dropout_p, key=draw).squeeze(-3)

    def draw(self, rate: float) -> Tensor | None:
        """The next key of dropout, or None where nothing is dropped."""
        if not rate:
            return None
        if self.key is None:
            remedy = "Say override_sdpa(key=fa.key(0)), or module.eval() for no dropout."
            errors.fail("override_sdpa", "key", f"given, since attention drops weights at a rate of {rate}", None, remedy)
        if not self.replayed and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            remedy = "torch.utils.checkpoint runs the forward again there, and would drop other weights: set dropout to zero."
            errors.fail("override_sdpa", "dropout_p", "0 in a backward pass", rate, remedy, RuntimeError)
        self.draws += 1
        return randomness.fold_in(self.key, self.draws - 1)


def dropout_key(rate: float) -> Tensor | None:
    """The next key of the innermost `override_sdpa` around the caller, or None where nothing is dropped."""
    if not rate:
        return None
    modes = torch.overrides._get_current_function_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, Override)), Override(None)).draw(rate)


def _visible(attn_mask: Any, is_causal: bool, query: Tensor, key: Tensor) -> tuple[Any, Tensor | None]:
    """What torch calls attn_mask and is_causal, as a mask and a bias."""
    diagonal = "upper" if is_causal else ""
    if isinstance(attn_mask, Tensor) and type(attn_mask) not in (Tensor, torch.nn.Parameter):
        from torch.nn.attention.bias import CausalBias, CausalVariant  # late: it imports torch.compile's machinery, a second

        if isinstance(attn_mask, CausalBias):
            if is_causal:
                errors.fail(
                    "scaled_dot_product_attention", "is_causal", "False with a CausalBias", True, "The bias says it already."
                )
            diagonal = "lower" if attn_mask.variant == CausalVariant.LOWER_RIGHT else "upper"
            wanted, T, S = (attn_mask.seq_len_q, attn_mask.seq_len_kv), query.shape[-2], key.shape[-2]
            if diagonal == "lower" and wanted != (T, S):
                errors.fail("scaled_dot_product_attention", "attn_mask", f"causal_lower_right({T}, {S})", wanted, "Build it anew.")
            attn_mask = None
    mask, bias = attn_mask, None
    if isinstance(attn_mask, Tensor) and attn_mask.is_floating_point():
        mask, bias = None, attn_mask
    if diagonal:
        here = torch.zeros((), dtype=torch.int64, device=query.device)
        causal = masks.causal(query.shape[-2], key.shape[-2], align=diagonal, offset=here)
        if isinstance(mask, Tensor):  # torch's route on the CPU takes both, and hides what either hides
            mask = mask & causal.dense(key.shape[-2])
        else:
            mask = causal if mask is None else mask & causal
    return mask, bias


def _rebound(function: Any, **others: Any) -> Callable[..., Any]:
    """A copy of a function of torch with others among its globals.

    They have no `__name__`, by which Dynamo would look for them in torch's own module.
    """
    known = {name: value for name, value in function.__globals__.items() if name != "__name__"} | others
    copy = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _never(*_: Any) -> bool:
    """In place of has_torch_function, where the mode was told already."""
    return False


def _check_key_padding_mask(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """Torch's check, in a form that Dynamo can trace."""
    if key_padding_mask.shape != (bsz, src_len):
        raise AssertionError(f"key_padding_mask should be {(bsz, src_len)}, got {tuple(key_padding_mask.shape)}")


def _softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax with zeros, and zero derivatives, for a query whose keys are all hidden: torch's has NaN, also in its gradient."""
    empty = torch.eq(x, float("-inf")).all(dim, keepdim=True)
    return torch.where(empty, 0, torch.where(empty, 0, x).softmax(dim))


_lock = threading.Lock()
_contexts, _fused_before = 0, True


@contextlib.contextmanager
def _no_fused_inference() -> Iterator[None]:
    """The flag is the process's: the first context of all threads takes it, the last gives it back."""
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
