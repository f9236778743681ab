"""Laws of samplers: law(sampler, logits, key), for one row of logits (V,) with at least one finite.

The state has observed two tokens, so that penalties apply.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ... import randomness, sampling, tree
from ...sampling import Sampler
from ..agreement import agree, named

DRAWS = 1000


@named
def law_sums_to_one(sampler: Sampler, logits: Tensor, key: Tensor) -> None:
    """The probabilities of the sampler sum to one, and none is NaN."""
    total = _log_probs(sampler, logits, key).exp().sum()
    agree(
        law_sums_to_one, "the sum of probabilities", total, torch.ones_like(total), *_slack(logits)
    )


@named
def no_hidden_token_comes_back(sampler: Sampler, logits: Tensor, key: Tensor) -> None:
    """A logit of -inf stays -inf: a later sampler of a chain cannot unmask a token."""
    found = _log_probs(sampler, logits, key)
    hidden = logits == -torch.inf
    agree(
        no_hidden_token_comes_back,
        "what is left where logits are -inf",
        found[hidden],
        logits[hidden],
        0,
        "it stays hidden",
    )


@named
def at_least_one_token_is_kept(sampler: Sampler, logits: Tensor, key: Tensor) -> None:
    """At least one token has a positive probability."""
    left, _ = sampler.update(logits, _state(sampler, logits, key))
    if not left.isfinite().any():
        raise AssertionError(
            f"at_least_one_token_is_kept: update({logits.tolist()}) leaves "
            f"{left.tolist()}: nothing to draw."
        )


@named
def adding_a_constant_to_logits_changes_nothing(
    sampler: Sampler, logits: Tensor, key: Tensor
) -> None:
    """Adding a constant to logits keeps the probabilities.

    Leave it out for penalties that depend on the sign of a logit.
    """
    grid = (logits * 8).round() / 8  # so that adding 4 is exact, and ties stay ties
    wanted, got = _log_probs(sampler, grid, key), _log_probs(sampler, grid + 4, key)
    agree(
        adding_a_constant_to_logits_changes_nothing,
        "probabilities",
        got.exp(),
        wanted.exp(),
        *_slack(logits),
    )


@named
def commutes_with_vmap(sampler: Sampler, logits: Tensor, key: Tensor) -> None:
    """vmap over rows gives the probabilities of each row, and the token drawn with its key."""
    state, keys = _state(sampler, logits, key), randomness.split(key, 3)
    rows = torch.stack([logits, logits.flip(0), logits / 2])
    got = vmap(sampling.log_probs(sampler), (0, None))(rows, state)
    tokens = vmap(lambda key, row: sampling.draw(key, sampler, row, state)[0])(keys, rows)
    for n in range(3):
        wanted = sampling.log_probs(sampler)(rows[n], state)
        agree(
            commutes_with_vmap,
            f"probabilities of row {n}",
            got[n].exp(),
            wanted.exp(),
            *_slack(logits),
        )
        token, _ = sampling.draw(keys[n], sampler, rows[n], state)
        agree(
            commutes_with_vmap,
            f"token of row {n}",
            tokens[n],
            token,
            0,
            "the same key draws the same",
        )


@named
def draws_follow_the_law(sampler: Sampler, logits: Tensor, key: Tensor) -> None:
    """Draws have the sampler's probabilities: a chi-square test of 1000 draws.

    A correct sampler fails for one in 10^9 keys. A token of probability zero is never drawn. The
    least likely tokens are one category, so that at least five draws of it are expected.
    """
    state, V = _state(sampler, logits, key), logits.shape[-1]
    expected = DRAWS * _log_probs(sampler, logits, key).double().exp()
    tokens = vmap(lambda key: sampling.draw(key, sampler, logits, state)[0])(
        randomness.split(key, DRAWS)
    )
    seen = torch.bincount(tokens, minlength=V).double()
    never = seen[expected == 0].sum()
    agree(
        draws_follow_the_law,
        "draws of tokens of probability zero",
        never,
        torch.zeros_like(never),
        0,
        "there are none",
    )
    order = expected.argsort()
    # the least likely, as many as are expected five times together
    rare = max(1, int((expected[order].cumsum(0) < 5).sum()) + 1)
    bins = lambda counts: torch.cat([counts[order][:rare].sum().reshape(1), counts[order][rare:]])
    expected, seen = bins(expected), bins(seen)
    freedom, statistic = len(expected) - 1, float(((seen - expected) ** 2 / expected).sum())
    if statistic > _tail(freedom):
        raise AssertionError(
            f"draws_follow_the_law: {DRAWS} draws gave {seen.int().tolist()} where "
            f"{expected.tolist()} are expected: "
            f"chi-square {statistic:.4g} with {freedom} degrees of freedom, above "
            f"{_tail(freedom):.4g}."
        )


@named
def state_keeps_its_form(sampler: Sampler, logits: Tensor, key: Tensor) -> None:
    """update and observe keep structure, shapes and dtypes of the state, for loops and vmap."""
    state, first = sampling.begin(sampler, logits), torch.tensor(0, device=logits.device)
    form = lambda state: [(path, tuple(x.shape), x.dtype) for path, x in tree.items(state)]
    for verb, after in (
        ("update", sampler.update(logits, state)[1]),
        ("observe", sampler.observe(first, state)),
    ):
        if form(after) != form(state):
            raise AssertionError(
                f"state_keeps_its_form: {verb} should return {form(state)}, got {form(after)}."
            )


@named
def arguments_stay_as_they_were(sampler: Sampler, logits: Tensor, key: Tensor) -> None:
    """update, observe and draw modify no argument."""
    state = _state(sampler, logits, key)
    given = (logits, state)
    before = tree.map(torch.clone, given)
    sampler.update(logits, state)
    sampling.draw(key, sampler, logits, state)
    for (path, now), then in zip(tree.items(given), tree.leaves(before), strict=True):
        agree(
            arguments_stay_as_they_were,
            "logits" if path == "0" else f"state{path[1:]}",
            now,
            then,
            0,
            "nothing is written",
        )


def _state(sampler: Sampler, logits: Tensor, key: Tensor) -> Any:
    state = sampling.begin(sampler, logits)
    for token in randomness.randint(randomness.fold_in(key, 1), (2,), 0, logits.shape[-1]):
        state = sampler.observe(token, state)
    return state


def _log_probs(sampler: Sampler, logits: Tensor, key: Tensor) -> Tensor:
    return sampling.log_probs(sampler)(logits, _state(sampler, logits, key))


def _slack(logits: Tensor) -> tuple[float, str]:
    """The tolerance of a softmax: V terms in float32 at least, with exponents up to the spread."""
    finite = logits[logits.isfinite()].double()
    spread, V = float(finite.max() - finite.min()) + 4, logits.shape[-1]
    eps = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).eps
    return 4 * (
        V + spread
    ) * eps, f"rounding of a sum of V = {V} terms, logits {spread - 4:.3g} apart"


def _tail(freedom: int) -> float:
    """The value that chi-square exceeds with probability 10^-9.

    Wilson and Hilferty's cube of a normal variable, whose quantile there is 6.
    """
    return (
        freedom * (1 - 2 / (9 * freedom) + 6 * math.sqrt(2 / (9 * freedom))) ** 3
        if freedom
        else 1e-6
    )
