"""Inputs for laws: hypothesis strategies that draw sizes and a key, and make tensors of these.

Values come from the key, not from hypothesis, so a failure shrinks to the smallest sizes and to
key(0). Small sizes are where most bugs are: one query, one key, a head size of one, more queries
than keys, a query without keys.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

try:
    from hypothesis import HealthCheck, Phase, Verbosity, settings
    from hypothesis import given as for_all
    from hypothesis import seed as seeded
    from hypothesis import strategies as st
    from hypothesis.errors import HypothesisException
except ImportError as error:
    raise ImportError(
        "funcattn.testing.strategies: hypothesis is not installed. Install it: pip install "
        "funcattn[testing]"
    ) from error

from .. import masks as constructors
from .. import randomness, transformer
from ..masks import Mask
from ..records import describe

Strategy = st.SearchStrategy
Drawn = TypeVar("Drawn")
SIZES = (1, 2, 3, 4, 5)  # of heads
# what q is multiplied by where logits are large: exp of them overflows in every dtype
LARGE = 1000.0


class QKV(NamedTuple):
    """q (*lead, H, T, D), k (*lead, K, S, D), v (*lead, K, S, Dv)."""

    q: Tensor
    k: Tensor
    v: Tensor

    def __repr__(self) -> str:
        fields = zip(self._fields, self, strict=True)
        return f"QKV({', '.join(f'{name}={describe(x)}' for name, x in fields)})"


class Problem(NamedTuple):
    """The arguments of a law of kernels, in order: `law(kernel, *problem)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | Tensor | None
    key: Tensor

    def __repr__(self) -> str:
        mask = (
            self.mask
            if self.mask is None or isinstance(self.mask, Mask)
            else self.mask.int().tolist()
        )
        if isinstance(mask, Mask):
            mask = f"Mask({mask.start.tolist()}, {mask.stop.tolist()})"
        sizes = ", ".join(f"{name}={describe(getattr(self, name))}" for name in "qkv")
        return f"Problem({sizes}, mask={mask}, key={self.key.tolist()})"


def smallest(
    drawn: "Strategy[Drawn]", condition: Callable[[Drawn], bool], *, examples: int, seed: int = 0
) -> Drawn | None:
    """The smallest input for which a condition holds, or None where it holds for none.

    Args:
        drawn: the inputs.
        condition: may raise a BaseException that is no Exception, which ends the search.
        examples: inputs that are tried before one is found.
        seed: the same seed draws the same inputs.

    Example:
        >>> smallest(st.integers(0, 99), lambda n: n > 6, examples=50)
        7
    """
    found: list[Drawn] = []

    class Found(Exception):
        pass

    @seeded(seed)
    @settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @for_all(drawn)
    def search(value: Drawn) -> None:
        if condition(value):
            found.append(value)
            raise Found

    try:
        search()
    except Found:
        return found[-1]  # hypothesis ends with the smallest
    except HypothesisException:  # where the condition is not the same twice
        return None


def keys() -> "Strategy[Tensor]":
    """Keys of explicit randomness; they shrink to key(0)."""
    return st.integers(0, 2**32 - 1).map(randomness.key)


@st.composite
def qkv(
    draw: Any,
    *,
    dtype: torch.dtype = torch.float64,
    leads: int = 2,
    no_keys: bool = False,
    large_logits: bool = True,
    grouped: bool = True,
    head_sizes: Sequence[int] = SIZES,
    own_sizes: bool = True,
    square: bool = False,
) -> QKV:
    """Queries, keys and values of compatible shapes.

    Args:
        dtype: of all three.
        leads: the most leading axes; each may be missing, or of size one, in some of the three.
        no_keys: whether S may be 0.
        large_logits: whether exp of logits may overflow.
        grouped: whether several query heads may attend to one key head (GQA, MQA).
        head_sizes: D, and Dv, are drawn from these.
        own_sizes: whether Dv may differ from D.
        square: whether there are as many keys as queries.
    """
    features = st.sampled_from(tuple(head_sizes))
    key, K, G = draw(keys()), draw(st.integers(1, 3)), draw(st.integers(1, 3)) if grouped else 1
    T, S = draw(st.integers(1, 5)), draw(st.integers(0 if no_keys else 1, 7))
    D, Dv = draw(features), draw(features)
    S, Dv = T if square else S, Dv if own_sizes else D
    lead = draw(st.lists(st.integers(1, 3), max_size=leads))
    shapes = []
    for heads, rows, width in ((K * G, T, D), (K, S, D), (K, S, Dv)):
        own = [draw(st.sampled_from([n, 1])) for n in lead] if lead else []
        lacks = draw(st.integers(0, len(lead))) if lead else 0
        shapes.append((*own[lacks:], heads, rows, width))
    q, k, v = (
        randomness.normal(randomness.fold_in(key, i), shape, dtype)
        for i, shape in enumerate(shapes)
    )
    return QKV(q * LARGE if large_logits and draw(st.booleans()) else q, k, v)


@st.composite
def masks(
    draw: Any,
    T: int | None = None,
    S: int | None = None,
    lead: tuple[int, ...] = (),
    heads: int | None = None,
    *,
    booleans: bool = True,
    empty_rows: bool = True,
) -> Mask | Tensor:
    """Masks for T queries and S keys (drawn where not given): constructors, their unions,
    intersections and complements.

    Args:
        lead: leading axes that a mask may have, so that it differs per sequence.
        heads: query heads; booleans may then differ per head.
        booleans: whether a mask may be a dense bool tensor.
        empty_rows: whether a query may see no key.
    """
    queries = draw(st.integers(1, 5)) if T is None else T
    columns = draw(st.integers(1, 7)) if S is None else S
    own = draw(st.sampled_from([(), lead]))
    if booleans and draw(st.booleans()):
        axes = (*own, draw(st.sampled_from([1, heads or 1]))) if own or draw(st.booleans()) else ()
        found = randomness.bernoulli(
            draw(keys()), draw(st.sampled_from([1.0, 0.7, 0.3])), (*axes, queries, columns)
        )
        return found if empty_rows else found | (torch.arange(columns) == 0)
    found = draw(_intervals(queries, columns, own))
    for _ in range(draw(st.integers(0, 2))):
        other, sign = draw(_intervals(queries, columns, own)), draw(st.sampled_from("&|~"))
        found = found & other if sign == "&" else found | other if sign == "|" else ~found
    return found if empty_rows else found | constructors.sinks(queries, 1)


@st.composite
def _intervals(draw: Any, T: int, S: int, lead: tuple[int, ...]) -> Mask:
    """One mask from one constructor."""
    number = lambda low, high: draw(st.integers(low, high))
    of_sequence = lambda low, high: (
        randomness.randint(draw(keys()), lead, low, high + 1) if lead else number(low, high)
    )
    name = draw(
        st.sampled_from(
            ["causal", "full", "lower", "offset", "window", "prefix", "padding", "segments"]
        )
    )
    if name == "full":
        return constructors.full(T)
    if name == "lower":
        return constructors.causal(T, S, align="lower")
    if name == "offset":
        return constructors.causal(T, offset=of_sequence(-2, S))
    if name == "window":
        return constructors.window(T, number(1, 3), offset=of_sequence(-2, S))
    if name == "prefix":
        return constructors.sinks(T, number(0, S))
    if name == "padding":
        return constructors.padding(T, randomness.randint(draw(keys()), lead, 0, S + 1))
    if name == "segments":
        return constructors.segments(randomness.randint(draw(keys()), (*lead, T), 0, 2).cumsum(-1))
    return constructors.causal(T)


@st.composite
def problems(
    draw: Any,
    *,
    dtype: torch.dtype = torch.float64,
    leads: int = 2,
    no_keys: bool = False,
    large_logits: bool = True,
    grouped: bool = True,
    head_sizes: Sequence[int] = SIZES,
    own_sizes: bool = True,
    square: bool = False,
    booleans: bool = True,
    empty_rows: bool = True,
    masked: Literal["any", "causal", "causal or none", "none"] = "any",
) -> Problem:
    """(q, k, v, mask, key), the arguments of a law of kernels; the mask may be None.

    Options as in `qkv` and `masks`; `masked` is which masks are drawn:
    causal ones where there are as many keys as queries.

    Example:
        >>> from hypothesis import find
        >>> find(problems(), lambda problem: True)
        Problem(q=float64[1,1,1], k=float64[1,1,1], v=float64[1,1,1], mask=None, key=[0, 0])
    """
    q, k, v = draw(
        qkv(
            dtype=dtype,
            leads=leads,
            no_keys=no_keys,
            large_logits=large_logits,
            grouped=grouped,
            head_sizes=head_sizes,
            own_sizes=own_sizes,
            square=square,
        )
    )
    H, T, S = q.shape[-3], q.shape[-2], k.shape[-2]
    if masked != "any":
        causal = masked == "causal" or (masked != "none" and T == S and draw(st.booleans()))
        return Problem(q, k, v, constructors.causal(T) if causal else None, draw(keys()))
    lead = tuple(torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]))
    mask = draw(st.none() | masks(T, S, lead, H, booleans=booleans, empty_rows=empty_rows))
    return Problem(q, k, v, mask, draw(keys()))


@st.composite
def logits(draw: Any, *, dtype: torch.dtype = torch.float32, hidden: bool = True) -> Tensor:
    """Logits (V,) with ties and, where `hidden`, some of -inf; one token is always finite.

    They are multiples of 1 / 4, so that adding a small integer is exact.
    """
    V, key = draw(st.integers(1, 12)), draw(keys())
    values, hides = randomness.split(key)
    found = randomness.randint(values, (V,), -16, 17).to(dtype) / 4
    if not (hidden and draw(st.booleans())):
        return found
    kept = torch.arange(V) == draw(st.integers(0, V - 1))
    return torch.where(randomness.bernoulli(hides, 0.5, (V,)) & ~kept, float("-inf"), found)


@st.composite
def trees(draw: Any) -> dict[str, Any]:
    """A tree of parameters: matrices and vectors in layers, integers, and an absent leaf `()`."""
    key, layers, rows = draw(keys()), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    weights = [randomness.normal(randomness.fold_in(key, n), (rows, 4)) for n in range(layers)]
    return {
        "layers": tuple({"q": weight, "norm": weight[0].clone()} for weight in weights),
        "ids": torch.arange(rows),
        "absent": (),
    }


@st.composite
def tables(draw: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Conditional probabilities of a target and of a draft, as laws of acceptance take them.

    target[n] is (V,) * n + (V,) for n = 0, ..., N, and draft[n] for n = 0, ..., N - 1, in float64;
    some tokens may have probability zero.
    """
    V, N, hides = draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.booleans())
    both = []
    for key, length in zip(randomness.split(draw(keys())), (N + 1, N), strict=True):
        table = []
        for n, own in zip(range(length), randomness.split(key, length), strict=True):
            shape = tuple(itertools.repeat(V, n + 1))
            of_values, of_zeros = randomness.split(own)
            values = 2 * randomness.normal(of_values, shape, torch.float64)
            hidden = randomness.bernoulli(of_zeros, 0.3, shape) & (torch.arange(V) > 0)
            table.append(
                torch.where(hidden, float("-inf"), values).softmax(-1)
                if hides
                else values.softmax(-1)
            )
        both.append(table)
    return both[0], both[1]


def decoders() -> "Strategy[Any]":
    """Parameters of a small decoder: what quantization schemes encode."""
    config = transformer.Config(
        vocabulary=11, width=32, layers=1, heads=2, kv_heads=1, head_size=16, feed_forward=32
    )
    return keys().map(transformer.decoder(config).init)
