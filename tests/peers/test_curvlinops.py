"""curvlinops: the products of its linear operators with two vectors."""

import curvlinops
import pytest
import torch
from llamas import (
    CLOSED,
    DENSE,
    DOCUMENTED,
    NO_JVP,
    REGISTERED,
    REGISTERED_AND_CLOSED,
    SHOPS,
    STOCK,
    TRAIN,
    flat,
    hold,
    run,
    same,
    shifted,
    vector,
)
from torch import nn
from torch.func import functional_call, grad, jvp


class ClassesSecond(nn.Module):
    """Logits (B, V, T), as nn.CrossEntropyLoss takes them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).transpose(1, 2)


def product(kind):
    def multiply(model):
        parameters = list(model.parameters())
        data = [(TRAIN[:, :-1], TRAIN[:, 1:])]
        operator = getattr(curvlinops, kind)(
            ClassesSecond(model), nn.CrossEntropyLoss(), parameters, data
        )
        return operator @ vector(operator.shape[1], 2)

    return multiply


@pytest.mark.parametrize("kind", ["GGNLinearOperator", "EFLinearOperator"])
@pytest.mark.parametrize("shop", SHOPS)
def test_its_products_are_the_dense_ones(kind, shop):
    hold(product(kind), shop, stock=NO_JVP)


def exact(model):
    """The same two products with the Hessian by jvp(grad) of the loss, without a tool."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda params: shifted(functional_call(model, params, (TRAIN[:, :-1],)), TRAIN)
    sizes = [p.numel() for p in params.values()]
    columns = []
    for column in vector(sum(sizes), 2).unbind(-1):
        parts = zip(params.items(), column.split(sizes), strict=True)
        tangent = {name: part.view(p.shape) for (name, p), part in parts}
        columns.append(flat(jvp(grad(loss), (params,), (tangent,))[1]))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("shop", SHOPS)
def test_its_hessian_of_a_llama_is_the_exact_one(shop):
    wanted = run(exact, DENSE[shop])
    for route in [CLOSED[shop], *([REGISTERED_AND_CLOSED] if shop == "transformers" else [])]:
        same(run(product("HessianLinearOperator"), route), wanted)


@pytest.mark.parametrize("shop", SHOPS)
def test_its_hessian_stops_at_silu_with_dense_attention(shop):
    """torch's silu_backward has no forward derivative, and curvlinops differentiates under
    no_grad, where its other formula is not taken.
    """
    for route in [DENSE[shop], *([DOCUMENTED, REGISTERED] if shop == "transformers" else [])]:
        with pytest.raises(NotImplementedError, match="aten::silu_backward"):
            run(product("HessianLinearOperator"), route)
    with pytest.raises(NotImplementedError, match=NO_JVP):
        run(product("HessianLinearOperator"), STOCK[shop])
