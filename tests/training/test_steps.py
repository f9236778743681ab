"""One step of training: the same step eager, compiled, mapped, split in micro-batches and with
narrow numbers.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap

import funcattn as fa
from funcattn.training import adamw, chain, clip, muon, sgd, step

CONFIG = fa.Config(
    vocabulary=17, width=8, layers=2, heads=2, kv_heads=1, head_size=4, feed_forward=12, context=32
)
MODEL = fa.decoder(CONFIG)
ROWS = fa.random.randint(fa.key(2), (4, 9), 0, CONFIG.vocabulary)


def weights(dtype=torch.float64, seed=1):
    return fa.tree.map(lambda w: w.to(dtype) * (5 if w.dim() > 1 else 1), MODEL.init(fa.key(seed)))


def close(a, b, bound=1e-12):
    assert fa.tree.leaves(a)
    for (path, x), y in zip(fa.tree.items(a), fa.tree.leaves(b), strict=True):
        torch.testing.assert_close(
            x, y, rtol=0, atol=bound, msg=lambda m, path=path: f"{path}: {m}"
        )


def taken(one, params, state, n=3):
    for _ in range(n):
        params, state, metrics = one(params, state, ROWS)
    return params, state, metrics


def test_a_step_is_what_autograd_and_torch_do():
    params = weights()
    leaves = [leaf.clone().requires_grad_() for leaf in fa.tree.leaves(params)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [x for x in leaves if x.dim() > 1], "weight_decay": 0.1},
            {"params": [x for x in leaves if x.dim() < 2], "weight_decay": 0},
        ],
        1e-2,
    )
    paths = fa.tree.paths(params)
    for _ in range(3):
        held = fa.tree.map_with_path(lambda path, _: leaves[paths.index(path)], params)
        loss = fa.loss(MODEL, held, ROWS)
        optimizer.zero_grad()
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        optimizer.step()
    ours = chain(clip(0.5), adamw(1e-2, weight_decay=0.1))
    after, _, metrics = taken(step(MODEL, ours), params, ours.init(params))
    close(fa.tree.leaves(after), [leaf.detach() for leaf in leaves])
    # torch's norm is of floats
    close([metrics.loss, metrics.norm], [loss.detach(), length.double()], 1e-7)


@pytest.mark.parametrize(
    "make",
    [lambda: sgd(0.1, momentum=0.9), lambda: adamw(1e-2), lambda: muon(1e-2, dtype=torch.float64)],
)
def test_autograd_and_torch_func_take_the_same_step(make):
    params, optimizer = weights(), make()
    one = step(MODEL, optimizer)
    with torch.no_grad():
        quick = taken(one, params, optimizer.init(params))
    close(quick, taken(one, params, optimizer.init(params)))
    assert not any(leaf.requires_grad for leaf in fa.tree.leaves(quick))


FIRST = lambda: chain(clip(0.5), adamw(fa.training.cosine(1e-2, 9, warmup=2)))
SECOND = lambda: muon(1e-2)


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (FIRST, None),
        pytest.param(SECOND, "sdpa", marks=pytest.mark.slow),
        pytest.param(FIRST, "sdpa", marks=pytest.mark.slow),
        pytest.param(SECOND, None, marks=pytest.mark.slow),
    ],
)
def test_a_step_compiles_to_one_graph(make, kernel):
    torch._dynamo.reset()
    counter = CompileCounter()
    params, optimizer = weights(torch.float32), make()
    one = step(fa.decoder(CONFIG, kernel=kernel), optimizer)
    compiled = torch.compile(one, fullgraph=True, backend=counter)
    with torch.no_grad():
        # first: functools.singledispatch remembers the types it met
        expected = taken(one, params, optimizer.init(params), 4)
        close(taken(compiled, params, optimizer.init(params), 4), expected, 1e-4)
    # the count of steps is a tensor, so no step is a graph of its own
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.real("Inductor compiles for it")
def test_inductor_takes_the_same_step():
    torch._dynamo.reset()
    params, optimizer = weights(), chain(clip(0.5), adamw(1e-2))
    one = step(fa.decoder(CONFIG, kernel="sdpa"), optimizer)
    with torch.no_grad():
        compiled = taken(torch.compile(one, fullgraph=True), params, optimizer.init(params))
        # cosines of the rotation are float32: 6e-8
        close(compiled, taken(one, params, optimizer.init(params)), 1e-7)


@pytest.mark.parametrize("n", [2, 4])
def test_micro_batches_give_the_step_of_the_whole(n):
    params, optimizer = weights(), adamw(1e-2)
    whole = taken(step(MODEL, optimizer), params, optimizer.init(params))
    close(taken(step(MODEL, optimizer, micro_batches=n), params, optimizer.init(params)), whole)


def test_masters_stay_wide_where_the_computation_is_narrow():
    params, optimizer, seen = weights(torch.float32), adamw(1e-2), []

    def loss(model, params, batch):
        seen.append(params.layers[0].q.dtype)
        return fa.loss(model, params, batch)

    narrow = step(MODEL, optimizer, loss=loss, compute=torch.bfloat16)
    after, state, metrics = taken(narrow, params, optimizer.init(params))
    assert set(seen) == {torch.bfloat16}
    assert {leaf.dtype for leaf in fa.tree.leaves((after, state.mean))} == {torch.float32}
    moved = fa.tree.map(lambda a, b: a - b, after, params)
    assert all((0 < move.abs().max() < 0.05) for move in fa.tree.leaves(moved))
    # Its gradient is that of a float32 model, but for a relative error of 2^-8 a product, in some
    # tens of them.
    wide = grad(lambda p: fa.loss(MODEL, p, ROWS))(params)
    rough = grad(lambda p: fa.loss(MODEL, fa.cast(torch.bfloat16)(p), ROWS))(params)
    for a, b in zip(fa.tree.leaves(rough), fa.tree.leaves(wide), strict=True):
        assert (a - b).norm() < 0.2 * b.norm()


def test_an_ensemble_is_trained_by_vmap():
    optimizer = chain(clip(0.5), adamw(1e-2))
    one = step(MODEL, optimizer)
    members = [weights(seed=seed) for seed in (1, 2, 3)]
    together = fa.tree.stack(members)
    states = fa.tree.stack([optimizer.init(member) for member in members])
    after, states, metrics = vmap(one, (0, 0, None))(together, states, ROWS)
    after, states, metrics = vmap(one, (0, 0, None))(after, states, ROWS)
    for i, member in enumerate(members):
        alone = taken(one, member, optimizer.init(member), 2)
        close(fa.tree.map(lambda x, i=i: x[i], (after, states, metrics)), alone)


def test_the_step_itself_has_a_gradient():
    """Of the loss after two steps with respect to the learning rate, against a central
    difference.
    """
    params = weights()

    def after(rate):
        optimizer = sgd(rate, momentum=0.9)
        trained, _, _ = taken(step(MODEL, optimizer), params, optimizer.init(params), 2)
        return fa.loss(MODEL, trained, ROWS)

    rate, h = torch.tensor(0.1, dtype=torch.float64), 1e-5
    torch.testing.assert_close(
        grad(after)(rate), (after(rate + h) - after(rate - h)) / (2 * h), rtol=1e-6, atol=1e-7
    )
    plain = rate.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(after(plain), plain)[0], grad(after)(rate), rtol=1e-10, atol=0
    )


def test_frozen_leaves_are_used_and_kept():
    params, optimizer = weights(), adamw(1e-2)
    chosen, frozen = fa.tree.partition(params, lambda path, _: path.endswith(".q"))
    one = step(MODEL, optimizer)
    with torch.no_grad():
        quick = one(chosen, optimizer.init(chosen), ROWS, frozen)
    after, state, metrics = one(chosen, optimizer.init(chosen), ROWS, frozen)
    close(quick, (after, state, metrics))
    assert fa.tree.paths(after) == ["layers.0.q", "layers.1.q"]
    full = grad(lambda p: fa.loss(MODEL, p, ROWS))(params)
    close(metrics.norm, torch.stack([layer.q.square().sum() for layer in full.layers]).sum().sqrt())


def test_nothing_given_is_changed():
    params, optimizer = weights(), adamw(1e-2)
    state = optimizer.init(params)
    before = fa.tree.map(torch.clone, (params, state, ROWS))
    with torch.no_grad():
        step(MODEL, optimizer)(params, state, ROWS)
    step(MODEL, optimizer)(params, state, ROWS)
    assert fa.tree.allclose((params, state, ROWS), before, rtol=0, atol=0)
    assert not any(leaf.requires_grad for leaf in fa.tree.leaves(params))


BAD = [
    (
        lambda: step(MODEL, adamw(0.1), micro_batches=0),
        ValueError,
        "step: micro_batches should be 1 or more",
    ),
    (
        lambda: step(MODEL, adamw),
        TypeError,
        "step: optimizer should be an Optimizer, got a function",
    ),
    (
        lambda: step(MODEL, adamw(0.1), compute=torch.int8),
        TypeError,
        "cast: dtype should be a floating torch.dtype",
    ),
    (
        lambda: step(MODEL, sgd(0.1), micro_batches=3)(weights(), sgd(0.1).init(weights()), ROWS),
        ValueError,
        "step: batch should be of",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
