"""The closed algebra of attention: every derivative of a contraction is a contraction.

    P_ij = exp(scale q_i . k_j + bias_ij - l_i)                    over the keys that query i sees

With l an *independent* input, take sums over terms of weights W = P * F_1 * F_2 * ..., where each
factor F is a sum of products a_i . b_j (or a dense matrix), and let an output be one of

    query side   o_i = sum_j W_ij c_j
    key side     o_j = sum_i W_ij c_i
    pair side    o_ij = W_ij

A contraction (`Contraction`) computes any number of such outputs in one pass over blocks of P,
which is never materialized as a whole. Differentiating W gives the same W with one more factor, so
the vjp and the jvp of a contraction are again one contraction each: derivatives of every order, in
every nesting, in O(T + S) memory. `attend`, the one function that normalizes, has a contraction for
its vjp and another for its jvp.

This module is symbolic: from a contraction and the indices of cotangents or tangents it computes
the next contraction. Tensors are named by their index in a flat list that starts with q, k, l.

Source: the rules follow from d exp(S - l) = exp(S - l) (dS - dl); Dao et al., FlashAttention,
arXiv:2205.14135, appendix B, is the case of the first vjp.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

Q, K, L = 0, 1, 2  # indices of the queries, the keys and the log-sum-exp
ONES = -1  # in place of an index: a constant feature of ones, so a . 1, or a sum without values


class LowRankFactor(NamedTuple):
    """A low-rank factor weight * a_i . b_j; a, b index query-side, key-side tensors."""

    a: int
    b: int
    weight: float = 1.0


class DenseFactor(NamedTuple):
    """A dense factor weight * m_ij; m is the index of a tensor (*lead, T, S)."""

    m: int
    weight: float = 1.0


# Aliases: earlier names.
Pair = LowRankFactor
Dense = DenseFactor

Summand = LowRankFactor | DenseFactor
Factor = tuple[Summand, ...]  # a sum of low-rank and dense factors


class Term(NamedTuple):
    """weight * P * (product of factors), contracted with the values at index `value`.

    ONES sums without values; on the pair side `value` is ignored.
    """

    factors: tuple[Factor, ...]
    value: int = ONES
    weight: float = 1.0


class Output(NamedTuple):
    """One result of a contraction: the side that indexes its rows, and the terms that it sums."""

    side: str  # "query", "key" or "pair"
    terms: tuple[Term, ...]


class Contraction(NamedTuple):
    """A contraction: outputs that share P, and the inputs of P beside q, k and l."""

    outputs: tuple[Output, ...]
    scale: float = 1.0
    mask: tuple[int, ...] = ()  # indices of (start, stop), or of (booleans,)
    bias: int = ONES  # index of the bias; ONES: none
    dropout: int = ONES  # index of the keys of dropout; ONES: none
    rate: float = 0.0


Sweep = Contraction  # alias: its earlier name


class _Collect:
    """Outputs, keyed by the index of the tensor whose gradient they are."""

    def __init__(self) -> None:
        self.terms: dict[int, list[Term]] = {}
        self.side: dict[int, str] = {}

    def add(
        self,
        of: int,
        side: str,
        factors: tuple[Factor, ...],
        value: int = ONES,
        weight: float = 1.0,
    ) -> None:
        self.terms.setdefault(of, []).append(Term(factors, value, weight))
        self.side[of] = side

    def outputs(self) -> tuple[tuple[Output, ...], tuple[int, ...]]:
        places = tuple(sorted(self.terms))
        return tuple(Output(self.side[p], tuple(self.terms[p])) for p in places), places


def vjp(
    contraction: Contraction,
    cotangents: dict[int, int],
    needed: set[int],
    lead: Callable[[int], Hashable],
) -> tuple[Contraction, tuple[int, ...]]:
    """The contraction that computes the vjp of a contraction.

    Args:
        contraction: the contraction to differentiate.
        cotangents: from the number of an output to the index of its cotangent.
        needed: indices of the tensors whose gradients are needed.
        lead: the leading shape of the tensor at an index; only products with equal leading shapes
            are added into one factor, since a sum over an axis that a product lacks would count it
            once per element of the axis.

    Returns:
        The contraction, and for each of its outputs the index of the tensor whose gradient it is.
    """
    found = _Collect()
    # of a product of factors: the sum of g . c over its terms
    cotangents_of_product: dict[tuple[tuple[Factor, ...], Hashable], list[Summand]] = {}
    for number, g in cotangents.items():
        side, terms = contraction.outputs[number]
        for factors, c, weight in terms:
            if side == "pair":
                x, leads = DenseFactor(g, weight), (lead(g), ())
            else:
                x = LowRankFactor(g, c, weight) if side == "query" else LowRankFactor(c, g, weight)
                leads = (lead(g), lead(c) if c != ONES else ())
            cotangents_of_product.setdefault((factors, leads), []).append(x)
            if c in needed and side != "pair":
                found.add(c, "key" if side == "query" else "query", factors, g, weight)
    for (factors, _), summands in cotangents_of_product.items():
        x = tuple(summands)
        s = contraction.scale
        for place, side, value, weight in (
            (Q, "query", K, s),
            (K, "key", Q, s),
            (L, "query", ONES, -1.0),
            (contraction.bias, "pair", ONES, 1.0),
        ):
            if place in needed:
                found.add(place, side, (*factors, x), value, weight)
        for i, factor in enumerate(factors):
            rest = (*factors[:i], *factors[i + 1 :], x)
            for summand in factor:
                if isinstance(summand, DenseFactor):
                    if summand.m in needed:
                        found.add(summand.m, "pair", rest, ONES, summand.weight)
                    continue
                if summand.a in needed:
                    found.add(summand.a, "query", rest, summand.b, summand.weight)
                if summand.b in needed:
                    found.add(summand.b, "key", rest, summand.a, summand.weight)
    outputs, places = found.outputs()
    return contraction._replace(outputs=outputs), places


def jvp(contraction: Contraction, tangents: dict[int, int]) -> Contraction:
    """The contraction that computes the jvp of a contraction.

    An output that no tangent reaches has no terms.

    Args:
        contraction: the contraction to differentiate.
        tangents: from the index of a tensor to the index of its tangent.
    """
    dS = logit_tangent(contraction, tangents)
    outputs = []
    for side, terms in contraction.outputs:
        tangent_terms = []
        for factors, c, weight in terms:
            if dS:
                tangent_terms.append(Term((*factors, dS), c, weight))
            for i, factor in enumerate(factors):
                if dF := _factor_tangent(factor, tangents):
                    tangent_terms.append(Term((*factors[:i], *factors[i + 1 :], dF), c, weight))
            if c in tangents and side != "pair":
                tangent_terms.append(Term(factors, tangents[c], weight))
        outputs.append(Output(side, tuple(tangent_terms)))
    return contraction._replace(outputs=tuple(outputs))


def attend_tangent(empty: Contraction, v: int, tangents: dict[int, int]) -> Contraction:
    """The contraction for the jvp of attend: sum_j P (dS v + dv), and sum_j P dS = dlse.

    The tangent of the output is the first minus the second times the output. Without tangents of q,
    k and the bias there is no second output.

    Args:
        empty: a contraction without outputs.
        v: index of the values.
        tangents: from the index of a tensor to the index of its tangent.
    """
    dS = logit_tangent(empty, tangents)
    accumulator = ((Term((dS,), v),) if dS else ()) + (
        (Term((), tangents[v]),) if v in tangents else ()
    )
    return empty._replace(
        outputs=(Output("query", accumulator), *((Output("query", (Term((dS,)),)),) if dS else ()))
    )


class AttendCotangents(NamedTuple):
    """Indices of what `attend_jvp_vjp` reads of the cotangents of attend and of its jvp."""

    out: int | None  # cotangent of out
    dout: int | None  # cotangent of its tangent
    out_sums: int  # one feature: g_lse - g . out - h . dout, for cotangents g of out and h of dout
    dout_sums: int  # one feature: h_lse - h . out


def attend_jvp_vjp(
    empty: Contraction,
    v: int,
    tangents: dict[int, int],
    cotangents: AttendCotangents,
    needed: set[int],
) -> tuple[Contraction, tuple[int, ...]]:
    """The contraction for the vjp of attend and its jvp at once, in one pass over P.

    With E = dS - dlse, so that P E is the tangent of P, and B = h v' + dout_sums the cotangent of
    P E, less its mean: the gradient of the logits is P (E B + h dv' + g v' + out_sums), that of
    their tangent P B. The sums are all that normalization adds, and they are known from the
    outputs before the pass.

    Args:
        empty: a contraction without outputs.
        v: index of the values.
        tangents: from the index of a tensor to the index of its tangent; with that of L, dlse,
            where q, k or the bias have one.
        cotangents: see `AttendCotangents`.
        needed: indices of the tensors, and of tangents, whose gradients are needed.

    Returns:
        The contraction, and for each of its outputs the index of the tensor whose gradient it is.
    """
    g, h, s = cotangents.out, cotangents.dout, empty.scale
    E = logit_tangent(empty, tangents)
    of_value, of_tangent = [LowRankFactor(cotangents.out_sums, ONES)], list[Summand]()
    if E:
        of_tangent.append(LowRankFactor(cotangents.dout_sums, ONES))
    if h is not None:
        of_tangent.append(LowRankFactor(h, v))
        if v in tangents:
            of_value.append(LowRankFactor(h, tangents[v]))
    if g is not None:
        of_value.append(LowRankFactor(g, v))
    A, B = tuple(of_value), tuple(of_tangent)
    found = _Collect()
    sides = [(Q, "query", K, s), (K, "key", Q, s)]
    if empty.bias != ONES:
        sides.append((empty.bias, "pair", ONES, 1.0))
    for place, side, other, weight in sides:
        found.add(place, side, (A,), other, weight)
        if E:
            found.add(place, side, (E, B), other, weight)
        if place in tangents:
            found.add(tangents[place], side, (B,), other, weight)
        if other in tangents:
            found.add(place, side, (B,), tangents[other], weight)
    if g is not None:
        found.add(v, "key", (), g)
    if h is not None and E:
        found.add(v, "key", (E,), h)
    if h is not None and v in tangents:
        found.add(tangents[v], "key", (), h)
    for place in set(found.terms) - needed:
        del found.terms[place]
    outputs, places = found.outputs()
    return empty._replace(outputs=outputs), places


def logit_tangent(contraction: Contraction, tangents: dict[int, int]) -> Factor:
    """d(scale q . k + bias - l) as a factor."""
    dS: list[Summand] = []
    if Q in tangents:
        dS.append(LowRankFactor(tangents[Q], K, contraction.scale))
    if K in tangents:
        dS.append(LowRankFactor(Q, tangents[K], contraction.scale))
    if L in tangents:
        dS.append(LowRankFactor(tangents[L], ONES, -1.0))
    if contraction.bias in tangents:
        dS.append(DenseFactor(tangents[contraction.bias]))
    return tuple(dS)


def _factor_tangent(factor: Factor, tangents: dict[int, int]) -> Factor:
    summands: list[Summand] = []
    for summand in factor:
        if isinstance(summand, DenseFactor):
            if summand.m in tangents:
                summands.append(DenseFactor(tangents[summand.m], summand.weight))
            continue
        if summand.a in tangents:
            summands.append(LowRankFactor(tangents[summand.a], summand.b, summand.weight))
        if summand.b in tangents:
            summands.append(LowRankFactor(summand.a, tangents[summand.b], summand.weight))
    return tuple(summands)


def places(contraction: Contraction) -> tuple[set[int], set[int], set[int]]:
    """Indices of the query-side (T rows), key-side (S rows) and pair (T x S) tensors."""
    query, key, pair = {Q, L}, {K}, set()
    if contraction.bias != ONES:
        pair.add(contraction.bias)
    for side, terms in contraction.outputs:
        for factors, c, _ in terms:
            if side != "pair" and c != ONES:
                (key if side == "query" else query).add(c)
            for factor in factors:
                for summand in factor:
                    if isinstance(summand, DenseFactor):
                        pair.add(summand.m)
                        continue
                    query.add(summand.a)
                    key.add(summand.b)
    return query - {ONES}, key - {ONES}, pair


def prune(contraction: Contraction) -> tuple[Contraction, list[int]]:
    """The same contraction over only the tensors that it reads, and their old indices."""
    used = sorted(
        set().union(*places(contraction), contraction.mask, {contraction.dropout} - {ONES})
    )
    new = {old: n for n, old in enumerate(used)} | {ONES: ONES}
    summand = lambda s: (
        DenseFactor(new[s.m], s.weight)
        if isinstance(s, DenseFactor)
        else LowRankFactor(new[s.a], new[s.b], s.weight)
    )
    factor: Any = lambda f: tuple(summand(s) for s in f)
    term = lambda t, side: Term(
        tuple(factor(f) for f in t.factors), ONES if side == "pair" else new[t.value], t.weight
    )
    outputs = tuple(
        Output(o.side, tuple(term(t, o.side) for t in o.terms)) for o in contraction.outputs
    )
    mask = tuple(new[p] for p in contraction.mask)
    bias, dropout = new[contraction.bias], new[contraction.dropout]
    return contraction._replace(outputs=outputs, mask=mask, bias=bias, dropout=dropout), used
