"""Sampler: what it is, how samplers compose, and their log-probabilities.

    init(V) -> state
    update(logits, state) -> (logits, state)
    observe(token, state) -> state

The state is a pytree of tensors; to roll back is to use an older one. Filtered tokens have logits
of -inf. Functions are of one row of logits (V,); many rows are `vmap`.

Only `draw` is random. A sampler with a random choice (xtc) returns the exact log-probabilities of
the mixture of both outcomes, so a state needs no key.

Of equal logits lower ids come first. A row without tokens, or with NaN or +inf, has
log-probabilities of NaN, and `draw` raises for it where values can be read.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import randomness, tree
from ..core import errors
from ..core.doors import door, printed, reprinted, shown_value, uncalled, what_is
from ..records import ABSENT, formerly
from ..tree import Tree


def _ignore(tokens: Tensor, length: Tensor, state: Tree) -> Tree:
    return state


@formerly(prime="observe_prompt")
@reprinted
class Sampler(NamedTuple):
    """A transform of logits. Not a record: it holds functions.

    Its state is a pytree of tensors, `()` for stateless samplers.

    Args:
        init: V -> state, before the first token.
        update: (logits (V,), state) -> (logits (V,), state); -inf masks a token.
        observe: (token int64 (), state) -> state, of the same structure, shapes and dtypes.
        deterministic: True where update keeps one token, so that drawing needs no noise.
        observe_prompt: (tokens int64 (T,), length int64 (), state) -> state, after a prompt of
            which the first `length` tokens count; the identity for most samplers.
        text: the repr, the call that made it.

    Example:
        >>> from funcattn.sampling import temperature, top_p
        >>> chain(temperature(0.7), top_p(0.9))
        Sampler(chain(temperature(0.7), top_p(0.9)))
    """

    init: Callable[[int], Tree]
    update: Callable[[Tensor, Tree], tuple[Tensor, Tree]]
    observe: Callable[[Tensor, Tree], Tree]
    deterministic: bool = False
    observe_prompt: Callable[[Tensor, Tensor, Tree], Tree] = _ignore
    text: str = ""

    def __call__(self, *args: object, **options: object) -> "Sampler":
        """`greedy()` is `greedy`, for symmetry with other samplers; calling any other raises."""
        return (
            self
            if self == greedy and not args and not options
            else uncalled(self, *args, **options)
        )

    def __repr__(self) -> str:
        return f"Sampler({self.text or shown_value(self.update)})"


@door
@printed
def stateless(transform: Callable[[Tensor], Tensor], *, deterministic: bool = False) -> Sampler:
    """A sampler from a function of logits (V,) -> (V,).

    Example:
        >>> never_zero = stateless(lambda logits: logits.index_fill(-1, torch.tensor(0),
        ...     float("-inf")))
        >>> log_probs(never_zero)(torch.zeros(3)).exp().tolist()
        [0.0, 0.5, 0.5]
    """

    def update(logits: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        after = transform(logits)
        if not isinstance(after, Tensor) or after.shape != logits.shape:
            got, remedy = what_is(after), "Hide a token by -inf instead of leaving it out."
            errors.fail(
                "stateless", "what transform returns", f"logits {errors.shape(logits)}", got, remedy
            )
        return after, state

    return Sampler(lambda V: ABSENT, update, lambda token, state: state, deterministic)


def chain(*samplers: Sampler) -> Sampler:
    """Apply samplers to logits (V,) from left to right; the state is the tuple of their states."""
    _require_samplers("chain", samplers)

    def update(logits: Tensor, states: tuple[Tree, ...]) -> tuple[Tensor, tuple[Tree, ...]]:
        after = []
        for sampler, state in zip(samplers, states, strict=True):
            logits, state = sampler.update(logits, state)
            after.append(state)
        return logits, tuple(after)

    return Sampler(
        lambda V: tuple(sampler.init(V) for sampler in samplers),
        update,
        lambda token, states: tuple(
            s.observe(token, state) for s, state in zip(samplers, states, strict=True)
        ),
        any(sampler.deterministic for sampler in samplers),
        lambda tokens, length, states: tuple(
            s.observe_prompt(tokens, length, x) for s, x in zip(samplers, states, strict=True)
        ),
        f"chain({', '.join(sampler.text or shown_value(sampler.update) for sampler in samplers)})",
    )


@door
@printed
def mixture(share: float | Tensor, first: Sampler, second: Sampler) -> Sampler:
    """At every token the second sampler with probability `share`, else the first.

        P = (1 - share) * P_first + share * P_second

    The log-probabilities are those of the mixture, without a random choice. Later samplers of a
    chain apply to the mixture; those that should apply to each outcome go into `first` and
    `second`.

    Args:
        share: a number or a tensor (), in [0, 1].

    Raises:
        ValueError: share outside [0, 1].

    Example:
        >>> log_probs(mixture(0.25, greedy, chain()))(torch.zeros(2)).exp()
        tensor([0.8750, 0.1250])

    Law: the mixture of both distributions (test_sampling.py::test_a_mixture_has_the_mixed_law).
    """
    require(
        between(share, 0, 1),
        "mixture",
        "share",
        "in [0, 1]",
        share,
        "It is the probability of the second sampler.",
    )
    _require_samplers("mixture", (first, second))
    both = chain(first, second)

    def update(logits: Tensor, states: tuple[Tree, Tree]) -> tuple[Tensor, tuple[Tree, Tree]]:
        weight = torch.as_tensor(share, dtype=logits.dtype, device=logits.device)
        (one, one_after), (two, two_after) = (
            first.update(logits, states[0]),
            second.update(logits, states[1]),
        )
        one, two = normalized(one) + (1 - weight).log(), normalized(two) + weight.log()
        hidden = (one == -torch.inf) & (two == -torch.inf)  # the derivative of logaddexp is NaN
        mixed = torch.logaddexp(torch.where(hidden, 0, one), torch.where(hidden, 0, two))
        return torch.where(hidden, -torch.inf, mixed), (one_after, two_after)

    return both._replace(update=update, deterministic=False)


def normalized(logits: Tensor) -> Tensor:
    """log_softmax of logits (*lead, V); -inf everywhere, not NaN, where all tokens are filtered."""
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.where(nothing, -torch.inf, torch.where(nothing, 0, logits).log_softmax(-1))


def _argmax_only(logits: Tensor) -> Tensor:
    best = logits.argmax(-1, keepdim=True)  # of equal logits the lowest id, as torch documents
    return torch.full_like(logits, float("-inf")).scatter(-1, best, logits.gather(-1, best))


greedy = stateless(_argmax_only, deterministic=True)._replace(text="greedy()")


@door
def log_probs(sampler: Sampler) -> Callable[..., Tensor]:
    """The log-probabilities that a sampler draws from, in float32 at least.

    Returns (logits (V,), state=None) -> (V,).

    Example:
        >>> from funcattn.sampling import temperature, top_k
        >>> log_probs(chain(temperature(0.5), top_k(2)))(torch.tensor([0.0, 1.0, 2.0])).exp()
        tensor([0.0000, 0.1192, 0.8808])
    """

    def log_probabilities(logits: Tensor, state: Tree = None) -> Tensor:
        return log_probs_with_state(
            sampler, logits, begin(sampler, logits) if state is None else state
        )[0]

    return log_probabilities


@door
def log_probs_with_state(sampler: Sampler, logits: Tensor, state: Tree) -> tuple[Tensor, Tree]:
    """Log-probabilities (V,), in float32 at least, and the state for observing a token."""
    filtered, state = _updated(sampler, _accurate(logits), state)
    return filtered.log_softmax(-1), state


@door
def draw(
    key: Tensor, sampler: Sampler, logits: Tensor, state: Tree, *, wanted: Tensor | None = None
) -> tuple[Tensor, Tree]:
    """One token () drawn from logits (V,), and the state that has observed it.

    Args:
        key: int64 (2,), randomness.
        wanted: bool (), False where the token is unused (a row of a batch whose text has ended,
            such as at the end of a grammar): then values are not checked, and the token is
            arbitrary. None is True.

    Returns:
        token: int64 (). state: of the same structure and shapes as the given one.

    Raises:
        ValueError: the sampler leaves no token, or NaN (where values are concrete, in any row).
    """
    same = logits, state  # of greedy the largest of all logits is the one that it keeps
    filtered, state = same if sampler is greedy else _updated(sampler, _accurate(logits), state)
    drawable = filtered.amax(-1).isfinite()
    require_drawable("draw", drawable if wanted is None else drawable | ~wanted)
    token = filtered.argmax(-1) if sampler.deterministic else randomness.categorical(key, filtered)
    return token, sampler.observe(token, state)


def _updated(sampler: Sampler, logits: Tensor, state: Tree) -> tuple[Tensor, Tree]:
    """The logits and state of `update`, checked to be two, logits of their shape first."""
    after = sampler.update(logits, state)
    first = after[0] if isinstance(after, tuple) and len(after) == 2 else None
    if getattr(first, "shape", None) != logits.shape:
        wanted = f"a pair, logits {errors.shape(logits)} and a state"
        remedy = "Of a function of logits alone, stateless(f) makes a sampler."
        errors.fail("draw", "what update returns", wanted, what_is(after), remedy, TypeError)
    return after


def require_drawable(function: str, drawable: Tensor) -> None:
    """Fail where values can be read and a row has no token to draw."""
    if errors.is_true(~drawable):
        remedy = "Look for NaN in the logits, and let no filter hide every token."
        errors.fail(
            function,
            "what the sampler leaves",
            "one token at least, and no NaN",
            "nothing to draw from",
            remedy,
        )


@door
def begin(sampler: Sampler, logits: Tensor) -> Tree:
    """The state before the first token, on the device of the logits (V,)."""
    # Dynamo does not support the device as a context manager.
    here = (
        contextlib.nullcontext() if torch.compiler.is_compiling() else torch.device(logits.device)
    )
    with here:
        state = sampler.init(logits.shape[-1])
    for leaf in tree.leaves(state):
        if not isinstance(leaf, Tensor):
            remedy = "A number is a tensor too: torch.tensor(0)."
            what, got = "the state that init returns", f"{what_is(leaf)} in it"
            errors.fail("begin", what, "a tree of tensors", got, remedy, TypeError)
    # Tensors that a sampler was primed with may be on another device.
    return tree.map(lambda x: x.to(logits.device), state)


@door
def observe_prompt(
    sampler: Sampler, tokens: Tensor, state: Tree, *, length: Tensor | None = None
) -> Tree:
    """The state after a prompt, as each sampler of a chain is usually defined.

    repetition_penalty, no_repeat_ngram and dry count the prompt, as in transformers, vLLM and
    llama.cpp; presence_penalty and frequency_penalty count generated tokens only, as in vLLM;
    constraints begin after it. `fa.generate` calls this.

    Args:
        tokens: int64 (T,).
        state: from `sampler.init(V)`.
        length: int64 (), how many of the tokens count, where the prompt is padded at its end; None
            is all.

    Example:
        >>> from funcattn.sampling import repetition_penalty
        >>> sampler = repetition_penalty(2.0)
        >>> sampler.update(torch.ones(4), observe_prompt(sampler, torch.tensor([1, 3, 3]),
        ...     sampler.init(4)))[0]
        tensor([1.0000, 0.5000, 1.0000, 0.5000])

    Law: padding is not observed, and a prompt in parts equals the prompt at once
        (test_penalties.py).
    """
    _require_samplers("observe_prompt", (sampler,))
    if not isinstance(tokens, Tensor) or tokens.dim() != 1 or tokens.is_floating_point():
        got = (
            f"{tokens.dtype} {errors.shape(tokens)}"
            if isinstance(tokens, Tensor)
            else f"a {type(tokens).__name__}"
        )
        errors.fail(
            "observe_prompt",
            "tokens",
            "one sequence (T,) of token ids",
            got,
            "Map over many with vmap.",
            TypeError,
        )
    count = (
        torch.full((), len(tokens), dtype=torch.int64, device=tokens.device)
        if length is None
        else length
    )
    return sampler.observe_prompt(tokens, count, state)


@door
@printed
def primed(sampler: Sampler, tokens: Tensor) -> Sampler:
    """The sampler whose initial state has observed tokens (T,): for a text that is in a cache."""
    return sampler._replace(init=lambda V: observe_prompt(sampler, tokens, sampler.init(V)))


def require(
    holds: bool | Tensor, function: str, argument: str, wanted: str, got: object, remedy: str
) -> None:
    """Fail where a number, or any entry of a tensor whose values can be read, is out of range."""
    if errors.is_true(~holds) if isinstance(holds, Tensor) else not holds:
        errors.fail(
            function, argument, wanted, errors.peek(got) if isinstance(got, Tensor) else got, remedy
        )


def require_integer(
    function: str, argument: str, n: object, least: int, remedy: str, *, called: str = ""
) -> None:
    """Fail where a size, which determines shapes, is not an int or is too small."""
    if not isinstance(n, int) or isinstance(n, bool):
        errors.fail(
            function,
            argument,
            "an int, which sets shapes",
            repr(n),
            "It cannot be a tensor.",
            TypeError,
        )
    require(n >= least, function, argument, f"at least {called}{least}", n, remedy)


def bounded(logits: Tensor) -> Tensor:
    """Logits with overflow to +inf replaced by the greatest finite number."""
    return logits.clamp(max=torch.finfo(logits.dtype).max)


def between(x: float | Tensor, low: float, high: float) -> bool | Tensor:
    """True where low <= x <= high, for a number or each entry of a tensor; False for NaN."""
    return (x >= low) & (x <= high)


LARGE = 1e30  # the greatest factor: its product with a logit of up to 10^8 is finite in float32


def rank(logits: Tensor) -> Tensor:
    """The rank of each logit in descending order, equal ones by id."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(order).scatter(
        -1, order, torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
    )


def _require_samplers(function: str, samplers: Sequence[object]) -> None:
    for i, sampler in enumerate(samplers):
        if not isinstance(sampler, Sampler):
            remedy = "Call a factory such as temperature(0.8) for each."
            errors.fail(
                function,
                f"argument {i}",
                "a Sampler",
                f"a {type(sampler).__name__}",
                remedy,
                TypeError,
            )


def _accurate(logits: Tensor) -> Tensor:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
