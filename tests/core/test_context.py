"""Values of a context: what holds inside a `with` of this thread, for eager, compiled and exported
code.
"""

import asyncio
import threading

import pytest
import torch

import funcattn as fa
from funcattn import collectives
from funcattn.collectives import Axis
from funcattn.core.context import ContextValue
from funcattn.kernels import dispatch

VALUE: ContextValue[str] = ContextValue("test", "default")


def of_value(x):
    return x + len(VALUE.get())


def in_turns(*steps):
    """Run generators in threads of their own, one step of one at a time, in the order given by
    their numbers.
    """
    generators, order = steps[:-1], steps[-1]
    turns = [threading.Semaphore(0) for _ in generators]
    done, errors = threading.Semaphore(0), []

    def run(number):
        try:
            for _ in range(order.count(number)):
                turns[number].acquire()
                next(generators[number], None)
                done.release()
        except BaseException as error:
            errors.append(error)
            done.release()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(generators))]
    for thread in threads:
        thread.start()
    for number in order:
        turns[number].release()
        done.acquire()
        if errors:
            raise errors[0]
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_what_one_thread_holds_is_not_seen_in_another(backend):
    torch._dynamo.reset()
    f = of_value if backend is None else torch.compile(of_value, backend=backend, fullgraph=True)
    seen = {"a": [], "b": []}

    def hold(name):
        look = lambda: seen[name].append(int(f(torch.zeros(()))))
        look()
        yield
        with VALUE.holding(name):
            look()
            yield
            look()
            yield
        look()

    in_turns(hold("a"), hold("b"), [0, 1, 0, 1, 0, 1, 0, 1])
    assert seen == {"a": [7, 1, 1, 7], "b": [7, 1, 1, 7]}
    assert int(f(torch.zeros(()))) == 7


@pytest.mark.parametrize("order", [[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]])
def test_withs_that_overlap_in_two_threads_leave_nothing_behind(order):
    def forcing(kernel):
        with fa.kernels.use(kernel):
            yield
            assert dispatch.current() == kernel

    in_turns(forcing("reference"), forcing("flash"), order)
    assert dispatch.current() is None
    assert dispatch._forced._of_thread.last is None


def test_withs_that_overlap_in_two_tasks_leave_nothing_behind():
    async def forcing(kernel, pauses):
        with fa.kernels.use(kernel):
            for _ in range(pauses):
                await asyncio.sleep(0)
            return dispatch.current()

    async def both():
        return await asyncio.gather(forcing("reference", 1), forcing("flash", 3))

    assert asyncio.run(both()) == ["reference", "flash"]
    assert dispatch.current() is dispatch._forced._of_thread.last is None


class Attending(torch.nn.Module):
    def forward(self, q):
        return fa.attention(q, q, q)


def streams(graph):
    """True for the graph of the streaming kernel, which is one node."""
    return any(
        "funcattn" in str(node.target) or "flat_apply" in str(node.target) for node in graph.nodes
    )


def test_a_kernel_forced_in_another_thread_is_in_no_graph_of_this_one():
    q, graphs, exported = fa.random.normal(fa.key(0), (1, 2, 64, 8)), [], []
    compiled = torch.compile(
        Attending(),
        backend=lambda module, _: graphs.append(streams(module.graph)) or module,
        fullgraph=True,
    )

    def force():
        with fa.kernels.use("reference"):
            compiled(q)
            yield

    def look():
        exported.append(streams(torch.export.export(Attending(), (q,)).graph))
        compiled(q)
        yield

    torch._dynamo.reset()
    compiled(q)
    in_turns(force(), look(), [0, 1, 0])
    assert exported == [True]
    assert graphs == [True, False]  # one for each kernel; the third call finds the first


def test_compiled_code_sees_the_axes_of_its_own_thread():
    torch._dynamo.reset()
    size = torch.compile(lambda x: x + collectives.axis_size("t"), backend="eager", fullgraph=True)
    seen = []

    def bind(size_of_axis):
        with collectives.binding(Axis("t", size_of_axis, group=f"group {size_of_axis}")):
            seen.append(int(size(torch.zeros(()))))
            yield
            seen.append(int(size(torch.zeros(()))))
            yield

    in_turns(bind(2), bind(3), [0, 1, 0, 1, 0, 1])
    seen.append(int(size(torch.zeros(()))))
    assert seen == [2, 3, 2, 3, 1]
    assert collectives.bound() == ()


def test_withs_that_overlap_in_one_thread_leave_nothing_behind():
    """As two generators do, of which the first is closed first."""
    value = ContextValue("overlapping", "")
    first, second = value.holding("first"), value.holding("second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert value.get() == "second"
    second.__exit__(None, None, None)
    assert value.get() == ""
