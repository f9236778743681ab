"""Acceptance of a draft: which of its tokens are kept, and the token drawn after them.

    count, token, tokens = accept(key, target, draft, proposed, valid)

For one sequence; batches, each row with its count, are `vmap`. Shapes are static and no branch
depends on values, so it vmaps and compiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import randomness
from ...core import errors
from ...core.doors import door
from ...records import record
from .regions import at
from .rules import Rule, blockwise


@record
class Accepted(NamedTuple):
    """The result of accepting a draft.

    count: int64 (), how many drafted tokens are accepted, 0 to valid.
    token: int64 (), the token after them, drawn from the rule's correction of the target.
    tokens: int64 (N + 1,), the accepted tokens, then `token`, then -1.
    """

    count: Tensor
    token: Tensor
    tokens: Tensor


@door
def accept(
    key: Tensor,
    target: Tensor,
    draft: Tensor,
    proposed: Tensor,
    valid: Tensor | None = None,
    *,
    rule: Rule = blockwise,
    check: bool = True,
) -> Accepted:
    """Accept a prefix of a draft and draw one more token: the output is distributed as the target.

    Args:
        key: int64 (2,), randomness for all of it.
        target: (N + 1, V), float32 or float64: probabilities of each token given the draft before
            it, the last given all of it.
        draft: (N, V), the probabilities that each drafted token was drawn from; one-hot for a
            deterministic draft.
        proposed: int64 (N,), the draft.
        valid: int64 (), how many of the N count; the other rows may be anything, even NaN. None is
            all.
        rule: `blockwise`, `tokenwise`, or another `Rule`.
        check: validate values where they can be read (this synchronizes with the device): rows sum
            to one, drafted tokens have positive probability.

    Returns:
        Accepted. Where the target is NaN and values could not be read, `token` is -1.

    Raises:
        ValueError: sizes that differ, an empty draft, probabilities that are NaN, negative or do
            not sum to one, a token outside the vocabulary or of probability zero in the draft,
            valid outside 0 to N.
        TypeError: probabilities in half precision or as integers.

    Example:
        >>> import torch, funcattn as fa
        >>> p, q = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[0.5, 0.5]])
        >>> accept(fa.key(0), p, q, torch.tensor([0])).tokens
        tensor([ 1, -1])

    Law: distributed as the target exactly, by enumeration
        (test_speculation.py::test_what_is_written_has_the_law_of_the_target).
    """
    valid = _checked("accept", target, draft, proposed, valid, check)
    for_uniforms, for_token = randomness.split(key).unbind()
    regions = rule.regions(*clean(target, draft, proposed, valid), valid)
    # float32 ones are multiples of 2^-23
    uniforms = randomness.uniform(for_uniforms, (len(proposed),), torch.float64)
    count = rule.count(regions.threshold.double(), uniforms)
    token = draw_row(for_token, regions.correction, count)
    return Accepted(count, token, finish(proposed, count, token))


@door
def acceptance_pmf(
    target: Tensor,
    draft: Tensor,
    proposed: Tensor,
    valid: Tensor | None = None,
    *,
    rule: Rule = blockwise,
    check: bool = True,
) -> Tensor:
    """The probability (N + 1,) of each accepted count given the draft: exact.

    Differentiable in target and draft. Args and errors as in `accept`.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[0.5, 0.5]])
        >>> acceptance_pmf(p, q, torch.tensor([0]))
        tensor([0.5000, 0.5000])

    Law: counts of `accept` follow it; it is the volume of the uniforms that give each count
        (laws.acceptance: counts_follow_the_pmf, regions_have_the_volume_of_the_pmf).
    """
    valid = _checked("acceptance_pmf", target, draft, proposed, valid, check)
    return rule.pmf(rule.regions(*clean(target, draft, proposed, valid), valid).threshold)


def clean(
    target: Tensor, draft: Tensor, proposed: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """target, draft, proposed with rows beyond valid replaced: uniform probabilities, token 0."""
    rows, V = torch.arange(len(target), device=target.device).unsqueeze(-1), target.shape[-1]
    there = rows[:-1] < valid
    return (
        torch.where(rows <= valid, target, 1 / V),
        torch.where(there, draft, 1 / V),
        torch.where(there.squeeze(-1), proposed, 0),
    )


def draw_row(key: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    """One token drawn from row `row` of probabilities (R, V); -1 where the row is NaN."""
    probs = rows.index_select(0, row.reshape(1))[0]
    return torch.where(probs.isnan().any(-1), -1, randomness.categorical(key, probs.log()))


def finish(proposed: Tensor, count: Tensor, token: Tensor) -> Tensor:
    """int64 (N + 1,): the first `count` of proposed (N,), then the token, then -1."""
    places = torch.arange(len(proposed) + 1, device=proposed.device)
    longer = torch.cat([proposed, proposed[:1]])
    return torch.where(places < count, longer, torch.where(places == count, token, -1))


def _checked(
    function: str,
    target: Tensor,
    draft: Tensor,
    proposed: Tensor,
    valid: Tensor | None,
    check: bool,
) -> Tensor:
    if proposed.dim() != 1 or proposed.is_floating_point():
        got, remedy = f"{proposed.dtype} {errors.shape(proposed)}", "Map over many rows with vmap."
        errors.fail(function, "proposed", "one draft (N,) of token ids", got, remedy)
    N = len(proposed)
    if not N:
        errors.fail(
            function,
            "proposed",
            "(N,) with N at least 1",
            (0,),
            "With nothing drafted, draw from the target.",
        )
    V = target.shape[-1] if target.dim() else 0
    check_probs(function, "target", target, (N + 1, V), "(N + 1, V)", N)
    check_probs(function, "draft", draft, (N, V), "(N, V)", N)
    if valid is None:
        valid = torch.full((), N, dtype=torch.int64, device=proposed.device)
    elif not isinstance(valid, Tensor) or valid.dim() or valid.is_floating_point():
        got = f"{valid.dtype} {errors.shape(valid)}" if isinstance(valid, Tensor) else repr(valid)
        errors.fail(
            function,
            "valid",
            "an integer tensor ()",
            got,
            "Pass torch.tensor(n); map over rows with vmap.",
            TypeError,
        )
    if errors.is_true((valid < 0) | (valid > N)):
        errors.fail(
            function,
            "valid",
            f"between 0 and N = {N}",
            errors.peek(valid),
            "It counts the drafted tokens.",
        )
    places = torch.arange(N + 1, device=target.device)
    if check:
        check_values(function, "target", target, places <= valid)
        check_values(function, "draft", draft, places[:N] < valid)
        check_tokens(function, draft, proposed, places[:N] < valid)
    return valid


def check_probs(
    function: str, argument: str, probs: Tensor, wanted: tuple[int, ...], letters: str, N: int
) -> None:
    """Fail where probabilities do not have the shape and dtype that are wanted."""
    if probs.dtype not in (torch.float32, torch.float64):
        remedy = "Take the softmax in float32, and draw from that too."
        errors.fail(
            function,
            argument,
            "probabilities in float32 or float64",
            probs.dtype,
            remedy,
            TypeError,
        )
    if probs.shape != wanted:
        remedy = "Target and draft need one vocabulary; the target has one row more."
        errors.fail(
            function,
            argument,
            f"{letters} = {wanted} with N = {N} as proposed",
            errors.shape(probs),
            remedy,
        )


def check_values(function: str, argument: str, probs: Tensor, counts: Tensor) -> None:
    """Fail where a row that counts is not a distribution.

    Sums may differ from one by the rounding of V terms and of the softmax.
    """
    slack = 4 * probs.shape[-1] * torch.finfo(probs.dtype).eps
    wrong = ~(((probs.sum(-1) - 1).abs() <= slack) & (probs >= 0).all(-1))  # NaN is wrong
    if errors.is_true(wrong & counts):
        errors.fail(
            function,
            argument,
            "rows of probabilities that sum to one",
            "others, or NaN",
            "Pass softmax(logits).",
        )


def check_tokens(function: str, draft: Tensor, proposed: Tensor, counts: Tensor) -> None:
    """Fail where a token that counts is outside the vocabulary or has probability 0."""
    V = draft.shape[-1]
    if errors.is_true(((proposed < 0) | (proposed >= V)) & counts):
        errors.fail(
            function,
            "proposed",
            f"ids below V = {V}",
            errors.peek(proposed),
            "Set valid where the draft is short.",
        )
    if errors.is_true((at(draft, proposed.clamp(0, V - 1)) <= 0) & counts):
        remedy = (
            "Pass the probabilities that were drawn from, after every filter; of a draft without "
            "chance it is one-hot."
        )
        errors.fail(function, "draft", "positive at the proposed tokens", "zero", remedy)
