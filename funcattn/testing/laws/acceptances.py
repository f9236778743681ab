"""Laws of acceptance rules by exact enumeration: law(rule, target, draft, key).

Target and draft are tables of conditional probabilities: `target[n]` is (V,) * n + (V,), those of
token n after each text of n tokens, for n = 0, ..., N; `draft[n]` likewise for n = 0, ..., N - 1.
All V^N drafts are enumerated, weighted with their probability; `emitted` extends the output of a
rule to N + 1 tokens by the target, and compares all V^(N + 1) texts. In float64 a correct rule
agrees up to a few roundings, so a wrong one differs by ten orders of magnitude more.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vmap

from ... import randomness
from ...speculation import Rule, accept, tokenwise
from ..agreement import agree, named
from .samplers import _tail

Table = Sequence[Tensor]
# total variation: V^(N + 1) <= 256 texts, each a sum of at most V^N products of N + 2 numbers,
# times 2e-16
EXACT = 1e-12
DRAWS = 2000


def joint(table: Table) -> Tensor:
    """The probability of every text, (V,) * len(table): the product of the conditional ones."""
    mass = torch.ones((), dtype=table[0].dtype, device=table[0].device)
    for probs in table:
        mass = mass.unsqueeze(-1) * probs
    return mass


def rows(table: Table, N: int) -> Tensor:
    """The conditional probabilities along each of the V^N drafts: (V^N, len(table), V)."""
    V = table[0].shape[-1]
    return torch.stack(
        [probs.reshape(-1, V).repeat_interleave(V ** (N - n), 0) for n, probs in enumerate(table)],
        1,
    )


def drafts(V: int, N: int, device: torch.device | None = None) -> Tensor:
    """Every draft, (V^N, N), in the order of `rows`."""
    return torch.tensor(list(itertools.product(range(V), repeat=N)), device=device)


def outcomes(rule: Rule, target: Table, draft: Table) -> tuple[Tensor, Tensor, Tensor]:
    """For each draft: its probability (V^N,), those of counts (V^N, N + 1), and of the next token.

    The last are (V^N, N + 1, V).
    """
    N, V, here = len(draft), draft[0].shape[-1], draft[0].device
    regions = vmap(lambda p, q, d: rule.regions(p, q, d, torch.tensor(N, device=here)))(
        rows(target, N), rows(draft, N), drafts(V, N, here)
    )
    return joint(draft).reshape(-1), vmap(rule.pmf)(regions.threshold), regions.correction


def emitted(rule: Rule, target: Table, draft: Table, *, shown: Table | None = None) -> Tensor:
    """The probability of every text of N + 1 tokens: the output of a rule, extended by the target.

    Returns (V,) * (N + 1). `shown`, if given, is passed to the rule in place of the target: to
    check that a wrong rule is detected.
    """
    N, V, here = len(draft), draft[0].shape[-1], draft[0].device
    drawn, counts, after = outcomes(rule, target if shown is None else shown, draft)
    total = torch.zeros(V ** (N + 1), dtype=drawn.dtype, device=here)
    for n in range(N + 1):
        written = (drawn * counts[:, n]).unsqueeze(-1) * after[:, n]  # (V^N, V)
        # texts of n + 1 tokens
        written = written.reshape(V**n, -1, V).sum(1).reshape((V,) * (n + 1))
        for probs in target[n + 1 :]:
            written = written.unsqueeze(-1) * probs
        total = total + written.reshape(-1)
    return total.reshape((V,) * (N + 1))


def expected_count(rule: Rule, target: Table, draft: Table) -> Tensor:
    """The mean number of accepted tokens."""
    drawn, counts, _ = outcomes(rule, target, draft)
    return (
        drawn.unsqueeze(-1) * counts * torch.arange(counts.shape[-1], device=counts.device)
    ).sum()


@named
def what_is_written_has_the_law_of_the_target(
    rule: Rule, target: Table, draft: Table, key: Tensor
) -> None:
    """The output has the target's distribution of N + 1 tokens: total variation up to rounding."""
    off = (emitted(rule, target, draft) - joint(target)).abs().sum() / 2
    agree(
        what_is_written_has_the_law_of_the_target,
        "the total variation",
        off,
        torch.zeros_like(off),
        EXACT,
        "float64",
    )


@named
def regions_are_probabilities(rule: Rule, target: Table, draft: Table, key: Tensor) -> None:
    """Thresholds are in [0, 1]; probabilities of counts and of the next token sum to one."""
    drawn, counts, after = outcomes(rule, target, draft)
    possible = drawn > 0
    for name, mass in (
        ("the probabilities of counts", counts[possible]),
        ("what follows", after[possible]),
    ):
        if not (mass >= 0).all():
            raise AssertionError(
                f"regions_are_probabilities: {name} should be 0 or more, got "
                f"{float(mass.min()):.3g}."
            )
        total = mass.sum(-1)
        agree(
            regions_are_probabilities,
            f"the sum of {name}",
            total,
            torch.ones_like(total),
            EXACT,
            "float64",
        )


@named
def regions_have_the_volume_of_the_pmf(
    rule: Rule, target: Table, draft: Table, key: Tensor
) -> None:
    """The volume of uniforms for which `count` gives n is exactly `pmf[n]`.

    The thresholds divide the cube of uniforms into 2^N boxes [0, h) and [h, 1). `count` must be
    constant on the corners of each box (for an open end, the last number below it); then volumes of
    boxes add up to the integral. A rule with `u <= h` fails at the corner h.
    """
    N, V, here = len(draft), draft[0].shape[-1], draft[0].device
    below = lambda x: torch.nextafter(x, torch.zeros_like(x))
    for p, q, d in zip(rows(target, N), rows(draft, N), drafts(V, N, here), strict=True):
        h = rule.regions(p, q, d, torch.tensor(N, device=here)).threshold
        volumes = torch.zeros(N + 1, dtype=h.dtype, device=here)
        for box in itertools.product((True, False), repeat=N):
            inside = torch.tensor(box, device=here)
            volume = torch.where(inside, h, 1 - h).prod()
            if volume <= 0:
                continue
            low, high = (
                torch.where(inside, 0, h),
                torch.where(inside, below(h), below(torch.ones_like(h))),
            )
            corners = [
                torch.where(torch.tensor(c, device=here), low, high)
                for c in itertools.product((True, False), repeat=N)
            ]
            found = {int(rule.count(h, u)) for u in corners}
            if len(found) > 1:
                raise AssertionError(
                    f"regions_have_the_volume_of_the_pmf: counts {found} within one box of "
                    f"thresholds {h.tolist()}."
                )
            volumes[found.pop()] += volume
        agree(
            regions_have_the_volume_of_the_pmf,
            "the volume of each count",
            volumes,
            rule.pmf(h),
            EXACT,
            "float64",
        )


@named
def counts_follow_the_pmf(rule: Rule, target: Table, draft: Table, key: Tensor) -> None:
    """Counts of `accept` follow pmf: a chi-square test for the likeliest draft.

    A correct rule fails for one in 10^9 keys.
    """
    N, V, here = len(draft), draft[0].shape[-1], draft[0].device
    best = int(joint(draft).argmax())
    p, q, d = rows(target, N)[best], rows(draft, N)[best], drafts(V, N, here)[best]
    wanted = DRAWS * rule.pmf(rule.regions(p, q, d, torch.tensor(N, device=here)).threshold)
    counts = vmap(lambda key: accept(key, p, q, d, rule=rule).count)(randomness.split(key, DRAWS))
    seen, likely = torch.bincount(counts, minlength=N + 1).double(), wanted > 1e-6
    if seen[~likely].any():
        raise AssertionError(
            f"counts_follow_the_pmf: got {seen.tolist()} where {wanted.tolist()} is expected."
        )
    freedom, statistic = (
        int(likely.sum()) - 1,
        float(((seen - wanted)[likely] ** 2 / wanted[likely]).sum()),
    )
    # A count that is expected less than a few times has a heavier tail.
    if statistic > _tail(freedom) + 25 / float(wanted[likely].min()):
        raise AssertionError(
            f"counts_follow_the_pmf: chi-square {statistic:.4g} with {freedom} degrees of freedom."
        )


@named
def a_shorter_draft_is_the_beginning_of_a_longer(
    rule: Rule, target: Table, draft: Table, key: Tensor
) -> None:
    """valid = n gives the result of a draft of n tokens, whatever is in the other rows."""
    N, V, here = len(draft), draft[0].shape[-1], draft[0].device
    for n in range(1, N):
        p, q, d = rows(target, N), rows(draft, N), drafts(V, N, here)
        longer = vmap(lambda p, q, d, n=n: rule.regions(p, q, d, torch.tensor(n, device=here)))(
            p, q, d
        )
        shorter = vmap(lambda p, q, d, n=n: rule.regions(p, q, d, torch.tensor(n, device=here)))(
            p[:, : n + 1], q[:, :n], d[:, :n]
        )
        law = a_shorter_draft_is_the_beginning_of_a_longer
        counts = vmap(rule.pmf)(longer.threshold)
        agree(
            law, "counts", counts[:, : n + 1], vmap(rule.pmf)(shorter.threshold), EXACT, "float64"
        )
        agree(
            law,
            "counts beyond valid",
            counts[:, n + 1 :],
            torch.zeros_like(counts[:, n + 1 :]),
            0,
            "there are none",
        )
        agree(
            law, "what follows", longer.correction[:, : n + 1], shorter.correction, EXACT, "float64"
        )


@named
def accepts_as_many_as_tokenwise(rule: Rule, target: Table, draft: Table, key: Tensor) -> None:
    """The mean accepted count is at least that of `tokenwise`; not required of every rule."""
    less = (expected_count(tokenwise, target, draft) - expected_count(rule, target, draft)).clamp(
        min=0
    )
    agree(
        accepts_as_many_as_tokenwise,
        "the mean count that is missing",
        less,
        torch.zeros_like(less),
        EXACT,
        "float64",
    )
