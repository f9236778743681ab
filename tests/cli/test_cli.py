"""The command line: what stands on stdout and on stderr, which exit code comes back, and what is
read from the past.
"""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

import funcattn as fa
from funcattn import cli

pytestmark = pytest.mark.cpu("the command reads --device, and not torch's default")

SPEED = re.compile(
    r"prefill: .* tokens.*, \d+\.\d\d s; decode: \d+ tokens, \d+\.\d\d s(, \d+\.\d tokens/s)?\n"
)
CONFIG = fa.Config(
    vocabulary=49152,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_size=8,
    feed_forward=16,
    context=256,
)


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    """A model of random weights, large enough for each token to depend on all before it, with
    SmolLM2's tokenizer.
    """
    params = fa.tree.map(
        lambda weight: weight * (15 if weight.dim() > 1 else 1), fa.decoder(CONFIG).init(fa.key(0))
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    fa.save(path, CONFIG, params, smollm2.tokenizer)
    return path


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Call main in this process, with the tiny model where the arguments name no other."""

    def call(command: str, *arguments: str, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        chosen = () if "--model" in arguments else ("--model", str(folder))
        try:
            code = cli.main([command, *chosen, *arguments])
        except SystemExit as end:
            code = end.code
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def read(monkeypatch):
    """How many tokens the model was given, call by call (one for all rows of a vmap)."""
    calls, decoder = [], fa.decoder

    def counted(config):
        model = decoder(config)

        def hidden(params, tokens, *rest, **options):
            calls.append(tokens.shape[-1])
            return model.hidden(params, tokens, *rest, **options)

        return model._replace(hidden=hidden)

    monkeypatch.setattr(fa, "decoder", counted)
    return calls


def test_the_answer_is_alone_on_stdout_and_the_speed_on_stderr():
    command = [
        sys.executable,
        "-m",
        "funcattn",
        "generate",
        "--chat",
        "--greedy",
        "What is the capital of France?",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n")
    assert SPEED.fullmatch(done.stderr)


def test_the_text_is_that_of_generate(run, folder):
    config, params, tokenizer = fa.load(folder)
    sampler = fa.sampling.chain(
        fa.sampling.temperature(0.9), fa.sampling.top_k(20), fa.sampling.min_p(0.01)
    )
    prompt = torch.tensor(tokenizer.encode("The sea"))
    key = fa.split(fa.key(7), 1)[0]
    tokens, _ = fa.generate(key, fa.decoder(config), params, prompt, steps=12, sampler=sampler)
    options = [
        "--temperature",
        "0.9",
        "--top-k",
        "20",
        "--top-p",
        "1",
        "--min-p",
        "0.01",
        "--seed",
        "7",
        "--steps",
        "12",
    ]
    assert run("generate", *options, "The sea").out == tokenizer.decode(tokens) + "\n"


@pytest.mark.parametrize("arguments", [(), ("-",)], ids=["no prompt", "a dash"])
def test_stdin_is_the_prompt_where_none_is_given(run, arguments):
    given = run("generate", "--greedy", "--steps", "8", "The sea")
    assert (
        run("generate", "--greedy", "--steps", "8", *arguments, stdin="The sea\n").out == given.out
    )


def test_text_is_written_before_the_next_token_is_asked_for(run, monkeypatch):
    written, seen = io.BytesIO(), []

    def pieces(*_, **__):
        for text in ("one", " two", " three"):
            yield fa.Streamed(text, (1,), (), text == " three")
            seen.append(written.getvalue())

    monkeypatch.setattr(fa, "stream", pieces)
    # holds back what is not flushed, as a pipe does
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    run("generate", "The sea")
    assert seen[:2] == [b"one", b"one two"]


def test_no_steps_write_an_empty_line(run):
    assert run("generate", "--steps", "0", "The sea")[:2] == (0, "\n")


def test_bfloat16_is_what_the_model_computes_in(run, monkeypatch):
    dtypes = []
    decoder = fa.decoder
    spy = lambda model: model._replace(
        logits=lambda params, x: (dtypes.append(x.dtype), model.logits(params, x))[1]
    )
    monkeypatch.setattr(fa, "decoder", lambda config: spy(decoder(config)))
    assert run("generate", "--dtype", "bfloat16", "--steps", "2", "The sea").code == 0
    assert set(dtypes) == {torch.bfloat16}


def test_the_first_of_several_samples_is_the_only_one_of_one(run):
    options = ["--seed", "3", "--temperature", "1.5", "--steps", "10", "The sea"]
    one, three = run("generate", *options), run("generate", "--num-samples", "3", *options)
    assert three.out.startswith(one.out)
    assert len(set(three.out.removesuffix("\n").split("\n\n"))) == 3


def test_several_samples_read_their_prompt_once(run, read, folder):
    T = len(fa.load(folder).tokenizer.encode("The old keeper of the light by the sea"))
    run("generate", "--num-samples", "5", "--steps", "4", "The old keeper of the light by the sea")
    assert read == [T - 1, 1, 1, 1, 1]


@pytest.mark.parametrize("drafts", ["int8", "lookup"])
def test_drafts_change_the_speed_and_not_the_text(run, monkeypatch, drafts):
    monkeypatch.setattr(fa, "compile", lambda model: model)  # the compiler has tests of its own
    options = (
        "--greedy",
        "--no-compile",
        "--steps",
        "12",
        "The old keeper of the light by the sea",
    )
    plain, drafted = (
        run("generate", *options),
        run("generate", "--speculate", drafts, "--draft-length", "2", *options),
    )
    assert (drafted.code, drafted.out) == (0, plain.out)
    assert re.search(
        r"drafts: \d+ of \d+ drafted tokens stayed \(\d+%\); \d\.\d\d tokens a round in \d+ rounds\n",
        drafted.err,
    )


@pytest.mark.parametrize("several", [(), ("--num-samples", "2")], ids=["one", "two"])
def test_a_stop_string_ends_the_text_before_it(run, several):
    whole = run("generate", "--greedy", "--steps", "12", "The sea").out.removesuffix("\n")
    stop = whole[5:8]
    cut = whole[: whole.index(stop)]
    expected = "\n\n".join([cut] * (2 if several else 1)) + "\n"
    assert (
        run(
            "generate",
            "--greedy",
            "--steps",
            "12",
            "--stop",
            "\0",
            "--stop",
            stop,
            *several,
            "The sea",
        ).out
        == expected
    )


CHAT = ("--greedy", "--steps", "6")


def test_a_chat_answers_as_if_it_read_everything_anew(run, folder):
    config, params, tokenizer = fa.load(folder)
    ran = run("chat", *CHAT, stdin="The sea is blue.\nAnd the sky?\n")
    messages, answers = [], []
    for text in ("The sea is blue.", "And the sky?"):
        messages.append({"role": "user", "content": text})
        prompt = torch.tensor(tokenizer.prompt(messages))
        tokens, _ = fa.generate(fa.key(0), fa.decoder(config), params, prompt, steps=6)
        answers.append(tokenizer.decode(tokens))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert ran[:2] == (0, "".join(f"{answer}\n" for answer in answers))


TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}{% if calm is false %}!{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
)
TOOLS = [{"name": "weather", "parameters": {}}]


@pytest.fixture
def talker(folder, tmp_path):
    """The model of `folder` with a template that shows tools and variables."""
    config, params, tokenizer = fa.load(folder)
    fa.save(tmp_path / "m", config, params, dataclasses.replace(tokenizer, template=TEMPLATE))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "one.json").write_text(json.dumps(TOOLS[0]))
    return tmp_path / "m"


@pytest.mark.parametrize("file", ["tools.json", "one.json"])
def test_tools_variables_and_a_system_message_reach_the_template(run, talker, file):
    config, params, tokenizer = fa.load(talker)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    prompt = tokenizer.prompt(messages, tools=TOOLS, mood="glad", calm=False)
    assert tokenizer.chat(messages, tools=TOOLS, mood="glad", calm=False).count("!") == 1
    tokens, _ = fa.generate(fa.key(0), fa.decoder(config), params, torch.tensor(prompt), steps=6)
    options = ("--model", str(talker), "--system", "Be kind.", "--template-arg", "mood=glad")
    options += ("--template-arg", "calm=false", "--tool-file", str(talker.parent / file), *CHAT)
    assert run("generate", *options, "--chat", "Hello").out == tokenizer.decode(tokens) + "\n"
    assert run("chat", *options, stdin="Hello\n").out == tokenizer.decode(tokens) + "\n"
    undone = run("chat", *options, stdin="/undo\nSea\n/undo\n/new\nHello\n")
    assert undone.out.endswith("\n" + tokenizer.decode(tokens) + "\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--template-arg", "mood"), "should be NAME=VALUE"),
        (("--template-arg", "messages=1"), "should be NAME=VALUE"),
        (("--tool-file", "none.json"), "none.json"),
        (("--tool-file", os.devnull), "should be JSON"),
    ],
)
def test_options_of_a_conversation_that_cannot_be_read(run, options, told):
    ran = run("generate", "--chat", *options, "Hello")
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err


def test_options_of_a_conversation_want_one(run):
    ran = run("generate", "--system", "Be kind.", "Hello")
    assert ran.code == 2
    assert "Add --chat" in ran.err


def test_a_later_turn_reads_only_what_the_past_does_not_hold(run, read, folder):
    config, params, tokenizer = fa.load(folder)
    first, second = (
        {"role": "user", "content": text} for text in ("The sea is blue.", "And the sky?")
    )
    begun = tokenizer.prompt([first])
    tokens, _ = fa.generate(fa.key(0), fa.decoder(config), params, torch.tensor(begun), steps=6)
    wanted = tokenizer.prompt(
        [first, {"role": "assistant", "content": tokenizer.decode(tokens)}, second]
    )
    held = [*begun, *tokens[:-1].tolist()]  # the last was not read
    known = next(n for n in range(len(held), 0, -1) if held[:n] == wanted[:n])
    prompts = [len(begun), len(wanted) - known]
    read.clear()
    ran = run("chat", *CHAT, stdin="The sea is blue.\nAnd the sky?\n")
    assert prompts[1] < len(wanted) - len(begun)
    assert [n for n in read if n > 1] == prompts
    assert [int(n) for n in re.findall(r"prefill: (\d+) tokens", ran.err)] == prompts


@pytest.mark.parametrize("back", ["/undo", "/new"])
def test_a_turn_taken_back_was_never_said(run, back):
    plain = run("chat", *CHAT, stdin="And the sky?\n").out
    assert run("chat", *CHAT, stdin=f"The sea is blue.\n{back}\nAnd the sky?\n").out.endswith(plain)
    assert run("chat", *CHAT, stdin=f"{back}\nAnd the sky?\n").out == plain


def interrupted(pieces: int):
    """`fa.stream` that Ctrl-C meets after some pieces, the first time it is called."""
    stream, calls = fa.stream, []

    def broken(*arguments, **options):
        calls.append(1)
        for number, piece in enumerate(stream(*arguments, **options)):
            if len(calls) == 1 and number == pieces:
                raise KeyboardInterrupt
            yield piece

    return broken


def test_an_interrupted_text_ends_its_line_and_reports(run, monkeypatch):
    whole = run("generate", *CHAT, "The sea").out
    monkeypatch.setattr(fa, "stream", interrupted(3))
    ran = run("generate", *CHAT, "The sea")
    assert ran.code == 130
    assert ran.out.endswith("\n")
    assert whole.startswith(ran.out.removesuffix("\n"))
    assert SPEED.fullmatch(ran.err)


def test_an_answer_interrupted_before_its_first_word_was_never_asked_for(run, monkeypatch):
    plain = run("chat", *CHAT, stdin="And the sky?\n").out
    monkeypatch.setattr(fa, "stream", interrupted(0))
    assert run("chat", *CHAT, stdin="The sea is blue.\nAnd the sky?\n")[:2] == (0, plain)


def test_an_interrupted_answer_is_remembered_as_far_as_it_was_written(run, monkeypatch, folder):
    config, params, tokenizer = fa.load(folder)
    monkeypatch.setattr(fa, "stream", interrupted(3))
    ran = run("chat", *CHAT, stdin="The sea is blue.\nAnd the sky?\n")
    messages = [{"role": "user", "content": "The sea is blue."}]
    written, _ = fa.generate(
        fa.key(0), fa.decoder(config), params, torch.tensor(tokenizer.prompt(messages)), steps=3
    )
    messages += [
        {"role": "assistant", "content": tokenizer.decode(written)},
        {"role": "user", "content": "And the sky?"},
    ]
    then, _ = fa.generate(
        fa.key(0), fa.decoder(config), params, torch.tensor(tokenizer.prompt(messages)), steps=6
    )
    assert ran[:2] == (0, f"{tokenizer.decode(written)}\n{tokenizer.decode(then)}\n")


def test_inspect_tells_the_memory_of_a_past(run, folder):
    ran = run("inspect")
    config, params, _ = fa.load(folder)
    per_token = fa.tree.nbytes(fa.decoder(config).cache(1)) - fa.tree.nbytes(
        fa.decoder(config).cache(0)
    )
    assert ran.code == 0
    assert ran.err == ""
    assert f"  1000 tokens    {1000 * per_token / 2**20:.1f} MiB\n" in ran.out
    assert f"{fa.tree.count(params):,} elements" in ran.out
    assert re.search(r"vocabulary +49152\n", ran.out)
    assert "layers.0-1" in ran.out


@pytest.mark.parametrize(
    ("variables", "operators"),
    [
        ({}, r"(AVX2|AVX-512), (compiled on this machine|of the installed wheel)"),
        ({"FUNCATTN_NATIVE": "0"}, "none: FUNCATTN_NATIVE=0 asks for none"),
    ],
)
def test_inspect_shows_what_the_machine_has_and_why_not(variables, operators):
    command = [sys.executable, "-m", "funcattn", "inspect", "--machine"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables, timeout=120
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(rf"^operators in C\+\+\n  {operators}$", ran.stdout, re.MULTILINE)
    assert re.search(
        r"^attention of q, k, v \(8, 512, 64\) in float32 on cpu$", ran.stdout, re.MULTILINE
    )
    assert re.search(r"^     sdpa:cudnn +for CUDA, not for cpu$", ran.stdout, re.MULTILINE)
    assert len(re.findall(r"^  -> ", ran.stdout, re.MULTILINE)) == 2 * (
        1 + torch.cuda.device_count()
    )


def test_a_terminal_is_never_steered_by_the_model(monkeypatch):
    assert cli.terminal.shown("\x1b[2Ja") == "\x1b[2Ja"  # a pipe gets what was written
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sys.stdout.isatty = lambda: True
    assert cli.terminal.shown("\x1b[2Ja\tb\nc\x9b") == "[2Ja\tb\nc"


@pytest.mark.parametrize(
    ("variable", "value", "has_colours"),
    [("TERM", "xterm", True), ("TERM", "dumb", False), ("NO_COLOR", "1", False)],
)
def test_accepted_drafts_are_coloured_on_a_terminal_that_wants_it(
    folder, monkeypatch, variable, value, has_colours
):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    def written(screen):
        monkeypatch.setattr(sys, "stdout", screen)
        drafts = ["--speculate", "lookup", "--greedy", "--no-compile", "--steps", "24"]
        assert cli.main(["generate", "--model", str(folder), *drafts, "The sea, the sea, the"]) == 0
        return screen.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(fa, "compile", lambda model: model)
    piped, seen = written(io.StringIO()), written(Screen())
    assert "\x1b" not in piped
    assert bool(re.search(r"\x1b\[36m.+?\x1b\[39m", seen, re.DOTALL)) == has_colours
    assert re.sub(r"\x1b\[3[69]m", "", seen) == cli.terminal.shown(piped)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "required: COMMAND"),
        (("write",), "invalid choice: 'write'"),
        (("generate", "--temperature", "0", "x"), "--temperature: should be above 0, got 0"),
        (("generate", "--temperature", "nan", "x"), "--temperature: should be above 0, got nan"),
        (
            ("generate", "--greedy", "--temperature", "1", "x"),
            "--temperature: not allowed with argument --greedy",
        ),
        (("generate", "--top-k", "0", "x"), "--top-k: should be 1 or more, got 0"),
        (("generate", "--top-p", "1.5", "x"), "--top-p: should be above 0, at most 1, got 1.5"),
        (("generate", "--steps", "-1", "x"), "--steps: should be 0 or more, got -1"),
        (("generate", "--steps", "many", "x"), "--steps: should be 0 or more, got many"),
        (("generate", "--seed", str(2**63), "x"), "--seed: should be 0 or more"),
        (("generate", "--num-samples", "0", "x"), "--num-samples: should be 1 or more, got 0"),
        (
            ("generate", "--speculate", "int8", "--num-samples", "2", "x"),
            "drafts are for one text at a time",
        ),
        (("generate", "--speculate", "int2", "x"), "argument --speculate: invalid choice: 'int2'"),
        (("generate", "--dtype", "int8", "x"), "--dtype: should be float32 or bfloat16, got int8"),
        (
            ("generate", "--device", "meta", "x"),
            "--device: should be a device of this machine, got meta",
        ),
        (("generate", "--stop", "", "x"), "--stop: should be a text, got an empty one"),
        (
            ("generate", "--model", "no/such.gguf", "x"),
            "no/such.gguf should be a folder, a .gguf file",
        ),
        (
            ("generate", "--model", __file__, "x"),
            "should be a folder or a .gguf file, got a .py file",
        ),
        (("generate", ""), "the prompt is empty"),
        (("generate",), "the prompt is empty"),
        (("generate", "\udcff"), "should be UTF-8"),
        (("generate", "sea " * 300), "tokens, and the model was trained on 256"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, told, capsys):
    if len(arguments) > 1 or arguments == ("generate",):
        ran = run(*arguments)
    else:
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        ran = Ran(end.value.code, *capsys.readouterr())
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("funcattn")


def test_a_reader_that_goes_away_is_no_mistake(folder):
    command = [
        sys.executable,
        "-m",
        "funcattn",
        "generate",
        "--model",
        str(folder),
        "--steps",
        "200",
        "The sea",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# eval


def told(out: str) -> dict[str, str]:
    """What stands on stdout, name by name."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())


def test_eval_tells_the_perplexity_of_a_text(run, folder, tmp_path):
    config, params, tokenizer = fa.load(folder)
    text = "The sea was calm, and the old lighthouse stood. Grüße!\n" * 3
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    ran = run("eval", str(tmp_path / "a.txt"))
    assert (ran.code, ran.err) == (0, "")
    ids = torch.tensor(tokenizer.encode(text))
    scores = fa.score(fa.decoder(config), params, ids).double()
    found = told(ran.out)
    assert float(found["perplexity"]) == pytest.approx(float((-scores.mean()).exp()), rel=1e-5)
    size = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert float(found["bits per byte"]) == pytest.approx(
        float(-scores.sum() / size / torch.tensor(2.0).log()), abs=1e-4
    )
    assert found["tokens"] == f"{len(ids) - 1} scored, of {size} bytes"
    assert run("eval", "-", stdin=text).out == ran.out


def test_eval_reads_a_long_text_in_windows(run, folder, tmp_path):
    config, params, tokenizer = fa.load(folder)
    text = "One two three four five six seven. " * 20
    found = told(run("eval", "-", "--context", "32", "--stride", "8", stdin=text).out)
    ids = torch.tensor(tokenizer.encode(text))
    wanted = fa.perplexity(fa.decoder(config), params, ids, context=32, stride=8)
    assert float(found["perplexity"]) == pytest.approx(float(wanted), rel=1e-4)
    assert found["windows"] == f"{-(-(len(ids) - 32) // 8) + 1} of at most 32 tokens"


@pytest.mark.parametrize(
    ("arguments", "stdin", "complaint"),
    [
        (["-"], "a", "the text has 1 tokens, and is scored from the second"),
        (["-"], "", "the text has 0 tokens"),
        (["-", "--context", "300"], "a b c", "--context should be at most the 256 tokens"),
        (
            ["-", "--context", "8", "--stride", "8"],
            "a b c",
            "stride should be from 1 to context - 1 = 7, got 8",
        ),
        (["-", "--stride", "0"], "a b c", "argument --stride: should be 1 or more, got 0"),
        (["/no/such/file"], "", "No such file"),
    ],
)
def test_eval_complains_in_one_line(run, arguments, stdin, complaint):
    ran = run("eval", *arguments, stdin=stdin)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert complaint in ran.err


def test_a_bar_is_shown_to_who_looks(monkeypatch):
    from rich.console import Console

    from funcattn.cli import evaluating

    screen = io.StringIO()
    monkeypatch.setattr(
        evaluating, "Console", lambda stderr: Console(file=screen, force_terminal=True)
    )
    assert list(evaluating._shown([(0, 1, 4), (2, 4, 6)])) == [(0, 1, 4), (2, 4, 6)]
    assert "Reading" in screen.getvalue()
