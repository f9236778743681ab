"""Compiled models: every function equals that of the model, every transform works, a step copies no
past, a donated past is gone.

Laws run with Dynamo alone (backend "eager": the same graphs, no C++); three tests run what the
compiler makes of them.
"""

import dataclasses
import re
from typing import NamedTuple

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import funcattn as fa
from funcattn import caches
from funcattn.caches import Branch
from funcattn.compilation.stack import Stack

CONFIG = fa.Config(
    vocabulary=40,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    feed_forward=48,
    context=600,
)
FAMILIES = {
    "llama": CONFIG,
    "windows, caps, norms around": dataclasses.replace(
        CONFIG,
        window=5,
        window_layers=(True, False),
        attention_cap=3.0,
        logit_cap=5.0,
        norm_placement="around",
        norm_offset=1.0,
        local_rope_base=100.0,
        embedding_scale=2.0,
        head_norm="rms",
    ),
    "layer norms, learned positions": dataclasses.replace(
        CONFIG,
        norm="layer",
        norm_bias=True,
        positions="learned",
        gated=False,
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
    ),
    "sinks and experts": dataclasses.replace(
        CONFIG,
        sinks=True,
        experts=4,
        experts_per_token=2,
        expert_size=16,
        expert_layers=(True, False),
    ),
    "side by side": dataclasses.replace(
        CONFIG, norm="layer", parallel=True, shared_norm=True, tied=False
    ),
}


def tokens(n, seed=0):
    return fa.random.randint(fa.key(seed), (n,), 0, 40)


@pytest.fixture(scope="module")
def made():
    """Name -> (config's model, the same compiled by Dynamo alone, weights stored by columns), each
    once.
    """
    kept = {}

    def make(name):
        if name not in kept:
            model = fa.decoder(FAMILIES[name])
            params = fa.cast(torch.float64)(fa.tree.map(lambda w: w + 0.1, model.init(fa.key(1))))
            params = fa.tree.map(lambda w: w.mT.contiguous().mT if w.dim() == 2 else w, params)
            kept[name] = model, fa.compile(model, backend="eager"), params
        return kept[name]

    return make


def pasts(model, params):
    """A short one, one beyond the first bucket, one that fills its capacity, and one behind a
    prefix.
    """
    kept = lambda n, size, seed: model.apply(
        params, tokens(n, seed), model.cache(size, dtype=torch.float64)
    )[1]
    branch = Branch(kept(20, 30, 1), kept(3, 9, 2))
    return [kept(4, 50, 3), kept(140, 300, 4), kept(7, 8, 5), branch]


def remembered(past):
    """The rows that count; the others may hold anything."""
    if isinstance(past, Branch):
        return remembered(past.prefix), remembered(past.tail)
    return past.k[..., : past.length, :], past.v[..., : past.length, :], past.length


QUICK = ("llama",)  # to compile; the others are slow


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in FAMILIES],
)
def test_a_step_is_that_of_the_model(made, name):
    model, fast, params = made(name)
    for T in (1, 3):
        for past in pasts(model, params):
            if int(past.length) + T > caches.capacity(past):
                continue
            wanted, got = (
                model.extend(params, tokens(T, 9), past),
                fast.extend(params, tokens(T, 9), past),
            )
            torch.testing.assert_close(got, wanted)
            ours, theirs = (
                fast.apply(params, tokens(T, 9), past),
                model.apply(params, tokens(T, 9), past),
            )
            torch.testing.assert_close(ours[0], theirs[0])
            torch.testing.assert_close(remembered(ours[1]), remembered(theirs[1]))
            x = model.hidden(params, tokens(T, 9), past)[0]
            torch.testing.assert_close(fast.logits(params, x[-1]), model.logits(params, x[-1]))


def test_what_lies_beyond_the_length_is_unobservable(made):
    model, fast, params = made("llama")
    past = pasts(model, params)[0]
    poisoned = past._replace(k=past.k.clone(), v=past.v.clone())
    for rows in (poisoned.k, poisoned.v):
        rows[..., int(past.length) :, :] = float("nan")
    torch.testing.assert_close(
        fast.extend(params, tokens(1), poisoned)[0], model.extend(params, tokens(1), past)[0]
    )


def test_an_empty_past_is_no_past(made):
    model, fast, params = made("llama")
    torch.testing.assert_close(
        fast.extend(params, tokens(1), fast.cache(5, dtype=torch.float64)),
        model.extend(params, tokens(1), model.cache(5, dtype=torch.float64)),
    )
    torch.testing.assert_close(fast.hidden(params, tokens(1)), model.hidden(params, tokens(1)))


def test_generation_and_streaming_take_it_as_any_model(made):
    model, fast, params = made("llama")
    prompt = tokens(30, 6)
    wanted, after = fa.generate(
        fa.key(0), model, params, prompt, steps=12, sampler=fa.sampling.temperature(1.0)
    )
    got, cache = fa.generate(
        fa.key(0), fast, params, prompt, steps=12, sampler=fa.sampling.temperature(1.0)
    )
    assert torch.equal(got, wanted)
    torch.testing.assert_close(cache, after)
    streamed = list(
        fa.stream(fa.key(0), fast, params, prompt, steps=12, sampler=fa.sampling.temperature(1.0))
    )
    assert streamed[-1].tokens == tuple(wanted.tolist())


def test_futures_under_vmap_are_those_of_the_loop(made):
    model, fast, params = made("llama")
    _, past = fast.apply(params, tokens(9, 7), fast.cache(20, dtype=torch.float64))
    prompt = tokens(1, 8)
    go_on = lambda key: fa.generate(
        key, fast, params, prompt, past, steps=6, sampler=fa.sampling.temperature(1.0)
    )[0]
    keys = fa.split(fa.key(3), 5)
    assert torch.equal(vmap(go_on)(keys), torch.stack([go_on(key) for key in keys]))


def test_a_past_that_overflows_under_a_transform_is_told(made):
    model, fast, params = made("llama")
    _, past = model.apply(params, tokens(3, 1), model.cache(4, dtype=torch.float64))
    one = lambda m: lambda t, n: m.apply(params, t, past._replace(length=n))[0]
    run = lambda m: vmap(one(m))(tokens(4, 2).reshape(2, 2), torch.tensor([3, 1]))
    assert run(fast)[0].isnan().all()
    torch.testing.assert_close(run(fast), run(model), equal_nan=True)


def test_derivatives_are_those_of_the_model(made):
    model, fast, params = made("llama")
    _, past = model.apply(params, tokens(9, 7), model.cache(20, dtype=torch.float64))
    loss = lambda model: lambda params, ids: model.extend(params, ids, past)[0].logsumexp(-1).sum()
    ids = tokens(2, 8)
    assert fa.tree.allclose(
        grad(loss(fast))(params, ids), grad(loss(model))(params, ids), atol=0, rtol=0
    )
    direction = fa.tree.map(torch.ones_like, params)
    ours, theirs = (
        jvp(lambda p, m=m: loss(m)(p, ids), (params,), (direction,))[1] for m in (fast, model)
    )
    assert torch.equal(ours, theirs)
    batch = torch.stack([tokens(2, 8), tokens(2, 9)])
    each = vmap(grad(loss(fast)), (None, 0))(params, batch)
    assert fa.tree.allclose(
        fa.tree.map(lambda g: g[1], each),
        grad(loss(model))(params, batch[1]),
        atol=1e-12,
        rtol=1e-9,
    )


def test_plain_autograd_is_that_of_the_model(made):
    model, fast, params = made("llama")
    _, past = model.apply(params, tokens(9, 7), model.cache(20, dtype=torch.float64))
    found = []
    for each in (fast, model):
        norm = params.norm.clone().requires_grad_()
        each.extend(params._replace(norm=norm), tokens(1), past)[0].square().sum().backward()
        found.append(norm.grad)
    assert torch.equal(*found)


def test_taps_hear_the_compiled_model(made):
    model, fast, params = made("llama")
    _, past = model.apply(params, tokens(9, 7), model.cache(20, dtype=torch.float64))
    heard = []
    with fa.taps.listening(lambda name, x: heard.append(name) or x):
        fast.extend(params, tokens(1), past)
    assert "layers.1.output" in heard


def test_one_graph_serves_a_bucket_and_every_prompt(made):
    model, params = made("llama")[0], made("llama")[2]
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    fast = fa.compile(model, backend=backend)
    for n in (5, 40, 100):
        fa.generate(fa.key(0), fast, params, tokens(n), steps=10)
    assert len(seen) == 2  # the layers behind 128 rows, and the head
    fa.generate(fa.key(0), fast, params, tokens(120), steps=20)
    assert len(seen) == 3  # behind 256
    fa.generate(fa.key(0), fast, params, tokens(200), steps=30)
    assert len(seen) == 3


def test_records_are_compiled_once(made):
    """Tracing once changed what `linear` remembers of types, and all was compiled again at the
    second call.
    """
    model, seen = made("llama")[0], []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    class Twice(NamedTuple):  # a type that `linear` has not met
        half: torch.Tensor

    fa.layers.linear.register(Twice, lambda weight, x: 2 * (x @ weight.half.mT))
    plain = model.init(fa.key(0))
    params = plain._replace(
        layers=tuple(layer._replace(up=Twice(layer.up / 2)) for layer in plain.layers)
    )
    fast = fa.compile(model, backend=backend)
    for size in (9, 9, 30):
        fast.extend(params, tokens(1), model.apply(plain, tokens(4), model.cache(size))[1])
    assert len(seen) == 2  # layers behind 9 rows and behind 30; the head is an operator


@pytest.mark.slow
def test_weights_that_differ_in_what_is_absent_or_shared_are_told_apart(made):
    """The guards that would tell are left out: the form of the call does."""
    model, params = made("llama")[0], made("llama")[2]
    fast, token = fa.compile(model, backend="eager"), tokens(1)
    # with one token alone q would not matter
    _, past = model.apply(params, tokens(4, 1), model.cache(9, dtype=torch.float64))
    of = lambda m, params: m.extend(params, token, past)[0]
    change = lambda **fields: params._replace(
        layers=tuple(layer._replace(**fields) for layer in params.layers)
    )
    first = params.layers[0]
    trees = [
        params,
        change(q_bias=torch.ones(32, dtype=torch.float64)),
        change(k=first.v),  # one tensor in two places, and then two of the same sizes
        params,
        change(attention_norm=first.attention_norm[:1].expand(32)),  # of another stride
        params,
    ]
    for tree in trees:
        torch.testing.assert_close(of(fast, tree), of(model, tree))
    fewer = fa.compile(model, backend="eager")
    for tree in (change(k=first.v), params):
        torch.testing.assert_close(of(fewer, tree), of(model, tree))


def test_a_weight_that_was_written_into_is_read_anew(made):
    model, params = made("llama")[0], fa.tree.map(lambda w: w.clone(), made("llama")[2])
    fast = fa.compile(model, backend="eager")
    run = lambda model: model.extend(params, tokens(1), model.cache(3, dtype=torch.float64))[0]
    first = run(fast)
    assert torch.equal(run(fast), first)
    params.layers[0].q.mul_(2.0)
    torch.testing.assert_close(run(fast), run(model))


# Donation.


def test_a_donated_step_is_apply_and_copies_nothing(made):
    model, fast, params = made("llama")
    _, past = model.apply(params, tokens(9, 7), model.cache(20, dtype=torch.float64))
    wanted, after = model.apply(params, tokens(2, 8), past)
    k, v = past.k.data_ptr(), past.v.data_ptr()
    got, kept = fast.step(params, tokens(2, 8), past)
    torch.testing.assert_close(
        (got, kept.k[..., :11, :], kept.length), (wanted, after.k[..., :11, :], after.length)
    )
    assert (kept.k.data_ptr(), kept.v.data_ptr()) == (k, v)


def test_a_past_that_was_donated_is_an_error_with_all_its_forks(made):
    model, fast, params = made("llama")
    _, past = model.apply(params, tokens(9, 7), model.cache(20, dtype=torch.float64))
    fork = past
    branch = Branch(past, model.apply(params, tokens(1), model.cache(4, dtype=torch.float64))[1])
    _, kept = fast.step(params, tokens(1), past)
    for gone in (past, fork, branch):
        for use in (fast.extend, model.extend, fast.apply, model.apply):
            with pytest.raises(ValueError, match=r"was donated to fa\.compile\(model\)\.step"):
                use(params, tokens(1), gone)
    with pytest.raises(ValueError, match="was donated"):
        fa.commit(past, model.extend(params, tokens(1), kept)[1])
    assert fast.extend(params, tokens(1), kept)[0].isfinite().all()


def test_a_donated_branch_of_branches_is_gone_too(made):
    model, fast, params = made("llama")
    kept = lambda n: model.apply(params, tokens(n), model.cache(20, dtype=torch.float64))[1]
    past = Branch(kept(3), Branch(kept(2), kept(1)))
    fast.step(params, tokens(1), past)
    with pytest.raises(ValueError, match="was donated"):
        fast.extend(params, tokens(1), past)


def test_a_kernel_that_is_forced_is_not_passed_over(made, monkeypatch):
    model, fast, params = made("llama")
    past = pasts(model, params)[0]
    called = []
    monkeypatch.setattr(
        Stack, "hidden", lambda *_: called.append(1) or model.hidden(params, tokens(1), past)
    )
    with fa.kernels.use("reference"):
        fast.hidden(params, tokens(1), past)
    with torch.autocast(past.k.device.type, torch.bfloat16):
        fast.hidden(fa.cast(torch.float32)(params), tokens(1), fa.cast(torch.bfloat16)(past))
    assert not called
    fast.hidden(params, tokens(1), past)
    assert called


def test_modes_that_listen_hear_every_operation(made):
    model, fast, params = made("llama")
    past = pasts(model, params)[0]
    counts = []
    for each in (model, fast):
        with FlopCounterMode(display=False) as counter:
            each.extend(params, tokens(2), past)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_sizes_without_numbers_are_those_of_the_model(made):
    model, fast, params = made("llama")
    nowhere = fa.to("meta")
    logits = fast.extend(nowhere(params), tokens(2).to("meta"), nowhere(pasts(model, params)[0]))[0]
    assert logits.shape == (2, 40)


def test_a_prefix_that_is_differentiated_runs_as_the_model(made):
    model, fast, params = made("llama")
    branch = pasts(model, params)[3]
    found = []
    for each in (fast, model):
        k = branch.prefix.k.clone().requires_grad_()
        each.extend(params, tokens(1), Branch(branch.prefix._replace(k=k), branch.tail))[
            0
        ].square().sum().backward()
        found.append(k.grad)
    assert torch.equal(*found)
    assert found[0].any()


# What the compiler makes of it.

TINY = dataclasses.replace(CONFIG, layers=2, context=4096)


@pytest.fixture(scope="module")
def really():
    model = fa.decoder(TINY)
    return (
        model,
        fa.compile(model),
        fa.tree.map(lambda w: w.mT.contiguous().mT if w.dim() == 2 else w, model.init(fa.key(1))),
    )


@pytest.mark.real("Inductor compiles for it")
def test_compiled_tokens_are_those_of_the_model(really):
    model, fast, params = really
    wanted = fa.generate(fa.key(0), model, params, tokens(9), steps=20)[0]
    assert torch.equal(fa.generate(fa.key(0), fast, params, tokens(9), steps=20)[0], wanted)


@pytest.mark.cpu("it reads the C++ that Inductor writes")
def test_no_code_allocates_a_past(really):
    """In the C++ of a step behind 1000 of 4000 rows, the largest buffer is a layer's part of the
    bucket: no copy of the past.
    """
    model, _, params = really
    fast, past = fa.compile(model), model.cache(4000)
    past = past._replace(length=torch.tensor(1000))
    (_, _), codes = run_and_get_code(fast.extend, params, tokens(1), past)
    sizes = [
        re.findall(r"\d+", shape)
        for code in codes
        for shape in re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code)
    ]
    largest = max(torch.Size(map(int, shape)).numel() for shape in sizes)
    assert largest <= TINY.kv_heads * 1024 * TINY.head_size
    assert largest < past.k.numel() // TINY.layers  # not even of one layer of what is reserved


@pytest.mark.cpu("it reads the C++ that Inductor writes")
def test_a_vector_is_multiplied_row_by_row_where_it_is_compiled():
    weight, x = fa.random.normal(fa.key(0), (7, 5)), torch.arange(5.0)[None]
    (y,), codes = run_and_get_code(torch.compile(lambda w, x: (fa.layers.linear(w, x),)), weight, x)
    torch.testing.assert_close(y, x @ weight.T)
    assert not any("extern_kernels.mm" in code or "extern_kernels.addmm" in code for code in codes)
    narrow = torch.compile(fa.layers.linear)(weight.bfloat16(), x.bfloat16())
    # sums in float32, rounded once
    torch.testing.assert_close(narrow, (x.double() @ weight.bfloat16().double().T).bfloat16())


@pytest.mark.cpu("it reads the C++ that Inductor writes")
def test_a_few_tokens_are_multiplied_in_one_loop_over_the_matrix(really):
    model, fast, params = really
    past = model.apply(params, tokens(9), model.cache(20))[1]
    (found, codes) = run_and_get_code(lambda: fa.compile(model).hidden(params, tokens(3), past)[0])
    torch.testing.assert_close(found, model.hidden(params, tokens(3), past)[0])
    assert not any("extern_kernels.mm" in code or "extern_kernels.addmm" in code for code in codes)


# Bad input.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fa.compile("model"),
            TypeError,
            r"compile: model should be from fa\.decoder, got a str",
        ),
        (lambda: fa.compile(fa.Model(*[print] * 4)), TypeError, "got a Model"),
        (
            lambda: fa.compile(fa.decoder(CONFIG), depth=0),
            ValueError,
            "depth should be from 1 to the 2 layers, got 0",
        ),
        (lambda: fa.compile(fa.decoder(CONFIG), depth=5), ValueError, "got 5"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_steps_are_errors(made):
    model, fast, params = made("llama")
    of_dicts = lambda params: params._replace(
        layers=tuple(layer._replace(q={"q": layer.q}) for layer in params.layers)
    )
    past = pasts(model, params)[2]
    for wrong, message in (
        (lambda: fast.extend(params, torch.tensor([40]), past), "ids in 0..39, got 40"),
        (lambda: fast.extend(params, tokens(1).float(), past), "should be an integer tensor"),
        (lambda: fast.apply(params, tokens(2), past), "with room for 9 tokens"),
        (lambda: fast.step(params, tokens(1), ()), "a Cache, or a Branch of such"),
        (
            lambda: vmap(lambda t: fast.step(params, t, past))(tokens(3)[:, None]),
            "outside of every transform",
        ),
        (
            lambda: fast.extend(
                params, tokens(1), fa.decoder(dataclasses.replace(CONFIG, layers=1)).cache(4)
            ),
            "of \\(layers",
        ),
        (
            lambda: fast.extend(of_dicts(params), tokens(1), past),
            "weight should be a tensor or a record .*, got a dict",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()
