"""Calls of a function are redirected for the time of a `with`, wherever the function was bound."""

import functools
import threading

import pytest
import torch

from funcattn.interop.redirecting import redirected


def pair(a, b=2, *rest, c=3):
    return a, b, rest, c


bound = functools.partial(pair, c=4)


def negated(original, args, kwargs):
    return "redirected", original(*args, **kwargs)


def test_every_reference_is_redirected_and_put_back():
    code = pair.__code__
    with redirected(pair, negated):
        with redirected(pair, negated):
            assert bound(1, 5, 6) == ("redirected", (1, 5, (6,), 4))
        assert pair(1) == ("redirected", (1, 2, (), 3))
    assert pair(1) == (1, 2, (), 3)
    assert pair.__code__ is code


def test_it_is_put_back_after_an_error():
    with pytest.raises(KeyError), redirected(pair, negated):
        raise KeyError
    assert pair(1) == (1, 2, (), 3)


def test_a_decorated_function_is_redirected_below_its_decorators():
    decorated = torch._disable_dynamo(pair)
    with redirected(decorated, negated):
        assert decorated(1)[0] == pair(1)[0] == "redirected"
    assert decorated(1) == (1, 2, (), 3)


def test_what_has_no_code_of_its_own_is_an_error():
    for function in (len, bound, lambda: entered, torch.nn.Identity()):
        with pytest.raises(TypeError, match="a plain function"), redirected(function, negated):
            pass
    entered = None


def test_contexts_of_two_threads_may_end_in_any_order():
    entered, left = threading.Event(), threading.Event()

    def other():
        with redirected(pair, negated):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with redirected(pair, negated):
        thread.start()
        entered.wait(10)
    assert pair(1)[0] == "redirected"
    left.set()
    thread.join()
    assert pair(1) == (1, 2, (), 3)
