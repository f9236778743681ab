"""Mistakes that everybody makes once are told in the library's words, at the door where they were
made.
"""

import io
import re
import typing
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch

import funcattn as fa
from funcattn import caches, sampling
from funcattn.core import doors
from funcattn.core.doors import door
from funcattn.records import record
from funcattn.testing import laws

MODEL = fa.decoder(fa.Config(vocabulary=16, layers=1))
PARAMS = MODEL.init(fa.key(0))
PROMPT = torch.tensor([1, 2, 3])
LOGITS = torch.arange(16.0)
KEY = fa.key(0)
TREE = {"w": torch.ones(4, 4)}
DELTA = MODEL.extend(PARAMS, PROMPT, ())[1]
ROWS = torch.full((3, 4), 0.25)
X = torch.ones(2, 3, 8)
CALLS = {  # a call that works, whose arguments are spoilt one by one
    "normal": (fa.random.normal, [KEY, (2,)], {"dtype": torch.float32}),
    "randint": (fa.random.randint, [KEY, (2,), 0, 5], {}),
    "categorical": (fa.random.categorical, [KEY, LOGITS], {}),
    "permutation": (fa.random.permutation, [KEY, 5], {}),
    "split": (fa.split, [KEY, 2], {}),
    "causal": (fa.masks.causal, [3], {}),
    "full": (fa.masks.full, [3], {}),
    "window": (fa.masks.window, [3, 2], {}),
    "segments": (fa.masks.segments, [torch.tensor([0, 0, 1])], {}),
    "union": (fa.masks.union, [fa.masks.causal(3), fa.masks.causal(3)], {}),
    "map": (fa.tree.map, [lambda x: x, TREE], {}),
    "update": (fa.tree.update, [TREE, "w", torch.ones(1)], {}),
    "cast": (fa.tree.cast, [torch.float64], {}),
    "cast(dtype)": (fa.tree.cast(torch.float64), [TREE], {}),
    "to": (fa.tree.to, ["cpu"], {}),
    "attention": (fa.attention, [X, X, X], {"scale": 0.1}),
    "attention_weights": (fa.attention_weights, [X, X], {}),
    "merge": (fa.merge, [fa.attend(X, X, X), fa.attend(X, X, X)], {}),
    "extend": (MODEL.extend, [PARAMS, PROMPT, ()], {}),
    "generate": (
        fa.generate,
        [KEY, MODEL, PARAMS, PROMPT],
        {"steps": 1, "sampler": sampling.greedy, "stop": [3], "chunk": 8},
    ),
    "beam_search": (
        fa.beam_search,
        [MODEL, PARAMS, PROMPT],
        {"steps": 1, "beams": 2, "length_penalty": 1.0},
    ),
    "speculate": (
        fa.speculate,
        [KEY, MODEL, PARAMS, fa.drafters.prompt_lookup(), PROMPT],
        {"steps": 2, "stop": [3]},
    ),
    "drafters.model": (fa.drafters.model, [MODEL, PARAMS], {"length": 2, "chunk": 4}),
    "drafters.function": (fa.drafters.function, [lambda text, n: (text, n)], {"length": 2}),
    "temperature": (sampling.temperature, [0.5], {}),
    "typical_p": (sampling.typical_p, [0.5], {}),
    "mirostat": (sampling.mirostat, [5.0, 0.1], {}),
    "logit_bias": (sampling.logit_bias, [{1: 2.0}], {}),
    "dry": (sampling.dry, [0.8], {"base": 1.75, "breakers": [1], "window": 8}),
    "allowed_tokens": (sampling.allowed_tokens, [[1]], {}),
    "guidance": (sampling.guidance, [1.5, MODEL, PARAMS, MODEL.cache(4), LOGITS], {}),
    "score": (fa.evaluation.score, [MODEL, PARAMS, PROMPT], {}),
    "loss": (fa.loss, [MODEL, PARAMS, PROMPT], {}),
    "adamw": (fa.training.adamw, [0.1], {"betas": (0.9, 0.99), "epsilon": 1e-8}),
    "clip": (fa.training.clip, [1.0], {}),
    "step": (fa.training.step, [MODEL, fa.training.sgd(0.1)], {"micro_batches": 1}),
    "lora": (fa.lora, [2], {"alpha": 4.0}),
    "lora(rank)": (fa.lora(2), [KEY, PARAMS], {}),
    "quantize": (fa.quantize, [fa.int8], {}),
    "accept": (fa.speculation.accept, [KEY, ROWS, ROWS[:2], torch.tensor([0, 1])], {}),
    "accept_tree": (
        fa.speculation.accept_tree,
        [KEY, ROWS, ROWS, torch.tensor([0, 1]), torch.tensor([0, 0])],
        {},
    ),
    "idle": (fa.serving.idle, [MODEL, PARAMS, MODEL.cache(8), 2], {}),
    "commit": (fa.commit, [MODEL.cache(8), DELTA, 2], {}),
    "grow": (caches.grow, [MODEL.cache(8), 2], {}),
    "ring": (caches.ring, [4], {}),
    "quantized": (caches.quantized, [8], {}),
    "shard_map": (fa.sharding.shard_map, [MODEL, fa.sharding.Grid(tensor=1)], {}),
    "report": (fa.quantization.report, [PARAMS, PARAMS], {}),
}
WRONG = {
    "a list": [1, 2],
    "an int": -1,
    "a number": 2.5,
    "a str": "a",
    "None": None,
    "an array": np.ones(3),
    "a tree": PARAMS,
    "a model": MODEL,
    "a module": torch.nn.Linear(2, 2),
    "a floating tensor": torch.ones(2),
    "a floating scalar": torch.tensor(1.5),
    "a factory": sampling.temperature,
    "a sampler": sampling.greedy,
    "a nested tensor": torch.nested.nested_tensor(
        [torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged
    ),
}
KNOWN = {
    ("map", "a module"),
    ("update", "a module"),
    ("allowed_tokens", "a nested tensor"),
    ("accept_tree", "a floating tensor"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_kind_a_forgotten_argument_or_one_too_many_works_or_is_told(name):
    f, args, options = CALLS[name]
    f(*args, **options)
    spoilt = [
        (what, [*args[:i], x, *args[i + 1 :]], options)
        for i in range(len(args))
        for what, x in WRONG.items()
    ]
    spoilt += [(what, args, options | {key: x}) for key in options for what, x in WRONG.items()]
    spoilt += [
        ("swapped", [*args[1::-1], *args[2:]], options),
        ("an unknown option", args, options | {"banana": 1}),
    ]
    spoilt += (
        [("nothing", [], {}), ("too many", [*args, *[3] * 9], options)] if name != "extend" else []
    )
    raw = []
    for what, given, named in spoilt:
        try:
            f(*given, **named)
        except Exception as error:
            if not (
                {"should be", "got"} & {word for word in ("should be", "got") if word in str(error)}
            ):
                raw.append((what, repr(error)[:200]))
    assert [(what, text) for what, text in raw if (name, what) not in KNOWN] == []


def test_every_annotation_of_a_door_can_be_read():
    """A name that only a type checker imports would be another raw error, in the place of the
    first.
    """
    found = 0
    for room in (
        fa,
        fa.random,
        fa.masks,
        fa.tree,
        sampling,
        fa.drafters,
        fa.training,
        fa.evaluation,
        fa.sharding,
        fa.speculation,
    ):
        for name, value in vars(room).items():
            if (
                not name.startswith("_")
                and getattr(value, "__wrapped__", None) is not None
                and callable(value)
            ):
                typing.get_type_hints(value)
                found += 1
    assert found > 80


def test_an_error_that_the_arguments_do_not_explain_stays_as_it_is():
    @door
    def called(f: typing.Any, x: torch.Tensor) -> torch.Tensor:
        return f(x)

    with pytest.raises(ZeroDivisionError):
        called(lambda x: 1 / 0, torch.ones(1))
    with pytest.raises(AttributeError, match="banana") as caught:
        called(lambda x: x.banana, torch.ones(1))
    assert caught.value.__cause__ is None
    with pytest.raises(TypeError, match="called: x should be a tensor, got 3"):
        called(lambda x: x.shape, 3)
    assert called(lambda x: x, 3) == 3  # what works is not refused


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_told_from_plain_ones(layout):
    with warnings.catch_warnings(action="ignore"):  # torch's, of the strided layout
        x = torch.nested.nested_tensor([torch.ones(2, 3, 8), torch.ones(2, 5, 8)], layout=layout)
    with pytest.raises(
        TypeError,
        match=r"attention: q should be a tensor .* got a nested tensor. Attend over jagged ones by",
    ):
        fa.attention(x, x, x)


@pytest.mark.parametrize(
    "found",
    [
        (torch.arange(4), 4),
        ([0, 1, 2, 3], torch.tensor(4)),
        torch.arange(4),
        (torch.ones(4), torch.tensor(4)),
        None,
    ],
)
def test_what_a_drafter_of_ones_own_returns_is_checked(found):
    drafter = fa.drafters.function(lambda text, n: found, length=4)
    with pytest.raises(
        TypeError,
        match=r"what f returns should be tokens int64 \(N,\) with N = 4, valid int64 \(\), got",
    ):
        fa.speculate(fa.key(0), MODEL, PARAMS, drafter, PROMPT, steps=4)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            lambda: sampling.top_k(2)(),
            TypeError,
            r"Sampler: the value should be passed as it is, got a call with \(\)",
        ),
        (
            lambda: sampling.greedy(0.5),
            TypeError,
            r"Sampler: the value should be passed as it is, got a call with \(0.5\)",
        ),
        (
            lambda: fa.speculation.blockwise(0.5),
            TypeError,
            r"Rule: the value should be passed as it is, got a call with \(0.5\)",
        ),
        (
            lambda: fa.training.adamw(0.1)(PARAMS),
            TypeError,
            "Optimizer: the value should be passed as it is",
        ),
        (
            lambda: fa.lora(2)(PARAMS),
            TypeError,
            r"lora\(rank\): the arguments should be \(key, params\), got \(a Params\)",
        ),
        (
            lambda: fa.tree.cast(PARAMS, torch.float64),
            TypeError,
            r"cast: dtype should be a floating torch.dtype, got a Params\. .* call cast\(dtype\)\(tree\)",
        ),
        (
            lambda: fa.random.normal(KEY, PARAMS),
            ValueError,
            "normal: shape should be a tuple of sizes",
        ),
        (
            lambda: fa.tree.to("cuad"),
            ValueError,
            "to: device should be one that torch knows, got 'cuad'",
        ),
        (lambda: fa.Config(bananas=3), TypeError, "Config: the arguments should be"),
        (
            lambda: sampling.stateless(lambda logits: logits[:3]).update(LOGITS, ()),
            ValueError,
            "what transform returns should be",
        ),
        (
            lambda: fa.attention(X, X, X, scale=float("inf")),
            ValueError,
            "scale should be a number that float32 holds, got inf",
        ),
        (
            lambda: fa.attention(X, X, X, scale="big"),
            TypeError,
            "scale should be a number or a 0-d tensor, got a str",
        ),
        (
            lambda: fa.serving.idle(MODEL, PARAMS, None, 2),
            TypeError,
            "a past such as Cache or Branch, got a NoneType",
        ),
    ],
)
def test_a_mistake_is_told_with_its_remedy(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)  # weights only, its default


@record
class Mine(NamedTuple):
    weight: torch.Tensor


def test_records_load_as_torch_loads_by_default():
    trees = [
        PARAMS,
        fa.lora(2)(KEY, PARAMS),
        MODEL.cache(4),
        fa.training.adamw(0.1).init(PARAMS),
        Mine(torch.ones(2)),
    ]
    schemes = (fa.int8, fa.int4, fa.w8a8, fa.nf4, fa.ternary)
    for value in (*trees, *(fa.quantize(scheme)(PARAMS) for scheme in schemes)):
        again = loaded(value)
        assert type(again) is type(value)
        assert fa.tree.allclose(again, value)


def test_every_law_says_which_it_is_also_where_what_it_tests_breaks():
    def breaks(*_, **__):
        raise RuntimeError("broken")

    class Kind:
        empty = staticmethod(breaks)

    table = torch.full((2, 2), 0.5, dtype=torch.float64)
    target, draft = [table[0], table, table.expand(2, 2, 2)], [table[0], table]
    broken = sampling.Sampler(breaks, breaks, breaks)
    rule = fa.speculation.Rule(breaks, breaks, breaks)
    q = torch.ones(1, 2, 2, dtype=torch.float64)
    cases = {
        "sampler": (broken, torch.arange(8.0), KEY),
        "cache": (Kind, 4, KEY),
        "transform": (breaks, TREE),
        "kernel": (breaks, q, q, q, None, KEY),
        "acceptance": (rule, target, draft, KEY),
    }
    for family, arguments in cases.items():
        for law in getattr(laws, family):
            told = law.__name__  # unless it breaks without saying so
            try:
                law(*arguments)
            except Exception as error:
                told = "\n".join([str(error), *getattr(error, "__notes__", ())])
            assert law.__name__ in told


def test_params_of_several_dtypes_are_one_error_that_names_two_of_them():
    model = fa.decoder(fa.Config(vocabulary=16, layers=2))
    params = model.init(fa.key(0))
    first, second = params.layers
    mixed = params._replace(layers=(first, second._replace(up=second.up.bfloat16())))
    message = (
        "params should be of one floating dtype, got torch.float32 at params.embedding and "
        "torch.bfloat16 at params.layers.1.up. "
        "Bring them to one: fa.cast(torch.float32)(params)."
    )
    fast = fa.compile(model, backend="eager")
    for call in (
        lambda: model.hidden(mixed, PROMPT),
        lambda: model.extend(mixed, PROMPT),
        lambda: model.apply(mixed, PROMPT),
        lambda: fast.extend(mixed, PROMPT),
        lambda: fa.generate(fa.key(0), model, mixed, PROMPT, steps=1),
        lambda: fa.loss(model, mixed, PROMPT),
        lambda: torch.func.vmap(lambda t: model.extend(mixed, t)[0])(PROMPT[None]),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            call()
    quantized = fa.quantize(fa.int8)(params)
    with pytest.raises(RuntimeError, match="boom"):  # dtypes of records are what they are
        fa.loss(model._replace(logits=raising("the same dtype: boom")), quantized, PROMPT)
    # and where they are all one, an error is what it was
    with pytest.raises(RuntimeError, match="boom"):
        fa.loss(model._replace(logits=raising("the same dtype: boom")), params, PROMPT)


def raising(text):
    def logits(params, x):
        raise RuntimeError(text)

    return logits


def test_kinds_are_read_from_annotations():
    words = lambda annotation: getattr(doors.kind_of(annotation), "words", None)
    assert words(float | torch.Tensor) == "a number or a tensor"
    assert words(int | None) == "an int or None"
    assert words(sampling.Sampler) == "a Sampler"
    assert words(typing.Any) is None


WIDE = fa.decoder(fa.Config(vocabulary=16, layers=1))
MODELS = {
    "decoder": WIDE,
    "compiled": fa.compile(WIDE, backend="eager"),
    "sharded": fa.sharding.shard_map(WIDE, fa.sharding.Grid(tensor=2)),
}


@pytest.mark.parametrize("made", MODELS)
def test_the_functions_of_a_model_say_what_was_forgotten_or_is_of_another_kind(made):
    model, x = MODELS[made], WIDE.hidden(PARAMS, PROMPT)[0]
    mistakes = [
        *(getattr(model, name) for name in model._fields),
        lambda: model.extend(PARAMS),
        lambda: model.apply(PARAMS),
        lambda: model.hidden(PARAMS, [1, 2]),
        lambda: model.hidden(PARAMS, PROMPT, positions=[0, 1, 2]),
        lambda: model.hidden(PARAMS, PROMPT, positions=torch.arange(4)),
        lambda: model.hidden(PARAMS, PROMPT, positions=torch.rand(3)),
        lambda: model.logits(x, PARAMS),
        lambda: model.logits(PARAMS, x[:, :5]),
        lambda: model.logits(PARAMS, (x, None)),
        lambda: model.cache("3"),
        lambda: model._replace(hidden=3),
        *([model.step, model.explain, lambda: model.explain(x)] if made == "compiled" else []),
        *([fa.decoder, lambda: fa.compile(WIDE, backend=3)] if made == "decoder" else []),
    ]
    for mistake in mistakes:
        with pytest.raises((TypeError, ValueError), match=r"should be .* got"):
            mistake()
