"""Shapes of trees: their sizes, and what is no shape."""

import pytest

import funcattn as fa
from funcattn import drafters, sampling
from funcattn.decoding.speculative.tree_shapes import shape_of

SMALL = fa.Config(vocabulary=24, layers=2, width=16, heads=2, head_size=8, feed_forward=32)


@pytest.mark.parametrize(
    ("branching", "width", "size"),
    [((3, 2, 1), None, 15), ((3, 2, 1), 1, 6), ((3, 3, 2), 2, 13), ((1, 1), None, 2)],
)
def test_the_size_of_a_shape_is_the_number_of_its_nodes(branching, width, size):
    assert shape_of(branching, None, 4, width, "top", 0.0, 0.0).size == size
    model = fa.decoder(SMALL)
    drafter = drafters.tree(
        drafters.model(model, model.init(fa.key(0))), branching=branching, width=width
    )
    prompt = fa.random.randint(fa.key(1), (5,), 0, 24)
    state = drafter.init(prompt, prompt.new_tensor(5), 4)
    draft, _ = drafter.propose(fa.key(0), prompt[0], state)
    assert len(draft.tokens) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "branching should be given, or nodes, got neither"),
        ({"branching": (2,), "nodes": 3}, "branching should be given, or nodes, got both"),
        ({"branching": ()}, "branching should be numbers of children"),
        ({"branching": (2, 0)}, "branching should be numbers of children"),
        ({"nodes": 100, "depth": 2, "width": 3}, "nodes should be at most the 12 that grow"),
        ({"nodes": 4, "children": "drawn"}, "children should be top in a tree that is grown"),
        ({"branching": (2,), "children": "best"}, "children should be one of top, drawn, mixed"),
        ({"branching": (2,), "sampler": sampling.greedy}, "sampler should be a sampler that"),
        ({"branching": (2,), "width": 0}, "width should be an int, at least 1"),
        ({"branching": (2,), "confidence": 2}, "confidence should be from 0 to 1"),
        ({"branching": (2,), "least": 0.1}, "least should be 0 in a tree without branching and"),
        ({"nodes": 4, "confidence": 0.5}, "confidence should be 0 in a tree that is grown"),
        (
            {"branching": (2,), "width": 1, "children": "drawn"},
            "children should be top where tokens decide",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(options, message):
    model = fa.decoder(SMALL)
    params = model.init(fa.key(0))
    with pytest.raises(ValueError, match="drafters.tree: " + message):
        drafters.tree(drafters.model(model, params), **options)
    with pytest.raises(TypeError, match=r"drafters\.tree: drafter should be one that has"):
        drafters.tree(drafters.prompt_lookup(), branching=(2,))
