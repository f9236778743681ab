"""The decoder: against transformers' Llama, steps against the whole, and every derivative through a
past, full or empty.
"""

import dataclasses
import functools

import optree
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import funcattn as fa
from funcattn import caches, masks, transformer
from funcattn.caches import Branch, Cache
from funcattn.layers import RopeScaling
from funcattn.transformer import head_groups

CONFIG = fa.Config(
    vocabulary=40, width=16, layers=2, heads=4, kv_heads=2, head_size=4, feed_forward=24
)
MODEL = fa.decoder(CONFIG)
# weights ten times those of a fresh model, so that the layers matter; float64, where sums in
# another order agree to 1e-12
PARAMS = optree.tree_map(lambda x: (x if x.dim() == 1 else 10 * x).double(), MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(1), (40,), 0, 40)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def whole(params, tokens):
    return MODEL.logits(params, MODEL.hidden(params, tokens)[0])


def empty(size=30):
    return MODEL.cache(size, dtype=torch.float64)


def past_of(n, size=30, params=PARAMS):
    return MODEL.apply(params, TOKENS[:n], empty(size))[1] if n else empty(size)


def stack(values):
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *values)


def test_a_decoder_is_transformers_llama_on_the_same_weights():
    scaling = RopeScaling("llama3", factor=8.0, low=1.0, high=4.0, context=64)
    config = fa.Config(
        vocabulary=40,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=6,
        feed_forward=24,
        rope_scaling=scaling,
        tied=False,
    )
    params = fa.decoder(config).init(fa.key(0))
    params = params._replace(
        norm=params.norm * 1.5,
        layers=tuple(layer._replace(q=20 * layer.q) for layer in params.layers),
    )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            rms_norm_eps=config.norm_epsilon,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            attn_implementation="eager",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": config.rope_base,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    )
    state = {
        "model.embed_tokens.weight": params.embedding,
        "model.norm.weight": params.norm,
        "lm_head.weight": params.head,
    }
    for i, layer in enumerate(params.layers):
        at = f"model.layers.{i}."
        state |= {at + f"self_attn.{name}_proj.weight": getattr(layer, name) for name in "qkvo"}
        state |= {
            at + f"mlp.{name}_proj.weight": getattr(layer, name) for name in ("gate", "up", "down")
        }
        state |= {
            at + "input_layernorm.weight": layer.attention_norm,
            at + "post_attention_layernorm.weight": layer.feed_forward_norm,
        }
    theirs.load_state_dict(state)
    with torch.no_grad():
        wanted = theirs(TOKENS.reshape(2, 20)).logits
    model = fa.decoder(config)
    got = model.logits(params, model.hidden(params, TOKENS.reshape(2, 20))[0])
    # float32, two layers: a few dozen roundings on logits of order one
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# Steps.


@settings(max_examples=20)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_steps_equal_the_whole(cuts):
    """One token, a few and more than a few at a time: each is another way through attention."""
    cache, at, logits = empty(40), 0, []
    for n in [*cuts, 40]:
        piece = TOKENS[at : at + n]
        if len(piece):
            step, cache = MODEL.apply(PARAMS, piece, cache)
            logits.append(step)
        at += n
    close(torch.cat(logits), whole(PARAMS, TOKENS))
    assert int(cache.length) == 40


def test_an_empty_past_is_no_past():
    for size in (0, 5):
        for T in (1, 5, 20):
            logits, delta = MODEL.extend(PARAMS, TOKENS[:T], empty(size))
            close(logits, whole(PARAMS, TOKENS[:T]))
            close(torch.stack(delta.k), torch.stack(MODEL.hidden(PARAMS, TOKENS[:T])[1].k))


def test_a_branch_is_the_past_it_continues():
    branch = Branch(past_of(5), MODEL.cache(4, dtype=torch.float64))
    _, branch = MODEL.apply(PARAMS, TOKENS[5:8], branch)
    for past in (branch, Branch(branch, empty(2)), caches.flatten(branch), caches.grow(branch, 9)):
        close(MODEL.extend(PARAMS, TOKENS[8:12], past)[0], whole(PARAMS, TOKENS[:12])[8:])


def test_leading_axes_are_free_without_a_past():
    tokens = TOKENS[:24].reshape(2, 3, 4)
    each = torch.stack([torch.stack([whole(PARAMS, row) for row in rows]) for rows in tokens])
    close(whole(PARAMS, tokens), each)
    close(vmap(vmap(lambda row: whole(PARAMS, row)))(tokens), each)


def test_extend_and_apply_leave_the_past_unchanged():
    past = past_of(5)
    before = optree.tree_map(torch.clone, past)
    MODEL.extend(PARAMS, TOKENS[:3], past)
    MODEL.apply(PARAMS, TOKENS[:3], past)
    assert all(torch.equal(a, b) for a, b in zip(past, before, strict=True))


def test_a_tree_of_drafts_in_one_step_is_each_of_its_paths():
    """Tokens 0, then 1 and 2 after it, then 3 after 2: the mask shows each its ancestors, positions
    are depths.
    """
    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    depth, past, drafts = torch.tensor([0, 1, 1, 2]), past_of(5), TOKENS[20:24]
    logits, delta = MODEL.extend(PARAMS, drafts, past, mask=sees, positions=depth + past.length)
    for path in ([0, 1], [0, 2, 3]):
        index = torch.tensor(path)
        text = torch.cat([TOKENS[:5], drafts[index]])
        close(logits[index], whole(PARAMS, text)[5:])
        after = fa.commit(past, delta, index=index)
        more = MODEL.extend(PARAMS, TOKENS[30:31], after)[0]
        close(more, whole(PARAMS, torch.cat([text, TOKENS[30:31]]))[-1:])


def test_a_mask_of_intervals_does_as_its_booleans():
    window = masks.causal(20) & masks.window(20, 3)
    for past in ((), past_of(5)):
        by_mask = MODEL.hidden(PARAMS, TOKENS[:20], past, mask=window)[0]
        close(by_mask, MODEL.hidden(PARAMS, TOKENS[:20], past, mask=window.dense(20))[0])
        assert not torch.allclose(by_mask, MODEL.hidden(PARAMS, TOKENS[:20], past)[0])


@pytest.mark.parametrize("T", [1, 3, 20])
def test_a_ragged_batch_is_one_by_one(T):
    pasts = [past_of(n) for n in (0, 3, 10)]
    logits, after = vmap(lambda past: MODEL.apply(PARAMS, TOKENS[20 : 20 + T], past))(stack(pasts))
    for b, past in enumerate(pasts):
        wanted, one = MODEL.apply(PARAMS, TOKENS[20 : 20 + T], past)
        close(logits[b], wanted)
        n = int(one.length)
        assert after.length[b] == n
        close(after.k[b, ..., :n, :], one.k[..., :n, :])
        close(after.v[b, ..., :n, :], one.v[..., :n, :])


def test_many_tokens_after_one_shared_past_are_one_by_one():
    past = past_of(10)
    step = lambda tokens: MODEL.extend(PARAMS, tokens, past)[0]
    for T in (1, 20):
        tokens = TOKENS[: 2 * T].reshape(2, T)
        close(vmap(step)(tokens), torch.stack([step(row) for row in tokens]))


# Ensembles and losses.


def test_vmap_of_init_is_an_ensemble():
    keys = fa.split(fa.key(3), 3)
    ensemble = vmap(MODEL.init)(keys)
    logits = vmap(whole, (0, None))(ensemble, TOKENS)
    for b, key in enumerate(keys):
        params = MODEL.init(key)
        assert all(
            torch.equal(x[b], y)
            for x, y in zip(optree.tree_leaves(ensemble), optree.tree_leaves(params), strict=True)
        )
        torch.testing.assert_close(logits[b], whole(params, TOKENS))
    pasts = vmap(lambda params: MODEL.apply(params, TOKENS[:5], MODEL.cache(8))[1])(ensemble)
    step = vmap(lambda params, past: MODEL.extend(params, TOKENS[5:7], past)[0])(ensemble, pasts)
    torch.testing.assert_close(step, logits[:, 5:7])


def loss(params, tokens):
    return torch.nn.functional.cross_entropy(whole(params, tokens[:-1]), tokens[1:])


def test_the_gradient_of_a_loss_is_its_slope():
    direction = optree.tree_map(lambda x: x.cos(), PARAMS)
    along = lambda t: loss(optree.tree_map(lambda x, d: x + t * d, PARAMS, direction), TOKENS)
    slope = sum(
        (g * d).sum()
        for g, d in zip(
            *map(optree.tree_leaves, (grad(loss)(PARAMS, TOKENS), direction)), strict=True
        )
    )
    close(jvp(lambda params: loss(params, TOKENS), (PARAMS,), (direction,))[1], slope)
    h = 1e-5  # truncation of order h^2, rounding of order 1e-16 / h
    torch.testing.assert_close(slope, (along(h) - along(-h)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_gradients_per_sample_are_those_of_each_sample():
    samples = TOKENS.reshape(4, 10)
    each = vmap(grad(loss), (None, 0))(PARAMS, samples)
    for b, tokens in enumerate(samples):
        for got, wanted in zip(
            optree.tree_leaves(each), optree.tree_leaves(grad(loss)(PARAMS, tokens)), strict=True
        ):
            close(got[b], wanted)


def test_a_batched_loss_has_the_mean_of_the_gradients_of_its_samples():
    samples = TOKENS.reshape(4, 10)
    batched = grad(lambda params: vmap(loss, (None, 0))(params, samples).mean())(PARAMS)
    each = vmap(grad(loss), (None, 0))(PARAMS, samples)
    for got, wanted in zip(optree.tree_leaves(batched), optree.tree_leaves(each), strict=True):
        close(got, wanted.mean(0))


# Derivatives through a past.


def in_steps(params, n):
    """The logits of TOKENS[5:8] after n tokens in a past that the same weights made."""
    past = MODEL.apply(params, TOKENS[:n], empty())[1] if n else empty()
    logits = MODEL.extend(params, TOKENS[n:8], past)[0]
    return logits[5 - n :]


@pytest.mark.parametrize("n", [0, 3, 5])
def test_derivatives_through_a_cached_step_are_those_of_the_whole(n):
    """Of both modes and orders, with the past empty and not; the whole has no cache in it."""
    tangent = optree.tree_map(torch.cos, PARAMS)
    f = lambda params: in_steps(params, n).sin().sum()
    g = lambda params: whole(params, TOKENS[:8])[5:].sin().sum()
    close(f(PARAMS), g(PARAMS))
    close(jvp(f, (PARAMS,), (tangent,))[1], jvp(g, (PARAMS,), (tangent,))[1])
    hvp = lambda f: jvp(grad(f), (PARAMS,), (tangent,))[1]
    for order in (lambda f: grad(f)(PARAMS), hvp):
        for got, wanted in zip(
            optree.tree_leaves(order(f)), optree.tree_leaves(order(g)), strict=True
        ):
            close(got, wanted, rtol=1e-8, atol=1e-9)  # second derivatives of order 1e3


@pytest.mark.parametrize("n", [0, 3, 5])
def test_jacobians_of_a_cached_step_in_an_embedding_are_those_of_the_whole(n):
    only = lambda f: (
        lambda row: f(PARAMS._replace(embedding=PARAMS.embedding.index_put((TOKENS[4],), row)))
    )
    f, g = (
        only(lambda params: in_steps(params, n)),
        only(lambda params: whole(params, TOKENS[:8])[5:]),
    )
    row = PARAMS.embedding[TOKENS[4]]
    wanted = jacrev(g)(row)
    for jacobian in (jacrev(f), jacfwd(f)):
        close(jacobian(row), wanted)


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("n", [0, 5, 30])
def test_derivatives_in_the_past_itself_are_finite_differences(n, T):
    """jvp, jacrev and hvp with respect to k and v, past empty, in part and full."""
    past = past_of(n)
    tangent = (past.k.cos(), past.v.sin() + 1)

    def f(k, v):
        return MODEL.extend(PARAMS, TOKENS[20 : 20 + T], Cache(k, v, past.length))[0][-1].sin()

    along = lambda t: f(past.k + t * tangent[0], past.v + t * tangent[1])
    h = 1e-4  # central differences: truncation of order h^2
    difference = (along(h) - along(-h)) / (2 * h)
    forward = jvp(f, (past.k, past.v), tangent)[1]
    torch.testing.assert_close(forward, difference, rtol=1e-5, atol=1e-6)
    by_k, by_v = jacrev(f, (0, 1))(past.k, past.v)
    close((by_k * tangent[0]).flatten(1).sum(-1) + (by_v * tangent[1]).flatten(1).sum(-1), forward)
    scalar = lambda k, v: f(k, v).sum()
    hvp = jvp(grad(scalar, (0, 1)), (past.k, past.v), tangent)[1]
    at = lambda t: grad(scalar, (0, 1))(past.k + t * tangent[0], past.v + t * tangent[1])
    for got, up, down in zip(hvp, at(h), at(-h), strict=True):
        torch.testing.assert_close(got, (up - down) / (2 * h), rtol=1e-4, atol=1e-5)
    remembered = torch.arange(31) < n
    for g in (by_k, by_v, *hvp):
        assert not g[..., ~remembered, :].any()
        assert bool(g.any()) == bool(n)


@pytest.mark.parametrize("T", [2, 20])
def test_derivatives_of_a_ragged_batch_are_one_by_one_with_an_empty_past_among_them(T):
    pasts = [past_of(n) for n in (0, 4, 9)]
    f = lambda k, v, length: (
        MODEL.extend(PARAMS, TOKENS[20 : 20 + T], Cache(k, v, length))[0].sin().sum()
    )

    def second(k, v, length):
        return jvp(grad(lambda k, v: f(k, v, length), (0, 1)), (k, v), (k.cos(), v.sin()))[1]

    forward = lambda k, v, length: jvp(lambda k, v: f(k, v, length), (k, v), (k.cos(), v.sin()))[1]
    for derive in (grad(f, (0, 1)), second, lambda *past: (forward(*past),)):
        mapped = vmap(derive)(*stack(pasts))
        for b, past in enumerate(pasts):
            for got, wanted in zip(mapped, derive(*past), strict=True):
                close(got[b], wanted, rtol=1e-8, atol=1e-9)


# Weights and sizes.


@pytest.mark.parametrize("tied", [True, False])
def test_init_makes_the_shapes_that_a_checkpoint_must_hold(tied):
    config = fa.Config(layers=3, tied=tied)
    params = fa.decoder(config).init(fa.key(0))
    wanted = transformer.shapes(config)
    assert params.embedding.shape == wanted.embedding
    assert [tuple(x.shape) for x in optree.tree_leaves(params)] == optree.tree_leaves(
        wanted, is_leaf=lambda x: type(x) is tuple and bool(x) and isinstance(x[0], int)
    )
    assert (params.head == ()) == tied


def test_init_spends_its_key_on_each_weight_apart():
    params = fa.decoder(fa.Config(layers=3, tied=False)).init(fa.key(0))
    matrices = [x.flatten() for x in optree.tree_leaves(params) if x.dim() == 2]
    assert len({tuple(x[:8].tolist()) for x in matrices}) == len(matrices)
    again = fa.decoder(fa.Config(layers=3, tied=False)).init(fa.key(0))
    assert all(
        torch.equal(x, y)
        for x, y in zip(optree.tree_leaves(params), optree.tree_leaves(again), strict=True)
    )
    for name, deviation in (("q", 0.02), ("o", 0.02 / 6**0.5), ("down", 0.02 / 6**0.5)):
        found = torch.stack([getattr(layer, name) for layer in params.layers]).std()
        # 3 * 64 * 64 numbers at least: the standard error of their deviation is below 1 in 150
        assert abs(found / deviation - 1) < 0.03


def test_a_config_is_a_value():
    assert fa.Config(layers=2) == fa.Config()
    assert len({fa.Config(), fa.Config(layers=2), fa.Config(layers=3)}) == 2


def test_what_a_config_computes_is_no_field_of_it():
    config = fa.Config(window=8, window_layers=(True, False), layers=2, local_head_size=8)
    assert config.cache_groups == ((0,), (1,))
    assert config.near.head_size == 8 != config.far.head_size
    assert fa.Config(**vars(config)) == config


def test_compiled_code_takes_the_step_in_one_graph():
    step = torch.compile(
        lambda tokens, past: MODEL.apply(PARAMS, tokens, past), fullgraph=True, backend="eager"
    )
    past = past_of(5)
    for T in (1, 3):
        logits, after = step(TOKENS[5 : 5 + T], past)
        close(logits, MODEL.extend(PARAMS, TOKENS[5 : 5 + T], past)[0])
        assert int(after.length) == 5 + T


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: MODEL.hidden(PARAMS, torch.tensor([1.0])),
            TypeError,
            "tokens should be an integer tensor, got torch.float32",
        ),
        (
            lambda: MODEL.hidden(PARAMS, [1, 2]),
            TypeError,
            r"got list\. Pass token ids: torch\.tensor",
        ),
        (
            lambda: MODEL.hidden(PARAMS, torch.tensor(1)),
            ValueError,
            r"Give one token an axis: tokens\[None\]",
        ),
        (
            lambda: MODEL.hidden(PARAMS, torch.tensor([1, 40])),
            ValueError,
            r"ids in 0\.\.39, got 40\. Encode with the tokenizer",
        ),
        (lambda: MODEL.hidden(PARAMS, torch.tensor([-1, 3])), ValueError, "got -1"),
        (
            lambda: vmap(lambda t: MODEL.hidden(PARAMS, t)[0])(torch.tensor([[1], [99]])),
            ValueError,
            r"ids in 0\.\.39, got 99",
        ),
        (
            lambda: MODEL.extend(PARAMS, TOKENS.reshape(2, 20), empty()),
            ValueError,
            r"one sequence \(T,\).* torch\.func\.vmap",
        ),
        (
            lambda: MODEL.apply(PARAMS, TOKENS, empty(39)),
            ValueError,
            r"room for 40 tokens \(it has 39\).*\.grow\(cache, 40\)",
        ),
        (
            lambda: MODEL.apply(PARAMS, TOKENS.reshape(2, 20)),
            ValueError,
            r"one sequence \(T,\).* torch\.func\.vmap",
        ),
        (
            lambda: MODEL.extend(PARAMS, TOKENS, [past_of(1)]),
            TypeError,
            "a past such as Cache or Branch, got a list",
        ),
        (
            lambda: MODEL.extend(PARAMS, TOKENS, MODEL.cache(9)._replace(length=torch.tensor(2))),
            TypeError,
            r"dtype=torch\.float64",
        ),
        (
            lambda: MODEL.extend(PARAMS, TOKENS, fa.decoder(fa.Config()).cache(50)),
            ValueError,
            "cache function of this model",
        ),
        (
            lambda: MODEL.extend(PARAMS, TOKENS[:3], past_of(2), mask=masks.causal(2)),
            ValueError,
            "T = 3",
        ),
        (
            lambda: MODEL.hidden(PARAMS, TOKENS[:3], mask=masks.causal(2)),
            ValueError,
            "Build it with T = 3",
        ),
        (
            lambda: MODEL.extend(PARAMS, TOKENS[:3], past_of(2), mask=torch.ones(3, 5).bool()),
            ValueError,
            r"booleans \(T, T\) with T = 3",
        ),
        (
            lambda: MODEL.extend(PARAMS, TOKENS[:3], past_of(2), mask=torch.ones(3, 3)),
            TypeError,
            "a Mask, booleans or None",
        ),
        (
            lambda: MODEL.cache(-1),
            ValueError,
            "cache: size should be a number of tokens, 0 or more, got -1",
        ),
        (lambda: MODEL.init(0), TypeError, r"key should be one key, int64 \(2,\)"),
        (lambda: MODEL.init(fa.split(fa.key(0))), ValueError, "vmap"),
        (
            lambda: fa.decoder(CONFIG, kernel="fast").hidden(PARAMS, TOKENS),
            ValueError,
            "kernel should be None or one of",
        ),
        (
            lambda: fa.decoder("smollm2-135m"),
            TypeError,
            "decoder: config should be a Config, got a str",
        ),
        (
            lambda: MODEL.hidden(fa.decoder(fa.Config()).init(fa.key(0)), TOKENS),
            ValueError,
            "decoder: params should be those of the",
        ),
        (
            lambda: fa.compile(MODEL, backend="eager").extend(
                PARAMS._replace(layers=PARAMS.layers[:1]), TOKENS[:1], empty()
            ),
            ValueError,
            "got 1 layers",
        ),
        (
            lambda: MODEL.cache(3, kind="pages"),
            TypeError,
            "cache: kind should be a kind of past, got 'pages'",
        ),
        (
            lambda: MODEL.cache(3, dtype="float32"),
            TypeError,
            r"cache: dtype should be a torch\.dtype, or None, got 'float32'",
        ),
        (
            lambda: fa.Config(width="64"),
            TypeError,
            "Config: width should be an int, got '64', a str",
        ),
        (
            lambda: fa.Config(layers=2.0),
            TypeError,
            r"Config: layers should be an int, got 2\.0, a float",
        ),
        (lambda: fa.Config(layers=0), ValueError, "Config: layers should be at least 1, got 0"),
        (
            lambda: fa.Config(heads=4, kv_heads=3),
            ValueError,
            "kv_heads should be a divisor of heads = 4, got 3",
        ),
        (
            lambda: fa.Config(head_size=5),
            ValueError,
            "head_size should be even, and at most head_size = 5, got 5",
        ),
        (
            lambda: fa.Config(experts=6, experts_per_token=2, expert_size=4, expert_groups=4),
            ValueError,
            "expert_groups should be a divisor of experts = 6, with two experts a group at least",
        ),
        (
            lambda: fa.Config(late_head_norm=True),
            ValueError,
            'late_head_norm should be False without a head_norm of "rms", "layer" or "unit", got True',
        ),
        (
            lambda: fa.Config(router_scores="tanh"),
            ValueError,
            "router_scores should be one of 'softmax', 'sigmoid', 'sparsemixer', got 'tanh'",
        ),
        (
            lambda: fa.decoder(fa.Config(head_bias=True)).logits(
                fa.decoder(fa.Config()).init(fa.key(0)), torch.zeros(64)
            ),
            ValueError,
            "decoder: params should be those of the config, with a head_bias, got none",
        ),
        (lambda: fa.Config(activation="swish"), ValueError, "activation should be one of 'silu'"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


# What families need: kinds of layers, positions of one's own, limits.

MIXED = fa.Config(
    vocabulary=40,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    head_size=4,
    feed_forward=24,
    attention_cap=5.0,
    sinks=True,
    window=3,
    window_layers=(True, False, True),
    local_rope_base=50.0,
    norm_placement="around",
    norm_offset=1.0,
    head_norm="rms",
    experts=4,
    experts_per_token=2,
    expert_size=8,
    expert_layers=(False, True, True),
    logit_cap=3.0,
)


def weights_of(config):
    """Not a fresh model's: nothing at a neutral value."""
    flat = fa.decoder(config).init(fa.key(0))
    return fa.tree.map(
        lambda x: (10 * x + 0.1 * torch.arange(x.numel()).cos().reshape(x.shape)).double(), flat
    )


def agree(got, wanted):
    """Within 1e-11 of the greatest: sums of heads, taken in another order, cancel in some places."""
    scale = wanted.abs().max().clamp(min=1e-300)
    close(got / scale, wanted / scale, rtol=0, atol=1e-11)


@pytest.mark.parametrize("remat", [True, 3])
@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["plain", "mixed"])
def test_a_decoder_that_rematerializes_has_the_same_derivatives(config, remat):
    plain, again, params = fa.decoder(config), fa.decoder(config, remat=remat), weights_of(config)
    tangent = fa.tree.map(torch.cos, params)

    def loss(model, tokens):
        return lambda params: model.logits(params, model.hidden(params, tokens)[0]).sin().sum()

    rules = [
        lambda model: loss(model, TOKENS)(params),
        lambda model: grad(loss(model, TOKENS))(params),
        lambda model: jvp(loss(model, TOKENS), (params,), (tangent,))[1],
        lambda model: jvp(grad(loss(model, TOKENS[:20])), (params,), (tangent,))[1],
        lambda model: vmap(lambda tokens: grad(loss(model, tokens))(params))(TOKENS.reshape(2, 20)),
    ]
    for rule in rules:
        fa.tree.map(agree, rule(again), rule(plain))
    past = plain.apply(params, TOKENS[:7], plain.cache(20, dtype=torch.float64))[1]
    f = lambda model: (
        lambda k, v: model.extend(params, TOKENS[7:12], Cache(k, v, past.length))[0].sin().sum()
    )
    for got, wanted in zip(
        grad(f(again), (0, 1))(past.k, past.v), grad(f(plain), (0, 1))(past.k, past.v), strict=True
    ):
        close(got, wanted)


@pytest.mark.parametrize(
    "different",
    [
        {"qkv_bias": True, "output_bias": True, "head_norm": "layer", "sinks": True},
        {"head_norm": "rms", "late_head_norm": True, "attention_cap": 3.0, "kv_heads": 4},
    ],
    ids=["biases", "caps"],
)
def test_heads_in_groups_are_heads_at_once(different):
    """Keys and values too, and a derivative of second order by all weights."""
    config = dataclasses.replace(CONFIG, **different)
    plain, again, params = fa.decoder(config), fa.decoder(config, remat=8), weights_of(config)
    calls = []

    def split(*args):
        calls.append(args)
        return by_groups(*args)

    with pytest.MonkeyPatch.context() as patch:
        by_groups = head_groups.by_groups
        patch.setattr(head_groups, "by_groups", split)
        found = again.hidden(params, TOKENS[:12])
        assert len(calls) == config.layers
    fa.tree.map(close, found, plain.hidden(params, TOKENS[:12]))
    along = fa.tree.map(torch.cos, params)
    loss = lambda model: lambda params: fa.loss(model, params, TOKENS[:13])
    rule = lambda model: jvp(grad(loss(model)), (params,), (along,))
    fa.tree.map(agree, rule(again), rule(plain))


def test_segments_save_a_root_of_the_layers(monkeypatch):
    """Between the forward and the backward pass: the inputs of 3 segments, of 9 layers."""
    config = dataclasses.replace(CONFIG, layers=9)
    params, saved = weights_of(config), []
    for remat, count in ((True, 9), (64, 3)):
        model = fa.decoder(config, remat=remat)
        saved.clear()
        residual = lambda x: x.shape == (*TOKENS.shape, config.width)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (saved.append(x.data_ptr()) if residual(x) else None, x)[1], lambda x: x
        ):
            model.hidden(fa.tree.map(lambda w: w.requires_grad_(), params), TOKENS)
        # the norm of the last saves some too, and each layer its input
        assert count <= len(set(saved)) <= count + 4


@pytest.mark.parametrize("remat", [0, -1, 2.5, "all"])
def test_rematerialization_is_a_bool_or_a_number_of_positions(remat):
    with pytest.raises(ValueError, match="decoder: remat should be True, False or a number"):
        fa.decoder(CONFIG, remat=remat)


def test_steps_of_a_mixed_decoder_equal_the_whole():
    model, params = fa.decoder(MIXED), weights_of(MIXED)
    wanted, cache, found = (
        model.logits(params, model.hidden(params, TOKENS)[0]),
        model.cache(40, dtype=torch.float64),
        [],
    )
    for piece in TOKENS.split([10, 1, 20, 1, 1, 7]):
        logits, cache = model.apply(params, piece, cache)
        found.append(logits)
    close(torch.cat(found), wanted)


def test_a_compiled_step_through_experts_is_one_graph():
    model, params = fa.decoder(MIXED), weights_of(MIXED)
    past = model.apply(params, TOKENS[:5], model.cache(9, dtype=torch.float64))[1]
    step = torch.compile(
        lambda tokens, past: model.apply(params, tokens, past), fullgraph=True, backend="eager"
    )
    logits, after = step(TOKENS[5:8], past)
    close(logits, model.extend(params, TOKENS[5:8], past)[0])
    assert int(after.length) == 8


@pytest.mark.parametrize("T", [5, 20])
@pytest.mark.parametrize("n", [0, 6])
def test_tokens_in_any_order_see_those_near_them_by_position(n, T):
    """Rows shuffled with their positions, and the mask with them, give the shuffled logits: the
    window is that of positions.
    """
    model, params = fa.decoder(MIXED), weights_of(MIXED)
    past = (
        model.apply(params, TOKENS[:n], model.cache(40, dtype=torch.float64))[1]
        if n
        else model.cache(40, dtype=torch.float64)
    )
    order = fa.random.permutation(fa.key(3), T)
    causal = masks.causal(T).dense(T)[order][:, order]
    wanted = model.extend(params, TOKENS[n : n + T], past)[0]
    got = model.extend(params, TOKENS[n : n + T][order], past, mask=causal, positions=order + n)[0]
    close(got, wanted[order])
    close(model.extend(params, TOKENS[n : n + T], past, positions=torch.arange(T) + n)[0], wanted)


def test_a_few_tokens_far_apart_do_not_see_each_other_through_a_window():
    """Two tokens at positions 0 and 10 are two tokens of eleven whose others are hidden, though a
    window of 3 holds two rows.
    """
    model, params = fa.decoder(MIXED), weights_of(MIXED)
    hidden = masks.causal(11).dense(11).clone()
    hidden[:, 1:10] = False
    hidden[1:10, 1:10] = torch.eye(9).bool()
    wanted = model.logits(params, model.hidden(params, TOKENS[:11], mask=hidden)[0])[[0, 10]]
    got = model.logits(
        params, model.hidden(params, TOKENS[[0, 10]], positions=torch.tensor([0, 10]))[0]
    )
    close(got, wanted)


def test_a_tree_of_drafts_under_a_window_is_each_of_its_paths():
    model, params = fa.decoder(MIXED), weights_of(MIXED)
    sees = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]
    ).bool()
    depth, drafts = torch.tensor([0, 1, 1, 2, 3]), TOKENS[20:25]
    past = model.apply(params, TOKENS[:5], model.cache(20, dtype=torch.float64))[1]
    logits, _ = model.extend(params, drafts, past, mask=sees, positions=depth + past.length)
    for path in ([0, 1], [0, 2, 3, 4]):  # the last is further from the first than the window
        index = torch.tensor(path)
        close(logits[index], model.extend(params, drafts[index], past)[0])


def learned(context):
    config = dataclasses.replace(CONFIG, positions="learned", context=context)
    return fa.decoder(config), weights_of(config)


def test_learned_positions_are_a_table_that_the_tokens_look_into():
    model, params = learned(40)
    shifted = model.hidden(params, TOKENS[:5], positions=torch.arange(5) + 3)[0]
    rolled = params._replace(positions=params.positions.roll(-3, 0))
    close(model.hidden(rolled, TOKENS[:5])[0], shifted)
    rows = grad(lambda params: model.hidden(params, TOKENS[:5])[0].sin().sum())(params).positions
    assert rows[:5].abs().sum(-1).all()
    assert not rows[5:].any()


@pytest.mark.parametrize(
    "config", [CONFIG, dataclasses.replace(CONFIG, positions="learned")], ids=["rotary", "learned"]
)
def test_a_text_as_long_as_the_context_is_read_and_one_token_more_is_not(config):
    config = dataclasses.replace(config, context=10)
    model, params = fa.decoder(config), weights_of(config)
    whose = (
        "of its table"
        if config.positions == "learned"
        else "that the model was trained on, config.context"
    )
    told = rf"tokens should be within the 10 positions {whose}, got position 10\. Shorten it; or .* dataclasses\.replace"
    assert model.hidden(params, TOKENS[:10])[0].isfinite().all()
    past = model.apply(params, TOKENS[:9], model.cache(20, dtype=torch.float64))[1]
    assert model.extend(params, TOKENS[9:10], past)[0].isfinite().all()
    for wrong in (
        lambda: model.hidden(params, TOKENS[:11]),
        lambda: model.extend(params, TOKENS[9:11], past),
        lambda: model.hidden(params, TOKENS[:2], positions=torch.tensor([3, 10])),
        lambda: vmap(lambda tokens: model.hidden(params, tokens)[0])(TOKENS[:22].reshape(2, 11)),
        lambda: vmap(lambda places: model.hidden(params, TOKENS[:1], positions=places)[0])(
            torch.tensor([[3], [10]])
        ),
    ):
        with pytest.raises(ValueError, match=told):
            wrong()


@pytest.mark.parametrize(
    "more",
    [{"positions": "none"}, {"rope_scaling": RopeScaling("dynamic", 2.0, context=10)}],
    ids=["none", "dynamic"],
)
def test_a_model_without_a_limit_reads_on(more):
    config = dataclasses.replace(CONFIG, context=10, **more)
    model = fa.decoder(config)
    assert config.limit() is None
    assert model.hidden(weights_of(config), TOKENS)[0].isfinite().all()


CHOICES = {
    "norm": "batch",
    "head_norm": "l2",
    "norm_placement": "inside",
    "positions": "sines",
    "activation": "swish",
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[
            ({name: wrong}, rf"Config: {name} should be one of .*, got '{wrong}'\. Choose one")
            for name, wrong in CHOICES.items()
        ],
        *[
            ({name: 0}, f"Config: {name} should be at least 1, got 0")
            for name in ("vocabulary", "width", "head_size", "context")
        ],
        ({"feed_forward": -3}, "feed_forward should be at least 1, got -3"),
        ({"window": 0}, r"window should be None or at least 1, got 0\. Each token sees itself"),
        (
            {"window": 4, "window_layers": (True,)},
            r"window_layers should be \(\) or a tuple of 2 bools, one a layer, got \(True,\)",
        ),
        ({"rotary_layers": [True, False]}, r"rotary_layers should be .*, got \[True, False\]"),
        ({"expert_layers": (True, False, True)}, "expert_layers should be .* 2 bools"),
        ({"rotary_size": 3}, "rotary_size should be even, and at most head_size = 16, got 3"),
        ({"rotary_size": 18}, "rotary_size should be even, and at most head_size = 16, got 18"),
        ({"rotary_size": 0}, "rotary_size should be even, .* got 0"),
        (
            {"experts": 4},
            "experts_per_token should be from 1 to experts = 4, with an expert_size above 0, got 0",
        ),
        (
            {"experts": 4, "experts_per_token": 5, "expert_size": 8},
            "from 1 to experts = 4, .* got 5",
        ),
        ({"experts": 4, "experts_per_token": 2}, "with an expert_size above 0, got 2"),
        (
            {"norm_placement": "after", "parallel": True},
            'norm_placement should be "before" where .*, got after',
        ),
        ({"norm_placement": "around", "norm_bias": True, "norm": "layer"}, "No family has both"),
        (
            {"shared_norm": True},
            r"shared_norm should be False where blocks follow each other, got True\. Set parallel=True",
        ),
    ],
)
def test_a_config_that_says_nothing_is_an_error_with_its_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        fa.Config(**fields)


# Ideas of families: each read in steps is what it is as a whole, in a batch and along a direction.

IDEAS = {
    "alibi": {"positions": "alibi"},
    "chunks": {"window": 5, "chunked": True, "window_layers": (True, False)},
    "norms of the residual": {
        "norm_placement": "residual",
        "norm": "layer",
        "norm_bias": True,
        "first_norm": False,
    },
    "norms of embedding and head": {"embedding_norm": True, "head_transform": True},
    "a gate of features": {"attention_gate": "width"},
    "a gate of heads": {"attention_gate": "head", "gate_activation": "softplus"},
    "a part of each head turns in far layers": {
        "window": 5,
        "window_layers": (True, False),
        "rotary_size": 2,
        "local_rope_base": 100.0,
        "local_rotary_size": 4,
    },
    "xielu": {"activation": "xielu", "gated": False},
    "unit heads": {
        "head_norm": "unit",
        "late_head_norm": True,
        "rotary_layers": (True, False),
        "attention_temperature": (0.3, 4),
        "late_temperature": True,
    },
    "norms of heads with a bias": {"head_norm": "layer_bias"},
    "experts by one softmax after the other": {
        "experts": 4,
        "experts_per_token": 2,
        "expert_size": 8,
        "router_scores": "sparsemixer",
        "router_margin": 0.2,
    },
    "experts that read weighted inputs": {
        "experts": 4,
        "experts_per_token": 2,
        "expert_size": 8,
        "routed_inputs": True,
    },
}


@pytest.mark.parametrize("more", IDEAS.values(), ids=IDEAS)
def test_an_idea_composes_and_steps_equal_the_whole(more):
    config = dataclasses.replace(CONFIG, **more)
    model, params = fa.decoder(config), weights_of(config)
    tokens = TOKENS[:14]
    whole = model.extend(params, tokens)[0]
    past, steps = model.cache(14, dtype=torch.float64), []
    for piece in tokens.split([6, 3, *[1] * 5]):
        logits, past = model.apply(params, piece, past)
        steps.append(logits)
    close(torch.cat(steps), whole)

    def later(tokens):
        past = model.apply(params, tokens[:9], model.cache(14, dtype=torch.float64))[1]
        return model.apply(params, tokens[9:], past)[0]

    batch = torch.stack([tokens, tokens.flip(0)])
    close(vmap(later)(batch)[0], whole[9:])
    loss = lambda params, tokens: model.extend(params, tokens)[0].square().mean()
    each = vmap(grad(loss), (None, 0))(params, batch)
    one = grad(loss)(params, batch[1])
    assert fa.tree.allclose(fa.tree.map(lambda g: g[1], each), one, atol=1e-9, rtol=1e-7)
    direction = fa.tree.map(torch.ones_like, params)
    moved = jvp(lambda p: loss(p, batch[1]), (params,), (direction,))[1]
    close(moved, sum(g.sum() for g in fa.tree.leaves(one)), rtol=1e-8)


def test_tokens_of_a_chunk_see_each_other_alone():
    """As with a mask that says so, also where positions are given."""
    config = dataclasses.replace(CONFIG, window=5, chunked=True)
    model, params = fa.decoder(config), weights_of(config)
    row = torch.arange(14)
    seen = (row.unsqueeze(1) >= row) & (row.unsqueeze(1) // 5 == row // 5)
    plain = fa.decoder(dataclasses.replace(CONFIG))
    want = plain.extend(params, TOKENS[:14], mask=seen)[0]
    close(model.extend(params, TOKENS[:14])[0], want)
    close(model.extend(params, TOKENS[:14], positions=row)[0], want)


def test_a_cache_that_rounds_keys_is_refused_with_alibi():
    model = fa.decoder(dataclasses.replace(CONFIG, positions="alibi"))
    cache = model.cache(8, kind=fa.QuantizedCache)
    with pytest.raises(ValueError, match="cache should be one that rounds no keys, with ALiBi"):
        model.extend(model.init(fa.key(0)), TOKENS[:2], cache)
