"""dattri: influence by conjugate gradients, and TRAK scores."""

import pytest
import torch
from dattri.algorithm import IFAttributorCG, TRAKAttributor
from dattri.task import AttributionTask
from llamas import (
    DENSE,
    DOCUMENTED,
    EAGER,
    NO_JVP,
    NO_SECOND,
    REGISTERED,
    REGISTERED_AND_CLOSED,
    SHOPS,
    STOCK,
    TEST,
    TRAIN,
    hold,
    run,
    same,
    shifted,
)
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

TRAINING = DataLoader(TensorDataset(TRAIN), batch_size=4)
TESTING = DataLoader(TensorDataset(TEST), batch_size=3)


def loss_of(model):
    def loss(params, data):
        tokens = data[0] if data[0].dim() == 2 else data[0][None]
        return shifted(functional_call(model, params, (tokens[:, :-1],)), tokens)

    return loss


def task_of(model):
    return AttributionTask(loss_func=loss_of(model), model=model, checkpoints=model.state_dict())


@pytest.mark.parametrize(("mode", "stock"), [("rev-rev", NO_SECOND), ("rev-fwd", NO_JVP)])
@pytest.mark.parametrize("shop", SHOPS)
def test_its_influence_is_the_dense_one(mode, stock, shop):
    def product(model):
        attributor = IFAttributorCG(task=task_of(model), max_iter=3, regularization=0.1, mode=mode)
        attributor.cache(TRAINING)
        return attributor.attribute(TRAINING, TESTING)

    hold(product, shop, stock=stock)


@pytest.mark.parametrize("shop", SHOPS)
def test_its_trak_scores_are_the_dense_ones(shop):
    def product(model):
        projector = {"proj_dim": 16, "proj_max_batch_size": 8, "proj_seed": 0, "device": "cpu"}
        attributor = TRAKAttributor(
            task=task_of(model),
            correct_probability_func=lambda params, data: torch.exp(-loss_of(model)(params, data)),
            projector_kwargs=projector,
            regularization=0.01,  # 16 columns of 4 texts
        )
        with torch.no_grad():
            attributor.cache(TRAINING)
            return attributor.attribute(TESTING)

    hold(product, shop, stock=None)


def test_its_gradients_of_padded_texts_are_those_of_each():
    """dattri maps over texts, and transformers looks at the values of a mask for each, unless its
    attention is eager or ours.
    """
    padding = (torch.arange(5) < torch.tensor([[5], [4], [3], [5]])).long()

    def loss_of(model):
        def loss(params, data):
            tokens, seen = (x if x.dim() == 2 else x[None] for x in data)
            inputs = {"input_ids": tokens[:, :-1], "attention_mask": seen}
            named = {name.removeprefix("model."): p for name, p in params.items()}
            logits = functional_call(model.model, named, (), inputs).logits
            targets = torch.where(seen > 0, tokens[:, 1:], -100)  # which the loss leaves out
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

        return loss

    def one_by_one(model):
        params = {name: p.detach() for name, p in model.named_parameters()}
        gradient = grad(loss_of(model))
        rows = [gradient(params, (TRAIN[n], padding[n])) for n in range(len(TRAIN))]
        return torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])

    def mapped(model):
        loss, state = loss_of(model), model.state_dict()
        task = AttributionTask(loss_func=loss, model=model, checkpoints=state)
        params, _ = task.get_param(0)
        return task.get_grad_loss_func(in_dims=(None, 0))(params, (TRAIN, padding))

    wanted = run(one_by_one, DENSE["transformers"])
    same(run(mapped, DOCUMENTED), wanted, EAGER)
    for route in (REGISTERED, REGISTERED_AND_CLOSED):
        same(run(mapped, route), wanted)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        run(mapped, STOCK["transformers"])
