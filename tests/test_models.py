"""A Model is a value that knows what it is: for every wrapper w and every verb v, v(w(model)) is v
of what w says.

Wrappers: a replaced function, `fa.sharding.candidates`, `fa.compile`, `fa.shard_map` over a Grid,
and these in each other.
"""

import dataclasses
import functools
import gc
import inspect
import itertools
import subprocess
import sys
import weakref

import pytest
import torch
from torch.func import vmap

import funcattn as fa
from funcattn import drafters, search, serving
from funcattn.models import config_of
from funcattn.quantization import tiles
from funcattn.sharding import Grid

CONFIG = fa.Config(
    vocabulary=16, width=8, layers=2, heads=2, kv_heads=2, head_size=4, feed_forward=8
)
MODEL = fa.decoder(CONFIG)
PARAMS = fa.tree.map(lambda x: 8 * x if x.dim() == 2 else x, MODEL.init(fa.key(0)))
PROMPT = torch.tensor([1, 2, 3, 1, 2])
DRAFT = torch.tensor([3, 1])


def shifted(params, x):
    """Logits in another order, so that every text is another one."""
    return MODEL.logits(params, x).roll(1, -1)


def bent(params, tokens, cache=(), **options):
    x, delta = MODEL.hidden(params, tokens, cache, **options)
    return x.roll(1, -1), delta


def twice_bent(params, tokens, cache=(), **options):
    x, delta = bent(params, tokens, cache, **options)
    return x.roll(1, -1), delta


# A wrapper -> the model that says what it says, made of nothing but functions.
compiled = lambda model: fa.compile(model, backend="eager")
FAST = compiled(MODEL)
WRAPPERS = {
    "logits": (MODEL._replace(logits=shifted), None, shifted),
    "hidden": (MODEL._replace(hidden=bent), bent, None),
    "both": (MODEL._replace(hidden=bent)._replace(logits=shifted), bent, shifted),
    "compiled": (FAST, None, None),
    "compiled logits": (compiled(MODEL._replace(logits=shifted)), None, shifted),
    "logits of compiled": (FAST._replace(logits=shifted), None, shifted),
    "hidden of compiled": (FAST._replace(hidden=bent), bent, None),
    "compiled twice": (compiled(FAST), None, None),
    "sharded": (fa.shard_map(MODEL, Grid(tensor=2)), None, None),
    "sharded logits": (fa.shard_map(MODEL._replace(logits=shifted), Grid(data=1)), None, shifted),
    "sharded hidden": (fa.shard_map(MODEL._replace(hidden=bent), Grid(tensor=2)), bent, None),
    "logits of sharded": (
        fa.shard_map(MODEL, Grid(tensor=2))._replace(logits=shifted),
        None,
        shifted,
    ),
}
CANDIDATES = {
    "candidates": fa.sharding.candidates(MODEL, 3),
    "compiled candidates": compiled(fa.sharding.candidates(MODEL, 3)),
    "candidates of compiled": fa.sharding.candidates(FAST, 3),
    "sharded candidates": fa.shard_map(fa.sharding.candidates(MODEL, 3), Grid(tensor=2)),
}


@functools.cache
def wanted(verb, hidden, logits):
    return VERBS[verb](plain(hidden, logits))


def plain(hidden, logits):
    """A model of these functions that nothing is known of."""
    return fa.Model(MODEL.init, MODEL.cache, hidden or MODEL.hidden, logits or MODEL.logits)


def served(model):
    slots = serving.idle(model, PARAMS, MODEL.cache(12), 2)
    slots = serving.enter(fa.key(1), model, PARAMS, PROMPT, slots, 1, steps=3)
    tokens = []
    for _ in range(3):
        step, slots = serving.step(model, PARAMS, slots)
        tokens.append(step.token[1])
    return torch.stack(tokens)


def guided(model):
    logits, past = model.apply(PARAMS, PROMPT[:2], MODEL.cache(12))
    sampler = fa.sampling.chain(
        fa.sampling.guidance(1.5, model, PARAMS, past, logits[-1]), fa.sampling.greedy
    )
    return fa.generate(fa.key(1), MODEL, PARAMS, PROMPT, steps=3, sampler=sampler)[0]


PAST = MODEL.apply(PARAMS, PROMPT, MODEL.cache(12))[1]
VERBS = {
    "extend": lambda m: m.extend(PARAMS, PROMPT)[0],
    "extend behind a past": lambda m: m.extend(PARAMS, DRAFT, PAST)[0],
    "extend with positions": lambda m: m.extend(
        PARAMS, PROMPT, mask=torch.eye(5) > 0, positions=torch.arange(5) + 3
    )[0],
    "apply": lambda m: m.apply(PARAMS, DRAFT, PAST)[0],
    "apply's past": lambda m: m.extend(PARAMS, DRAFT, m.apply(PARAMS, DRAFT, PAST)[1])[0],
    "generate": lambda m: fa.generate(fa.key(1), m, PARAMS, PROMPT, steps=4)[0],
    "generate, drawn": lambda m: fa.generate(
        fa.key(1), m, PARAMS, PROMPT, steps=4, sampler=fa.sampling.temperature(1.0)
    )[0],
    "stream": lambda m: torch.tensor(
        [piece.tokens for piece in fa.stream(fa.key(1), m, PARAMS, PROMPT, steps=4)][-1]
    ),
    "speculate": lambda m: (
        fa.speculate(fa.key(1), m, PARAMS, drafters.prompt_lookup(), PROMPT, steps=4)[0].tokens
    ),
    "drafted by itself": lambda m: (
        fa.speculate(fa.key(1), m, PARAMS, drafters.model(m, PARAMS), PROMPT, steps=4)[0].tokens
    ),
    "beams": lambda m: search.beam_search(m, PARAMS, PROMPT, steps=3, beams=2, best=2).tokens,
    "best of": lambda m: (
        search.best_of(
            fa.key(1), m, PARAMS, PROMPT, n=2, steps=3, sampler=fa.sampling.temperature(1.0)
        ).scores
    ),
    "serving": served,
    "guidance": guided,
    "score": lambda m: fa.score(m, PARAMS, PROMPT),
    "score in chunks": lambda m: fa.score(m, PARAMS, PROMPT, chunk=2),
    "loss": lambda m: fa.loss(m, PARAMS, PROMPT),
    "trace": lambda m: fa.trace(m, PARAMS, PROMPT)[0],
    "patch": lambda m: fa.patch(m, PARAMS, PROMPT, {"embedding": lambda x: 2 * x}),
}


FEW = ("extend behind a past", "generate", "beams", "score")  # of what takes long to compile
CASES = [
    (wrapper, verb)
    for wrapper, verb in itertools.product(WRAPPERS, VERBS)
    # shapes inside are those of a device
    if not (wrapper.startswith("sharded") and verb in ("serving", "patch", "trace"))
    if wrapper not in ("compiled logits", "compiled twice") or verb in FEW
]


@pytest.mark.parametrize(("wrapper", "verb"), CASES)
def test_every_verb_of_a_wrapped_model_is_that_of_what_the_wrapper_says(wrapper, verb):
    model, hidden, logits = WRAPPERS[wrapper]
    torch.testing.assert_close(
        VERBS[verb](model), wanted(verb, hidden, logits), rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize("wrapper", CANDIDATES)
def test_candidates_stay_candidates_in_every_wrapper(wrapper):
    model, said = CANDIDATES[wrapper], plain(None, CANDIDATES["candidates"].logits)
    for verb in FEW:
        torch.testing.assert_close(VERBS[verb](model), VERBS[verb](said), rtol=2e-4, atol=2e-4)
    assert model.extend(PARAMS, PROMPT)[0].isfinite().sum(-1).tolist() == [3] * 5


# Two wrappers in both orders, and what they say together: functions that the outer one puts in
# count.

FEWER = fa.sharding.candidates(MODEL, 3).logits
WRAP = {
    "compile": (compiled, {}),
    "candidates": (lambda model: fa.sharding.candidates(model, 3), {"logits": FEWER}),
    "logits": (lambda model: model._replace(logits=shifted), {"logits": shifted}),
    "hidden": (lambda model: model._replace(hidden=bent), {"hidden": bent}),
    "shard_map": (lambda model: fa.shard_map(model, Grid(tensor=2)), {}),
    "patched": (
        lambda model: fa.patched(model, {"output": lambda x: x.roll(1, -1)}),
        {"hidden": bent},
    ),
}
PAIRED = (
    "extend",
    "extend behind a past",
    "apply",
    "generate",
    "stream",
    "speculate",
    "beams",
    "score",
    "loss",
)
# of whose logits the k best are chosen
REFUSED = {("logits", "candidates"), ("candidates", "candidates")}
AGAIN = fa.decoder(CONFIG, remat=True)


@pytest.mark.parametrize(("inner", "outer"), [*itertools.product(WRAP, WRAP)])
def test_two_wrappers_say_what_they_say_in_either_order(inner, outer):
    if (inner, outer) in REFUSED:
        with pytest.raises(TypeError, match=r"candidates: .* got a Model with another logits"):
            WRAP[outer][0](WRAP[inner][0](MODEL))
        return
    if inner == outer == "shard_map":
        with pytest.raises(ValueError, match="divisible into 2 parts along 'tensor'"):
            WRAP[outer][0](WRAP[inner][0](MODEL)).extend(PARAMS, PROMPT)
        return
    says = WRAP[inner][1] | WRAP[outer][1]
    # which both turn what the other gives
    if outer == "patched" and inner in ("hidden", "patched"):
        says = says | {"hidden": twice_bent}
    for core in (MODEL, AGAIN):
        model = WRAP[outer][0](WRAP[inner][0](core))
        for verb in PAIRED if core is MODEL else ("extend", "extend behind a past", "loss"):
            said = wanted(verb, says.get("hidden"), says.get("logits"))
            torch.testing.assert_close(
                VERBS[verb](model),
                said,
                rtol=2e-4,
                atol=2e-4,
                msg=lambda m, verb=verb: f"{verb}: {m}",
            )


@pytest.mark.parametrize("wrapper", WRAP)
def test_compiling_a_wrapped_model_is_wrapping_a_compiled_one(wrapper):
    wrap, _ = WRAP[wrapper]
    around, inside = compiled(wrap(fa.decoder(CONFIG))), wrap(compiled(fa.decoder(CONFIG)))
    for model in (around, inside):
        assert isinstance(model, fa.compilation.Compiled)
        model.extend(PARAMS, DRAFT[:1], PAST)
        layers = wrapper not in ("hidden", "patched", "shard_map")
        head = wrapper not in ("logits", "shard_map") and bool(tiles.missing())  # else an operator
        assert len(model.code) == layers + head
    assert repr(around) == repr(inside)
    assert around.explain(PARAMS) == inside.explain(PARAMS)


def test_the_loss_of_candidates_on_a_mesh_is_theirs():
    few = fa.sharding.candidates(MODEL, 3)
    rules = fa.sharding.tensor_parallel(CONFIG, size=2)
    cuts = fa.sharding.specs(PARAMS, Grid(tensor=2), rules)
    mapped = fa.shard_map(
        lambda params: fa.loss(few, params, PROMPT), Grid(tensor=2), (cuts,), fa.sharding.P()
    )
    torch.testing.assert_close(mapped(PARAMS), fa.loss(few, PARAMS, PROMPT))


def test_a_replaced_function_leaves_the_others_of_a_compiled_model():
    fast = compiled(MODEL)
    for other in (
        fast._replace(init=lambda key: PARAMS),
        fast._replace(cache=lambda size: MODEL.cache(size + 1)),
    ):
        logits, _ = other.step(PARAMS, PROMPT, other.cache(8))
        torch.testing.assert_close(logits, MODEL.apply(PARAMS, PROMPT, MODEL.cache(8))[0])
        assert other.explain(PARAMS) == fast.explain(PARAMS)
    louder = fast._replace(logits=shifted)
    torch.testing.assert_close(
        louder.step(PARAMS, PROMPT, MODEL.cache(8))[0], louder.extend(PARAMS, PROMPT)[0]
    )
    assert "in the place of hidden" in fast._replace(hidden=bent).explain(PARAMS)


def test_a_sharded_model_makes_the_cache_that_was_put_in():
    other = MODEL._replace(cache=lambda size, **options: MODEL.cache(size + 3, **options))
    for mesh in (Grid(data=1), Grid(tensor=2)):
        assert fa.caches.capacity(fa.shard_map(other, mesh).cache(4)) == 7


def test_a_draft_that_skips_layers_says_what_the_model_says():
    skips = lambda model: drafters.skip(model, PARAMS, [1], length=2)
    smaller = fa.decoder(fa.Config(**{**vars(CONFIG), "layers": 1}))
    fewer = PARAMS._replace(layers=PARAMS.layers[:1])
    for model, said in (
        (compiled(MODEL), smaller),
        (MODEL._replace(logits=shifted), smaller._replace(logits=shifted)),
        (
            fa.compile(MODEL._replace(logits=shifted), depth=2, backend="eager"),
            smaller._replace(logits=shifted),
        ),
    ):
        drafts = [
            d.propose(fa.key(2), PROMPT[-1], d.init(PROMPT[:-1], torch.tensor(4), 4))[0].tokens
            for d in (skips(model), drafters.model(said, fewer, length=2))
        ]
        assert torch.equal(*drafts)


def test_calibration_takes_a_compiled_model_and_refuses_another_hidden():
    text = torch.arange(32) % 16
    for model in (compiled(MODEL), MODEL._replace(logits=shifted)):
        got, wanted = (fa.gptq(m, text, fa.int8)(PARAMS) for m in (model, MODEL))
        assert all(map(torch.equal, fa.tree.leaves(got), fa.tree.leaves(wanted)))
    with pytest.raises(TypeError, match="got a Model with another hidden"):
        fa.gptq(MODEL._replace(hidden=bent), text, fa.int8)


def test_logits_that_read_a_layer_are_given_it():
    lens = lambda params, x: MODEL.logits(params, x + params.layers[1].attention_norm)
    model = MODEL._replace(logits=lens)
    text = torch.arange(40) % 16
    whole = model.extend(PARAMS, text)[0].log_softmax(-1)[:-1].gather(-1, text[1:, None])[:, 0]
    torch.testing.assert_close(fa.score(model, PARAMS, text, chunk=7), whole)
    torch.testing.assert_close(fa.loss(model, PARAMS, text), -whole.mean())


@pytest.mark.parametrize("name", ["extend", "apply"])
def test_what_is_made_of_others_is_not_replaced_without_a_word(name):
    for wrong in (
        lambda: MODEL._replace(**{name: print}),
        lambda: compiled(MODEL)._replace(**{name: print}),
    ):
        with pytest.raises(
            TypeError, match=f"{name} should be left to be made of hidden and logits"
        ):
            wrong()
    with pytest.raises(
        TypeError, match=r"Model: the arguments should be \(init, cache, hidden, logits, commit"
    ):
        fa.Model(*[print] * 4, **{name: print})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: MODEL._replace(hiden=print),
            "_replace: functions should be some of init, cache, hidden, logits, got 'hiden'",
        ),
        (
            lambda: fa.compile(plain(bent, None)),
            "compile: model should be from fa.decoder, got a Model",
        ),
        (
            lambda: fa.compile(dataclasses.replace(plain(bent, None), config=CONFIG)),
            "got a Model with another cache and hidden",
        ),
        (
            lambda: fa.sharding.candidates(MODEL._replace(logits=shifted), 2),
            "got a Model with another logits",
        ),
        (
            lambda: drafters.skip(MODEL._replace(hidden=bent), PARAMS, [0]),
            "got a Model with another hidden",
        ),
    ],
)
def test_what_cannot_be_done_with_a_replaced_function_is_an_error(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_model_is_a_value():
    init, cache, hidden, logits, extend, apply = MODEL
    assert (init, cache, hidden, logits, extend, apply) == tuple(
        getattr(MODEL, name) for name in MODEL._fields
    )
    assert MODEL._replace() == MODEL != MODEL._replace(hidden=bent)
    assert len({MODEL, MODEL._replace(), fa.decoder(CONFIG)}) == 2
    assert MODEL.config is CONFIG
    assert config_of(MODEL._replace(cache=cache), "hidden", "logits") is CONFIG
    assert config_of(MODEL._replace(hidden=bent), "logits") is CONFIG
    assert config_of(MODEL._replace(hidden=bent), "hidden") is config_of("a text", "hidden") is None
    with pytest.raises(AttributeError):
        MODEL.hidden = bent


def test_a_model_prints_how_it_was_made():
    said = "decoder(Config(vocabulary=16, width=8, heads=2, head_size=4, feed_forward=8))"
    assert repr(MODEL) == f"Model: {said}"
    model = fa.sharding.candidates(compiled(MODEL), 3)._replace(
        hidden=bent, init=functools.partial(MODEL.init)
    )
    said = (
        "_replace(hidden=bent, init=partial) of candidates(k=3) of compile(backend='eager') of "
        f"{said}"
    )
    assert repr(model) == f"Compiled: {said}"
    assert repr(fa.shard_map(AGAIN, Grid(tensor=2))).startswith(
        "Model: shard_map(mesh=VirtualMesh(axes=(('tensor', 2),))) of decoder("
    )
    assert repr(AGAIN).endswith("feed_forward=8), remat=True)")
    assert (
        repr(fa.Model(*[print] * 4)) == "Model: init=print, cache=print, hidden=print, logits=print"
    )
    scaling = fa.layers.RopeScaling(kind="linear", factor=2.0)
    assert repr(fa.decoder(fa.Config(rope_scaling=scaling))) == (
        "Model: decoder(Config(rope_scaling=RopeScaling(kind='linear', factor=2.0)))"
    )


def test_signatures_show_values_and_no_addresses():
    functions = [
        fa.decoder,
        fa.compile,
        fa.Model,
        fa.compilation.Compiled,
        *MODEL,
        *compiled(MODEL),
        compiled(MODEL).step,
    ]
    for f in functions:
        assert " at 0x" not in str(inspect.signature(f)), f
    for f in (MODEL.hidden, MODEL.extend, MODEL.apply):
        assert inspect.signature(f).parameters["cache"].default == ()
        assert "= ()" in str(inspect.signature(f))
    for f in MODEL:
        assert "(" in inspect.getdoc(f)  # shapes


def test_what_is_patched_is_traced_as_it_is_changed():
    twice = {"layers.0.output": lambda x: 2 * x}
    logits, seen = fa.trace(fa.patched(MODEL, twice), PARAMS, PROMPT, ["layers.0.output"])
    assert torch.equal(
        seen["layers.0.output"],
        2 * fa.trace(MODEL, PARAMS, PROMPT, ["layers.0.output"])[1]["layers.0.output"],
    )
    assert torch.equal(logits, fa.patch(MODEL, PARAMS, PROMPT, twice))
    with pytest.raises(
        ValueError, match=r"patched: changes should be names of taps, got 'layers.7.output'"
    ):
        fa.patched(MODEL, {"layers.7.output": torch.zeros_like}).extend(PARAMS, PROMPT)
    assert repr(fa.patched(MODEL, twice)).startswith(
        "Model: patched('layers.0.output') of decoder("
    )


def test_a_text_is_applied_without_a_cache():
    logits, cache = MODEL.apply(PARAMS, PROMPT)
    wanted, filled = MODEL.apply(PARAMS, PROMPT, MODEL.cache(5))
    assert torch.equal(logits, wanted)
    assert fa.tree.allclose(cache, filled)
    with pytest.raises(
        ValueError, match=r"apply: tokens should be one sequence \(T,\), got \(2, 5\)"
    ):
        MODEL.apply(PARAMS, torch.stack([PROMPT, PROMPT]))


def test_help_says_what_each_function_takes():
    for model, name in itertools.product(
        (MODEL, compiled(MODEL), fa.shard_map(MODEL, Grid(tensor=2))), MODEL._fields
    ):
        f = getattr(model, name)
        assert inspect.getdoc(f) == inspect.getdoc(getattr(MODEL, name)), name
        assert len(inspect.getdoc(f)) > 60
        assert inspect.signature(f) == inspect.signature(getattr(MODEL, name))
    assert inspect.getdoc(compiled(MODEL).step)


def test_a_batch_of_a_replaced_model_is_the_loop():
    model, prompts = MODEL._replace(logits=shifted), torch.stack([PROMPT, PROMPT.flip(0)])
    one = lambda prompt: fa.generate(fa.key(1), model, PARAMS, prompt, steps=3)[0]
    assert torch.equal(vmap(one)(prompts), torch.stack([one(prompt) for prompt in prompts]))


# What the process keeps.


def test_what_was_compiled_is_let_go_with_the_model():
    model, objects, gone = fa.decoder(CONFIG), [], []
    for _ in range(4):
        fast = compiled(model)
        fa.generate(fa.key(0), fast, PARAMS, torch.tensor([1, 2]), steps=3)
        gone += [weakref.ref(fast), weakref.ref(fast.stack)]
        del fast
        gc.collect()
        objects.append(len(gc.get_objects()))
    assert objects[-1] - objects[1] < 200
    functions = list(model.code.values())
    gone += [weakref.ref(f.run) for f in functions]
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("funcattn.") and module is not None
    ]
    installed = lambda: sum(
        name.startswith("__compiled_fn") for module in modules for name in vars(module)
    )
    assert functions, "nothing was compiled"
    before = installed()
    del model, functions
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert installed() < before  # Dynamo's globals, which hold the graphs


SCRIPT = """
import gc
import torch
import funcattn as fa

config = fa.Config(layers=1, width=16, heads=2, kv_heads=2, head_size=8, feed_forward=16, vocabulary=16)
gc.disable()
for n in range(40):
    cycle = []
    cycle.append((cycle, fa.decoder(config), fa.compile(fa.decoder(config)) if n % 8 == 0 else None))
del cycle
graphs = []

def backend(graph, inputs):
    gc.collect()
    graphs.append(graph)
    return graph.forward

model, optimizer = fa.decoder(config), fa.training.adamw(1e-2)
params = model.init(fa.key(0))
one = fa.training.step(model, optimizer)
arguments = params, optimizer.init(params), torch.arange(12).view(2, 6)
fast = torch.compile(one, backend=backend)
wanted = one(*arguments)[2].loss
torch.testing.assert_close(fast(*arguments)[2].loss, wanted)
read = torch.compile(lambda params, tokens: model.extend(params, tokens)[0], backend=backend)
torch.testing.assert_close(read(params, arguments[2]), model.extend(params, arguments[2])[0])
count = len(graphs)
for other in (fa.decoder(config), fa.decoder(config, remat=True), model._replace(init=print), fa.compile(model)):
    fa.loss(other, params, arguments[2])
    del other
    gc.collect()
    torch.testing.assert_close(fast(*arguments)[2].loss, wanted)
    read(params, arguments[2])
assert len(graphs) == count, (len(graphs), count)
"""


@pytest.mark.slow
def test_compiled_code_does_not_depend_on_other_models():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-2000:]
