"""States as values: the state after n tokens, of any kind of layer, and steps joined."""

import pytest
import torch
from torch.func import grad, vmap

import funcattn as fa
from funcattn import layers, tree

C = fa.random.normal(fa.key(0), (7, 6), torch.float64)


def convolved(x, state):
    weight = fa.random.normal(fa.key(1), (6, 3), torch.float64)
    return layers.convolve(x, weight, (), state)


def delta(x, state):
    """One key head of four features, two value heads of three."""
    T = len(x)
    convolution = () if state == () else state.convolution
    weight = fa.random.normal(fa.key(1), (6, 3), torch.float64)
    y, convolved = layers.convolve(x, weight, (), convolution)
    q, k = torch.stack([y, y.sin()])[..., :4].unsqueeze(1)
    v = torch.stack([y[:, 2:5], y[:, 3:6]])
    gates = torch.stack([y[:, 0], y[:, 5]])
    return layers.delta_net(
        convolved, q, k, v, -gates.exp().unsqueeze(-1), gates.sigmoid().reshape(2, T), state
    )


KINDS = {"short_convolution": convolved, "gated_delta": delta}
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
def test_rejected_tokens_reach_no_state_and_no_gradient(read):
    """NaN after the first n, under vmap too, where each row has its own n."""
    spoilt = torch.cat([C[:4], torch.full_like(C[4:], torch.nan)])
    steps, numbers = read(spoilt, ())[1], torch.arange(5)
    after = lambda n: layers.state_after(steps, n)
    each = vmap(after)(numbers)
    for n in numbers.tolist():
        wanted = tree.leaves(layers.state_after(read(C[:n], ())[1], n))
        for x, y, z in zip(tree.leaves(each), tree.leaves(after(n)), wanted, strict=True):
            torch.testing.assert_close(x[n], z)
            torch.testing.assert_close(y, z)
    loss = lambda x, n: sum(y.sin().sum() for y in tree.leaves(layers.state_after(x, n)))
    slope = grad(lambda x, n: loss(read(x, ())[1], n))
    for n in range(1, 5):
        whole = slope(torch.cat([C[:n], C[n:4]]), n)
        assert not whole[n:].any()
        torch.testing.assert_close(slope(C[:n], n), whole[:n])


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
