"""What every process should hold alike: how functions are known by what they hold, and what
simulated devices are told.
"""

import functools
import operator
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch

import funcattn as fa
from funcattn import collectives, sampling
from funcattn.collectives import axis_index
from funcattn.collectives.agreement import digest
from funcattn.sharding import Grid, P, shard_map

MODEL = fa.decoder(fa.Config(layers=1, vocabulary=32))
PARAMS = MODEL.init(fa.key(0))
PROMPT = torch.tensor([3, 1, 4])
SAMPLERS = {
    "temperature": lambda x: sampling.temperature(x),
    "temperature, a tensor": lambda x: sampling.temperature(torch.tensor(x)),
    "top_k": lambda x: sampling.top_k(int(10 * x)),
    "top_p": lambda x: sampling.top_p(x),
    "min_p": lambda x: sampling.min_p(x / 2),
    "typical_p": lambda x: sampling.typical_p(x),
    "epsilon_cutoff": lambda x: sampling.epsilon_cutoff(x / 10),
    "eta_cutoff": lambda x: sampling.eta_cutoff(x / 10),
    "top_n_sigma": lambda x: sampling.top_n_sigma(x),
    "top_h": lambda x: sampling.top_h(x / 2),
    "repetition_penalty": lambda x: sampling.repetition_penalty(1 + x),
    "presence_penalty": lambda x: sampling.presence_penalty(x),
    "frequency_penalty": lambda x: sampling.frequency_penalty(x),
    "logit_bias": lambda x: sampling.logit_bias({3: x}),
    "no_repeat_ngram": lambda x: sampling.no_repeat_ngram(int(10 * x)),
    "dry": lambda x: sampling.dry(x),
    "allowed_tokens": lambda x: sampling.allowed_tokens([1, int(10 * x)]),
    "suppress_tokens": lambda x: sampling.suppress_tokens([1, int(10 * x)]),
    "min_new_tokens": lambda x: sampling.min_new_tokens(int(10 * x), [2]),
    "xtc": lambda x: sampling.xtc(x / 2, 0.1),
    "mirostat": lambda x: sampling.mirostat(tau=10 * x),
    "a chain": lambda x: sampling.chain(sampling.top_k(4), sampling.temperature(x)),
    "a chain in another order": lambda x: sampling.chain(
        *[sampling.top_p(x), sampling.top_k(4)][:: 1 if x < 0.5 else -1]
    ),
    "a mixture": lambda x: sampling.mixture(x, sampling.greedy, sampling.chain()),
    "a function": lambda x: sampling.stateless(lambda logits: logits * x),
    "a partial application": lambda x: sampling.stateless(functools.partial(torch.mul, x)),
    "a default": lambda x: sampling.stateless(lambda logits, by=x: logits * by),
}
DRAFTERS = {
    "prompt lookup": lambda x: fa.drafters.prompt_lookup(length=int(10 * x)),
    "a model": lambda x: fa.drafters.model(MODEL, PARAMS, length=int(10 * x)),
    "a model that samples": lambda x: fa.drafters.model(
        MODEL, PARAMS, sampler=sampling.temperature(x)
    ),
}


@pytest.mark.parametrize("name", SAMPLERS | DRAFTERS)
def test_a_sampler_is_known_by_its_settings(name):
    make = (SAMPLERS | DRAFTERS)[name]
    assert digest(make(0.4)) == digest(make(0.4))
    assert digest(make(0.4)) != digest(make(0.7))


def test_samplers_of_different_kinds_are_different():
    digests = [digest(make(0.4)) for make in SAMPLERS.values()]
    assert len(set(digests)) == len(digests)
    assert digest(sampling.greedy) not in digests


def test_functions_that_differ_in_their_code_alone_are_different():
    assert digest(lambda x: x + 2) == digest(lambda x: x + 2)
    assert (
        len(
            {
                digest(f)
                for f in (lambda x: x + 2, lambda x: x * 2, lambda x: x + 3, torch.relu, torch.tanh)
            }
        )
        == 5
    )
    assert digest({"a": {1, 2}, "b": 1}) == digest({"b": 1, "a": {2, 1}})
    assert digest([1, (2, 3)]) != digest([(1, 2), 3])
    assert digest(re.compile("a")) != digest(re.compile("b"))


def test_weights_that_a_function_holds_are_known_by_their_sizes_and_settings_by_their_numbers():
    """Each process has its own part of weights; a table of integers is a setting."""

    class Table(NamedTuple):
        ids: torch.Tensor

    hold = lambda value: sampling.stateless(lambda logits: value and logits)
    other = fa.tree.map(lambda x: x + 1, PARAMS)
    assert digest(hold(PARAMS)) == digest(hold(other))
    assert digest(hold(PARAMS)) != digest(hold(fa.tree.cast(torch.float64)(PARAMS)))
    assert digest(hold(Table(torch.arange(3)))) != digest(hold(Table(torch.arange(3) + 1)))
    assert digest(hold(torch.ones(3))) != digest(hold(torch.zeros(3)))
    assert digest(PARAMS) != digest(other)


def test_a_function_that_holds_itself_is_read_once():
    def again(n):
        return n and again(n - 1)

    assert digest(again) == digest(again)


ON_DEVICES = {
    "alike": (
        None,
        lambda i: fa.generate(
            fa.key(0), MODEL, PARAMS, PROMPT, steps=1, sampler=sampling.temperature(0.7)
        )[0],
    ),
    "generate: sampler": (
        "sampler",
        lambda i: fa.generate(
            fa.key(0),
            MODEL,
            PARAMS,
            PROMPT,
            steps=1,
            sampler=sampling.logit_bias(torch.zeros(32) + i),
        )[0],
    ),
    "generate: key": (
        "key",
        lambda i: fa.generate(fa.key(0) + i, MODEL, PARAMS, PROMPT, steps=1)[0],
    ),
    "generate: prompt": (
        "prompt",
        lambda i: fa.generate(fa.key(0), MODEL, PARAMS, PROMPT + i, steps=1)[0],
    ),
    "loss: tokens": ("tokens", lambda i: fa.loss(MODEL, PARAMS, PROMPT + i)),
}


@pytest.mark.parametrize("name", ON_DEVICES)
def test_simulated_devices_that_differ_are_told(name):
    argument, call = ON_DEVICES[name]
    for axes in ({"replica": 2}, {"replica": 2, "other": 2}, {"other": 2, "replica": 2}):
        run = shard_map(lambda: call(axis_index("replica")), Grid(**axes), (), P())
        if argument is None:
            run()
            continue
        with pytest.raises(
            ValueError,
            match=f"{name} should be the same on every device of the mesh, got another on some",
        ):
            run()
    rows = shard_map(lambda: call(axis_index("data")).reshape(1, -1), Grid(data=2), (), P("data"))
    assert rows().shape[0] == 2  # each device has rows of its own there


def test_what_is_alike_though_it_was_mapped_is_no_difference():
    nan = lambda i: collectives.agree(
        "f", {"x": torch.stack([0.0 * i, torch.tensor(float("nan"))])}
    )
    shard_map(lambda: nan(axis_index("t")) or torch.zeros(()), Grid(t=2), (), P())()


CLOSED_OVER = {
    "an array": (np.arange(3), np.arange(3)[::-1].copy()),
    "a number of numpy": (np.float32(0.5), np.float32(0.7)),
    "a cached function": (functools.lru_cache(lambda x: x), functools.lru_cache(lambda x: 2 * x)),
    "a getter": (operator.itemgetter(0), operator.itemgetter(1)),
    "a method of a dict": ({1: 2}.get, {1: 3}.get),
    "a set of tuples": ({(1, 2)}, {(1, 3)}),
}


@pytest.mark.parametrize("name", CLOSED_OVER)
def test_what_a_function_closes_over_tells_it_apart(name):
    closing = lambda value: lambda x: (x, value)
    one, other = (digest(closing(value)) for value in CLOSED_OVER[name])
    assert one != other
    assert one == digest(closing(CLOSED_OVER[name][0]))


def test_how_a_sampler_was_written_does_not_matter():
    assert digest(sampling.temperature(0.7)) == digest(sampling.temperature(t=0.7))


def test_the_order_of_a_large_tensor_counts():
    x = torch.arange(20000)
    assert digest(x) != digest(x.flip(0))
    assert digest(x.reshape(2, -1)) != digest(x.reshape(2, -1).flip(1))
