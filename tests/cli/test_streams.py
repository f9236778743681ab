"""The command line where streams are closed or full, files cannot be written, variables are half
set, and words are misspelled.
"""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models

import funcattn as fa
from funcattn.checkpoints import Tokenizer
from funcattn.cli import main

pytestmark = pytest.mark.cpu("the streams of a process, whatever the device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "m"
    config = fa.Config(vocabulary=64, layers=1)
    vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnop ")}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(
        tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[])), (), template
    )
    fa.save(place, config, fa.decoder(config).init(fa.key(0)), tokenizer)
    return str(place)


# what the shell does with them: exit codes that are right, whether there is text, what the last
# line on stderr says
STREAMS = {
    "stdout is closed": (
        ">&-",
        [],
        "abc",
        2,
        "funcattn: stdout cannot be written: Bad file descriptor",
    ),
    "stdout is full": (
        ">/dev/full",
        [],
        "abc",
        2,
        "funcattn: stdout cannot be written: No space left on device",
    ),
    "help is to a full disk": (
        ">/dev/full",
        ["--help"],
        "",
        2,
        "funcattn: stdout cannot be written: No space left on device",
    ),
    "stdin is closed": ("<&-", [], None, 2, "the prompt is empty"),
    "stdin is closed and not needed": ("<&-", [], "abc", 0, "decode: "),
    "stderr is full": ("2>/dev/full", [], "abc", 0, None),
    "stderr is closed": ("2>&-", [], "abc", 0, None),
    "stderr is closed at a mistake": ("2>&-", ["--temperature", "0"], "abc", 2, None),
    "stdout is closed, and stderr": (">&- 2>&-", [], "abc", 2, None),
    "the reader goes away": ("| true", ["--steps", "60"], "abc", 0, ""),
}


@pytest.fixture(scope="module")
def odd(folder):
    """What came of each: code, text, what was told. One process is the parent of all: each is a
    fork of one that has imported.
    """
    lines = [
        [
            words,
            [
                "generate",
                "--model",
                folder,
                "--steps",
                "2",
                "--greedy",
                *options,
                *([] if prompt is None else [prompt]),
            ],
        ]
        for words, options, prompt, *_ in STREAMS.values()
    ]
    server = """
import json, os, subprocess, sys, shlex
import funcattn.cli  # read by all
for words, arguments in json.loads(sys.argv[1]):
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(out[1], 1), os.dup2(err[1], 2)
        for word in words.split():
            number = 0 if word[0] == "<" else 2 if word[0] == "2" else 1
            if word.endswith("&-"):
                os.close(number)
            elif word.endswith("/dev/full"):
                os.dup2(os.open("/dev/full", os.O_WRONLY), number)
            elif word == "true":
                one = os.pipe()
                os.close(one[0])
                os.dup2(one[1], 1)
        for pipe in (*out, *err):
            os.close(pipe)
        def stream(number, mode):  # as Python makes them when it starts
            try:
                os.fstat(number)
            except OSError:
                return None
            return open(number, mode, buffering=1 if number == 2 else -1, closefd=False)
        sys.stdin, sys.stdout, sys.stderr = stream(0, "r"), stream(1, "w"), stream(2, "w")
        code = 1
        try:
            code = funcattn.cli.main(arguments)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            import traceback
            traceback.print_exc()
        for file in (sys.stdout, sys.stderr):  # as Python does at the end
            try:
                file.flush()
            except Exception as error:
                code = 120
        os._exit(code)
    os.close(out[1]), os.close(err[1])
    texts = [os.fdopen(pipe[0], "rb").read().decode() for pipe in (out, err)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *texts]), flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", server, json.dumps(lines)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-500:]
    return dict(zip(STREAMS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", STREAMS)
def test_the_text_goes_on_or_one_line_says_why_not_where(odd, case):
    *_, wanted, last = STREAMS[case]
    code, out, err = odd[case]
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert code == (141 if case == "the reader goes away" else wanted), err
    assert bool(out.strip()) == (wanted == 0 and case != "the reader goes away")
    if last is not None:
        assert last in (err.strip().splitlines() or [""])[-1]
    if wanted == 2 and last:
        assert len(err.strip().splitlines()) == 1


def code_and_told(capsys, *arguments):
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().err.replace("generate --help", "")


def test_what_cannot_be_written_is_told_before_anything_is_computed(
    folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    (tmp_path / "text").write_text("abc " * 200)
    for place in ("no/such/t.json", "file/t.json"):
        for how in ([], ["--num-samples", "2"], ["--speculate", "lookup"]):
            trace = ["generate", "--profile", tmp_path / place, "--model", folder, *how, "abc"]
            code, told = code_and_told(capsys, *trace)
            assert (code, str(tmp_path / place) in told, len(told.splitlines())) == (2, True, 1), (
                told
            )
    computed = lambda *_, **__: pytest.fail("computed")
    for option in ("--json", "--plot"):
        with monkeypatch.context() as patch:
            patch.setattr("funcattn.cli.sessions.fa.load", computed)
            code, told = code_and_told(
                capsys, "bench", option, tmp_path / "no" / "such", "--model", folder
            )
        assert (code, str(tmp_path / "no" / "such") in told, len(told.splitlines())) == (
            2,
            True,
            1,
        ), told
    monkeypatch.setattr("funcattn.cli.sessions.fa.load", computed)
    for place, why in (
        ("mine", "notes.txt"),
        ("file", "a folder"),
        ("file/below", "can be written"),
    ):
        code, told = code_and_told(capsys, "quantize", "--model", folder, "-o", tmp_path / place)
        assert code == 2
        assert why in told
        assert len(told.splitlines()) == 1
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "notes.txt").write_text("")
    code, told = code_and_told(
        capsys, "train", tmp_path / "text", "--out", tmp_path / "out", "--steps", "1"
    )
    assert (code, "notes.txt" in told) == (2, True)


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ("WORLD_SIZE=2", "RANK, MASTER_ADDR, MASTER_PORT should be set"),
        ("WORLD_SIZE=two", "WORLD_SIZE should be a number"),
        ("WORLD_SIZE=3", "is for 2 processes, got 3"),
        ("WORLD_SIZE=2 RANK=0", "MASTER_ADDR, MASTER_PORT should be set"),
        ("WORLD_SIZE=2 RANK=x MASTER_ADDR=a MASTER_PORT=1", "RANK should be a number"),
        ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=a MASTER_PORT=1", "RANK should be below WORLD_SIZE 2"),
        ("RANK=0", "is for 2 processes, got 1"),
    ],
)
def test_half_of_torchruns_variables_are_one_line(folder, capsys, monkeypatch, variables, why):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("="))
    code, told = code_and_told(capsys, "generate", "--model", folder, "--tp", "2", "abc")
    assert (code, why in told, len(told.splitlines())) == (2, True, 1), told


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generate", "--modle", "x", "abc"], "Did you mean --model?"),
        (["generate", "--modle=x", "abc"], "Did you mean --model?"),
        (["generate", "-model", "x", "abc"], "Did you mean --model?"),
        (["chat", "--temprature", "1"], "Did you mean --temperature?"),
        (["quantize", "--ouput", "x"], "Did you mean --output?"),
        # an abbreviation, and none of these
        (["eval", "text", "--strid", "0"], "should be 1 or more"),
        (
            ["generate", "why", "is", "the", "sky", "blue"],
            "A text of several words should be in quotes",
        ),
        (["train", "my", "book.txt"], "A text of several words should be in quotes"),
    ],
)
def test_a_misspelled_option_and_a_prompt_without_quotes_are_told_as_what_they_are(
    capsys, words, hint
):
    code, told = code_and_told(capsys, *words)
    assert (code, hint in told, len(told.splitlines())) == (2, True, 1), told


def test_a_conversation_begun_again_is_not_one_of_no_turns(folder, monkeypatch, capsys):
    lines = iter(["abc", "abc", "/undo", "/new"])

    def typed(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", "--model", folder, "--steps", "2", "--greedy"]) == 0
    told = capsys.readouterr().err
    assert "turns left: 1" in told
    assert "turns left: 0" not in told
    assert "A new conversation" in told


def test_what_needs_no_tokenizer_asks_for_none(folder, tmp_path, capsys):
    fa.save(tmp_path / "m", *fa.load(folder)[:2])
    assert main(["inspect", "--model", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("params", "cache", "tokenizer\n  none"))
    assert (
        main(
            [
                "quantize",
                "--model",
                str(tmp_path / "m"),
                "--scheme",
                "int8",
                "-o",
                str(tmp_path / "q"),
            ]
        )
        == 0
    )
    assert main(["inspect", "--model", str(tmp_path / "q")]) == 0
    capsys.readouterr()
    bench = [
        "bench",
        "--model",
        str(tmp_path / "m"),
        "--eager",
        "--schemes",
        "",
        "--tokens",
        "1",
        "--context",
        "2",
    ]
    assert main([*bench, "--json", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["candidates"]
    assert sorted(os.listdir(tmp_path)) == ["figures.json", "m", "q"]
    code, told = code_and_told(capsys, "generate", "--model", tmp_path / "m", "abc")
    assert (code, "tokenizer.json" in told) == (2, True)
