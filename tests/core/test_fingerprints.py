"""A fingerprint knows its tree again, and no other."""

import contextlib
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcattn as fa
from funcattn.core.fingerprints import Fingerprint, Held, is_differentiated


class Pair(NamedTuple):
    a: object
    b: object


class Couple(NamedTuple):
    a: object
    b: object


LEAVES = [torch.zeros(2) for _ in range(3)]
EMPTY = ((), (), ())

nodes = lambda inner: st.one_of(
    st.lists(inner, max_size=2).map(lambda some: (*EMPTY, *some, *EMPTY)),
    st.lists(inner, max_size=3).map(tuple),
    st.builds(Pair, inner, inner),
    st.builds(Couple, inner, inner),
)
trees = st.recursive(st.sampled_from(range(3)).map(LEAVES.__getitem__), nodes, max_leaves=8)


def described(tree):
    """What an equal arrangement of the same tensors shares."""
    return (type(tree).__name__, *map(described, tree)) if isinstance(tree, tuple) else id(tree)


def rebuilt(tree):
    if not isinstance(tree, tuple):
        return tree
    parts = list(map(rebuilt, tree))
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


@given(trees, trees)
def test_a_tree_is_known_again_and_another_is_not(first, second):
    fingerprint = Fingerprint(first, lambda: None)
    found = fingerprint.leaves(rebuilt(first))
    assert found is not None
    assert sorted(map(id, found)) == sorted(map(id, fa.tree.leaves(first)))
    assert (fingerprint.leaves(second) is not None) == (described(first) == described(second))


def test_items_that_move_to_a_neighbour_are_seen():
    a, b, c = LEAVES
    fingerprint = Fingerprint(((a, b), (c,)), lambda: None)
    assert fingerprint.leaves(((a,), (b, c))) is None
    assert fingerprint.leaves(((a, b), (c,))) is not None


def test_a_written_tensor_is_another():
    params = fa.decoder(fa.Config()).init(fa.key(0))
    fingerprint = Fingerprint(params, lambda: None)
    assert len(fingerprint.leaves(params)) == len(fa.tree.leaves(params))
    params.layers[1].up.mul_(1.0)
    assert fingerprint.leaves(params) is None


def test_a_fingerprint_keeps_nothing_and_says_when_a_tensor_goes():
    gone = []
    leaf = torch.ones(3)
    fingerprint = Fingerprint((leaf, LEAVES[0]), lambda: gone.append(True))
    seen = weakref.ref(leaf)
    del leaf
    gc.collect()
    assert seen() is None
    assert gone
    del fingerprint


def test_what_is_no_tuple_is_never_known():
    for tree in ([LEAVES[0]], {"a": LEAVES[0]}, (LEAVES[0], [LEAVES[1]]), (3,), None):
        assert Fingerprint(tree, lambda: None).leaves(tree) is None


def test_tensors_without_a_version_are_known_too():
    with torch.inference_mode():
        tree = torch.ones(2), LEAVES[0]
    assert len(Fingerprint(tree, lambda: None).leaves(tree)) == 2


def test_a_gradient_that_is_asked_for_is_seen():
    assert not is_differentiated(LEAVES)
    assert is_differentiated([*LEAVES, torch.ones(2, requires_grad=True)])


def test_what_takes_the_place_of_nothing_is_seen():
    a, b, c = LEAVES
    tree = Couple((a, (), (), b, ()), ((), a))
    fingerprint = Fingerprint(tree, lambda: None)
    assert fingerprint.leaves(rebuilt(tree)) is not None
    first, second = tree
    for other in (c, (c,), [], [c], numpy.zeros(3), numpy.zeros(0), 0, None, ((),)):
        assert fingerprint.leaves(Couple((a, other, (), b, ()), second)) is None
        assert fingerprint.leaves(Couple((a, (), (), b, other), second)) is None
        assert fingerprint.leaves(Couple(first, (other, a))) is None
    assert fingerprint.leaves(Couple((a, (), b, (), ()), second)) is None
    assert fingerprint.leaves(Couple((a, (), (), (), ()), second)) is None
    assert fingerprint.leaves(Couple((), second)) is None


def test_a_tree_that_a_loop_has_is_looked_at_once(monkeypatch):
    a, b, c = (torch.zeros(2) for _ in range(3))
    tree, other = (a, (b,)), (a, (c,))
    fingerprint, calls = Fingerprint(tree, lambda: None), []
    compared = Fingerprint._compared
    monkeypatch.setattr(
        Fingerprint, "_compared", lambda self, tree: calls.append(1) or compared(self, tree)
    )
    with Held(tree).within():
        for _ in range(3):
            assert list(map(id, fingerprint.leaves(tree))) == [id(a), id(b)]
        assert len(calls) == 1
        with Held(other).within():
            assert fingerprint.leaves(other) is None
            assert fingerprint.leaves(tree) is not None
        assert fingerprint.leaves((a, (c,))) is None
        assert fingerprint.leaves(rebuilt(tree)) is not None
        assert Fingerprint(other, lambda: None).leaves(tree) is None
        b.add_(1)
        assert fingerprint.leaves(tree) is None
    assert fingerprint.leaves(tree) is None
    with Held(tree).within():
        assert fingerprint.leaves(tree) is None


def test_what_one_thread_has_is_nothing_to_another():
    a = torch.zeros(2)
    tree = ((a,),)
    fingerprint = Fingerprint(tree, lambda: None)
    with Held(tree).within(), ThreadPoolExecutor(1) as pool:
        assert fingerprint.leaves(tree) is not None
        a.add_(1)
        assert pool.submit(fingerprint.leaves, tree).result() is None


def test_weights_written_between_two_calls_are_seen():
    model = fa.compile(fa.decoder(fa.Config(layers=1)), backend="eager")
    params, prompt = model.init(fa.key(0)), torch.tensor([1, 2, 3])
    call = lambda model: fa.generate(fa.key(1), model, params, prompt, steps=6)[0]
    call(model)
    with torch.no_grad():
        params.embedding.mul_(-1.0)
        params.layers[0].up.mul_(3.0)
    assert torch.equal(call(model), call(fa.decoder(model.config)))


def test_weights_that_a_sampler_writes_are_seen():
    model, prompt = fa.compile(fa.decoder(fa.Config(layers=1)), backend="eager"), torch.arange(3)

    def call(model):
        params, calls = model.init(fa.key(0)), []

        def logits(x):
            calls.append(1)
            if len(calls) == 6:
                with torch.no_grad():
                    params.layers[0].up.mul_(-30.0)
            return x

        return fa.generate(
            fa.key(1), model, params, prompt, steps=14, sampler=fa.sampling.stateless(logits)
        )[0]

    assert torch.equal(call(model), call(fa.decoder(model.config)))


def test_what_is_constant_is_looked_at_once():
    a = torch.zeros(2)
    tree, copy = ((a,),), ((a,),)
    fingerprint = Fingerprint(tree, lambda: None)
    with Held(tree, constant=True).within():
        assert fingerprint.leaves(tree) is not None
        a.add_(1)
        assert fingerprint.leaves(tree) is not None  # as its loop says
        assert fingerprint.leaves(copy) is None
    with Held(tree, constant=True).within():
        assert fingerprint.leaves(tree) is None


def test_what_a_loop_has_is_kept_between_its_rounds_and_no_longer(monkeypatch):
    tree = ((torch.zeros(2),),)
    fingerprint, calls = Fingerprint(tree, lambda: None), []
    compared = Fingerprint._compared
    monkeypatch.setattr(
        Fingerprint, "_compared", lambda self, tree: calls.append(1) or compared(self, tree)
    )
    weights = Held(tree)
    for _ in range(3):
        with contextlib.suppress(KeyError), weights.within(), Held(((),)).within():
            assert fingerprint.leaves(tree) is not None
            raise KeyError
    assert len(calls) == 1
    assert fingerprint.leaves(tree) is not None
    assert len(calls) == 2
    alive = weakref.ref(fingerprint)
    del fingerprint
    gc.collect()
    assert alive() is None
