"""Models with recurrent layers: their states are values, as the rows of attention are.

Each law is one of decoders with attention alone; the kinds of layers are in `CONFIGS`.
"""

import dataclasses
import functools
from contextlib import nullcontext

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import caches, masks, tree
from funcattn.testing import laws

SMALL = fa.Config(
    vocabulary=40, width=16, layers=3, heads=2, kv_heads=1, head_size=8, feed_forward=24
)


def config(kind, **fields):
    return dataclasses.replace(SMALL, mixers=(kind, "attention", kind), **fields)


SPACE = {
    "convolution_size": 4,
    "state_heads": 4,
    "state_key_heads": 2,
    "state_key_size": 5,
    "state_value_size": 3,
}
CONFIGS = {
    "short_convolution": config("short_convolution", convolution_size=3, convolution_bias=True),
    "gated_delta": config(
        "gated_delta",
        convolution_size=4,
        state_heads=4,
        state_key_heads=2,
        state_key_size=6,
        state_value_size=3,
        negative_eigenvalues=True,
        mixer_norm_placement="around",
        attention_gate="width",
    ),
    "decays by feature": config(
        "gated_delta",
        convolution_size=4,
        state_heads=4,
        state_key_heads=4,
        state_key_size=5,
        state_value_size=5,
        mixer_rank=8,
        feature_decay=True,
        mixer_gate_activation="sigmoid",
        kv_heads=2,
        latent_size=8,
        rotary_size=2,
        positions="none",
    ),
    "state_space": config("state_space", convolution_bias=True, mixer_bias=True, **SPACE),
    "beside": config(
        "state_space_and_attention",
        mixer_norm="before_gate",
        mixer_output_bias=True,
        mixer_factors=(0.5, 1.5, 0.7, 1.2, 0.8, 1.1, 0.9),
        attention_factors=(0.6, 1.3, 1.4),
        feed_forward_factors=(0.7, 1.6),
        step_limit=(0.1, 2.0),
        **SPACE,
    ),
    "one part a layer": dataclasses.replace(
        SMALL,
        mixers=("state_space", "none", "attention"),
        feed_forward_layers=(False, True, False),
        gated=False,
        activation="relu2",
        mixer_norm="none",
        **SPACE,
    ),
}
SLOW = ("beside", "decays by feature", "one part a layer")  # made of the same parts
TOKENS = fa.random.randint(fa.key(1), (20,), 0, 40)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


@functools.cache
def of_kind(kind):
    """A decoder and weights in float64, matrices so large that texts do not repeat one token."""
    model = fa.decoder(CONFIGS[kind])
    big = lambda x: (x if x.dim() == 1 or x.shape[-1] < 5 else 20 * x).double()
    return model, tree.map(big, model.init(fa.key(3)))


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CONFIGS]
)
def made(request):
    return of_kind(request.param)


def room(model, size=32, kind=fa.Cache):
    return model.cache(size, kind=kind, dtype=torch.float64)


def read(model, params, tokens, past):
    return model.apply(params, tokens, past)


def naive(model, params, prompt, steps):
    """Greedy continuation, each token from one pass over the whole text."""
    for _ in range(steps):
        last = model.extend(params, prompt)[0][-1]
        prompt = torch.cat([prompt, last.argmax().reshape(1)])
    return prompt[-steps:]


@pytest.mark.parametrize(
    "kind",
    [fa.Cache, caches.pages(block=4), caches.ring(window=64, tail=8)],
    ids=["dense", "pages", "ring"],
)
def test_steps_equal_the_whole_whatever_was_rejected(made, kind):
    """Each step reads some tokens that are then rejected: they leave no trace in a state."""
    model, params = made
    whole = model.extend(params, TOKENS)[0]
    past, rows, at = room(model, kind=kind), [], 0
    for n in (7, 1, 3, 0, 4, 5):
        drafted = torch.cat([TOKENS[at : at + n], TOKENS[:2]])
        logits, delta = model.extend(params, drafted, past)
        past, at = fa.commit(past, delta, n), at + n
        rows.append(logits[:n])
    close(torch.cat(rows), whole)
    assert int(past.length) == 20


def test_rows_under_vmap_commit_numbers_of_their_own(made):
    model, params = made
    _, past = read(model, params, TOKENS[:5], room(model))
    _, delta = model.extend(params, TOKENS[5:9], past)
    numbers = torch.arange(5)
    after = lambda n: model.extend(params, TOKENS[9:12], fa.commit(past, delta, n))[0]
    close(vmap(after)(numbers), torch.stack([after(int(n)) for n in numbers]))


def test_a_fork_and_an_older_value_are_unchanged_by_what_follows(made):
    model, params = made
    _, past = read(model, params, TOKENS[:6], room(model))
    before = tree.map(torch.clone, past)
    texts = torch.stack([TOKENS[6:12], TOKENS[9:15]])
    forks = vmap(lambda text: read(model, params, text, past)[0])(texts)
    for text, got in zip(texts, forks, strict=True):
        close(got, model.extend(params, torch.cat([TOKENS[:6], text]))[0][6:])
    for now, then in zip(tree.leaves(past), tree.leaves(before), strict=True):
        assert torch.equal(now, then)


def test_generation_is_that_of_the_whole_text_in_ragged_batches_too(made):
    """Padding of a prompt touches no state."""
    model, params = made
    lengths = torch.tensor([20, 11, 5])
    one = lambda n: fa.generate(
        fa.key(2), model, params, TOKENS, steps=6, prompt_length=n, chunk=8
    )[0]
    got = vmap(one)(lengths)
    for n, tokens in zip(lengths.tolist(), got, strict=True):
        wanted = naive(model, params, TOKENS[:n], 6)
        assert torch.equal(tokens, wanted)
        assert torch.equal(wanted, fa.generate(fa.key(2), model, params, TOKENS[:n], steps=6)[0])
    assert len({tuple(row) for row in got.tolist()}) == 3  # no text of one token


def test_generation_goes_on_from_a_cache_and_from_a_flat_copy_of_it(made):
    model, params = made
    wanted = naive(model, params, TOKENS, 8)
    go_on = lambda past, text, steps: fa.generate(fa.key(2), model, params, text, past, steps=steps)
    _, dense = read(model, params, TOKENS[:5], room(model, 40))
    for past in (dense, fa.Branch(dense, room(model, 30))):
        first, after = go_on(past, TOKENS[5:], 4)
        assert torch.equal(first, wanted[:4])
        for flat in (after, caches.grow(after, 9), caches.flatten(after)):
            assert torch.equal(go_on(flat, first[-1:], 4)[0], wanted[4:])


def test_tails_that_have_not_begun_and_others_are_read_side_by_side(made):
    model, params = made
    _, prefix = read(model, params, TOKENS[:5], room(model))
    _, behind = read(model, params, TOKENS[5:8], fa.Branch(prefix, room(model, 8)))
    tails = tree.map(lambda *x: torch.stack(x), room(model, 8), behind.tail)
    got = vmap(lambda tail: model.extend(params, TOKENS[8:11], fa.Branch(prefix, tail))[0])(tails)
    for text, logits in zip((TOKENS[:5], TOKENS[:8]), got, strict=True):
        close(logits, model.extend(params, torch.cat([text, TOKENS[8:11]]))[0][len(text) :])


def test_beams_are_those_of_whole_texts(made):
    model, params = made
    found = fa.search.beam_search(model, params, TOKENS[:6], steps=4, beams=3, best=3)
    for tokens, score in zip(found.tokens, found.scores, strict=True):
        text = torch.cat([TOKENS[:6], tokens])
        log_p = model.extend(params, text)[0].log_softmax(-1)[5:-1]
        close(score, log_p.gather(-1, tokens.unsqueeze(-1)).sum() / 4)


@pytest.mark.parametrize("draft", ["lookup", "int8", "another"])
def test_drafts_change_no_greedy_text(made, draft):
    model, params = made
    params = fa.cast(torch.float32)(params)  # the dtype of what int8 expands to
    lookup = fa.drafters.prompt_lookup(length=3)
    small = fa.quantize(fa.int8)(params)
    drafter = {
        "lookup": lambda: lookup,
        "int8": lambda: fa.drafters.model(model, small, length=3),
        "another": lambda: fa.drafters.model(fa.decoder(model.config), small, length=3),
    }[draft]()
    done, past = fa.speculate(fa.key(3), model, params, drafter, TOKENS, steps=9)
    wanted = naive(model, params, TOKENS, 9)
    assert torch.equal(done.tokens, wanted)
    torch.testing.assert_close(
        model.extend(params, done.tokens[-1:], past)[0][0],
        model.extend(params, torch.cat([TOKENS, wanted]))[0][-1],
        rtol=1e-4,  # float32, whose weights are twenty times those of a fresh model
        atol=1e-4,
    )
    if draft != "lookup":
        assert int(done.stats.accepted) > 0


def test_a_drafter_with_a_cache_of_its_own_keeps_the_accepted_tokens_alone(made):
    """After any number of them it drafts what it would behind that text."""
    model, params = made
    drafter = fa.drafters.model(model, params, length=3)
    state = drafter.init(TOKENS[:8], torch.tensor(8), 9)
    _, proposed = drafter.propose(fa.key(0), TOKENS[8], state)
    written = torch.cat([TOKENS[9:12], TOKENS[:1]])  # others than it drafted

    def drafted(count):
        kept = drafter.keep(written, torch.tensor(count), proposed)
        return drafter.propose(fa.key(0), written[count - 1], kept)[0].tokens

    first = drafter.propose(fa.key(0), TOKENS[8], state)[0].tokens
    assert torch.equal(first, naive(model, params, TOKENS[:9], 3))
    # of the tokens that are kept the cache has all but the last, which was not drafted
    for count in (1, 2, 3):
        text = torch.cat([TOKENS[:9], first[: count - 1], written[count - 1 : count]])
        assert torch.equal(drafted(count), naive(model, params, text, 3))


def test_drafts_change_no_text_in_a_ragged_batch(made):
    """Each row of a vmap accepts a number of its own."""
    model, params = made
    params, lengths = fa.cast(torch.float32)(params), torch.tensor([20, 11, 5])
    for drafter in (
        fa.drafters.prompt_lookup(length=2),
        fa.drafters.model(model, fa.quantize(fa.int8)(params), length=2),
    ):
        one = lambda n, drafter=drafter: fa.speculate(
            fa.key(3), model, params, drafter, TOKENS, steps=5, prompt_length=n
        )[0]
        done = vmap(one)(lengths)
        for n, tokens in zip(lengths.tolist(), done.tokens, strict=True):
            assert torch.equal(tokens, naive(model, params, TOKENS[:n], 5))


def test_slots_serve_texts_side_by_side(made):
    model, params = made
    past = read(model, params, TOKENS[:4], room(model, 8))[1]
    for prefix, before in (((), TOKENS[:0]), (past, TOKENS[:4])):
        slots = fa.serving.idle(model, params, room(model, 24), 2, prefix=prefix)
        prompts = TOKENS[4:9], TOKENS[9:12]
        written = [[], []]
        for i, prompt in enumerate(prompts):
            slots = fa.serving.enter(fa.key(i), model, params, prompt, slots, i, steps=3 + i)
        for _ in range(4):
            served, slots = fa.serving.step(model, params, slots)
            for i in range(2):
                written[i] += served.token[i : i + 1].tolist() if served.drawn[i] else []
        slots = fa.serving.enter(fa.key(5), model, params, prompts[1], slots, 0, steps=2)
        again = [int(fa.serving.step(model, params, slots)[0].token[0])]
        for i, prompt in enumerate(prompts):
            wanted = naive(model, params, torch.cat([before, prompt]), 3 + i)
            assert written[i] == wanted.tolist()
        assert again == written[1][:1]


def test_derivatives_of_the_whole_are_those_of_a_loop_over_tokens(made):
    """Of the weights, first and second: in chunks, and a token at a time behind a cache."""
    model, params = made
    tokens = TOKENS[:6]

    def whole(params):
        return model.extend(params, tokens)[0].sin().sum()

    def loop(params):
        past, total = room(model, 6), 0.0
        for token in tokens.unbind():
            logits, past = read(model, params, token.reshape(1), past)
            total = total + logits.sin().sum()
        return total

    tangent = tree.map(torch.cos, params)
    for order in (
        lambda f: grad(f)(params),
        lambda f: jvp(f, (params,), (tangent,))[1],
        lambda f: jvp(grad(f), (params,), (tangent,))[1],
    ):
        for x, y in zip(tree.leaves(order(whole)), tree.leaves(order(loop)), strict=True):
            # relative to the greatest of a leaf: sums of a few thousand products in another order
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max()))


def test_rematerialized_layers_have_the_same_gradient(made):
    model, params = made
    loss = lambda model: lambda params: model.extend(params, TOKENS)[0].sin().sum()
    wanted = grad(loss(model))(params)
    for remat in (True, 8):
        got = grad(loss(fa.decoder(model.config, remat=remat)))(params)
        for x, y in zip(tree.leaves(got), tree.leaves(wanted), strict=True):
            close(x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max()))


def test_states_are_in_float32_at_least_and_half_precision_runs(made):
    model, _ = made
    params = fa.cast(torch.float64)(model.init(fa.key(0)))
    half = fa.cast(torch.bfloat16)(params)
    past = model.cache(32, dtype=torch.bfloat16)
    for state in past.states:
        for path, x in tree.items(state):
            assert x.dtype == (torch.float32 if path == "memory" else torch.bfloat16)
    logits, after = read(model, half, TOKENS, past)
    assert logits.dtype == torch.bfloat16
    assert all(x.dtype == y.dtype for x, y in zip(*map(tree.leaves, (past, after)), strict=True))
    rows = [read(model, half, TOKENS[:10], past)]
    rows.append(read(model, half, TOKENS[10:], rows[0][1]))
    got, whole = torch.cat([x for x, _ in rows]).float(), model.extend(params, TOKENS)[0].float()
    scale = whole.abs().max()
    for found in (got, logits.float()):  # some tens of roundings to eight bits: 0.4 % each
        assert (found - whole).abs().max() < 0.1 * scale


def test_a_compiled_model_runs_as_the_model(made):
    model, params = made
    fast = fa.compile(model, backend="eager")
    assert "as the model itself runs them, nothing compiled" in fast.explain(params)
    _, past = read(model, params, TOKENS[:5], room(model))
    close(fast.extend(params, TOKENS[5:7], past)[0], model.extend(params, TOKENS[5:7], past)[0])
    assert torch.equal(
        fa.generate(fa.key(0), fast, params, TOKENS, steps=4)[0],
        fa.generate(fa.key(0), model, params, TOKENS, steps=4)[0],
    )
    with pytest.raises(TypeError, match="Hybrid"):
        fast.step(params, TOKENS[:1], past)


@pytest.mark.slow
def test_a_step_that_torch_compiles_is_the_step(made):
    model, params = made
    _, past = read(model, params, TOKENS[:5], room(model))

    def step(params, tokens, past, n):
        logits, delta = model.extend(params, tokens, past)
        return logits, fa.commit(past, delta, n)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for f in (compiled, step):
        logits, after = f(params, TOKENS[5:8], past, torch.tensor(2))
        close(logits, model.extend(params, TOKENS[:8])[0][5:])
        again = model.extend(params, TOKENS[7:10], after)[0]
        close(again, model.extend(params, TOKENS[:10])[0][7:])


def test_matrices_of_recurrent_layers_are_quantized_and_fitted(made):
    model, params = made
    params = fa.cast(torch.float32)(params)
    tokens = fa.random.randint(fa.key(4), (200,), 0, 40)
    plain, wanted = fa.quantize(fa.int4(group=4))(params), model.extend(params, tokens)[0]
    fitted = fa.gptq(model, tokens, fa.int4(group=4))(params)
    names = {path for path, _ in tree.items(params) if path.endswith(("mixer_in", "mixer_out"))}
    assert len(names) == 2 * len(model.config.recurrent_layers)
    for tree_ in (plain, fitted):
        records = {path.removesuffix(".codes") for path, _ in tree.items(tree_) if "codes" in path}
        assert names <= records
    heard = {}
    with fa.taps.listening(lambda name, x: heard.setdefault(name, x)):
        model.extend(params, tokens)
    x, weight = heard["layers.0.mixer.input"], params.layers[0].mixer_in
    error = lambda p: (fa.layers.linear(p.layers[0].mixer_in, x) - x @ weight.mT).square().mean()
    assert error(fitted) < error(plain)
    adapted = fa.lora(2, r".*\.mixer_in")(fa.key(5), params)
    close(model.extend(adapted, tokens)[0], wanted, rtol=1e-4, atol=1e-4)


def test_what_a_state_cannot_do_is_refused_with_the_remedy(made):
    model, params = made
    _, past = read(model, params, TOKENS[:4], room(model))
    _, delta = model.extend(params, TOKENS[4:7], past)
    with pytest.raises(TypeError, match=r"recurrent state cannot be shortened\. Keep the older"):
        caches.with_length(past, torch.tensor(2))
    assert caches.with_length(past, torch.tensor(4)) is past
    grid = fa.sharding.Grid(tensor=2)
    with pytest.raises(ValueError, match="model should be one of attention alone over a Grid"):
        fa.shard_map(model, grid)
    with pytest.raises(ValueError, match="index should be None for recurrent layers"):
        fa.commit(past, delta, index=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="mask should be None for a model with recurrent layers"):
        model.extend(params, TOKENS[:4], mask=masks.causal(4))
    count, rows = len(model.config.recurrent_layers), len(model.config.attention_layers)
    with pytest.raises(
        ValueError, match=f"with the states of {count} recurrent layers, got one with 0"
    ):
        model.extend(params, TOKENS[:4], past.rows)
    sizes = ("kv_heads", "latent_size", "rotary_size", "positions")  # of the rows of its cache
    same = {name: getattr(model.config, name) for name in sizes}
    plain = fa.decoder(dataclasses.replace(SMALL, layers=rows, **same))
    with pytest.raises(
        ValueError, match=f"with the states of 0 recurrent layers, got one with {count}"
    ):
        plain.extend(plain.init(fa.key(0)), TOKENS[:4], past)


class Rows:
    """A `Hybrid` without states, as a kind for the laws of caches."""

    empty = staticmethod(lambda *sizes: caches.Hybrid(fa.Cache.empty(*sizes), ()))


@pytest.mark.parametrize("law", laws.cache, ids=lambda law: law.__name__)
def test_its_rows_keep_the_laws_of_caches(law):
    refuses = law.__name__ == "entries_beyond_length_are_unobservable"  # shortens the cache
    with pytest.raises(TypeError, match="cannot be shortened") if refuses else nullcontext():
        law(Rows, 5, fa.key(6))


def test_a_text_continues_a_memory(made):
    """A learned prefix: seen by attention, before the beginning of every state."""
    model, params = made
    rows = room(model, 3).rows
    k, v = (fa.random.normal(fa.key(i), tuple(x.shape)).double() for i, x in enumerate(rows[:2]))
    memory = fa.Memory(k, v, torch.tensor(3))
    whole = model.extend(params, TOKENS, fa.Branch(memory, room(model)))[0]
    begun = fa.Branch(memory, room(model))
    tokens, _ = fa.generate(fa.key(0), model, params, TOKENS[:9], begun, steps=4)
    for begin in range(4):
        text = torch.cat([TOKENS[:9], tokens[:begin]])
        last = model.extend(params, text, fa.Branch(memory, room(model)))[0][-1]
        assert int(last.argmax()) == int(tokens[begin])
    assert not torch.allclose(whole, model.extend(params, TOKENS)[0])


def test_a_config_says_what_recurrent_layers_need():
    for fields, wanted in (
        ({"mixers": ("attention",)}, "a tuple of 3 of attention"),
        ({"mixers": ("short_convolution",) * 3}, "at least with attention"),
        ({"mixers": ("attention", "attention", "magic")}, "one a layer"),
        ({"mixers": ("attention", "attention", "short_convolution")}, "convolution_size"),
        (
            {
                "mixers": ("attention", "attention", "short_convolution"),
                "convolution_size": 3,
                "rope_scaling": fa.layers.RopeScaling("dynamic", factor=2.0, context=64),
            },
            "rope_scaling should be one whose angles do not follow the length",
        ),
        ({"mixer_factors": (1.0,)}, "a tuple of 7 numbers"),
        ({"mixer_norm": "late", "mixers": ("attention",) * 3}, "mixer_norm should be one of"),
        (
            {
                "mixers": ("attention", "none", "attention"),
                "feed_forward_layers": (True, False, True),
            },
            "False in layer 1",
        ),
        (
            {"parallel": True, "feed_forward_layers": (True, False, True)},
            "parallel should be False",
        ),
        ({"attention_gate": "wide"}, "attention_gate should be one of"),
    ):
        with pytest.raises(ValueError, match=wanted):
            dataclasses.replace(SMALL, **fields)


@pytest.mark.parametrize("gate", ["width", "head"])
def test_an_attention_gate_multiplies_the_output_of_its_heads(gate):
    """Gates of zero rows are a factor of one half, which o can have instead."""
    plain = fa.decoder(dataclasses.replace(SMALL, layers=1))
    gated = fa.decoder(dataclasses.replace(SMALL, layers=1, attention_gate=gate))
    params = fa.cast(torch.float64)(gated.init(fa.key(0)))
    (layer,) = params.layers
    closed = layer._replace(attention_gate=torch.zeros_like(layer.attention_gate))
    halved = layer._replace(attention_gate=(), o=layer.o / 2)
    close(
        gated.extend(params._replace(layers=(closed,)), TOKENS)[0],
        plain.extend(params._replace(layers=(halved,)), TOKENS)[0],
    )
    shut = torch.zeros_like(layer.attention_gate)
    shut[: shut.shape[0] // 2] = layer.attention_gate[: shut.shape[0] // 2]  # of the first head
    by_hand = layer._replace(attention_gate=shut)
    second = layer.o.clone()
    second[:, :8] = 0  # the first head is left out
    without = layer._replace(o=second)
    half = layer._replace(attention_gate=(), o=second / 2)
    close(
        gated.extend(params._replace(layers=(by_hand._replace(o=second),)), TOKENS)[0],
        plain.extend(params._replace(layers=(half,)), TOKENS)[0],
    )
    assert not torch.equal(
        gated.extend(params._replace(layers=(without,)), TOKENS)[0],
        gated.extend(params._replace(layers=(by_hand._replace(o=second),)), TOKENS)[0],
    )
