"""bergson: influence of each token's loss by a forward derivative, and MAGIC, a derivative through
steps of training. Both take a model of transformers, and bergson loads it with eager attention.
"""

import contextlib
from functools import partial
from types import SimpleNamespace

import torch
import torchopt
from bergson.magic import Trainer
from bergson.score.output_influence import output_token_influence
from bergson.utils import weighted_causal_lm_ce
from llamas import (
    DENSE,
    DOCUMENTED,
    NO_JVP,
    NO_SECOND,
    TEST,
    TRAIN,
    Route,
    hold,
    run,
    same,
    vector,
)
from torch.func import functional_call


def influence(model):
    options = SimpleNamespace(loss_fn="ce", loss_reduction="mean", label_smoothing=0.0)
    queries = [
        (vector(p.numel(), 2), name, None, False)
        for name, p in model.model.named_parameters()
        if "proj" in name
    ]
    return output_token_influence(model.model, TRAIN, TRAIN, queries, options)[0]


def test_its_influence_of_tokens_is_the_dense_one():
    hold(influence, "transformers", stock=NO_JVP)


def test_a_model_that_it_loaded_takes_our_attention():
    def loaded():
        model = DOCUMENTED.build()
        model.model.set_attn_implementation("funcattn")
        return model

    route = Route(loaded, contextlib.nullcontext)
    same(run(influence, route), run(influence, DENSE["transformers"]))
    assert not torch.equal(run(influence, route), run(influence, DOCUMENTED))  # in float32


def test_its_derivative_through_training_is_the_dense_one():
    def product(model):
        model.model.loss_function = partial(weighted_causal_lm_ce, reduction="mean")
        trainer, state = Trainer.initialize(model.model, torchopt.sgd(0.1, momentum=0.9))
        for parameter in state.params.values():
            parameter.requires_grad_()
        weights = torch.ones(len(TRAIN), requires_grad=True)  # one for each text
        batch = {"input_ids": TRAIN, "labels": TRAIN, "example_weight": weights}
        for _ in range(2):
            state = trainer.step(state, batch, trace=True)
        query = {"input_ids": TEST, "labels": TEST}
        loss = functional_call(trainer.model, state.params, (), query).loss
        return torch.autograd.grad(loss, weights)[0]

    hold(product, "transformers", stock=NO_SECOND)
