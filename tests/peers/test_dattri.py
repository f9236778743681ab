"""dattri: influence by conjugate gradients, and TRAK scores."""

import pytest
import torch
from dattri.algorithm import IFAttributorCG, TRAKAttributor
from dattri.task import AttributionTask
from llamas import NO_JVP, NO_SECOND, SHOPS, TEST, TRAIN, hold, shifted
from torch.func import functional_call
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
