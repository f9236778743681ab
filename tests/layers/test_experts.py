"""The product by experts against a loop over its rows, in every nesting of transforms, and what it
does not read.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import funcattn as fa
from funcattn import layers
from funcattn.testing import check_transforms

close = torch.testing.assert_close


def normal(seed, *shape):
    return fa.random.normal(fa.key(seed), shape, torch.float64)


def dense(x, weight, expert):
    """weight[expert] @ x, row by row."""
    return torch.einsum("noi,ni->no", weight[expert], x)


def product(x, weight, expert):
    return layers.linear_experts(weight, x, expert)


EXPERT = torch.tensor([2, 0, 2, 3])  # one of four is not chosen, one twice


def test_the_product_by_experts_is_the_dense_one():
    """Every nesting to depth three of grad, jvp and vmap, over x alone, the matrices alone and
    both; and the Hessian.
    """
    curved = lambda f: lambda x, weight: f(x, weight, EXPERT).sin()
    report = check_transforms(
        curved(product), normal(0, 4, 2), normal(1, 4, 3, 2), reference=curved(dense), depth=3
    )
    assert not report.off


@settings(max_examples=30)
@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 4), max_size=12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_any_choice_gives_the_dense_product_and_its_derivatives(X, chosen, n_in, n_out, seed):
    expert = torch.tensor([i % X for i in chosen], dtype=torch.int64)
    x, weight = normal(seed, len(chosen), n_in), normal(seed + 1, X, n_out, n_in)
    close(product(x, weight, expert), dense(x, weight, expert))
    total = lambda f: lambda x, weight: f(x, weight, expert).sin().sum()
    for got, wanted in zip(
        grad(total(product), (0, 1))(x, weight), grad(total(dense), (0, 1))(x, weight), strict=True
    ):
        close(got, wanted)


def hvp(f):
    """A second derivative of f(x, weight, expert) in x and weight, along a direction."""

    def second(x, weight, expert):
        total = lambda x, weight: f(x, weight, expert).sin().sum()
        return jvp(grad(total, (0, 1)), (x, weight), (torch.ones_like(x), weight.cos()))[1]

    return second


def test_expert_ids_are_mapped_alone_and_with_everything():
    x, weight = normal(0, 3, 4, 2), normal(1, 3, 5, 3, 2)
    expert = fa.random.randint(fa.key(2), (3, 4), 0, 5)
    for dims in (
        (0, 0, 0),
        (None, None, 0),
        (0, None, 0),
        (None, 0, 0),
        (0, 0, None),
        (None, 0, None),
        (0, None, None),
    ):
        args = [t if d == 0 else t[0] for t, d in zip((x, weight, expert), dims, strict=True)]
        row = lambda b, args=args, dims=dims: [
            t[b] if d == 0 else t for t, d in zip(args, dims, strict=True)
        ]
        close(vmap(product, dims)(*args), torch.stack([dense(*row(b)) for b in range(3)]))
        each = vmap(hvp(product), dims)(*args)
        for part in range(2):
            close(each[part], torch.stack([hvp(dense)(*row(b))[part] for b in range(3)]))


def test_nested_maps_are_nested_loops():
    x, weight, expert = (
        normal(0, 2, 3, 4, 2),
        normal(1, 3, 5, 3, 2),
        fa.random.randint(fa.key(2), (2, 4), 0, 5),
    )
    both = vmap(vmap(product, (0, 0, None)), (0, None, 0))(x, weight, expert)
    close(
        both,
        torch.stack(
            [
                torch.stack([dense(x[a, b], weight[b], expert[a]) for b in range(3)])
                for a in range(2)
            ]
        ),
    )
    # axes that are not the first
    across = vmap(product, (1, 3, None), 1)(x[0].transpose(0, 1), weight.movedim(0, 3), expert[0])
    close(across, torch.stack([dense(x[0, b], weight[b], expert[0]) for b in range(3)], 1))


def test_jacobians_of_both_modes_are_those_of_the_dense_product():
    x, weight = normal(0, 4, 2), normal(1, 4, 3, 2)
    for jacobian in (jacrev, jacfwd):
        for place in (0, 1):
            close(
                jacobian(product, place)(x, weight, EXPERT),
                jacobian(dense, place)(x, weight, EXPERT),
            )


def test_autograd_of_torch_goes_twice_through_it():
    x, weight = (t.requires_grad_() for t in (normal(0, 4, 2), normal(1, 4, 3, 2)))
    assert torch.autograd.gradcheck(lambda x, weight: product(x, weight, EXPERT), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, weight: product(x, weight, EXPERT), (x, weight))


def test_an_expert_that_nobody_chose_is_not_read():
    """It may be NaN, and still neither a value nor a derivative is."""
    x, weight = normal(0, 4, 2), normal(1, 4, 3, 2)
    spoiled = weight.index_fill(0, torch.tensor([1]), float("nan"))
    assert torch.equal(product(x, spoiled, EXPERT), product(x, weight, EXPERT))
    dx, dw = grad(lambda x, weight: product(x, weight, EXPERT).sin().sum(), (0, 1))(x, spoiled)
    assert torch.equal(dx, grad(lambda x: product(x, weight, EXPERT).sin().sum())(x))
    assert dw.isfinite().all()
    assert not dw[1].any()
    rows = vmap(lambda expert: product(x, spoiled, expert))(torch.stack([EXPERT, EXPERT.flip(0)]))
    assert rows.isfinite().all()


def test_no_rows_give_no_rows():
    x, weight, none = normal(0, 0, 2), normal(1, 4, 3, 2), torch.zeros(0, dtype=torch.int64)
    assert product(x, weight, none).shape == (0, 3)
    assert not grad(lambda weight: product(x, weight, none).sum())(weight).any()
    assert jvp(lambda x: product(x, weight, none), (x,), (x,))[1].shape == (0, 3)
    assert vmap(product, (0, None, 0))(x.expand(2, 0, 2), weight, none.expand(2, 0)).shape == (
        2,
        0,
        3,
    )


def test_the_product_compiles_in_one_graph():
    x, weight = normal(0, 4, 2), normal(1, 4, 3, 2)
    total = lambda x, weight, expert: product(x, weight, expert).sin().sum()
    programs = [
        product,
        lambda x, weight, expert: grad(total, (0, 1))(x, weight, expert),
        lambda x, weight, expert: vmap(grad(total), (0, None, 0))(
            x.expand(2, 4, 2), weight, expert.expand(2, 4)
        ),
        lambda x, weight, expert: jvp(lambda w: product(x, w, expert), (weight,), (weight.cos(),))[
            1
        ],
        lambda x, weight, expert: jvp(grad(lambda x: total(x, weight, expert)), (x,), (x.cos(),))[
            1
        ],
    ]
    for program in programs:
        torch._dynamo.reset()
        compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
        for expert in (EXPERT, EXPERT.flip(0)):  # another choice is the same graph
            close(compiled(x, weight, expert), program(x, weight, expert))


def test_a_compiled_step_of_training_has_the_gradients_of_the_eager_one():
    x, weight = normal(0, 4, 2), normal(1, 4, 3, 2).requires_grad_()
    step = lambda x, weight: product(x, weight, EXPERT).sin().sum()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(
        torch.autograd.grad(compiled(x, weight), weight),
        torch.autograd.grad(step(x, weight), weight),
    )


class Halved(NamedTuple):
    """A record that knows nothing of experts: its matrix is stored at half its size."""

    half: torch.Tensor


@layers.linear.register
def _(weight: Halved, x: torch.Tensor) -> torch.Tensor:
    return 2 * (x @ weight.half.mT)


def test_a_record_that_registered_with_linear_serves_experts_too():
    x, weight = normal(0, 4, 2), normal(1, 4, 3, 2)
    close(product(x, Halved(weight / 2), EXPERT), dense(x, weight, EXPERT))


# Routing.


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_shares_are_the_softmax_of_the_best(k, normalized):
    logits = normal(0, 3, 5)
    share, expert = layers.route(logits, k, normalized=normalized)
    P = logits.softmax(-1)
    best = P.sort(-1, descending=True)
    assert torch.equal(expert, best.indices[:, :k])
    wanted = best.values[:, :k]
    close(share, wanted / wanted.sum(-1, keepdim=True) if normalized else wanted)


def test_shares_are_float32_at_least_and_differentiate():
    logits = normal(0, 3, 5)
    assert layers.route(logits.bfloat16(), 2)[0].dtype == torch.float32
    f = lambda logits, normalized: layers.route(logits, 2, normalized=normalized)[0].sin().sum()
    for normalized in (True, False):
        numeric = torch.autograd.functional.jacobian(lambda x, n=normalized: f(x, n), logits)
        close(grad(f)(logits, normalized), numeric)
        direction = logits.cos()
        close(
            jvp(lambda x, n=normalized: f(x, n), (logits,), (direction,))[1],
            (numeric * direction).sum(),
        )


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (3, 2)])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_experts_are_chosen_by_their_scores_with_a_bias_within_groups(scores, groups, normalized):
    """Against a loop over tokens, with weights that are the scores without the bias."""
    logits, bias = normal(0, 5, 6), normal(1, 6)
    options = {"scores": scores, "choice_bias": bias, "groups": groups, "scale": 1.5}
    share, expert = layers.route(logits, 2, normalized=normalized, **options)
    size = 6 // groups[0]
    for row in range(5):
        own = logits[row].softmax(-1) if scores == "softmax" else logits[row].sigmoid()
        choice = own + bias
        worth = [
            choice[g * size : (g + 1) * size].sort().values[-2:].sum() for g in range(groups[0])
        ]
        kept = sorted(range(groups[0]), key=lambda g, worth=worth: -worth[g])[: groups[1]]
        allowed = [i for i in range(6) if i // size in kept]
        best = sorted(allowed, key=lambda i, choice=choice: -choice[i])[:2]
        assert expert[row].tolist() == best
        wanted = own[best] / own[best].sum() if normalized else own[best]
        close(share[row], 1.5 * wanted)


def test_other_scores_differentiate_and_map():
    logits, bias = normal(0, 3, 6), normal(1, 6)
    f = lambda x, bias: (
        layers.route(x, 2, scores="sigmoid", choice_bias=bias, groups=(3, 2))[0].sin().sum()
    )
    numeric = torch.autograd.functional.jacobian(lambda x: f(x, bias), logits)
    close(grad(f)(logits, bias), numeric)
    close(vmap(grad(f), (0, None))(logits, bias), numeric)
    assert not grad(f, 1)(logits, bias).any()  # a choice has no derivative


@pytest.mark.parametrize("k", [0, 6, -1])
def test_more_experts_than_there_are_is_an_error(k):
    with pytest.raises(
        ValueError, match=rf"route: k should be between 1 and the 5 experts, got {k}"
    ):
        layers.route(normal(0, 3, 5), k)
