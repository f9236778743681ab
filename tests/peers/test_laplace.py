"""laplace-torch: posteriors of a classifier by each structure of its curvature."""

import pytest
from laplace import Laplace
from laplace.curvature import CurvlinopsEF, CurvlinopsGGN
from llamas import CLASSES, NO_JVP, SHOPS, TEST, TRAIN, Classifier, hold
from torch.utils.data import DataLoader, TensorDataset


@pytest.mark.parametrize(
    ("structure", "backend", "stock"),
    [
        ("full", CurvlinopsGGN, NO_JVP),
        ("kron", CurvlinopsGGN, None),
        ("diag", CurvlinopsEF, None),
    ],
)
@pytest.mark.parametrize("shop", SHOPS)
def test_its_predictions_are_those_of_dense_attention(structure, backend, stock, shop):
    def product(model):
        classifier = Classifier(model)
        for name, parameter in classifier.named_parameters():
            # values of the second layer, and what the first one gives to it
            later = name.endswith(("blocks.1.v.weight", "layers.1.self_attn.v_proj.weight"))
            first = name.endswith(("blocks.0.down.weight", "layers.0.mlp.down_proj.weight"))
            parameter.requires_grad_(later or first)
        posterior = Laplace(
            classifier,
            "classification",
            subset_of_weights="all",
            hessian_structure=structure,
            backend=backend,
        )
        posterior.fit(DataLoader(TensorDataset(TRAIN, CLASSES), batch_size=2))
        return posterior(TEST, pred_type="glm", link_approx="probit")

    hold(product, shop, stock=stock)
