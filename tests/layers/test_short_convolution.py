"""Short convolutions: against torch's, read in parts, and with the states of rejected tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.layers import ConvolutionState, convolve, state_after

X = fa.random.normal(fa.key(0), (9, 5), torch.float64)
WEIGHT = fa.random.normal(fa.key(1), (5, 4), torch.float64)
BIAS = fa.random.normal(fa.key(2), (5,), torch.float64)
START = ConvolutionState(fa.random.normal(fa.key(3), (3, 5), torch.float64))


def reference(x, weight, bias, inputs):
    rows = torch.cat([inputs, x]).T.unsqueeze(0)
    return F.conv1d(rows, weight.unsqueeze(1), bias, groups=5)[0].T


@pytest.mark.parametrize("state", [(), START], ids=["from zeros", "behind others"])
def test_it_is_torchs_convolution_of_each_feature(state):
    inputs = torch.zeros_like(START.inputs) if state == () else state.inputs
    y, _ = convolve(X, WEIGHT, BIAS, state)
    torch.testing.assert_close(y, reference(X, WEIGHT, BIAS, inputs))
    plain, _ = convolve(X, WEIGHT, (), state)
    torch.testing.assert_close(plain, y - BIAS)


@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 5), (2, 0, 7)])
def test_read_in_parts_it_is_the_whole(sizes):
    state, rows = START, []
    for x in X.split(sizes):
        y, steps = convolve(x, WEIGHT, BIAS, state)
        state = state_after(steps, len(x))
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows), convolve(X, WEIGHT, BIAS, START)[0])


def test_a_rejected_token_changes_no_state():
    spoilt = torch.cat([X[:4], torch.full_like(X[4:], torch.nan)])
    wanted = lambda n: state_after(convolve(X[:n], WEIGHT, BIAS, START)[1], n).inputs
    steps = convolve(spoilt, WEIGHT, BIAS, START)[1]
    for n in range(5):
        torch.testing.assert_close(state_after(steps, n).inputs, wanted(n))
    each = vmap(lambda n: state_after(steps, n).inputs)(torch.arange(5))
    torch.testing.assert_close(each, torch.stack([wanted(n) for n in range(5)]))


def test_its_derivatives_are_those_of_torchs():
    ours = lambda x, weight, inputs: (
        convolve(x, weight, BIAS, ConvolutionState(inputs))[0].sin().sum()
    )
    theirs = lambda x, weight, inputs: reference(x, weight, BIAS, inputs).sin().sum()
    given = X, WEIGHT, START.inputs
    for order in (
        lambda f: grad(f, (0, 1, 2))(*given),
        lambda f: jvp(grad(f, (0, 1, 2)), given, given)[1],
    ):
        torch.testing.assert_close(order(ours), order(theirs))
