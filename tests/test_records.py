"""What records print: what is there, and statistics that a vmap made as rows."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn.decoding.speculative.decoding import Stats
from funcattn.records import ABSENT, MAX_ROWS, by_rows, describe, unfolded
from funcattn.training.steps import Metrics

CONFIG = fa.Config(layers=1)
PARAMS = fa.decoder(CONFIG).init(fa.key(0))


@pytest.mark.parametrize(
    "show",
    [repr, str, describe, lambda x: unfolded("params", x)],
    ids=["repr", "str", "line", "html"],
)
def test_weights_that_a_family_has_not_are_not_printed(show):
    text = show(PARAMS)
    for name in ("embedding", "feed_forward_norm"):
        assert name in text
    for name in ("head", "positions", "norm_bias", "q_bias", "router", "sinks", "()"):
        assert name not in text.replace("norm_bias=float", ""), name
    biased = fa.decoder(fa.Config(layers=1, qkv_bias=True, tied=False)).init(fa.key(0))
    assert "q_bias" in show(biased)
    assert "head" in show(biased)


def test_an_absent_value_by_itself_is_shown():
    assert describe(ABSENT) == "()"
    assert describe((ABSENT, torch.ones(2))) == "((), float32[2])"


def test_statistics_of_one_sequence_are_a_sentence_and_of_many_a_row_each():
    one = Stats(*map(torch.tensor, (14, 42, 29)))
    assert str(one) == "29 of 42 drafted tokens stayed (69%); 3.07 tokens a round in 14 rounds"
    many = vmap(lambda n: Stats(one.rounds, one.drafted, n))(torch.tensor([29, 0]))
    assert str(many).splitlines() == [f"0: {one}", f"1: {one._replace(accepted=torch.tensor(0))}"]
    grid = Stats(*(x.expand(2, 3) for x in one))
    assert [line.partition(": ")[0] for line in str(grid).splitlines()] == [
        "0, 0",
        "0, 1",
        "0, 2",
        "1, 0",
        "1, 1",
        "1, 2",
    ]


def test_metrics_of_runs_side_by_side_are_a_row_each():
    assert (
        str(Metrics(torch.tensor(2.5), torch.tensor(0.25)))
        == "loss 2.5000, norm of the gradient 0.25"
    )
    assert len(str(Metrics(torch.ones(3), torch.ones(3))).splitlines()) == 3


def test_of_very_many_rows_the_first_are_shown_with_their_number():
    lines = str(Metrics(torch.ones(1000), torch.ones(1000))).splitlines()
    assert (len(lines), lines[-1]) == (MAX_ROWS + 1, "... 1000 in all")


def test_where_values_cannot_be_looked_at_shapes_are_shown():
    seen = []
    vmap(lambda x: seen.append(str(Metrics(x, x))) or x)(torch.ones(3))
    assert seen == ["Metrics(loss=float32[], norm=float32[])"]
    assert (
        str(Metrics(torch.ones(3, device="meta"), torch.ones(3)))
        == "Metrics(loss=float32[3], norm=float32[3])"
    )


def test_rows_of_nothing_are_no_rows():
    assert by_rows(Metrics(torch.ones(0), torch.ones(0)), str) == ""


def test_an_older_name_beside_the_newer_one_is_refused():
    nothing = lambda *_: ()
    with pytest.raises(TypeError, match="prime is observe_prompt, which is given too"):
        fa.sampling.Sampler(nothing, nothing, nothing, prime=nothing, observe_prompt=nothing)
    assert "observe_prompt" in str(inspect.signature(fa.sampling.Sampler))


def test_a_hash_is_computed_once_and_is_of_its_process():
    config = fa.Config(window=8)
    assert hash(config) == hash(fa.Config(window=8)) == hash(config)
    assert config._hash == hash(config)
    assert "_hash" not in vars(config)
    for copied in (copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert not hasattr(copied, "_hash")
        assert copied == config
    assert hash(dataclasses.replace(config, window=9)) != hash(config)
