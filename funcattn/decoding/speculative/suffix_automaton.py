"""A suffix automaton of a text as a value: a record of tensors, which grows by tokens.

    automaton = empty(room, limit)
    automaton = extended(automaton, tokens, count)     with the first `count` of some tokens
    draft = continuations(automaton, last, ...)        what followed the text's suffix before

States are the sets of places where some substrings end; the walk of a string from state 0 is the
set of its ends, and `link` leads from a state to that of the longest suffix with more of them. A
text of S tokens has at most 2 S states and 3 S transitions. A token is added in amortized constant
time, and the number of ends is kept of all strings of at most `limit` tokens, in O(limit).

It is read and written as numbers on the CPU, in one autograd Function with a rule for vmap, so rows
of a batch have automata of their own, and older values stay as they were.

Sources: Blumer et al., The smallest automaton recognizing the subwords of a text, Theoretical
Computer Science 40 (1985); Oliaro et al., SuffixDecoding, arXiv:2411.04975 (drafts by counts).
"""

import heapq
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ...records import record


@record
class Automaton(NamedTuple):
    """The automaton of a text of at most R tokens.

    states: int64 (5, 2 R + 2): link, longest string, ends, newest end, first transition. edges:
    int64 (4, 3 R + 4): from, token, to, next transition of the same state. table: int64 (C,), a
    hash table of transitions by (from, token). sizes: int64 (6,): states, edges, state of the
    text, its length, state of its suffix of at most limit tokens, limit.
    """

    states: Tensor
    edges: Tensor
    table: Tensor
    sizes: Tensor


def empty(room: int, limit: int) -> Automaton:
    """The automaton of no text, with room for `room` tokens; on the CPU."""
    make = lambda *shape: torch.zeros(shape, dtype=torch.int64, device="cpu")
    states, edges = make(5, 2 * room + 2), make(4, 3 * room + 4)
    states[0, 0] = -1
    sizes = torch.tensor([1, 1, 0, 0, 0, limit], device="cpu")  # edge 0 is none
    return Automaton(states, edges, make(1 << (6 * room + 8).bit_length()), sizes)


def extended(automaton: Automaton, tokens: Tensor, count: Tensor) -> Automaton:
    """The automaton of the text and the first `count` () of tokens (N,) behind it."""
    found = Extend.apply(*automaton, tokens.to("cpu"), count.to("cpu"))
    return Automaton(*found)


def continuations(
    automaton: Automaton, last: Tensor, *, nodes: int, length: int, longest: int, chain: bool
) -> tuple[Tensor, Tensor]:
    """What followed the longest suffix of the text with one more token, and its shorter ones.

    An earlier place where the m last tokens are the same, and no more, counts 2^m (m at most
    `longest`). The `nodes` continuations with the greatest counts are a tree, since a longer one
    counts no more than its beginning; of equals the shorter ones, then the newest, come first.

    Args:
        last: int64 (), a token behind the text.
        length: the depth of the tree. chain: one child of each node, the first.

    Returns:
        tokens, parent: int64 (nodes,), as in `Draft`; parents are -1 where there are no more.
    """
    form = (nodes, length, longest, chain)
    tokens, parent = Continue.apply(form, *automaton, last.to("cpu"))
    return tokens.to(last.device), parent.to(last.device)


class Numbers:
    """The tensors of an automaton as arrays of Python numbers, which it shares with them."""

    def __init__(self, states: Tensor, edges: Tensor, table: Tensor, sizes: Tensor) -> None:
        array = lambda x: memoryview(cast(bytes, x.numpy()))
        rows = lambda x: [array(row) for row in x]
        self.link, self.longest, self.ends, self.newest, self.first = rows(states)
        self.origin, self.token, self.to, self.next = rows(edges)
        self.table, self.sizes = array(table), array(sizes)
        self.mask = len(self.table) - 1

    def slot(self, state: int, token: int) -> int:
        """The place in the table of a transition, or of a missing one."""
        at = (state * 0x9E3779B1 + token * 0x85EBCA77) & self.mask
        while (e := self.table[at]) and (self.origin[e] != state or self.token[e] != token):
            at = (at + 1) & self.mask
        return at

    def follow(self, state: int, token: int) -> int:
        """The state behind a transition; -1 where there is none (a state is never behind 0)."""
        e = self.table[self.slot(state, token)]
        return self.to[e] if e else -1

    def connect(self, state: int, token: int, to: int) -> None:
        """Add or change a transition."""
        at = self.slot(state, token)
        if not (e := self.table[at]):
            e = self.sizes[1]
            self.sizes[1] = e + 1
            self.origin[e], self.token[e], self.next[e] = state, token, self.first[state]
            self.first[state], self.table[at] = e, e
        self.to[e] = to

    def out(self, state: int) -> Iterator[tuple[int, int]]:
        """The tokens of the transitions of a state, and where they lead."""
        e = self.first[state]
        while e:
            yield self.token[e], self.to[e]
            e = self.next[e]

    def new_state(self, longest: int) -> int:
        """A state without ends and transitions."""
        v = self.sizes[0]
        self.sizes[0] = v + 1
        self.longest[v] = longest
        return v

    def add(self, token: int) -> None:
        """Add a token behind the text."""
        link, longest = self.link, self.longest
        _, _, p, length, short, limit = self.sizes
        here = self.new_state(length + 1)
        while p >= 0 and self.follow(p, token) < 0:
            self.connect(p, token, here)
            p = link[p]
        q = 0 if p < 0 else self.follow(p, token)
        if p >= 0 and longest[p] + 1 != longest[q]:
            # The strings of q up to this length have an end more than its longer ones.
            copy = self.new_state(longest[p] + 1)
            link[copy], self.ends[copy], self.newest[copy] = link[q], self.ends[q], self.newest[q]
            for each, to in [*self.out(q)]:
                self.connect(copy, each, to)
            while p >= 0 and self.follow(p, token) == q:
                self.connect(p, token, copy)
                p = link[p]
            link[q] = copy
            q = copy
        link[here] = q
        # The suffixes of at most `limit` tokens have one end more.
        kept = min(length, limit - 1)
        while short and longest[link[short]] >= kept:
            short = link[short]
        short = v = self.follow(short, token)
        while v:
            self.ends[v], self.newest[v] = self.ends[v] + 1, length + 1
            v = link[v]
        self.sizes[2], self.sizes[3], self.sizes[4] = here, length + 1, short

    def contexts(self, longest: int) -> tuple[list[int], list[float]]:
        """The states of the suffixes of the text that end elsewhere too, longest first; weights.

        Weights are those of an end which is not one of the state before.
        """
        v, kept = self.sizes[4], min(self.sizes[3], longest)
        while v and (self.longest[self.link[v]] >= kept or self.ends[v] < 2):
            v = self.link[v]
        states, weights, matched = [], [], min(self.longest[v], kept)
        while v:
            states.append(v)
            weights.append(2.0 ** (min(self.longest[v], matched) - matched))
            v = self.link[v]
        return states, weights

    def count(self, states: list[int], weights: list[float]) -> float:
        """The weights of all ends; a state has the ends of the one before it (-1 has none)."""
        total, before = 0.0, 0
        for v, weight in zip(states, weights, strict=True):
            if v >= 0:
                total += weight * (self.ends[v] - before)
                before = self.ends[v]
        return total


class VmapInfo(Protocol):
    """What a vmap rule is told."""

    batch_size: int


def _each_row(
    f: Callable[..., tuple[Tensor, ...]],
    info: VmapInfo,
    dims: tuple[Any, ...],
    tensors: tuple[Tensor, ...],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    rows = [
        f(*(x if d is None else x.select(d, i) for x, d in zip(tensors, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    found = tuple(torch.stack(sides) for sides in zip(*rows, strict=True))
    return found, (0,) * len(found)


class Extend(torch.autograd.Function):
    """(states, edges, table, sizes, tokens, count) -> the four of the longer text."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        *given, tokens, count = tensors
        after = tuple(x.clone(memory_format=torch.contiguous_format) for x in given)
        numbers = Numbers(*after)
        for token in tokens.tolist()[: int(count)]:
            numbers.add(token)
        return after

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(
        info: VmapInfo, in_dims: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _each_row(Extend.apply, info, in_dims, tensors)


class Continue(torch.autograd.Function):
    """((nodes, length, longest, chain), states, edges, table, sizes, last) -> tokens, parents."""

    @staticmethod
    def forward(form: tuple[int, int, int, bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        *given, last = tensors
        nodes, length, longest, chain = form
        numbers = Numbers(*(x.clone(memory_format=torch.contiguous_format) for x in given))
        numbers.add(int(last))
        states, weights = numbers.contexts(longest)
        tokens, parents = [], []
        # (-count, depth, -newest end, token), the parent's number, states
        waiting: list[tuple[tuple[float, int, int, int], int, list[int]]] = []

        def look(above: int, depth: int, states: list[int]) -> None:
            # The last state has the most ends, so the most transitions.
            found = []
            for token, to in numbers.out(states[-1]):
                if token >= 0:
                    below = [-1 if v < 0 else numbers.follow(v, token) for v in states]
                    score = numbers.count(below, weights)
                    found.append(((-score, depth, -numbers.newest[to], token), above, below))
            for each in [min(found)] if chain and found else found:
                heapq.heappush(waiting, each)

        if states:
            look(0, 1, states)
        while waiting and len(tokens) < nodes:
            (_, depth, _, token), above, below = heapq.heappop(waiting)
            tokens.append(token)
            parents.append(above)
            if depth < length:
                look(len(tokens), depth + 1, below)
        missing = nodes - len(tokens)
        return torch.tensor(tokens + [0] * missing), torch.tensor(parents + [-1] * missing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(
        info: VmapInfo, in_dims: tuple[Any, ...], form: tuple[int, int, int, bool], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        run = lambda *row: Continue.apply(form, *row)
        return _each_row(run, info, in_dims[1:], tensors)
