"""hessian-eigenthings: Hessian-vector products, eigenvalues, Gauss-Newton and Fisher products."""

import hessian_eigenthings as tool
import pytest
from llamas import (
    DENSE,
    DOCUMENTED,
    EAGER,
    NO_JVP,
    NO_SECOND,
    REGISTERED,
    SHOPS,
    STOCK,
    TRAIN,
    hold,
    run,
    same,
    vector,
)
from torch.nn import functional as F

DATA = [(TRAIN[:2, :-1], TRAIN[:2, 1:]), (TRAIN[2:, :-1], TRAIN[2:, 1:])]


def criterion(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def along(operator):
    return operator.matvec(vector(operator.size))


def hessian(model):
    return tool.HessianOperator(model, DATA, tool.supervised_loss(criterion))


def gauss_newton(model):
    forward, loss = tool.supervised_forward, tool.supervised_loss_of_output(criterion)
    return tool.GGNOperator(model, DATA, forward, loss)


def fisher(model):
    return tool.EmpiricalFisherOperator(model, DATA, tool.supervised_per_sample_loss(criterion))


@pytest.mark.parametrize(
    ("operator", "stock"), [(hessian, NO_SECOND), (gauss_newton, NO_JVP), (fisher, None)]
)
@pytest.mark.parametrize("shop", SHOPS)
def test_its_products_are_the_dense_ones(operator, stock, shop):
    hold(lambda model: along(operator(model)), shop, stock=stock)


@pytest.mark.parametrize("shop", SHOPS)
def test_its_eigenvalues_are_the_dense_ones(shop):
    hold(lambda model: tool.lanczos(hessian(model), k=2, seed=0).eigenvalues, shop, stock=NO_SECOND)


def test_its_helper_for_transformers_takes_ours():
    """hf_lm_loss, as its page for language models says."""

    def product(model):
        batch = {"input_ids": TRAIN, "labels": TRAIN}
        return along(tool.HessianOperator(model.model, [batch], tool.hf_lm_loss()))

    # transformers computes the logits of its loss in float32, by every route alike
    wanted = run(product, DENSE["transformers"])
    same(run(product, REGISTERED), wanted, EAGER)
    same(run(product, DOCUMENTED), wanted, EAGER)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        run(product, STOCK["transformers"])
