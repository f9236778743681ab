"""Sharding over simulated devices: the untouched decoder against itself on one device, under every
transform.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vjp, vmap

import funcattn as fa
from funcattn import collectives, sharding, tree
from funcattn.collectives import psum
from funcattn.low_rank import is_trained
from funcattn.sharding import (
    Grid,
    P,
    Rule,
    fsdp,
    replicated,
    shard_map,
    specs,
    spmd,
    tensor_parallel,
)
from funcattn.sharding.mesh import devices, is_spec, part

SIZES = {
    "vocabulary": 48,
    "width": 16,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 4,
    "feed_forward": 24,
}
CONFIG = fa.Config(**SIZES)
MODEL = fa.decoder(CONFIG)
TOKENS = fa.random.randint(fa.key(1), (4, 9), 0, 48)
FAMILIES = {
    "llama": {},
    "untied": {"tied": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_norm": "rms"},
    "gpt2": {
        "positions": "learned",
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
    }
    | {"feed_forward_bias": True, "activation": "gelu"},
    "cohere": {
        "parallel": True,
        "shared_norm": True,
        "norm": "layer",
        "head_norm": "layer",
        "logit_scale": 0.5,
    },
    "gemma2": {
        "norm_offset": 1.0,
        "norm_placement": "around",
        "attention_cap": 5.0,
        "logit_cap": 3.0,
        "window": 4,
    }
    | {"window_layers": (True, False), "embedding_scale": 4.0},
    "glm4-moe": {
        "experts": 4,
        "experts_per_token": 2,
        "expert_size": 8,
        "expert_layers": (False, True),
        "router_scores": "sigmoid",
        "choice_bias": True,
        "expert_groups": 2,
        "groups_per_token": 1,
        "routing_scale": 1.5,
        "shared_size": 8,
        "shared_gated": True,
    }
    | {"tied": False, "head_bias": True, "head_norm": "rms", "late_head_norm": True}
    | {"qkv_limit": 0.5, "attention_temperature": (0.5, 3)},
    "gpt-oss": {
        "experts": 3,
        "experts_per_token": 2,
        "expert_size": 8,
        "feed_forward_bias": True,
        "router_bias": True,
        "sinks": True,
    }
    | {"output_bias": True},
    "mixtral": {
        "experts": 3,
        "experts_per_token": 2,
        "expert_size": 8,
        "expert_layers": (True, False),
    },
    "lfm2": {"mixers": ("short_convolution", "attention"), "convolution_size": 3}
    | {"convolution_bias": True},
    "qwen3-next": {"mixers": ("gated_delta", "attention"), "convolution_size": 4}
    | {"state_heads": 2, "state_key_heads": 1, "state_key_size": 4, "state_value_size": 6}
    | {"attention_gate": "width"},
}


def weights(config=CONFIG, seed=0):
    """Random ones in float64, ten times those of a fresh model, and biases that are not zero."""
    params = fa.decoder(config).init(fa.key(seed))
    noise = lambda path, x: x + 0.3 * fa.random.normal(fa.fold_in(fa.key(7), len(path)), x.shape)
    return tree.map_with_path(
        lambda path, x: (noise(path, x) if x.dim() == 1 or "bias" in path else 10 * x).double(),
        params,
    )


PARAMS = weights()


def close(a, b, tolerance=1e-11):
    assert tree.paths(a) == tree.paths(b)
    for (path, x), y in zip(tree.items(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(
            x, y, rtol=tolerance, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}"
        )


def behind(cuts):
    """The specs of leaves with one more axis in front."""
    return tree.map(lambda spec: P(None, *spec), cuts, is_leaf=is_spec)


def loss_of(model):
    return lambda params, tokens: fa.loss(model, params, tokens)


MESHES = {
    "tensor 2": (Grid(tensor=2), tensor_parallel(CONFIG, size=2)),
    "tensor 4, more than key heads": (Grid(tensor=4), tensor_parallel(CONFIG, size=4)),
    "data 2": (Grid(data=2), replicated()),
    "data 2, sharded": (Grid(data=2), fsdp(CONFIG)),
    "data 2 x tensor 2": (Grid(data=2, tensor=2), tensor_parallel(CONFIG, size=2)),
    "data 2 x tensor 2, sharded": (Grid(data=2, tensor=2), fsdp(CONFIG, size=2)),
    "data 4 x tensor 4, sharded": (Grid(data=4, tensor=4), fsdp(CONFIG, size=4)),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_computes_what_one_device_does(name):
    """Logits, loss, gradient with the parameter's placement, jvp, vjp, hvp, gradient of a gradient,
    per-sample gradients.
    """
    mesh, rules = MESHES[name]
    cuts, rows = specs(PARAMS, mesh, rules), P("data") if "data" in dict(mesh.axes) else P()
    whole = lambda params, tokens: MODEL.logits(params, MODEL.hidden(params, tokens)[0])
    loss, t = loss_of(MODEL), weights(seed=1)
    on = lambda f, ins, out: shard_map(f, mesh, ins, out)
    close(on(whole, (cuts, rows), rows)(PARAMS, TOKENS), whole(PARAMS, TOKENS))
    close(on(loss, (cuts, rows), P())(PARAMS, TOKENS), loss(PARAMS, TOKENS))
    close(on(grad(loss), (cuts, rows), cuts)(PARAMS, TOKENS), grad(loss)(PARAMS, TOKENS))
    tangent = lambda params, tokens, t: jvp(lambda params: loss(params, tokens), (params,), (t,))[1]
    close(on(tangent, (cuts, rows, cuts), P())(PARAMS, TOKENS, t), tangent(PARAMS, TOKENS, t))
    pull = lambda params, tokens: vjp(lambda params: loss(params, tokens), params)[1](
        torch.ones((), dtype=torch.float64)
    )[0]
    close(on(pull, (cuts, rows), cuts)(PARAMS, TOKENS), pull(PARAMS, TOKENS))
    hvp = lambda params, tokens, t: jvp(lambda params: grad(loss)(params, tokens), (params,), (t,))[
        1
    ]
    close(on(hvp, (cuts, rows, cuts), cuts)(PARAMS, TOKENS, t), hvp(PARAMS, TOKENS, t), 1e-10)


@pytest.mark.parametrize("name", ["tensor 2", "tensor 4, more than key heads", "data 2 x tensor 2"])
def test_gradients_of_each_sample_are_those_of_one_device(name):
    """Over "data" each device has its own samples, and sums nothing: f does not see that axis."""
    mesh, rules = MESHES[name]
    cuts, several = specs(PARAMS, mesh, rules), "data" in dict(mesh.axes)
    each = vmap(grad(loss_of(MODEL)), (None, 0))
    front = tree.map(lambda spec: P("data" if several else None, *spec), cuts, is_leaf=is_spec)
    found = shard_map(each, mesh, (cuts, P("data") if several else P()), front, axes=("tensor",))(
        PARAMS, TOKENS
    )
    close(found, each(PARAMS, TOKENS))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_layer_runs_on_a_mesh(name):
    config = fa.Config(**{**SIZES, **FAMILIES[name]})
    model, params, mesh = fa.decoder(config), weights(config), Grid(data=2, tensor=2)
    loss = loss_of(model)
    for rules in (tensor_parallel(config, size=2), fsdp(config, size=2)):
        cuts = specs(params, mesh, rules)
        found = shard_map(grad(loss), mesh, (cuts, P("data")), cuts)(params, TOKENS)
        close(found, grad(loss)(params, TOKENS))


def test_a_gradient_of_a_gradient_runs_on_a_mesh():
    mesh, cuts = Grid(tensor=2), specs(PARAMS, Grid(tensor=2), tensor_parallel(CONFIG))
    loss, square = loss_of(MODEL), lambda x: (x**2).sum()
    names = [spec.cut("tensor") is not None for spec in tree.leaves(cuts, is_leaf=is_spec)]

    def length(params, summed):
        """The squared length of the gradient: of what is cut, the sum over the parts."""
        parts = [square(g) for g in tree.leaves(grad(loss)(params, TOKENS))]
        return sum(summed(part) if cut else part for part, cut in zip(parts, names, strict=True))

    found = shard_map(
        grad(lambda params: length(params, lambda x: psum(x, "tensor"))), mesh, (cuts,), cuts
    )(PARAMS)
    close(found, grad(lambda params: length(params, lambda x: x))(PARAMS), 1e-10)


def test_an_ensemble_runs_on_a_mesh():
    params = tree.stack([PARAMS, weights(seed=3)])
    cuts = specs(PARAMS, Grid(tensor=2), tensor_parallel(CONFIG))
    each = vmap(grad(loss_of(MODEL)), (0, None))
    found = shard_map(each, Grid(tensor=2), (behind(cuts), P()), behind(cuts))(params, TOKENS)
    close(found, each(params, TOKENS))


def test_rematerialized_layers_run_on_a_mesh():
    model, mesh = fa.decoder(CONFIG, remat=True), Grid(tensor=2)
    cuts = specs(PARAMS, mesh, tensor_parallel(CONFIG))
    close(
        shard_map(grad(loss_of(model)), mesh, (cuts, P()), cuts)(PARAMS, TOKENS),
        grad(loss_of(MODEL))(PARAMS, TOKENS),
    )


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp8", "ternary"])
def test_a_quantized_model_runs_on_a_mesh(scheme):
    config = fa.Config(**{**SIZES, "width": 64, "head_size": 32, "feed_forward": 128})
    settings = {"int4": {"group": 32}, "nf4": {"group": 32}, "ternary": {"group": 32}}.get(
        scheme, {}
    )
    model, plain = fa.decoder(config), tree.cast(torch.float32)(weights(config))
    params = fa.quantize(getattr(fa, scheme)(**settings))(plain)
    for mesh in (Grid(tensor=2), Grid(tensor=4)):
        rules = tensor_parallel(config, size=mesh.shape[0])
        f = lambda params, tokens: model.hidden(params, tokens)[0]
        found = shard_map(f, mesh, (specs(params, mesh, rules), P()), P())(params, TOKENS)
        reference = f(tree.cast(torch.float64)(fa.dequantize(params, torch.float64)), TOKENS)
        # float32 through two layers of large weights
        torch.testing.assert_close(found.double(), reference, rtol=1e-3, atol=1e-3)


def test_an_adapted_model_runs_on_a_mesh():
    """Gradients of adaptations, plain and over a quantized base: of a whole a below a cut b too,
    which every device shares.
    """
    # b begins at zero, and would hide a
    moved = lambda path, x: x + 0.1 if is_trained(path, x) else x
    # kernels of int8 compute in float32, and less
    exact = fa.quantize(fa.nf4(group=2), r"layers\..*\.(q|k|v|o|gate|up|down)")
    bases = PARAMS, exact(PARAMS)
    for params in [
        tree.cast(torch.float64)(tree.map_with_path(moved, fa.lora(2)(fa.key(3), base)))
        for base in bases
    ]:
        for mesh, rules in (
            MESHES["tensor 2"],
            MESHES["tensor 4, more than key heads"],
            MESHES["data 2 x tensor 2, sharded"],
        ):
            cuts = specs(params, mesh, rules)
            (trained, frozen), rows = (
                tree.partition(params, is_trained),
                P("data") if "data" in dict(mesh.axes) else P(),
            )
            of_trained = tree.partition(cuts, is_trained, is_leaf=is_spec)
            f = lambda trained, frozen, tokens: grad(
                lambda trained: fa.loss(MODEL, tree.combine(trained, frozen), tokens)
            )(trained)
            found = shard_map(f, mesh, (*of_trained, rows), of_trained[0])(trained, frozen, TOKENS)
            close(found, f(trained, frozen, TOKENS))


# Decoding.


@pytest.mark.parametrize("n", [2, 4])
def test_a_mesh_writes_what_one_device_does(n):
    model = shard_map(MODEL, Grid(tensor=n))
    prompt = TOKENS[0]
    tokens, past = fa.generate(fa.key(2), MODEL, PARAMS, prompt, steps=8)
    found, held = fa.generate(fa.key(2), model, PARAMS, prompt, steps=8)
    assert found.tolist() == tokens.tolist()
    assert held.k.shape[1] == max(n, CONFIG.kv_heads)
    assert int(held.length) == int(past.length)
    logits, cache = model.apply(PARAMS, prompt, model.cache(20, dtype=torch.float64))
    close(logits, MODEL.apply(PARAMS, prompt, MODEL.cache(20, dtype=torch.float64))[0])
    logits = model.extend(PARAMS, prompt[:1], cache)[0]
    close(
        logits,
        MODEL.apply(PARAMS, torch.cat([prompt, prompt[:1]]), MODEL.cache(20, dtype=torch.float64))[
            0
        ][-1:],
    )
    sampler = fa.sampling.chain(fa.sampling.temperature(0.8), fa.sampling.top_k(5))
    write = lambda model: (
        lambda prompt: fa.generate(fa.key(5), model, PARAMS, prompt, steps=6, sampler=sampler)[0]
    )
    assert vmap(write(model))(TOKENS).tolist() == vmap(write(MODEL))(TOKENS).tolist()


def test_a_whole_loop_of_decoding_runs_inside():
    mesh, cuts = (
        Grid(data=2, tensor=2),
        specs(PARAMS, Grid(data=2, tensor=2), tensor_parallel(CONFIG)),
    )
    write = lambda params, prompts: vmap(
        lambda prompt: fa.generate(fa.key(2), MODEL, params, prompt, steps=6)[0]
    )(prompts)
    assert (
        shard_map(write, mesh, (cuts, P("data")), P("data"))(PARAMS, TOKENS).tolist()
        == write(PARAMS, TOKENS).tolist()
    )


def test_candidates_draw_what_all_logits_draw():
    mesh = Grid(tensor=4)
    some, prompt = sharding.candidates(MODEL, 5), TOKENS[0]
    for k, sampler in (
        (1, fa.sampling.greedy),
        (5, fa.sampling.chain(fa.sampling.top_k(5), fa.sampling.temperature(3.0))),
    ):
        model = shard_map(sharding.candidates(MODEL, k), mesh)
        write = lambda model, key, sampler=sampler: fa.generate(
            key, model, PARAMS, prompt, steps=8, sampler=sampler
        )[0].tolist()
        for seed in range(3):
            assert write(model, fa.key(seed)) == write(MODEL, fa.key(seed))
    logits = MODEL.logits(PARAMS, MODEL.hidden(PARAMS, prompt)[0])
    found = some.apply(PARAMS, prompt, some.cache(12, dtype=torch.float64))[0]
    assert torch.equal(
        found, torch.where(logits >= logits.topk(5).values[:, -1:], logits, float("-inf"))
    )
    assert torch.equal(some.extend(PARAMS, prompt, ())[0], found)


def test_candidates_of_equals_are_the_lowest():
    level = PARAMS._replace(embedding=torch.zeros_like(PARAMS.embedding))
    for k in (1, 7):
        model = shard_map(sharding.candidates(MODEL, k), Grid(tensor=4))
        found = model.logits(level, torch.ones(16, dtype=torch.float64))
        assert found.isfinite().nonzero().flatten().tolist() == list(range(k))


def test_the_loss_needs_no_whole_logits(monkeypatch):
    """Nothing as wide as the vocabulary is made, and masks, documents and blocks count as they do
    on one device.
    """
    mesh, cuts = Grid(tensor=2), specs(PARAMS, Grid(tensor=2), tensor_parallel(CONFIG))
    widest = []
    original = torch.Tensor.gather
    monkeypatch.setattr(
        torch.Tensor, "gather", lambda x, *rest: (widest.append(x.shape[-1]), original(x, *rest))[1]
    )
    mask, documents = TOKENS[:, 1:] % 3 > 0, (torch.arange(9) // 4).expand(4, 9)
    for options in (
        {},
        {"mask": mask},
        {"segments": documents},
        {"mask": mask, "segments": documents},
    ):
        f = lambda params, tokens, options=options: fa.loss(MODEL, params, tokens, **options)
        close(shard_map(f, mesh, (cuts, P()), P())(PARAMS, TOKENS), f(PARAMS, TOKENS))
    assert set(widest) == {24}
    # several blocks, each rematerialized
    monkeypatch.setattr("funcattn.vocabulary.likelihoods.SMALL", 0)
    monkeypatch.setattr("funcattn.vocabulary.passes.ELEMENTS", 24 * 5)
    monkeypatch.setattr("funcattn.vocabulary.passes.ROWS", 1)
    close(
        shard_map(grad(loss_of(MODEL)), mesh, (cuts, P()), cuts)(PARAMS, TOKENS),
        grad(loss_of(MODEL))(PARAMS, TOKENS),
    )


def test_targets_that_count_are_counted_over_all_devices():
    """One device may have none that counts."""
    mesh, mask = Grid(data=2), torch.zeros(4, 8, dtype=torch.bool)
    mask[2, 3:] = True
    f = lambda params, tokens, mask: fa.loss(MODEL, params, tokens, mask=mask)
    on = shard_map(grad(f), mesh, (P(), P("data"), P("data")), P())
    close(on(PARAMS, TOKENS, mask), grad(f)(PARAMS, TOKENS, mask))


# Training.


@pytest.mark.parametrize("name", ["tensor 2", "data 2 x tensor 2", "data 2 x tensor 2, sharded"])
def test_a_step_of_training_is_that_of_one_device(name):
    """Clipping too, which needs the norm of all parts."""
    mesh, rules = MESHES[name]
    cuts, rows = specs(PARAMS, mesh, rules), P("data") if "data" in dict(mesh.axes) else P()
    make = lambda specs: fa.training.chain(
        fa.training.clip(0.1, specs=specs), fa.training.adamw(1e-2)
    )
    step, state = fa.training.step(MODEL, make(None)), make(None).init(PARAMS)
    of_state = sharding.specs_like(state, PARAMS, cuts)
    metrics = fa.training.Metrics(P(), P())
    on = fa.training.step(MODEL, make(cuts), specs=cuts)
    on = shard_map(on, mesh, (cuts, of_state, rows), (cuts, of_state, metrics))
    ours = theirs = (PARAMS, state)
    for _ in range(3):
        *ours, told = on(*ours, TOKENS)
        *theirs, expected = step(*theirs, TOKENS)
    # Adam divides by the root of a square: small gradients lose half their digits
    close(tuple(ours), tuple(theirs), 1e-8)
    close(told, expected, 1e-8)


def test_muon_refuses_matrices_that_are_cut():
    cuts = specs(PARAMS, Grid(tensor=2), tensor_parallel(CONFIG))
    optimizer = fa.training.muon(1e-2, specs=cuts)
    state = optimizer.init(PARAMS)
    update = shard_map(
        lambda g, state, p: optimizer.update(g, state, p)[0],
        Grid(tensor=2),
        (cuts, P(), cuts),
        cuts,
    )
    with pytest.raises(ValueError, match="muon: params should be whole"):
        update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("specs", [P("tensor"), (P("tensor"), P()), P()])
def test_a_norm_is_that_of_the_whole_leaves(specs):
    """Of two trees with as many leaves, cut in different ways, too: specs are an argument."""
    tree_ = (torch.arange(4.0), torch.arange(6.0).view(2, 3) - 1)
    other = lambda x: fa.training.norm((x, x), specs=P("tensor"))
    both = lambda tree_, x: torch.stack([fa.training.norm(tree_, specs=specs), other(x)])
    found = spmd(both, "tensor", 2, (specs, P("tensor")), P())(tree_, torch.ones(8))
    close(found, torch.stack([fa.training.norm(tree_), torch.tensor(4.0)]), 1e-6)


def test_what_sums_over_leaves_is_told_on_a_mesh_how_they_are_cut():
    step = fa.training.step(MODEL, fa.training.sgd(1e-2))
    calls = {
        "norm": lambda x: fa.training.norm(x),
        "clip": lambda x: fa.training.clip(1.0).update(x, (), x)[0],
        "muon": lambda x: fa.training.muon(1e-2).update(x, fa.training.muon(1e-2).init(x), x)[0],
        "step": lambda x: step(x, fa.training.sgd(1e-2).init(x), TOKENS)[2].norm,
    }
    for call in calls.values():
        with pytest.raises(
            ValueError,
            match=r"(norm|muon): specs should be given where axes of a mesh are bound, got None",
        ):
            spmd(call, "data", 2, P(), P())(PARAMS)
    with pytest.raises(ValueError, match="norm: specs should be prefixes of the trees"):
        spmd(lambda x: fa.training.norm(x, specs={"a": P()}), "tensor", 2, P(), P())(
            (torch.ones(2),)
        )


# A text in parts.


@pytest.mark.parametrize(
    "name", ["context 2", "context 4", "context 2 x tensor 2", "data 2 x context 2, sharded"]
)
def test_a_text_in_parts_trains_as_a_whole_one(name):
    axes = {axis: int(size) for axis, size in re.findall(r"(\w+) (\d)", name)}
    mesh, tokens = Grid(**axes), TOKENS  # 9 tokens: 8 inputs
    rules = fsdp(CONFIG) if "sharded" in name else tensor_parallel(CONFIG)
    cuts, rows, loss = (
        specs(PARAMS, mesh, rules),
        P("data") if "data" in axes else P(),
        loss_of(MODEL),
    )
    close(shard_map(loss, mesh, (cuts, rows), P())(PARAMS, tokens), loss(PARAMS, tokens))
    close(
        shard_map(grad(loss), mesh, (cuts, rows), cuts)(PARAMS, tokens), grad(loss)(PARAMS, tokens)
    )
    hvp = lambda params, tokens, t: jvp(lambda params: grad(loss)(params, tokens), (params,), (t,))[
        1
    ]
    t = weights(seed=1)
    close(
        shard_map(hvp, mesh, (cuts, rows, cuts), cuts)(PARAMS, tokens, t),
        hvp(PARAMS, tokens, t),
        1e-10,
    )
    masked = lambda params, tokens, mask: fa.loss(MODEL, params, tokens, mask=mask)
    mask = tokens[:, 1:] % 3 > 0
    close(
        shard_map(masked, mesh, (cuts, rows, rows), P())(PARAMS, tokens, mask),
        masked(PARAMS, tokens, mask),
    )


@pytest.mark.parametrize("n", [2, 4])
def test_a_past_in_parts_is_read_and_written_as_a_whole_one(n):
    """Read in parts by a ring, kept where it was read, and written on: every device keeps some of
    it.
    """
    text, mesh = TOKENS[0, :8], Grid(context=n)
    read = lambda params, part: fa.caches.ShardedCache.from_local(
        MODEL.hidden(params, part)[1], rows=12
    )
    write = lambda past, params, last: fa.generate(fa.key(2), MODEL, params, last, past, steps=7)

    def both(params, part, last):
        tokens, past = write(read(params, part), params, last)
        return tokens, past.length, past.local.length.reshape(1)

    run = shard_map(both, mesh, (P(), P("context"), P()), (P(), P(), P("context")))
    tokens, length, lengths = run(PARAMS, fa.kernels.zigzag(text, n), TOKENS[0, 8:])
    past = MODEL.apply(PARAMS, text, MODEL.cache(30, dtype=torch.float64))[1]
    assert tokens.tolist() == write(past, PARAMS, TOKENS[0, 8:])[0].tolist()
    assert int(length) == int(lengths.sum()) == 15
    assert int(lengths.max()) - int(lengths.min()) <= 1

    def steps(params, tokens):
        past = MODEL.cache(16, kind=fa.caches.ShardedCache, dtype=torch.float64)
        found = []
        for piece in tokens.split(3):
            logits, past = MODEL.apply(params, piece, past)
            found.append(logits)
        return torch.cat(found)

    close(
        shard_map(steps, mesh, P(), P())(PARAMS, TOKENS[0]),
        MODEL.logits(PARAMS, MODEL.hidden(PARAMS, TOKENS[0])[0]),
    )


def test_a_past_in_parts_is_not_written_outside_of_its_mesh_nor_rewound():
    delta = MODEL.hidden(PARAMS, TOKENS[0, :4])[1]
    whole = fa.caches.ShardedCache.from_local(delta, rows=8)
    half = whole._replace(length=whole.length * 2)  # what one of two devices holds
    with pytest.raises(
        ValueError,
        match="cache should be on one device, or written where 'context' is bound, got "
        "a part of a ShardedCache",
    ):
        fa.commit(half, delta)
    # which each of two devices holds
    twice = lambda params: MODEL.hidden(params, TOKENS[0, :1], whole)[0]
    with pytest.raises(ValueError, match="got one that was written outside of its mesh"):
        shard_map(twice, Grid(context=2), P(), P())(PARAMS)
    with pytest.raises(
        TypeError, match="cache should be a past that one device holds, got a ShardedCache"
    ):
        fa.caches.with_length(whole, whole.length - 1)


# Storage.


def parts(params, mesh, rules=None):
    """What each device holds."""
    cuts, sizes = specs(params, mesh, rules), dict(mesh.axes)
    return [
        tree.map(lambda x, spec, at=at: part(x, spec, at, sizes), params, cuts)
        for at in devices(sizes)
    ]


SCHEMES = {
    "int8": (fa.int8, ".*[qkv]|.*gate|.*up|embedding"),
    "int8 in groups": (fa.int8(group=4), None),
    "int4": (fa.int4(group=4), None),
    "nf4": (fa.nf4(group=4), None),
    "fp8": (fa.fp8, ".*[qkv]|.*gate|.*up|embedding"),
    "ternary": (fa.ternary(group=4), None),
}


@settings(max_examples=12)
@given(st.sampled_from(sorted(SCHEMES)), st.sampled_from([2, 3, 6]), st.integers(0, 2**32 - 1))
def test_sharding_commutes_with_quantizing(scheme, n, seed):
    """Each device quantizes its part, or gets its part of what was quantized: the same bits, where
    groups are not cut.
    """
    config = fa.Config(
        **{**SIZES, "width": 24, "heads": 6, "kv_heads": 6, "feed_forward": 48, "layers": 1}
    )
    by, where = SCHEMES[scheme]
    # so that all scales are numbers of float16
    params = tree.map(lambda x: 50 * x, fa.decoder(config).init(fa.key(seed)))
    quantize = fa.quantize(by, where)
    before = [quantize(held) for held in parts(params, Grid(tensor=n), tensor_parallel(config))]
    after = parts(quantize(params), Grid(tensor=n), tensor_parallel(config))
    for ours, theirs in zip(before, after, strict=True):
        assert tree.paths(ours) == tree.paths(theirs)
        assert all(
            torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
            for a, b in zip(*map(_solid, (ours, theirs)), strict=True)
        )


def _solid(tree_):
    return [leaf.contiguous() for leaf in tree.leaves(tree_)]


@given(st.sampled_from(sorted(MESHES)), st.booleans())
def test_parts_make_the_whole(name, quantized):
    """Every number is on some device, and what is cut is there once: gather . shard == identity, on
    paper.
    """
    mesh, rules = MESHES[name]
    params = fa.quantize(fa.int8)(tree.cast(torch.float32)(PARAMS)) if quantized else PARAMS
    held, cuts, sizes = parts(params, mesh, rules), specs(params, mesh, rules), dict(mesh.axes)
    for i, (x, spec) in enumerate(
        zip(tree.leaves(params), tree.leaves(cuts, is_leaf=is_spec), strict=True)
    ):
        mine = [tree.leaves(device)[i] for device in held]
        copies = 1
        for axis, size in sizes.items():
            copies *= 1 if spec.cut(axis) is not None else size
        assert sum(y.numel() for y in mine) == copies * x.numel()
        identity = shard_map(lambda x: x, mesh, (spec,), spec)
        assert torch.equal(
            identity(x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x), x
        )


def test_over_a_grid_sharding_checks_and_keeps():
    assert fa.shard(Grid(tensor=2))(PARAMS) is PARAMS
    assert fa.gather(PARAMS) is not None
    with pytest.raises(
        ValueError,
        match=r"shard: layers.0.q should be divisible into 3 parts along 'tensor', got 4 blocks of 4 rows",
    ):
        fa.shard(Grid(tensor=3), tensor_parallel(CONFIG))(PARAMS)


def test_rules_are_taken_in_order_and_see_the_path_of_the_weight():
    params = fa.quantize(fa.int4(group=4))(PARAMS)
    cuts = specs(
        params,
        Grid(tensor=2),
        [("layers.1.q", P()), (r".*\.q", P("tensor", None)), Rule(".*", P())],
    )
    assert cuts.layers[1].q.codes == P(None, None)
    assert cuts.layers[0].q.codes == cuts.layers[0].q.scale == P("tensor", None)
    assert cuts.layers[0].o.codes == P(None, None)
    by_rows = specs(fa.quantize(fa.int8)(PARAMS), Grid(tensor=2)).layers[0].o
    # one scale a row serves all parts of it
    assert (by_rows.codes, by_rows.scale) == (P(None, "tensor"), P(None, None))
    lora = specs(fa.lora(2)(fa.key(0), PARAMS), Grid(tensor=2)).layers[0]
    assert (lora.q.base, lora.q.a, lora.q.b) == (
        P("tensor", None),
        P(None, None),
        P("tensor", None),
    )
    assert (lora.o.base, lora.o.a, lora.o.b) == (
        P(None, "tensor"),
        P(None, "tensor"),
        P(None, None),
    )
    assert specs(PARAMS, Grid(pipe=2)).layers[0].q == P(None, None)


def test_specs_follow_the_tree_into_a_state():
    optimizer = fa.training.adamw(1e-3)
    cuts = specs(PARAMS, Grid(tensor=2))
    found = sharding.specs_like(optimizer.init(PARAMS), PARAMS, cuts)
    assert found.count == P()
    assert found.mean == found.square == cuts


# What is refused.

ODD = fa.Config(**{**SIZES, "heads": 9, "kv_heads": 3, "width": 36})
WIDE = fa.Config(**{**SIZES, "head_norm": "rms_width"})
x4 = torch.ones(4)
BAD = {
    "shard: layers.0.q should be divisible into 2 parts along 'tensor', got 9 blocks of 4 rows": (
        ValueError,
        lambda: fa.shard(Grid(tensor=2), tensor_parallel(ODD))(fa.decoder(ODD).init(fa.key(0))),
    ),
    "decoder: config should be such that the 2 devices of 'tensor' divide its 9 heads": (
        ValueError,
        lambda: spmd(lambda: fa.decoder(ODD).cache(4).k, "tensor", 2, (), P())(),
    ),
    "decoder: config.head_norm should be other than rms_width": (
        ValueError,
        lambda: spmd(lambda t: fa.decoder(WIDE).cache(4).k, "tensor", 2, P(), P())(x4),
    ),
    "shard: rules should be one that matches 'norm', got none": (
        ValueError,
        lambda: specs(PARAMS, Grid(tensor=2), [("[^n].*", P())]),
    ),
    "shard: layers.0.o.scale should be divisible into 4 parts": (
        ValueError,
        lambda: specs(
            fa.quantize(fa.int4(group=8))(PARAMS), Grid(tensor=4), tensor_parallel(CONFIG, size=4)
        ),
    ),
    "shard: layers.0.gate should be of 2 axes": (
        ValueError,
        lambda: fa.shard(Grid(tensor=2))(
            fa.decoder(fa.Config(**{**SIZES, **FAMILIES["mixtral"]})).init(fa.key(0))
        ),
    ),
    "sharding: mesh should be a DeviceMesh with mesh_dim_names, or a Grid, got a dict": (
        TypeError,
        lambda: fa.shard({"tensor": 2}),
    ),
    "PartitionSpec: axes should be names of mesh axes": (TypeError, lambda: P(0)),
    "PartitionSpec: axes should be each name once": (ValueError, lambda: P("tensor", "tensor")),
    "decoder: layers.0.q should be a part (16, 16) for 2 devices of 'data', got (4, 16)": (
        ValueError,
        lambda: spmd(loss_of(MODEL), "data", 2, P(), P())(
            tree.update(PARAMS, "layers.0.q", lambda q: q[:4]), TOKENS
        ),
    ),
    "decoder: layers.0.q should be a part (8, 16) for 2 devices of 'tensor', got (16, 16)": (
        ValueError,
        lambda: spmd(loss_of(MODEL), "tensor", 2, P(), P())(PARAMS, TOKENS),
    ),
    "decoder: cache should be a ShardedCache over 'context', got a Cache": (
        TypeError,
        lambda: spmd(
            lambda t: MODEL.apply(PARAMS, t, MODEL.cache(8, dtype=torch.float64))[0],
            "context",
            2,
            P(),
            P(),
        )(TOKENS[0]),
    ),
    "decoder: mask should be None over 'context', got a Mask": (
        ValueError,
        lambda: spmd(
            lambda t: MODEL.hidden(PARAMS, t, mask=fa.masks.causal(4))[0],
            "context",
            2,
            P("context"),
            P(),
        )(TOKENS[0, :8]),
    ),
    "decoder: params should be followed by no gradient behind a ShardedCache": (
        NotImplementedError,
        lambda: spmd(
            grad(
                lambda p: MODEL.apply(
                    p, TOKENS[0], MODEL.cache(12, kind=fa.caches.ShardedCache, dtype=torch.float64)
                )[0].sum()
            ),
            *("context", 2, P(), P()),
        )(PARAMS),
    ),
    "zigzag: x should be a multiple of 2 n = 6 long": (
        ValueError,
        lambda: spmd(loss_of(MODEL), "context", 3, P(), P())(PARAMS, TOKENS),
    ),
    "decoder: config.window should be none over 'context', got 3": (
        ValueError,
        lambda: spmd(loss_of(fa.decoder(fa.Config(**SIZES, window=3))), "context", 2, P(), P())(
            PARAMS, TOKENS
        ),
    ),
    "loss: segments should be None over 'context'": (
        ValueError,
        lambda: spmd(lambda p, t: fa.loss(MODEL, p, t, segments=t), "context", 2, P(), P())(
            PARAMS, TOKENS
        ),
    ),
    "shard_map: in_specs should be a tuple of 2": (
        ValueError,
        lambda: spmd(torch.add, "t", 2, (P(),), P())(x4, x4),
    ),
    "shard_map: specs should be prefixes of the trees": (
        ValueError,
        lambda: spmd(lambda x: x["a"], "t", 2, ({"b": P()},), P())({"a": x4}),
    ),
    "shard_map: out_specs should be given": (
        ValueError,
        lambda: shard_map(torch.sin, Grid(t=2), P()),
    ),
    "shard_map: in_specs should be of at most 1 axes": (
        ValueError,
        lambda: spmd(torch.sin, "t", 2, P(None, "t"), P())(x4),
    ),
    "shard_map: specs should be of names of the mesh, ['t'], got 'u'": (
        ValueError,
        lambda: spmd(torch.sin, "t", 2, P("u"), P())(x4),
    ),
    "shard_map: a leaf should be divisible into 3 parts along axis 0": (
        ValueError,
        lambda: spmd(torch.sin, "t", 3, P("t"), P("t"))(x4),
    ),
    "shard_map: axes should be names of the mesh": (
        ValueError,
        lambda: shard_map(torch.sin, Grid(t=2), P(), P(), axes=("u",)),
    ),
    "shard_map: arguments should be trees of tensors, got a int": (
        TypeError,
        lambda: spmd(torch.sin, "t", 2, P(), P())(4),
    ),
    "shard_map: a result that out_specs does not cut should be the same on every device of 't'": (
        ValueError,
        lambda: spmd(lambda x: x, "t", 2, P("t"), P())(torch.arange(4)),
    ),
    "shard_map: in_specs should be left out for a Model": (
        ValueError,
        lambda: shard_map(MODEL, Grid(tensor=2), P()),
    ),
    "shard_map: model should be from fa.decoder": (
        TypeError,
        lambda: shard_map(fa.Model(*[print] * 4), Grid(tensor=2)),
    ),
    "shard_map: cache should be a Cache, or a Branch of such, over a Grid, got a Ring": (
        TypeError,
        lambda: shard_map(MODEL, Grid(tensor=2)).hidden(
            PARAMS, TOKENS[0], MODEL.cache(8, kind=fa.Ring, dtype=torch.float64)
        ),
    ),
    "candidates: k should be from 1 to the 48 tokens": (
        ValueError,
        lambda: sharding.candidates(MODEL, 0),
    ),
    "candidates: model should be from fa.decoder": (
        TypeError,
        lambda: sharding.candidates(fa.Model(*[print] * 4), 1),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_told(message):
    kind, call = BAD[message]
    with pytest.raises(kind, match=re.escape(message)):
        call()
    assert collectives.bound() == ()


def test_a_spec_reads_as_it_is_written():
    assert repr(P("tensor", None, ("data", "more"))) == "P('tensor', None, ('data', 'more'))"
    assert P("tensor", None).cut("tensor") == 0
    assert P(None).cut("tensor") is None


def test_earlier_names_are_the_same_functions():
    sharding, collectives = fa.sharding, fa.collectives
    assert sharding.parts_of is sharding.to_local
    assert sharding.whole_of is sharding.from_local
    assert sharding.alongside is sharding.specs_like
    assert collectives.enter is collectives.copy_to_region
    assert collectives.own is collectives.local_slice
    assert collectives.share is collectives.all_gather_invariant
