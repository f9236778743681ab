"""What is computed from tensors is computed once, dies with them, and is made anew where they were
written into.
"""

import gc
import threading

import pytest
import torch

from funcattn.core.tensor_cache import _entries, prepared_from, versions


class Made:
    """A function to call, which counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return object()


def test_it_is_made_once_for_the_same_tensors():
    a, b, make = torch.ones(2), torch.ones(2), Made()
    first = prepared_from([a, b], make, "x")
    assert prepared_from([a, b], make, "x") is first
    assert make.calls == 1
    others = [
        prepared_from(sources, make, kind)
        for sources, kind in [([b, a], "x"), ([a], "x"), ([a, b], "y")]
    ]
    assert len({id(made) for made in [first, *others]}) == make.calls == 4


def test_equal_tensors_are_not_the_same():
    a, make = torch.ones(2), Made()
    first = prepared_from([a], make, "x")
    assert prepared_from([a.clone()], make, "x") is not first
    # a view: another tensor of the same memory
    assert prepared_from([a[:]], make, "x") is not first


@pytest.mark.parametrize("which", [0, 1])
def test_it_is_made_anew_after_an_in_place_change_of_any(which):
    sources, make = [torch.ones(2), torch.ones(2)], Made()
    first = prepared_from(sources, make, "x")
    sources[which].mul_(1)
    second = prepared_from(sources, make, "x")
    assert second is not first
    assert prepared_from(sources, make, "x") is second
    sources[which][:1].zero_()  # through a view
    assert prepared_from(sources, make, "x") is not second
    assert make.calls == 3


@pytest.mark.parametrize("which", [0, 1])
def test_an_entry_dies_with_any_of_its_tensors(which):
    gc.collect()
    before = len(_entries)
    sources = [torch.ones(2), torch.ones(2)]
    prepared_from(sources, Made(), "x")
    sources[which].mul_(1)
    prepared_from(sources, Made(), "x")  # replaces the entry, whose callbacks are gone with it
    assert len(_entries) == before + 1
    del sources[which]
    assert len(_entries) == before


def test_an_id_that_is_used_again_is_another_tensor():
    seen, make = set(), Made()
    for _ in range(50):
        x = torch.ones(2)
        seen.add(id(x))
        prepared_from([x], make, "x")
        del x
    assert len(seen) < 50  # some id came again
    assert make.calls == 50


def test_an_entry_of_a_tensor_that_is_gone_is_not_used():
    """Where an id is taken before the callback has run."""
    gone, x, make = torch.ones(2), torch.ones(2), Made()
    stale = prepared_from([gone], make, "x")
    key = ("x", id(x))
    _entries[key] = _entries["x", id(gone)]
    assert prepared_from([x], make, "x") is not stale
    assert make.calls == 2


def test_what_fails_is_not_cached():
    x, make = torch.ones(2), Made()
    with pytest.raises(ZeroDivisionError):
        prepared_from([x], lambda: 1 // 0, "x")
    prepared_from([x], make, "x")
    assert make.calls == 1


def test_none_is_a_result_too():
    x, calls = torch.ones(2), []
    for _ in range(2):
        assert prepared_from([x], lambda: calls.append(1), "x") is None
    assert len(calls) == 1


def test_a_change_while_it_is_made_is_seen():
    x, make = torch.ones(2), Made()
    first = prepared_from([x], lambda: x.add_(1).sum(), "x")  # as another thread might write
    assert prepared_from([x], make, "x") is not first


def test_inference_tensors_have_one_version():
    with torch.inference_mode():
        x, make = torch.ones(2), Made()
        assert prepared_from([x], make, "x") is prepared_from([x], make, "x")
        assert versions([x, x]) == (0, 0)


def test_threads_get_what_belongs_to_their_tensors():
    """Each thread over tensors of its own and over one of all, which one thread writes into."""
    shared, wrong = torch.zeros(4), []

    def run(number):
        for n in range(200):
            mine = torch.full((4,), float(number * 1000 + n))
            if prepared_from([mine], lambda mine=mine: mine.tolist(), "x") != mine.tolist():
                wrong.append((number, n))
            if number == 0:
                shared.fill_(float(n))
            prepared_from([shared], shared.tolist, "x")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert prepared_from([shared], shared.tolist, "x") == [199.0] * 4
