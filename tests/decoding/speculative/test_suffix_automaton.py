"""A suffix automaton is that of a count of all substrings, in pieces, in rows and in forks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import funcattn as fa
from funcattn.decoding.speculative.suffix_automaton import (
    Numbers,
    continuations,
    empty,
    extended,
)

ids = lambda tokens: torch.tensor(tokens, dtype=torch.int64)


def made(text, limit=6, room=None):
    return extended(empty(len(text) if room is None else room, limit), ids(text), ids(len(text)))


def walk(numbers, string):
    state = 0
    for token in string:
        state = numbers.follow(state, token)
        if state < 0:
            return state
    return state


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.lists(st.integers(0, 2), min_size=1, max_size=24), limit=st.sampled_from([2, 4, 30]))
def test_every_string_is_counted(text, limit):
    numbers, n = Numbers(*made(text, limit)), len(text)
    strings = {tuple(text[i:j]) for i in range(n) for j in range(i + 1, n + 1)}
    for string in strings:
        ends = [e for e in range(n + 1) if tuple(text[max(0, e - len(string)) : e]) == string]
        state = walk(numbers, string)
        assert state > 0
        if len(string) <= limit:
            assert numbers.ends[state] == len(ends)
            assert numbers.newest[state] == max(ends)
    for string in strings:
        for token in range(3):
            assert (walk(numbers, (*string, token)) > 0) == ((*string, token) in strings)
    assert numbers.sizes[0] <= max(2 * n, 2)
    assert numbers.sizes[1] <= 3 * n + 1


@pytest.mark.parametrize("limit", [3, 9])
def test_a_text_in_pieces_is_the_text_at_once(limit):
    text = fa.random.randint(fa.key(3), (50,), 0, 3)
    whole, parts = made(text.tolist(), limit), empty(50, limit)
    older = []
    for begin in range(0, 50, 7):
        older.append((parts, fa.tree.map(torch.clone, parts)))
        piece = text[begin : begin + 7]
        padded = torch.cat([piece, ids([9, 9])])
        parts = extended(parts, padded, ids(len(piece)))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    for value, as_it_was in older:  # a value: growing it changed nothing
        assert all(torch.equal(a, b) for a, b in zip(value, as_it_was, strict=True))


def test_rows_are_single_ones():
    texts = fa.random.randint(fa.key(5), (4, 20), 0, 3)
    counts, last = ids([20, 3, 11, 0]), ids([0, 1, 2, 1])
    options = {"nodes": 5, "length": 3, "longest": 4, "chain": False}

    def one(text, count, token):
        automaton = extended(empty(20, 7), text, count)
        return (*automaton, *continuations(automaton, token, **options))

    rows = vmap(one)(texts, counts, last)
    for i in range(4):
        single = one(texts[i], counts[i], last[i])
        assert all(torch.equal(a[i], b) for a, b in zip(rows, single, strict=True))


class Counted:
    """An array that notes each reading."""

    def __init__(self, array, taken):
        self.array, self.taken = array, taken

    def __getitem__(self, at):
        self.taken.append(at)
        return self.array[at]

    def __setitem__(self, at, value):
        self.array[at] = value


def test_the_work_of_a_text_grows_as_its_length():
    """Readings of links and of the table, counted, for texts on which other ways take squares."""
    steps = {}
    for name, text in {
        "one token": lambda n: [0] * n,
        "two": lambda n: [0] * (n // 2) + [1] + [0] * (n // 2),
        "periods": lambda n: [i % 7 for i in range(n)],
    }.items():
        for n in (400, 1600):
            numbers, taken = Numbers(*empty(n + 1, 24)), []
            for name_of in ("link", "table"):
                setattr(numbers, name_of, Counted(getattr(numbers, name_of), taken))
            for token in text(n):
                numbers.add(token)
            steps[name, n] = len(taken)
        assert steps[name, 1600] < 5 * steps[name, 400]
