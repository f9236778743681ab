"""Layers of several sizes that read each other's keys, per-layer embeddings and streams: the laws
of what Gemma 3n and 4 have. That they compute what the originals do is in test_family_peers.py.
"""

import dataclasses
import functools

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import caches
from funcattn.quantization.calibration.layerwise import walk
from funcattn.sharding import Grid, P, fsdp, shard_map, specs, tensor_parallel
from funcattn.transformer import layer_spec, streams

KINDS = {
    "vocabulary": 31,
    "layers": 6,
    "width": 16,
    "heads": 4,
    "head_size": 8,
    "feed_forward": 24,
    "window": 4,
    "window_layers": (True, False) * 3,
    "shared_layers": 2,
    "value_norm": True,
    "head_norm": "rms",
    "norm_placement": "around",
    "attention_scale": 1.0,
    "layer_embedding_size": 3,
    "layer_vocabulary": 29,
}
STREAMS = fa.Config(
    **KINDS,
    streams=3,
    active_stream=1,
    stream_scale=True,
    laurel_size=4,
    sparsities=(0.5, 0.5, 0.0, 0.0, 0.0, 0.0),
    feed_forward_sizes=(24, 24, 16, 16, 24, 24),
)
SIZES = fa.Config(
    **KINDS,
    local_head_size=4,
    local_kv_heads=1,
    key_values=True,
    layer_scale=True,
    local_rope_base=100.0,
    sinks=True,
    local_sinks=True,
    rope_scaling=fa.layers.RopeScaling("proportional", share=0.5),
)
APART = fa.Config(
    **{**KINDS, "layer_embedding_size": 0, "layer_vocabulary": 0},
    experts=4,
    experts_per_token=2,
    expert_size=12,
    shared_size=24,
    experts_apart=True,
)
EACH = pytest.mark.parametrize("config", [STREAMS, SIZES, APART], ids=["streams", "sizes", "apart"])
T = 11


@functools.cache
def made(config):
    """(model, params in float64 whose norms are not one, tokens)."""
    model = fa.decoder(config)
    keys = iter(fa.split(fa.key(1), 400))
    params = fa.tree.map(
        lambda x: x.double() + 0.1 * fa.random.normal(next(keys), x.shape).double(),
        model.init(fa.key(0)),
    )
    return model, params, fa.random.randint(fa.key(2), (T,), 0, 31)


def loss(model, params, tokens):
    return model.logits(params, model.hidden(params, tokens)[0]).logsumexp(-1).sum()


@EACH
@pytest.mark.parametrize("kind", [fa.Cache, fa.Pages], ids=["dense", "pages"])
def test_steps_and_chunks_beyond_the_window_are_the_whole(config, kind):
    model, params, tokens = made(config)
    whole = model.extend(params, tokens)[0]
    for pieces in ([1] * T, [6, 3, 1, 1]):
        cache, each = model.cache(T, kind=kind, dtype=torch.float64), []
        for piece in tokens.split(pieces):
            logits, cache = model.apply(params, piece, cache)
            each.append(logits)
        torch.testing.assert_close(torch.cat(each), whole, atol=1e-12, rtol=0)


def test_a_cache_has_rows_of_each_size_and_none_of_layers_that_read_others():
    shapes = [group.k.shape for group in fa.decoder(SIZES).cache(7).groups]
    assert shapes == [(2, 1, 8, 4), (2, 2, 8, 8)]
    assert SIZES.attention_layers == (0, 2, 1, 3)
    assert fa.decoder(STREAMS).cache(7).k.shape == (4, 2, 8, 8)
    assert [STREAMS.layer_spec(i).keys_of for i in range(6)] == [None] * 4 + [2, 3]
    layer = fa.decoder(SIZES).init(fa.key(0)).layers[5]
    assert layer.k == layer.v == layer.k_norm == ()


@EACH
def test_rejected_rows_forks_and_rewinding_read_one_text(config):
    """A commit of the first rows of a draft, a fork, and `flatten` of it."""
    model, params, tokens = made(config)
    whole = model.extend(params, tokens)[0]
    past = model.apply(params, tokens[:5], model.cache(T, dtype=torch.float64))[1]
    draft = torch.cat([tokens[5:7], (tokens[7:9] + 1) % 31])
    delta = model.extend(params, draft, past)[1]
    after = fa.commit(past, delta, 2)
    torch.testing.assert_close(
        model.extend(params, tokens[7:], after)[0], whole[7:], atol=1e-12, rtol=0
    )
    fork = fa.commit(caches.fork(past, delta, 4), delta, torch.tensor(2))
    for cache in (fork, caches.flatten(fork), fa.commit(caches.fork((), delta, 4), delta)):
        assert caches.groups(cache)
    torch.testing.assert_close(
        model.extend(params, tokens[7:], caches.flatten(fork))[0], whole[7:], atol=1e-12, rtol=0
    )
    shorter = caches.with_length(after, torch.tensor(5))
    torch.testing.assert_close(
        model.extend(params, tokens[5:], shorter)[0], whole[5:], atol=1e-12, rtol=0
    )


@EACH
def test_gradients_compose_and_every_rematerialization_has_them(config):
    model, params, tokens = made(config)
    batch = torch.stack([tokens, tokens.flip(0)])
    one = grad(lambda params: loss(model, params, tokens))(params)
    each = vmap(lambda ids: grad(lambda params: loss(model, params, ids))(params))(batch)
    assert fa.tree.allclose(fa.tree.map(lambda x: x[0], each), one, atol=1e-11, rtol=1e-9)
    direction = fa.tree.map(torch.ones_like, params)
    moved = jvp(lambda params: loss(model, params, tokens), (params,), (direction,))[1]
    wanted = sum(x.sum() for x in fa.tree.leaves(one))
    torch.testing.assert_close(moved, wanted, atol=1e-9, rtol=1e-9)
    for remat in (True, 4):
        less = fa.decoder(config, remat=remat)
        again = grad(lambda params, less=less: loss(less, params, tokens))(params)
        assert fa.tree.allclose(again, one, atol=1e-11, rtol=1e-9)


@EACH
def test_every_weight_reaches_the_logits(config):
    """No leaf of the tree is left out of the computation."""
    model, params, tokens = made(config)
    flow = grad(lambda params: loss(model, params, tokens))(params)
    still = [path for path, x in fa.tree.items(flow) if not bool(x.abs().max() > 0)]
    assert not still


@EACH
def test_decoding_is_that_of_the_whole_text(config):
    """generate, forks under vmap, beams and lossless speculation with an int8 self-draft."""
    model, params, tokens = made(config)
    params = fa.cast(torch.float32)(params)
    text = fa.generate(fa.key(0), model, params, tokens[:4], steps=5)[0]
    seen = model.extend(params, torch.cat([tokens[:4], text]))[0]
    assert torch.equal(seen[3:-1].argmax(-1), text)
    past = model.apply(params, tokens[:3], model.cache(3))[1]
    many = vmap(
        lambda key: fa.generate(
            key, model, params, tokens[3:4], past, steps=3, sampler=fa.sampling.temperature(1.0)
        )[0],
        randomness="error",
    )(fa.split(fa.key(3), 2))
    alone = fa.generate(
        fa.split(fa.key(3), 2)[1],
        model,
        params,
        tokens[3:4],
        past,
        steps=3,
        sampler=fa.sampling.temperature(1.0),
    )[0]
    assert torch.equal(many[1], alone)
    drafter = fa.drafters.model(model, fa.quantize(fa.int8)(params), length=2)
    guessed, _ = fa.speculate(fa.key(0), model, params, drafter, tokens[:4], steps=5)
    assert torch.equal(guessed.tokens, text)
    best = fa.search.beam_search(model, params, tokens[:4], steps=5, beams=1, length_penalty=0.0)
    assert torch.equal(best.tokens[0], text)


def test_two_devices_compute_what_one_does():
    """Heads, features and the vocabulary over "tensor", matrices over "data" too."""
    dense = dataclasses.replace(STREAMS, sparsities=(), vocabulary=32)
    for config in (dense, dataclasses.replace(APART, vocabulary=32)):
        model, params, tokens = made(config)
        mesh = Grid(data=2, tensor=2)
        cuts = specs(params, mesh, fsdp(config, size=2))
        f = lambda params, model=model: grad(lambda params: loss(model, params, tokens))(params)
        found = shard_map(f, mesh, (cuts,), cuts)(params)
        wanted = fa.tree.map(lambda x: 2 * x, f(params))  # both rows of "data" read the text
        assert fa.tree.allclose(found, wanted, atol=1e-9, rtol=1e-9)


def test_features_that_are_sparse_are_not_divided():
    model, params, tokens = made(dataclasses.replace(STREAMS, vocabulary=32))
    mesh = Grid(tensor=2)
    cuts = specs(params, mesh, tensor_parallel(model.config, size=2))
    with pytest.raises(ValueError, match="sparsities should be none over 'tensor'"):
        shard_map(lambda params: model.extend(params, tokens)[0], mesh, (cuts,), P())(params)


def test_keys_of_several_sizes_are_one_cache_a_device():
    model, params, tokens = made(dataclasses.replace(SIZES, vocabulary=32))
    with pytest.raises(ValueError, match="keys of one size over a Grid"):
        fa.shard_map(model, Grid(tensor=2))
    mesh = Grid(data=2)
    cuts = specs(params, mesh, fsdp(model.config, size=1))
    f = lambda params: model.extend(params, tokens)[0]
    torch.testing.assert_close(shard_map(f, mesh, (cuts,), P())(params), f(params))


@EACH
def test_a_compiled_model_runs_them_as_they_are(config):
    model, params, tokens = made(config)
    fast = fa.compile(model, backend="eager")
    assert "as the model itself runs them" in fast.explain(params)
    past = model.apply(params, tokens[:6], model.cache(T, dtype=torch.float64))[1]
    wanted, got = (one.extend(params, tokens[6:7], past)[0] for one in (model, fast))
    assert torch.equal(got, wanted)


@EACH
def test_calibration_hears_what_the_layers_read(config):
    """Layer by layer, in layers that read another's keys, what the whole model reads there."""
    model, params, tokens = made(config)
    heard = {}

    def hear(number, layer, feeds):
        gather = lambda name, rows: heard.setdefault(f"layers.{number}.{name}", rows)
        feeds({"attention.mixed", "feed_forward.input"}, gather)
        return layer

    walk(model, params, tokens, hear, lambda *_: None)
    seen = fa.evaluation.trace(model, params, tokens, list(heard))[1]
    assert len(heard) == 12
    for name, rows in heard.items():
        torch.testing.assert_close(rows, seen[name], atol=1e-12, rtol=0)


@EACH
def test_what_is_read_of_a_layer_is_what_it_mixes(config):
    """Attention patterns of layers that read another's keys, and the lens of the last layer."""
    model, params, tokens = made(config)
    _, seen = fa.evaluation.trace(model, params, tokens, r"layers\.5\.attention\.(v|mixed)")
    pattern = fa.evaluation.attention_pattern(model, params, tokens, 5)
    v = seen["layers.5.attention.v"].repeat_interleave(
        4 // seen["layers.5.attention.v"].shape[0], 0
    )
    mixed = (pattern @ v).transpose(0, 1).flatten(-2)
    torch.testing.assert_close(mixed, seen["layers.5.attention.mixed"], atol=1e-12, rtol=0)
    lens = fa.evaluation.logit_lens(model, params, tokens)
    likeliest = model.extend(params, tokens)[0].argmax(-1)
    assert torch.equal(lens.ids[-1, :, 0], likeliest)
    assert len(lens.ids) == config.layers


def test_an_embedding_of_fewer_features_is_one_of_low_rank():
    """Its model is that of the products of its matrices; loss, codes and steps read it too."""
    few = fa.Config(vocabulary=31, width=16, embedding_size=4, head_size=8)
    model, params, tokens = made(few)
    wide = params._replace(
        embedding=params.embedding @ params.embedding_in.mT,
        head=params.embedding @ params.embedding_out,
        embedding_in=(),
        embedding_out=(),
    )
    other = fa.decoder(dataclasses.replace(few, embedding_size=0, tied=False))
    wanted = other.extend(wide, tokens)[0]
    close = functools.partial(torch.testing.assert_close, atol=1e-12, rtol=1e-9)
    close(model.extend(params, tokens)[0], wanted)
    close(fa.loss(model, params, tokens), fa.loss(other, wide, tokens))
    slope = grad(lambda params: fa.loss(model, params, tokens))(params)
    assert bool(slope.embedding_out.any())
    codes = fa.quantize(fa.int8)(fa.cast(torch.float32)(params))
    plain = model.extend(fa.dequantize(codes), tokens)[0]
    torch.testing.assert_close(model.extend(codes, tokens)[0], plain, atol=1e-4, rtol=1e-4)
    step = model.extend(params, tokens[4:], model.apply(params, tokens[:4])[1])[0]
    close(step, wanted[4:])
    cuts = specs(params, Grid(data=2), fsdp(few, size=1))
    sharded = shard_map(lambda params: model.extend(params, tokens)[0], Grid(data=2), (cuts,), P())
    with pytest.raises(ValueError, match="embedding_size should be 0 on a mesh"):
        sharded(params)
    with pytest.raises(ValueError, match="train_head: model should be one whose embedding has"):
        fa.drafters.train_head(fa.key(0), model, params, tokens, steps=1)


def test_the_sizes_of_a_layer_are_those_of_its_kind():
    near, far = (layer_spec.of_layer(SIZES, SIZES.layer_spec(i)) for i in (0, 1))
    assert (near.head_size, near.kv_heads, far.head_size, far.kv_heads) == (4, 1, 8, 2)
    alike = {"local_head_size": None, "local_kv_heads": None, "local_sinks": False}
    assert far == dataclasses.replace(SIZES, sinks=False, **alike)
    assert near == layer_spec.of_layer(SIZES, SIZES.layer_spec(2))


def test_what_reads_one_residual_refuses_several():
    model, params, tokens = made(STREAMS)
    texts = fa.random.randint(fa.key(4), (1, 20), 0, 31)
    with pytest.raises(ValueError, match="jacobian_lens: model should be one of a single residual"):
        fa.evaluation.jacobian_lens(model, params, texts)
    with pytest.raises(ValueError, match="train_head: model should be one of a single residual"):
        fa.drafters.train_head(fa.key(0), model, params, tokens, steps=1)


def test_streams_begin_with_the_magnitude_of_the_first():
    model, params, tokens = made(STREAMS)
    x = torch.randn(5, 16, dtype=torch.float64)
    begun = streams.begin(STREAMS, params, x)
    assert torch.equal(begun[0], x)
    sizes = begun.square().mean(-1)
    torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("local_head_size", 3, "local_head_size should be even"),
        ("local_kv_heads", 3, "local_kv_heads should be a divisor of heads"),
        ("local_head_size", True, "local_head_size should be None or at least 1"),
        ("shared_layers", 6, "shared_layers should be fewer than the layers"),
        ("shared_layers", 5, "shared_layers should be fewer than the layers"),
        ("shared_layers", -1, "shared_layers should be 0 or more"),
        ("sparsities", (1.0,) * 6, "sparsities should be shares from 0"),
        ("feed_forward_sizes", (8, 8), "feed_forward_sizes should be"),
        ("streams", 1, "streams should be 0, or at least 2"),
        ("active_stream", 2, "streams should be 0, or at least 2"),
        ("layer_vocabulary", 0, "layer_vocabulary should be above 0"),
        ("experts_apart", True, "experts_apart should be False without"),
        ("norm", "layer", "should be 0 or False with parallel blocks"),
        ("window", None, "unset without a window"),
    ],
)
def test_sizes_that_fit_no_layer_are_errors(field, given, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **{field: given})
