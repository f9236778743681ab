"""Multi-head latent attention: two ways to one result, and a past of R + t numbers a token."""

import dataclasses
import functools
from typing import NamedTuple

import optree
import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn import caches, layers
from funcattn.layers import RopeScaling
from funcattn.quantization.calibration.layerwise import feeds_of
from funcattn.records import record
from funcattn.sharding import Grid, shard_map, specs, tensor_parallel
from funcattn.transformer import latent

CONFIG = fa.Config(
    vocabulary=40,
    width=16,
    layers=2,
    heads=4,
    kv_heads=4,
    head_size=12,
    rotary_size=4,
    value_size=6,
    latent_size=10,
    query_latent_size=8,
    feed_forward=24,
)
DIRECT = dataclasses.replace(CONFIG, query_latent_size=0, layers=1)
MODEL = fa.decoder(CONFIG)
# ten times a fresh model's, so that attention is far from uniform
PARAMS = optree.tree_map(lambda x: (x if x.dim() == 1 else 10 * x).double(), MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(1), (24,), 0, 40)
KINDS = {
    "dense": fa.Cache,
    "pages": caches.pages(block=4),
    "ring": caches.ring(window=30),
    "quantized": caches.quantized(recent=32, block=4),
}
# float64 sums of tens of products, in two orders
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def whole(params, tokens=TOKENS, model=MODEL):
    return model.extend(params, tokens)[0]


def empty(size=30, kind=fa.Cache, model=MODEL, dtype=torch.float64):
    return model.cache(size, kind=kind, dtype=dtype)


def past_of(n, kind=fa.Cache, size=30):
    return MODEL.apply(PARAMS, TOKENS[:n], empty(size, kind))[1]


def forced(monkeypatch, absorbed):
    monkeypatch.setattr(latent, "is_absorbed", lambda *_: absorbed)


# The definition.


def rms(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def turn(x, positions):
    """Rotate features i and i + t / 2 of x (T, ..., t) by position * base^(-2 i / t)."""
    half = x.shape[-1] // 2
    angle = positions.unsqueeze(-1) * 10000.0 ** (-torch.arange(half) / half).double()
    angle = angle.float().double().reshape(len(positions), *[1] * (x.dim() - 2), half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def defined(params, config=CONFIG, tokens=TOKENS):
    """The logits of a text, by the formulas of the paper, head by head in one einsum."""
    H, t, R = config.heads, config.rotary_size, config.latent_size
    places = torch.arange(len(tokens)).double()
    x = params.embedding[tokens]
    hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for w in params.layers:
        y = rms(x, w.attention_norm, config.norm_epsilon)
        made = y if not config.query_latent_size else rms(y @ w.q_down.mT, w.q_down_norm, 1e-6)
        q = (made @ w.q.mT).unflatten(-1, (H, -1))
        down = y @ w.kv_down.mT
        c, r = rms(down[:, :R], w.kv_down_norm, 1e-6), turn(down[:, R:], places)
        k = torch.einsum("hnr,sr->shn", w.k.unflatten(0, (H, -1)), c)
        v = torch.einsum("hdr,sr->shd", w.v.unflatten(0, (H, -1)), c)
        S = torch.einsum("thn,shn->hts", q[..., :-t], k)
        S = S + torch.einsum("tha,sa->hts", turn(q[..., -t:], places), r)
        P = (S * config.head_size**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", P, v).flatten(1) @ w.o.mT
        y = rms(x, w.feed_forward_norm, config.norm_epsilon)
        x = x + (torch.nn.functional.silu(y @ w.gate.mT) * (y @ w.up.mT)) @ w.down.mT
    return rms(x, params.norm, config.norm_epsilon) @ params.embedding.mT


def nll(logits):
    return torch.nn.functional.cross_entropy(logits[:-1], TOKENS[1:])


def test_logits_and_derivatives_are_those_of_the_definition():
    """Angles are computed in float32, so their cosines agree to 1e-7 and the rest to that."""
    near = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    for config in (CONFIG, DIRECT):
        model = fa.decoder(config)
        params = (
            PARAMS
            if config is CONFIG
            else optree.tree_map(
                lambda x: (x if x.dim() == 1 else 10 * x).double(), model.init(fa.key(0))
            )
        )
        near(whole(params, model=model), defined(params, config))
    mine, theirs = (lambda p: nll(whole(p))), (lambda p: nll(defined(p)))
    ways = optree.tree_map(lambda x: torch.sin(torch.arange(x.numel()).double()).view_as(x), PARAMS)
    along = lambda f: jvp(f, (PARAMS,), (ways,))[1]
    near(along(mine), along(theirs))
    for of in (lambda f: grad(f)(PARAMS), lambda f: along(grad(f))):
        for one, other in zip(fa.tree.leaves(of(mine)), fa.tree.leaves(of(theirs)), strict=True):
            near(one, other)


# Two ways.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_absorbed_is_plain(monkeypatch, dtype):
    """With logits of order one: 1e-12 in float64, and 1e-5 in float32."""
    params = fa.cast(dtype)(PARAMS)
    found = []
    for absorbed in (True, False):
        forced(monkeypatch, absorbed)
        past, logits = empty(dtype=dtype), []
        for piece in TOKENS.split([9, 1, 6, 8]):
            more, past = MODEL.apply(params, piece, past)
            logits.append(more)
        found.append(torch.cat(logits))
    atol = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(*found, rtol=0, atol=atol)


def test_derivatives_of_absorbed_are_those_of_plain(monkeypatch):
    past = past_of(16)
    ways = optree.tree_map(torch.ones_like, PARAMS)

    def loss(params, k):
        behind = past._replace(k=k)
        return MODEL.extend(params, TOKENS[16:20], behind)[0].square().mean()

    found = []
    for absorbed in (True, False):
        forced(monkeypatch, absorbed)
        first = grad(loss, (0, 1))(PARAMS, past.k)
        second = jvp(lambda p: grad(loss)(p, past.k), (PARAMS,), (ways,))[1]
        found.append((first, second))
    for one, other in zip(*map(fa.tree.leaves, found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("T", "S"), [(1, 8), (4, 8), (6, 8), (12, 8), (3, 0)])
def test_the_way_taken_multiplies_the_least(monkeypatch, T, S):
    """What torch counts when both run; the rule is by the products of one head."""
    flops = {}
    for absorbed in (True, False):
        with monkeypatch.context() as patch:
            forced(patch, absorbed)
            past = past_of(S) if S else ()
            with FlopCounterMode(display=False) as counter:
                MODEL.extend(PARAMS, TOKENS[:T], past)
            flops[absorbed] = counter.get_total_flops()
    assert flops[latent.is_absorbed(CONFIG, T, S)] == min(flops.values())


# The past.


@pytest.mark.parametrize("kind", [fa.Cache, fa.Pages, caches.pages(block=4)])
@pytest.mark.parametrize("heads", [4, 64])
def test_a_token_takes_the_latent_and_the_rotated_key_of_a_layer(kind, heads):
    """The paper's (d_c + d_h^R) l elements, whatever the number of heads."""
    config = dataclasses.replace(CONFIG, heads=heads, kv_heads=heads)
    with torch.device("meta"):
        sizes = [
            sum(x.numel() for x in fa.tree.leaves(fa.decoder(config).cache(n, kind=kind)))
            for n in (0, 640)
        ]
    blocks = {fa.Cache: 640, fa.Pages: 640 - 64}.get(kind, 640 - 4)  # one block is there at once
    assert sizes[1] - sizes[0] == blocks * (10 + 4) * config.layers


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_steps_equal_the_whole_behind_every_kind(kind):
    past, logits = empty(kind=kind), []
    for piece in TOKENS.split([10, 3, 1, 1, 4, 5]):
        more, past = MODEL.apply(PARAMS, piece, past)
        logits.append(more)
    close(torch.cat(logits), whole(PARAMS))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_ragged_rows_behind_every_kind_are_those_alone(kind):
    lengths = torch.tensor([5, 9, 0])
    _, delta = MODEL.extend(PARAMS, TOKENS[:9], empty(kind=kind))
    rows = vmap(fa.commit, (None, None, 0))(empty(kind=kind), delta, lengths)
    new = TOKENS[:3]
    logits, rows = vmap(MODEL.apply, (None, None, 0))(PARAMS, new, rows)
    for row, n in enumerate(lengths.tolist()):
        close(logits[row], whole(PARAMS, torch.cat([TOKENS[:n], new]))[n:])


def test_a_fork_and_a_rewound_past_continue_as_the_text():
    past = past_of(12)
    _, delta = MODEL.extend(PARAMS, TOKENS[:1], past)
    for behind in (caches.fork(past, delta, 8), caches.with_length(past_of(20), torch.tensor(12))):
        logits, _ = MODEL.apply(PARAMS, TOKENS[12:18], behind)
        close(logits, whole(PARAMS)[12:18])
    branch = MODEL.apply(PARAMS, TOKENS[12:15], caches.fork(past, delta, 8))[1]
    close(MODEL.apply(PARAMS, TOKENS[15:18], caches.flatten(branch))[0], whole(PARAMS)[15:18])


def test_quantized_rows_are_near_those_that_were_encoded():
    """Of 8 bits: a half of 1 / 255 of the range of a feature."""
    past, logits = empty(kind=caches.quantized(recent=0, block=4)), []
    for token in TOKENS.split(1):
        more, past = MODEL.apply(PARAMS, token, past)
        logits.append(more)
    off = (torch.cat(logits) - whole(PARAMS)).abs().max()
    assert 0 < off < 0.02 * whole(PARAMS).std()


def test_angles_that_follow_the_length_are_those_of_the_whole():
    """The text in the rows of latents (`transformer.lengths`)."""
    scaling = RopeScaling("longrope", context=12, short=(1.0, 1.5), long=(2.0, 5.0))
    model = fa.decoder(dataclasses.replace(CONFIG, rope_scaling=scaling))
    past = empty(model=model)
    for end in (9, 11, 13, 14):
        at = int(past.length)
        more, past = model.apply(PARAMS, TOKENS[at:end], past)
        close(more, whole(PARAMS, TOKENS[:end], model)[at:])


class Bare:
    """A kind whose values are of the size of its keys."""

    @staticmethod
    def empty(layers, heads, size, head_size, dtype=None):
        return fa.Cache.empty(layers, heads, size, head_size, dtype)


def test_a_kind_without_values_of_another_size_is_refused_by_name():
    with pytest.raises(TypeError, match=r"cache: kind should be .* value_size.*, got Bare\. Give"):
        MODEL.cache(4, kind=Bare)
    assert int(fa.decoder(fa.Config()).cache(4, kind=Bare).length) == 0


# Decoding and transforms of the tree.


def test_beams_and_speculation_are_those_of_greedy_decoding():
    prompt, params = TOKENS[:6], fa.cast(torch.float32)(PARAMS)
    greedy = fa.generate(fa.key(0), MODEL, params, prompt, steps=10)[0]
    beams = fa.beam_search(MODEL, params, prompt, steps=10, beams=1)
    assert torch.equal(beams.tokens[0, -10:], greedy)
    drafters = (
        fa.drafters.model(MODEL, fa.quantize(fa.int8)(params)),
        fa.drafters.skip(MODEL, params, [1]),
    )
    for drafter in (fa.drafters.prompt_lookup(), *drafters):
        drafted, past = fa.speculate(fa.key(0), MODEL, params, drafter, prompt, steps=10)
        assert torch.equal(drafted.tokens, greedy)
        assert past.k.shape[-1] == 14


@pytest.mark.parametrize("scheme", [fa.int8, fa.int4(group=2), fa.nf4(group=2)], ids=repr)
def test_quantized_matrices_are_those_of_the_dequantized_tree(monkeypatch, scheme):
    """Absorbed too: the matrix of the record, with its derivative in the activations."""
    small = fa.quantize(scheme, r".*\.(q|k|v|o|q_down|kv_down)")(fa.cast(torch.float32)(PARAMS))
    large = fa.dequantize(small)
    found = []
    for params in (small, large):
        for absorbed in (True, False):
            forced(monkeypatch, absorbed)
            past = MODEL.apply(large, TOKENS[:9], empty(dtype=torch.float32))[1]
            found.append(MODEL.extend(params, TOKENS[9:12], past)[0])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=2e-5)
    assert isinstance(small.layers[0].kv_down, tuple)


@record
class Spy(NamedTuple):
    """A matrix that notes what it is multiplied by, under its own identity."""

    matrix: torch.Tensor


SEEN = {}


@layers.linear.register
def _(weight: Spy, x: torch.Tensor) -> torch.Tensor:
    SEEN[id(weight)] = x
    return layers.linear(weight.matrix, x)


@pytest.mark.parametrize("config", [CONFIG, DIRECT], ids=["two latents", "one"])
def test_calibration_takes_the_inputs_that_a_matrix_has(config):
    """The tap that it listens at has the value that the matrix is multiplied by."""
    model = fa.decoder(config)
    params, heard = model.init(fa.key(0)), {}
    first, feeds = params.layers[0], feeds_of(params.layers[0])
    spies = {
        name: Spy(getattr(first, name))
        for names in feeds.values()
        for name in names
        if isinstance(getattr(first, name), torch.Tensor)
    }
    taken = {*spies} == {"q", "k", "v", "o", "kv_down", "gate", "up", "down"}
    assert taken or {*spies} == {"q_down", "q", "k", "v", "o", "kv_down", "gate", "up", "down"}
    params = params._replace(layers=(first._replace(**spies), *params.layers[1:]))
    with fa.taps.listening(lambda name, x: heard.setdefault(name, x)):
        model.hidden(params, TOKENS)
    for tap, names in feeds.items():
        for name in names:
            assert torch.equal(SEEN[id(spies[name])], heard[f"layers.0.{tap}"]), name
    text = fa.random.randint(fa.key(5), (60,), 0, 40)
    small = fa.gptq(model, text, fa.int4(group=2))(model.init(fa.key(0)))
    assert all(isinstance(getattr(small.layers[0], name), tuple) for name in spies)


def test_tensor_parallel_and_rematerialized_layers_are_the_layers():
    """Two devices have two heads each and the same rows; gradients of what makes the latents are
    summed, so that they are equal. remat of some positions computes attention of all heads at once.
    """
    loss = lambda model: lambda params: nll(model.extend(params, TOKENS)[0])
    wanted, mesh = grad(loss(MODEL))(PARAMS), Grid(tensor=2)
    two, cuts = shard_map(MODEL, mesh), specs(PARAMS, mesh, tensor_parallel(CONFIG))
    ways = [grad(loss(fa.decoder(CONFIG, remat=rows))) for rows in (True, 8)]
    for way in (shard_map(grad(loss(MODEL)), mesh, (cuts,), cuts), *ways):
        for one, other in zip(*map(fa.tree.leaves, (way(PARAMS), wanted)), strict=True):
            close(one, other)
    past, logits = two.cache(30, dtype=torch.float64), []
    for piece in TOKENS.split([20, 1, 3]):
        more, past = two.apply(PARAMS, piece, past)
        logits.append(more)
    close(torch.cat(logits), whole(PARAMS))


def test_adapted_and_smoothed_models_are_those_merged():
    params = fa.lora(2)(fa.key(0), fa.cast(torch.float32)(PARAMS))
    tree = fa.tree.map_with_path(lambda at, x: x + 0.1 if at.endswith(".b") else x, params)
    merged = fa.merge_lora(tree)
    past = MODEL.apply(merged, TOKENS[:12], empty(dtype=torch.float32))[1]
    step = lambda params: MODEL.extend(params, TOKENS[12:13], past)[0]
    smoothed = fa.smooth(MODEL, TOKENS, fa.int4(group=2))(merged)
    for other in (tree, smoothed):
        torch.testing.assert_close(step(other), step(merged), rtol=0, atol=1e-5)


FORMS = [("eager", None, (1,)), ("eager", fa.int8, (1, 3)), ("inductor", fa.int8, (1, 3))]


@pytest.mark.slow  # to trace a form takes seconds
@pytest.mark.parametrize(("backend", "scheme", "sizes"), FORMS)
def test_compiled_steps_are_those_of_the_model(backend, scheme, sizes):
    """Behind rows beyond the length that are NaN; by the keys, which are the values too."""
    params = fa.cast(torch.float32)(PARAMS)
    params = params if scheme is None else fa.quantize(scheme)(params)
    past = MODEL.apply(params, TOKENS[:12], empty(200, dtype=torch.float32))[1]
    beyond = (torch.arange(past.k.shape[-2]) >= 12).unsqueeze(-1)
    spoilt = past._replace(k=past.k.masked_fill(beyond, torch.nan))
    fast = fa.compile(MODEL, backend=backend)
    for n in sizes:
        got, wanted = (
            model.apply(params, TOKENS[12 : 12 + n], behind)[0]
            for model, behind in ((fast, spoilt), (MODEL, past))
        )
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    told = fast.explain(params)
    assert "calls of compiled code" in told
    assert "not the operator" in told
    assert fast.code


def test_settings_that_no_family_has_together_are_refused():
    for wrong, message in (
        ({"kv_heads": 2}, "kv_heads should be heads = 4 with a latent_size"),
        ({"rotary_size": None}, "rotary_size should be between 0 and head_size = 12"),
        ({"rotary_size": 12}, "rotary_size should be between 0 and head_size = 12"),
        ({"head_norm": "rms"}, "head_norm should be 'none' with a latent_size"),
        ({"attention_gate": "head"}, "attention_gate should be 'none' with a latent_size"),
        ({"positions": "alibi"}, "positions should be other than 'alibi' with a latent_size"),
        ({"qkv_limit": 1.0}, "qkv_limit should be None with a latent_size"),
        ({"latent_size": 0}, "query_latent_size should be 0 without a latent_size"),
        ({"latent_size": -1}, "latent_size should be a number of features, 0 or more"),
        ({"value_size": 0}, "value_size should be a number of features, 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **wrong)


def test_values_of_another_size_without_latents():
    """Steps are the whole, and a device takes whole heads of them."""
    config = fa.Config(
        vocabulary=40,
        width=16,
        layers=2,
        heads=4,
        head_size=8,
        value_size=6,
        attention_gate="width",
    )
    model = fa.decoder(config)
    params = fa.cast(torch.float64)(model.init(fa.key(0)))
    past, logits = empty(model=model), []
    assert (past.k.shape[-1], past.v.shape[-1], params.layers[0].o.shape) == (8, 6, (16, 24))
    for piece in TOKENS.split([10, 1, 13]):
        more, past = model.apply(params, piece, past)
        logits.append(more)
    close(torch.cat(logits), whole(params, model=model))
