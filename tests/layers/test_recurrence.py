"""States as values: the state after n tokens, of any kind of layer, and steps joined."""

import pytest
import torch

import funcattn as fa
from funcattn import layers, tree

C = fa.random.normal(fa.key(0), (7, 6), torch.float64)


def convolved(x, state):
    weight = fa.random.normal(fa.key(1), (6, 3), torch.float64)
    return layers.convolve(x, weight, (), state)


KINDS = {"short_convolution": convolved}
EACH = pytest.mark.parametrize("read", KINDS.values(), ids=KINDS.keys())


@EACH
def test_the_state_after_n_is_that_of_a_text_of_n(read):
    _, steps = read(C, ())
    for n in range(len(C) + 1):
        wanted = layers.state_after(read(C[:n], ())[1], n)
        for count in (n, torch.tensor(n)):
            for (path, got), want in zip(
                tree.items(layers.state_after(steps, count)), tree.leaves(wanted), strict=True
            ):
                torch.testing.assert_close(got, want, msg=path)


@EACH
def test_joined_steps_are_those_of_one_call(read):
    state, parts = (), []
    for x in C.split((1, 4, 2)):
        parts.append(read(x, state)[1])
        state = layers.state_after(parts[-1], len(x))
    joined, whole = layers.join_steps(parts[0], parts[1:]), read(C, ())[1]
    for n in range(len(C) + 1):
        got, wanted = layers.state_after(joined, n), layers.state_after(whole, n)
        for x, y in zip(tree.leaves(got), tree.leaves(wanted), strict=True):
            torch.testing.assert_close(x, y)


def test_other_records_are_no_steps():
    for f, rest in ((layers.state_after, (1,)), (layers.join_steps, ([],))):
        with pytest.raises(TypeError, match="what a recurrent layer proposed, got a Tensor"):
            f(torch.zeros(2), *rest)
