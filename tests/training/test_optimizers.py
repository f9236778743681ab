"""Optimizers and schedules against torch.optim and against their own equations, and the transforms
that go through them.
"""

import contextlib
import math

import pytest
import torch
from torch.func import grad, vmap

import funcattn as fa
from funcattn.training import accumulate, adamw, apply, chain, clip, muon, norm, orthogonal, sgd

STEPS = 6
# Each step rounds each number a few times, and these differ in where: a few ulp a step, of numbers
# about one.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6}


def weights(dtype=torch.float32):
    key = fa.key(0)
    return {
        "layers": (
            {
                "gate": fa.random.normal(fa.fold_in(key, 1), (3, 8), dtype),
                "norm": fa.random.normal(fa.fold_in(key, 2), (4,), dtype),
                "q": fa.random.normal(fa.fold_in(key, 3), (6, 4), dtype),
            },
        ),
        "embedding": fa.random.normal(fa.fold_in(key, 4), (5, 4), dtype),
    }


def surprises(params, number):
    """Gradients that change from step to step."""
    return fa.tree.map_with_path(
        lambda path, p: (
            p * 0.3
            + fa.random.normal(
                fa.fold_in(fa.fold_in(fa.key(9), number), sum(map(ord, path))), p.shape, p.dtype
            )
        ),
        params,
    )


def run(optimizer, params, steps=STEPS):
    state = optimizer.init(params)
    for number in range(steps):
        updates, state = optimizer.update(surprises(params, number), state, params)
        params = apply(params, updates)
    return params, state


def run_torch(make, params, steps=STEPS, clipping=None, schedule=None):
    leaves = [p.clone().requires_grad_() for p in fa.tree.leaves(params)]
    paths = fa.tree.paths(params)
    optimizers = make(dict(zip(paths, leaves, strict=True)))
    for number in range(steps):
        structure = fa.tree.map(lambda p: p, params)
        now = fa.tree.map_with_path(lambda path, _: leaves[paths.index(path)].detach(), structure)
        for leaf, g in zip(leaves, fa.tree.leaves(surprises(now, number)), strict=True):
            leaf.grad = g.clone()
        if clipping:
            torch.nn.utils.clip_grad_norm_(leaves, clipping)
        for optimizer in optimizers:
            if schedule:
                optimizer.param_groups[0]["lr"] = schedule(number)
            optimizer.step()
    return [leaf.detach() for leaf in leaves]


everything = lambda path, leaf: True
peers = torch.optim
SAME = {
    "sgd": (sgd(0.1), lambda p: [peers.SGD(p.values(), 0.1)]),
    "sgd, decay": (
        sgd(0.1, weight_decay=0.2),
        lambda p: [peers.SGD(p.values(), 0.1, weight_decay=0.2)],
    ),
    "momentum": (sgd(0.1, momentum=0.9), lambda p: [peers.SGD(p.values(), 0.1, momentum=0.9)]),
    "nesterov": (
        sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: [peers.SGD(p.values(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.1)],
    ),
    "adam": (
        adamw(0.01, weight_decay=0.0),
        lambda p: [peers.AdamW(p.values(), 0.01, weight_decay=0.0)],
    ),
    "adamw": (
        adamw(0.01, betas=(0.8, 0.95), epsilon=1e-3, weight_decay=0.3, decays=everything),
        lambda p: [peers.AdamW(p.values(), 0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)],
    ),
    "adamw, matrices decay": (
        adamw(0.01, weight_decay=0.3),
        lambda p: [
            peers.AdamW([x for x in p.values() if x.dim() > 1], 0.01, weight_decay=0.3),
            peers.AdamW([x for x in p.values() if x.dim() < 2], 0.01, weight_decay=0.0),
        ],
    ),
    "adamw, rate a tensor": (
        adamw(torch.tensor(0.01, dtype=torch.float64), weight_decay=0.0),
        lambda p: [peers.AdamW(p.values(), 0.01, weight_decay=0.0)],
    ),
}
if hasattr(peers, "Muon"):
    inner = lambda p: [x for path, x in p.items() if path.startswith("layers.") and x.dim() == 2]
    outer = lambda p: [
        x for path, x in p.items() if not (path.startswith("layers.") and x.dim() == 2)
    ]
    SAME |= {
        "muon": (
            muon(0.02, rest=sgd(0.1)),
            lambda p: [peers.Muon(inner(p), 0.02), peers.SGD(outer(p), 0.1)],
        ),
        "muon, plain": (
            muon(0.02, nesterov=False, momentum=0.8, steps=3, rest=sgd(0.1)),
            lambda p: [
                peers.Muon(inner(p), 0.02, nesterov=False, momentum=0.8, ns_steps=3),
                peers.SGD(outer(p), 0.1),
            ],
        ),
        "muon, matched": (
            muon(0.02, match=True, weight_decay=0.2, rest=sgd(0.1)),
            lambda p: [
                peers.Muon(inner(p), 0.02, adjust_lr_fn="match_rms_adamw", weight_decay=0.2),
                peers.SGD(outer(p), 0.1),
            ],
        ),
    }


@pytest.mark.parametrize("quiet", [False, True], ids=["", "where the fused kernel serves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SAME)
def test_an_optimizer_takes_the_steps_of_torch(name, dtype, quiet):
    ours, theirs = SAME[name]
    params = weights(dtype)
    with torch.no_grad() if quiet else contextlib.nullcontext():
        mine = fa.tree.leaves(run(ours, params)[0])
    bound = ROUNDING[dtype]
    for a, b in zip(mine, run_torch(theirs, params), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


def test_clipping_and_a_schedule_are_those_of_torch():
    schedule = fa.training.cosine(0.1, 10, warmup=2, floor=0.01)
    params = weights(torch.float64)
    mine = run(chain(clip(0.5), sgd(schedule, momentum=0.9)), params)[0]
    rate = lambda i: (
        0.1 * (i + 1) / 3 if i < 2 else 0.01 + 0.09 * (1 + math.cos(math.pi * (i - 2) / 8)) / 2
    )
    theirs = run_torch(
        lambda p: [peers.SGD(p.values(), 0.1, momentum=0.9)], params, clipping=0.5, schedule=rate
    )
    for a, b in zip(fa.tree.leaves(mine), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING[torch.float64])


def test_a_short_gradient_is_left_as_it_is():
    gradients = {"w": torch.tensor([0.3, 0.4])}
    assert float(norm(gradients)) == pytest.approx(0.5)
    assert fa.tree.allclose(
        clip(1.0).update(gradients, (), gradients)[0], gradients, rtol=0, atol=0
    )
    assert float(norm(clip(0.1).update(gradients, (), gradients)[0])) == pytest.approx(
        0.1, rel=1e-4
    )


def test_accumulated_gradients_act_by_their_mean():
    params = {"w": torch.ones(3, dtype=torch.float64)}
    gradients = [{"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * n} for n in range(6)]
    optimizer, inside = accumulate(3, adamw(0.1)), adamw(0.1)
    state, direct = optimizer.init(params), inside.init(params)
    held = plain = params
    for number, g in enumerate(gradients):
        updates, state = optimizer.update(g, state, held)
        held = apply(held, updates)
        if number % 3 == 2:
            mean = {"w": sum(g["w"] for g in gradients[number - 2 : number + 1]) / 3}
            updates, direct = inside.update(mean, direct, plain)
            plain = apply(plain, updates)
        else:
            assert not updates["w"].any()
    torch.testing.assert_close(held, plain, rtol=0, atol=ROUNDING[torch.float64])
    assert int(state.count) == 0
    assert int(state.inner.count) == 2


def test_the_count_is_an_integer_tensor_in_the_state():
    state = run(adamw(0.1), weights())[1]
    assert state.count.dtype == torch.int64
    assert (state.count.shape, int(state.count)) == ((), STEPS)


def test_nothing_given_is_changed():
    for optimizer, _ in SAME.values():
        params = weights()
        state = optimizer.init(params)
        gradients = surprises(params, 0)
        before = fa.tree.map(torch.clone, (params, state, gradients))
        optimizer.update(gradients, state, params)
        with torch.no_grad():
            optimizer.update(gradients, state, params)
        assert fa.tree.allclose((params, state, gradients), before, rtol=0, atol=0)


def test_absent_leaves_have_neither_state_nor_update():
    params = {"w": torch.ones(2, 2), "frozen": ()}
    for optimizer in (
        sgd(0.1, momentum=0.9),
        adamw(0.1),
        muon(0.1),
        accumulate(2, adamw(0.1)),
        clip(1.0),
    ):
        updates, _ = optimizer.update(
            {"w": torch.ones(2, 2), "frozen": ()}, optimizer.init(params), params
        )
        assert updates["frozen"] == ()


# Muon in float32: the last bit of what goes in turns the last bit of bfloat16, which is no error of
# the vmap.
@pytest.mark.parametrize("name", [*(name for name in SAME if not name.startswith("muon")), "muon"])
def test_an_ensemble_is_a_vmap(name):
    optimizer = muon(0.02, dtype=torch.float32) if name == "muon" else SAME[name][0]
    members = [fa.tree.map(lambda p, s=s: p * s, weights()) for s in (0.5, 1.0, 2.0)]
    one = lambda params: run(optimizer, params, 3)[0]
    together = vmap(one)(fa.tree.stack(members))
    bound = ROUNDING[torch.float32]
    for member, alone in zip(fa.tree.unstack(together), map(one, members), strict=True):
        for a, b in zip(fa.tree.leaves(member), fa.tree.leaves(alone), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "make",
    [lambda rate: sgd(rate, momentum=0.9), adamw, lambda rate: muon(rate, dtype=torch.float64)],
)
def test_the_gradient_with_respect_to_the_learning_rate_is_a_difference_quotient(make):
    def after(rate):
        params = weights(torch.float64)
        optimizer = make(rate)
        state = optimizer.init(params)
        for number in range(3):
            updates, state = optimizer.update(surprises(params, number), state, params)
            params = apply(params, updates)
        return sum(p.square().sum() for p in fa.tree.leaves(params))

    rate, h = torch.tensor(0.03, dtype=torch.float64), 1e-6
    quotient = (after(rate + h) - after(rate - h)) / (2 * h)
    # h^2 of the quotient, and rounding over h
    torch.testing.assert_close(grad(after)(rate), quotient, rtol=1e-6, atol=1e-6)


def test_orthogonal_sets_singular_values_to_about_one():
    for shape in ((8, 8), (4, 16), (16, 4)):
        values = torch.linalg.svdvals(
            orthogonal(fa.random.normal(fa.key(1), shape), dtype=torch.float32)
        )
        assert values.max() < 1.3
        assert values.min() > 0.3


@pytest.mark.parametrize("peak", [1.0, 0.0])
def test_schedules_stay_between_floor_and_peak(peak):
    for schedule in (
        fa.training.constant(peak),
        fa.training.cosine(peak, 50, warmup=7),
        fa.training.wsd(peak, 50, warmup=7, decay=10),
    ):
        rates = [float(schedule(torch.tensor(i))) for i in range(60)]
        assert max(rates) == peak
        assert min(rates) >= 0
        assert rates == vmap(schedule)(torch.arange(60)).tolist()


BAD = [
    (lambda: sgd(-1.0), ValueError, "sgd: learning_rate should be a number, 0 or more, got -1.0"),
    (lambda: adamw(float("nan")), ValueError, "adamw: learning_rate"),
    (
        lambda: adamw(torch.ones(2)),
        ValueError,
        "adamw: learning_rate should be a floating tensor ()",
    ),
    (lambda: adamw(0.1, betas=(0.9, 1.0)), ValueError, "adamw: betas"),
    (lambda: adamw(0.1, weight_decay=-1), ValueError, "adamw: weight_decay"),
    (lambda: sgd(0.1, nesterov=True), ValueError, "sgd: nesterov"),
    (lambda: muon(0.1, steps=0), ValueError, "muon: steps"),
    (
        lambda: muon(0.1, where=everything).init({"w": torch.ones(2)}),
        ValueError,
        "muon: where should be true of matrices only",
    ),
    (lambda: clip(-1.0), ValueError, "clip: max_norm"),
    (lambda: accumulate(0, sgd(0.1)), ValueError, "accumulate: n"),
    (lambda: chain(clip), TypeError, "chain: optimizers"),
    (lambda: fa.training.cosine(0.1, 0), ValueError, "cosine: steps"),
    (lambda: fa.training.cosine(0.1, 5, warmup=6), ValueError, "cosine: warmup"),
    (lambda: fa.training.wsd(0.1, 5, decay=6), ValueError, "wsd: decay"),
    (
        lambda: sgd(0.1, momentum=0.9).update(
            {"w": torch.ones(2)},
            sgd(0.1, momentum=0.9).init({"v": torch.ones(2)}),
            {"w": torch.ones(2)},
        ),
        ValueError,
        "update: gradients, state and params should be trees of one structure",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_an_optimizer_prints_as_the_call_that_made_it():
    training = fa.training
    rate = training.cosine(1e-3, 100)
    assert repr(training.adamw(3e-4)) == "adamw(0.0003)"
    assert (
        repr(training.sgd(learning_rate=0.1, momentum=0.9))
        == "sgd(learning_rate=0.1, momentum=0.9)"
    )
    both = training.chain(training.clip(1.0), training.muon(rate, where=training.hidden_matrices))
    assert repr(both) == "chain(clip(1.0), muon(cosine(...), where=hidden_matrices))"
    assert (
        repr(training.accumulate(4, training.sgd(torch.tensor(0.1))))
        == "accumulate(4, sgd(float32[]))"
    )
    assert repr(training.clip(1.0, specs=("tensor",) * 1000)) == "clip(1.0, specs=tuple(...))"
    assert repr(training.Optimizer(both.init, both.update)) == "Optimizer(init, update)"


def test_an_optimizer_is_two_functions():
    optimizer = adamw(1e-3)
    init, update = optimizer
    assert (init, update) == (optimizer.init, optimizer.update)
    assert optimizer._replace(init=len).init is len


def test_an_optimizer_in_a_wrong_place_is_told_at_once():
    with pytest.raises(ValueError, match="sgd: learning_rate should be a number, 0 or more"):
        sgd(adamw(1e-3))
    with pytest.raises(
        TypeError, match="accumulate: optimizer should be an Optimizer, got a function"
    ):
        fa.training.accumulate(2, adamw)
    assert repr(sgd(0.1)._replace(update=len)) == "Optimizer(init, update)"
