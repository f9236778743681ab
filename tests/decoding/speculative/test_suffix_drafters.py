"""Drafts of what followed the longest suffix of the text, and of n-grams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import funcattn as fa
from funcattn import drafters
from funcattn.speculation import speculate

TEXT = [5, 1, 2, 3, 7, 9, 1, 2, 3, 8, 4, 1, 2, 3, 8, 6, 2, 3]


def look(text, before=None, **options):
    """The paths of the tree that is drafted after a text."""
    drafter = drafters.suffix(**options, text=None if before is None else torch.tensor(before))
    state = drafter.init(torch.tensor(text[:-1]), torch.tensor(len(text) - 1), 8)
    draft, _ = drafter.propose(fa.key(0), torch.tensor(text[-1]), state)
    paths = [()]
    for token, above in zip(draft.tokens.tolist(), draft.parent.tolist(), strict=True):
        paths.append((*paths[above], token) if above >= 0 else None)
    assert int(draft.valid) == sum(path is not None for path in paths[1:])
    return [path for path in paths[1:] if path is not None]


def by_hand(text, nodes, length, longest):
    """The same by dictionaries, over all places; nothing goes through a token -1."""
    n, weights = len(text), {}
    match = lambda e: next(
        (k for k in range(min(longest, e)) if text[e - 1 - k] != text[n - 1 - k]), min(longest, e)
    )
    matches = {e: match(e) for e in range(1, n)}
    most = max(matches.values())
    for e, m in matches.items():
        for j in range(length if m else 0):
            if e + j < n and -1 not in text[e : e + j + 1]:
                path = tuple(text[e : e + j + 1])
                weights[path] = weights.get(path, 0) + 2.0 ** (m - most)
    return weights, sorted(weights.values(), reverse=True)[:nodes]


def test_the_most_frequent_continuations_of_the_longest_match_are_drafted():
    # 2 3 was followed by 8 twice and by 7 once; of equals the shallower, then the later place
    assert look(TEXT, nodes=3, length=2) == [(8,), (7,), (8, 6)]
    assert look(TEXT, nodes=1, length=2) == [(8,)]
    assert look([1, 2, 3], nodes=3) == []
    assert look([6, 6], nodes=3) == [(6,)]
    # what stands in front counts as the text, and no match goes through its end
    assert look([4, 5], before=[4, 5, 6, 7], nodes=2, length=2) == [(6,), (6, 7)]


@pytest.mark.parametrize("longest", [1, 3, 16])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=st.lists(st.integers(0, 2), min_size=2, max_size=30), extra=st.booleans())
def test_the_draft_is_that_of_a_count_by_hand(longest, text, extra):
    before = [*text[::-1], 1] if extra else []
    paths = look(text, before or None, nodes=10, length=4, longest=longest)
    weights, best = by_hand([*before, -1, *text] if before else text, 10, 4, longest)
    assert len(set(paths)) == len(paths) == len(best)
    assert [weights[path] for path in paths] == best
    assert all(path[:-1] in paths or len(path) == 1 for path in paths)


def test_a_chain_follows_the_most_frequent_token():
    drafter = drafters.suffix(length=4, chain=True)
    state = drafter.init(torch.tensor(TEXT[:-1]), torch.tensor(len(TEXT) - 1), 8)
    draft, _ = drafter.propose(fa.key(0), torch.tensor(TEXT[-1]), state)
    assert draft.parent == ()
    # 8 twice; then 6 after the newest of the two
    assert (draft.tokens.tolist(), int(draft.valid)) == ([8, 6, 2, 3], 4)
    text = torch.tensor([1, 2, 3])
    draft, _ = drafter.propose(fa.key(0), torch.tensor(9), drafter.init(text, torch.tensor(3), 8))
    assert int(draft.valid) == 0


def test_under_greedy_the_tokens_are_those_of_generate_and_few_rounds_are_needed():
    config = fa.Config(vocabulary=24, layers=1, width=16, heads=2, head_size=8, feed_forward=32)
    model = fa.decoder(config)
    params = fa.cast(torch.float64)(fa.tree.map(lambda w: 3 * w, model.init(fa.key(0))))
    prompts = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 0, 0]])
    lengths = torch.tensor([8, 6])
    for drafter in (
        drafters.suffix(nodes=6, length=4),
        drafters.suffix(nodes=5, longest=2),
        drafters.suffix(length=3, chain=True),
    ):
        one = lambda p, n, d=drafter: speculate(
            fa.key(0), model, params, d, p, steps=24, prompt_length=n
        )[0]
        rows = vmap(one)(prompts, lengths)
        for i in range(2):
            wanted = fa.generate(fa.key(0), model, params, prompts[i, : lengths[i]], steps=24)[0]
            assert rows.tokens[i].tolist() == wanted.tolist()
            alone = one(prompts[i], lengths[i])
            assert alone.tokens.tolist() == wanted.tolist()
            assert int(alone.stats.rounds) == int(rows.stats.rounds[i]) < 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes should be an int, at least 1"),
        ({"longest": 1.5}, "longest should be an int"),
        ({"length": -1}, "length should be an int, at least 1"),
        ({"text": torch.zeros(2, 2)}, r"text should be int64 \(R,\)"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(options, message):
    with pytest.raises(ValueError, match=r"drafters\.suffix: " + message):
        drafters.suffix(**options)
