"""Constraints: masks over the vocabulary, fixed or computed from a state that each token updates.

A grammar is `constrained(start, allowed, step)`, its state a pytree in the sampler's state, so that
it forks and rolls back with the cache; a finite automaton is a table, `automaton`. Where no token
is allowed, log-probabilities are NaN and `draw` raises.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core import errors
from ..core.doors import door, printed, what_is
from ..tree import Tree
from .composition import Sampler, require, require_integer, stateless
from .penalties import require_ids


@door
@printed
def allowed_tokens(allowed: Sequence[int] | Tensor) -> Sampler:
    """Mask every token but these: ids, or a bool tensor (V,) that is True for allowed tokens.

    vLLM `allowed_token_ids`, transformers `prefix_allowed_tokens_fn` with a constant.
    """
    shown = _mask("allowed_tokens", allowed)
    return stateless(lambda logits: torch.where(shown(logits), logits, -torch.inf))


@door
@printed
def suppress_tokens(ids: Sequence[int] | Tensor) -> Sampler:
    """Mask these tokens: ids, or a bool tensor (V,) that is True for suppressed tokens.

    transformers `suppress_tokens` and `bad_words_ids` of single tokens, vLLM `bad_words` of single
    tokens.
    """
    hidden = _mask("suppress_tokens", ids)
    return stateless(lambda logits: torch.where(hidden(logits), -torch.inf, logits))


@door
@printed
def min_new_tokens(n: int | Tensor, stop: Sequence[int]) -> Sampler:
    """Mask the stop ids until n tokens were generated, without the prompt.

    transformers `min_new_tokens`, vLLM `min_tokens`.
    """
    require(n >= 0, "min_new_tokens", "n", "0 or more", n, "0 changes nothing.")
    hidden = _mask("min_new_tokens", stop)
    update = lambda logits, written: (
        torch.where(hidden(logits) & (written < n), -torch.inf, logits),
        written,
    )
    return Sampler(
        lambda V: torch.zeros((), dtype=torch.int64), update, lambda token, written: written + 1
    )


@door
@printed
def constrained(
    start: Tree, allowed: Callable[[Tree], Tensor], step: Callable[[Tensor, Tree], Tree]
) -> Sampler:
    """Mask the tokens that a state does not allow: the interface for grammars.

    Args:
        start: the initial state, a pytree of tensors.
        allowed: state -> bool (V,), True where a token may follow.
        step: (token (), state) -> state, of the same structure, shapes and dtypes. It may be called
            with a token that is not allowed (in a rejected draft); then the result is not used.

    Example:
        >>> from funcattn.sampling import log_probs
        >>> rises = constrained(torch.tensor(0), lambda least: torch.arange(4) >= least,
        ...     lambda token, least: token)
        >>> log_probs(rises)(torch.zeros(4), torch.tensor(2)).exp().tolist()
        [0.0, 0.0, 0.5, 0.5]
    """

    def update(logits: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        shown = allowed(state)
        if (
            not isinstance(shown, Tensor)
            or shown.dtype != torch.bool
            or shown.shape != logits.shape
        ):
            got, remedy = what_is(shown), "Return True where a token may follow."
            errors.fail(
                "constrained",
                "what allowed returns",
                f"bool (V,) with V = {logits.shape[-1]}",
                got,
                remedy,
            )
        return torch.where(shown, logits, -torch.inf), state

    return Sampler(lambda V: start, update, step)


@door
@printed
def automaton(table: Tensor, start: int = 0) -> Sampler:
    """Mask the tokens that a finite automaton does not allow.

    Args:
        table: int64 (S, V), table[s, token] is the next of S states, or -1 where the token may not
            follow.
        start: the first state.

    Example:
        >>> from funcattn.sampling import log_probs
        >>> takes_turns = automaton(torch.tensor([[1, -1], [-1, 0]]))
        >>> log_probs(takes_turns)(torch.zeros(2), takes_turns.observe(torch.tensor(0),
        ...     takes_turns.init(2))).exp().tolist()
        [0.0, 1.0]
    """
    if not isinstance(table, Tensor) or table.dim() != 2 or table.is_floating_point():
        got = (
            f"{table.dtype} {errors.shape(table)}"
            if isinstance(table, Tensor)
            else f"a {type(table).__name__}"
        )
        errors.fail(
            "automaton",
            "table",
            "int64 (S, V), the next state of each state and token",
            got,
            "-1 forbids.",
            TypeError,
        )
    S, V = table.shape
    require(
        ((table >= -1) & (table < S)).all(),
        "automaton",
        "table",
        f"in [-1, S = {S})",
        table,
        "-1 forbids a token.",
    )
    require_integer("automaton", "start", start, 0, "Name one of the table's states.")
    require(
        start < S,
        "automaton",
        "start",
        f"in [0, S = {S})",
        start,
        "Name one of the table's states.",
    )
    # A negative state is absorbing.
    row = lambda state: torch.where(
        state < 0, -1, table.index_select(0, state.clamp(min=0).reshape(1))[0]
    )
    step = lambda token, state: row(state).index_select(0, token.reshape(1).long())[0]
    inner = constrained(
        torch.full((), start, dtype=table.dtype, device=table.device),
        lambda state: row(state) >= 0,
        step,
    )

    def init(size: int) -> Tree:
        if size != V:
            errors.fail(
                "automaton",
                "table",
                f"(S, V) with V = {size} as the logits",
                errors.shape(table),
                "Pad it with -1.",
            )
        return inner.init(size)

    return inner._replace(init=init)


def _mask(function: str, ids: Sequence[int] | Tensor) -> Callable[[Tensor], Tensor]:
    """A function from logits (V,) to bool (V,), True at the ids."""
    if isinstance(ids, Tensor) and ids.dtype == torch.bool:

        def whole(logits: Tensor) -> Tensor:
            require_ids(function, ids, logits.shape[-1], whole=True)
            return ids.to(logits.device)

        return whole
    if isinstance(ids, str) or not (
        isinstance(ids, Tensor) or all(isinstance(token, int) for token in ids)
    ):
        errors.fail(
            function,
            "ids",
            "ints, or a bool tensor (V,)",
            repr(ids),
            "Encode text with the tokenizer.",
            TypeError,
        )
    places = torch.as_tensor(ids, dtype=torch.int64).reshape(-1)

    def some(logits: Tensor) -> Tensor:
        require_ids(function, places, logits.shape[-1], whole=False)
        there = torch.arange(logits.shape[-1], device=logits.device).unsqueeze(-1) == places.to(
            logits.device
        )
        return there.any(-1)

    return some
