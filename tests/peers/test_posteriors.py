"""posteriors: products, a Laplace approximation, and a step of its extended Kalman filter."""

import posteriors
import pytest
import torch
from llamas import (
    CLOSED,
    DENSE,
    NO_JVP,
    REGISTERED_AND_CLOSED,
    SHOPS,
    TRAIN,
    flat,
    hold,
    run,
    same,
    shifted,
    vector,
)
from torch.func import functional_call, hessian


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def tangent_of(params):
    return {name: vector(*p.shape) for name, p in params.items()}


def logits(model, params):
    return functional_call(model, params, (TRAIN[:, :-1],))


def hessian_product(model):
    params = weights_of(model)
    loss = lambda params: shifted(logits(model, params), TRAIN)
    return flat(posteriors.hvp(loss, (params,), (tangent_of(params),))[1])


def gauss_newton_product(model):
    params = weights_of(model)
    forward, loss = lambda params: logits(model, params), lambda z: shifted(z, TRAIN)
    return flat(posteriors.ggnvp(forward, loss, (params,), (tangent_of(params),))[1])


def fisher_product(model):
    params = weights_of(model)
    each = lambda params: -shifted(logits(model, params), TRAIN, "none").sum(-1)
    return flat(posteriors.fvp(each, (params,), (tangent_of(params),))[1])


def kalman_step(model):
    def log_likelihood(params, tokens):
        out = functional_call(model, params, (tokens[:, :-1],))
        return -shifted(out, tokens, "none").sum(-1), torch.tensor([])

    transform = posteriors.ekf.diag_fisher.build(log_likelihood, lr=0.1)
    state, _ = transform.update(transform.init(weights_of(model)), TRAIN)
    return flat(state.params)


def laplace(model):
    """The precision by the Gauss-Newton matrix of the norms' weights."""
    params = weights_of(model)
    some = {name: p for name, p in params.items() if p.dim() == 1}

    def forward(some, tokens):
        out = functional_call(model, params | some, (tokens[:, :-1],))
        return out.flatten(0, -2), torch.tensor([])

    def outer(z, tokens):
        return -torch.nn.functional.cross_entropy(z, tokens[:, 1:].flatten(), reduction="sum")

    transform = posteriors.laplace.dense_ggn.build(forward, outer)
    return transform.update(transform.init(some), TRAIN)[0].prec


@pytest.mark.parametrize(
    ("product", "stock"),
    [
        (hessian_product, NO_JVP),
        (gauss_newton_product, NO_JVP),
        (fisher_product, NO_JVP),
        (kalman_step, None),
        (laplace, None),
    ],
)
@pytest.mark.parametrize("shop", SHOPS)
def test_it_computes_what_it_does_of_dense_attention(product, stock, shop):
    hold(product, shop, stock=stock)


def laplace_of_the_hessian(model):
    """The precision by the Hessian of the norms' weights, under no_grad as its page says."""

    def log_posterior(some, tokens):
        out = functional_call(model, weights_of(model) | some, (tokens[:, :-1],))
        return -shifted(out, tokens), torch.tensor([])

    some = {name: p for name, p in weights_of(model).items() if p.dim() == 1}
    transform = posteriors.laplace.dense_hessian.build(log_posterior)
    return transform.update(transform.init(some), TRAIN)[0].prec


def precision(model):
    """The same, without a tool."""
    params = weights_of(model)
    some = {name: p for name, p in params.items() if p.dim() == 1}

    def loss(vector):
        parts = vector.split([p.numel() for p in some.values()])
        return shifted(logits(model, params | dict(zip(some, parts, strict=True))), TRAIN)

    return hessian(loss)(flat(some))


@pytest.mark.parametrize("shop", SHOPS)
def test_its_laplace_of_the_hessian_is_the_exact_one(shop):
    wanted = run(precision, DENSE[shop])
    for route in [CLOSED[shop], *([REGISTERED_AND_CLOSED] if shop == "transformers" else [])]:
        same(run(laplace_of_the_hessian, route), wanted)
    with pytest.raises(NotImplementedError, match="aten::silu_backward"):
        run(laplace_of_the_hessian, DENSE[shop])
