"""Taps: the identity unless someone listens, and who listens is a matter of the thread and the
context.
"""

import asyncio
import contextvars
import threading

import pytest
import torch
from torch.func import grad, jvp, vmap

from funcattn.taps import heard, listening, tap

X = torch.linspace(-1, 1, 5, dtype=torch.float64)


def double(name, x):
    return 2 * x


def test_a_tap_that_nobody_hears_is_the_value_itself():
    assert tap("here", X) is X
    assert not heard()


def test_a_listener_is_told_the_name_and_gives_the_value_to_go_on_with():
    names = []

    def listen(name, x):
        names.append(name)
        return x + 1 if name == "b" else x

    with listening(listen):
        assert heard()
        assert tap("a", X) is X
        assert torch.equal(tap("b", X), X + 1)
    assert names == ["a", "b"]
    assert tap("b", X) is X


def test_an_inner_listener_replaces_the_outer_until_it_ends():
    with listening(double):
        with listening(lambda name, x: x - 1):
            assert torch.equal(tap("x", X), X - 1)
        assert torch.equal(tap("x", X), 2 * X)
    assert tap("x", X) is X


def test_what_is_raised_inside_ends_the_listening():
    with pytest.raises(KeyError), listening(double):
        raise KeyError
    assert not heard()
    with pytest.raises(ZeroDivisionError), listening(lambda name, x: x / (1 // 0)):
        tap("x", X)
    assert not heard()


def test_other_threads_do_not_hear():
    found = []
    with listening(double):
        thread = threading.Thread(target=lambda: found.append(tap("x", X)))
        thread.start()
        thread.join()
    assert found[0] is X


def test_two_threads_listen_apart():
    meet, found = threading.Barrier(2, timeout=30), {}

    def work(by):
        with listening(lambda name, x: by * x):
            meet.wait()  # both listen now
            found[by] = tap("x", X)
            meet.wait()

    threads = [threading.Thread(target=work, args=(by,)) for by in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[by], by * X) for by in (2, 3))


def test_tasks_of_one_thread_listen_apart():
    async def work(by):
        with listening(lambda name, x: by * x):
            await asyncio.sleep(0)
            return tap("x", X)

    async def both():
        return await asyncio.gather(work(2), work(3))

    two, three = asyncio.run(both())
    assert torch.equal(two, 2 * X)
    assert torch.equal(three, 3 * X)


def test_a_copy_of_the_context_hears_what_it_was_copied_with():
    with listening(double):
        copied = contextvars.copy_context()
    assert torch.equal(copied.run(tap, "x", X), 2 * X)
    assert tap("x", X) is X


def test_listeners_go_through_transforms():
    def f(x):
        with listening(lambda name, y: y * x):
            return tap("x", x.sin())

    plain = lambda x: x.sin() * x
    close = torch.testing.assert_close
    close(vmap(f)(X), plain(X))
    close(vmap(grad(f))(X), vmap(grad(plain))(X))
    close(jvp(f, (X,), (X,))[1], jvp(plain, (X,), (X,))[1])
    close(vmap(grad(grad(f)))(X), vmap(grad(grad(plain)))(X))


def test_a_listener_around_a_transform_sees_its_tracers():
    """What grad follows goes through the listener: no derivative is lost."""
    f = lambda x: tap("x", x.sin())
    with listening(lambda name, x: x**3):
        found = vmap(grad(f))(X)
    torch.testing.assert_close(found, 3 * X.sin() ** 2 * X.cos())


def test_compiled_code_is_silent():
    f = torch.compile(lambda x: tap("x", x.sin()), fullgraph=True, backend="eager")
    with listening(double):
        assert torch.equal(f(X), X.sin())
