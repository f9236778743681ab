"""The public functions of attention: check the arguments once, then run the chosen kernel."""

import torch
from torch import Tensor

from ..core import errors
from ..core.autograd import untraced
from ..core.doors import door as public
from ..masks import Mask
from ..records import Attended
from . import dispatch, reference
from .arguments import no_autocast, request
from .dispatch import Explanation
from .request import Kernel, Request
from .small import attend_small


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
    if mask is None and bias is None and kernel is None:
        found = attend_small(q, k, v, scale)
        if found is not None:
            return found
    r = request("attend", q, k, v, mask, scale, bias, wants_lse=True)
    return _run(r, dispatch.choose(r, kernel))


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
    if mask is None and bias is None and kernel is None and key is None and not dropout:
        found = attend_small(q, k, v, scale)
        if found is not None:
            return found.out
    r = request("attention", q, k, v, mask, scale, bias, dropout=dropout, key=key)
    return _run(r, dispatch.choose(r, kernel)).out


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
        (*lead, H, T, S), in float32 at least. Rows sum to one, or to zero where a query sees no
        key.

    Raises:
        ValueError, TypeError: as `attend`.

    Example:
        >>> from funcattn import masks
        >>> attention_weights(torch.ones(1, 2, 4), torch.ones(1, 2, 4), masks.causal(2))
        tensor([[[1.0000, 0.0000],
                 [0.5000, 0.5000]]])
    """
    r = request("attention_weights", q, k, k, mask, scale, bias)
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
    return Explanation(dispatch.verdicts(request("explain", q, k, v, mask, scale, bias), kernel))


def _run(r: Request, kernel: Kernel) -> Attended:
    with no_autocast(r.q):
        found = kernel.run(r) if torch.compiler.is_compiling() else _untraced(kernel, r)
    return found if dispatch.is_registered(kernel) else _given(kernel, r, found)


@untraced
def _untraced(kernel: Kernel, r: Request) -> Attended:
    if dispatch.is_registered(kernel):
        return kernel.run(r)
    # attention inside of a custom kernel is chosen anew, not that kernel again
    with dispatch.unforced():
        return kernel.run(r)


def _given(kernel: Kernel, r: Request, found: Attended) -> Attended:
    """The result of a custom kernel, checked to be an Attended of the expected shapes."""
    what = f"what kernel {kernel.name!r} returns"
    if not isinstance(found, Attended) or not isinstance(found.out, Tensor):
        got, remedy = f"a {type(found).__name__}", "Make one: fa.records.Attended(out, lse)."
        errors.fail("attention", what, "Attended(out, lse)", got, remedy, TypeError)
    shape = (*r.lead, *r.q.shape[-3:-1], r.v.shape[-1])
    checked = {"out": (found.out, shape)} | (
        {"lse": (found.lse, shape[:-1])} if r.wants_lse else {}
    )
    for name, (x, wanted) in checked.items():
        if not isinstance(x, Tensor) or tuple(x.shape) != wanted:
            got = errors.shape(x) if isinstance(x, Tensor) else repr(x)
            remedy = (
                "q, k, v and mask may differ in leading axes: expand to r.lead; "
                'or say in why_not what it cannot run, as "no log-sum-exp" where r.wants_lse.'
            )
            errors.fail("attention", what, f"{name} {wanted}", got, remedy)
    if found.out.dtype != r.v.dtype:
        wanted, remedy = f"out in {r.v.dtype} as v is", "Cast it: out.to(r.v.dtype)."
        errors.fail("attention", what, wanted, found.out.dtype, remedy, TypeError)
    return found
