"""The lm-evaluation-harness asks, and is answered: with its own base class where it is installed,
else with a stand-in.
"""

import contextlib
import dataclasses
import importlib.util
import sys
import types
from typing import NamedTuple

import pytest
import torch
import transformers
from samples import CONFIG, params, tokenizer

import funcattn as fa
from funcattn.interop import lm_eval_model, register_lm_eval
from funcattn.interop.harness import rolling

MODEL = fa.decoder(CONFIG)
PARAMS = fa.tree.map(lambda x: x if x.dim() == 1 else 10 * x, params())
TOKENIZER = tokenizer()
BEGIN = 2  # the id of <s>


class Asked(NamedTuple):
    """As lm_eval.api.instance.Instance: all that is read of it is args."""

    args: tuple


@pytest.fixture(autouse=True)
def harness(monkeypatch):
    """lm_eval's base class and registry, or what they do."""
    if importlib.util.find_spec("lm_eval"):
        return __import__("lm_eval.api.registry").api.registry
    base, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.api.registry")

    class LM:
        def __init__(self):
            self.cache_hook = None

    def register_model(name):
        def decorate(kind):
            assert issubclass(kind, LM)
            registry.model_registry[name] = kind
            return kind

        return decorate

    base.LM, registry.model_registry, registry.register_model = LM, {}, register_model
    for name, module in {
        "lm_eval": types.ModuleType("lm_eval"),
        "lm_eval.api": types.ModuleType("lm_eval.api"),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", base)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", registry)
    return registry


def answering(context=64, **more):
    return lm_eval_model(MODEL, PARAMS, more.pop("tokenizer", TOKENIZER), context=context, **more)


def naive(before, after):
    """The log-probability of the ids after, behind the ids before, and whether each is the
    likeliest.
    """
    ids = torch.tensor([*before, *after])
    logits = MODEL.logits(PARAMS, MODEL.hidden(PARAMS, ids[:-1])[0])[len(before) - 1 :]
    scores = logits.double().log_softmax(-1).gather(-1, ids[len(before) :, None]).sum()
    return scores.item(), logits.argmax(-1).tolist() == list(after)


def check(found, wanted):
    assert found[1] == wanted[1]
    assert found[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-4)  # sums of float32 scores


def test_a_continuation_is_scored_behind_its_context():
    questions = [
        ("hello the", " 12"),
        ("hello the", " hello"),
        ("the", "x"),
        ("hello", " the 12"),
        ("hello the", "!"),
    ]
    found = answering().loglikelihood([Asked(pair) for pair in questions])
    for (before, after), got in zip(questions, found, strict=True):
        whole, head = TOKENIZER.encode(before + after), TOKENIZER.encode(before)
        check(got, naive(head, whole[len(head) :]))


def test_answers_to_one_question_read_it_once(monkeypatch):
    lengths = []

    def hidden(params, tokens, *rest, **options):
        lengths.append(tokens.shape[-1])
        return MODEL.hidden(params, tokens, *rest, **options)

    lm = lm_eval_model(MODEL._replace(hidden=hidden), PARAMS, TOKENIZER, context=64)
    question = "hello the 12 " * 4 + "so"
    lm.loglikelihood([Asked((question, f" {word}")) for word in ("a", "b", "c", "d")])
    assert sum(n > 4 for n in lengths) == 1


def test_what_greedy_decoding_writes_is_told_as_such():
    ids = TOKENIZER.encode("hello")
    written = fa.generate(fa.key(0), MODEL, PARAMS, torch.tensor(ids), steps=1)[0].tolist()
    check(answering()._foretold(tuple(ids), tuple(written), ()), naive(ids, written))
    assert answering()._foretold(tuple(ids), tuple(written), ())[1]


def test_spaces_between_belong_to_the_continuation():
    one, two = answering().loglikelihood([Asked(("hello ", "the")), Asked(("hello", " the"))])
    assert one == two


def test_an_empty_context_is_the_token_that_begins_a_text():
    found = answering().loglikelihood([Asked(("", "hello the"))])[0]
    check(found, naive([BEGIN], TOKENIZER.encode("hello the")))


def test_a_long_context_is_cut_from_the_left():
    before, after = "the 12 hello" + " the 12 hello" * 9, " hello"
    found = answering(context=8).loglikelihood([Asked((before, after)), Asked((before, " the"))])
    whole, head = TOKENIZER.encode(before + after), TOKENIZER.encode(before)
    n = len(whole) - len(head)
    check(found[0], naive(whole[-9:-n], whole[-n:]))


@pytest.mark.parametrize("context", [2, 5, 64])
def test_a_whole_text_is_scored_once_in_windows_that_are_full(context):
    text = "hello the 12 and so on, hello"
    ids = [BEGIN, *TOKENIZER.encode(text)]
    wanted = sum(
        naive(ids[begin:first], ids[first:end])[0]
        for begin, first, end in rolling(len(ids), context)
    )
    assert answering(context).loglikelihood_rolling([Asked((text,))]) == [
        pytest.approx(wanted, rel=1e-5)
    ]
    if context == 64:
        assert wanted == pytest.approx(naive(ids[:1], ids[1:])[0])


@pytest.mark.parametrize(
    ("length", "context"), [(1, 4), (2, 4), (5, 4), (6, 4), (11, 4), (9, 2), (30, 7)]
)
def test_windows_read_no_more_than_the_context_and_as_much_as_there_is(length, context):
    found = rolling(length, context)
    assert [place for window in found for place in range(window.first, window.end)] == list(
        range(1, length)
    )
    assert all(end - begin - 1 == min(context, end - 1) for begin, _, end in found)


def test_text_is_written_until_a_stop_string():
    lm, prompt = answering(), "hello the"
    ids = torch.tensor(TOKENIZER.encode(prompt))
    free = "".join(
        piece.text
        for piece in fa.stream(fa.key(0), MODEL, PARAMS, ids, steps=12, tokenizer=TOKENIZER)
    )
    assert len(free) > 5
    stop = free[3:5]
    asked = [
        ({"max_gen_toks": 12},),
        ({"until": [stop], "max_gen_toks": 12},),
        ({"until": stop, "max_gen_toks": 12},),
    ]
    whole, cut, same = lm.generate_until([Asked((prompt, *options)) for options in asked])
    assert whole == free
    assert cut == same == free[: free.index(stop)]


def test_samples_are_drawn_where_a_task_wants_them():
    asked = [
        Asked(("hello", {"do_sample": True, "temperature": 2.0, "top_k": 50, "max_gen_toks": 8}))
    ] * 2
    one, two = answering().generate_until(asked)
    assert one != two
    assert answering().generate_until(asked) == [one, two]
    assert answering(seed=1).generate_until(asked) != [one, two]
    greedy = [Asked(("hello", {"do_sample": False, "temperature": 0.0, "max_gen_toks": 8}))] * 2
    assert len(set(answering().generate_until(greedy))) == 1


def written(lm=None, prompt="hello the", **options):
    return (lm or answering()).generate_until([Asked((prompt, {"max_gen_toks": 8, **options}))])[0]


def test_a_continuation_of_which_no_token_is_left_is_refused():
    """Foretold with certainty it would win every multiple choice."""
    merged = TOKENIZER.encode("hello")
    assert TOKENIZER.encode("hell")[:1] != merged  # "hell" and "o" are one token
    for pair in (("hell", "o"), ("hello", ""), ("hello the ", "")):
        with contextlib.suppress(ValueError):
            ((score, _),) = answering().loglikelihood([Asked(pair)])
            assert score < 0
    with pytest.raises(
        ValueError,
        match=r"loglikelihood: the continuation 'o' should be 1 to 64 tokens behind its context, got 0",
    ):
        answering().loglikelihood([Asked(("hell", "o"))])


def test_a_continuation_of_more_than_is_read_is_refused_and_not_cut():
    fits = " the" * 8
    ((score, _),) = answering(context=8).loglikelihood([Asked(("hello", fits))])
    assert score == pytest.approx(
        naive(TOKENIZER.encode("hello"), TOKENIZER.encode("hello" + fits)[1:])[0], rel=1e-5
    )
    with pytest.raises(ValueError, match=r"the continuation .* should be 1 to 8 tokens"):
        answering(context=8).loglikelihood([Asked(("hello", " the" * 9))])


def test_a_question_is_never_cut_to_make_room_for_its_answer_alone():
    for options in ({"max_gen_toks": 64}, {"max_gen_toks": 128}, {}, {"max_gen_toks": -1}):
        with pytest.raises(
            ValueError,
            match="generate_until: max_gen_toks should be fewer than the 64 tokens of the context",
        ):
            answering().generate_until([Asked(("hello", options))])
    assert (
        written(max_gen_toks=None, max_new_tokens=8)
        == written(max_gen_toks=None, max_completion_tokens=8)
        == written()
    )


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({"do_sample": True, "temperature": 1.0, "top_k": -1}, {"do_sample": True}),
        ({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"do_sample": True}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {}),
        (
            {
                "temperature": None,
                "do_sample": None,
                "num_beams": 1,
                "use_cache": True,
                "repetition_penalty": 1.0,
            },
            {},
        ),
        ({"until": None}, {"until": [""]}),
        ({"until": "\n"}, {"until": ["\n"]}),
    ],
    ids=str,
)
def test_options_of_a_task_mean_what_they_mean_to_transformers(options, alike):
    assert written(**options) == written(**alike)


def test_a_repetition_penalty_of_a_task_is_heeded():
    ids = torch.tensor(TOKENIZER.encode("hello the"))
    sampler = fa.sampling.chain(fa.sampling.repetition_penalty(3.0), fa.sampling.greedy)
    wanted = fa.stream(fa.key(0), MODEL, PARAMS, ids, steps=8, tokenizer=TOKENIZER, sampler=sampler)
    assert written(repetition_penalty=3.0) == "".join(piece.text for piece in wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"best_of": 2},
        {"presence_penalty": 0.5},
        {"do_sample": True, "temperature": 0.0},
        {"top_p": 1.5, "do_sample": True},
        {"max_length": 9},
        {"until": [3]},
        {"until": 3},
    ],
    ids=str,
)
def test_an_option_that_would_not_be_heeded_is_refused(options):
    with pytest.raises((ValueError, TypeError), match=r"(generate_until|top_p): .* should be"):
        written(**options)


def test_a_prefix_of_the_answer_stays_open():
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "The answer is"}]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend, chat_template=TOKENIZER.template
    )
    want = theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=False, continue_final_message=True
    )
    assert answering().apply_chat_template(chat, add_generation_prompt=False) == want
    assert want.endswith("The answer is")


def test_a_chat_is_written_by_the_template():
    lm = answering()
    text = lm.apply_chat_template([{"role": "user", "content": "hello"}])
    assert text == TOKENIZER.chat([{"role": "user", "content": "hello"}])
    assert lm.chat_template(True) == TOKENIZER.template
    assert lm.chat_template() == ""
    assert lm._encode("<|turn|>") == [1]  # a special token, and not its letters
    assert answering()._encode("<|turn|>") != [1]


def test_the_registered_name_loads_a_model(harness, tmp_path):
    fa.save(tmp_path, CONFIG, PARAMS, TOKENIZER)
    register_lm_eval()
    register_lm_eval()
    kind = (
        harness.get_model("funcattn")
        if hasattr(harness, "get_model")
        else harness.model_registry["funcattn"]
    )
    lm = kind(pretrained=str(tmp_path), dtype="float32", batch_size=1, device="cpu", max_length=32)
    asked = [Asked(("hello", " the"))]
    assert lm.context == 32
    check(lm.loglikelihood(asked)[0], answering().loglikelihood(asked)[0])
    assert kind(pretrained=str(tmp_path)).context == CONFIG.context


def test_an_argument_of_the_command_that_would_not_be_heeded_is_refused(harness, tmp_path):
    register_lm_eval()
    kind = (
        harness.get_model("funcattn")
        if hasattr(harness, "get_model")
        else harness.model_registry["funcattn"]
    )
    for options in ({"peft": "adapter"}, {"add_bos_token": True}, {"dtype": "float31"}):
        with pytest.raises(ValueError, match=r"funcattn: (model_args|dtype) should be"):
            kind(pretrained=str(tmp_path), **options)


def test_without_a_tokenizer_or_a_context_it_is_refused():
    with pytest.raises(ValueError, match="tokenizer should be given, got None"):
        lm_eval_model(MODEL, PARAMS, None, context=8)
    with pytest.raises(ValueError, match="context should be at least 2 tokens, got 1"):
        answering(context=1)


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        answering()


def test_a_tokenizer_without_a_first_token_begins_with_its_last():
    bare = dataclasses.replace(TOKENIZER, roles={"eos_token": "<|end|>"})
    assert answering(tokenizer=bare).prefix == 0
    assert answering(tokenizer=dataclasses.replace(TOKENIZER, roles={})).prefix == 0
