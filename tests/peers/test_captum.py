"""captum: integrated gradients of the embeddings, and influence by Arnoldi's iteration."""

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from llamas import CLASSES, NO_SECOND, SHOPS, TEST, TRAIN, Classifier, hold
from torch import nn
from torch.utils.data import TensorDataset


@pytest.mark.parametrize("shop", SHOPS)
def test_its_integrated_gradients_are_the_dense_ones(shop):
    def product(model):
        layered = LayerIntegratedGradients(Classifier(model), model.embedding)
        return layered.attribute(TRAIN, baselines=torch.zeros_like(TRAIN), target=1, n_steps=8)

    hold(product, shop, stock=None)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # captum of its own samples
@pytest.mark.parametrize("shop", SHOPS)
def test_its_influence_is_the_dense_one(shop, tmp_path):
    def product(model):
        classifier, checkpoint = Classifier(model), str(tmp_path / "checkpoint.pt")
        torch.save(classifier.state_dict(), checkpoint)
        loss = nn.CrossEntropyLoss(reduction="none")
        influence = ArnoldiInfluenceFunction(
            classifier,
            TensorDataset(TRAIN, CLASSES),
            checkpoint,
            loss_fn=loss,
            test_loss_fn=loss,
            batch_size=4,
            projection_dim=4,
            arnoldi_dim=8,
            seed=0,
        )
        return influence.influence((TEST, CLASSES[:3]))

    hold(product, shop, stock=NO_SECOND)
