"""The public functions of attention: check the arguments once, then run the chosen kernel."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import untraced
from ..core.doors import door as public
from ..masks import Mask
from ..records import Attended
from . import dispatch, reference
from .backends import layout
from .dispatch import Explanation
from .request import Kernel, Request


@public
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    kernel: str | Kernel | None = None,
) -> Attended:
    """Attention, with the log-sum-exp of each row of logits.

        S_ij = scale q_i . k_j + bias_ij
        lse_i = log sum_j exp S_ij        out_i = sum_j exp(S_ij - lse_i) v_j

    Softmax is invariant to a constant added to a row: value and derivatives are exact whatever the
    magnitude of the logits.

    Args:
        q: (*lead, H, T, D) queries, any floating dtype.
        k: (*lead, K, S, D) keys, with H % K == 0 (K = H multi-head, K = 1 multi-query, between them
            grouped).
        v: (*lead, K, S, Dv) values.
        mask: a `Mask` (*lead, T, n), or booleans that broadcast to (*lead, H, T, S), True where the
            query sees the key.
        scale: factor of the logits, a number or a 0-d tensor; None is 1 / sqrt(D).
        bias: floating, broadcasts to (*lead, H, T, S), added to the logits in the wider dtype of
            the two; -inf hides a key, finite numbers hide none, finfo.min included.
        kernel: None chooses; a name or a custom `Kernel` forces one (see `explain`).

    Returns:
        Attended(out (*lead, H, T, Dv) in the dtype of v, lse (*lead, H, T) in float32 at least). A
        query that sees no key has out = 0 and lse = -inf, with zero derivatives. A key that a query
        does not see changes no output or derivative of that query, even if it is NaN.

    Raises:
        ValueError: sizes that do not fit. TypeError: dtypes, or kinds of mask, that do not.

    Example:
        >>> q = k = v = torch.ones(1, 2, 4)
        >>> attend(q, k, v).out.shape
        torch.Size([1, 2, 4])

    Law: `merge` of attention over disjoint keys is attention over their union
        (test_kernels.py::test_merge_of_any_split_is_the_whole). A constant added to a row of logits
        changes nothing
        (test_torch_blocks.py::test_the_level_of_a_row_changes_no_value_and_no_gradient), nor does a
        key that is not seen
        (test_unseen.py::test_what_no_query_sees_reaches_no_value_tangent_or_gradient).
    """
    request = _request("attend", q, k, v, mask, scale, bias, wants_lse=True)
    return _run(request, dispatch.choose(request, kernel))


@public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    key: Tensor | None = None,
    kernel: str | Kernel | None = None,
) -> Tensor:
    """Attention, the output alone: `attend(...).out`.

        S_ij = scale q_i . k_j + bias_ij        out_i = sum_j softmax_j(S_i) v_j

    Composes with every transform of torch.func, at every order and in every nesting.

    Args:
        q: (*lead, H, T, D) queries, any floating dtype.
        k: (*lead, K, S, D) keys, with H % K == 0 (K = H multi-head, K = 1 multi-query, between them
            grouped).
        v: (*lead, K, S, Dv) values.
        mask: a `Mask` (*lead, T, n), or booleans that broadcast to (*lead, H, T, S), True where the
            query sees the key.
        scale: factor of the logits, a number or a 0-d tensor; None is 1 / sqrt(D).
        bias: floating, broadcasts to (*lead, H, T, S), added to the logits in the wider dtype of
            the two; -inf hides a key.
        dropout: rate in [0, 1) at which weights are dropped; the others are divided by 1 - dropout.
        key: randomness of the dropout, int64 (2,); the same key drops the same (head, query, key)
            in every kernel and transform.
        kernel: None chooses; a name or a custom `Kernel` forces one (see `explain`).

    Returns:
        (*lead, H, T, Dv) in the dtype of v; zeros, with zero derivatives, for a query that sees no
        key.

    Raises:
        ValueError: sizes that do not fit, a rate outside [0, 1).
        TypeError: dtypes, or kinds of mask, that do not fit; dropout without a key.

    Example:
        >>> from funcattn import masks
        >>> q = k = v = torch.ones(1, 2, 4)
        >>> attention(q, k, v, masks.causal(2)).shape
        torch.Size([1, 2, 4])

    Law: derivatives are those of the dense formula (test_flash.py::test_every_nesting_is_exact).
    """
    request = _request("attention", q, k, v, mask, scale, bias, dropout=dropout, key=key)
    return _run(request, dispatch.choose(request, kernel)).out


@public
def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The attention weights as a dense tensor, for plots.

    Args:
        q: (*lead, H, T, D) queries, any floating dtype.
        k: (*lead, K, S, D) keys, with H % K == 0.
        mask, scale, bias: as in `attend`.

    Returns:
        (*lead, H, T, S), in float32 at least. Rows sum to one, or to zero where a query sees no key.

    Raises:
        ValueError, TypeError: as `attend`.

    Example:
        >>> from funcattn import masks
        >>> attention_weights(torch.ones(1, 2, 4), torch.ones(1, 2, 4), masks.causal(2))
        tensor([[[1.0000, 0.0000],
                 [0.5000, 0.5000]]])
    """
    r = _request("attention_weights", q, k, k, mask, scale, bias)
    with no_autocast(r.q):
        return reference.weigh(r.q, r.k, r.mask, scale=r.scale, bias=r.bias)


@public
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    kernel: str | Kernel | None = None,
) -> Explanation:
    """Why each kernel can or cannot run `attention` on these inputs, and which one is chosen.

    Args:
        q, k, v, mask, scale, bias, kernel: as in `attention`.

    Returns:
        An Explanation, which prints as a table; `chosen` is the name of the kernel that would run.

    Raises:
        ValueError, TypeError: as `attention`.

    Example:
        >>> q = torch.ones(1, 2, 4)
        >>> explain(q, q, q, kernel="flash").chosen
        'flash'
    """
    return Explanation(dispatch.verdicts(_request("explain", q, k, v, mask, scale, bias), kernel))


def _run(r: Request, kernel: Kernel) -> Attended:
    with no_autocast(r.q):
        found = kernel.run(r) if torch.compiler.is_compiling() else _untraced(kernel, r)
    return found if dispatch.is_registered(kernel) else _given(kernel, r, found)


@untraced
def _untraced(kernel: Kernel, r: Request) -> Attended:
    if dispatch.is_registered(kernel):
        return kernel.run(r)
    with dispatch.unforced():  # attention inside of a custom kernel is chosen anew, not that kernel again
        return kernel.run(r)


def _given(kernel: Kernel, r: Request, found: Attended) -> Attended:
    """The result of a custom kernel, checked to be an Attended of the expected shapes."""
    if not isinstance(found, Attended) or not isinstance(found.out, Tensor):
        wanted, remedy = "to return Attended(out, lse)", "Make one: fa.records.Attended(out, lse)."
        errors.fail("attention", f"kernel {kernel.name!r}", wanted, f"a {type(found).__name__}", remedy, TypeError)
    shape = (*r.lead, *r.q.shape[-3:-1], r.v.shape[-1])
    checked = {"out": (found.out, shape)} | ({"lse": (found.lse, shape[:-1])} if r.wants_lse else {})
    for name, (x, wanted) in checked.items():
        if not isinstance(x, Tensor) or tuple(x.shape) != wanted:
            got = errors.shape(x) if isinstance(x, Tensor) else repr(x)
            remedy = 'Say in why_not what it cannot run, as "no log-sum-exp" where r.wants_lse.'
            errors.fail("attention", f"kernel {kernel.name!r}", f"to return {name} {wanted}", got, remedy)
    if found.out.dtype != r.v.dtype:
        wanted, remedy = f"to return out in {r.v.dtype} as v is", "Cast it: out.to(r.v.dtype)."
        errors.fail("attention", f"kernel {kernel.name!r}", wanted, found.out.dtype, remedy, TypeError)
    return found


def no_autocast(q: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast: operations keep their inputs' dtypes, statistics are float32."""
    return torch.autocast(q.device.type, enabled=False) if _is_under_autocast(q) else contextlib.nullcontext()


def _is_under_autocast(q: Tensor) -> bool:
    return q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)


def _request(
    door: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    scale: float | Tensor | None,
    bias: Tensor | None,
    *,
    dropout: float = 0.0,
    key: Tensor | None = None,
    wants_lse: bool = False,
) -> Request:
    if isinstance(q, Tensor) and _is_under_autocast(q):  # as torch's own attention does
        narrow = torch.get_autocast_dtype(q.device.type)
        cast = lambda x: x.to(narrow) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        q, k, v = cast(q), cast(k), cast(v)
    for name, x, letters in (("q", q, "(*lead, H, T, D)"), ("k", k, "(*lead, K, S, D)"), ("v", v, "(*lead, K, S, Dv)")):
        if not isinstance(x, Tensor):
            errors.fail(door, name, f"a tensor {letters}", f"a {type(x).__name__}", "Pass torch tensors.", TypeError)
        if x.is_nested:
            remedy = "Attend over jagged ones by fa.interop.nested_attention, or pad them and mask by fa.masks.padding."
            errors.fail(door, name, f"a tensor {letters}", "a nested tensor", remedy, TypeError)
        if x.dim() < 3:
            errors.fail(door, name, letters, errors.shape(x), f"Give a single head an axis of its own: {name}.unsqueeze(-3).")
        if not x.is_floating_point():
            errors.fail(door, name, "floating", x.dtype, f"Convert it: {name}.float().", TypeError)
        if x.dtype != q.dtype:
            errors.fail(door, name, f"{q.dtype} as q is", x.dtype, f"Convert it: {name}.to(q.dtype).", TypeError)
        if x.device != q.device:
            errors.fail(door, name, f"on {q.device} as q is", x.device, f"Move it: {name}.to(q.device).")
    H, T, D = q.shape[-3:]
    K, S = k.shape[-3:-1]
    if k.shape[-1] != D:
        errors.fail(door, "k", f"(*lead, K, S, D) with D = {D} as in q", errors.shape(k), "Project k to q's head size.")
    if v.shape[-3:-1] != (K, S):
        errors.fail(door, "v", f"(*lead, K, S, Dv) with K, S = {K}, {S} as in k", errors.shape(v), "Give every key a value.")
    if not H == K == 0 and (not K or H % K):
        errors.fail(
            door, "k", f"(*lead, K, S, D) with K dividing H = {H}", errors.shape(k), "Each key head serves H / K query heads."
        )
    try:
        lead = layout.broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except RuntimeError:
        wanted, got = "leading axes that broadcast", f"{errors.shape(q)}, {errors.shape(k)} and {errors.shape(v)}"
        errors.fail(door, "q, k, v", wanted, got, "Insert axes of size 1 where one is shared.")
    if not K:  # no heads at all: add one key head, which no query head reads
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    _check_mask(door, mask, lead, (H, T, S), q.device)
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            errors.fail(
                door,
                "bias",
                "a floating tensor",
                getattr(bias, "dtype", type(bias).__name__),
                "A boolean one is a mask.",
                TypeError,
            )
        _must_broadcast(door, "bias", bias.shape, (*lead, H, T, S))
        if bias.device != q.device:
            errors.fail(door, "bias", f"on {q.device} as q is", bias.device, "Move it: bias.to(q.device).")
    _check_scale(door, scale)
    if dropout or key is not None:
        _check_dropout(door, dropout, key)
    # with D = 0 all logits are zero, whatever the scale
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale
    return Request(q, k, v, mask, bias, scale, dropout, key, wants_lse, tuple(lead))


def _check_scale(door: str, scale: float | Tensor | None) -> None:
    if scale is None or torch.compiler.is_compiling():
        return
    if isinstance(scale, Tensor):
        if scale.dim():
            errors.fail(door, "scale", "a number or a 0-d tensor", errors.shape(scale), "Multiply q by it instead.")
    elif not hasattr(scale, "__float__"):
        got, remedy = f"a {type(scale).__name__}", "Leave it out for 1 / sqrt(D)."
        errors.fail(door, "scale", "a number or a 0-d tensor", got, remedy, TypeError)
    elif not abs(scale) < torch.finfo(torch.float32).max:
        errors.fail(door, "scale", "a number that float32 holds", scale, "It is 1 / sqrt(D) by default.")


def _check_dropout(door: str, dropout: float, key: Tensor | None) -> None:
    if not 0 <= dropout < 1:
        errors.fail(door, "dropout", "a rate in [0, 1)", dropout, "It is the share of weights to drop.")
    if not isinstance(key, Tensor):
        errors.fail(door, "key", "given with dropout", key, "Pass funcattn.key(seed), split for each use.", TypeError)
    if key.shape != (2,) or key.is_floating_point():
        errors.fail(door, "key", "one key, int64 (2,)", f"{key.dtype} {errors.shape(key)}", "Map over a batch of keys with vmap.")


def _check_mask(
    door: str, mask: Mask | Tensor | None, lead: tuple[int, ...], HTS: tuple[int, int, int], device: torch.device
) -> None:
    H, T, S = HTS
    if mask is None:
        return
    if isinstance(mask, Mask):
        if mask.start.shape[-2] != T:
            errors.fail(door, "mask", f"for T = {T} queries as in q", f"one for {mask.start.shape[-2]}", f"Build it with T = {T}.")
        _must_broadcast(door, "mask", mask.start.shape[:-1], (*lead, T))
        where = mask.start.device
    elif not isinstance(mask, Tensor):
        errors.fail(door, "mask", "a Mask, booleans or None", f"a {type(mask).__name__}", "See funcattn.masks.", TypeError)
    elif mask.dtype != torch.bool:
        remedy = "Pass a floating one as bias=." if mask.is_floating_point() else "Convert it: mask.bool()."
        errors.fail(door, "mask", "boolean", mask.dtype, remedy, TypeError)
    else:
        _must_broadcast(door, "mask", mask.shape, (*lead, H, T, S))
        where = mask.device
    if where != device:
        errors.fail(door, "mask", f"on {device} as q is", where, "Move it: funcattn.to(device)(mask).")


def _must_broadcast(door: str, name: str, shape: Sequence[int], to: tuple[int, ...]) -> None:
    if len(shape) > len(to) or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)):
        errors.fail(door, name, f"such that it broadcasts to {tuple(to)}", tuple(shape), "Its last axes are queries and keys.")
