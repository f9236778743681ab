"""Scores against one softmax over all logits, perplexity against the naive loop, and runs that are
looked into and changed.
"""

import functools
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn.evaluation import score_and_greedy, windows

CONFIG = fa.Config(
    vocabulary=40, width=16, layers=2, heads=4, kv_heads=2, head_size=4, feed_forward=24
)
MODEL = fa.decoder(CONFIG)
# ten times the weights of a fresh model, so that the layers matter
PARAMS = fa.tree.map(lambda x: (x if x.dim() == 1 else 10 * x).double(), MODEL.init(fa.key(0)))
TOKENS = fa.random.randint(fa.key(1), (24,), 0, 40)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def logits_of(params, tokens, model=MODEL):
    return model.logits(params, model.hidden(params, tokens)[0])


def naive(params, tokens):
    """One softmax over all logits."""
    return (
        logits_of(params, tokens)[..., :-1, :]
        .log_softmax(-1)
        .gather(-1, tokens[..., 1:, None])[..., 0]
    )


# Scores.


@pytest.mark.parametrize("chunk", [1, 5, 23, 512])
def test_scores_are_those_of_all_logits_at_once(chunk):
    scored = lambda params, tokens: fa.score(MODEL, params, tokens, chunk=chunk)
    close(scored(PARAMS, TOKENS), naive(PARAMS, TOKENS))
    direction = fa.tree.map(torch.cos, PARAMS)
    total = lambda f: lambda params, tokens: f(params, tokens).sin().sum()
    for derive in (
        lambda f: grad(total(f))(PARAMS, TOKENS),
        lambda f: jvp(lambda p: f(p, TOKENS), (PARAMS,), (direction,))[1],
        lambda f: jvp(lambda p: grad(total(f))(p, TOKENS), (PARAMS,), (direction,))[1],
        lambda f: vmap(grad(total(f)), (None, 0))(PARAMS, TOKENS.reshape(3, 8)),
        lambda f: vmap(f, (None, 0))(PARAMS, TOKENS.reshape(3, 8)),
    ):
        got, wanted = derive(scored), derive(naive)
        for a, b in zip(fa.tree.leaves(got), fa.tree.leaves(wanted), strict=True):
            close(a, b, rtol=1e-8, atol=1e-9)  # second derivatives of order 1e3


def test_scores_of_a_batch_are_those_of_its_rows():
    rows = TOKENS.reshape(2, 3, 4)
    close(fa.score(MODEL, PARAMS, rows, chunk=5), naive(PARAMS, rows))
    close(
        fa.score(MODEL, PARAMS, rows, chunk=5),
        vmap(vmap(lambda row: fa.score(MODEL, PARAMS, row)))(rows),
    )


def test_scores_behind_a_past_are_the_last_of_the_whole():
    whole = fa.score(MODEL, PARAMS, TOKENS)
    for n in (0, 5, 23):
        past = MODEL.cache(24, dtype=torch.float64)
        past = MODEL.apply(PARAMS, TOKENS[:n], past)[1] if n else past
        close(fa.score(MODEL, PARAMS, TOKENS[n:], past, chunk=4), whole[n:])
        assert int(past.length) == n


def test_a_continuation_has_the_last_scores_of_the_whole():
    whole = fa.score(MODEL, PARAMS, TOKENS)
    for n in (1, 10, 24):
        close(fa.score_continuation(MODEL, PARAMS, TOKENS[:n], TOKENS[n:], chunk=3), whole[n - 1 :])
    past = MODEL.apply(PARAMS, TOKENS[:9], MODEL.cache(24, dtype=torch.float64))[1]
    close(fa.score_continuation(MODEL, PARAMS, TOKENS[9:12], TOKENS[12:], past), whole[11:])
    rows = TOKENS.reshape(2, 12)
    close(
        fa.score_continuation(MODEL, PARAMS, rows[:, :5], rows[:, 5:]), naive(PARAMS, rows)[:, 4:]
    )


def test_derivatives_of_a_continuation_are_those_of_all_logits_at_once():
    total = lambda f: lambda params: f(params).sin().sum()
    ours = total(
        lambda params: fa.score_continuation(MODEL, params, TOKENS[:10], TOKENS[10:], chunk=3)
    )
    reference = total(lambda params: naive(params, TOKENS)[9:])
    direction = fa.tree.map(torch.cos, PARAMS)
    for derive in (lambda f: grad(f)(PARAMS), lambda f: jvp(grad(f), (PARAMS,), (direction,))[1]):
        for got, wanted in zip(
            fa.tree.leaves(derive(ours)), fa.tree.leaves(derive(reference)), strict=True
        ):
            close(got, wanted, rtol=1e-8, atol=1e-9)


def test_what_greedy_decoding_writes_is_foretold():
    written, _ = fa.generate(fa.key(0), MODEL, PARAMS, TOKENS[:3], steps=6)
    changed = written.clone()
    changed[4] = (changed[4] + 1) % 40
    scores, likeliest = score_and_greedy(MODEL, PARAMS, TOKENS[:3], changed, chunk=2)
    assert likeliest[:4].all()
    assert not likeliest[4]
    close(scores, fa.score_continuation(MODEL, PARAMS, TOKENS[:3], changed))


def test_one_token_has_no_score():
    assert fa.score(MODEL, PARAMS, TOKENS[:1]).shape == (0,)
    assert fa.score_continuation(MODEL, PARAMS, TOKENS[:4], TOKENS[:0]).shape == (0,)


def test_probabilities_of_every_next_token_sum_to_one():
    each = vmap(lambda token: fa.score_continuation(MODEL, PARAMS, TOKENS[:5], token[None])[0])(
        torch.arange(40)
    )
    close(each.exp().sum(), torch.ones((), dtype=torch.float64))


def test_scores_of_bfloat16_weights_are_float32_and_of_float64_float64():
    assert fa.score(MODEL, fa.cast(torch.bfloat16)(PARAMS), TOKENS).dtype == torch.float32
    assert fa.score(MODEL, PARAMS, TOKENS).dtype == torch.float64


MEMORY = """
import torch, sys
import funcattn as fa
torch.set_num_threads(1)
status = lambda: open("/proc/self/status").read().split()
peak = lambda: int((words := status())[words.index("VmHWM:") + 1]) / 1024
config = fa.Config(vocabulary=32768, width=8, layers=1, heads=1, kv_heads=1, head_size=8, feed_forward=8)
model = fa.decoder(config)
params = model.init(fa.key(0))
tokens = fa.random.randint(fa.key(1), (1025,), 0, 32768)
def all_at_once(params):
    logits = model.logits(params, model.hidden(params, tokens[:-1])[0])
    return logits.log_softmax(-1).gather(-1, tokens[1:, None]).mean()
f = {"chunks": lambda params: fa.score(model, params, tokens, chunk=64).mean(), "naive": all_at_once}[sys.argv[1]]
torch.func.grad(lambda p: fa.score(model, p, tokens[:9], chunk=4).mean())(params)
before = peak()
torch.func.grad(f)(params)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_more_logits_are_held_than_a_chunk():
    """All logits are 1024 x 32768 floats, 128 MiB, and a gradient holds them thrice; a chunk of 64
    is 8 MiB.
    """
    # or glibc keeps freed blocks below 32 MiB, and counts them
    apart = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}

    def run(way):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, way],
            capture_output=True,
            text=True,
            check=True,
            env=apart,
        )
        return float(done.stdout)

    assert run("chunks") < 48  # 24 measured: two or three chunks
    assert run("naive") > 256


# Perplexity.


@pytest.mark.parametrize(
    ("context", "stride"), [(8, 4), (8, 1), (8, 7), (5, 2), (24, 12), (30, 3), (2, 1)]
)
def test_perplexity_is_the_naive_loop(context, stride):
    """The loop of Hugging Face's page on perplexity, with every target told by its number."""
    total, count, last = 0.0, 0, 0
    for begin in range(0, 24, stride):
        end = min(begin + context, 24)
        logits = logits_of(PARAMS, TOKENS[begin:end]).log_softmax(-1)
        for place in range(max(last, begin + 1), end):
            total, count = total + logits[place - 1 - begin, TOKENS[place]].item(), count + 1
        last = end
        if end == 24:
            break
    assert count == 23
    got = fa.perplexity(MODEL, PARAMS, TOKENS, context=context, stride=stride, chunk=3)
    close(got, torch.tensor(math.exp(-total / count), dtype=torch.float64))


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 24])
@pytest.mark.parametrize(("context", "stride"), [(2, 1), (8, 1), (8, 4), (8, 7), (5, 2)])
def test_windows_score_each_token_once_with_enough_before_it(length, context, stride):
    found = windows(length, context=context, stride=stride)
    assert [place for window in found for place in range(window.first, window.end)] == list(
        range(1, length)
    )
    for begin, first, end in found:
        assert end - begin <= context
        assert first - begin >= (context - stride if begin else 1)


def test_perplexity_of_a_text_that_fits_is_that_of_its_scores():
    close(fa.perplexity(MODEL, PARAMS, TOKENS), (-fa.score(MODEL, PARAMS, TOKENS).mean()).exp())
    close(fa.perplexity(MODEL, PARAMS, TOKENS, context=24), fa.perplexity(MODEL, PARAMS, TOKENS))


def test_perplexity_composes():
    rows = TOKENS.reshape(2, 12)
    f = lambda params, tokens: fa.perplexity(MODEL, params, tokens, context=6, stride=2)
    each = vmap(f, (None, 0))(PARAMS, rows)
    close(each, torch.stack([f(PARAMS, row) for row in rows]))
    close(f(PARAMS, rows), each.prod().sqrt())  # the geometric mean, rows being of one length
    direction = fa.tree.map(torch.cos, PARAMS)
    slope = sum(
        (g * d).sum()
        for g, d in zip(*map(fa.tree.leaves, (grad(f)(PARAMS, rows[0]), direction)), strict=True)
    )
    close(jvp(lambda params: f(params, rows[0]), (PARAMS,), (direction,))[1], slope)


# Activations.

NAMES = [
    "attention.input",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.mixed",
    "attention.output",
]
NAMES += ["feed_forward.input", "feed_forward.inner", "feed_forward.output", "output"]
ALL = ["embedding", *[f"layers.{i}.{name}" for i in range(2) for name in NAMES], "output"]


def test_a_traced_run_has_the_logits_of_the_run():
    logits, seen = fa.trace(MODEL, PARAMS, TOKENS)
    assert torch.equal(logits, logits_of(PARAMS, TOKENS))
    assert list(seen) == ALL
    assert torch.equal(seen["output"], MODEL.hidden(PARAMS, TOKENS)[0])
    close(
        seen["layers.0.output"],
        seen["embedding"]
        + seen["layers.0.attention.output"]
        + seen["layers.0.feed_forward.output"],
    )


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        (r"layers\.\d\.output", ["layers.0.output", "layers.1.output"]),
        ("output", ["output"]),
        (lambda name: name.endswith(".q"), ["layers.0.attention.q", "layers.1.attention.q"]),
        (["output", "embedding"], ["embedding", "output"]),
        ((name for name in ["output"]), ["output"]),
        ({"output"}, ["output"]),
    ],
)
def test_a_trace_holds_what_was_asked_for(where, chosen):
    assert list(fa.trace(MODEL, PARAMS, TOKENS, where)[1]) == chosen


def test_a_trace_behind_a_past_sees_the_new_tokens():
    past = MODEL.apply(PARAMS, TOKENS[:20], MODEL.cache(30, dtype=torch.float64))[1]
    logits, seen = fa.trace(MODEL, PARAMS, TOKENS[20:], "layers.1.output", cache=past)
    whole, all_seen = fa.trace(MODEL, PARAMS, TOKENS, "layers.1.output")
    close(logits, whole[20:])
    close(seen["layers.1.output"], all_seen["layers.1.output"][20:])


def test_experts_have_a_router_to_look_at():
    model = fa.decoder(fa.Config(layers=1, experts=4, experts_per_token=2, expert_size=8))
    _, seen = fa.trace(model, model.init(fa.key(0)), TOKENS, ".*feed_forward.*")
    assert list(seen) == [f"layers.0.feed_forward.{name}" for name in ("input", "router", "output")]
    assert seen["layers.0.feed_forward.router"].shape == (24, 4)


@pytest.mark.parametrize("name", ALL)
def test_patching_with_what_is_there_changes_nothing(name):
    logits, seen = fa.trace(MODEL, PARAMS, TOKENS)
    assert torch.equal(fa.patch(MODEL, PARAMS, TOKENS, {name: seen[name]}), logits)
    assert torch.equal(fa.patch(MODEL, PARAMS, TOKENS, {name: lambda x: x}), logits)
    assert not torch.allclose(fa.patch(MODEL, PARAMS, TOKENS, {name: lambda x: 2 * x + 1}), logits)


def test_activation_patching_carries_one_prompt_into_another():
    """All of a layer's residual makes the other prompt's logits; that of the last token, its last
    logits only.
    """
    other = fa.random.randint(fa.key(2), (24,), 0, 40)
    wanted, seen = fa.trace(MODEL, PARAMS, other)
    own = logits_of(PARAMS, TOKENS)
    for name in ("embedding", "layers.0.output", "layers.1.output"):
        close(fa.patch(MODEL, PARAMS, TOKENS, {name: seen[name]}), wanted)
    last = lambda x: torch.cat([x[:-1], seen["layers.1.output"][-1:]])
    mixed = fa.patch(MODEL, PARAMS, TOKENS, {"layers.1.output": last})
    close(mixed[-1], wanted[-1])
    close(mixed[:-1], own[:-1])


def test_a_gradient_in_an_activation_is_its_slope():
    _, seen = fa.trace(MODEL, PARAMS, TOKENS)
    for name in ALL:
        f = lambda x, name=name: fa.patch(MODEL, PARAMS, TOKENS, {name: x})[-1, 7]
        x, direction = seen[name], seen[name].cos()
        slope = (grad(f)(x) * direction).sum()
        close(jvp(f, (x,), (direction,))[1], slope)
        h = 1e-5  # truncation of order h^2, rounding of order 1e-16 / h
        torch.testing.assert_close(
            slope, (f(x + h * direction) - f(x - h * direction)) / (2 * h), rtol=1e-6, atol=1e-8
        )


def test_gradients_of_all_layers_at_once_are_those_one_by_one():
    """Attribution: nudge every residual by nothing, and differentiate in the nudge."""
    names = [f"layers.{i}.output" for i in range(2)]
    _, seen = fa.trace(MODEL, PARAMS, TOKENS, names)

    def nudged(nudges):
        changes = {name: lambda x, by=by: x + by for name, by in nudges.items()}
        return fa.patch(MODEL, PARAMS, TOKENS, changes)[-1, 7]

    together = grad(nudged)({name: torch.zeros_like(x) for name, x in seen.items()})
    for name in names:
        close(
            together[name],
            grad(lambda x, name=name: fa.patch(MODEL, PARAMS, TOKENS, {name: x})[-1, 7])(
                seen[name]
            ),
        )


def test_many_patches_at_once_are_one_by_one():
    """Each place of the residual knocked out in turn, under vmap; and its gradient."""
    name = "layers.0.output"
    without = lambda place: {
        name: lambda x: torch.where(torch.arange(24).unsqueeze(-1) == place, 0, x)
    }
    knocked = lambda place: fa.patch(MODEL, PARAMS, TOKENS, without(place))[-1]
    places = torch.arange(24)
    close(vmap(knocked)(places), torch.stack([knocked(place) for place in places]))
    _, seen = fa.trace(MODEL, PARAMS, TOKENS, [name])
    f = lambda x: fa.patch(MODEL, PARAMS, TOKENS, {name: x})[-1].sin().sum()
    patches = torch.stack([seen[name], 2 * seen[name], seen[name].cos()])
    close(vmap(grad(f))(patches), torch.stack([grad(f)(x) for x in patches]))
    second = lambda x: jvp(grad(f), (x,), (x.cos(),))[1]
    close(vmap(second)(patches), torch.stack([second(x) for x in patches]))


def test_a_trace_goes_through_transforms():
    rows = TOKENS.reshape(3, 8)
    logits, seen = vmap(lambda row: fa.trace(MODEL, PARAMS, row, "layers.0.output"))(rows)
    for n, row in enumerate(rows):
        wanted = fa.trace(MODEL, PARAMS, row, "layers.0.output")
        close(logits[n], wanted[0])
        close(seen["layers.0.output"][n], wanted[1]["layers.0.output"])
    f = lambda params: (
        fa.trace(MODEL, params, TOKENS, "layers.1.output")[1]["layers.1.output"].sin().sum()
    )
    direction = fa.tree.map(torch.cos, PARAMS)
    slope = sum(
        (g * d).sum()
        for g, d in zip(*map(fa.tree.leaves, (grad(f)(PARAMS), direction)), strict=True)
    )
    close(jvp(f, (PARAMS,), (direction,))[1], slope)


def test_what_follows_a_change_is_traced():
    double = {"layers.0.output": lambda x: 2 * x}
    logits, seen = fa.trace(MODEL, PARAMS, TOKENS, changes=double)
    plain = fa.trace(MODEL, PARAMS, TOKENS)[1]
    assert torch.equal(logits, fa.patch(MODEL, PARAMS, TOKENS, double))
    assert torch.equal(seen["layers.0.output"], 2 * plain["layers.0.output"])
    assert not torch.allclose(seen["layers.1.output"], plain["layers.1.output"])


def test_a_model_that_rematerializes_is_looked_into_too():
    logits, seen = fa.trace(fa.decoder(CONFIG, remat=True), PARAMS, TOKENS)
    assert list(seen) == ALL
    close(logits, logits_of(PARAMS, TOKENS))


def test_runs_in_other_threads_are_not_heard():
    elsewhere = []

    def change(x):
        thread = threading.Thread(target=lambda: elsewhere.append(logits_of(PARAMS, TOKENS)))
        thread.start()
        thread.join()
        return 2 * x

    fa.patch(MODEL, PARAMS, TOKENS, {"embedding": change})
    assert torch.equal(elsewhere[0], logits_of(PARAMS, TOKENS))


def test_a_failed_run_leaves_no_listener():
    with pytest.raises(ZeroDivisionError):
        fa.patch(MODEL, PARAMS, TOKENS, {"embedding": lambda x: x / (1 // 0)})
    assert torch.equal(logits_of(PARAMS, TOKENS), fa.trace(MODEL, PARAMS, TOKENS)[0])


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: fa.score(MODEL, PARAMS, [1, 2]),
            TypeError,
            "score: tokens should be an integer tensor, got a list",
        ),
        (
            lambda: fa.score(MODEL, PARAMS, TOKENS.double()),
            TypeError,
            r"got torch\.float64\. Pass token ids",
        ),
        (lambda: fa.score(MODEL, PARAMS, TOKENS[:0]), ValueError, r"T at least 1, got \(0,\)"),
        (lambda: fa.score(MODEL, PARAMS, torch.tensor(1)), ValueError, r"T at least 1, got \(\)"),
        (lambda: fa.score(MODEL, PARAMS, torch.tensor([1, 40])), ValueError, r"ids in 0\.\.39"),
        (
            lambda: fa.score(MODEL, PARAMS, torch.tensor([41, 4])),
            ValueError,
            r"ids in 0\.\.39, got 41",
        ),
        (
            lambda: vmap(lambda t: fa.score(MODEL, PARAMS, t))(torch.tensor([[1, 2], [1, -2]])),
            ValueError,
            r"ids in 0\.\.39",
        ),
        (
            lambda: fa.score(MODEL, PARAMS, TOKENS, chunk=0),
            ValueError,
            "chunk should be at least 1, got 0",
        ),
        (
            lambda: fa.score_continuation(MODEL, PARAMS, TOKENS[None], TOKENS),
            ValueError,
            r"continuation should be \(1, 'N'\), as the prompt leads, got \(24,\)",
        ),
        (
            lambda: fa.score_continuation(MODEL, PARAMS, TOKENS[:0], TOKENS),
            ValueError,
            "prompt should be .* at least 1",
        ),
        (lambda: fa.perplexity(MODEL, PARAMS, TOKENS[:1]), ValueError, "T at least 2"),
        (
            lambda: fa.perplexity(MODEL, PARAMS, TOKENS, context=1),
            ValueError,
            "context should be at least 2 tokens, got 1",
        ),
        (
            lambda: fa.perplexity(MODEL, PARAMS, TOKENS, context=8, stride=8),
            ValueError,
            "from 1 to context - 1 = 7, got 8",
        ),
        (lambda: fa.perplexity(MODEL, PARAMS, TOKENS, context=8, stride=0), ValueError, "got 0"),
        (
            lambda: fa.trace(MODEL, PARAMS, TOKENS, ["layers.0.outputs"]),
            ValueError,
            r"got 'layers\.0\.outputs'\. Did you mean 'layers\.0\.output'",
        ),
        (
            lambda: fa.patch(MODEL, PARAMS, TOKENS, {"layer.1.attention.q": lambda x: x}),
            ValueError,
            r"patch: changes should be names of taps, got 'layer\.1\.attention\.q'\. Did you mean 'layers\.1\.attention\.q'",
        ),
        (
            lambda: fa.trace(MODEL, PARAMS, TOKENS, "layers"),
            ValueError,
            "none by 'layers'. A whole name must match; there are 22",
        ),
        (lambda: fa.trace(MODEL, PARAMS, TOKENS, []), ValueError, r"none by \[\]"),
        (
            lambda: fa.trace(MODEL, PARAMS, TOKENS, "layers.("),
            ValueError,
            "where should be a regex",
        ),
        (
            lambda: fa.patch(MODEL, PARAMS, TOKENS, {"embedding": torch.zeros(3, 16).double()}),
            ValueError,
            r"the change of embedding should be \(24, 16\) as the activation, got \(3, 16\)",
        ),
        (
            lambda: fa.patch(MODEL, PARAMS, TOKENS, {"embedding": lambda x: x.float()}),
            TypeError,
            r"a tensor of torch\.float64, got torch\.float32",
        ),
        (
            lambda: fa.patch(MODEL, PARAMS, TOKENS, {"embedding": lambda x: None}),
            TypeError,
            "got a NoneType",
        ),
        (
            lambda: torch.compile(
                lambda t: fa.trace(MODEL, PARAMS, t)[0], backend="eager", fullgraph=True
            )(TOKENS),
            Exception,
            "outside of torch.compile",
        ),
        (
            lambda: fa.trace(
                MODEL._replace(hidden=lambda *a, **k: (TOKENS, None), logits=lambda params, x: x),
                PARAMS,
                TOKENS,
            ),
            ValueError,
            "one with taps, got one without",
        ),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
