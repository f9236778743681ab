"""opacus, and torch.func alone: gradients of each text."""

import pytest
from llamas import SHOPS, TRAIN, flat, hold, shifted
from opacus import GradSampleModule
from torch.func import functional_call, grad, vmap


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("functorch", [False, True], ids=["hooks", "functorch"])
@pytest.mark.parametrize("shop", SHOPS)
def test_its_gradients_of_each_text_are_the_dense_ones(functorch, shop):
    def product(model):
        module = GradSampleModule(model.train(), force_functorch=functorch, strict=False)
        shifted(module(TRAIN[:, :-1]), TRAIN, "none").mean(-1).mean().backward()
        return flat({name: p.grad_sample for name, p in module.named_parameters()})

    hold(product, shop, stock=None)


@pytest.mark.parametrize("shop", SHOPS)
def test_torch_func_gives_the_gradient_of_each_text(shop):
    def product(model):
        params = {name: p.detach() for name, p in model.named_parameters()}
        loss = lambda params, text: shifted(
            functional_call(model, params, (text[None, :-1],)), text[None]
        )
        return flat(vmap(grad(loss), in_dims=(None, 0))(params, TRAIN))

    hold(product, shop, stock=None)
